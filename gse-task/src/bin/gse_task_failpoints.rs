//! gse_task for tests of its death: dies of SIGKILL at a named place, as if someone had sent it at that very moment.
//!
//! `FAILPOINT_KILL=name` or `name:n` (the n-th time it gets there) in the environment; without it this is gse_task. The places are
//! the `fail_point!` lines of the library; which of them matter is left to the tests. With `FAILPOINT_ARMED=path` it lives for as long
//! as there is no file of that path, and what happens till then does not count.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};

use gse_core::process::{self, ServiceInfo};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn arm(place: &str, when: Option<PathBuf>) -> Result<(), String> {
    let (name, nth) = match place.split_once(':') {
        None => (place, 1),
        Some((name, nth)) => (
            name,
            nth.parse::<u32>()
                .map_err(|error| format!("FAILPOINT_KILL={place}: {error}"))?,
        ),
    };
    let left = AtomicU32::new(nth);
    fail::cfg_callback(name, move || {
        if when.as_ref().is_some_and(|file| !file.exists()) {
            return;
        }
        if left.fetch_sub(1, Ordering::SeqCst) == 1 {
            if let Err(error) = kill(Pid::this(), Signal::SIGKILL) {
                eprintln!("can't kill itself: {error}");
            }
            // Nothing of this thread happens after the signal was sent.
            loop {
                std::thread::park();
            }
        }
    })
}

fn main() -> ExitCode {
    if let Ok(place) = std::env::var("FAILPOINT_KILL")
        && let Err(error) = arm(&place, std::env::var_os("FAILPOINT_ARMED").map(PathBuf::from))
    {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    let info = ServiceInfo {
        name: "gse_task",
        version: env!("CARGO_PKG_VERSION"),
        about: "Agent sessions, script fan-out and results (with places to die at)",
    };
    process::main(info, gse_task::run)
}
