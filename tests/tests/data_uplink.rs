//! Records on a real agent's way out: killed, stopped, cut off, its spool damaged or without room. Every record is counted, by the test
//! and by the agent.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gse_core::tls::TlsFiles;
use gse_tests::metrics::Figures;
use gse_tests::plugin::{Plugin, dynamic, plain};
use gse_tests::receiver::{Receiver, Taken};
use gse_tests::{AgentOptions, Child, Site, StoreKind, eventually};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

const AGENT: &str = "0100005254008ed86116666614661852";
const ID: u32 = 1_500_001;
const PATIENCE: Duration = Duration::from_secs(15);

/// A site whose agent sends to a receiver.
struct Host {
    site: Site,
    agent: Option<Child>,
    options: AgentOptions,
    ops: String,
    socket: PathBuf,
    taken: Arc<Taken>,
    receivers: Vec<Receiver>,
}

/// The agent's own count.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    taken: u64,
    acknowledged: u64,
    in_memory: u64,
    on_disk: u64,
    dropped: u64,
}

impl Host {
    async fn start(servers: usize, sets: &[&str]) -> Self {
        let site = Site::start(StoreKind::Embedded).await.unwrap();
        let taken = Arc::new(Taken::default());
        let mut receivers = Vec::new();
        for _ in 0..servers {
            receivers.push(Receiver::start(&files(&site), &taken, "127.0.0.1:0").await.unwrap());
        }
        let addresses: Vec<String> = receivers.iter().map(|r| format!("\"{}\"", r.address)).collect();
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let mut options = AgentOptions::new(AGENT, "10.1.2.4");
        options.sets = vec![
            format!("ops.listen={port}"),
            format!("data.servers=[{}]", addresses.join(",")),
            "data.retry_min_ms=20".into(),
            "data.retry_max_ms=200".into(),
        ];
        options.sets.extend(sets.iter().map(|set| (*set).to_owned()));
        let socket = site.data_socket(AGENT);
        let mut host = Self {
            site,
            agent: None,
            options,
            ops: port.to_string(),
            socket,
            taken,
            receivers,
        };
        host.run_agent();
        host
    }

    fn run_agent(&mut self) {
        let mut agent = self.site.spawn_agent(&self.options, "").unwrap();
        agent.addresses.insert("ops".into(), self.ops.clone());
        self.agent = Some(agent);
    }

    fn agent(&mut self) -> &mut Child {
        self.agent.as_mut().unwrap()
    }

    /// Where the agent keeps its spool.
    fn spool(&self) -> PathBuf {
        let data = self.site.path().join(format!("agent-{}", hex::encode(AGENT)));
        data.join("data")
    }

    /// One scrape. It must add up, whenever it is taken.
    async fn count(&self) -> Option<Count> {
        let figures = Figures::of(self.agent.as_ref()?).await.ok()?;
        let of = |name: &str| figures.sum(&format!("gse_agent_data_{name}")) as u64;
        let count = Count {
            taken: of("records_total"),
            acknowledged: of("acknowledged_total"),
            in_memory: of("in_memory"),
            on_disk: of("on_disk"),
            dropped: of("dropped_total"),
        };
        assert_eq!(
            count.taken,
            count.acknowledged + count.in_memory + count.on_disk + count.dropped,
            "{count:?}"
        );
        Some(count)
    }

    async fn until(&self, what: &str, reached: impl Fn(Count) -> bool) -> Count {
        eventually(what, PATIENCE, || async {
            self.count().await.filter(|count| reached(*count))
        })
        .await
    }

    async fn plugin(&self) -> Plugin {
        Plugin::connect(&self.socket).await
    }

    /// Sends records with these numbers.
    async fn send(&self, plugin: &mut Plugin, numbers: std::ops::Range<u64>) {
        let mut frames = Vec::new();
        for number in numbers {
            frames.extend_from_slice(&dynamic(ID, format!("{number:012}").as_bytes()));
        }
        plugin.send(&frames).await.unwrap();
    }
}

fn files(site: &Site) -> TlsFiles {
    let certs = site.path().join("certs");
    TlsFiles {
        ca: certs.join("gseca.crt"),
        cert: certs.join("gse_server.crt"),
        key: certs.join("gse_server.key"),
    }
}

