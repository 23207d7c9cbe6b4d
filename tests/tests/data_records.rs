//! Records from a plugin's socket to the agent's disk, byte by byte: nobody takes data in these tests, so that what the agent has read is in its
//! spool. How records go on from there is looked at with the servers that take them.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use gse_core::spool::{Spool, SpoolConfig, SyncPolicy, WhenFull};
use gse_proto::datalink::{MAX_BODY, MAX_PAYLOAD, Record, take_record};
use gse_tests::metrics::Figures;
use gse_tests::plugin::{Plugin, dynamic, dynamic_with, kind, plain};
use gse_tests::process::binary;
use gse_tests::{AgentOptions, Child, Site, StoreKind};
use rand::RngExt;

const AGENT: &str = "a1";

struct Host {
    site: Site,
    agent: Child,
}

impl Host {
    /// An agent whose servers of data are at `servers`.
    async fn start(servers: &str, sets: &[&str]) -> Self {
        let site = Site::start(StoreKind::Embedded).await.unwrap();
        Self::on(site, servers, sets)
    }

    fn on(site: Site, servers: &str, sets: &[&str]) -> Self {
        let ops = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let mut options = AgentOptions::new(AGENT, "10.1.2.3");
        options.sets = vec![format!("data.servers=[\"{servers}\"]"), format!("ops.listen={ops}")];
        options.sets.extend(sets.iter().map(ToString::to_string));
        let mut agent = site.spawn_agent(&options, "").unwrap();
        agent.addresses.insert("ops".into(), ops.to_string());
        Self { site, agent }
    }

    async fn plugin(&self) -> Plugin {
        Plugin::connect(&self.site.data_socket(AGENT)).await
    }

    /// Stops the agent and reads what it has kept.
    async fn kept(mut self) -> Vec<Record> {
        let status = self.agent.terminate(Duration::from_secs(20)).await.unwrap();
        assert!(status.success(), "{status}");
        let dir = self
            .site
            .path()
            .join(format!("agent-{}", hex::encode(AGENT)))
            .join("data");
        read(&dir)
    }
}

/// Everything in a spool, in its order.
fn read(dir: &Path) -> Vec<Record> {
    let config = SpoolConfig {
        dir: dir.to_owned(),
        segment_bytes: 8 << 20,
        max_bytes: 1 << 30,
        max_entry_bytes: MAX_BODY,
        when_full: WhenFull::DropOldest,
        sync: SyncPolicy::Never,
    };
    let (mut spool, recovery) = Spool::open(config).unwrap();
    assert!(recovery.is_clean(), "{recovery:?}");
    let (mut records, mut after) = (Vec::new(), 0);
    loop {
        let found = spool.read(after, 64 << 20).unwrap();
        let Some(last) = found.entries.last() else {
            return records;
        };
        after = last.index;
        for mut entry in found.entries {
            while let Some(record) = take_record(&mut entry.body).unwrap() {
                records.push(record);
            }
        }
    }
}

fn payloads(records: &[Record], id: u32) -> Vec<&[u8]> {
    records
        .iter()
        .filter(|record| record.data_id == id)
        .map(|record| &record.payload[..])
        .collect()
}

