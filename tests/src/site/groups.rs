//! A store that is three groups of three Redis under three Sentinels, of which one loses its primary every half minute. With `GSE_TESTS_STORE=sharded` every
//! site that asks for the built-in store gets this instead.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

const GROUPS: usize = 3;
const EACH: usize = 3;

/// Whether this store is to stand in for the built-in one.
pub(super) fn wanted() -> bool {
    std::env::var("GSE_TESTS_STORE").is_ok_and(|kind| kind == "sharded")
}

/// Seconds between one fail-over and the next.
fn every() -> Duration {
    let seconds = std::env::var("GSE_TESTS_FAILOVER_S").ok().and_then(|s| s.parse().ok());
    Duration::from_secs(seconds.unwrap_or(30))
}

#[derive(Debug)]
struct Server {
    port: u16,
    dir: PathBuf,
    args: Vec<String>,
    child: Option<Child>,
}

impl Server {
    fn start(&mut self) -> Result<()> {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("out.log"))?;
        let child = Command::new("redis-server")
            .args(&self.args)
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(Stdio::null())
            .spawn()
            .context("redis-server (Debian package redis-server)")?;
        self.child = Some(child);
        Ok(())
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Asks it something, as `redis-cli` would.
    fn ask(&self, words: &[&str]) -> Option<String> {
        let url = format!("redis://127.0.0.1:{}/", self.port);
        let mut c = redis::Client::open(url)
            .ok()?
            .get_connection_with_timeout(Duration::from_secs(1))
            .ok()?;
        c.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
        let mut command = redis::Cmd::new();
        for word in words {
            command.arg(*word);
        }
        match command.query::<redis::Value>(&mut c).ok()? {
            redis::Value::BulkString(text) => Some(String::from_utf8_lossy(&text).into_owned()),
            other => Some(format!("{other:?}")),
        }
    }

    fn leads(&self) -> bool {
        let told = self.ask(&["INFO", "replication"]).unwrap_or_default();
        told.contains("role:master") && told.contains("state=online")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The groups, for as long as a site needs them.
#[derive(Debug)]
pub(super) struct Groups {
    /// Settings for the gse_dba in front.
    pub(super) sets: Vec<String>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Groups {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // Servers are killed as it ends.
            let _ = thread.join();
        }
    }
}

fn until(what: &str, mut yes: impl FnMut() -> bool) -> Result<()> {
    let from = Instant::now();
    while !yes() {
        anyhow::ensure!(from.elapsed() < Duration::from_secs(60), "waited in vain for {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
    Ok(())
}

fn server(dir: PathBuf, text: impl FnOnce(u16) -> String, sentinel: bool) -> Result<Server> {
    std::fs::create_dir_all(&dir)?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    std::fs::write(
        dir.join("redis.conf"),
        format!("port {port}\nbind 127.0.0.1\ndir {}\n{}", dir.display(), text(port)),
    )?;
    let mut args = vec!["redis.conf".to_owned()];
    if sentinel {
        args.push("--sentinel".into());
    }
    let mut server = Server {
        port,
        dir,
        args,
        child: None,
    };
    server.start()?;
    until("a redis-server", || TcpStream::connect(("127.0.0.1", port)).is_ok())?;
    Ok(server)
}

impl Groups {
    /// Starts them in a directory and lets them fail over from time to time.
    pub(super) fn start(dir: &Path) -> Result<Self> {
        let mut groups: Vec<Vec<Server>> = Vec::new();
        for g in 0..GROUPS {
            let mut group: Vec<Server> = Vec::new();
            for i in 0..EACH {
                let first = group.first().map(|s| s.port);
                let text = |_: u16| {
                    let mut text = "save \"\"\nappendonly yes\nappendfsync always\nrepl-diskless-sync-delay 0\nmin-replicas-to-write 1\nmin-replicas-max-lag 5\n".to_owned();
                    if let Some(first) = first {
                        text.push_str(&format!("replicaof 127.0.0.1 {first}\n"));
                    }
                    text
                };
                group.push(server(dir.join(format!("group{g}-{i}")), text, false)?);
            }
            groups.push(group);
        }
        let mut sentinels = Vec::new();
        for i in 0..3 {
            let text = |_: u16| {
                groups.iter().enumerate().filter_map(|(g, group)| Some((g, group.first()?.port))).map(|(g, port)| {
                    format!("sentinel monitor g{g} 127.0.0.1 {port} 2\nsentinel down-after-milliseconds g{g} 1500\nsentinel failover-timeout g{g} 6000\nsentinel parallel-syncs g{g} 2\n")
                }).collect()
            };
            sentinels.push(server(dir.join(format!("sentinel-{i}")), text, true)?);
        }
        for group in &groups {
            until("the copies", || {
                group
                    .first()
                    .and_then(|s| s.ask(&["INFO", "replication"]))
                    .is_some_and(|t| t.matches("state=online").count() == EACH - 1)
            })?;
        }
        let addresses: Vec<String> = sentinels.iter().map(|s| format!("\"127.0.0.1:{}\"", s.port)).collect();
        let list: Vec<String> = (0..GROUPS)
            .map(|g| format!("{{name=\"g{g}\",sentinels=[{}]}}", addresses.join(",")))
            .collect();
        let sets = vec![
            "backend=sharded".to_owned(),
            "sharded.one_host=true".to_owned(),
            "sharded.poll_ms=200".to_owned(),
            format!("sharded.groups=[{}]", list.join(",")),
        ];
        for sentinel in &sentinels {
            until("the Sentinels to know each other", || {
                (0..GROUPS).all(|g| {
                    let told = sentinel
                        .ask(&["SENTINEL", "SENTINELS", &format!("g{g}")])
                        .unwrap_or_default();
                    let copies = sentinel
                        .ask(&["SENTINEL", "REPLICAS", &format!("g{g}")])
                        .unwrap_or_default();
                    told.matches("runid").count() >= 2 && copies.matches("runid").count() >= EACH - 1
                })
            })?;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            // Both are kept here until the end.
            let _sentinels = sentinels;
            disturb(&mut groups, &stopped);
        });
        Ok(Self {
            sets,
            stop,
            thread: Some(thread),
        })
    }
}

/// Kills the primary of one group after another, and brings it back when there is another.
fn disturb(groups: &mut [Vec<Server>], stop: &AtomicBool) {
    let stopped = || stop.load(Ordering::Relaxed);
    let mut turn = 0;
    loop {
        let next = Instant::now() + every();
        while Instant::now() < next {
            if stopped() {
                return;
            }
            std::thread::park_timeout(Duration::from_millis(200));
        }
        let at = turn % groups.len().max(1);
        turn += 1;
        let Some(group) = groups.get_mut(at) else { return };
        let Some(primary) = group.iter().position(Server::leads) else {
            continue;
        };
        println!("the store fails over: group {at}");
        if let Some(s) = group.get_mut(primary) {
            s.kill();
        }
        while !stopped() && !group.iter().enumerate().any(|(i, s)| i != primary && s.leads()) {
            std::thread::park_timeout(Duration::from_millis(100));
        }
        if stopped() {
            return;
        }
        if let Some(Err(e)) = group.get_mut(primary).map(Server::start) {
            println!("the killed server does not start again: {e:#}");
        }
    }
}
