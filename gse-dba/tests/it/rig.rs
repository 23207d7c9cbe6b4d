//! What the tests need: servers of ours in this process, Redis servers, processes of ours to kill, and a client that shows every byte.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use gse_core::lifecycle::Lifecycle;
use gse_dba::config::{Backend, Config};

pub(crate) const PASSWORD: &str = "a test's password";

/// One of our servers in this process.
pub(crate) struct Ours {
    pub(crate) addr: SocketAddr,
    pub(crate) life: Lifecycle,
    pub(crate) listeners: BTreeMap<String, String>,
    runtime: Option<tokio::runtime::Runtime>,
    done: Option<tokio::task::JoinHandle<anyhow::Result<()>>>,
}

impl Ours {
    pub(crate) fn start(config: Config) -> Ours {
        Self::try_start(config).unwrap()
    }

    pub(crate) fn try_start(config: Config) -> anyhow::Result<Ours> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let life = Lifecycle::new("gse_dba");
        let mut done = runtime.spawn(gse_dba::run(config, life.clone()));
        let listeners = runtime.block_on(async {
            tokio::select! {
                listeners = life.wait_ready() => Ok(listeners),
                ended = &mut done => Err(match ended { Ok(Err(e)) => e, other => anyhow::anyhow!("{other:?}") }),
            }
        })?;
        let addr = listeners["resp"].parse()?;
        Ok(Ours {
            addr,
            life,
            listeners,
            runtime: Some(runtime),
            done: Some(done),
        })
    }

    pub(crate) fn embedded(dir: &Path) -> Ours {
        Self::start(embedded(dir))
    }

    /// Stops it as SIGTERM would.
    pub(crate) fn stop(mut self) {
        self.life.drain();
        if let (Some(runtime), Some(done)) = (&self.runtime, self.done.take()) {
            runtime.block_on(done).unwrap().unwrap();
        }
    }

    pub(crate) fn client(&self) -> Raw {
        Raw::login(self.addr)
    }

    pub(crate) fn url(&self) -> String {
        format!(
            "redis://:{}@{}/",
            PASSWORD.replace(' ', "%20").replace('\'', "%27"),
            self.addr
        )
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        self.life.abort();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(2));
        }
    }
}

pub(crate) fn embedded(dir: &Path) -> Config {
    let mut config = Config {
        listen: "127.0.0.1:0".into(),
        password: Some(PASSWORD.into()),
        ..Config::default()
    };
    config.embedded.dir = dir.to_path_buf();
    config
}

pub(crate) fn single(redis: &Redis) -> Config {
    let mut config = Config {
        listen: "127.0.0.1:0".into(),
        password: Some(PASSWORD.into()),
        backend: Backend::Single,
        ..Config::default()
    };
    config.single.url = format!("redis://{}", redis.addr);
    config.single.connections = 2;
    config.single.reconnect_max_ms = 100;
    config
}

/// A Redis of Debian's.
pub(crate) struct Redis {
    pub(crate) addr: SocketAddr,
    child: Child,
    dir: tempfile::TempDir,
    more: Vec<String>,
}

impl Redis {
    pub(crate) fn start() -> Redis {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self::start_on(port)
    }

    pub(crate) fn start_on(port: u16) -> Redis {
        Self::start_as(port, &[])
    }

    /// With further settings, on any free port.
    pub(crate) fn start_with(more: &[&str]) -> Redis {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self::start_as(port, more)
    }

    /// A node of a cluster.
    pub(crate) fn start_cluster_on(port: u16) -> Redis {
        Self::start_as(port, &["--cluster-enabled", "yes"])
    }

    pub(crate) fn start_as(port: u16, more: &[&str]) -> Redis {
        let dir = tempfile::tempdir().unwrap();
        let more: Vec<String> = more.iter().map(|m| (*m).to_owned()).collect();
        let child = spawn_redis(port, dir.path(), &more);
        let addr = SocketAddr::from(([127, 0, 0, 1], port));
        wait_for("redis-server", || TcpStream::connect(addr).is_ok());
        Redis { addr, child, dir, more }
    }

