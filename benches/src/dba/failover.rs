//! How long clients feel a switch of the primary: one group of three under three Sentinels, clients that write without a pause, each write
//! timed. The primary is killed, or (where gse_dba can be told to) switched as planned.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::process::Command;

use super::servers::{self, PASSWORD, Redis};
use crate::report::Section;
use crate::site::{self, Program};

/// Writers, each on a connection of its own.
const WRITERS: u32 = 8;
/// A write that takes longer than this counts as lost.
const PATIENCE: Duration = Duration::from_secs(20);
/// What the promise needs of every server.
const SAFE: [&str; 6] = [
    "--appendonly",
    "yes",
    "--appendfsync",
    "always",
    "--min-replicas-to-write",
    "1",
];

/// What was felt of a switch.
#[derive(Debug, Serialize)]
pub(crate) struct Stall {
    /// Longest time that any write took, milliseconds.
    longest_ms: f64,
    /// Longest time in which nobody's write was acknowledged.
    silence_ms: f64,
    acknowledged: u64,
    errors: u64,
    error: Option<String>,
}

/// What was felt of both kinds.
#[derive(Debug, Serialize)]
pub(crate) struct Failover {
    detection_ms: u64,
    planned: Option<Stall>,
    /// Why there is no planned one.
    not_planned: Option<String>,
    killed: Stall,
}

/// Starts a group, writes, switches, kills.
pub(crate) async fn measure(detection_ms: u64, more: &[String]) -> Result<Failover> {
    let dir = tempfile::Builder::new().prefix("gse-benches-failover-").tempdir()?;
    let mut redis = vec![Redis::start(dir.path(), None, &SAFE).await?];
    for _ in 0..2 {
        let of = redis.first().map(|p| p.port);
        redis.push(Redis::start(dir.path(), of, &SAFE).await?);
    }
    let first = redis.first().context("no Redis")?;
    first.copied(2).await?;
    let mut sentinels = Vec::new();
    for _ in 0..3 {
        sentinels.push(sentinel(dir.path(), first.port, detection_ms).await?);
    }
    for (port, _) in &sentinels {
        knows(*port).await?;
    }
    let places: Vec<String> = sentinels.iter().map(|(p, _)| format!("\"127.0.0.1:{p}\"")).collect();
    let group = format!("{{name=\"g0\",sentinels=[{}]}}", places.join(","));
    let mut sets = servers::sharded(&[group], 2);
    sets.extend(more.iter().cloned());
    let path = site::beside_us()?.join("gse_dba");
    let (port, program) = servers::gse_dba(dir.path(), &path, "gse_dba failover", &sets).await?;

    let (planned, not_planned) = match planned(port).await {
        Ok(stall) => (Some(stall), None),
        Err(e) => (None, Some(format!("{e:#}"))),
    };
    // Whoever is primary now.
    let primary = primary(sentinels.first().context("no Sentinel")?.0).await?;
    let writers = Writers::start(port)?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let victim = redis.iter_mut().find(|r| r.port == primary);
    victim.context("the primary is none of ours")?.program.kill_9().await?;
    tokio::time::sleep(Duration::from_millis(detection_ms) + Duration::from_secs(6)).await;
    let killed = writers.stop().await?;
    program.pid().context("gse_dba did not outlive it")?;
    Ok(Failover {
        detection_ms,
        planned,
        not_planned,
        killed,
    })
}

async fn planned(port: u16) -> Result<Stall> {
    let writers = Writers::start(port)?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut operator = Client::connect(port).await?;
    let answer = operator.call(&["DBA", "FAILOVER", "g0"]).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let stall = writers.stop().await?;
    let answer = answer?;
    ensure!(!answer.starts_with('-'), "DBA FAILOVER g0: {}", answer.trim_end());
    Ok(stall)
}

async fn sentinel(dir: &std::path::Path, primary: u16, detection_ms: u64) -> Result<(u16, Program)> {
    let port = servers::free_port()?;
    let data = dir.join(format!("sentinel-{port}"));
    std::fs::create_dir_all(&data)?;
    let file = data.join("sentinel.conf");
    let text = format!(
        "port {port}\nbind 127.0.0.1\ndir {}\nsentinel monitor g0 127.0.0.1 {primary} 2\nsentinel down-after-milliseconds g0 {detection_ms}\nsentinel failover-timeout g0 6000\nsentinel parallel-syncs g0 2\n",
        data.display()
    );
    std::fs::write(&file, text)?;
    let mut command = Command::new("redis-server");
    command.arg(&file).arg("--sentinel");
    let program = Program::spawn(&format!("sentinel {port}"), command, &data.join("log"))?;
    servers::listens(port).await.context("redis-sentinel")?;
    Ok((port, program))
}

