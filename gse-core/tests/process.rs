//! A real process under real signals: drain, leaving at once, reload, `--quit`, pid file, exit status. What runs is
//! `examples/minimal.rs`.

// A test fails by panicking, in its helpers as well.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PATIENCE: Duration = Duration::from_secs(10);

/// The example's binary. `cargo test` has built it unless it was told to build this test alone.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let tests = std::env::current_exe().unwrap();
        let path = tests.parent().and_then(Path::parent).unwrap().join("examples/minimal");
        if !path.exists() {
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let args = [
                "build",
                "--quiet",
                "--package",
                env!("CARGO_PKG_NAME"),
                "--example",
                "minimal",
            ];
            assert!(
                Command::new(cargo).args(args).status().unwrap().success(),
                "cannot build {}",
                path.display()
            );
        }
        path
    })
}

struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "[runtime]\npid_file = {:?}\naddresses_file = {:?}\nworker_threads = 2\n{text}",
            path("x.pid"),
            path("addresses.json")
        );
        std::fs::write(dir.path().join("x.toml"), config).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.arg("-f").arg(self.path("x.toml")).args(args);
        command
    }

    fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Starts the program and waits until it says that it is ready.
    fn start(&self, args: &[&str]) -> Running {
        let mut child = self
            .command(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = lines_of(child.stdout.take().unwrap());
        let errors = lines_of(child.stderr.take().unwrap());
        let running = Running { child, lines, errors };
        wait_for(|| self.path("addresses.json").exists());
        running
    }
}

struct Running {
    child: Child,
    lines: Receiver<String>,
    errors: Receiver<String>,
}

impl Running {
    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap())
    }

    fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// A signal that has no name.
    fn signal_raw(&self, number: i32) {
        let pid = self.child.id().to_string();
        assert!(
            Command::new("kill")
                .arg(format!("-{number}"))
                .arg(pid)
                .status()
                .unwrap()
                .success()
        );
    }

    fn expect_line(&self, wanted: &str) {
        let line = self
            .lines
            .recv_timeout(PATIENCE)
            .unwrap_or_else(|_| panic!("no line {wanted:?}"));
        assert_eq!(line, wanted);
    }

    fn exit(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "the process does not exit");
            pause();
        }
    }

    fn errors(&self) -> String {
        self.errors.iter().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines_of(source: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(source).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

fn pause() {
    std::thread::park_timeout(Duration::from_millis(10));
}

fn wait_for(mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "it does not happen");
        pause();
    }
}

#[test]
fn sigterm_finishes_the_work_in_hand_and_exits_0() {
    let home = Home::new("[work]\ndrain_ms = 400\n");
    let mut running = home.start(&[]);
    let addresses: serde_json::Value =
        serde_json::from_slice(&std::fs::read(home.path("addresses.json")).unwrap()).unwrap();
    assert!(
        std::net::TcpStream::connect(addresses["echo"].as_str().unwrap()).is_ok(),
        "{addresses}"
    );
    let pid = std::fs::read_to_string(home.path("x.pid")).unwrap();
    assert_eq!(pid.trim(), running.pid().to_string());

    running.signal(Signal::SIGTERM);
    running.expect_line("draining");
    running.expect_line("work finished");
    assert_eq!(running.exit().code(), Some(0));
    assert!(!home.path("x.pid").exists());
    assert!(!home.path("addresses.json").exists());
}

#[test]
fn a_second_signal_leaves_within_a_second_and_says_so() {
    let home = Home::new("[work]\ndrain_ms = 60000\n");
    for (first, second) in [(Signal::SIGTERM, Signal::SIGTERM), (Signal::SIGINT, Signal::SIGTERM)] {
        let mut running = home.start(&[]);
        running.signal(first);
        running.expect_line("draining");
        running.signal(second);
        let told = Instant::now();
        assert_eq!(running.exit().code(), Some(1));
        assert!(told.elapsed() < Duration::from_secs(1), "{:?}", told.elapsed());
        assert!(running.errors().contains("left at once on the second signal"));
        assert!(!home.path("x.pid").exists());
    }
}

#[test]
fn a_drain_that_takes_too_long_is_cut_short_and_fails() {
    let home = Home::new("drain_timeout_ms = 200\n[work]\ndrain_ms = 60000\n");
    let mut running = home.start(&[]);
    running.signal(Signal::SIGTERM);
    assert_eq!(running.exit().code(), Some(1));
    let errors = running.errors();
    assert!(
        errors.contains("did not finish what it held within 200 ms (runtime.drain_timeout_ms)"),
        "{errors}"
    );
    assert!(errors.contains("work x1"), "{errors}");
}

