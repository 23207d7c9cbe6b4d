//! String commands of the embedded store.

use super::db::{Exec, NOT_FLOAT, NOT_INT, Outcome, Refusal, SYNTAX, int, invalid_expire, slice};
use super::numbers::{Extended, ParsedExtended, parse_int};
use super::value::Value;
use crate::args::Args;
use crate::resp::write::Writer;

type Str = Vec<u8>;

const TOO_LONG: &str = "ERR string exceeds maximum allowed size (proto-max-bulk-len)";
const MAX_STRING: usize = 512 << 20;

/// The absolute time that an option and its argument mean. `None` is a time that cannot be.
pub(crate) fn deadline(x: &Exec<'_>, unit: &[u8], n: i64) -> Option<i64> {
    if n <= 0 {
        return None;
    }
    let seconds = !unit.first().is_some_and(|b| b.eq_ignore_ascii_case(&b'p'));
    let ms = if seconds { n.checked_mul(1000)? } else { n };
    let absolute = unit.len() == 4;
    if absolute { Some(ms) } else { ms.checked_add(x.now) }
}

/// Logs the state of a string key as it is after a change.
fn log_set(x: &mut Exec<'_>, key: &[u8], value: &[u8], expires: i64) {
    if expires > 0 {
        x.log
            .push(&[b"SET", key, value, b"PXAT", expires.to_string().as_bytes()]);
    } else {
        x.log.push(&[b"SET", key, value]);
    }
}

fn store(x: &mut Exec<'_>, key: &[u8], value: &[u8], expires: i64) {
    x.put(key, Value::Str(value.to_vec()), expires);
    log_set(x, key, value, expires);
}

pub(crate) fn get(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    w.bulk_or_null(x.read::<Str>(a.at(1))?.map(Vec::as_slice));
    Ok(())
}

pub(crate) fn set(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let (key, value) = (a.at(1), a.at(2));
    let (mut nx, mut xx, mut get, mut keep, mut expire) = (false, false, false, false, None);
    let mut i = 3;
    while i < a.len() {
        let more = i + 1 < a.len();
        if a.is(i, "NX") && !xx {
            nx = true;
        } else if a.is(i, "XX") && !nx {
            xx = true;
        } else if a.is(i, "GET") {
            get = true;
        } else if a.is(i, "KEEPTTL") && expire.is_none() {
            keep = true;
        } else if ["EX", "PX", "EXAT", "PXAT"].iter().any(|o| a.is(i, o)) && more && !keep && expire.is_none() {
            expire = Some((a.at(i), a.at(i + 1)));
            i += 1;
        } else {
            return Err(SYNTAX.into());
        }
        i += 1;
    }
    let mut expires = 0;
    if let Some((unit, n)) = expire {
        expires = deadline(x, unit, int(n)?).ok_or_else(|| invalid_expire("set"))?;
    }
    if get {
        w.bulk_or_null(x.read::<Str>(key)?.map(Vec::as_slice));
    }
    let old = x.entry(key).map(|e| e.expires);
    if (nx && old.is_some()) || (xx && old.is_none()) {
        if !get {
            w.null();
        }
        return Ok(());
    }
    if keep {
        expires = old.unwrap_or(0);
    }
    store(x, key, value, expires);
    if !get {
        w.ok();
    }
    Ok(())
}

pub(crate) fn setnx(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let free = !x.live(a.at(1));
    if free {
        store(x, a.at(1), a.at(2), 0);
    }
    w.int(i64::from(free));
    Ok(())
}

fn set_for(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer, unit: &[u8], name: &str) -> Outcome {
    let n = int(a.at(2))?;
    let at = deadline(x, unit, n).ok_or_else(|| invalid_expire(name))?;
    store(x, a.at(1), a.at(3), at);
    w.ok();
    Ok(())
}

pub(crate) fn setex(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    set_for(x, a, w, b"EX", "setex")
}

pub(crate) fn psetex(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    set_for(x, a, w, b"PX", "psetex")
}

