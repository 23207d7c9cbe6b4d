//! What is known of each connection, and `CLIENT`, with which connections are looked at, named, ended and woken.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::args::Args;
use crate::clients;
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
    /// When its last batch came, in milliseconds after `since`.
    last_ms: AtomicU64,
    /// Bytes of replies that it has not taken yet, when they are many.
    pub(crate) output: AtomicUsize,
    /// Told when the connection is to end.
    pub(crate) killed: Notify,
    /// Has subscribed at the one Redis behind.
    passed_on: AtomicBool,
    /// Subscriptions to channels, patterns and shard channels.
    pub(crate) subscriptions: [AtomicUsize; 3],
    /// Where it waits in a blocking command: the group, and what its connection is called there.
    blocked: Mutex<Option<(usize, i64)>>,
    /// Until when it may wait in a blocking command at one store, and whether that wait was ended for this.
    pub(crate) turn: Turn,
}

/// How long a wait at a store may last: until another store, or somebody who must know of what it brings, takes over.
#[derive(Default)]
pub(crate) struct Turn {
    until: Mutex<Option<CancellationToken>>,
    disturbed: AtomicBool,
}

impl Turn {
    /// The next wait ends with this.
    pub(crate) fn begin(&self, until: &CancellationToken) {
        *self.until.lock() = Some(until.clone());
        self.disturbed.store(false, Ordering::Relaxed);
    }

    /// Whether the wait was ended without a result, and is to be begun again.
    pub(crate) fn end(&self) -> bool {
        *self.until.lock() = None;
        self.disturbed.swap(false, Ordering::Relaxed)
    }

    /// Resolves when the wait must end.
    pub(crate) async fn over(&self) {
        let until = self.until.lock().clone();
        match until {
            Some(until) => until.cancelled().await,
            None => std::future::pending().await,
        }
    }

    /// It was ended without a result.
    pub(crate) fn disturb(&self) {
        self.disturbed.store(true, Ordering::Relaxed);
    }
}

#[derive(Default, Clone)]
pub(crate) struct Names {
    pub(crate) name: String,
    pub(crate) user: String,
    pub(crate) lib_name: String,
    pub(crate) lib_version: String,
    pub(crate) last: String,
}

impl Names {
    /// The library it says that it is, with its version.
    pub(crate) fn library(&self) -> String {
        format!("{} {}", self.lib_name, self.lib_version).trim().to_owned()
    }
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
            last_ms: AtomicU64::new(0),
            output: AtomicUsize::new(0),
            killed: Notify::new(),
            passed_on: AtomicBool::new(false),
            subscriptions: Default::default(),
            blocked: Mutex::default(),
            turn: Turn::default(),
        }
    }

    /// Commands have come.
    pub(crate) fn active(&self, n: usize, now: Instant) {
        self.commands.fetch_add(n as u64, Ordering::Relaxed);
        let after = now.saturating_duration_since(self.since).as_millis();
        self.last_ms.store(after as u64, Ordering::Relaxed);
    }

    /// Since its last batch came.
    pub(crate) fn idle(&self) -> Duration {
        let last = Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
        self.since.elapsed().saturating_sub(last)
    }

    /// Whether it came over the Unix socket.
    pub(crate) fn is_local(&self) -> bool {
        self.laddr.starts_with('/')
    }

    /// It has subscribed at the one Redis behind.
    pub(crate) fn subscribed(&self) {
        self.passed_on.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_subscribed(&self) -> bool {
        self.passed_on.load(Ordering::Relaxed) || self.subscriptions.iter().any(|n| n.load(Ordering::Relaxed) > 0)
    }

    /// It waits in a blocking command from now on.
    pub(crate) fn waits(&self, group: usize, upstream: i64) -> Waiting<'_> {
        *self.blocked.lock() = Some((group, upstream));
        Waiting(self)
    }

    pub(crate) fn user(&self) -> String {
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
        let idle = self.idle();
        let mut flags = String::new();
        if self.is_subscribed() {
            flags.push('P');
        }
        if self.blocked.lock().is_some() {
            flags.push('b');
        }
        if flags.is_empty() {
            flags.push('N');
        }
        format!(
            "id={} addr={} laddr={} fd=-1 name={} age={} idle={} flags={flags} db=0 sub={sub} psub={psub} ssub={ssub} multi=-1 qbuf=0 qbuf-free=0 argv-mem=0 multi-mem=0 rbs=0 rbp=0 obl={output} oll=0 omem={output} tot-mem={output} events=r cmd={} user={} redir=-1 resp={} lib-name={} lib-ver={} tot-cmds={}",
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
            output = self.output.load(Ordering::Relaxed),
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
            (b"LIST", _) => clients::list(shared, a, w),
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
            (b"KILL", 3..) => return clients::kill(shared, &self.client, a, w),
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
