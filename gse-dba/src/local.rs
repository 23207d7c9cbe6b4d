//! What a connection answers by itself, whatever stands behind: who it is, which protocol it speaks, what this server is.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::args::Args;
use crate::client::{Client, Names, Replies};
use crate::commands::{self, BLOCKS, GROWS, Local, Spec, TABLE, WRITE};
use crate::engine::glob;
use crate::resp::write::Writer;
use crate::server::Shared;
use crate::users::User;

/// The Redis whose replies this server gives.
pub(crate) const REDIS_VERSION: &str = "7.0.15";

/// What the connection does after a local command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    Go,
    Close,
    /// Everything the connection had set up is undone.
    Reset,
    /// From now on it gets all replies, or none, or not the next.
    Replies(Replies),
    /// A client that waits is to be woken.
    Unblock {
        group: usize,
        upstream: i64,
        error: bool,
    },
}

/// What a local command may change.
pub(crate) struct State {
    pub(crate) client: Arc<Client>,
    /// Who it is; nobody yet when a password is still to be shown.
    pub(crate) user: Option<Arc<User>>,
    pub(crate) failures: u32,
}

const MAX_AUTH_FAILURES: u32 = 16;

impl State {
    /// Answers a command of the connection's own.
    pub(crate) fn answer(&mut self, shared: &Shared, kind: Local, spec: &Spec, a: Args<'_>, w: &mut Writer) -> After {
        if !spec.arity_fits(a.len()) {
            w.error(commands::wrong_arity(spec).0.as_bytes());
            return After::Go;
        }
        self.client.names.lock().last = spec.name.to_ascii_lowercase();
        match kind {
            Local::Quit => {
                w.ok();
                return After::Close;
            }
            Local::Reset => {
                w.resp3 = false;
                w.simple("RESET");
                self.user = shared.users.open();
                *self.client.names.lock() = Names::default();
                self.client.resp3.store(false, Ordering::Relaxed);
                return After::Reset;
            }
            Local::Select => match crate::engine::numbers::parse_int(a.at(1)) {
                Some(0) => w.ok(),
                Some(_) => w.error(b"ERR DB index is out of range"),
                None => w.error(b"ERR value is not an integer or out of range"),
            },
            Local::Auth => self.auth(shared, a, w),
            Local::Hello => self.hello(shared, a, w),
            Local::Client => return self.client(shared, a, w),
            Local::Command => command(a, w),
            Local::Info => w.verbatim(&info(shared, a, &[])),
            Local::Config => config(shared, a, w),
            Local::Acl => self.acl(shared, a, w),
            Local::Role => {
                w.array(3);
                w.bulk(b"master");
                w.int(0);
                w.array(0);
            }
            Local::Cluster => cluster(a, w),
            Local::Slowlog => shared.watch.slowlog.answer(a, w),
        }
        if self.failures > MAX_AUTH_FAILURES {
            After::Close
        } else {
            After::Go
        }
    }

    fn login(&mut self, shared: &Shared, user: &[u8], password: &[u8]) -> bool {
        match shared.users.login(user, password) {
            Some(user) => {
                self.client.names.lock().user = user.name.clone();
                self.user = Some(user);
                true
            }
            None => {
                self.failures += 1;
                false
            }
        }
    }

    fn auth(&mut self, shared: &Shared, a: Args<'_>, w: &mut Writer) {
        let (user, password) = match a.len() {
            2 => (&b"default"[..], a.at(1)),
            3 => (a.at(1), a.at(2)),
            _ => return w.error(b"ERR syntax error"),
        };
        if self.login(shared, user, password) {
            w.ok();
        } else {
            w.error(b"WRONGPASS invalid username-password pair or user is disabled.");
        }
    }