#[test]
fn sighup_and_signal_36_reload_and_open_the_log_file_again() {
    let home = Home::new("");
    let log = home.path("x.log");
    let mut running = home.start(&["--set", &format!("log.file={}", log.display())]);
    std::fs::rename(&log, home.path("x.log.1")).unwrap();
    running.signal(Signal::SIGHUP);
    running.expect_line("reload 1");
    assert!(std::fs::read_to_string(&log).unwrap().contains("reload asked for"));
    running.signal_raw(36);
    running.expect_line("reload 2");
    running.signal(Signal::SIGTERM);
    assert_eq!(running.exit().code(), Some(0));
    assert!(
        std::fs::read_to_string(home.path("x.log.1"))
            .unwrap()
            .contains("listening")
    );
}

#[test]
fn quit_stops_the_running_instance_and_waits_for_it() {
    let home = Home::new("[work]\ndrain_ms = 300\n");
    let mut running = home.start(&[]);
    let quit = home.output(&["--quit"]);
    assert_eq!(quit.status.code(), Some(0), "{quit:?}");
    assert!(String::from_utf8_lossy(&quit.stdout).contains(&format!("process {} has stopped", running.pid())));
    // It has gone by now, or is about to be reaped.
    assert_eq!(running.exit().code(), Some(0));
    running.expect_line("draining");
    running.expect_line("work finished");

    let again = home.output(&["--quit"]);
    assert_eq!(again.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&again.stdout).contains("nothing runs"));
}

#[test]
fn quit_gives_up_on_a_process_that_does_not_stop() {
    let home = Home::new("drain_timeout_ms = 100\n");
    let running = home.start(&[]);
    running.signal(Signal::SIGSTOP);
    let quit = home.output(&["--quit"]);
    assert_eq!(quit.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&quit.stderr).contains("is still there after"),
        "{quit:?}"
    );
    running.signal(Signal::SIGCONT);
}

#[test]
fn a_second_instance_is_refused_and_a_killed_one_is_replaced() {
    let home = Home::new("");
    let mut running = home.start(&[]);
    let second = home.output(&[]);
    assert_eq!(second.status.code(), Some(1));
    let error = String::from_utf8_lossy(&second.stderr);
    assert!(
        error.contains(&format!("process {} runs already", running.pid())),
        "{error}"
    );
    assert!(
        home.path("x.pid").exists(),
        "the refused instance removed the other's pid file"
    );

    running.signal(Signal::SIGKILL);
    running.exit();
    assert!(home.path("x.pid").exists());
    std::fs::remove_file(home.path("addresses.json")).unwrap();
    let next = home.start(&[]);
    assert_eq!(
        std::fs::read_to_string(home.path("x.pid")).unwrap().trim(),
        next.pid().to_string()
    );
}

#[test]
fn a_start_that_fails_is_one_line_and_exit_1() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let home = Home::new("");
    let output = home.output(&["--set", &format!("work.listen={address}"), "--set", "log.level=off"]);
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        errors.starts_with(&format!(
            "gse_minimal: cannot listen on {address} (work.listen): Address already in use"
        )),
        "{errors}"
    );
    assert_eq!(errors.lines().count(), 1, "{errors}");
}

#[test]
fn a_panic_of_an_owned_task_drains_and_is_exit_1() {
    let home = Home::new("[work]\npanic = true\n");
    let output = home.output(&[]);
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        errors
            .lines()
            .any(|line| line == "gse_minimal: work panicked: asked to panic"),
        "{errors}"
    );
}

#[test]
fn check_print_config_and_wrong_usage() {
    let home = Home::new("[work]\ndrain_ms = 3\n");
    let check = home.output(&["--check"]);
    assert_eq!(check.status.code(), Some(0));
    assert_eq!(
        String::from_utf8_lossy(&check.stdout),
        format!("{}: ok\n", home.path("x.toml").display())
    );

    let wrong = home.output(&[
        "--check",
        "--set",
        "work.drain_ms=never",
        "--set",
        "work.listen=nowhere",
    ]);
    assert_eq!(wrong.status.code(), Some(64));
    let errors = String::from_utf8_lossy(&wrong.stderr).into_owned();
    assert!(
        errors.contains("--set: work.drain_ms must be u64, not string \"never\""),
        "{errors}"
    );
    assert!(errors.contains("--set: work.listen is \"nowhere\""), "{errors}");

    let print = home
        .command(&["--print-config"])
        .env("GSE_MINIMAL__LOG__LEVEL", "debug")
        .output()
        .unwrap();
    assert_eq!(print.status.code(), Some(0));
    let text = String::from_utf8_lossy(&print.stdout).into_owned();
    assert!(
        text.contains("level = \"debug\"  # env GSE_MINIMAL__LOG__LEVEL\n"),
        "{text}"
    );
    assert!(
        text.contains(&format!("drain_ms = 3  # {}:6\n", home.path("x.toml").display())),
        "{text}"
    );

    assert_eq!(home.output(&["--nonsense"]).status.code(), Some(64));
    assert_eq!(home.output(&["--version"]).status.code(), Some(0));
    assert_eq!(home.output(&["--help"]).status.code(), Some(0));
}
