//! The smallest server: what every `main.rs` looks like, and what the tests of signals, pid file and exit status run.
//!
//! It binds one listener, holds work that takes `work.drain_ms` to finish once it is told to stop, and prints a line per reload.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use gse_core::config::{Config, LogConfig, OpsConfig, Problems, RuntimeConfig};
use gse_core::lifecycle::Lifecycle;
use gse_core::process::{self, ServiceInfo};
use serde::{Deserialize, Serialize};

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Minimal {
    runtime: RuntimeConfig,
    log: LogConfig,
    ops: OpsConfig,
    work: Work,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Work {
    /// Where to listen.
    listen: String,
    /// What the work in hand takes to finish, in milliseconds.
    drain_ms: u64,
    /// To show what a panic does.
    panic: bool,
}

impl Default for Work {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:0".to_owned(),
            drain_ms: 0,
            panic: false,
        }
    }
}

impl Config for Minimal {
    fn runtime(&self) -> &RuntimeConfig {
        &self.runtime
    }
    fn log(&self) -> &LogConfig {
        &self.log
    }
    fn ops(&self) -> &OpsConfig {
        &self.ops
    }
    fn validate(&self, problems: &mut Problems) {
        problems.check_listen("work.listen", &self.work.listen);
    }
}

async fn run(config: Minimal, life: Lifecycle) -> anyhow::Result<()> {
    let listen = &config.work.listen;
    let listener = tokio::net::TcpListener::bind(listen)
        .await
        .with_context(|| format!("cannot listen on {listen} (work.listen)"))?;
    life.announce("echo", listener.local_addr()?.to_string());

    let work = life.clone();
    life.spawn("work", async move {
        assert!(!config.work.panic, "asked to panic");
        work.draining().await;
        tokio::time::sleep(Duration::from_millis(config.work.drain_ms)).await;
        println!("work finished");
    });
    let mut reloads = life.reloads();
    let told = life.clone();
    life.spawn("reloads", async move {
        loop {
            tokio::select! {
                Ok(()) = reloads.changed() => println!("reload {}", *reloads.borrow_and_update()),
                () = told.draining() => return,
            }
        }
    });
    life.ready();
    life.draining().await;
    println!("draining");
    Ok(())
}

fn main() -> ExitCode {
    let info = ServiceInfo {
        name: "gse_minimal",
        version: env!("CARGO_PKG_VERSION"),
        about: "The smallest server",
    };
    process::main(info, run)
}
