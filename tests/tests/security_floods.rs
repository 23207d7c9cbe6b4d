//! Whoever has not shown who they are can waste neither the servers' time nor their memory.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::time::{Duration, Instant};

use gse_core::tls::{Role, TlsFiles};
use gse_tests::{Api, Site, StoreKind};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

const CALLS: usize = 100;
/// Below this the machine's own noise decides.
const NOISE: Duration = Duration::from_millis(100);
const PER_CONNECTION: u64 = 64 * 1024;

/// A connection from one of many addresses.
async fn from(n: usize, address: &str) -> Option<TcpStream> {
    let socket = TcpSocket::new_v4().ok()?;
    let source = [
        127,
        9,
        u8::try_from(n / 200 % 200).ok()?,
        u8::try_from(n % 200 + 1).ok()?,
    ];
    socket.bind((source, 0).into()).ok()?;
    let connect = socket.connect(address.parse().ok()?);
    tokio::time::timeout(Duration::from_secs(5), connect).await.ok()?.ok()
}

/// The 99th percentile of calls that each come on a connection of their own.
async fn p99(api: &Api) -> Duration {
    let body = json!({"agent_id_list": ["nobody"]});
    let mut times = Vec::new();
    for _ in 0..CALLS {
        let fresh = api.clone().anew();
        let started = Instant::now();
        let reply = fresh.post("/api/v2/cluster/list_agent_state", &body).await;
        times.push(started.elapsed());
        assert_eq!(reply["code"], 0, "a legitimate call is refused: {reply}");
    }
    times.sort();
    times[CALLS * 99 / 100 - 1]
}

