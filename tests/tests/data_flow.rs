//! Records from a plugin's connection through the real agent and the real gse_data into files, with either of them killed.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gse_tests::metrics::Figures;
use gse_tests::plugin::{Plugin, dynamic, plain};
use gse_tests::process::binary;
use gse_tests::{AgentOptions, Child, Site, StoreKind, eventually};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

const AGENT: &str = "0100005254008ed86116666614661853";
const ID: u32 = 1_500_002;
const PATIENCE: Duration = Duration::from_secs(20);

/// A site with an agent and some gse_data, which write what nobody has routed to files.
struct Flow {
    site: Site,
    agent: Child,
    options: AgentOptions,
    ops: String,
    servers: Vec<(Child, u16)>,
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

async fn gse_data(site: &Site, number: usize, port: u16) -> Child {
    let path = |name: &str| site.path().join(name).display().to_string();
    let addresses = site.path().join(format!("data-{number}.addresses"));
    // Whoever was here before was killed.
    let _ = std::fs::remove_file(&addresses);
    let mut command = Command::new(binary("gse_data").unwrap());
    for set in [
        format!("node_id=data-{number}"),
        format!("data_dir={}", path(&format!("data-{number}"))),
        format!("default_sink=file:{}", path(&format!("sink-{number}"))),
        "file.rotate_bytes=1073741824".into(),
        format!("store.url={}", site.server_store_url()),
        format!("link.listen=127.0.0.1:{port}"),
        format!("link.tls.ca={}", path("certs/gseca.crt")),
        format!("link.tls.cert={}", path("certs/gse_server.crt")),
        format!("link.tls.key={}", path("certs/gse_server.key")),
        "http.listen=127.0.0.1:0".into(),
        "internal.listen=".into(),
        "ops.listen=127.0.0.1:0".into(),
        format!("authz.apps_file={}", path("apps.toml")),
        format!("audit.file={}", path(&format!("data-{number}-audit.log"))),
        format!("runtime.addresses_file={}", addresses.display()),
    ] {
        command.args(["--set", &set]);
    }
    let name = format!("gse_data {number}");
    let mut child = Child::spawn(&name, command, &site.path().join(format!("gse_data-{number}.log"))).unwrap();
    child.ready(&addresses).await.unwrap();
    child
}

impl Flow {
    async fn start(servers: usize, sets: &[&str]) -> Self {
        let site = Site::start(StoreKind::Embedded).await.unwrap();
        let mut running = Vec::new();
        for number in 0..servers {
            let port = free_port();
            running.push((gse_data(&site, number, port).await, port));
        }
        let addresses: Vec<String> = running
            .iter()
            .map(|(_, port)| format!("\"127.0.0.1:{port}\""))
            .collect();
        let ops = format!("127.0.0.1:{}", free_port());
        let mut options = AgentOptions::new(AGENT, "10.1.2.5");
        options.sets = vec![
            format!("ops.listen={ops}"),
            format!("data.servers=[{}]", addresses.join(",")),
            "data.retry_min_ms=20".into(),
            "data.retry_max_ms=200".into(),
        ];
        options.sets.extend(sets.iter().map(|set| (*set).to_owned()));
        let agent = site.spawn_agent(&options, "").unwrap();
        let mut flow = Self {
            site,
            agent,
            options,
            ops,
            servers: running,
        };
        flow.agent.addresses.insert("ops".into(), flow.ops.clone());
        flow
    }

    fn kill_agent(&mut self) {
        self.agent.kill_9();
        self.agent = self.site.spawn_agent(&self.options, "").unwrap();
        self.agent.addresses.insert("ops".into(), self.ops.clone());
    }

    async fn restart_server(&mut self, number: usize, away: Duration) {
        self.servers[number].0.kill_9();
        tokio::time::sleep(away).await;
        let port = self.servers[number].1;
        self.servers[number].0 = gse_data(&self.site, number, port).await;
    }

    fn socket(&self) -> PathBuf {
        self.site.data_socket(AGENT)
    }

    /// Everything in the files of one server, in the order of the files' names.
    fn content(&self, number: usize) -> Vec<u8> {
        let mut open = vec![self.site.path().join(format!("sink-{number}"))];
        let mut files = Vec::new();
        while let Some(dir) = open.pop() {
            let Ok(entries) = std::fs::read_dir(dir) else { continue };
            for entry in entries {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    open.push(path)
                } else {
                    files.push(path)
                }
            }
        }
        files.sort();
        files.iter().flat_map(|file| std::fs::read(file).unwrap()).collect()
    }

    /// The numbers in the files of one server.
    fn numbers(&self, number: usize) -> Vec<u64> {
        let content = self.content(number);
        content
            .split(|byte| *byte == b'\n')
            .filter_map(|line| std::str::from_utf8(line).ok()?.parse().ok())
            .collect()
    }

