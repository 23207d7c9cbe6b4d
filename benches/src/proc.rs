//! What the kernel says of processes: CPU time, memory, the accept queue; and the size of directories.

use std::path::Path;

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};
use serde::Serialize;

/// Of one process at one moment.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Usage {
    /// User and system time since its start, of all threads, microseconds (in the kernel's ticks, mostly 10,000).
    pub(crate) cpu_us: u64,
    /// Resident memory, KiB.
    pub(crate) rss_kib: u64,
}

/// Reads it.
///
/// # Errors
/// When there is no such process.
pub(crate) fn usage(pid: u32) -> Result<Usage> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
    // The name may hold blanks and parentheses; behind the last one are plain fields, from the third on.
    let (_, fields) = stat.rsplit_once(')').context("/proc/PID/stat has no name")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = |field: usize| -> Result<u64> {
        let text = fields.get(field - 3).context("/proc/PID/stat is too short")?;
        text.parse().with_context(|| format!("/proc/PID/stat: {text}"))
    };
    let per_second = sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100).max(1);
    let per_second = u64::try_from(per_second).context("clock ticks")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let rss_kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok())
        .with_context(|| format!("process {pid} has no memory; has it ended?"))?;
    Ok(Usage {
        cpu_us: (ticks(14)? + ticks(15)?) * (1_000_000 / per_second),
        rss_kib,
    })
}

/// Connections that found the accept queue full, since boot, of the whole machine.
pub(crate) fn listen_drops() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/net/netstat")?;
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let names = lines
        .next()
        .context("/proc/net/netstat has no TcpExt")?
        .split_whitespace();
    let values = lines
        .next()
        .context("/proc/net/netstat has no TcpExt values")?
        .split_whitespace();
    let drops = names.zip(values).find(|(name, _)| *name == "ListenDrops");
    Ok(drops.context("no ListenDrops")?.1.parse()?)
}

/// Bytes of all files in a directory.
pub(crate) fn dir_bytes(dir: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let entry = entry?;
        // A file may go while we look (a log that is compacted).
        let Ok(meta) = entry.metadata() else { continue };
        sum += if meta.is_dir() {
            dir_bytes(&entry.path())?
        } else {
            meta.len()
        };
    }
    Ok(sum)
}

/// The one-minute load of the machine.
pub(crate) fn load() -> String {
    std::fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|text| text.split_whitespace().next().map(str::to_owned))
        .unwrap_or_else(|| "unknown".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_seen() {
        let before = usage(std::process::id()).unwrap();
        let started = std::time::Instant::now();
        let mut n = 0_u64;
        while started.elapsed() < std::time::Duration::from_millis(200) {
            n = n.wrapping_mul(31).wrapping_add(1);
        }
        let after = usage(std::process::id()).unwrap();
        assert!(after.cpu_us > before.cpu_us, "{n}");
        assert!(after.rss_kib > 100);
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        assert!(usage(u32::MAX).unwrap_err().to_string().contains("process"));
    }
}
