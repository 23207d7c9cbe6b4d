//! gse_data in trouble: killed while a sink is away, with a damaged spool, a full disk, a dead sink, thousands of ids, and routes that
//! change while records come.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::StreamExt;
use gse_tests::files::SmallDisk;
use gse_tests::metrics::Figures;
use gse_tests::plugin::{Plugin, dynamic, plain};
use gse_tests::process::binary;
use gse_tests::site::{APP, SECRET};
use gse_tests::{AgentOptions, Child, Fault, Proxy, Site, StoreKind, eventually};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

const AGENT: &str = "0100005254008ed86116666614661855";
const ID: u32 = 1_500_011;
const OTHER: u32 = 1_500_012;
const PATIENCE: Duration = Duration::from_secs(15);

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// A site with one gse_data, which comes back where it was, and an agent in front of it.
struct Place {
    site: Site,
    data: Child,
    sets: Vec<String>,
    agent: Child,
}

impl Place {
    async fn start(sets: &[&str]) -> Self {
        Self::on(Site::start(StoreKind::Embedded).await.unwrap(), sets).await
    }

    async fn on(site: Site, sets: &[&str]) -> Self {
        let port = free_port();
        let mut all = vec![
            format!("link.listen=127.0.0.1:{port}"),
            "sinks.retry_max_ms=200".into(),
            "sinks.attempt_timeout_ms=1000".into(),
        ];
        all.extend(sets.iter().map(|set| (*set).to_owned()));
        let data = site.data("faults", &all).await.unwrap();
        let ops = format!("127.0.0.1:{}", free_port());
        let mut options = AgentOptions::new(AGENT, "10.1.2.7");
        options.sets = vec![
            format!("ops.listen={ops}"),
            format!("data.servers=[\"127.0.0.1:{port}\"]"),
            "data.retry_min_ms=20".into(),
            "data.retry_max_ms=200".into(),
        ];
        let mut agent = site.spawn_agent(&options, "").unwrap();
        agent.addresses.insert("ops".into(), ops);
        Self {
            site,
            data,
            sets: all,
            agent,
        }
    }

    async fn start_again(&mut self) {
        self.data = self.site.data("faults", &self.sets).await.unwrap();
    }

    fn dir(&self) -> PathBuf {
        self.site.path().join("gse_data-faults")
    }

    async fn call(&self, operation: &str, mut body: Value) -> Value {
        body["operation"] = json!({"operator_name": "admin"});
        let path = format!("/api/v2/data/{operation}");
        let reply = self.site.data_api(&self.data).post(&path, &body).await;
        assert_eq!(reply["code"], 0, "{operation}: {reply}");
        reply["data"].clone()
    }

    /// A new stream's number.
    async fn stream(&self, stream: &Value) -> i64 {
        let body = json!({"metadata": {"plat_name": "bkmonitor"}, "stream_to": stream});
        self.call("add_streamto", body).await["stream_to_id"].as_i64().unwrap()
    }

    /// Leads an id to a stream each, and waits until that is followed.
    async fn route(&self, id: u32, streams: &[Value]) -> Vec<i64> {
        let mut numbers = Vec::new();
        let mut routes = Vec::new();
        for stream in streams {
            let number = self.stream(stream).await;
            let mut to = json!({"stream_to_id": number});
            if stream["report_mode"] == "redis" {
                to["redis"] = json!({"channel_name": "records"});
            }
            routes.push(json!({"name": format!("to-{number}"), "stream_to": to}));
            numbers.push(number);
        }
        let body = json!({"metadata": {"plat_name": "bkmonitor", "channel_id": id}, "route": routes});
        self.call("add_route", body).await;
        tokio::time::sleep(Duration::from_millis(400)).await;
        numbers
    }

    async fn plugin(&self) -> Plugin {
        Plugin::connect(&self.site.data_socket(AGENT)).await
    }

    /// Waits until gse_data has acknowledged so many records to the agent, and the agent has none left.
    async fn acknowledged(&self, records: u64) {
        eventually(&format!("{records} acknowledged"), PATIENCE, || async {
            let figures = Figures::of(&self.agent).await.ok()?;
            let of = |name: &str| figures.sum(&format!("gse_agent_data_{name}")) as u64;
            assert_eq!(of("dropped_total"), 0);
            (of("acknowledged_total") == records && of("in_memory") + of("on_disk") == 0).then_some(())
        })
        .await;
    }

