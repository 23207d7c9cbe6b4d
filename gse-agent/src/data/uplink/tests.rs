//! The uplink against a server made for these tests: TLS, the link's frames, and whatever misbehaviour a test needs. The real server
//! is met in the workspace's tests.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gse_core::certs::Authority;
use gse_core::tls::{self, Role};
use gse_proto::data::{BatchAck, Compression, DataWelcome};
use gse_proto::datalink::{DataFrame, MAX_MESSAGE, MAX_PAYLOAD, PROTOCOL, take_record};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::data::Reason;

/// What the servers of a test have received, and how they behave.
#[derive(Default)]
struct Sink {
    /// The first bytes and the length of each payload, in order of arrival; a batch that was acknowledged before is not taken again.
    records: Mutex<Vec<(Vec<u8>, usize)>>,
    acked: Mutex<HashMap<Vec<u8>, u64>>,
    silent: AtomicBool,
    compressed: AtomicU64,
}

struct Server {
    address: String,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn certs(dir: &Path) -> (TlsFiles, TlsFiles) {
    let authority = Authority::create(dir).unwrap();
    let files = |role: Role, id: Option<&str>| {
        let (cert, key) = gse_core::certs::names::pair(role);
        let (cert, key) = (dir.join(cert), dir.join(key));
        authority.issue(role, id, &[], &cert, &key, 10).unwrap();
        TlsFiles {
            ca: authority.ca_path(),
            cert,
            key,
        }
    };
    (files(Role::Server, None), files(Role::Agent, Some("0:10.0.0.1")))
}

async fn serve(files: &TlsFiles, sink: &Arc<Sink>, address: &str) -> Server {
    let listener = TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let acceptor = TlsAcceptor::from(tls::server_config(files, &[Role::Agent], &[]).unwrap());
    let sink = Arc::clone(sink);
    let task = tokio::spawn(async move {
        let mut links = tokio::task::JoinSet::new();
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let (acceptor, sink) = (acceptor.clone(), Arc::clone(&sink));
            links.spawn(async move {
                // Its end is the other side's business.
                let _ = one_link(acceptor, socket, &sink).await;
            });
        }
    });
    Server { address, task }
}

async fn one_link(acceptor: TlsAcceptor, socket: TcpStream, sink: &Sink) -> anyhow::Result<()> {
    let mut stream = acceptor.accept(socket).await?;
    let mut buffer = bytes::BytesMut::new();
    let mut spool = Vec::new();
    loop {
        while let Some(frame) = DataFrame::take(&mut buffer, MAX_MESSAGE)? {
            let answer = match frame {
                DataFrame::Hello(hello) => {
                    spool = hello.spool_id.to_vec();
                    assert_eq!(spool.len(), 16);
                    let offered = hello.compressions.contains(&Compression::Zstd.into());
                    DataFrame::from(DataWelcome {
                        protocol: PROTOCOL,
                        acked: sink.acked.lock().get(&spool).copied().unwrap_or(0),
                        compression: if offered { Compression::Zstd } else { Compression::None }.into(),
                        window_batches: 16,
                        window_bytes: 4 << 20,
                        ..DataWelcome::default()
                    })
                }
                DataFrame::Batch(batch) => {
                    if sink.silent.load(Ordering::Relaxed) {
                        continue;
                    }
                    let mut body = match batch.compression() {
                        Compression::None => batch.body.clone(),
                        Compression::Zstd => {
                            sink.compressed.fetch_add(1, Ordering::Relaxed);
                            zstd::bulk::decompress(&batch.body, batch.plain_len as usize)?.into()
                        }
                    };
                    assert_eq!(body.len(), batch.plain_len as usize);
                    let mut acked = sink.acked.lock();
                    let known = acked.entry(spool.clone()).or_default();
                    if batch.seq > *known {
                        *known = batch.seq;
                        let mut records = 0;
                        while let Some(record) = take_record(&mut body)? {
                            let head = record.payload[..record.payload.len().min(16)].to_vec();
                            sink.records.lock().push((head, record.payload.len()));
                            records += 1;
                        }
                        assert_eq!(records, batch.records);
                    }
                    DataFrame::from(BatchAck { seq: batch.seq })
                }
                DataFrame::Ping(ping) => DataFrame::from(gse_proto::session::Pong { nonce: ping.nonce }),
                _ => continue,
            };
            stream.write_all(&answer.to_bytes()).await?;
            stream.flush().await?;
        }
        if stream.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
    }
}