    /// SIGKILL; what it has written to its directory stays.
    pub(crate) fn crash(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it again after a crash, as it was started first.
    pub(crate) fn revive(&mut self) {
        self.child = spawn_redis(self.addr.port(), self.dir.path(), &self.more);
        let addr = self.addr;
        wait_for("redis-server", || TcpStream::connect(addr).is_ok());
    }

    pub(crate) fn kill(mut self) -> u16 {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.addr.port()
    }

    /// SIGSTOP: it keeps its connections and answers nothing.
    pub(crate) fn freeze(&self) {
        self.signal(nix::sys::signal::Signal::SIGSTOP);
    }

    /// SIGCONT.
    pub(crate) fn thaw(&self) {
        self.signal(nix::sys::signal::Signal::SIGCONT);
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    pub(crate) fn client(&self) -> Raw {
        Raw::connect(self.addr)
    }
}

fn spawn_redis(port: u16, dir: &Path, more: &[String]) -> Child {
    Command::new("redis-server")
        .args([
            "--port",
            &port.to_string(),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--enable-debug-command",
            "yes",
            "--dir",
        ])
        .arg(dir)
        .args(more)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("redis-server is not installed: apt-get install redis-server")
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = &self.dir;
    }
}

/// Our program as a process of its own.
pub(crate) struct Process {
    pub(crate) addr: SocketAddr,
    child: Child,
}

impl Process {
    pub(crate) fn start(dir: &Path, more: &[&str]) -> Process {
        let addresses = dir.join("addresses.json");
        let _ = std::fs::remove_file(&addresses);
        let mut command = Command::new(env!("CARGO_BIN_EXE_gse_dba"));
        command
            .args(["--set", "listen=127.0.0.1:0", "--set"])
            .arg(format!("password={PASSWORD}"));
        command
            .arg("--set")
            .arg(format!("embedded.dir={}", dir.join("store").display()));
        command
            .arg("--set")
            .arg(format!("runtime.addresses_file={}", addresses.display()));
        for set in more {
            command.args(["--set", set]);
        }
        let child = command
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(dir.join("log.txt")).unwrap())
            .spawn()
            .unwrap();
        wait_for("gse_dba", || addresses.exists());
        let text = std::fs::read_to_string(&addresses).unwrap();
        let addr = text.split('"').find_map(|p| p.parse().ok()).unwrap();
        Process { addr, child }
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for something that comes true by itself.
pub(crate) fn wait_for(what: &str, mut yes: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(15);
    while !yes() {
        assert!(Instant::now() < until, "waited in vain for {what}");
        pause();
    }
}

/// A moment.
pub(crate) fn pause() {
    std::thread::park_timeout(Duration::from_millis(10));
}

/// A reply, decoded.
#[derive(Clone, Debug, PartialEq, PartialOrd)]
pub(crate) enum Value {
    Null,
    NullArray,
    Simple(String),
    Error(String),
    Int(i64),
    Double(String),
    Bulk(Vec<u8>),
    Verbatim(String),
    Array(Vec<Value>),
    Set(Vec<Value>),
    Map(Vec<Value>),
}

impl Value {
    pub(crate) fn bulk(text: &str) -> Value {
        Value::Bulk(text.as_bytes().to_vec())
    }

    pub(crate) fn ok() -> Value {
        Value::Simple("OK".into())
    }

    pub(crate) fn items(&self) -> &[Value] {
        match self {
            Value::Array(v) | Value::Set(v) | Value::Map(v) => v,
            other => panic!("not a list: {other:?}"),
        }
    }

    pub(crate) fn text(&self) -> String {
        match self {
            Value::Bulk(b) => String::from_utf8_lossy(b).into_owned(),
            Value::Simple(s) | Value::Error(s) | Value::Verbatim(s) | Value::Double(s) => s.clone(),
            Value::Int(n) => n.to_string(),
            other => panic!("no text: {other:?}"),
        }
    }

    pub(crate) fn int(&self) -> i64 {
        match self {
            Value::Int(n) => *n,
            other => panic!("not an integer: {other:?}"),
        }
    }
}

/// A client that does what it is told and no more.
pub(crate) struct Raw {
    pub(crate) stream: TcpStream,
    buf: Vec<u8>,
    at: usize,
}

pub(crate) fn encode(args: &[impl AsRef<[u8]>]) -> Vec<u8> {
    let mut out = format!("*{}\r\n", args.len()).into_bytes();
    for a in args {
        let a = a.as_ref();
        out.extend_from_slice(format!("${}\r\n", a.len()).as_bytes());
        out.extend_from_slice(a);
        out.extend_from_slice(b"\r\n");
    }
    out
}

impl Raw {
    pub(crate) fn connect(addr: SocketAddr) -> Raw {
        let stream = TcpStream::connect(addr).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Raw {
            stream,
            buf: Vec::new(),
            at: 0,
        }
    }