    async fn figure(&self, name: &str) -> u64 {
        let figures = Figures::of(&self.data).await.unwrap();
        figures.sum(&format!("gse_data_{name}")) as u64
    }

    /// The numbers in the file of an id as soon as there are so many: what is acknowledged may still wait in the spool of the files.
    async fn written(&self, directory: &str, id: u32, count: usize) -> Vec<u64> {
        eventually(&format!("{count} records in {directory}/{id}"), PATIENCE, || async {
            Some(self.numbers(directory, id)).filter(|numbers| numbers.len() >= count)
        })
        .await
    }

    /// The numbers in the file of an id.
    fn numbers(&self, directory: &str, id: u32) -> Vec<u64> {
        let path = self.dir().join("files").join(directory).join(format!("{id}.log"));
        let content = std::fs::read_to_string(path).unwrap_or_default();
        // What is just being written has no end yet.
        let whole = content.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| line[..12].parse().unwrap()).collect()
    }
}

fn file_stream(directory: &str) -> Value {
    json!({"name": "f", "report_mode": "file", "data_log_path": directory})
}

/// A Redis behind a proxy, and what a subscriber of it hears.
struct Redis {
    child: Child,
    proxy: Proxy,
    heard: Arc<Mutex<Vec<u64>>>,
    hearing: JoinHandle<()>,
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.hearing.abort();
    }
}

impl Redis {
    async fn start(site: &Site) -> Self {
        let port = free_port();
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--save", "", "--bind", "127.0.0.1"]);
        let child = Child::spawn("redis", command, &site.path().join("publish-redis.log")).unwrap();
        let client = redis::Client::open(format!("redis://127.0.0.1:{port}")).unwrap();
        let mut messages = eventually("a Redis", PATIENCE, || async { client.get_async_pubsub().await.ok() }).await;
        messages.subscribe("records").await.unwrap();
        let mut messages = messages.into_on_message();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&heard);
        let hearing = tokio::spawn(async move {
            while let Some(message) = messages.next().await {
                let text = std::str::from_utf8(&message.get_payload_bytes()[..12]).unwrap();
                noted.lock().unwrap().push(text.parse().unwrap());
            }
        });
        let proxy = Proxy::start(&format!("127.0.0.1:{port}")).await.unwrap();
        Self {
            child,
            proxy,
            heard,
            hearing,
        }
    }

    fn stream(&self) -> Value {
        let port = self.proxy.address().port();
        json!({"name": "r", "report_mode": "redis",
            "redis": {"storage_address": [{"ip": "127.0.0.1", "port": port}], "mode": "single"}})
    }

    fn leave(&self) {
        self.proxy.set(Fault::Refuse);
        self.proxy.cut();
    }

    fn come_back(&self) {
        self.proxy.set(Fault::None);
    }

    fn heard(&self) -> Vec<u64> {
        self.heard.lock().unwrap().clone()
    }
}

