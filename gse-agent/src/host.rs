//! Facts of this host: its identity, addresses and size, which the hello carries, and its load, which heartbeats carry.
//!
//! Everything comes from files under `/proc` and `/etc` and from the interfaces; what cannot be read is left empty and said once.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// What does not change while the agent runs.
#[derive(Debug, Clone, Default)]
pub struct HostFacts {
    /// `/etc/machine-id`, or one drawn once and kept in the data directory.
    pub machine_id: String,
    /// Changes with every boot.
    pub boot_id: String,
    /// Own addresses, the most useful one first.
    pub addresses: Vec<IpAddr>,
    /// Name of the host.
    pub hostname: String,
    /// `linux`.
    pub os: &'static str,
    /// `x86_64`.
    pub arch: &'static str,
    /// Processors this process may use.
    pub cpu_num: u32,
    /// MiB.
    pub mem_size_mb: u64,
}

impl HostFacts {
    /// Reads them. Blocking. `addresses` overrides those of the interfaces unless it is empty.
    ///
    /// # Errors
    /// When the host has no machine id and none can be kept in `data_dir`.
    pub fn read(data_dir: &Path, addresses: &[IpAddr]) -> anyhow::Result<Self> {
        Self::read_at(Path::new("/"), data_dir, addresses)
    }

    fn read_at(root: &Path, data_dir: &Path, addresses: &[IpAddr]) -> anyhow::Result<Self> {
        let boot_id = std::fs::read_to_string(root.join("proc/sys/kernel/random/boot_id")).unwrap_or_else(|error| {
            tracing::warn!("cannot read the boot id: {error}; it is sent empty");
            String::new()
        });
        let meminfo = std::fs::read_to_string(root.join("proc/meminfo")).unwrap_or_else(|error| {
            tracing::warn!("cannot read /proc/meminfo: {error}; memory is reported as 0");
            String::new()
        });
        let hostname = nix::unistd::gethostname().map_or_else(
            |error| {
                tracing::warn!("cannot read the host's name: {error}");
                String::new()
            },
            |name| name.to_string_lossy().into_owned(),
        );
        Ok(Self {
            machine_id: machine_id(&root.join("etc/machine-id"), data_dir)?,
            boot_id: boot_id.trim().to_owned(),
            addresses: if addresses.is_empty() {
                interface_addresses()
            } else {
                addresses.to_vec()
            },
            hostname,
            os: std::env::consts::OS,
            arch: std::env::consts::ARCH,
            cpu_num: std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
            mem_size_mb: kib_of(&meminfo, "MemTotal:").unwrap_or(0) / 1024,
        })
    }
}

/// The host's machine id; images of some hosts have none (or the word "uninitialized"), so one is drawn and kept.
fn machine_id(file: &Path, data_dir: &Path) -> anyhow::Result<String> {
    let usable = |text: String| {
        let text = text.trim().to_owned();
        (text.len() >= 8 && text.len() <= 128 && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-'))
            .then_some(text)
    };
    if let Some(id) = std::fs::read_to_string(file).ok().and_then(usable) {
        return Ok(id);
    }
    let own = data_dir.join("machine-id");
    if let Some(id) = std::fs::read_to_string(&own).ok().and_then(usable) {
        return Ok(id);
    }
    let id = hex::encode(rand::random::<[u8; 16]>());
    write_atomically(&own, format!("{id}\n").as_bytes())
        .with_context(|| format!("this host has no machine id and none can be kept in {}", own.display()))?;
    tracing::info!(
        "this host has no machine id; one was drawn and is kept in {}",
        own.display()
    );
    Ok(id)
}

/// Replaces a small file; a reader sees the old or the new content. Blocking.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    let temporary = PathBuf::from(name);
    let mut file = std::fs::File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}

fn interface_addresses() -> Vec<IpAddr> {
    let found = match nix::ifaddrs::getifaddrs() {
        Ok(interfaces) => interfaces
            .filter_map(|interface| {
                let address = interface.address?;
                let ip = address
                    .as_sockaddr_in()
                    .map(|v4| IpAddr::V4(v4.ip()))
                    .or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))?;
                Some(ip)
            })
            .collect(),
        Err(error) => {
            tracing::warn!("cannot list the interfaces: {error}");
            Vec::new()
        }
    };
    useful_first(found)
}

/// IPv4 before IPv6, in the order of the interfaces; link-local ones last; loopback only if there is nothing else.
fn useful_first(mut found: Vec<IpAddr>) -> Vec<IpAddr> {
    fn rank(ip: &IpAddr) -> u8 {
        match ip {
            IpAddr::V4(v4) if v4.is_link_local() => 2,
            IpAddr::V4(_) => 0,
            IpAddr::V6(v6) if v6.is_unicast_link_local() => 3,
            IpAddr::V6(_) => 1,
        }
    }
    found.retain(|ip| !ip.is_unspecified());
    if found.iter().any(|ip| !ip.is_loopback()) {
        found.retain(|ip| !ip.is_loopback());
    }
    found.sort_by_key(rank);
    let mut seen = std::collections::HashSet::new();
    found.retain(|ip| seen.insert(*ip));
    found
}