pub(crate) fn getset(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    w.bulk_or_null(x.read::<Str>(a.at(1))?.map(Vec::as_slice));
    store(x, a.at(1), a.at(2), 0);
    Ok(())
}

pub(crate) fn getdel(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    w.bulk_or_null(x.read::<Str>(a.at(1))?.map(Vec::as_slice));
    x.delete(a.at(1));
    Ok(())
}

pub(crate) fn getex(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let key = a.at(1);
    let (mut persist, mut expire) = (false, None);
    let mut i = 2;
    while i < a.len() {
        if a.is(i, "PERSIST") && expire.is_none() {
            persist = true;
        } else if ["EX", "PX", "EXAT", "PXAT"].iter().any(|o| a.is(i, o))
            && i + 1 < a.len()
            && !persist
            && expire.is_none()
        {
            expire = Some((a.at(i), a.at(i + 1)));
            i += 1;
        } else {
            return Err(SYNTAX.into());
        }
        i += 1;
    }
    let Some(old) = x.read::<Str>(key)?.cloned() else {
        w.null();
        return Ok(());
    };
    if let Some((unit, n)) = expire {
        let at = deadline(x, unit, int(n)?).ok_or_else(|| invalid_expire("getex"))?;
        if at <= x.now {
            x.delete(key);
        } else {
            super::keys::set_expiry(x, key, at);
        }
    } else if persist {
        super::keys::persist_key(x, key);
    }
    w.bulk(&old);
    Ok(())
}

pub(crate) fn mget(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    w.array(a.len() - 1);
    for key in a.iter().skip(1) {
        // A key of another kind reads as missing here, as in Redis.
        match x.read::<Str>(key) {
            Ok(v) => w.bulk_or_null(v.map(Vec::as_slice)),
            Err(_) => w.null(),
        }
    }
    Ok(())
}

fn pairs(a: Args<'_>, name: &str) -> Result<(), Refusal> {
    if a.len().is_multiple_of(2) {
        Err(format!("ERR wrong number of arguments for '{name}' command").into())
    } else {
        Ok(())
    }
}

pub(crate) fn mset(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    pairs(a, "mset")?;
    for i in (1..a.len()).step_by(2) {
        x.put(a.at(i), Value::Str(a.at(i + 1).to_vec()), 0);
    }
    x.log.push_args(a);
    w.ok();
    Ok(())
}

pub(crate) fn msetnx(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    pairs(a, "msetnx")?;
    if (1..a.len()).step_by(2).any(|i| x.live(a.at(i))) {
        w.int(0);
        return Ok(());
    }
    for i in (1..a.len()).step_by(2) {
        store(x, a.at(i), a.at(i + 1), 0);
    }
    w.int(1);
    Ok(())
}

pub(crate) fn append(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let (key, tail) = (a.at(1), a.at(2));
    let old = x.read::<Str>(key)?.map_or(0, Vec::len);
    if old + tail.len() > MAX_STRING {
        return Err(TOO_LONG.into());
    }
    let len = x.edit::<Str, _>(key, true, |s| {
        s.extend_from_slice(tail);
        s.len()
    })?;
    x.log.push_args(a);
    x.touch(key);
    w.len(len.unwrap_or(0));
    Ok(())
}

pub(crate) fn strlen(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    w.len(x.read::<Str>(a.at(1))?.map_or(0, Vec::len));
    Ok(())
}

pub(crate) fn getrange(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let (start, end) = (int(a.at(2))?, int(a.at(3))?);
    let Some(s) = x.read::<Str>(a.at(1))? else {
        w.bulk(b"");
        return Ok(());
    };
    if start < 0 && end < 0 && start > end {
        w.bulk(b"");
        return Ok(());
    }
    // An end before the beginning is the first byte, as Redis has it.
    let end = if end < 0 { (s.len() as i64 + end).max(0) } else { end };
    let (from, to) = slice(s.len(), start, end);
    w.bulk(&s[from..to]);
    Ok(())
}

