//! redis-benchmark as the load, and what it says.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use tokio::process::Command;

use super::Kind;
use super::servers::Target;
use crate::proc;

/// Commands of one kind, so many in a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Cell {
    pub(crate) write: bool,
    pub(crate) pipeline: u32,
}

impl Cell {
    pub(crate) const ALL: [Self; 4] = [
        Self {
            write: true,
            pipeline: 1,
        },
        Self {
            write: false,
            pipeline: 1,
        },
        Self {
            write: true,
            pipeline: 16,
        },
        Self {
            write: false,
            pipeline: 16,
        },
    ];
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} P{}", if self.write { "SET" } else { "GET" }, self.pipeline)
    }
}

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Run {
    pub(crate) kind: Kind,
    pub(crate) build: String,
    pub(crate) cell: Cell,
    pub(crate) round: u32,
    pub(crate) per_s: f64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) cpu_us: Option<f64>,
}

/// How it is loaded.
pub(crate) struct Load {
    requests: u64,
}

impl Load {
    /// # Errors
    /// When there is no redis-benchmark.
    pub(crate) fn find(requests: u64) -> Result<Self> {
        let found = std::process::Command::new("redis-benchmark")
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        found.context("redis-benchmark does not start: apt-get install redis-tools")?;
        Ok(Self { requests })
    }

    /// Loads one target once.
    ///
    /// # Errors
    /// When redis-benchmark fails or an answer is an error.
    pub(crate) async fn run(&self, target: &Target, cell: Cell, round: u32) -> Result<Run> {
        let n = self.requests * if cell.pipeline > 1 { 4 } else { 1 };
        let before = target.process()?.map(proc::usage).transpose()?;
        let mut command = Command::new("redis-benchmark");
        command
            .args(["-h", "127.0.0.1", "-p", &target.port.to_string()])
            .args(["-t", if cell.write { "set" } else { "get" }])
            .args(["-n", &n.to_string(), "-P", &cell.pipeline.to_string()])
            .args(["-c", "50", "-d", "64", "-r", "100000", "--csv"])
            .kill_on_drop(true);
        if let Some(password) = target.password {
            command.args(["-a", password]);
        }
        let output = command.output().await.context("redis-benchmark")?;
        let after = target.process()?.map(proc::usage).transpose()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "redis-benchmark against {}: {text}{said}",
            target.kind.what()
        );
        let (per_s, p50_ms, p99_ms) =
            read(&text).with_context(|| format!("redis-benchmark against {} said {text}{said}", target.kind.what()))?;
        Ok(Run {
            kind: target.kind,
            build: target.build.clone(),
            cell,
            round,
            per_s,
            p50_ms,
            p99_ms,
            cpu_us: before.zip(after).map(|(b, a)| (a.cpu_us - b.cpu_us) as f64 / n as f64),
        })
    }
}

/// Operations a second, median and 99th percentile in milliseconds: by the names in the first line.
fn read(csv: &str) -> Option<(f64, f64, f64)> {
    let mut lines = csv.lines().filter(|l| l.starts_with('"'));
    let names: Vec<&str> = lines.next()?.split(',').map(|w| w.trim_matches('"')).collect();
    let values: Vec<&str> = lines.next()?.split(',').map(|w| w.trim_matches('"')).collect();
    let of = |name: &str| -> Option<f64> {
        let at = names.iter().position(|n| *n == name)?;
        values.get(at)?.parse().ok()
    };
    Some((of("rps")?, of("p50_latency_ms")?, of("p99_latency_ms")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_by_their_names() {
        let csv = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\",\"p95_latency_ms\",\"p99_latency_ms\",\"max_latency_ms\"\n\"SET\",\"71428.57\",\"0.4\",\"0.1\",\"0.35\",\"0.8\",\"1.2\",\"3\"\n";
        assert_eq!(read(csv), Some((71428.57, 0.35, 1.2)));
        assert_eq!(read("WARNING: no config\nError from server: no\n"), None);
    }
}