/// Sends numbered records of so many bytes (12 at least) in bursts, so that they come in several batches.
async fn send(plugin: &mut Plugin, id: u32, numbers: std::ops::Range<u64>, bytes: usize) {
    let all: Vec<u64> = numbers.collect();
    for burst in all.chunks(50) {
        let mut frames = Vec::new();
        for number in burst {
            let mut payload = format!("{number:012}").into_bytes();
            payload.resize(bytes.max(12), b'.');
            frames.extend_from_slice(&dynamic(id, &payload));
        }
        plugin.send(&frames).await.unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn rising(numbers: &[u64]) {
    let falls = numbers.windows(2).find(|pair| pair[0] >= pair[1]);
    assert!(falls.is_none(), "{falls:?} out of order");
}

#[tokio::test]
async fn killed_while_a_sink_is_away_it_loses_nothing_that_was_acknowledged() {
    // contract: reliability#P5, data-plane#28
    let mut place = Place::start(&[]).await;
    let redis = Redis::start(&place.site).await;
    place.route(ID, &[redis.stream(), file_stream("all")]).await;
    redis.leave();
    let mut plugin = place.plugin().await;
    send(&mut plugin, ID, 0..1_000, 12).await;
    place.acknowledged(1_000).await;
    place.data.kill_9();
    place.start_again().await;
    // Also the records of the time after that stand behind those of before.
    send(&mut plugin, ID, 1_000..1_500, 12).await;
    place.acknowledged(1_500).await;
    place.data.kill_9();
    place.start_again().await;
    redis.come_back();
    eventually("all of them", PATIENCE, || async {
        (redis.heard().len() >= 1_500).then_some(())
    })
    .await;
    let all: Vec<u64> = (0..1_500).collect();
    assert_eq!(redis.heard(), all, "in order, and none of them twice");
    assert_eq!(place.written("all", ID, all.len()).await, all);
    assert_eq!(place.figure("dropped_total").await, 0);
}

#[tokio::test]
async fn before_it_knows_the_routes_it_takes_no_records() {
    // contract: reliability#F6, data-plane#12
    let site = Site::start_behind_a_proxy(StoreKind::Embedded).await.unwrap();
    let mut place = Place::on(site, &[]).await;
    place.route(ID, &[file_stream("all")]).await;
    place.data.kill_9();
    let store = place.site.store_proxy.as_ref().unwrap();
    store.set(Fault::Refuse);
    store.cut();
    place.start_again().await;
    let mut plugin = place.plugin().await;
    send(&mut plugin, ID, 0..200, 12).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(place.figure("records_total").await, 0);
    place.site.store_proxy.as_ref().unwrap().set(Fault::None);
    place.acknowledged(200).await;
    assert_eq!(place.written("all", ID, 200).await, (0..200).collect::<Vec<_>>());
    assert_eq!(
        place.figure("unrouted_total").await + place.figure("dropped_total").await,
        0
    );
}

/// What is done to a spool while nobody has it open.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Damage {
    /// One bit of a record.
    Flip,
    /// Everything from the middle of a record on.
    Cut,
}

/// Damages the segment that holds a record, in that record.
fn damage(spool: &Path, record: u64, how: Damage) {
    let mut segments: Vec<PathBuf> = std::fs::read_dir(spool)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    segments.sort();
    let sought = format!("{record:012}").into_bytes();
    for path in &segments {
        let mut bytes = std::fs::read(path).unwrap();
        let Some(at) = bytes.windows(12).position(|window| window == sought) else {
            continue;
        };
        match how {
            Damage::Flip => bytes[at + 11] ^= 0x10,
            Damage::Cut => bytes.truncate(at + 6),
        }
        return std::fs::write(path, bytes).unwrap();
    }
    panic!("record {record} is in none of {segments:?}");
}

async fn damaged(how: Damage, bytes: usize) {
    let mut place = Place::start(&["sinks.spool_max_bytes=50331648"]).await;
    let redis = Redis::start(&place.site).await;
    let stream = place.route(ID, &[redis.stream()]).await[0];
    redis.leave();
    let mut plugin = place.plugin().await;
    send(&mut plugin, ID, 0..2_000, bytes).await;
    place.acknowledged(2_000).await;
    place.data.kill_9();
    damage(&place.dir().join(format!("spools/stream-{stream}")), 1_000, how);
    place.start_again().await;
    redis.come_back();
    // It goes on behind what was damaged.
    send(&mut plugin, ID, 2_000..2_100, bytes).await;
    eventually("the last one", PATIENCE, || async {
        (redis.heard().last() == Some(&2_099)).then_some(())
    })
    .await;
    let heard = redis.heard();
    rising(&heard);
    assert!((0..900).all(|number| heard.contains(&number)), "what is good before it");
    assert!(!heard.contains(&1_000), "nothing wrong is given out");
    let dropped = place.figure("dropped_total").await;
    let log = place.data.log();
    assert!(log.contains("damaged"), "it is said");
    if how == Damage::Flip {
        assert!((1..=200).contains(&dropped), "{dropped} dropped");
        assert_eq!(heard.len() as u64 + dropped, 2_100);
    } else {
        assert!(log.contains("cut off") && !heard.contains(&1_999));
    }
}

#[tokio::test]
async fn a_flipped_bit_in_a_sinks_spool_costs_one_entry() {
    // contract: reliability#F11
    damaged(Damage::Flip, 12).await;
}

#[tokio::test]
async fn a_flipped_bit_in_an_older_segment_costs_one_entry() {
    // contract: reliability#F11
    damaged(Damage::Flip, 8_000).await;
}

#[tokio::test]
async fn a_sinks_spool_that_was_cut_gives_what_is_before() {
    // contract: reliability#F11
    damaged(Damage::Cut, 12).await;
}

#[tokio::test]
async fn a_full_disk_under_the_spools_is_counted_and_holds_nobody_up_for_long() {
    // contract: reliability#F8, reliability#F15
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let spools = site.path().join("gse_data-faults/spools");
    std::fs::create_dir_all(&spools).unwrap();
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: a file system cannot be mounted here (needs root)");
        return;
    }
    let _disk = SmallDisk::mount(&spools, 1_024);
    let place = Place::on(site, &["sinks.hold_ms=500"]).await;
    let redis = Redis::start(&place.site).await;
    place.route(ID, &[redis.stream(), file_stream("all")]).await;
    let filler = spools.join("filler");
    // Until there is no room for a byte.
    let full = std::fs::write(&filler, vec![0; 2 << 20]);
    assert!(full.is_err());
    redis.leave();
    let mut plugin = place.plugin().await;
    send(&mut plugin, ID, 0..1_000, 500).await;
    place.acknowledged(1_000).await;
    assert_eq!(place.written("all", ID, 1_000).await, (0..1_000).collect::<Vec<_>>());
    assert_eq!(place.figure("dropped_total").await, 1_000);
    // There is room again, which is taken, and used up.
    std::fs::remove_file(&filler).unwrap();
    send(&mut plugin, ID, 1_000..5_000, 500).await;
    place.acknowledged(5_000).await;
    let waiting = place.figure("sink_backlog").await;
    let dropped = place.figure("dropped_total").await;
    assert!((500..3_000).contains(&waiting), "{waiting} wait");
    assert_eq!(dropped + waiting, 5_000);
    redis.come_back();
    eventually("the spool is empty", PATIENCE, || async {
        (redis.heard().len() as u64 == waiting).then_some(())
    })
    .await;
    send(&mut plugin, ID, 5_000..5_100, 500).await;
    eventually("what comes after", PATIENCE, || async {
        (redis.heard().last() == Some(&5_099)).then_some(())
    })
    .await;
    let heard = redis.heard();
    rising(&heard);
    assert_eq!(heard.len() as u64 + place.figure("dropped_total").await, 5_100);
    assert_eq!(place.written("all", ID, 5_100).await, (0..5_100).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_sink_does_not_slow_the_others() {
    // contract: reliability#F15
    const FOR: Duration = Duration::from_secs(3);
    let place = Place::start(&[]).await;
    let redis = Redis::start(&place.site).await;
    place.route(ID, &[file_stream("all")]).await;
    place.route(OTHER, &[redis.stream()]).await;
    let mut plugin = place.plugin().await;
    // As many records for either, at the same pace, with the other sink alive and with it dead.
    let mut arrived = Vec::new();
    let mut number = 0;
    for dead in [false, true] {
        if dead {
            redis.child.freeze();
        }
        let before = place.numbers("all", ID).len();
        let begun = Instant::now();
        let mut turn = tokio::time::interval(Duration::from_millis(20));
        while begun.elapsed() < FOR {
            turn.tick().await;
            let mut frames = Vec::new();
            for _ in 0..50 {
                let payload = format!("{number:012}{:500}", "");
                frames.extend_from_slice(&dynamic(ID, payload.as_bytes()));
                frames.extend_from_slice(&dynamic(OTHER, payload.as_bytes()));
                number += 1;
            }
            plugin.send(&frames).await.unwrap();
        }
        arrived.push(place.numbers("all", ID).len() - before);
    }
    println!(
        "in {FOR:?}: {} with both sinks alive, {} with one dead",
        arrived[0], arrived[1]
    );
    assert!(arrived[0] > 3_000, "{arrived:?}");
    assert!(arrived[1] * 100 >= arrived[0] * 95, "{arrived:?}");
    // And what the dead one did not take waits for it.
    redis.child.go_on();
    place.acknowledged(2 * number).await;
    eventually("all of the other", PATIENCE, || async {
        let mut heard = redis.heard();
        heard.dedup();
        let lost = (0..number).find(|number| !heard.contains(number));
        lost.is_none().then_some(())
    })
    .await;
    let all = usize::try_from(number).unwrap();
    assert_eq!(place.written("all", ID, all).await.len(), all);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_that_changes_under_load_loses_and_repeats_nothing() {
    // contract: data-plane#30, data-plane#22
    let place = Place::start(&[]).await;
    let first = place.route(ID, &[file_stream("a")]).await[0];
    let second = place.stream(&file_stream("b")).await;
    let mut plugin = place.plugin().await;
    let sending = tokio::spawn(async move {
        send(&mut plugin, ID, 0..20_000, 100).await;
        plugin
    });
    let name = format!("to-{first}");
    let mut turns = 0;
    while !sending.is_finished() {
        let stream = if turns % 2 == 0 { second } else { first };
        let route = json!([{"name": name, "stream_to": {"stream_to_id": stream}}]);
        let body =
            json!({"condition": {"plat_name": "bkmonitor", "channel_id": ID}, "specification": {"route": route}});
        place.call("update_route", body).await;
        turns += 1;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    let mut plugin = sending.await.unwrap();
    place.acknowledged(20_000).await;
    assert!(turns > 5, "{turns} changes");
    let (a, b) = eventually("all of them in either", PATIENCE, || async {
        let found = (place.numbers("a", ID), place.numbers("b", ID));
        (found.0.len() + found.1.len() >= 20_000).then_some(found)
    })
    .await;
    rising(&a);
    rising(&b);
    assert!(a.len() > 1_000 && b.len() > 1_000, "{} and {}", a.len(), b.len());
    let mut all = [a, b].concat();
    all.sort_unstable();
    assert_eq!(all, (0..20_000).collect::<Vec<_>>());
    // Two seconds after a change everything follows it.
    let route = json!([{"name": name, "stream_to": {"stream_to_id": second}}]);
    let body = json!({"condition": {"plat_name": "bkmonitor", "channel_id": ID}, "specification": {"route": route}});
    place.call("update_route", body).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = place.numbers("a", ID).len();
    send(&mut plugin, ID, 20_000..20_100, 100).await;
    place.acknowledged(20_100).await;
    eventually("the last of them", PATIENCE, || async {
        (place.numbers("b", ID).last() == Some(&20_099)).then_some(())
    })
    .await;
    assert_eq!(place.numbers("a", ID).len(), before);
}

#[tokio::test]
async fn records_of_one_byte_and_of_ten_megabytes() {
    // contract: data-plane#38, data-plane#49
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let sink = format!("default_sink=file:{}", site.path().join("out").display());
    let sets = ["file.framing=length", "file.rotate_bytes=1073741824", &sink];
    let place = Place::on(site, &sets).await;
    let mut plugin = place.plugin().await;
    let long: Vec<u8> = (0..10_485_760u32).map(|n| (n % 251) as u8).collect();
    let mut expected = Vec::new();
    for part in 0..3_u64 {
        for some in 0..20 {
            let mut frames = Vec::new();
            for n in 0..500 {
                let byte = (part * 7 + some * 3 + n) as u8;
                frames.extend_from_slice(&plain(0xC01, ID, &[byte]));
                expected.extend_from_slice(&[0, 0, 0, 1, byte]);
            }
            plugin.send(&frames).await.unwrap();
        }
        plugin.send(&plain(0xC01, ID, &long)).await.unwrap();
        expected.extend_from_slice(&(long.len() as u32).to_be_bytes());
        expected.extend_from_slice(&long);
        // An agent holds one of this length in memory at a time.
        place.acknowledged((part + 1) * 10_001).await;
    }
    let path = place.site.path().join(format!("out/{ID}.log"));
    let content = eventually("everything in the file", PATIENCE, || async {
        let content = std::fs::read(&path).ok()?;
        (content.len() >= expected.len()).then_some(content)
    })
    .await;
    assert!(content == expected, "{} bytes of {}", content.len(), expected.len());
}

#[tokio::test]
async fn a_probe_that_connects_and_goes_is_no_error() {
    // contract: data-plane#44
    let place = Place::start(&[]).await;
    let before = place.data.log().lines().count();
    for turn in 0..40 {
        let stream = TcpStream::connect(place.data.address("link")).await.unwrap();
        if turn % 2 == 0 {
            // As load balancers do: with a reset.
            stream.set_zero_linger().unwrap();
        }
        drop(stream);
    }
    // Records go on meanwhile and afterwards.
    place.route(ID, &[file_stream("all")]).await;
    let mut plugin = place.plugin().await;
    send(&mut plugin, ID, 0..100, 12).await;
    place.acknowledged(100).await;
    assert_eq!(place.figure("links_refused_total").await, 0);
    let log = place.data.log();
    let loud: Vec<&str> = log
        .lines()
        .skip(before)
        .filter(|line| line.contains("WARN") || line.contains("ERROR") || line.contains("refused"))
        .collect();
    assert!(loud.is_empty(), "{loud:#?}");
}

async fn gse(site: &Site, args: &[&str]) -> String {
    let done = tokio::process::Command::new(binary("gse").unwrap())
        .args(args)
        .env("GSE_DATA", site.path().join("no-data"))
        .env("GSE_API", format!("http://{}", site.api().address))
        .env("GSE_APP_CODE", APP)
        .env("GSE_APP_SECRET", SECRET)
        .env_remove("GSE_CA")
        .kill_on_drop(true)
        .output();
    let done = tokio::time::timeout(PATIENCE, done).await.expect("it ends").unwrap();
    let error = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "gse {args:?}: {error}");
    String::from_utf8(done.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_ids_are_counted_in_bounded_memory() {
    // contract: data-plane#12
    const IDS: u32 = 10_000;
    const ROUTED: u32 = 3_000;
    const COUNTED: u32 = 9_000;
    const FIRST: u32 = 1_600_000;
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let streams = json!([{"stream_to_id": 700, "plat_name": "bkmonitor", "stream_to": file_stream("many")}]);
    let routes: Vec<Value> = (FIRST..FIRST + ROUTED)
        .map(|id| json!({"channel_id": id, "plat_name": "bkmonitor", "route": [{"name": "r", "stream_to": {"stream_to_id": 700}}]}))
        .collect();
    let seed = site.path().join("routes.json");
    std::fs::write(&seed, json!({"streams": streams, "routes": routes}).to_string()).unwrap();
    let (seed, most) = (
        format!("routes.seed={}", seed.display()),
        format!("sinks.max_ids={COUNTED}"),
    );
    let mut place = Place::on(site, &[&seed, &most]).await;
    let upstream = format!("upstreams.data=[\"{}\"]", place.data.address("internal"));
    place.site.api_sets.push(upstream);
    place.site.api = None;
    place.site.start_api().await.unwrap();
    eventually("the routes are followed", PATIENCE, || async {
        let routes = place
            .site
            .data_api(&place.data)
            .post("/gse/v1/data/routes", &json!({}))
            .await;
        let followed = routes.to_string().matches("\"stream_to_id\":700").count();
        // Each route, and the stream itself.
        (followed as u32 == ROUTED + 1).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    let before = place.data.memory();
    let mut plugin = place.plugin().await;
    // Each id three times, never twice in a row.
    for turn in 0..3 {
        for some in (FIRST..FIRST + IDS).collect::<Vec<_>>().chunks(500) {
            let frames: Vec<u8> = some
                .iter()
                .flat_map(|id| dynamic(*id, format!("{turn:012}").as_bytes()))
                .collect();
            plugin.send(&frames).await.unwrap();
        }
    }
    place.acknowledged(3 * u64::from(IDS)).await;
    for id in [FIRST, FIRST + ROUTED / 2, FIRST + ROUTED - 1] {
        assert_eq!(place.written("many", id, 3).await, [0, 1, 2], "{id}");
    }
    assert!(!place.dir().join(format!("files/many/{}.log", FIRST + ROUTED)).exists());
    let after = place.data.memory();
    println!("memory {} KiB, before {} KiB", after >> 10, before >> 10);
    assert!(after < before + (48 << 20), "{before} bytes, then {after}");
    eventually("nothing waits", PATIENCE, || async {
        (place.figure("delivered_total").await == 3 * u64::from(ROUTED)).then_some(())
    })
    .await;
    let rows: Vec<Value> = serde_json::from_str(&gse(&place.site, &["data", "ls", "-o", "json"]).await).unwrap();
    let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
    for row in &rows {
        for key in ["records", "unrouted", "delivered", "lag"] {
            *sums.entry(key).or_default() += row[key].as_u64().unwrap();
        }
    }
    let per = |ids: u32| 3 * u64::from(ids);
    assert_eq!(rows.len() as u32, COUNTED + 1, "the others together");
    assert_eq!(rows[0]["data_id"], 0);
    assert_eq!(rows[0]["records"], per(IDS - COUNTED));
    assert_eq!(sums["records"], per(IDS));
    assert_eq!(sums["unrouted"], per(IDS - ROUTED));
    assert_eq!(sums["delivered"], per(ROUTED));
    assert_eq!(sums["lag"], 0);
    let table = gse(&place.site, &["data", "ls"]).await;
    assert_eq!(table.lines().count() as u32, COUNTED + 2);
}
