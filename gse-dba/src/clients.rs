//! The clients as a whole: listing them, ending some of them, and who must go when replies that nobody takes grow too large.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;

use crate::args::Args;
use crate::client::Client;
use crate::conn::Ended;
use crate::engine::numbers::parse_int;
use crate::local::After;
use crate::resp::write::Writer;
use crate::server::Shared;

/// How long large replies wait for others to have made room.
const MAKE_ROOM: Duration = Duration::from_secs(5);

/// Which clients are meant.
#[derive(Default)]
struct Filter {
    ids: Option<Vec<u64>>,
    addr: Option<String>,
    laddr: Option<String>,
    user: Option<String>,
    pubsub: Option<bool>,
    /// Copies and primaries are no clients here.
    nobody: bool,
    max_age: Option<u64>,
    skip_me: bool,
}

impl Filter {
    fn kind(&mut self, name: &[u8]) -> Result<(), String> {
        match name.to_ascii_lowercase().as_slice() {
            b"normal" => self.pubsub = Some(false),
            b"pubsub" => self.pubsub = Some(true),
            b"master" | b"replica" | b"slave" => self.nobody = true,
            _ => return Err(format!("ERR Unknown client type '{}'", String::from_utf8_lossy(name))),
        }
        Ok(())
    }

    fn fits(&self, c: &Client, me: u64) -> bool {
        let same = |want: &Option<String>, have: &str| want.as_ref().is_none_or(|w| w == have);
        !self.nobody
            && self.ids.as_ref().is_none_or(|ids| ids.contains(&c.id))
            && same(&self.addr, &c.addr)
            && same(&self.laddr, &c.laddr)
            && self.user.as_ref().is_none_or(|u| *u == c.user())
            && self.pubsub.is_none_or(|p| p == c.is_subscribed())
            && self.max_age.is_none_or(|s| c.since.elapsed().as_secs() >= s)
            && !(self.skip_me && c.id == me)
    }
}

fn id(word: &[u8]) -> Option<u64> {
    parse_int(word).and_then(|n| u64::try_from(n).ok()).filter(|n| *n > 0)
}

fn text(word: &[u8]) -> Option<String> {
    Some(String::from_utf8_lossy(word).into_owned())
}

/// All clients that fit, by id.
fn those(shared: &Shared, filter: &Filter, me: u64) -> Vec<Arc<Client>> {
    let mut found: Vec<Arc<Client>> = shared
        .clients
        .lock()
        .values()
        .filter(|c| filter.fits(c, me))
        .cloned()
        .collect();
    found.sort_unstable_by_key(|c| c.id);
    found
}

/// `CLIENT LIST [TYPE type] [ID id ...]`.
pub(crate) fn list(shared: &Shared, a: Args<'_>, w: &mut Writer) {
    let mut filter = Filter::default();
    let parsed = if a.len() == 2 {
        Ok(())
    } else if a.is(2, "TYPE") && a.len() == 4 {
        filter.kind(a.at(3))
    } else if a.is(2, "ID") && a.len() > 3 {
        filter.ids = a.iter().skip(3).map(id).collect();
        filter.ids.as_ref().map(|_| ()).ok_or("ERR Invalid client ID".into())
    } else {
        Err("ERR syntax error".into())
    };
    match parsed {
        Ok(()) => {
            let lines: String = those(shared, &filter, 0).iter().map(|c| c.line() + "\n").collect();
            w.verbatim(&lines);
        }
        Err(e) => w.error(e.as_bytes()),
    }
}

/// The words of a `CLIENT KILL` with filters.
fn filters(shared: &Shared, a: Args<'_>) -> Result<Filter, String> {
    let mut filter = Filter {
        skip_me: true,
        ..Filter::default()
    };
    for i in (2..a.len()).step_by(2) {
        let value = a.at(i + 1);
        if i + 1 >= a.len() {
            return Err("ERR syntax error".into());
        } else if a.is(i, "ID") {
            filter.ids = Some(vec![id(value).ok_or("ERR client-id should be greater than 0")?]);
        } else if a.is(i, "ADDR") {
            filter.addr = text(value);
        } else if a.is(i, "LADDR") {
            filter.laddr = text(value);
        } else if a.is(i, "USER") {
            if shared.users.get(&String::from_utf8_lossy(value)).is_none() {
                return Err(format!("ERR No such user '{}'", String::from_utf8_lossy(value)));
            }
            filter.user = text(value);
        } else if a.is(i, "TYPE") {
            filter.kind(value)?;
        } else if a.is(i, "MAXAGE") {
            filter.max_age = Some(id(value).ok_or("ERR maxage should be greater than 0")?);
        } else if a.is(i, "SKIPME") && value.eq_ignore_ascii_case(b"yes") {
            filter.skip_me = true;
        } else if a.is(i, "SKIPME") && value.eq_ignore_ascii_case(b"no") {
            filter.skip_me = false;
        } else {
            return Err("ERR syntax error".into());
        }
    }
    Ok(filter)
}

