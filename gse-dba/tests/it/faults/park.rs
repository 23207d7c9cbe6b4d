//! Real processes: groups of Redis, Sentinels, gse_dba, each to be killed, frozen, cut off and brought back.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::net::Net;
use crate::rig::{PASSWORD, pause};

/// How a park is set up.
#[derive(Clone)]
pub(crate) struct Plan {
    pub(crate) groups: usize,
    pub(crate) fronts: usize,
    /// Hosts of their own, with a network that can be cut. Without, everything is on loopback.
    pub(crate) net: bool,
    pub(crate) binary: PathBuf,
    /// Environment of gse_dba.
    pub(crate) env: Vec<(String, String)>,
    /// More lines for its section `sharded`.
    pub(crate) more: String,
    /// The `replica-priority` of each server of a group.
    pub(crate) priorities: [u32; 3],
    /// How often gse_dba looks by itself.
    pub(crate) poll_ms: u64,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            groups: 3,
            fronts: 2,
            net: false,
            binary: env!("CARGO_BIN_EXE_gse_dba").into(),
            env: Vec::new(),
            more: String::new(),
            priorities: [100; 3],
            poll_ms: 200,
        }
    }
}

/// One process and what is needed to start it again.
pub(crate) struct Node {
    /// Its host, when there is a network.
    pub(crate) host: usize,
    pub(crate) addr: SocketAddr,
    pub(crate) dir: PathBuf,
    program: PathBuf,
    args: Vec<String>,
    env: Vec<(String, String)>,
    child: Option<Child>,
}

