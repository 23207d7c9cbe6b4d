//! What the kernel says of processes: CPU time, memory, the accept queue; and the size of directories.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{Pid, SysconfVar, sysconf};
use serde::Serialize;

/// Of one process at one moment.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Usage {
    /// User and system time since its start, of all threads, those that have ended too; microseconds of its CPU clock.
    pub(crate) cpu_us: u64,
    /// Resident memory, KiB.
    pub(crate) rss_kib: u64,
}

impl std::iter::Sum for Usage {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            cpu_us: sum.cpu_us + one.cpu_us,
            rss_kib: sum.rss_kib + one.rss_kib,
        })
    }
}

/// Reads it.
///
/// # Errors
/// When there is no such process.
pub(crate) fn usage(pid: u32) -> Result<Usage> {
    let raw = i32::try_from(pid).with_context(|| format!("process {pid} cannot be"))?;
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(raw)).with_context(|| format!("process {pid}"))?;
    let used = clock_gettime(clock).with_context(|| format!("CPU time of process {pid}"))?;
    let cpu_us = Duration::from(used).as_micros();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let rss_kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok())
        .with_context(|| format!("process {pid} has no memory; has it ended?"))?;
    Ok(Usage {
        cpu_us: u64::try_from(cpu_us).context("CPU time")?,
        rss_kib,
    })
}

/// The most memory that a process has had resident, KiB.
///
/// # Errors
/// When there is no such process.
pub(crate) fn peak_kib(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let peak = |line: &str| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok();
    let peak = status.lines().find_map(peak);
    peak.with_context(|| format!("process {pid} has no memory; has it ended?"))
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

/// The kernel's memory for sockets, of the whole machine.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct KernelMemory {
    /// Buffers of TCP sockets, KiB (`/proc/net/sockstat`, pages of `mem`).
    pub(crate) tcp_buffers_kib: u64,
    /// Slabs that hold nothing but connections, KiB (`/proc/slabinfo`, which only root may read).
    pub(crate) slabs_kib: Option<u64>,
    /// The file and the directory entry that each socket has, bytes: their sizes, because other files come and go by the thousand.
    pub(crate) file_bytes: Option<u64>,
}

/// Slabs that hold nothing but connections: the socket, its inode, its place in epoll.
const SOCKET_SLABS: [&str; 4] = ["TCP", "sock_inode_cache", "eventpoll_epi", "request_sock_TCP"];
/// What every open file has, sockets too.
const FILE_SLABS: [&str; 4] = ["filp", "dentry", "lsm_inode_cache", "lsm_file_cache"];

/// Reads it.
///
/// # Errors
/// When `/proc/net/sockstat` is not what it is known to be.
pub(crate) fn kernel_memory() -> Result<KernelMemory> {
    let page = sysconf(SysconfVar::PAGE_SIZE)?.unwrap_or(4096).max(1);
    let page = u64::try_from(page).context("page size")?;
    let text = std::fs::read_to_string("/proc/net/sockstat")?;
    let line = text.lines().find(|line| line.starts_with("TCP:"));
    let words: Vec<&str> = line.context("sockstat has no TCP")?.split_whitespace().collect();
    let pages = words.iter().skip_while(|word| **word != "mem").nth(1);
    let pages: u64 = pages.context("sockstat has no TCP mem")?.parse()?;
    let slabs = std::fs::read_to_string("/proc/slabinfo").ok();
    let slabs = slabs.as_deref().map(slab_bytes);
    Ok(KernelMemory {
        tcp_buffers_kib: pages * page / 1024,
        slabs_kib: slabs.map(|(sockets, _)| sockets / 1024),
        file_bytes: slabs.map(|(_, file)| file),
    })
}

/// Bytes of all sockets (objects in use times their size: free places are kept for whoever comes next, and would be noise), and of
/// what one open file takes.
fn slab_bytes(slabinfo: &str) -> (u64, u64) {
    let of = |line: &str| -> Option<(u64, u64)> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (name, active, size) = (words.first()?, words.get(1)?, words.get(3)?.parse::<u64>().ok()?);
        if SOCKET_SLABS.contains(name) {
            Some((active.parse::<u64>().ok()? * size, 0))
        } else {
            FILE_SLABS.contains(name).then_some((0, size))
        }
    };
    let lines = slabinfo.lines().filter_map(of);
    lines.fold((0, 0), |(sockets, file), (more, size)| (sockets + more, file + size))
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
    fn slabs_of_connections_are_added_up() {
        let text = "slabinfo - version: 2.1\n# name <active_objs> <num_objs> <objsize> ...\n\
            TCP 10 20 2368 13 8 : tunables 0 0 0 : slabdata 2 2 0\n\
            TCPv6 99 99 2560 12 8 : tunables 0 0 0 : slabdata 9 9 0\n\
            dentry 100 100 192 21 1 : tunables 0 0 0 : slabdata 5 5 0\n";
        assert_eq!(slab_bytes(text), (10 * 2368, 192));
        kernel_memory().unwrap();
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        assert!(usage(u32::MAX).unwrap_err().to_string().contains("process"));
    }
}