/// `CLIENT KILL addr:port`, or with filters.
pub(crate) fn kill(shared: &Shared, me: &Client, a: Args<'_>, w: &mut Writer) -> After {
    let old = a.len() == 3;
    let filter = match a.len() {
        2 => Err("ERR wrong number of arguments for 'client|kill' command".into()),
        3 => Ok(Filter {
            addr: text(a.at(2)),
            ..Filter::default()
        }),
        _ => filters(shared, a),
    };
    let found = match filter {
        Ok(filter) => those(shared, &filter, me.id),
        Err(e) => {
            w.error(e.as_bytes());
            return After::Go;
        }
    };
    match (old, found.is_empty()) {
        (true, true) => w.error(b"ERR No such client"),
        (true, false) => w.ok(),
        (false, _) => w.len(found.len()),
    }
    for client in found.iter().filter(|c| c.id != me.id) {
        client.killed.notify_one();
    }
    // One's own end comes after the reply.
    if found.iter().any(|c| c.id == me.id) {
        After::Close
    } else {
        After::Go
    }
}

/// Large replies of one client, counted until it has taken them.
pub(crate) struct Held {
    client: Arc<Client>,
    _room: OwnedSemaphorePermit,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.client.output.store(0, Ordering::Relaxed);
    }
}

/// Counts replies that a client is to take. When those of all clients together are too large, the client with the most has to go.
pub(crate) async fn hold_output(shared: &Shared, client: &Arc<Client>, bytes: usize) -> Result<Held, Ended> {
    let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX);
    let room = match Arc::clone(&shared.untaken).try_acquire_many_owned(kib) {
        Ok(room) => room,
        Err(_) => {
            let most = shared
                .clients
                .lock()
                .values()
                .max_by_key(|c| c.output.load(Ordering::Relaxed))
                .filter(|c| c.output.load(Ordering::Relaxed) > bytes)
                .cloned();
            let Some(most) = most else { return Err(Ended::NoRoom) };
            tracing::warn!(
                client = most.addr,
                bytes = most.output.load(Ordering::Relaxed),
                "disconnected: the replies that clients have not taken are larger than limits.all_output_bytes"
            );
            shared.metrics.evicted("all_output");
            most.killed.notify_one();
            match tokio::time::timeout(MAKE_ROOM, Arc::clone(&shared.untaken).acquire_many_owned(kib)).await {
                Ok(Ok(room)) => room,
                _ => return Err(Ended::NoRoom),
            }
        }
    };
    client.output.store(bytes, Ordering::Relaxed);
    Ok(Held {
        client: Arc::clone(client),
        _room: room,
    })
}

/// The clients for `DBA CLIENTS`: how many there are and the `n` that are busiest.
pub(crate) fn json(shared: &Shared, n: usize) -> Value {
    let mut all = those(shared, &Filter::default(), 0);
    let total = all.len();
    all.sort_by_key(|c| std::cmp::Reverse(c.commands.load(Ordering::Relaxed)));
    let shown: Vec<Value> = all
        .iter()
        .take(n)
        .map(|c| {
            let names = c.names.lock().clone();
            json!({
                "id": c.id,
                "address": c.addr,
                "name": names.name,
                "library": names.library(),
                "age_s": c.since.elapsed().as_secs(),
                "idle_s": c.idle().as_secs(),
                "commands": c.commands.load(Ordering::Relaxed),
                "protocol": if c.resp3.load(Ordering::Relaxed) { 3 } else { 2 },
                "subscribed": c.is_subscribed(),
                "output_bytes": c.output.load(Ordering::Relaxed),
            })
        })
        .collect();
    json!({
        "connected": total,
        "max": shared.config.limits.max_clients,
        "refused": shared.metrics.refused_clients(),
        "clients": shown,
    })
}