impl Node {
    fn start(&mut self, net: Option<&Net>) {
        let mut c = match net {
            Some(net) => net.command(self.host, &self.program),
            None => Command::new(&self.program),
        };
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("log.txt"))
            .unwrap();
        c.args(&self.args)
            .envs(self.env.iter().cloned())
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.child = Some(c.spawn().unwrap());
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// SIGSTOP or SIGCONT.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().unwrap().id();
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), signal).unwrap();
    }

    /// Asks a Redis or a Sentinel; `None` when it does not answer.
    pub(crate) fn ask(&self, words: &[&str]) -> Option<redis::Value> {
        let info =
            redis::IntoConnectionInfo::into_connection_info((self.addr.ip().to_string(), self.addr.port())).ok()?;
        let info = info.set_redis_settings(redis::RedisConnectionInfo::default().set_skip_set_lib_name());
        let wait = Duration::from_secs(2);
        let mut c = redis::Client::open(info).ok()?.get_connection_with_timeout(wait).ok()?;
        c.set_read_timeout(Some(wait)).ok()?;
        let mut cmd = redis::Cmd::new();
        for w in words {
            cmd.arg(*w);
        }
        cmd.query(&mut c).ok()
    }

    pub(crate) fn text(&self, words: &[&str]) -> String {
        match self.ask(words) {
            Some(redis::Value::BulkString(b)) => String::from_utf8_lossy(&b).into_owned(),
            Some(redis::Value::SimpleString(s)) => s,
            Some(redis::Value::VerbatimString { text, .. }) => text,
            Some(other) => format!("{other:?}"),
            None => String::new(),
        }
    }

    /// What a power cut leaves of the log at worst: nothing, or (with `keep`) so many bytes of its newest part.
    pub(crate) fn cut_log(&self, keep: Option<u64>) {
        let dir = self.dir.join("appendonlydir");
        let Some(keep) = keep else {
            std::fs::remove_dir_all(dir).unwrap();
            return;
        };
        let newest = std::fs::read_dir(dir)
            .unwrap()
            .map(|f| f.unwrap().path())
            .filter(|f| f.to_string_lossy().ends_with(".incr.aof"))
            .max_by_key(|f| std::fs::metadata(f).unwrap().modified().unwrap())
            .unwrap();
        std::fs::File::options()
            .write(true)
            .open(newest)
            .unwrap()
            .set_len(keep)
            .unwrap();
    }

    pub(crate) fn is_primary(&self) -> bool {
        self.child.is_some() && self.text(&["INFO", "replication"]).contains("role:master")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub(crate) struct Park {
    pub(crate) groups: Vec<Vec<Node>>,
    pub(crate) sentinels: Vec<Node>,
    pub(crate) fronts: Vec<Node>,
    pub(crate) net: Option<Net>,
    _dir: tempfile::TempDir,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Waits for something that comes true by itself, on a machine that is busy.
pub(crate) fn wait_long(what: &str, mut yes: impl FnMut() -> bool) -> Duration {
    let from = Instant::now();
    while !yes() {
        assert!(from.elapsed() < Duration::from_secs(90), "waited in vain for {what}");
        pause();
    }
    from.elapsed()
}

impl Park {
    /// Starts everything and waits until all is well. `None` when a network is wanted and can't be made.
    pub(crate) fn start(plan: &Plan) -> Option<Park> {
        let hosts = plan.groups * 3 + 3 + plan.fronts;
        let net = if plan.net { Some(Net::create(hosts)?) } else { None };
        let dir = tempfile::tempdir().unwrap();
        let mut host = 0;
        let mut node = |name: String, port: u16, program: &Path| -> Node {
            let (ip, port) = match &net {
                Some(net) => (net.addr(Some(host)), port),
                None => (Ipv4Addr::LOCALHOST, free_port()),
            };
            let own = dir.path().join(name);
            std::fs::create_dir(&own).unwrap();
            host += 1;
            Node {
                host: host - 1,
                addr: SocketAddr::new(IpAddr::V4(ip), port),
                dir: own,
                program: program.into(),
                args: Vec::new(),
                env: Vec::new(),
                child: None,
            }
        };
        let redis = Path::new("redis-server");
        let groups: Vec<Vec<Node>> = (0..plan.groups)
            .map(|g| {
                let mut nodes: Vec<Node> = (0..3).map(|i| node(format!("redis{g}{i}"), 6379, redis)).collect();
                let first = nodes[0].addr;
                for (i, n) in nodes.iter_mut().enumerate() {
                    let mut text = format!(
                        "port {}\nbind {}\nprotected-mode no\nsave \"\"\ndir {}\nlogfile redis.log\nappendonly yes\nappendfsync always\nrepl-diskless-sync-delay 0\nmin-replicas-to-write 1\nmin-replicas-max-lag 5\nrepl-timeout 10\nrepl-ping-replica-period 1\nreplica-priority {}\nenable-debug-command yes\n",
                        n.addr.port(),
                        n.addr.ip(),
                        n.dir.display(),
                        plan.priorities[i]
                    );
                    if i > 0 {
                        text.push_str(&format!("replicaof {} {}\n", first.ip(), first.port()));
                    }
                    std::fs::write(n.dir.join("redis.conf"), text).unwrap();
                    n.args = vec!["redis.conf".into()];
                }
                nodes
            })
            .collect();
        let mut sentinels: Vec<Node> = (0..3).map(|i| node(format!("sentinel{i}"), 26379, redis)).collect();
        for s in &mut sentinels {
            let mut text = format!(
                "port {}\nbind {}\nprotected-mode no\ndir {}\nlogfile sentinel.log\n",
                s.addr.port(),
                s.addr.ip(),
                s.dir.display()
            );
            for (i, g) in groups.iter().enumerate() {
                let at = g[0].addr;
                text.push_str(&format!(
                    "sentinel monitor g{i} {} {} 2\nsentinel down-after-milliseconds g{i} 1000\nsentinel failover-timeout g{i} 6000\nsentinel parallel-syncs g{i} 2\n",
                    at.ip(),
                    at.port()
                ));
            }
            std::fs::write(s.dir.join("sentinel.conf"), text).unwrap();
            s.args = vec!["sentinel.conf".into(), "--sentinel".into()];
        }
        let list: Vec<String> = sentinels.iter().map(|s| format!("\"{}\"", s.addr)).collect();
        let mut fronts: Vec<Node> = (0..plan.fronts)
            .map(|i| node(format!("front{i}"), 6380, &plan.binary))
            .collect();
        for f in &mut fronts {
            let mut text = format!(
                "listen = \"{}\"\npassword = \"{PASSWORD}\"\nbackend = \"sharded\"\n[ops]\nlisten = \"\"\n[sharded]\none_host = true\ncopies = 3\nacknowledged = 2\npoll_ms = {}\nreconnect_max_ms = 100\nwait_ms = 2000\n{}",
                f.addr, plan.poll_ms, plan.more
            );
            for i in 0..plan.groups {
                text.push_str(&format!(
                    "\n[[sharded.groups]]\nname = \"g{i}\"\nsentinels = [{}]\n",
                    list.join(", ")
                ));
            }
            std::fs::write(f.dir.join("dba.toml"), text).unwrap();
            f.args = vec!["--config".into(), "dba.toml".into()];
            f.env.clone_from(&plan.env);
        }
        let mut park = Park {
            groups,
            sentinels,
            fronts,
            net,
            _dir: dir,
        };
        for n in park.groups.iter_mut().flatten().chain(&mut park.sentinels) {
            n.start(park.net.as_ref());
        }
        park.wait_copies();
        wait_long("the Sentinels to know everything", || {
            park.sentinels.iter().all(|s| {
                (0..park.groups.len()).all(|i| {
                    let told = s.ask(&["SENTINEL", "MASTER", &format!("g{i}")]);
                    let told: Vec<String> = told.and_then(|v| redis::from_redis_value(v).ok()).unwrap_or_default();
                    let has = |k: &str, v: &str| told.chunks(2).any(|p| p[0] == k && p[1] == v);
                    has("num-slaves", "2") && has("num-other-sentinels", "2")
                })
            })
        });
        for i in 0..park.fronts.len() {
            park.restart_front(i);
        }
        park.wait_well();
        Some(park)
    }

    pub(crate) fn restart_front(&mut self, i: usize) {
        let f = &mut self.fronts[i];
        f.start(self.net.as_ref());
        let f = &self.fronts[i];
        wait_long("gse_dba", || {
            TcpStream::connect_timeout(&f.addr, Duration::from_secs(1)).is_ok()
        });
    }

    pub(crate) fn restart(&mut self, pick: (usize, usize)) {
        self.groups[pick.0][pick.1].start(self.net.as_ref());
    }

    pub(crate) fn restart_sentinel(&mut self, i: usize) {
        self.sentinels[i].start(self.net.as_ref());
    }

    /// Which server of a group is its primary; with two, the one that copies follow.
    pub(crate) fn primary(&self, group: usize) -> Option<usize> {
        self.groups[group]
            .iter()
            .position(|n| n.is_primary() && n.text(&["INFO", "replication"]).contains("state=online"))
    }

    /// Every group has one primary and two copies that follow it.
    fn wait_copies(&self) {
        for g in &self.groups {
            wait_long("a group to have one primary and two copies", || {
                let told: Vec<String> = g.iter().map(|n| n.text(&["INFO", "replication"])).collect();
                told.iter().filter(|t| t.contains("role:master")).count() == 1
                    && told.iter().any(|t| t.matches("state=online").count() == 2)
                    && told.iter().filter(|t| t.contains("master_link_status:up")).count() == 2
            });
        }
    }

    /// A connection to a gse_dba.
    pub(crate) fn client(&self, front: usize) -> dba_check::client::Client {
        dba_check::client::Client::new(self.login(front))
    }

    pub(crate) fn login(&self, front: usize) -> dba_check::client::Login {
        dba_check::client::Login {
            addr: self.fronts[front].addr,
            password: PASSWORD.into(),
            timeout: Duration::from_secs(20),
        }
    }

    /// What a gse_dba says of its groups.
    pub(crate) fn told(&self, front: usize) -> String {
        let mut c = redis::Cmd::new();
        c.arg("INFO").arg("sharding");
        match self.client(front).call(&c) {
            Ok(redis::Value::BulkString(b)) => String::from_utf8_lossy(&b).into_owned(),
            Ok(redis::Value::VerbatimString { text, .. }) => text,
            other => format!("{other:?}"),
        }
    }

    /// Waits until everything is as it was at the start, whoever the primaries are now.
    pub(crate) fn wait_well(&self) -> Duration {
        let from = Instant::now();
        self.wait_copies();
        for f in 0..self.fronts.len() {
            let mut told = String::new();
            let well = || {
                told = self.told(f);
                let right = (0..self.groups.len()).all(|g| {
                    self.primary(g)
                        .is_some_and(|p| told.contains(&format!("primary={},copies=2", self.groups[g][p].addr)))
                });
                right && told.matches("state=ok").count() == self.groups.len()
            };
            wait_long("gse_dba to find all groups well", well);
        }
        from.elapsed()
    }

    /// What the processes have written, for a person who looks for a cause.
    pub(crate) fn logs(&self) -> String {
        let mut out = String::new();
        for f in &self.fronts {
            let text = std::fs::read_to_string(f.dir.join("log.txt")).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            out.push_str(&format!(
                "--- {}\n{}\n",
                f.addr,
                lines[lines.len().saturating_sub(40)..].join("\n")
            ));
        }
        for s in &self.sentinels {
            let text = std::fs::read_to_string(s.dir.join("sentinel.log")).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            out.push_str(&format!(
                "--- {}\n{}\n",
                s.addr,
                lines[lines.len().saturating_sub(25)..].join("\n")
            ));
        }
        out
    }
}