// contract: data-plane#8, data-plane#39, data-plane#41, data-plane#49
#[tokio::test]
async fn every_kind_cut_anywhere_in_order() {
    let host = Host::start("127.0.0.1:1", &[]).await;
    let mut wire = Vec::new();
    let mut sent: Vec<(u16, Vec<u8>)> = Vec::new();
    for n in 0..3_000_u32 {
        let long = rand::rng().random_range(0..700);
        let mut payload = n.to_be_bytes().to_vec();
        payload.extend((0..long).map(|_| rand::rng().random::<u8>()));
        let kind = match n % 4 {
            0 => {
                wire.extend(dynamic(1001, &payload));
                kind::DYNAMIC
            }
            1 => {
                wire.extend(dynamic_with(1001, &[("tlogc", "2017-01-09 21:18")], &payload));
                kind::DYNAMIC
            }
            2 => {
                // Milliseconds cut to 32 bits, as the SDK has them.
                let mut frame = plain(kind::COMMON, 1001, &payload);
                frame[8..12].copy_from_slice(&u32::MAX.wrapping_sub(n).to_be_bytes());
                wire.extend(frame);
                kind::COMMON
            }
            _ => {
                wire.extend(plain(kind::OPS, 1001, &payload));
                kind::OPS
            }
        };
        sent.push((kind as u16, payload));
        if n % 500 == 0 {
            wire.extend(plain(kind::GET_CONF, 0, b""));
        }
    }
    let mut plugin = host.plugin().await;
    let mut rest = &wire[..];
    while !rest.is_empty() {
        let (some, more) = rest.split_at(rest.len().min(rand::rng().random_range(1..5_000)));
        plugin.send(some).await.unwrap();
        rest = more;
    }
    for _ in 0..6 {
        plugin.answer().await.unwrap();
    }
    plugin.ask().await.unwrap();
    let records = host.kept().await;
    let got: Vec<(u16, Vec<u8>)> = records
        .iter()
        .map(|record| (record.kind, record.payload.to_vec()))
        .collect();
    assert_eq!(got.len(), sent.len());
    for (n, (got, sent)) in got.iter().zip(&sent).enumerate() {
        assert_eq!(got, sent, "record {n}");
    }
}

// contract: data-plane#11, data-plane#50
#[tokio::test]
async fn senders_that_leave_at_once() {
    let host = Host::start("127.0.0.1:1", &[]).await;
    host.plugin().await.ask().await.unwrap();
    for n in 0..200_u32 {
        let mut plugin = host.plugin().await;
        let mut bytes = plain(kind::OPS, 1430, &n.to_be_bytes());
        // Every other one leaves in the middle of a second frame.
        if n % 2 == 0 {
            let more = dynamic(1430, b"never whole");
            bytes.extend_from_slice(&more[..more.len() - 1 - n as usize]);
        }
        plugin.send(&bytes).await.unwrap();
    }
    let socket = host.site.data_socket(AGENT);
    for words in [
        &["-s", "raw \u{1F600}"][..],
        &["-l", "a line"],
        &["-J", "{\"own\": [1, 2]}"],
    ] {
        let mut command = Command::new(binary("gse_agent").unwrap());
        let done = command
            .args(["cmdline", "-d", "1100000"])
            .args(words)
            .arg("-S")
            .arg(&socket)
            .status();
        assert!(done.unwrap().success());
    }
    let records = host.kept().await;
    let mut short: Vec<u32> = payloads(&records, 1430)
        .iter()
        .map(|payload| u32::from_be_bytes((*payload).try_into().expect("four bytes")))
        .collect();
    short.sort_unstable();
    assert_eq!(short, (0..200).collect::<Vec<_>>());
    let events = payloads(&records, 1_100_000);
    assert_eq!(events[0], "raw \u{1F600}".as_bytes());
    let json = |n: usize| serde_json::from_slice::<BTreeMap<String, serde_json::Value>>(events[n]).unwrap();
    assert_eq!(json(1)["_value_"], serde_json::json!(["a line"]));
    assert_eq!(json(1)["_server_"], "10.1.2.3");
    assert_eq!(json(2)["own"], serde_json::json!([1, 2]));
    for key in ["_company_id_", "_plat_id_", "_server_", "_time_", "_utctime_"] {
        assert!(json(2).contains_key(key), "{key}");
    }
}