pub(crate) fn setrange(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let (key, patch) = (a.at(1), a.at(3));
    let offset = int(a.at(2))?;
    if offset < 0 {
        return Err("ERR offset is out of range".into());
    }
    let len = x.read::<Str>(key)?.map_or(0, Vec::len);
    if patch.is_empty() {
        w.len(len);
        return Ok(());
    }
    if offset as u64 + patch.len() as u64 > MAX_STRING as u64 {
        return Err(TOO_LONG.into());
    }
    let offset = offset as usize;
    let len = x.edit::<Str, _>(key, true, |s| {
        if s.len() < offset + patch.len() {
            s.resize(offset + patch.len(), 0);
        }
        s[offset..offset + patch.len()].copy_from_slice(patch);
        s.len()
    })?;
    x.log.push_args(a);
    x.touch(key);
    w.len(len.unwrap_or(0));
    Ok(())
}

fn add(x: &mut Exec<'_>, key: &[u8], by: i64, w: &mut Writer) -> Outcome {
    let old = match x.read::<Str>(key)? {
        Some(s) => parse_int(s).ok_or(NOT_INT)?,
        None => 0,
    };
    let new = old.checked_add(by).ok_or("ERR increment or decrement would overflow")?;
    let expires = x.entry(key).map_or(0, |e| e.expires);
    store(x, key, itoa::Buffer::new().format(new).as_bytes(), expires);
    w.int(new);
    Ok(())
}

pub(crate) fn incr(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    add(x, a.at(1), 1, w)
}

pub(crate) fn decr(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    add(x, a.at(1), -1, w)
}

pub(crate) fn incrby(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    add(x, a.at(1), int(a.at(2))?, w)
}

pub(crate) fn decrby(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let by = int(a.at(2))?.checked_neg().ok_or("ERR decrement would overflow")?;
    add(x, a.at(1), by, w)
}

/// The sum of a stored number and an increment, as text. `stored` missing counts as zero; `broken` is what a stored value that is no number is called.
pub(crate) fn float_sum(stored: Option<&[u8]>, by: &[u8], broken: &'static str) -> Result<String, Refusal> {
    let old = match stored {
        None => ParsedExtended::Finite(Extended::ZERO),
        Some(s) => Extended::parse(s).ok_or(broken)?,
    };
    let by = Extended::parse(by).ok_or(NOT_FLOAT)?;
    match (old, by) {
        (ParsedExtended::Finite(a), ParsedExtended::Finite(b)) => {
            Ok(a.add(b).ok_or("ERR increment would produce NaN or Infinity")?.format())
        }
        _ => Err("ERR increment would produce NaN or Infinity".into()),
    }
}

pub(crate) fn incrbyfloat(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let key = a.at(1);
    let sum = float_sum(x.read::<Str>(key)?.map(Vec::as_slice), a.at(2), NOT_FLOAT)?;
    let expires = x.entry(key).map_or(0, |e| e.expires);
    store(x, key, sum.as_bytes(), expires);
    w.bulk(sum.as_bytes());
    Ok(())
}

/// Kept beside the string commands because only they can say what a string is encoded as.
pub(crate) fn encoding(value: &Value) -> &'static str {
    match value {
        Value::Str(s) if parse_int(s).is_some() => "int",
        Value::Str(s) if s.len() <= 44 => "embstr",
        Value::Str(_) => "raw",
        Value::Hash(h) if h.map.len() <= 512 && h.map.iter().all(|(f, v)| f.len() <= 64 && v.len() <= 64) => "listpack",
        Value::Hash(_) => "hashtable",
        Value::List(_) => "quicklist",
        Value::Set(s) if s.set.len() <= 512 && s.set.iter().all(|m| parse_int(m).is_some()) => "intset",
        Value::Set(_) => "hashtable",
        Value::Zset(z) if z.scores.len() <= 128 && z.scores.keys().all(|m| m.len() <= 64) => "listpack",
        Value::Zset(_) => "skiplist",
    }
}
