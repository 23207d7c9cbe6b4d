//! Hash commands of the embedded store.

use rand::RngExt as _;

use super::db::{Exec, NOT_FLOAT, Outcome, SYNTAX, int};
use super::keys::Scan;
use super::numbers::{Extended, ParsedExtended, parse_int};
use super::string::float_sum;
use super::value::Hash;
use crate::args::Args;
use crate::resp::write::Writer;

fn set_fields(x: &mut Exec<'_>, a: Args<'_>) -> Result<usize, super::db::Refusal> {
    let key = a.at(1);
    x.check::<Hash>(key)?;
    let new = x.edit::<Hash, _>(key, true, |h| {
        (2..a.len())
            .step_by(2)
            .filter(|i| h.insert(a.at(*i), a.at(i + 1)))
            .count()
    })?;
    x.log.push_args(a);
    x.touch(key);
    Ok(new.unwrap_or(0))
}

pub(crate) fn hset(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    if !a.len().is_multiple_of(2) {
        return Err("ERR wrong number of arguments for 'hset' command".into());
    }
    let n = set_fields(x, a)?;
    w.len(n);
    Ok(())
}

pub(crate) fn hmset(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    if !a.len().is_multiple_of(2) {
        return Err("ERR wrong number of arguments for 'hmset' command".into());
    }
    set_fields(x, a)?;
    w.ok();
    Ok(())
}

pub(crate) fn hsetnx(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let free = x.read::<Hash>(a.at(1))?.is_none_or(|h| !h.map.contains_key(a.at(2)));
    if free {
        set_fields(x, a)?;
    }
    w.int(i64::from(free));
    Ok(())
}

pub(crate) fn hget(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    w.bulk_or_null(
        x.read::<Hash>(a.at(1))?
            .and_then(|h| h.map.get(a.at(2)))
            .map(AsRef::as_ref),
    );
    Ok(())
}

pub(crate) fn hmget(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let h = x.read::<Hash>(a.at(1))?;
    w.array(a.len() - 2);
    for f in a.iter().skip(2) {
        w.bulk_or_null(h.and_then(|h| h.map.get(f)).map(AsRef::as_ref));
    }
    Ok(())
}

pub(crate) fn hgetall(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let h = x.read::<Hash>(a.at(1))?;
    w.map(h.map_or(0, |h| h.map.len()));
    for (f, v) in h.into_iter().flat_map(|h| &h.map) {
        w.bulk(f);
        w.bulk(v);
    }
    Ok(())
}

pub(crate) fn hkeys(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let h = x.read::<Hash>(a.at(1))?;
    w.array(h.map_or(0, |h| h.map.len()));
    h.into_iter().flat_map(|h| h.map.keys()).for_each(|f| w.bulk(f));
    Ok(())
}

pub(crate) fn hvals(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let h = x.read::<Hash>(a.at(1))?;
    w.array(h.map_or(0, |h| h.map.len()));
    h.into_iter().flat_map(|h| h.map.values()).for_each(|v| w.bulk(v));
    Ok(())
}

pub(crate) fn hlen(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    w.len(x.read::<Hash>(a.at(1))?.map_or(0, |h| h.map.len()));
    Ok(())
}

pub(crate) fn hexists(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    w.int(i64::from(
        x.read::<Hash>(a.at(1))?.is_some_and(|h| h.map.contains_key(a.at(2))),
    ));
    Ok(())
}

pub(crate) fn hstrlen(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    w.len(
        x.read::<Hash>(a.at(1))?
            .and_then(|h| h.map.get(a.at(2)))
            .map_or(0, |v| v.len()),
    );
    Ok(())
}

pub(crate) fn hdel(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let key = a.at(1);
    let gone = x
        .edit::<Hash, _>(key, false, |h| a.iter().skip(2).filter(|f| h.remove(f)).count())?
        .unwrap_or(0);
    if gone > 0 {
        x.log.push_args(a);
        x.touch(key);
    }
    w.len(gone);
    Ok(())
}

fn replace(x: &mut Exec<'_>, key: &[u8], field: &[u8], value: &[u8]) -> Outcome {
    x.edit::<Hash, _>(key, true, |h| h.insert(field, value))?;
    x.log.push(&[b"HSET", key, field, value]);
    x.touch(key);
    Ok(())
}

pub(crate) fn hincrby(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let by = int(a.at(3))?;
    let old = match x.read::<Hash>(a.at(1))?.and_then(|h| h.map.get(a.at(2))) {
        Some(v) => parse_int(v).ok_or("ERR hash value is not an integer")?,
        None => 0,
    };
    let new = old.checked_add(by).ok_or("ERR increment or decrement would overflow")?;
    replace(x, a.at(1), a.at(2), itoa::Buffer::new().format(new).as_bytes())?;
    w.int(new);
    Ok(())
}

pub(crate) fn hincrbyfloat(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    // The increment is looked at before the key, as in Redis.
    match Extended::parse(a.at(3)).ok_or(NOT_FLOAT)? {
        ParsedExtended::Infinite => return Err("ERR value is NaN or Infinity".into()),
        ParsedExtended::Finite(_) => {}
    }
    let sum = float_sum(
        x.read::<Hash>(a.at(1))?
            .and_then(|h| h.map.get(a.at(2)))
            .map(AsRef::as_ref),
        a.at(3),
        "ERR hash value is not a float",
    )?;
    replace(x, a.at(1), a.at(2), sum.as_bytes())?;
    w.bulk(sum.as_bytes());
    Ok(())
}

pub(crate) fn hscan(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let scan = Scan::parse(a, 2)?;
    match x.read::<Hash>(a.at(1))? {
        Some(h) => scan.page(h.map.len(), w, true, |i| {
            h.map.get_index(i).map(|(f, v)| (f.as_ref(), v.to_vec()))
        }),
        None => Scan::nothing(w),
    }
    Ok(())
}

/// Places for a command that draws `count` of `len`: distinct when positive, with repetition when negative.
pub(crate) fn draw(len: usize, count: i64) -> Vec<usize> {
    let mut rng = rand::rng();
    if len == 0 {
        return Vec::new();
    }
    if count < 0 {
        return (0..count.unsigned_abs()).map(|_| rng.random_range(0..len)).collect();
    }
    let n = usize::try_from(count).unwrap_or(usize::MAX).min(len);
    rand::seq::index::sample(&mut rng, len, n).into_vec()
}

/// The largest number of random draws with repetition in one command: each is in the reply, so it bounds the reply.
pub(crate) const MAX_DRAWS: i64 = 1_000_000;

pub(crate) fn hrandfield(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let h = x.read::<Hash>(a.at(1))?;
    if a.len() == 2 {
        let field = h.and_then(|h| h.map.get_index(draw(h.map.len(), 1).first().copied()?));
        w.bulk_or_null(field.map(|(f, _)| f.as_ref()));
        return Ok(());
    }
    let values = a.len() == 4 && a.is(3, "WITHVALUES");
    if a.len() > 4 || (a.len() == 4 && !values) {
        return Err(SYNTAX.into());
    }
    let count = int(a.at(2))?;
    if count < -MAX_DRAWS {
        return Err("ERR value is out of range".into());
    }
    let places = draw(h.map_or(0, |h| h.map.len()), count);
    let nested = values && w.resp3;
    w.array(places.len() * if values && !nested { 2 } else { 1 });
    for (f, v) in places.into_iter().filter_map(|i| h.and_then(|h| h.map.get_index(i))) {
        if nested {
            w.array(2);
        }
        w.bulk(f);
        if values {
            w.bulk(v);
        }
    }
    Ok(())
}