    /// The agent's count, which must add up: acknowledged, not over, dropped.
    async fn count(&self) -> Option<(u64, u64, u64)> {
        let figures = Figures::of(&self.agent).await.ok()?;
        let of = |name: &str| figures.sum(&format!("gse_agent_data_{name}")) as u64;
        let open = of("in_memory") + of("on_disk");
        let (acknowledged, dropped) = (of("acknowledged_total"), of("dropped_total"));
        assert_eq!(of("records_total"), acknowledged + open + dropped);
        Some((acknowledged, open, dropped))
    }

    async fn until_empty(&self) -> (u64, u64) {
        eventually("everything acknowledged", PATIENCE, || async {
            let (acknowledged, open, dropped) = self.count().await?;
            (open == 0 && acknowledged > 0).then_some((acknowledged, dropped))
        })
        .await
    }
}

#[tokio::test]
async fn records_arrive_in_order_and_unchanged() {
    // contract: data-plane#49, data-plane#38, data-plane#4
    let flow = Flow::start(1, &["data.enable_compression=true"]).await;
    let mut plugin = Plugin::connect(&flow.socket()).await;
    for part in 0..50u64 {
        let mut frames = Vec::new();
        for number in part * 100..part * 100 + 100 {
            frames.extend_from_slice(&dynamic(ID, format!("{number:012}").as_bytes()));
        }
        plugin.send(&frames).await.unwrap();
    }
    assert_eq!(flow.until_empty().await, (5_000, 0));
    assert_eq!(flow.numbers(0), (0..5_000).collect::<Vec<_>>());
    let long: Vec<u8> = (0..10_485_759u32).map(|n| b'a' + (n % 25) as u8).collect();
    plugin.send(&plain(0xC01, ID, b"1")).await.unwrap();
    plugin.send(&plain(0xC01, ID, &long)).await.unwrap();
    plugin.send(&plain(0xC0C, ID, b"2")).await.unwrap();
    eventually("three more", PATIENCE, || async {
        flow.count().await.filter(|count| count.0 == 5_003)
    })
    .await;
    let content = flow.content(0);
    let mut lines = content.split(|byte| *byte == b'\n').skip(5_000);
    assert_eq!(lines.next(), Some(&b"1"[..]));
    assert!(lines.next() == Some(&long[..]));
    assert_eq!(lines.next(), Some(&b"2"[..]));
}

/// Writes numbered records to whatever agent is there.
async fn write_on(socket: PathBuf, written: Arc<AtomicU64>, stop: Arc<AtomicBool>) {
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
            tokio::time::sleep(Duration::from_millis(4)).await;
        }
    }
}

/// Kills gse_data, and the agent if asked, at random for a while, under load.
async fn chaos(length: Duration, agent_too: bool) {
    let mut flow = Flow::start(2, &[]).await;
    let written = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let writing = tokio::spawn(write_on(flow.socket(), Arc::clone(&written), Arc::clone(&stop)));
    let begun = Instant::now();
    let (mut agent_kills, mut server_kills) = (0u64, 0u64);
    while begun.elapsed() < length {
        tokio::time::sleep(Duration::from_millis(rand::random_range(50..900))).await;
        match rand::random_range(0..3) {
            0 if agent_too => {
                agent_kills += 1;
                flow.kill_agent();
            }
            0 | 1 => {
                server_kills += 1;
                let away = Duration::from_millis(rand::random_range(0..800));
                flow.restart_server(rand::random_range(0..2), away).await;
            }
            _ => {
                let _ = flow.count().await;
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    writing.await.unwrap();
    let (acknowledged, dropped) = flow.until_empty().await;
    // What a killed gse_data had in its own spools comes out after it is there again.
    let written = written.load(Ordering::Relaxed);
    let at_most = agent_kills * 20 * 300 / 4;
    let mut times: HashMap<u64, u32> = HashMap::new();
    eventually("the records in the files", PATIENCE, || {
        times.clear();
        for number in [flow.numbers(0), flow.numbers(1)].concat() {
            *times.entry(number).or_default() += 1;
        }
        let all = times.len() as u64 + at_most >= written;
        async move { all.then_some(()) }
    })
    .await;
    let lost = written - times.len() as u64;
    let twice: u64 = times.values().map(|times| u64::from(times - 1)).sum();
    println!(
        "{written} written, {lost} lost by {agent_kills} kills of the agent, {twice} twice by {server_kills} of gse_data; {acknowledged} acknowledged, {dropped} dropped"
    );
    assert!(lost <= at_most, "{lost} lost, {at_most} may be");
    // Nothing that was acknowledged is lost: the rest was lost by the agent, before.
    assert!(times.len() as u64 >= acknowledged.min(written - lost));
    // What was on its way when a server was killed comes twice, and no more: what 300 ms bring.
    let on_way = (agent_kills + server_kills) * 20 * 300 / 4;
    assert!(twice <= on_way, "{twice} came twice, {on_way} may");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_killed_at_random_cost_nothing() {
    // contract: reliability#P5
    chaos(Duration::from_secs(8), false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "full tier: ten minutes"]
async fn agent_and_servers_killed_at_random_for_ten_minutes() {
    // contract: reliability#P5, reliability#F12
    chaos(Duration::from_secs(600), true).await;
}