/// The numbers in the order of their first arrival rise, and none came twice.
fn in_order(numbers: &[u64]) {
    for pair in numbers.windows(2) {
        assert!(pair[0] < pair[1], "{} came before {}", pair[0], pair[1]);
    }
}

#[tokio::test]
async fn stopped_and_started_with_nobody_there_it_loses_nothing() {
    // contract: data-plane#49, reliability#P5
    let mut host = Host::start(1, &[]).await;
    let address = host.receivers.remove(0).address.clone();
    let mut plugin = host.plugin().await;
    host.send(&mut plugin, 0..3_000).await;
    host.until("taken", |count| count.taken == 3_000).await;
    // At once: most of it is in memory.
    host.agent().terminate(Duration::from_secs(10)).await.unwrap();
    host.run_agent();
    host.until("kept", |count| count.on_disk == 3_000).await;
    let mut plugin = host.plugin().await;
    host.send(&mut plugin, 3_000..4_000).await;
    let taken = Arc::clone(&host.taken);
    host.receivers
        .push(Receiver::start(&files(&host.site), &taken, &address).await.unwrap());
    let count = host.until("acknowledged", |count| count.acknowledged == 4_000).await;
    assert_eq!((count.taken, count.dropped, count.on_disk), (4_000, 0, 0));
    assert_eq!(host.taken.numbers(), (0..4_000).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_receiver_that_takes_nothing_never_stops_the_plugins() {
    // contract: data-plane#9, reliability#F15
    let host = Host::start(1, &["data.spool_bytes=33554432", "data.spool_segment_bytes=4194304"]).await;
    host.taken.deaf.store(true, Ordering::Relaxed);
    let mut plugin = host.plugin().await;
    let frames: Vec<u8> = (0..100).flat_map(|_| dynamic(ID, &[7; 4_000])).collect();
    let begun = Instant::now();
    let mut longest = Duration::ZERO;
    // Far more than the spool takes; each write must be over long before clients begin to send again.
    for _ in 0..250 {
        let at = Instant::now();
        plugin.send(&frames).await.unwrap();
        longest = longest.max(at.elapsed());
    }
    assert!(longest < Duration::from_secs(2), "{longest:?} of {:?}", begun.elapsed());
    let count = host
        .until("all taken", |count| count.taken == 25_000 && count.in_memory < 100)
        .await;
    assert!(count.dropped > 10_000, "{count:?}");
    host.taken.deaf.store(false, Ordering::Relaxed);
    let end = host
        .until("the rest", |count| count.on_disk + count.in_memory == 0)
        .await;
    let reasons = Figures::of(host.agent.as_ref().unwrap()).await.unwrap();
    let reasons: Vec<&str> = reasons.lines("gse_agent_data_dropped_total").collect();
    println!("{count:?} became {end:?}: {reasons:?}");
    // What was on disk then, and nothing of it is damaged.
    assert!(
        end.acknowledged >= count.on_disk && count.on_disk > 2_000,
        "{count:?} became {end:?}: {reasons:?}"
    );
}

#[tokio::test]
async fn long_and_short_records_pass_unchanged() {
    // contract: data-plane#38
    let host = Host::start(1, &["data.enable_compression=true"]).await;
    let mut plugin = host.plugin().await;
    let long: Vec<u8> = (0..10_485_759u32).map(|n| (n * 7 % 251) as u8).collect();
    plugin.send(&plain(0xC01, ID, b"1")).await.unwrap();
    plugin.send(&dynamic(ID, &long)).await.unwrap();
    plugin.send(&plain(0xC0C, ID, b"2")).await.unwrap();
    host.until("acknowledged", |count| count.acknowledged == 3).await;
    let payloads = host.taken.payloads.lock().unwrap();
    assert_eq!((&payloads[0][..], &payloads[2][..]), (&b"1"[..], &b"2"[..]));
    assert!(payloads[1] == long);
}

#[tokio::test]
async fn of_two_servers_one_may_go_at_any_time() {
    // contract: reliability#P5
    let mut host = Host::start(2, &[]).await;
    let mut plugin = host.plugin().await;
    for round in 0..10u64 {
        for part in 0..10 {
            let from = round * 1_000 + part * 100;
            host.send(&mut plugin, from..from + 100).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let gone = host.receivers.remove(0);
        let address = gone.address.clone();
        drop(gone);
        let (files, taken) = (files(&host.site), Arc::clone(&host.taken));
        let back = eventually("its address", PATIENCE, || async {
            Receiver::start(&files, &taken, &address).await.ok()
        });
        let back = back.await;
        host.receivers.push(back);
    }
    host.until("acknowledged", |count| count.acknowledged == 10_000).await;
    assert_eq!(host.taken.numbers(), (0..10_000).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_damaged_spool_gives_what_is_good_of_it() {
    // contract: reliability#F11
    for cut in [true, false] {
        let mut host = Host::start(1, &["data.spool_segment_bytes=65536", "data.batch_bytes=4096"]).await;
        let address = host.receivers.remove(0).address.clone();
        let mut plugin = host.plugin().await;
        host.send(&mut plugin, 0..20_000).await;
        host.until("on disk", |count| count.on_disk == 20_000).await;
        host.agent().terminate(Duration::from_secs(10)).await.unwrap();
        let mut segments: Vec<PathBuf> = std::fs::read_dir(host.spool())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|end| end == "spool"))
            .collect();
        segments.sort();
        assert!(segments.len() > 3, "{segments:?}");
        let bytes = std::fs::read(&segments[1]).unwrap();
        let mut bytes = bytes;
        if cut {
            bytes.truncate(bytes.len() / 2);
        } else {
            let at = bytes.len() / 2;
            bytes[at] ^= 16;
        }
        std::fs::write(&segments[1], bytes).unwrap();
        host.run_agent();
        let taken = Arc::clone(&host.taken);
        host.receivers
            .push(Receiver::start(&files(&host.site), &taken, &address).await.unwrap());
        let count = host
            .until("all accounted for", |count| {
                count.acknowledged > 0 && count.on_disk + count.in_memory == 0
            })
            .await;
        assert_eq!(count.taken, 20_000);
        assert!(count.dropped > 0 && count.dropped < 5_000, "{count:?}");
        let numbers = host.taken.numbers();
        assert_eq!(numbers.len() as u64, count.acknowledged);
        in_order(&numbers);
    }
}

/// A small file system of its own, while it lives.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf) -> Option<Self> {
        std::fs::create_dir_all(&at).unwrap();
        let done = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs"])
            .arg(&at)
            .status();
        done.is_ok_and(|status| status.success()).then_some(Self(at))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").args(["-l"]).arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_full_disk_costs_what_has_no_room_and_nothing_else() {
    // contract: reliability#F8
    let mut host = Host::start(1, &["data.memory_bytes=1048576"]).await;
    let address = host.receivers.remove(0).address.clone();
    host.agent().terminate(Duration::from_secs(10)).await.unwrap();
    let Some(small) = Small::mount(host.spool()) else {
        eprintln!("skipped: a file system cannot be mounted here (needs root)");
        return;
    };
    host.run_agent();
    let mut plugin = host.plugin().await;
    let mut number = 0;
    // Until the disk is full, memory is full, and some more.
    let full = loop {
        let frames: Vec<u8> = (number..number + 100)
            .flat_map(|n: u64| dynamic(ID, format!("{n:012}{:500}", "").as_bytes()))
            .collect();
        number += 100;
        plugin.send(&frames).await.unwrap();
        if number % 2_000 == 0 {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let count = host.until("taken", |count| count.taken == number).await;
            if count.dropped > 1_000 {
                break count;
            }
        }
        assert!(number < 100_000, "1 MiB is never full");
    };
    assert!(full.on_disk > 500 && full.in_memory > 500, "{full:?}");
    let taken = Arc::clone(&host.taken);
    host.receivers
        .push(Receiver::start(&files(&host.site), &taken, &address).await.unwrap());
    host.until("all that was kept", |count| count.on_disk + count.in_memory == 0)
        .await;
    // There is room again.
    for _ in 0..5 {
        let frames: Vec<u8> = (number..number + 100)
            .flat_map(|n: u64| dynamic(ID, format!("{n:012}").as_bytes()))
            .collect();
        number += 100;
        plugin.send(&frames).await.unwrap();
    }
    let end = host
        .until("everything", |count| {
            count.taken == number && count.on_disk + count.in_memory == 0
        })
        .await;
    assert_eq!(end.acknowledged, number - end.dropped);
    let numbers = host.taken.numbers();
    assert_eq!(numbers.len() as u64, end.acknowledged);
    in_order(&numbers);
    assert_eq!(
        numbers[numbers.len() - 500..],
        (number - 500..number).collect::<Vec<_>>()
    );
    host.agent().terminate(Duration::from_secs(10)).await.unwrap();
    drop(small);
}

/// Writes numbered records, as fast as `pause` allows, to whatever agent is there; counts those that the kernel took whole.
async fn write_on(socket: PathBuf, pause: Duration, written: Arc<AtomicU64>, stop: Arc<AtomicBool>) {
    let mut number = 0u64;
    'connections: while !stop.load(Ordering::Relaxed) {
        let Ok(mut stream) = UnixStream::connect(&socket).await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        while !stop.load(Ordering::Relaxed) {
            let mut frames = Vec::new();
            for _ in 0..20 {
                frames.extend_from_slice(&dynamic(ID, format!("{number:012}").as_bytes()));
                number += 1;
            }
            if stream.write_all(&frames).await.is_err() {
                continue 'connections;
            }
            written.store(number, Ordering::Relaxed);
            tokio::time::sleep(pause).await;
        }
    }
}

/// Kills agent and receivers at random for a while, under load.
async fn chaos(length: Duration) {
    let spool_after = 200;
    let mut host = Host::start(2, &[&format!("data.spool_after_ms={spool_after}")]).await;
    let written = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let writing = tokio::spawn(write_on(
        host.socket.clone(),
        Duration::from_millis(4),
        Arc::clone(&written),
        Arc::clone(&stop),
    ));
    let begun = Instant::now();
    let (mut kills, mut scrapes) = (0u64, 0u64);
    while begun.elapsed() < length {
        tokio::time::sleep(Duration::from_millis(rand::random_range(50..900))).await;
        match rand::random_range(0..4) {
            0 | 1 => {
                kills += 1;
                host.agent().kill_9();
                host.run_agent();
            }
            2 => {
                let gone = host.receivers.remove(0);
                let address = gone.address.clone();
                drop(gone);
                tokio::time::sleep(Duration::from_millis(rand::random_range(0..700))).await;
                let (files, taken) = (files(&host.site), Arc::clone(&host.taken));
                let back = eventually("its address", PATIENCE, || async {
                    Receiver::start(&files, &taken, &address).await.ok()
                });
                let back = back.await;
                host.receivers.push(back);
            }
            _ => scrapes += u64::from(host.count().await.is_some()),
        }
    }
    stop.store(true, Ordering::Relaxed);
    writing.await.unwrap();
    let end = host
        .until("all delivered", |count| {
            count.acknowledged > 0 && count.on_disk + count.in_memory == 0
        })
        .await;
    let written = written.load(Ordering::Relaxed);
    let numbers = host.taken.numbers();
    // A batch that was taken and whose acknowledgement was lost with the agent comes again from the spool only under its own number, and
    // the receiver knows that: nothing comes twice.
    in_order(&numbers);
    let lost = written.saturating_sub(numbers.len() as u64);
    // What was in memory or in the socket when it was killed: 20 records each 4 ms at most, for as long as the spool is behind, and a bit.
    let at_most = kills * 20 * (spool_after + 100) / 4;
    println!(
        "{written} written, {} taken, {lost} lost by {kills} kills, {scrapes} scrapes, {end:?}",
        numbers.len()
    );
    assert!(lost <= at_most, "{lost} lost, {at_most} may be");
    assert!(numbers.len() as u64 > written / 2, "{end:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_random_it_loses_what_was_in_memory_and_no_more() {
    // contract: reliability#P5, reliability#F12
    chaos(Duration::from_secs(10)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "full tier: ten minutes"]
async fn killed_at_random_for_ten_minutes() {
    // contract: reliability#P5, reliability#F12
    chaos(Duration::from_secs(600)).await;
}