// contract: data-plane#38
#[tokio::test]
async fn the_longest_record_and_longer_ones() {
    let host = Host::start("127.0.0.1:1", &["data.memory_bytes=67108864"]).await;
    let longest = vec![0xA5; MAX_PAYLOAD];
    let mut plugin = host.plugin().await;
    plugin.send(&plain(kind::COMMON, 1, b"x")).await.unwrap();
    plugin.send(&plain(kind::COMMON, 2, &longest)).await.unwrap();
    plugin
        .send(&plain(kind::COMMON, 3, &vec![0; MAX_PAYLOAD + 1]))
        .await
        .unwrap();
    plugin.send(&dynamic(4, &longest[..MAX_PAYLOAD - 1])).await.unwrap();
    plugin.send(&dynamic(5, &vec![0; 2 * MAX_PAYLOAD])).await.unwrap();
    plugin.send(&plain(kind::COMMON, 6, b"")).await.unwrap();
    plugin.ask().await.unwrap();
    let figures = Figures::of(&host.agent).await.unwrap();
    assert_eq!(figures.sum("gse_agent_data_records_total"), 6.0);
    assert_eq!(figures.sum("gse_agent_data_dropped_total"), 2.0);
    let records = host.kept().await;
    let ids: Vec<(u32, usize)> = records
        .iter()
        .map(|record| (record.data_id, record.payload.len()))
        .collect();
    assert_eq!(ids, [(1, 1), (2, MAX_PAYLOAD), (4, MAX_PAYLOAD - 1), (6, 0)]);
    assert!(records[1].payload[..] == longest[..], "the longest one has other bytes");
}

// contract: data-plane#9
#[tokio::test]
async fn reading_goes_on_when_the_servers_take_nothing() {
    // Connections are taken and nothing is ever read from them.
    let deaf = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = Host::start(
        &deaf.local_addr().unwrap().to_string(),
        &["data.spool_bytes=33554432", "data.spool_segment_bytes=1048576"],
    )
    .await;
    let mut plugin = host.plugin().await;
    let frame = dynamic(1001, &[b'x'; 32 << 10]);
    let mut slowest = Duration::ZERO;
    for _ in 0..4_000 {
        let began = Instant::now();
        plugin.send(&frame).await.unwrap();
        slowest = slowest.max(began.elapsed());
    }
    assert!(slowest < Duration::from_secs(5), "a plugin waited for {slowest:?}");
    assert_eq!(plugin.ask().await.unwrap()["bizid"], 0);
    let memory = host.agent.memory();
    assert!(memory < 96 << 20, "{memory} bytes");
    let figures = Figures::of(&host.agent).await.unwrap();
    let of = |name: &str| figures.sum(&format!("gse_agent_data_{name}"));
    assert_eq!(of("records_total"), 4_000.0);
    assert!(of("dropped_total") > 0.0, "128 MiB do not fit");
    let accounted = of("acknowledged_total") + of("in_memory") + of("on_disk") + of("dropped_total");
    assert_eq!(accounted, 4_000.0, "every record is somewhere");
}

/// What libgse does when an agent was stopped for more than five seconds: it writes the frame again from its first byte, on the same
/// connection, whatever part of it was taken.
#[tokio::test]
async fn frames_that_are_sent_again_after_a_part() {
    let host = Host::start("127.0.0.1:1", &[]).await;
    let mut plugin = host.plugin().await;
    plugin.ask().await.unwrap();
    let frame = |n: u32| {
        let mut payload = n.to_be_bytes().to_vec();
        // Longer than what a socket takes at once: shorter frames are taken whole or not at all.
        payload.resize(300_000, b'a' + (n % 26) as u8);
        dynamic(1001, &payload)
    };
    let (mut n, mut parts) = (0, 0);
    for _ in 0..5 {
        host.agent.freeze();
        let mut part = loop {
            let bytes = frame(n);
            match plugin.stream.try_write(&bytes) {
                Ok(written) if written == bytes.len() => n += 1,
                Ok(written) => break written,
                Err(_) => break 0,
            }
        };
        parts += u64::from(part > 0);
        // Tried again in vain, too.
        if let Ok(written) = plugin.stream.try_write(&frame(n)) {
            part += written;
            parts += u64::from(written > 0);
        }
        assert!(part < 600_000);
        host.agent.go_on();
        plugin.send(&frame(n)).await.unwrap();
        n += 1;
        plugin.ask().await.unwrap();
    }
    assert!(parts > 0, "nothing was taken in part");
    let figures = Figures::of(&host.agent).await.unwrap();
    assert_eq!(figures.sum("gse_agent_data_socket_sent_again_total"), parts as f64);
    assert_eq!(figures.sum("gse_agent_data_dropped_total"), 0.0);
    let records = host.kept().await;
    assert_eq!(records.len(), n as usize);
    for (n, record) in (0..).zip(&records) {
        let expected = frame(n);
        assert!(record.payload[..] == expected[456..], "record {n}");
    }
}