    fn hello(&mut self, shared: &Shared, a: Args<'_>, w: &mut Writer) {
        let mut protocol = None;
        if a.len() > 1 {
            match crate::engine::numbers::parse_int(a.at(1)) {
                // What the server behind does not speak, nobody can.
                Some(3) if !shared.store().speaks_resp3() => return w.error(b"NOPROTO unsupported protocol version"),
                Some(v @ 2..=3) => protocol = Some(v == 3),
                Some(_) => return w.error(b"NOPROTO unsupported protocol version"),
                None => return w.error(b"ERR Protocol version is not an integer or out of range"),
            }
        }
        let (mut name, mut login) = (None, None);
        let mut i = 2;
        while i < a.len() {
            if a.is(i, "AUTH") && i + 2 < a.len() {
                login = Some((a.at(i + 1), a.at(i + 2)));
                i += 3;
            } else if a.is(i, "SETNAME") && i + 1 < a.len() {
                name = Some(a.at(i + 1));
                i += 2;
            } else {
                return w.error(
                    format!(
                        "ERR Syntax error in HELLO option '{}'",
                        String::from_utf8_lossy(a.at(i))
                    )
                    .as_bytes(),
                );
            }
        }
        if let Some((user, password)) = login
            && !self.login(shared, user, password)
        {
            return w.error(b"WRONGPASS invalid username-password pair or user is disabled.");
        }
        if self.user.is_none() {
            return w.error(b"NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH <user> <pass> option can be used to authenticate the client and select the RESP protocol version at the same time");
        }
        if let Some(name) = name
            && !self.set_name(name, w)
        {
            return;
        }
        if let Some(resp3) = protocol {
            w.resp3 = resp3;
            self.client.resp3.store(resp3, Ordering::Relaxed);
        }
        w.map(7);
        for (k, v) in [("server", "redis"), ("version", REDIS_VERSION)] {
            w.bulk(k.as_bytes());
            w.bulk(v.as_bytes());
        }
        w.bulk(b"proto");
        w.int(if w.resp3 { 3 } else { 2 });
        w.bulk(b"id");
        w.int(self.client.id as i64);
        for (k, v) in [("mode", "standalone"), ("role", "master")] {
            w.bulk(k.as_bytes());
            w.bulk(v.as_bytes());
        }
        w.bulk(b"modules");
        w.array(0);
    }
}

fn describe(spec: &Spec, w: &mut Writer) {
    let mut flags: Vec<&str> = vec![if spec.is(WRITE) { "write" } else { "readonly" }];
    for (flag, name) in [(GROWS, "denyoom"), (BLOCKS, "blocking")] {
        if spec.is(flag) {
            flags.push(name);
        }
    }
    w.array(10);
    w.bulk(spec.name.to_ascii_lowercase().as_bytes());
    w.int(i64::from(spec.arity));
    w.set(flags.len());
    flags.iter().for_each(|f| w.simple(f));
    for n in [spec.keys.0, spec.keys.1, spec.keys.2] {
        w.int(i64::from(n));
    }
    w.set(0);
    for _ in 0..3 {
        w.array(0);
    }
}

fn command(a: Args<'_>, w: &mut Writer) {
    if a.len() == 1 || (a.is(1, "INFO") && a.len() == 2) {
        w.array(TABLE.len());
        TABLE.iter().for_each(|s| describe(s, w));
    } else if a.is(1, "COUNT") && a.len() == 2 {
        w.len(TABLE.len());
    } else if a.is(1, "INFO") {
        w.array(a.len() - 2);
        for name in a.iter().skip(2) {
            match commands::find(name) {
                Some(spec) => describe(spec, w),
                None => w.null_array(),
            }
        }
    } else if a.is(1, "LIST") && a.len() == 2 {
        w.array(TABLE.len());
        TABLE
            .iter()
            .for_each(|s| w.bulk(s.name.to_ascii_lowercase().as_bytes()));
    } else if a.is(1, "DOCS") {
        // There is nothing to tell beyond COMMAND INFO.
        w.map(0);
    } else {
        w.error(
            format!(
                "ERR unknown subcommand '{}'. Try COMMAND HELP.",
                String::from_utf8_lossy(a.at(1))
            )
            .as_bytes(),
        );
    }
}

/// What clients ask of a cluster to find out that this is none.
fn cluster(a: Args<'_>, w: &mut Writer) {
    if a.is(0, "CLUSTER") && a.is(1, "KEYSLOT") && a.len() == 3 {
        w.int(i64::from(gse_core::store::slot(a.at(2))));
    } else {
        w.error(b"ERR This instance has cluster support disabled");
    }
}

fn config(shared: &Shared, a: Args<'_>, w: &mut Writer) {
    if !a.is(1, "GET") {
        return w.error(b"ERR CONFIG is read-only through gse_dba: change its configuration file and start it again");
    }
    if a.len() < 3 {
        return w.error(b"ERR wrong number of arguments for 'config|get' command");
    }
    let c = &shared.config;
    let all = [
        (
            "appendfsync",
            if c.embedded.durability == crate::config::Durability::Always {
                "always"
            } else {
                "no"
            }
            .to_owned(),
        ),
        ("appendonly", "yes".into()),
        ("databases", "1".into()),
        ("maxclients", c.limits.max_clients.to_string()),
        ("maxmemory", (c.embedded.max_memory_mb << 20).to_string()),
        ("maxmemory-policy", "noeviction".into()),
        ("proto-max-bulk-len", c.limits.max_bulk_bytes.to_string()),
        ("save", String::new()),
        ("slowlog-log-slower-than", c.admin.slowlog_slower_than_us.to_string()),
        ("slowlog-max-len", c.admin.slowlog_max_len.to_string()),
        ("timeout", (c.limits.idle_timeout_ms / 1000).to_string()),
    ];
    let found: Vec<_> = all
        .iter()
        .filter(|(k, _)| {
            a.iter()
                .skip(2)
                .any(|p| glob::matches(&p.to_ascii_lowercase(), k.as_bytes()))
        })
        .collect();
    w.map(found.len());
    for (k, v) in found {
        w.bulk(k.as_bytes());
        w.bulk(v.as_bytes());
    }
}

