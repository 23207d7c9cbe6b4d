//! What is known of each connection, and `CLIENT`, with which connections are looked at, named, ended and woken.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::args::Args;
use crate::engine::numbers::parse_int;
use crate::local::{After, State};
use crate::resp::write::Writer;
use crate::server::Shared;

/// What others may know about a connection, and do to it.
pub(crate) struct Client {
    pub(crate) id: u64,
    pub(crate) addr: String,
    pub(crate) laddr: String,
    pub(crate) since: Instant,
    pub(crate) resp3: AtomicBool,
    pub(crate) commands: AtomicU64,
    pub(crate) names: Mutex<Names>,
    /// Milliseconds after `since` of the last command.
    active: AtomicU64,
    /// Subscriptions to channels, patterns and shard channels.
    pub(crate) subscriptions: [AtomicUsize; 3],
    /// Where it waits in a blocking command: the group, and what its connection is called there.
    blocked: Mutex<Option<(usize, i64)>>,
    killed: AtomicBool,
    kill: Notify,
}

#[derive(Default, Clone)]
pub(crate) struct Names {
    pub(crate) name: String,
    pub(crate) user: String,
    pub(crate) lib_name: String,
    pub(crate) lib_version: String,
    pub(crate) last: String,
}

/// A client is known to wait for as long as this lives.
pub(crate) struct Waiting<'a>(&'a Client);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        *self.0.blocked.lock() = None;
    }
}

/// How `CLIENT REPLY` has set a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replies {
    On,
    Off,
    Skip,
}

impl Client {
    pub(crate) fn new(id: u64, addr: String, laddr: String) -> Self {
        Self {
            id,
            addr,
            laddr,
            since: Instant::now(),
            resp3: AtomicBool::new(false),
            commands: AtomicU64::new(0),
            names: Mutex::default(),
            active: AtomicU64::new(0),
            subscriptions: Default::default(),
            blocked: Mutex::default(),
            killed: AtomicBool::new(false),
            kill: Notify::new(),
        }
    }

    /// Commands have come.
    pub(crate) fn active(&self, n: usize) {
        self.commands.fetch_add(n as u64, Ordering::Relaxed);
        let now = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.active.store(now, Ordering::Relaxed);
    }

    /// It waits in a blocking command from now on.
    pub(crate) fn waits(&self, group: usize, upstream: i64) -> Waiting<'_> {
        *self.blocked.lock() = Some((group, upstream));
        Waiting(self)
    }

    pub(crate) fn kill(&self) {
        self.killed.store(true, Ordering::Relaxed);
        self.kill.notify_one();
    }

    /// Comes back when another connection has ended this one.
    pub(crate) async fn killed(&self) {
        self.kill.notified().await;
    }

    fn kind(&self) -> &'static str {
        if self.subscriptions.iter().any(|n| n.load(Ordering::Relaxed) > 0) {
            "pubsub"
        } else {
            "normal"
        }
    }

    fn user(&self) -> String {
        let names = self.names.lock();
        if names.user.is_empty() {
            crate::users::DEFAULT.to_owned()
        } else {
            names.user.clone()
        }
    }

    pub(crate) fn line(&self) -> String {
        let n = self.names.lock().clone();
        let [sub, psub, ssub] = [0, 1, 2].map(|i: usize| self.subscriptions[i].load(Ordering::Relaxed));
        let age = self.since.elapsed();
        let idle = age.saturating_sub(Duration::from_millis(self.active.load(Ordering::Relaxed)));
        let mut flags = String::new();
        if self.kind() == "pubsub" {
            flags.push('P');
        }
        if self.blocked.lock().is_some() {
            flags.push('b');
        }
        if flags.is_empty() {
            flags.push('N');
        }
        format!(
            "id={} addr={} laddr={} fd=-1 name={} age={} idle={} flags={flags} db=0 sub={sub} psub={psub} ssub={ssub} multi=-1 qbuf=0 qbuf-free=0 argv-mem=0 multi-mem=0 rbs=0 rbp=0 obl=0 oll=0 omem=0 tot-mem=0 events=r cmd={} user={} redir=-1 resp={} lib-name={} lib-ver={} tot-cmds={}",
            self.id,
            self.addr,
            self.laddr,
            n.name,
            age.as_secs(),
            idle.as_secs(),
            if n.last.is_empty() { "NULL" } else { &n.last },
            if n.user.is_empty() { "default" } else { &n.user },
            if self.resp3.load(Ordering::Relaxed) { 3 } else { 2 },
            n.lib_name,
            n.lib_version,
            self.commands.load(Ordering::Relaxed),
        )
    }
}

