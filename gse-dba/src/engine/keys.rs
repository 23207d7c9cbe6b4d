//! Commands on keys whatever they hold: existence, names, expiry, iteration.

use rand::RngExt as _;

use super::db::{Exec, NO_KEY, Outcome, Refusal, SYNTAX, int, invalid_expire};
use super::glob;
use super::value::{Hash, List, Set, Value, Zset};
use crate::args::Args;
use crate::resp::write::Writer;

pub(crate) fn del(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let n = a.iter().skip(1).filter(|k| x.delete(k)).count();
    w.len(n);
    Ok(())
}

/// EXISTS and TOUCH.
pub(crate) fn exists(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let n = a.iter().skip(1).filter(|k| x.live(k)).count();
    w.len(n);
    Ok(())
}

pub(crate) fn type_of(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    w.simple(x.entry(a.at(1)).map_or("none", |e| e.value.type_name()));
    Ok(())
}

fn move_key(x: &mut Exec<'_>, from: &[u8], to: &[u8]) {
    if from != to
        && let Some(entry) = x.db.remove(from)
    {
        x.log.push(&[b"RENAME", from, to]);
        x.touch(from);
        x.put(to, entry.value, entry.expires);
    }
}

pub(crate) fn rename(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    if !x.live(a.at(1)) {
        return Err(NO_KEY.into());
    }
    x.live(a.at(2));
    move_key(x, a.at(1), a.at(2));
    w.ok();
    Ok(())
}

pub(crate) fn renamenx(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    if !x.live(a.at(1)) {
        return Err(NO_KEY.into());
    }
    if x.live(a.at(2)) {
        w.int(0);
        return Ok(());
    }
    move_key(x, a.at(1), a.at(2));
    w.int(1);
    Ok(())
}

pub(crate) fn duplicate(value: &Value) -> Value {
    match value {
        Value::Str(s) => Value::Str(s.clone()),
        Value::Hash(h) => {
            let mut new = Hash::default();
            for (f, v) in &h.map {
                new.insert(f, v);
            }
            Value::Hash(new)
        }
        Value::List(l) => {
            let mut new = List::default();
            for i in &l.items {
                new.push(false, i);
            }
            Value::List(new)
        }
        Value::Set(s) => {
            let mut new = Set::default();
            for m in &s.set {
                new.insert(m);
            }
            Value::Set(new)
        }
        Value::Zset(z) => {
            let mut new = Zset::default();
            for (m, s) in &z.scores {
                new.insert(m, *s);
            }
            Value::Zset(new)
        }
    }
}

pub(crate) fn copy(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let (from, to) = (a.at(1), a.at(2));
    let mut replace = false;
    let mut i = 3;
    while i < a.len() {
        if a.is(i, "REPLACE") {
            replace = true;
        } else if a.is(i, "DB") && i + 1 < a.len() {
            if int(a.at(i + 1))? != 0 {
                return Err("ERR DB index is out of range".into());
            }
            i += 1;
        } else {
            return Err(SYNTAX.into());
        }
        i += 1;
    }
    if from == to {
        return Err("ERR source and destination objects are the same".into());
    }
    let there = x.live(to);
    let Some((value, expires)) = x.entry(from).map(|e| (duplicate(&e.value), e.expires)) else {
        w.int(0);
        return Ok(());
    };
    if there && !replace {
        w.int(0);
        return Ok(());
    }
    x.put(to, value, expires);
    x.log.push(&[b"COPY", from, to, b"REPLACE"]);
    w.int(1);
    Ok(())
}

pub(crate) fn set_expiry(x: &mut Exec<'_>, key: &[u8], at: i64) {
    x.db.set_expiry(key, at);
    x.log.push(&[b"PEXPIREAT", key, at.to_string().as_bytes()]);
    x.touch(key);
}

/// True when the key had an expiry and lost it.
pub(crate) fn persist_key(x: &mut Exec<'_>, key: &[u8]) -> bool {
    if x.entry(key).is_none_or(|e| e.expires == 0) {
        return false;
    }
    x.db.set_expiry(key, 0);
    x.log.push(&[b"PERSIST", key]);
    x.touch(key);
    true
}

pub(crate) fn persist(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let done = persist_key(x, a.at(1));
    w.int(i64::from(done));
    Ok(())
}

