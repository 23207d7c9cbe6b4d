//! Groups of Redis on loopback: primaries, copies and, when asked for, three Sentinels that watch them all.

use std::process::{Child, Command, Stdio};

use gse_dba::config::sharded::Group as GroupConfig;
use gse_dba::config::{Backend, Config};

use crate::rig::{PASSWORD, Redis, wait_for};

/// As the promise needs it.
pub(crate) const SAFE: [&str; 12] = [
    "--appendonly",
    "yes",
    "--appendfsync",
    "always",
    "--repl-diskless-sync-delay",
    "0",
    "--min-replicas-to-write",
    "1",
    "--min-replicas-max-lag",
    "5",
    "--repl-timeout",
    "10",
];

pub(crate) struct Group {
    /// The first is the primary at the start.
    pub(crate) servers: Vec<Redis>,
}

pub(crate) struct Site {
    pub(crate) groups: Vec<Group>,
    sentinels: Vec<Sentinel>,
}

struct Sentinel {
    port: u16,
    child: Child,
    _dir: tempfile::TempDir,
}

impl Drop for Sentinel {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Site {
    /// `groups` primaries with `copies` copies each, followed and online.
    pub(crate) fn start(groups: usize, copies: usize, sentinels: bool) -> Site {
        let mut all = Vec::new();
        for _ in 0..groups {
            let primary = Redis::start_with(&SAFE);
            let port = primary.addr.port().to_string();
            let mut servers = vec![primary];
            for _ in 0..copies {
                let mut args = SAFE.to_vec();
                args.extend(["--replicaof", "127.0.0.1", port.as_str()]);
                servers.push(Redis::start_with(&args));
            }
            all.push(Group { servers });
        }
        for g in &all {
            let mut c = g.servers[0].client();
            wait_for("the copies", || {
                c.say("INFO replication").text().matches("state=online").count() == copies
            });
        }
        let sentinels = if sentinels {
            (0..3).map(|_| sentinel(&all)).collect()
        } else {
            Vec::new()
        };
        let site = Site { groups: all, sentinels };
        for s in &site.sentinels {
            let mut c = crate::rig::Raw::connect(([127, 0, 0, 1], s.port).into());
            for i in 0..site.groups.len() {
                wait_for("the Sentinels to know everything", || {
                    let told: Vec<String> = c
                        .say(&format!("SENTINEL MASTER g{i}"))
                        .items()
                        .iter()
                        .map(crate::rig::Value::text)
                        .collect();
                    let is = |k: &str, v: &str| told.chunks(2).any(|p| p[0] == k && p[1] == v);
                    is("num-slaves", &copies.to_string()) && is("num-other-sentinels", "2")
                });
            }
        }
        site
    }
}

fn sentinel(groups: &[Group]) -> Sentinel {
    let dir = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let mut text = format!("port {port}\nbind 127.0.0.1\ndir {}\n", dir.path().display());
    for (i, g) in groups.iter().enumerate() {
        let at = g.servers[0].addr.port();
        text.push_str(&format!(
            "sentinel monitor g{i} 127.0.0.1 {at} 2\nsentinel down-after-milliseconds g{i} 1000\nsentinel failover-timeout g{i} 6000\nsentinel parallel-syncs g{i} 2\n"
        ));
    }
    let file = dir.path().join("sentinel.conf");
    std::fs::write(&file, text).unwrap();
    // The same program: what Debian calls redis-sentinel is a link to it in a package of its own.
    let child = Command::new("redis-server")
        .arg(&file)
        .arg("--sentinel")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("redis-server is not installed: apt-get install redis-server");
    let sentinel = Sentinel { port, child, _dir: dir };
    wait_for("redis-sentinel", || {
        std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    sentinel
}

impl Site {
    /// Where the Sentinels listen.
    pub(crate) fn sentinels(&self) -> Vec<std::net::SocketAddr> {
        self.sentinels.iter().map(|s| ([127, 0, 0, 1], s.port).into()).collect()
    }

    /// One group of these.
    pub(crate) fn of(servers: Vec<Redis>) -> Site {
        Site {
            groups: vec![Group { servers }],
            sentinels: Vec::new(),
        }
    }

    /// Servers that know nothing of each other, in groups of `each`.
    pub(crate) fn strangers(groups: usize, each: usize) -> Site {
        let groups = (0..groups)
            .map(|_| Group {
                servers: (0..each).map(|_| Redis::start_with(&SAFE)).collect(),
            })
            .collect();
        Site {
            groups,
            sentinels: Vec::new(),
        }
    }
}

fn base(site: &Site) -> Config {
    let mut config = Config {
        listen: "127.0.0.1:0".into(),
        password: Some(PASSWORD.into()),
        backend: Backend::Sharded,
        ..Config::default()
    };
    config.sharded.one_host = true;
    config.sharded.copies = site.groups[0].servers.len();
    config.sharded.acknowledged = config.sharded.copies / 2 + 1;
    config.sharded.poll_ms = 100;
    config.sharded.reconnect_max_ms = 100;
    config.sharded.wait_ms = 2000;
    config
}

/// In front of groups under Sentinel.
pub(crate) fn sharded(site: &Site) -> Config {
    let mut config = base(site);
    config.sharded.groups = (0..site.groups.len())
        .map(|i| GroupConfig {
            name: format!("g{i}"),
            sentinels: site.sentinels.iter().map(|s| format!("127.0.0.1:{}", s.port)).collect(),
            ..GroupConfig::default()
        })
        .collect();
    config
}

/// In front of groups that are plain lists.
pub(crate) fn sharded_list(site: &Site) -> Config {
    let mut config = base(site);
    config.sharded.groups = site
        .groups
        .iter()
        .enumerate()
        .map(|(i, g)| GroupConfig {
            name: format!("g{i}"),
            servers: g.servers.iter().map(|s| s.addr.to_string()).collect(),
            ..GroupConfig::default()
        })
        .collect();
    config
}

/// A server that knows slots.
pub(crate) fn cluster_server() -> Redis {
    Redis::start_with(&["--cluster-enabled", "yes"])
}