/// Commands are held back until then, or those that write are.
#[derive(Default)]
pub(crate) struct Pause {
    until: Mutex<Option<(Instant, bool)>>,
    /// So that nobody needs the lock when there is no pause.
    set: AtomicBool,
    over: Notify,
}

impl Pause {
    fn begin(&self, length: Duration, all: bool) {
        *self.until.lock() = Instant::now().checked_add(length).map(|until| (until, all));
        self.set.store(true, Ordering::Release);
    }

    fn end(&self) {
        *self.until.lock() = None;
        self.set.store(false, Ordering::Release);
        self.over.notify_waiters();
    }

    /// Until when commands wait that write, or those that do not.
    fn left(&self, writes: bool) -> Option<Instant> {
        let until = (*self.until.lock()).filter(|(_, all)| *all || writes).map(|u| u.0);
        until.filter(|u| *u > Instant::now())
    }

    pub(crate) fn is_set(&self) -> bool {
        self.set.load(Ordering::Acquire)
    }

    /// Waits for its end, when there is one for such commands.
    pub(crate) async fn wait(&self, writes: bool) {
        loop {
            let over = self.over.notified();
            let Some(until) = self.left(writes) else { return };
            tokio::select! {
                () = tokio::time::sleep_until(until.into()) => {}
                () = over => {}
            }
        }
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn printable(text: &[u8]) -> bool {
    text.iter().all(|b| (b'!'..=b'~').contains(b))
}

const SYNTAX: &[u8] = b"ERR syntax error";

impl State {
    pub(crate) fn set_name(&mut self, name: &[u8], w: &mut Writer) -> bool {
        if !printable(name) {
            w.error(b"ERR Client names cannot contain spaces, newlines or special characters.");
            return false;
        }
        self.client.names.lock().name = text(name);
        true
    }

    pub(crate) fn client(&mut self, shared: &Shared, a: Args<'_>, w: &mut Writer) -> After {
        let sub = a.at(1).to_ascii_uppercase();
        match (sub.as_slice(), a.len()) {
            (b"ID", 2) => w.int(self.client.id as i64),
            (b"GETNAME", 2) => {
                let name = self.client.names.lock().name.clone();
                if name.is_empty() {
                    w.null()
                } else {
                    w.bulk(name.as_bytes())
                }
            }
            (b"SETNAME", 3) => {
                if self.set_name(a.at(2), w) {
                    w.ok();
                }
            }
            (b"SETINFO", 4) => self.set_info(a, w),
            (b"INFO", 2) => w.verbatim(&format!("{}\n", self.client.line())),
            (b"LIST", _) => list(shared, a, w),
            (b"NO-EVICT" | b"NO-TOUCH", 3) if a.is(2, "ON") || a.is(2, "OFF") => w.ok(),
            (b"NO-EVICT" | b"NO-TOUCH", 3) => w.error(SYNTAX),
            (b"REPLY", 3) => {
                for (word, how) in [("ON", Replies::On), ("OFF", Replies::Off), ("SKIP", Replies::Skip)] {
                    if a.is(2, word) {
                        return After::Replies(how);
                    }
                }
                w.error(SYNTAX);
            }
            (b"KILL", 3..) => return self.kill(shared, a, w),
            (b"UNBLOCK", 3 | 4) => return unblock(shared, a, w),
            (b"PAUSE", 3 | 4) => pause(shared, a, w),
            (b"UNPAUSE", 2) => {
                shared.pause.end();
                w.ok();
            }
            (b"GETREDIR", 2) => w.int(-1),
            (b"TRACKINGINFO", 2) => {
                w.map(3);
                w.bulk(b"flags");
                w.set(1);
                w.bulk(b"off");
                w.bulk(b"redirect");
                w.int(-1);
                w.bulk(b"prefixes");
                w.array(0);
            }
            (b"TRACKING", 3) if a.is(2, "OFF") => w.ok(),
            (b"TRACKING" | b"CACHING", 3..) => w.error(
                format!(
                    "ERR CLIENT {} is not supported by gse_dba: it does not follow which keys a client has read",
                    text(&sub)
                )
                .as_bytes(),
            ),
            (b"HELP", 2) => {
                let lines = [
                    "CLIENT <subcommand> [<arg> [value] [opt] ...]. Subcommands are:",
                    "GETNAME, GETREDIR, ID, INFO, KILL, LIST, NO-EVICT, NO-TOUCH, PAUSE, REPLY, SETINFO, SETNAME, TRACKINGINFO, UNBLOCK, UNPAUSE",
                ];
                w.array(lines.len());
                lines.iter().for_each(|l| w.simple(l));
            }
            (
                b"ID" | b"GETNAME" | b"SETNAME" | b"SETINFO" | b"INFO" | b"NO-EVICT" | b"NO-TOUCH" | b"REPLY" | b"KILL"
                | b"UNBLOCK" | b"PAUSE" | b"UNPAUSE" | b"GETREDIR" | b"TRACKINGINFO" | b"TRACKING" | b"CACHING",
                _,
            ) => {
                w.error(
                    format!(
                        "ERR wrong number of arguments for 'client|{}' command",
                        text(&sub).to_ascii_lowercase()
                    )
                    .as_bytes(),
                );
            }
            _ => w.error(format!("ERR unknown subcommand '{}'. Try CLIENT HELP.", text(a.at(1))).as_bytes()),
        }
        After::Go
    }

    fn set_info(&mut self, a: Args<'_>, w: &mut Writer) {
        let value = text(a.at(3));
        if !printable(a.at(3)) {
            w.error(
                format!(
                    "ERR {} cannot contain spaces, newlines or special characters.",
                    text(a.at(2)).to_ascii_lowercase()
                )
                .as_bytes(),
            );
        } else if a.is(2, "LIB-NAME") {
            self.client.names.lock().lib_name = value;
            w.ok();
        } else if a.is(2, "LIB-VER") {
            self.client.names.lock().lib_version = value;
            w.ok();
        } else {
            w.error(format!("ERR Unrecognized option '{}'", text(a.at(2))).as_bytes());
        }
    }

    fn kill(&mut self, shared: &Shared, a: Args<'_>, w: &mut Writer) -> After {
        let old = a.len() == 3;
        let mut filters: Vec<(Vec<u8>, String)> = Vec::new();
        let mut skip_me = !old;
        if old {
            filters.push((b"ADDR".to_vec(), text(a.at(2))));
        } else if a.len() % 2 == 1 {
            w.error(SYNTAX);
            return After::Go;
        }
        for i in (2..a.len()).step_by(2).filter(|_| !old) {
            let (name, value) = (a.at(i).to_ascii_uppercase(), text(a.at(i + 1)));
            match name.as_slice() {
                b"ID" if parse_int(a.at(i + 1)).is_none_or(|n| n <= 0) => {
                    w.error(b"ERR client-id should be greater than 0");
                    return After::Go;
                }
                b"TYPE" if !KINDS.contains(&value.to_ascii_lowercase().as_str()) => {
                    w.error(format!("ERR Unknown client type '{value}'").as_bytes());
                    return After::Go;
                }
                b"USER" if shared.users.get(&value).is_none() => {
                    w.error(format!("ERR No such user '{value}'").as_bytes());
                    return After::Go;
                }
                b"ID" | b"TYPE" | b"USER" | b"ADDR" | b"LADDR" => filters.push((name, value)),
                b"SKIPME" if a.is(i + 1, "yes") => skip_me = true,
                b"SKIPME" if a.is(i + 1, "no") => skip_me = false,
                _ => {
                    w.error(SYNTAX);
                    return After::Go;
                }
            }
        }
        let fits = |c: &Client| {
            filters.iter().all(|(name, value)| match name.as_slice() {
                b"ID" => c.id.to_string() == *value,
                b"TYPE" => c.kind() == value.to_ascii_lowercase(),
                b"USER" => c.user() == *value,
                b"ADDR" => c.addr == *value,
                _ => c.laddr == *value,
            })
        };
        let chosen: Vec<Arc<Client>> = shared
            .clients
            .lock()
            .values()
            .filter(|c| fits(c) && !(skip_me && c.id == self.client.id))
            .cloned()
            .collect();
        match (old, chosen.len()) {
            (true, 0) => w.error(b"ERR No such client"),
            (true, _) => w.ok(),
            (false, n) => w.len(n),
        }
        let mut after = After::Go;
        for c in chosen {
            if c.id == self.client.id {
                after = After::Close;
            } else {
                c.kill();
            }
        }
        after
    }
}

const KINDS: [&str; 5] = ["normal", "master", "replica", "slave", "pubsub"];

fn list(shared: &Shared, a: Args<'_>, w: &mut Writer) {
    let mut kind = None;
    let mut ids = None;
    if a.is(2, "TYPE") && a.len() == 4 {
        let wanted = text(a.at(3)).to_ascii_lowercase();
        if !KINDS.contains(&wanted.as_str()) {
            return w.error(format!("ERR Unknown client type '{}'", text(a.at(3))).as_bytes());
        }
        kind = Some(wanted);
    } else if a.is(2, "ID") && a.len() > 3 {
        let mut wanted = HashSet::new();
        for id in a.iter().skip(3) {
            match parse_int(id).and_then(|n| u64::try_from(n).ok()) {
                Some(n) => wanted.insert(n),
                None => return w.error(b"ERR Invalid client ID"),
            };
        }
        ids = Some(wanted);
    } else if a.len() > 2 {
        return w.error(SYNTAX);
    }
    let mut lines: Vec<(u64, String)> = shared
        .clients
        .lock()
        .values()
        .filter(|c| kind.as_deref().is_none_or(|k| c.kind() == k))
        .filter(|c| ids.as_ref().is_none_or(|i| i.contains(&c.id)))
        .map(|c| (c.id, c.line()))
        .collect();
    lines.sort_unstable();
    w.verbatim(&lines.into_iter().map(|(_, l)| l + "\n").collect::<String>());
}

fn unblock(shared: &Shared, a: Args<'_>, w: &mut Writer) -> After {
    let Some(id) = parse_int(a.at(2)) else {
        w.error(b"ERR value is not an integer or out of range");
        return After::Go;
    };
    let error = a.len() == 4 && a.is(3, "ERROR");
    if a.len() == 4 && !error && !a.is(3, "TIMEOUT") {
        w.error(b"ERR CLIENT UNBLOCK reason should be TIMEOUT or ERROR");
        return After::Go;
    }
    let waits = u64::try_from(id)
        .ok()
        .and_then(|id| shared.clients.lock().get(&id).and_then(|c| *c.blocked.lock()));
    match waits {
        Some((group, upstream)) => After::Unblock { group, upstream, error },
        None => {
            w.int(0);
            After::Go
        }
    }
}

fn pause(shared: &Shared, a: Args<'_>, w: &mut Writer) {
    let Some(ms) = parse_int(a.at(2)).and_then(|n| u64::try_from(n).ok()) else {
        return w.error(b"ERR timeout is not an integer or out of range");
    };
    let all = match a.len() {
        3 => true,
        _ if a.is(3, "ALL") => true,
        _ if a.is(3, "WRITE") => false,
        _ => return w.error(b"ERR CLIENT PAUSE mode must be WRITE or ALL"),
    };
    shared.pause.begin(Duration::from_millis(ms), all);
    w.ok();
}