fn expire_generic(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer, name: &str, seconds: bool, relative: bool) -> Outcome {
    let key = a.at(1);
    let (mut nx, mut xx, mut gt, mut lt) = (false, false, false, false);
    for i in 3..a.len() {
        match a.at(i).to_ascii_uppercase().as_slice() {
            b"NX" => nx = true,
            b"XX" => xx = true,
            b"GT" => gt = true,
            b"LT" => lt = true,
            _ => return Err(format!("ERR Unsupported option {}", String::from_utf8_lossy(a.at(i))).into()),
        }
    }
    if nx && (xx || gt || lt) {
        return Err("ERR NX and XX, GT or LT options at the same time are not compatible".into());
    }
    if gt && lt {
        return Err("ERR GT and LT options at the same time are not compatible".into());
    }
    let n = int(a.at(2))?;
    let ms = if seconds { n.checked_mul(1000) } else { Some(n) };
    let at = ms
        .and_then(|ms| if relative { ms.checked_add(x.now) } else { Some(ms) })
        .ok_or_else(|| invalid_expire(name))?;
    let Some(old) = x.entry(key).map(|e| e.expires) else {
        w.int(0);
        return Ok(());
    };
    // A key without expiry counts as one that lives for ever: GT never shortens it, LT always does.
    let refused =
        (nx && old > 0) || (xx && old == 0) || (gt && (old == 0 || at <= old)) || (lt && old > 0 && at >= old);
    if refused {
        w.int(0);
        return Ok(());
    }
    if at <= x.now {
        x.delete(key);
    } else {
        set_expiry(x, key, at);
    }
    w.int(1);
    Ok(())
}

pub(crate) fn expire(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    expire_generic(x, a, w, "expire", true, true)
}

pub(crate) fn pexpire(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    expire_generic(x, a, w, "pexpire", false, true)
}

pub(crate) fn expireat(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    expire_generic(x, a, w, "expireat", true, false)
}

pub(crate) fn pexpireat(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    expire_generic(x, a, w, "pexpireat", false, false)
}

fn ttl_generic(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer, show: impl Fn(i64, i64) -> i64) -> Outcome {
    let now = x.now;
    w.int(match x.entry(a.at(1)) {
        None => -2,
        Some(e) if e.expires == 0 => -1,
        Some(e) => show(e.expires, now),
    });
    Ok(())
}

pub(crate) fn ttl(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    ttl_generic(x, a, w, |at, now| (at - now + 500) / 1000)
}

pub(crate) fn pttl(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    ttl_generic(x, a, w, |at, now| at - now)
}

pub(crate) fn expiretime(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    ttl_generic(x, a, w, |at, _| (at + 500) / 1000)
}

pub(crate) fn pexpiretime(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    ttl_generic(x, a, w, |at, _| at)
}

pub(crate) fn keys(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let now = x.now;
    let all = a.at(1) == b"*";
    let found: Vec<&[u8]> =
        x.db.map
            .iter()
            .filter(|(k, e)| (e.expires == 0 || e.expires > now) && (all || glob::matches(a.at(1), k)))
            .map(|(k, _)| k.as_ref())
            .collect();
    w.array(found.len());
    found.iter().for_each(|k| w.bulk(k));
    Ok(())
}

pub(crate) fn randomkey(x: &mut Exec<'_>, _: Args<'_>, w: &mut Writer) -> Outcome {
    // Each turn either finds a live key or removes an expired one, so this ends.
    while !x.db.map.is_empty() {
        let i = rand::rng().random_range(0..x.db.map.len());
        let Some((key, _)) = x.db.map.get_index(i) else { break };
        let key = std::sync::Arc::clone(key);
        if x.live(&key) {
            w.bulk(&key);
            return Ok(());
        }
    }
    w.null();
    Ok(())
}

pub(crate) fn dbsize(x: &mut Exec<'_>, _: Args<'_>, w: &mut Writer) -> Outcome {
    w.len(x.db.map.len());
    Ok(())
}

/// FLUSHALL and FLUSHDB: there is one database.
pub(crate) fn flush(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    if a.len() > 2 || (a.len() == 2 && !a.is(1, "SYNC") && !a.is(1, "ASYNC")) {
        return Err(SYNTAX.into());
    }
    if !x.db.map.is_empty() {
        x.log.push(&[b"FLUSHALL"]);
    }
    x.db.clear();
    w.ok();
    Ok(())
}

