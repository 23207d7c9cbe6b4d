//! Hosts of their own for the processes of a test: network namespaces on one bridge, between which single directions can be cut without anybody noticing.
//! A cut host's packets go to a hardware address that nobody has, so nothing is refused and nothing is reset: they vanish, as they do when a switch fails.

use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};

/// Nobody has it.
const NOWHERE: &str = "02:00:00:00:00:fe";

static COUNT: AtomicU8 = AtomicU8::new(0);

pub(crate) struct Net {
    name: String,
    second: u8,
    third: u8,
    hosts: usize,
    cuts: Vec<(Option<usize>, Option<usize>)>,
}

fn ip(args: &[&str]) -> bool {
    Command::new("ip")
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

impl Net {
    /// `None` where that can't be done: it needs root and the program `ip`.
    pub(crate) fn create(hosts: usize) -> Option<Net> {
        if !nix::unistd::geteuid().is_root() {
            return None;
        }
        let (pid, n) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut net = Net {
            name: format!("gd{:x}{:x}", pid & 0xfffff, n),
            second: 64 + n % 64,
            third: (pid % 256) as u8,
            hosts: 0,
            cuts: Vec::new(),
        };
        let bridge = net.name.clone();
        let own = format!("{}/24", net.addr(None));
        let fine = ip(&["link", "add", &bridge, "type", "bridge"])
            && ip(&["addr", "add", &own, "dev", &bridge])
            && ip(&["link", "set", &bridge, "up"]);
        if !fine {
            return None;
        }
        for i in 0..hosts {
            net.hosts = i + 1;
            let (host, outer) = (net.host(i), format!("{}v{i}", net.name));
            let addr = format!("{}/24", net.addr(Some(i)));
            let fine = ip(&["netns", "add", &host])
                && ip(&[
                    "link", "add", &outer, "type", "veth", "peer", "name", "eth0", "netns", &host,
                ])
                && ip(&["link", "set", &outer, "master", &bridge, "up"])
                && ip(&["-n", &host, "addr", "add", &addr, "dev", "eth0"])
                && ip(&["-n", &host, "link", "set", "eth0", "up"])
                && ip(&["-n", &host, "link", "set", "lo", "up"]);
            if !fine {
                return None;
            }
        }
        Some(net)
    }

    fn host(&self, i: usize) -> String {
        format!("{}h{i}", self.name)
    }

    /// Of a host, or of the side on which the test runs.
    pub(crate) fn addr(&self, host: Option<usize>) -> Ipv4Addr {
        Ipv4Addr::new(10, self.second, self.third, host.map_or(1, |h| 10 + h as u8))
    }

    /// Starts a program there.
    pub(crate) fn command(&self, host: usize, program: &std::path::Path) -> Command {
        let mut c = Command::new("ip");
        c.args(["netns", "exec", &self.host(host)]).arg(program);
        c
    }

    /// Nothing from one host reaches the other any more. The other way stays.
    pub(crate) fn cut(&mut self, from: Option<usize>, to: Option<usize>) {
        self.neighbour(from, to, true);
        self.cuts.push((from, to));
    }

    pub(crate) fn heal(&mut self) {
        for (from, to) in std::mem::take(&mut self.cuts) {
            self.neighbour(from, to, false);
        }
    }

    fn neighbour(&self, from: Option<usize>, to: Option<usize>, cut: bool) {
        let to = self.addr(to).to_string();
        let (place, device) = match from {
            Some(h) => (vec!["-n".to_owned(), self.host(h)], "eth0".to_owned()),
            None => (Vec::new(), self.name.clone()),
        };
        let mut args: Vec<&str> = place.iter().map(String::as_str).collect();
        if cut {
            args.extend([
                "neigh",
                "replace",
                &to,
                "lladdr",
                NOWHERE,
                "nud",
                "permanent",
                "dev",
                &device,
            ]);
        } else {
            args.extend(["neigh", "del", &to, "dev", &device]);
        }
        assert!(ip(&args), "ip {args:?}");
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for i in 0..self.hosts {
            ip(&["link", "del", &format!("{}v{i}", self.name)]);
            ip(&["netns", "del", &self.host(i)]);
        }
        ip(&["link", "del", &self.name]);
    }
}