struct Agent {
    intake: Intake,
    life: Lifecycle,
}

/// An uplink in a data directory.
async fn agent(dir: &Path, files: &TlsFiles, servers: &[&str], change: impl FnOnce(&mut DataConfig)) -> Agent {
    let mut config = DataConfig {
        data_dir: dir.join("spool"),
        servers: servers.iter().map(|server| (*server).to_owned()).collect(),
        retry_min_ms: 10,
        retry_max_ms: 50,
        keep_counts_ms: 20,
        ..DataConfig::default()
    };
    change(&mut config);
    assert_eq!(config.problems(), Vec::<String>::new());
    let intake = Intake::new(&config);
    let identity = Identity {
        agent_id: "0:10.0.0.1".to_owned(),
        tls: files.clone(),
    };
    let life = Lifecycle::new("agent");
    start(config, identity, &intake, Metrics::default(), &Health::new(), &life)
        .await
        .unwrap();
    Agent { intake, life }
}

impl Agent {
    fn put(&self, numbers: std::ops::Range<u32>) {
        let mut fill = self.intake.fill();
        for number in numbers {
            fill.offer(1, 0, 9, format!("{number:08}").as_bytes()).unwrap();
        }
    }

    async fn until(&self, what: &str, reached: impl Fn(&crate::data::Snapshot) -> bool) {
        let begun = Instant::now();
        loop {
            let snapshot = self.intake.snapshot();
            assert!(snapshot.adds_up(), "{snapshot:?}");
            if reached(&snapshot) {
                return;
            }
            assert!(begun.elapsed() < Duration::from_secs(10), "never {what}: {snapshot:?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// As SIGTERM.
    async fn stop(self) {
        self.life.drain();
        assert!(self.life.finished(Duration::from_secs(5)).await);
    }
}

/// An agent that can be killed: it has threads of its own, and they are taken away. It is told nothing, so it writes nothing down at its end.
struct Mortal {
    agent: Agent,
    threads: tokio::runtime::Runtime,
}

impl Mortal {
    async fn start(
        dir: &Path,
        files: &TlsFiles,
        server: &str,
        change: impl FnOnce(&mut DataConfig) + Send + 'static,
    ) -> Self {
        let threads = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (dir, files, server) = (dir.to_owned(), files.clone(), server.to_owned());
        let starting = threads.spawn(async move { agent(&dir, &files, &[&server], change).await });
        Self {
            agent: starting.await.unwrap(),
            threads,
        }
    }

    /// As near to kill -9 as it gets inside a process: everything stops where it is.
    async fn kill(self) {
        let Self { agent, threads } = self;
        tokio::task::spawn_blocking(|| threads.shutdown_timeout(Duration::from_secs(10)))
            .await
            .unwrap();
        drop(agent);
    }
}

fn numbers(sink: &Sink) -> Vec<u32> {
    let records = sink.records.lock();
    let number = |(head, _): &(Vec<u8>, usize)| std::str::from_utf8(head).unwrap().parse().unwrap();
    records.iter().map(number).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_arrive_and_never_see_the_disk_while_all_is_well() {
    let dir = tempfile::tempdir().unwrap();
    let (server_files, files) = certs(&dir.path().join("certs"));
    let sink = Arc::new(Sink::default());
    let server = serve(&server_files, &sink, "127.0.0.1:0").await;
    let agent = agent(dir.path(), &files, &[&server.address], |_| ()).await;
    for n in 0..100 {
        agent.put(n * 100..n * 100 + 100);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    agent
        .until("all acknowledged", |s| s.counts.acknowledged == 10_000)
        .await;
    assert_eq!(numbers(&sink), (0..10_000).collect::<Vec<_>>());
    let files: Vec<_> = std::fs::read_dir(dir.path().join("spool")).unwrap().collect();
    assert!(files.len() <= 1, "the mark alone: {files:?}");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_takes_is_on_disk_and_comes_first_later() {
    // contract: data-plane#49, data-plane#9
    let dir = tempfile::tempdir().unwrap();
    let (server_files, files) = certs(&dir.path().join("certs"));
    let sink = Arc::new(Sink::default());
    let server = serve(&server_files, &sink, "127.0.0.1:0").await;
    let address = server.address.clone();
    drop(server);
    let agent = agent(dir.path(), &files, &[&address], |config| config.spool_after_ms = 20).await;
    for n in 0..10 {
        agent.put(n * 100..n * 100 + 100);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    agent
        .until("all on disk", |s| s.on_disk == 1_000 && s.in_memory == 0)
        .await;
    let server = serve(&server_files, &sink, &address).await;
    agent.put(1_000..2_000);
    agent
        .until("all acknowledged", |s| s.counts.acknowledged == 2_000)
        .await;
    assert_eq!(numbers(&sink), (0..2_000).collect::<Vec<_>>());
    agent
        .until("nothing left", |s| s.on_disk == 0 && s.in_memory == 0)
        .await;
    agent.stop().await;
    drop(server);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_agent_leaves_nothing_behind_and_a_killed_one_what_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let (server_files, files) = certs(&dir.path().join("certs"));
    let sink = Arc::new(Sink::default());
    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let first = agent(dir.path(), &files, &[&nobody], |_| ()).await;
    first.put(0..500);
    first.stop().await;

    let second = Mortal::start(dir.path(), &files, &nobody, |config| config.spool_after_ms = 20).await;
    let snapshot = second.agent.intake.snapshot();
    assert_eq!(
        (snapshot.counts.taken, snapshot.on_disk, snapshot.in_memory),
        (500, 500, 0)
    );
    second.agent.put(500..700);
    second.agent.until("on disk", |s| s.on_disk == 700).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    second.kill().await;

    // These are in memory when it is killed, and the counters know of them.
    let third = Mortal::start(dir.path(), &files, &nobody, |config| config.spool_after_ms = 60_000).await;
    third.agent.put(700..750);
    tokio::time::sleep(Duration::from_millis(100)).await;
    third.agent.intake.shared.flow.lock().close();
    third.agent.put(750..751);
    tokio::time::sleep(Duration::from_millis(100)).await;
    third.kill().await;

    let server = serve(&server_files, &sink, "127.0.0.1:0").await;
    let fourth = agent(dir.path(), &files, &[&server.address], |_| ()).await;
    fourth.put(800..900);
    fourth.until("all acknowledged", |s| s.counts.acknowledged == 800).await;
    let snapshot = fourth.intake.snapshot();
    let killed = snapshot.counts.dropped(Reason::Killed);
    assert!((50..=51).contains(&killed), "{snapshot:?}");
    assert_eq!(snapshot.counts.taken, 800 + killed);
    assert_eq!(numbers(&sink), (0..700).chain(800..900).collect::<Vec<_>>());
    fourth.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_goes_costs_nothing_while_there_is_another() {
    let dir = tempfile::tempdir().unwrap();
    let (server_files, files) = certs(&dir.path().join("certs"));
    let sink = Arc::new(Sink::default());
    let mut servers = [
        serve(&server_files, &sink, "127.0.0.1:0").await,
        serve(&server_files, &sink, "127.0.0.1:0").await,
    ];
    let addresses: Vec<String> = servers.iter().map(|server| server.address.clone()).collect();
    let both: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let agent = agent(dir.path(), &files, &both, |_| ()).await;
    for n in 0..400u32 {
        agent.put(n * 10..n * 10 + 10);
        tokio::time::sleep(Duration::from_millis(1)).await;
        if n % 80 == 40 {
            // Whichever it is, it comes back after a while at its place.
            let at = (n / 80) as usize % 2;
            let address = servers[at].address.clone();
            servers[at].task.abort();
            while TcpStream::connect(&address).await.is_ok() {}
            servers[at] = serve(&server_files, &sink, &address).await;
        }
    }
    agent
        .until("all acknowledged", |s| s.counts.acknowledged == 4_000)
        .await;
    assert_eq!(numbers(&sink), (0..4_000).collect::<Vec<_>>());
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_takes_nothing_never_holds_up_who_offers() {
    // contract: data-plane#9, reliability#F15
    let dir = tempfile::tempdir().unwrap();
    let (server_files, files) = certs(&dir.path().join("certs"));
    let sink = Arc::new(Sink::default());
    sink.silent.store(true, Ordering::Relaxed);
    let server = serve(&server_files, &sink, "127.0.0.1:0").await;
    let agent = agent(dir.path(), &files, &[&server.address], |config| {
        config.spool_bytes = 24 << 20;
        config.spool_segment_bytes = 1 << 20;
    })
    .await;
    let payload = vec![7; 512];
    let mut longest = Duration::ZERO;
    for _ in 0..300 {
        let begun = Instant::now();
        {
            let mut fill = agent.intake.fill();
            for _ in 0..200 {
                // Dropped and counted, if the disk is slower than this.
                let _ = fill.offer(1, 0, 9, &payload);
            }
        }
        longest = longest.max(begun.elapsed());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(longest < Duration::from_secs(1), "{longest:?}");
    agent.until("all on disk", |s| s.in_memory == 0).await;
    let snapshot = agent.intake.snapshot();
    assert_eq!(snapshot.counts.taken, 60_000);
    assert!(
        snapshot.counts.dropped(Reason::SpoolFull) > 0,
        "the oldest: {snapshot:?}"
    );
    assert!(snapshot.on_disk > 30_000, "{snapshot:?}");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_and_short_records_compressed() {
    // contract: data-plane#38
    let dir = tempfile::tempdir().unwrap();
    let (server_files, files) = certs(&dir.path().join("certs"));
    let sink = Arc::new(Sink::default());
    let server = serve(&server_files, &sink, "127.0.0.1:0").await;
    let agent = agent(dir.path(), &files, &[&server.address], |config| {
        config.enable_compression = true;
        config.memory_bytes = 64 << 20;
    })
    .await;
    let long = vec![b'x'; MAX_PAYLOAD];
    for _ in 0..3 {
        agent.intake.offer(1, 0, 9, b"1").unwrap();
        agent.intake.offer(1, 0, 9, &long).unwrap();
    }
    assert!(agent.intake.offer(1, 0, 9, &vec![0; MAX_PAYLOAD + 1]).is_err());
    agent.until("all acknowledged", |s| s.counts.acknowledged == 6).await;
    let lengths: Vec<usize> = sink.records.lock().iter().map(|(_, len)| *len).collect();
    assert_eq!(lengths, [1, MAX_PAYLOAD, 1, MAX_PAYLOAD, 1, MAX_PAYLOAD]);
    assert!(sink.compressed.load(Ordering::Relaxed) >= 4);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_spool_that_was_put_back_is_sent_under_another_name() {
    let dir = tempfile::tempdir().unwrap();
    let (server_files, files) = certs(&dir.path().join("certs"));
    let sink = Arc::new(Sink::default());
    let server = serve(&server_files, &sink, "127.0.0.1:0").await;
    let first = agent(dir.path(), &files, &[&server.address], |_| ()).await;
    first.put(0..10);
    first.until("acknowledged", |s| s.counts.acknowledged == 10).await;
    first.stop().await;
    // The server has seen far more of this sequence than the spool knows.
    for known in sink.acked.lock().values_mut() {
        *known += 10_000_000;
    }
    let second = agent(dir.path(), &files, &[&server.address], |_| ()).await;
    second.put(10..20);
    second.until("acknowledged", |s| s.counts.acknowledged == 20).await;
    assert_eq!(numbers(&sink), (0..20).collect::<Vec<_>>());
    assert_eq!(sink.acked.lock().len(), 2);
    second.stop().await;
}