fn resident(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The head of a POST, without anything that says who sends it.
fn head() -> Vec<u8> {
    let path = b"/api/v2/cluster/list_agent_state";
    let mut block = vec![0x83, 0x86, 0x44, u8::try_from(path.len()).unwrap()];
    block.extend(path);
    block.extend([0x41, 1, b'x']);
    block
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Sends what `next` gives until the other side has had enough or the time is up; how many bytes that were, and whether it was cut off.
async fn pour(address: &str, source: usize, until: Instant, mut next: impl FnMut(u32) -> Vec<u8>) -> (u64, bool) {
    let Some(stream) = from(source, address).await else {
        return (0, true);
    };
    let (mut read, mut write) = stream.into_split();
    let drain = tokio::spawn(async move {
        let mut bytes = [0; 4096];
        while matches!(read.read(&mut bytes).await, Ok(n) if n > 0) {}
    });
    let (mut sent, mut cut) = (0, false);
    if write.write_all(PREFACE).await.is_ok() {
        for n in 0.. {
            let bytes = next(n);
            let write = tokio::time::timeout(Duration::from_millis(500), write.write_all(&bytes)).await;
            cut = matches!(write, Ok(Err(_))) || drain.is_finished();
            if cut || Instant::now() >= until {
                break;
            }
            sent += bytes.len() as u64;
        }
    }
    drain.abort();
    (sent, cut)
}

struct Floods {
    address: String,
    api: Api,
    pid: i32,
    limit: Duration,
}

impl Floods {
    /// Legitimate calls while `flood` is held, and the memory that takes.
    async fn withstand<T>(&self, what: &str, connections: u64, flood: impl Future<Output = T>) -> T {
        let before = resident(self.pid);
        let held = flood.await;
        let after = resident(self.pid);
        let p99 = p99(&self.api).await;
        println!(
            "{what}: p99 {p99:?}, {} bytes for each of {connections}",
            after.saturating_sub(before) / connections
        );
        assert!(p99 <= self.limit, "{what}: p99 {p99:?} is more than {:?}", self.limit);
        let per = after.saturating_sub(before) / connections;
        assert!(per <= PER_CONNECTION, "{what}: {per} bytes for each connection");
        held
    }

    async fn idle(&self, count: usize) -> Vec<TcpStream> {
        let mut held = Vec::new();
        for n in 0..count {
            held.extend(from(n / 100, &self.address).await);
            if n % 1_000 == 999 {
                // Those that were closed need no descriptor of ours any more.
                held.retain(|stream: &TcpStream| {
                    let read = stream.try_read(&mut [0]);
                    matches!(read, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
                });
            }
        }
        // They have had their second to say something.
        tokio::time::sleep(Duration::from_millis(1_200)).await;
        held
    }
}

fn many_files() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

async fn floods(site: &Site, server: &str) -> Floods {
    let (child, api) = match server {
        "gse_api" => (site.api.as_ref().unwrap(), site.api()),
        _ => (site.task.as_ref().unwrap(), site.api()),
    };
    p99(&api).await;
    let baseline = p99(&api).await;
    println!("baseline: p99 {baseline:?}");
    Floods {
        address: child.address("http").to_owned(),
        pid: child.pid(),
        api,
        limit: (baseline * 3).max(NOISE),
    }
}

// contract: reliability#S9
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_and_slow_connections_keep_nobody_out() {
    many_files();
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let floods = floods(&site, "gse_api").await;
    let held = floods.withstand("idle connections", 2_300, floods.idle(3_000)).await;
    drop(held);
    // One address alone has no more than its share.
    let mut one = Vec::new();
    for _ in 0..700 {
        one.extend(from(9_999, &floods.address).await);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut open = 0;
    for stream in &mut one {
        let mut byte = [0];
        let read = tokio::time::timeout(Duration::from_millis(1), stream.read(&mut byte)).await;
        open += usize::from(read.is_err());
    }
    assert!(open <= 256 + 264 + 8, "{open} connections of one address are kept");
    drop(one);
    // Heads that never end, a byte at a time.
    let slow = async {
        let mut held = Vec::new();
        for n in 0..500 {
            if let Some(mut stream) = from(n / 50, &floods.address).await {
                let _ = stream
                    .write_all(b"POST /api/v2/cluster/list_agent_state HTTP/1.1\r\nHost: x\r\nX-A: ")
                    .await;
                held.push(stream);
            }
        }
        held
    };
    let mut held = floods.withstand("slow heads", 500, slow).await;
    let started = Instant::now();
    let mut last = held.pop().unwrap();
    let mut rest = Vec::new();
    let end = tokio::time::timeout(Duration::from_secs(12), last.read_to_end(&mut rest)).await;
    assert!(
        end.is_ok(),
        "a head that does not end is waited for after {:?}",
        started.elapsed()
    );
}

// contract: reliability#S9
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http2_floods_are_cut_off() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    for server in ["gse_api", "gse_task"] {
        let floods = floods(&site, server).await;
        let until = Instant::now() + Duration::from_secs(2);
        let reset = |n: u32| {
            let stream = 2 * n + 1;
            [frame(1, 4, stream, &head()), frame(3, 0, stream, &8_u32.to_be_bytes())].concat()
        };
        let continued = |n: u32| match n {
            0 => frame(1, 0, 1, &head()),
            // A literal header that is not to be remembered, 8 KiB each.
            _ => frame(9, 0, 1, &[&[0, 1, b'a', 0x7f, 0x81, 0x3e][..], &[b'b'; 8_000]].concat()),
        };
        let empty = |n: u32| match n {
            0 => frame(1, 4, 1, &head()),
            _ => frame(0, 0, 1, &[]).repeat(100),
        };
        let settings = |_: u32| frame(4, 0, 0, &[]).repeat(100);
        let flood = async {
            tokio::join!(
                pour(&floods.address, 1, until, reset),
                pour(&floods.address, 2, until, continued),
                pour(&floods.address, 3, until, empty),
                pour(&floods.address, 4, until, settings),
            )
        };
        let before = resident(floods.pid);
        let (poured, p99) = tokio::join!(flood, p99(&floods.api));
        println!("{server}: p99 {p99:?} while {poured:?} bytes of resets, continuations, empty data and settings came");
        assert!(
            p99 <= floods.limit,
            "{server}: p99 {p99:?} is more than {:?}",
            floods.limit
        );
        assert!(
            resident(floods.pid).saturating_sub(before) < 16 << 20,
            "memory grows with a flood"
        );
        assert!(
            poured.0.1,
            "streams that are opened and reset without end are not cut off"
        );
        assert!(poured.1.1, "a head without an end is not cut off");
        assert!(poured.2.1, "empty frames without end are not cut off");
    }
}

// contract: reliability#S9
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_that_stop_half_way_end_in_time() {
    many_files();
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let task = site.task.as_ref().unwrap();
    let floods = floods(&site, "gse_task").await;
    for listener in ["internal", "agents"] {
        let address = task.address(listener).to_owned();
        // The beginning of a ClientHello of 512 bytes.
        let half = async {
            let mut held = Vec::new();
            for n in 0..1_000 {
                if let Some(mut stream) = from(n / 10, &address).await {
                    let _ = stream.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]).await;
                    held.push(stream);
                }
            }
            held
        };
        let mut held = floods
            .withstand(&format!("half handshakes on {listener}"), 1_000, half)
            .await;
        // Those who mean it are let in meanwhile.
        if listener == "agents" {
            let (cert, key) = site.agent_certificate("0:10.0.0.1").unwrap();
            let ca = site.path().join("certs/gseca.crt");
            let mut wire = gse_tests::Wire::connect(&address, &ca, &cert, &key).await.unwrap();
            wire.greet(gse_tests::wire::hello("0:10.0.0.1")).await.unwrap();
        } else {
            let certs = site.path().join("certs");
            let files = TlsFiles {
                ca: certs.join("gseca.crt"),
                cert: certs.join("gse_server.crt"),
                key: certs.join("gse_server.key"),
            };
            let config = gse_core::tls::client_config(&files, Role::Server, &[b"http/1.1"]).unwrap();
            let tcp = TcpStream::connect(&address).await.unwrap();
            let connect = tokio_rustls::TlsConnector::from(config).connect(gse_core::tls::server_name(), tcp);
            tokio::time::timeout(Duration::from_secs(3), connect)
                .await
                .expect("in time")
                .unwrap();
        }
        let mut last = held.pop().unwrap();
        let mut rest = Vec::new();
        let end = tokio::time::timeout(Duration::from_secs(12), last.read_to_end(&mut rest)).await;
        assert!(
            end.is_ok(),
            "a handshake that does not go on is waited for on {listener}"
        );
    }
}

// contract: reliability#S9
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "full tier: 20,000 connections"]
async fn twenty_thousand_idle_connections() {
    many_files();
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    for server in ["gse_api", "gse_task"] {
        let floods = floods(&site, server).await;
        drop(
            floods
                .withstand("20,000 idle connections", 2_300, floods.idle(20_000))
                .await,
        );
    }
}