fn kib_of(meminfo: &str, key: &str) -> Option<u64> {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix(key))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// Turns the kernel's counters into the figures of a heartbeat.
#[derive(Debug, Default)]
pub struct LoadMeter {
    last: Option<CpuTimes>,
}

#[derive(Debug, Clone, Copy)]
struct CpuTimes {
    busy: u64,
    total: u64,
}

/// Load at one moment, 0 to 1000.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// Share of the processors since the last reading (since boot for the first).
    pub cpu_permille: u32,
    /// Share of memory that is not available to new processes.
    pub mem_permille: u32,
}

impl LoadMeter {
    /// Reads the counters now; what cannot be read is 0.
    pub async fn read(&mut self) -> Load {
        let stat = tokio::fs::read_to_string("/proc/stat").await.unwrap_or_default();
        let meminfo = tokio::fs::read_to_string("/proc/meminfo").await.unwrap_or_default();
        self.step(&stat, &meminfo)
    }

    fn step(&mut self, stat: &str, meminfo: &str) -> Load {
        let cpu_permille = cpu_times(stat).map_or(0, |now| {
            let before = self.last.replace(now).unwrap_or(CpuTimes { busy: 0, total: 0 });
            // Counters of a container or of a hot-plugged processor may go back.
            permille(
                now.busy.saturating_sub(before.busy),
                now.total.saturating_sub(before.total),
            )
        });
        let total = kib_of(meminfo, "MemTotal:").unwrap_or(0);
        let available = kib_of(meminfo, "MemAvailable:").unwrap_or(total);
        Load {
            cpu_permille,
            mem_permille: permille(total.saturating_sub(available), total),
        }
    }
}

fn permille(part: u64, whole: u64) -> u32 {
    if whole == 0 {
        return 0;
    }
    u32::try_from((part.saturating_mul(1000) / whole).min(1000)).unwrap_or(1000)
}

fn cpu_times(stat: &str) -> Option<CpuTimes> {
    // user nice system idle iowait irq softirq steal; guest times are within user.
    let fields: Vec<u64> = stat
        .lines()
        .next()?
        .strip_prefix("cpu ")?
        .split_whitespace()
        .take(8)
        .map_while(|field| field.parse().ok())
        .collect();
    let total: u64 = fields.iter().sum();
    let idle = fields.get(3)? + fields.get(4).unwrap_or(&0);
    Some(CpuTimes {
        busy: total - idle,
        total,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn loopback_only_if_there_is_nothing_else() {
        assert_eq!(
            useful_first(ips(&[
                "127.0.0.1",
                "::1",
                "fe80::1",
                "2001:db8::1",
                "169.254.0.9",
                "10.0.0.1",
                "10.0.0.1"
            ])),
            ips(&["10.0.0.1", "2001:db8::1", "169.254.0.9", "fe80::1"])
        );
        assert_eq!(useful_first(ips(&["127.0.0.1"])), ips(&["127.0.0.1"]));
    }

    #[test]
    fn a_drawn_machine_id_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("none");
        let first = machine_id(&missing, dir.path()).unwrap();
        assert_eq!(first.len(), 32);
        assert_eq!(machine_id(&missing, dir.path()).unwrap(), first);
        std::fs::write(&missing, "uninitialized\n").unwrap();
        assert_eq!(machine_id(&missing, dir.path()).unwrap(), first);
        std::fs::write(&missing, "0123456789abcdef0123456789abcdef\n").unwrap();
        assert_eq!(
            machine_id(&missing, dir.path()).unwrap(),
            "0123456789abcdef0123456789abcdef"
        );
    }

    #[test]
    fn load_is_the_share_since_the_last_reading() {
        let mut meter = LoadMeter::default();
        let memory = "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  250 kB\n";
        assert_eq!(
            meter.step("cpu  50 0 0 50 0 0 0 0 0 0\n", memory),
            Load {
                cpu_permille: 500,
                mem_permille: 750
            }
        );
        // 30 of 40 new ticks were busy; guest time (the ninth field) is not counted twice.
        assert_eq!(meter.step("cpu  80 0 0 55 5 0 0 0 30 0\n", memory).cpu_permille, 750);
        // Counters that go back, and nothing readable.
        assert_eq!(meter.step("cpu  10 0 0 5 5 0 0 0 0 0\n", "").cpu_permille, 0);
        assert_eq!(meter.step("", ""), Load::default());
    }

    #[test]
    fn facts_of_the_host_that_runs_this() {
        let dir = tempfile::tempdir().unwrap();
        let facts = HostFacts::read(dir.path(), &[]).unwrap();
        assert!(!facts.addresses.is_empty() && !facts.machine_id.is_empty() && !facts.boot_id.is_empty());
        assert!(facts.cpu_num > 0 && facts.mem_size_mb > 0);
        assert_eq!(facts.os, "linux");
        let own: IpAddr = "192.0.2.1".parse().unwrap();
        assert_eq!(HostFacts::read(dir.path(), &[own]).unwrap().addresses, [own]);
    }
}