    pub(crate) fn login(addr: SocketAddr) -> Raw {
        let mut raw = Self::connect(addr);
        assert_eq!(raw.call(&["AUTH", PASSWORD]), Value::ok());
        raw
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(crate) fn call(&mut self, args: &[impl AsRef<[u8]>]) -> Value {
        self.send(&encode(args));
        self.reply()
    }

    /// A command as a line of words.
    pub(crate) fn say(&mut self, line: &str) -> Value {
        self.call(&line.split(' ').collect::<Vec<_>>())
    }

    /// The next reply, or `None` when the connection has ended.
    pub(crate) fn try_reply(&mut self) -> Option<Value> {
        self.buf.drain(..std::mem::take(&mut self.at));
        self.value()
    }

    pub(crate) fn reply(&mut self) -> Value {
        self.try_reply().expect("the connection ended")
    }

    fn need(&mut self, n: usize) -> Option<()> {
        let mut chunk = [0; 65536];
        while self.buf.len() < self.at + n {
            match self.stream.read(&mut chunk) {
                Ok(0) => return None,
                Ok(read) => self.buf.extend_from_slice(&chunk[..read]),
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(e) => panic!("no reply: {e}"),
            }
        }
        Some(())
    }

    pub(crate) fn line(&mut self) -> Option<String> {
        let mut n = 1;
        loop {
            self.need(n)?;
            if self.buf[self.at + n - 1] == b'\n' {
                break;
            }
            n += 1;
        }
        let line = String::from_utf8_lossy(&self.buf[self.at..self.at + n - 2]).into_owned();
        self.at += n;
        Some(line)
    }

    fn body(&mut self, n: usize) -> Option<Vec<u8>> {
        self.need(n + 2)?;
        let body = self.buf[self.at..self.at + n].to_vec();
        self.at += n + 2;
        Some(body)
    }

    fn list(&mut self, n: usize) -> Option<Vec<Value>> {
        (0..n).map(|_| self.value()).collect()
    }

    fn value(&mut self) -> Option<Value> {
        let line = self.line()?;
        let (kind, text) = line.split_at(1);
        Some(match kind {
            "+" => Value::Simple(text.into()),
            "-" => Value::Error(text.into()),
            ":" => Value::Int(text.parse().unwrap()),
            "," => Value::Double(text.into()),
            "_" => Value::Null,
            "$" if text == "-1" => Value::Null,
            "$" => Value::Bulk(self.body(text.parse().unwrap())?),
            "=" => Value::Verbatim(String::from_utf8(self.body(text.parse().unwrap())?).unwrap()),
            "*" if text == "-1" => Value::NullArray,
            "*" | ">" => Value::Array(self.list(text.parse().unwrap())?),
            "~" => Value::Set(self.list(text.parse().unwrap())?),
            "%" => Value::Map(self.list(text.parse::<usize>().unwrap() * 2)?),
            other => panic!("unknown reply {other}{text}"),
        })
    }
}

impl Process {
    /// In front of groups, by a whole configuration; its log is in `dir`.
    pub(crate) fn sharded(dir: &Path, config: &Config) -> Process {
        let file = dir.join("dba.toml");
        let addresses = dir.join("addresses.json");
        let mut config = config.clone();
        config.runtime.addresses_file = Some(addresses.clone());
        std::fs::write(&file, toml::to_string(&config).unwrap()).unwrap();
        let _ = std::fs::remove_file(&addresses);
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(dir.join("log.txt"))
            .unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_gse_dba"))
            .arg("--config")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        wait_for("gse_dba", || {
            let ended = child.try_wait().unwrap();
            let said = || std::fs::read_to_string(dir.join("log.txt")).unwrap_or_default();
            assert!(ended.is_none(), "gse_dba ended: {ended:?}\n{}", said());
            addresses.exists()
        });
        let text = std::fs::read_to_string(&addresses).unwrap();
        let addr = text.split('"').find_map(|p| p.parse().ok()).unwrap();
        Process { addr, child }
    }

    pub(crate) fn client(&self) -> Raw {
        Raw::login(self.addr)
    }
}