/// The sections of `INFO`; `behind` is what each Redis behind says of itself, where that is added up.
pub(crate) fn info(shared: &Shared, a: Args<'_>, behind: &[String]) -> String {
    let [clients, memory, keys, volatile, expired, commands, connections] = shared.metrics.info();
    let up = shared.started.elapsed().as_secs();
    let view = shared.office.views.now();
    let mode = view.backend.name();
    let outage = shared.metrics.outage_reason();
    let sections = [
        (
            "server",
            format!(
                "# Server\r\nredis_version:{REDIS_VERSION}\r\nredis_mode:standalone\r\nos:{}\r\narch_bits:64\r\nprocess_id:{}\r\ntcp_port:{}\r\nuptime_in_seconds:{up}\r\nuptime_in_days:{}\r\ngse_dba_version:{}\r\ngse_dba_backend:{mode}\r\n",
                std::env::consts::OS,
                std::process::id(),
                shared.port.load(Ordering::Relaxed),
                up / 86400,
                env!("CARGO_PKG_VERSION"),
            ),
        ),
        (
            "clients",
            format!(
                "# Clients\r\nconnected_clients:{clients}\r\nmaxclients:{}\r\nblocked_clients:{}\r\n",
                shared.config.limits.max_clients,
                shared.metrics.blocked_clients()
            ),
        ),
        (
            "memory",
            format!(
                "# Memory\r\nused_memory:{memory}\r\nmaxmemory:{}\r\nmaxmemory_policy:noeviction\r\n",
                shared.config.embedded.max_memory_mb << 20
            ),
        ),
        (
            "persistence",
            format!(
                "# Persistence\r\nloading:0\r\naof_enabled:1\r\naof_last_write_status:{}\r\n",
                if outage.is_some() { "err" } else { "ok" }
            ),
        ),
        (
            "stats",
            format!(
                "# Stats\r\ntotal_connections_received:{connections}\r\ntotal_commands_processed:{commands}\r\nexpired_keys:{expired}\r\nevicted_keys:0\r\nupstream_connections:{}\r\n",
                shared.metrics.upstream_connections()
            ),
        ),
        (
            "replication",
            "# Replication\r\nrole:master\r\nconnected_slaves:0\r\n".to_owned(),
        ),
        (
            "sharding",
            match &*view.store {
                crate::server::Store::Sharded(s) => s.info(),
                _ => String::new(),
            },
        ),
        (
            "endpoint",
            match &*shared.store() {
                crate::server::Store::Single(s) => s.capabilities().map(|c| c.lines()).unwrap_or_default(),
                _ => String::new(),
            },
        ),
        ("cluster", "# Cluster\r\ncluster_enabled:0\r\n".to_owned()),
        (
            "keyspace",
            if keys > 0 {
                format!("# Keyspace\r\ndb0:keys={keys},expires={volatile},avg_ttl=0\r\n")
            } else {
                "# Keyspace\r\n".to_owned()
            },
        ),
    ];
    let added = crate::sums::sections(behind);
    let mut sections: Vec<(&str, String)> = sections.into_iter().collect();
    for (name, text) in &added {
        match sections.iter_mut().find(|(n, _)| n == name) {
            // What is of the groups stands beside what is of this process; both have counters of commands.
            Some((_, own)) if ["stats", "persistence"].contains(&name.as_str()) => {
                own.push_str(&crate::sums::beside(own, text))
            }
            Some((_, own)) => *own = text.clone(),
            None => {}
        }
    }
    for name in ["commandstats", "errorstats"] {
        if let Some((_, text)) = added.iter().find(|(n, _)| n == name) {
            sections.push((name, text.clone()));
        }
    }
    let all = a.len() == 1 || (1..a.len()).any(|i| ["all", "default", "everything"].iter().any(|w| a.is(i, w)));
    let everything = (1..a.len()).any(|i| a.is(i, "all") || a.is(i, "everything"));
    let wanted: Vec<String> = sections
        .into_iter()
        .filter(|(_, text)| !text.is_empty())
        .filter(|(name, _)| {
            everything || all && !["commandstats", "errorstats"].contains(name) || (1..a.len()).any(|i| a.is(i, name))
        })
        .map(|(_, text)| text)
        .collect();
    wanted.join("\r\n")
}
