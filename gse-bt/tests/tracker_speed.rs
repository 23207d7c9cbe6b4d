//! How many announces over UDP one core answers, with a million peers known: a server on one thread, clients on another. The figure
//! that counts is that of `cargo test --release -p gse-bt --test tracker_speed -- --ignored --nocapture`.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gse_bt::tracker::udp::{Request, Response};
use gse_bt::tracker::{Access, Announce, Event, FrontConfig, Peers, Tracker, TrackerConfig, TrackerMetrics, serve};
use gse_core::lifecycle::Lifecycle;
use gse_core::random::Random;
use nix::sys::resource::{UsageWho, getrusage};

const SWARMS: u32 = 1_000;
const PEERS: u32 = 1_000_000;
/// Requests that are under way at once.
const UNDER_WAY: usize = 64;
const FOR: Duration = Duration::from_secs(5);

fn swarm(n: u32) -> [u8; 20] {
    let mut swarm = [0; 20];
    swarm[0] = n as u8;
    swarm[1..5].copy_from_slice(&n.to_be_bytes());
    swarm
}

fn announce(n: u32) -> Announce {
    let mut peer_id = [0; 20];
    peer_id[12..16].copy_from_slice(&n.to_be_bytes());
    Announce {
        swarm: swarm(n % SWARMS),
        peer_id,
        port: 6881,
        left: u64::from((n / SWARMS) % 4 != 1),
        event: Event::None,
        wanted: None,
    }
}

/// Seconds that this thread has computed, in the kernel for it included.
fn computed() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).expect("known");
    [usage.user_time(), usage.system_time()]
        .map(|time| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6)
        .iter()
        .sum()
}

/// A tracker on a runtime and thread of its own; ended by draining `life`. The thread returns how long it computed.
fn server(tracker: Arc<Tracker>, life: Lifecycle) -> (SocketAddr, std::thread::JoinHandle<f64>) {
    let (tell, told) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let config = FrontConfig {
                udp_listen: "127.0.0.1:0".to_owned(),
                ..FrontConfig::default()
            };
            let listening = serve(&config, tracker, &[1; 32], &life).await.expect("a free port");
            tell.send(listening.udp.expect("asked for")).expect("waited for");
            life.finished(Duration::from_secs(5)).await;
        });
        computed()
    });
    (told.recv().expect("started"), thread)
}

fn ask(socket: &UdpSocket, request: &Request) -> Response {
    let mut answer = [0; 4096];
    socket.send(&request.encode()).expect("sent");
    let len = socket.recv(&mut answer).expect("answered");
    Response::parse(&answer[..len], false).expect("an answer")
}

#[test]
#[ignore = "full tier: a million peers, five seconds of load on both cores"]
fn a_hundred_thousand_announces_a_second() {
    // contract: p2p#12
    let config = TrackerConfig {
        peer_ttl_s: 10_000,
        ..TrackerConfig::default()
    };
    let tracker = Tracker::new(config, Access::Listed, TrackerMetrics::default(), Random::system());
    let mut out = Peers::default();
    for n in 0..SWARMS {
        assert!(tracker.allow(swarm(n)));
    }
    for n in 0..PEERS {
        let ip = Ipv4Addr::from(0x0a00_0000 + n);
        tracker.announce(ip.into(), &announce(n), 0, &mut out).expect("allowed");
    }
    assert_eq!(tracker.peers(), PEERS as usize);
    let tracker = Arc::new(tracker);
    let life = Lifecycle::new("tracker");
    let (address, thread) = server(tracker.clone(), life.clone());

    let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    socket.connect(address).expect("reachable");
    socket.set_read_timeout(Some(Duration::from_secs(1))).expect("set");
    let Response::Connect { connection, .. } = ask(&socket, &Request::Connect { transaction: 0 }) else {
        panic!("no connection id");
    };
    // All from one address, so these are the same thousand peers again and again, among those of their swarms.
    let mut datagrams: Vec<Vec<u8>> = (0..SWARMS)
        .map(|n| {
            let request = Request::Announce {
                connection,
                transaction: 0,
                announce: announce(PEERS + n),
            };
            request.encode()
        })
        .collect();

    let started = Instant::now();
    let mut sent_at = vec![started; UNDER_WAY];
    let mut waits: Vec<Duration> = Vec::with_capacity(2_000_000);
    let mut answer = [0; 4096];
    let mut next = 0;
    let mut send = |slot: usize, sent_at: &mut [Instant]| {
        let datagram = &mut datagrams[next % SWARMS as usize];
        next += 1;
        datagram[12..16].copy_from_slice(&(slot as u32).to_be_bytes());
        sent_at[slot] = Instant::now();
        socket.send(datagram).expect("sent");
    };
    for slot in 0..UNDER_WAY {
        send(slot, &mut sent_at);
    }
    while started.elapsed() < FOR {
        let len = socket.recv(&mut answer).expect("nothing is lost on this host");
        assert!(
            answer[3] == 1 && len == 20 + 40 * 6,
            "peers, and as many as by default: {len}"
        );
        let slot = u32::from_be_bytes([answer[4], answer[5], answer[6], answer[7]]) as usize;
        waits.push(sent_at[slot].elapsed());
        send(slot, &mut sent_at);
    }
    let rate = waits.len() as f64 / started.elapsed().as_secs_f64();
    waits.sort_unstable();
    let p99 = waits[waits.len() * 99 / 100];
    life.drain();
    let server_s = thread.join().expect("ended well");
    // What one core can do does not depend on what else the host does meanwhile.
    let per_core = waits.len() as f64 / server_s;
    println!(
        "{rate:.0} announces/s with {} peers, p99 {p99:?}; {per_core:.0} per second that the server computed",
        tracker.peers()
    );
    // Without optimisation it is enough to see that nothing is far off.
    let (least, longest) = match cfg!(debug_assertions) {
        true => (25_000.0, Duration::from_millis(50)),
        false => (100_000.0, Duration::from_millis(5)),
    };
    assert!(per_core >= least, "{per_core:.0} announces/s");
    assert!(p99 < longest, "p99 {p99:?}");
}