pub(crate) fn object(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let missing = |w: &mut Writer| w.null();
    if a.is(1, "ENCODING") && a.len() == 3 {
        match x.entry(a.at(2)) {
            Some(e) => w.bulk(super::string::encoding(&e.value).as_bytes()),
            None => missing(w),
        }
        return Ok(());
    }
    if a.is(1, "REFCOUNT") && a.len() == 3 {
        if x.live(a.at(2)) {
            w.int(1)
        } else {
            missing(w)
        }
        return Ok(());
    }
    Err(format!(
        "ERR unknown subcommand '{}'. Try OBJECT HELP.",
        String::from_utf8_lossy(a.at(1))
    )
    .into())
}

/// What SCAN and its kin were asked.
pub(crate) struct Scan<'a> {
    pub(crate) cursor: u64,
    pattern: Option<&'a [u8]>,
    count: usize,
    kind: Option<&'a [u8]>,
}

impl<'a> Scan<'a> {
    pub(crate) fn parse(a: Args<'a>, cursor: usize) -> Result<Self, Refusal> {
        let text = std::str::from_utf8(a.at(cursor)).ok().and_then(|t| t.parse().ok());
        let mut scan = Scan {
            cursor: text.ok_or("ERR invalid cursor")?,
            pattern: None,
            count: 10,
            kind: None,
        };
        let mut i = cursor + 1;
        while i < a.len() {
            let more = i + 1 < a.len();
            if a.is(i, "COUNT") && more {
                let n = int(a.at(i + 1))?;
                if n < 1 {
                    return Err(SYNTAX.into());
                }
                scan.count = n as usize;
            } else if a.is(i, "MATCH") && more {
                scan.pattern = (a.at(i + 1) != b"*").then(|| a.at(i + 1));
            } else if a.is(i, "TYPE") && more && cursor == 1 {
                scan.kind = Some(a.at(i + 1));
            } else {
                return Err(SYNTAX.into());
            }
            i += 2;
        }
        Ok(scan)
    }

    fn wants(&self, name: &[u8]) -> bool {
        self.pattern.is_none_or(|p| glob::matches(p, name))
    }

    /// The window of places to look at now and the cursor after it. Places are visited from the end down: a removal moves the last place into the gap, that is to a place
    /// still to be visited or already gone past, so whatever is there throughout is seen at least once.
    fn window(&self, len: usize) -> (usize, usize) {
        let top = if self.cursor == 0 {
            len
        } else {
            usize::try_from(self.cursor).unwrap_or(usize::MAX).min(len)
        };
        (top.saturating_sub(self.count), top)
    }

    /// Writes one page of a collection: `item` gives the name at a place, and its value where the reply has pairs.
    pub(crate) fn page<'v>(
        &self,
        len: usize,
        w: &mut Writer,
        pairs: bool,
        item: impl Fn(usize) -> Option<(&'v [u8], Vec<u8>)>,
    ) {
        let (from, top) = self.window(len);
        let found: Vec<_> = (from..top)
            .rev()
            .filter_map(item)
            .filter(|(name, _)| self.wants(name))
            .collect();
        w.array(2);
        w.bulk(from.to_string().as_bytes());
        w.array(found.len() * if pairs { 2 } else { 1 });
        for (name, value) in found {
            w.bulk(name);
            if pairs {
                w.bulk(&value);
            }
        }
    }

    /// The reply for a key that is not there.
    pub(crate) fn nothing(w: &mut Writer) {
        w.array(2);
        w.bulk(b"0");
        w.array(0);
    }
}

pub(crate) fn scan(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let scan = Scan::parse(a, 1)?;
    let now = x.now;
    let map = &x.db.map;
    scan.page(map.len(), w, false, |i| {
        let (key, e) = map.get_index(i)?;
        let live = e.expires == 0 || e.expires > now;
        let kind = scan
            .kind
            .is_none_or(|k| k.eq_ignore_ascii_case(e.value.type_name().as_bytes()));
        (live && kind).then_some((key.as_ref(), Vec::new()))
    });
    Ok(())
}
