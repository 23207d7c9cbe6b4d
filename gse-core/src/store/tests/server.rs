//! A real redis-server of the test's own.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A running server; it ends with this value.
pub(super) struct Server {
    dir: tempfile::TempDir,
    port: u16,
    args: Vec<String>,
    child: Child,
}

/// A port that was free a moment ago.
pub(super) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Server {
    /// Starts a server on a free port and a Unix socket, with what is in memory saved to a log.
    pub(super) async fn start(args: &[&str]) -> Self {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        // The port may be taken between its being found free and its being used.
        for _ in 0..10 {
            let dir = tempfile::tempdir().unwrap();
            let port = free_port();
            let child = spawn(dir.path(), port, &args);
            let mut server = Self {
                dir,
                port,
                args: args.clone(),
                child,
            };
            if server.answers().await {
                return server;
            }
        }
        panic!("redis-server does not start");
    }

    async fn answers(&mut self) -> bool {
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            if self.socket().exists() && std::net::TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        false
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("redis.sock")
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    pub(super) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub(super) fn unix_url(&self) -> String {
        format!("redis+unix://{}", self.socket().display())
    }

    pub(super) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        // Nobody removes the socket of a killed server.
        let _ = std::fs::remove_file(self.socket());
    }

    /// Starts it again at the same address with the same data.
    pub(super) async fn restart(&mut self) {
        self.child = spawn(self.dir.path(), self.port, &self.args);
        assert!(self.answers().await, "redis-server does not start again");
    }

    /// Lets it hang: it keeps its connections and answers none.
    pub(super) fn stop(&self) {
        kill(self.pid(), Signal::SIGSTOP).unwrap();
    }

    pub(super) fn go_on(&self) {
        kill(self.pid(), Signal::SIGCONT).unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(dir: &Path, port: u16, args: &[String]) -> Child {
    Command::new("redis-server")
        .args([
            "--bind",
            "127.0.0.1",
            "--port",
            &port.to_string(),
            "--save",
            "",
            "--appendonly",
            "yes",
        ])
        .args(["--unixsocket", "redis.sock", "--dir"])
        .arg(dir)
        .args(args)
        .current_dir(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("redis-server of Debian's package of that name")
}