// contract: data-plane#42
#[tokio::test]
async fn a_port_instead_of_a_path() {
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let paths = format!("data.socket.paths=[\"{free}\"]");
    let host = Host::start("127.0.0.1:1", &[&paths]).await;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = gse_tests::eventually("the port", Duration::from_secs(10), || async {
        tokio::net::TcpStream::connect(("127.0.0.1", free)).await.ok()
    })
    .await;
    // Nobody says whose connections these are, so reserved ids are not for them.
    let mut wire = plain(kind::COMMON, 1000, b"not allowed");
    wire.extend(dynamic(1001, b"{}"));
    wire.extend(plain(kind::GET_CONF, 0, b""));
    stream.write_all(&wire).await.unwrap();
    let mut head = [0_u8; 8];
    stream.read_exact(&mut head).await.unwrap();
    assert_eq!(head[..4], [0, 0, 0, 10]);
    let records = host.kept().await;
    assert_eq!(payloads(&records, 1001), [b"{}"]);
    assert!(payloads(&records, 1000).is_empty());
}

/// The files of every id that nobody has routed: their records, in order.
fn in_files(dir: &Path) -> BTreeMap<u32, Vec<Vec<u8>>> {
    let mut found: BTreeMap<u32, Vec<Vec<u8>>> = BTreeMap::new();
    let mut open = vec![dir.to_owned()];
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let digits: String = name.chars().filter(char::is_ascii_digit).collect();
        let Ok(id) = digits.parse() else { continue };
        let bytes = std::fs::read(&path).unwrap();
        let mut rest = &bytes[..];
        while let Some((head, more)) = rest.split_at_checked(4) {
            let length = u32::from_be_bytes(head.try_into().unwrap()) as usize;
            // One that is being written is looked at again.
            let Some((record, more)) = more.split_at_checked(length) else {
                break;
            };
            found.entry(id).or_default().push(record.to_vec());
            rest = more;
        }
    }
    found
}

// contract: data-plane#3, data-plane#4, data-plane#6, data-plane#11, data-plane#12
#[tokio::test]
async fn to_the_end_byte_by_byte() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let files = site.path().join("files");
    let sets = [
        format!("default_sink=file:{}", files.display()),
        "file.framing=length".into(),
    ];
    let server = site.data("one", &sets).await.unwrap();
    let link = server.address("link").to_owned();
    let host = Host::on(site, &link, &["data.enable_compression=true"]);
    // Neither text nor JSON, with zeros and newlines at either end.
    let odd: Vec<u8> = (0..=255).chain(*b"\n\0\xff\n\0").collect();
    let mut plugin = host.plugin().await;
    plugin.send(&dynamic(1001, b"{\"a\":1}")).await.unwrap();
    plugin
        .send(&dynamic_with(1001, &[("tlogc", "2017-01-09 21:18")], &odd))
        .await
        .unwrap();
    plugin.send(&plain(kind::COMMON, 1002, &odd)).await.unwrap();
    plugin.send(&plain(kind::OPS, 1003, b"\n")).await.unwrap();
    drop(plugin);
    let mut short = host.plugin().await;
    short.send(&plain(kind::OPS, 1004, &odd)).await.unwrap();
    drop(short);
    let expected = BTreeMap::from([
        (1001, vec![b"{\"a\":1}".to_vec(), odd.clone()]),
        (1002, vec![odd.clone()]),
        (1003, vec![b"\n".to_vec()]),
        (1004, vec![odd]),
    ]);
    gse_tests::eventually("all records in files", Duration::from_secs(15), || async {
        let found = if files.exists() {
            in_files(&files)
        } else {
            BTreeMap::new()
        };
        (found.values().map(Vec::len).sum::<usize>() >= 5).then_some(())
    })
    .await;
    assert!(
        in_files(&files) == expected,
        "other bytes: {:?}",
        in_files(&files).keys()
    );
    assert_eq!(host.plugin().await.ask().await.unwrap()["cloudid"], 0);
}