/// Waits until a Sentinel knows the copies and the other Sentinels.
async fn knows(port: u16) -> Result<()> {
    let started = Instant::now();
    loop {
        let told = servers::ask(port, "INFO sentinel").await?;
        if told.contains("slaves=2,sentinels=3") {
            return Ok(());
        }
        ensure!(
            started.elapsed() < PATIENCE,
            "the Sentinel {port} does not find the others: {told}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn primary(sentinel: u16) -> Result<u16> {
    let told = servers::ask(sentinel, "SENTINEL GET-MASTER-ADDR-BY-NAME g0").await?;
    let port = told.lines().filter_map(|l| l.trim().parse().ok()).next_back();
    port.with_context(|| format!("the Sentinel does not name the primary: {told}"))
}

struct Client {
    stream: TcpStream,
}

impl Client {
    async fn connect(port: u16) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        let mut client = Self { stream };
        let answer = client.call(&["AUTH", PASSWORD]).await?;
        ensure!(answer == "+OK\r\n", "the password was not taken: {answer}");
        Ok(client)
    }

    /// A command whose reply comes in one piece.
    async fn call(&mut self, words: &[&str]) -> Result<String> {
        let mut out = format!("*{}\r\n", words.len());
        for w in words {
            out.push_str(&format!("${}\r\n{w}\r\n", w.len()));
        }
        self.stream.write_all(out.as_bytes()).await?;
        let mut buf = vec![0; 64 * 1024];
        let n = tokio::time::timeout(PATIENCE, self.stream.read(&mut buf))
            .await
            .with_context(|| format!("no answer to {words:?}"))??;
        ensure!(n > 0, "the connection was closed");
        Ok(String::from_utf8_lossy(buf.get(..n).unwrap_or_default()).into_owned())
    }
}

struct Writers {
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<Result<Written>>>,
}

#[derive(Default)]
struct Written {
    longest: Duration,
    acknowledged: Vec<Instant>,
    errors: u64,
    error: Option<String>,
}

impl Writers {
    fn start(port: u16) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let tasks = (0..WRITERS)
            .map(|w| tokio::spawn(write(port, w, Arc::clone(&stop))))
            .collect();
        Ok(Self { stop, tasks })
    }

    async fn stop(self) -> Result<Stall> {
        self.stop.store(true, Relaxed);
        let mut all = Written::default();
        for task in self.tasks {
            let one = task.await??;
            all.longest = all.longest.max(one.longest);
            all.acknowledged.extend(one.acknowledged);
            all.errors += one.errors;
            all.error = all.error.or(one.error);
        }
        all.acknowledged.sort();
        let gaps = all.acknowledged.windows(2).filter_map(|w| match w {
            [a, b] => Some(*b - *a),
            _ => None,
        });
        let silence = gaps.max().context("no write was acknowledged")?;
        Ok(Stall {
            longest_ms: all.longest.as_secs_f64() * 1e3,
            silence_ms: silence.as_secs_f64() * 1e3,
            acknowledged: all.acknowledged.len() as u64,
            errors: all.errors,
            error: all.error,
        })
    }
}

async fn write(port: u16, writer: u32, stop: Arc<AtomicBool>) -> Result<Written> {
    let mut client = Client::connect(port).await?;
    let (mut written, mut n) = (Written::default(), 0_u64);
    while !stop.load(Relaxed) {
        n += 1;
        let (key, value) = (format!("w{writer}:{}", n % 100), n.to_string());
        let began = Instant::now();
        let answer = client.call(&["SET", &key, &value]).await?;
        written.longest = written.longest.max(began.elapsed());
        if answer == "+OK\r\n" {
            written.acknowledged.push(Instant::now());
        } else {
            written.errors += 1;
            written.error.get_or_insert(answer.trim_end().to_owned());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    Ok(written)
}

impl Failover {
    pub(crate) fn section(&self) -> Section {
        let mut table = Section::new(
            format!(
                "a switch of the primary under {WRITERS} writers; Sentinels take it for dead after {} ms",
                self.detection_ms
            ),
            &[
                "what",
                "longest write, ms",
                "nobody's write for, ms",
                "acknowledged",
                "errors",
                "the first",
            ],
        );
        let row = |s: &Stall| {
            [
                format!("{:.0}", s.longest_ms),
                format!("{:.0}", s.silence_ms),
                s.acknowledged.to_string(),
                s.errors.to_string(),
                s.error.clone().unwrap_or_default(),
            ]
        };
        match &self.planned {
            Some(stall) => table.row("planned", row(stall)),
            None => table.row(
                "planned",
                [
                    "-".into(),
                    "-".into(),
                    "-".into(),
                    "-".into(),
                    self.not_planned.clone().unwrap_or_default(),
                ],
            ),
        }
        table.row("kill -9", row(&self.killed));
        table
    }
}
