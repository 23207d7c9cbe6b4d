//! List commands of the embedded store.

use super::db::{Exec, NO_KEY, OUT_OF_RANGE, Outcome, Refusal, SYNTAX, int, slice};
use super::value::List;
use crate::args::Args;
use crate::resp::write::Writer;

fn push(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer, left: bool, create: bool) -> Outcome {
    let key = a.at(1);
    x.check::<List>(key)?;
    let len = x.edit::<List, _>(key, create, |l| {
        a.iter().skip(2).for_each(|i| l.push(left, i));
        l.items.len()
    })?;
    if len.is_some() {
        x.log.push_args(a);
        x.touch(key);
    }
    w.len(len.unwrap_or(0));
    Ok(())
}

pub(crate) fn lpush(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    push(x, a, w, true, true)
}

pub(crate) fn rpush(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    push(x, a, w, false, true)
}

pub(crate) fn lpushx(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    push(x, a, w, true, false)
}

pub(crate) fn rpushx(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    push(x, a, w, false, false)
}

fn pop(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer, left: bool, name: &str) -> Outcome {
    let key = a.at(1);
    if a.len() > 3 {
        return Err(format!("ERR wrong number of arguments for '{name}' command").into());
    }
    let count = match a.len() {
        3 => Some(positive(a.at(2))?),
        _ => None,
    };
    if !x.check::<List>(key)? {
        if count.is_some() {
            w.null_array()
        } else {
            w.null()
        }
        return Ok(());
    }
    if count == Some(0) {
        w.array(0);
        return Ok(());
    }
    let gone: Vec<_> = x
        .edit::<List, _>(key, false, |l| {
            (0..count.unwrap_or(1).min(l.items.len()))
                .filter_map(|_| l.pop(left))
                .collect()
        })?
        .unwrap_or_default();
    x.log.push(&[
        if left { b"LPOP" } else { b"RPOP" },
        key,
        gone.len().to_string().as_bytes(),
    ]);
    x.touch(key);
    if count.is_some() {
        w.array(gone.len());
    }
    gone.iter().for_each(|i| w.bulk(i));
    Ok(())
}

/// A count that must not be negative.
pub(crate) fn positive(arg: &[u8]) -> Result<usize, Refusal> {
    match super::numbers::parse_int(arg) {
        Some(n) if n >= 0 => Ok(n as usize),
        _ => Err("ERR value is out of range, must be positive".into()),
    }
}

pub(crate) fn lpop(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    pop(x, a, w, true, "lpop")
}

pub(crate) fn rpop(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    pop(x, a, w, false, "rpop")
}

pub(crate) fn lrange(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let (start, stop) = (int(a.at(2))?, int(a.at(3))?);
    let Some(l) = x.read::<List>(a.at(1))? else {
        w.array(0);
        return Ok(());
    };
    let (from, to) = slice(l.items.len(), start, stop);
    w.array(to - from);
    l.items.range(from..to).for_each(|i| w.bulk(i));
    Ok(())
}

pub(crate) fn llen(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    w.len(x.read::<List>(a.at(1))?.map_or(0, |l| l.items.len()));
    Ok(())
}

fn place(len: usize, i: i64) -> Option<usize> {
    let i = if i < 0 { i.checked_add(len as i64)? } else { i };
    usize::try_from(i).ok().filter(|i| *i < len)
}

pub(crate) fn lindex(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let Some(l) = x.read::<List>(a.at(1))? else {
        w.null();
        return Ok(());
    };
    let i = int(a.at(2))?;
    w.bulk_or_null(place(l.items.len(), i).and_then(|i| l.items.get(i)).map(AsRef::as_ref));
    Ok(())
}

pub(crate) fn lset(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let key = a.at(1);
    let len = x.read::<List>(key)?.ok_or(NO_KEY)?.items.len();
    let i = place(len, int(a.at(2))?).ok_or(OUT_OF_RANGE)?;
    x.edit::<List, _>(key, false, |l| l.set(i, a.at(3)))?;
    x.log.push_args(a);
    x.touch(key);
    w.ok();
    Ok(())
}

pub(crate) fn lrem(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let key = a.at(1);
    let count = int(a.at(2))?;
    let limit = if count == 0 {
        usize::MAX
    } else {
        usize::try_from(count.unsigned_abs()).unwrap_or(usize::MAX)
    };
    let gone = x
        .edit::<List, _>(key, false, |l| l.remove_equal(a.at(3), limit, count >= 0))?
        .unwrap_or(0);
    if gone > 0 {
        x.log.push_args(a);
        x.touch(key);
    }
    w.len(gone);
    Ok(())
}

pub(crate) fn ltrim(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let key = a.at(1);
    let (start, stop) = (int(a.at(2))?, int(a.at(3))?);
    let changed = x.edit::<List, _>(key, false, |l| {
        let (from, to) = slice(l.items.len(), start, stop);
        l.keep(from, to);
    })?;
    if changed.is_some() {
        x.log.push_args(a);
        x.touch(key);
    }
    w.ok();
    Ok(())
}

pub(crate) fn linsert(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let after = a.is(2, "AFTER");
    if !after && !a.is(2, "BEFORE") {
        return Err(SYNTAX.into());
    }
    let key = a.at(1);
    let Some(l) = x.read::<List>(key)? else {
        w.int(0);
        return Ok(());
    };
    let Some(i) = l.items.iter().position(|i| i.as_ref() == a.at(3)) else {
        w.int(-1);
        return Ok(());
    };
    let len = x.edit::<List, _>(key, false, |l| {
        l.insert(i + usize::from(after), a.at(4));
        l.items.len()
    })?;
    x.log.push_args(a);
    x.touch(key);
    w.len(len.unwrap_or(0));
    Ok(())
}

pub(crate) fn lpos(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let (mut rank, mut count, mut maxlen) = (1, None, 0);
    let mut i = 3;
    while i < a.len() {
        if i + 1 >= a.len() {
            return Err(SYNTAX.into());
        }
        if a.is(i, "RANK") {
            rank = int(a.at(i + 1))?;
            if rank == 0 {
                return Err("ERR RANK can't be zero: use 1 to start from the first match, 2 from the second ... or use negative to start from the end of the list".into());
            }
        } else if a.is(i, "COUNT") {
            count = Some(
                super::numbers::parse_int(a.at(i + 1))
                    .filter(|n| *n >= 0)
                    .ok_or("ERR COUNT can't be negative")? as usize,
            );
        } else if a.is(i, "MAXLEN") {
            maxlen = super::numbers::parse_int(a.at(i + 1))
                .filter(|n| *n >= 0)
                .ok_or("ERR MAXLEN can't be negative")? as usize;
        } else {
            return Err(SYNTAX.into());
        }
        i += 2;
    }
    let Some(l) = x.read::<List>(a.at(1))? else {
        if count.is_some() {
            w.array(0)
        } else {
            w.null()
        }
        return Ok(());
    };
    let len = l.items.len();
    let wanted = match count {
        Some(0) => usize::MAX,
        Some(n) => n,
        None => 1,
    };
    // Redis negates the lowest number to itself and so skips nothing for it.
    let skip = if rank == i64::MIN {
        0
    } else {
        (rank.unsigned_abs() - 1) as usize
    };
    let window = if maxlen == 0 { len } else { maxlen.min(len) };
    let hit = |i: &usize| l.items.get(*i).is_some_and(|x| x.as_ref() == a.at(2));
    let found: Vec<usize> = if rank > 0 {
        (0..window).filter(hit).skip(skip).take(wanted).collect()
    } else {
        (len - window..len).rev().filter(hit).skip(skip).take(wanted).collect()
    };
    match count {
        Some(_) => {
            w.array(found.len());
            found.into_iter().for_each(|i| w.len(i));
        }
        None => match found.first() {
            Some(i) => w.len(*i),
            None => w.null(),
        },
    }
    Ok(())
}

fn shift(x: &mut Exec<'_>, from: &[u8], to: &[u8], from_left: bool, to_left: bool, w: &mut Writer) -> Outcome {
    if !x.check::<List>(from)? {
        w.null();
        return Ok(());
    }
    x.check::<List>(to)?;
    // On one key the list must not vanish between the two halves: its expiry stays with it.
    let item = if from == to {
        x.edit::<List, _>(from, false, |l| {
            let item = l.pop(from_left)?;
            l.push(to_left, &item);
            Some(item)
        })?
        .flatten()
    } else {
        let item = x.edit::<List, _>(from, false, |l| l.pop(from_left))?.flatten();
        if let Some(item) = &item {
            x.edit::<List, _>(to, true, |l| l.push(to_left, item))?;
        }
        item
    };
    let Some(item) = item else {
        w.null();
        return Ok(());
    };
    let side = |left: bool| if left { &b"LEFT"[..] } else { &b"RIGHT"[..] };
    x.log.push(&[b"LMOVE", from, to, side(from_left), side(to_left)]);
    x.touch(from);
    x.touch(to);
    w.bulk(&item);
    Ok(())
}

pub(crate) fn lmove(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let side = |i: usize| {
        if a.is(i, "LEFT") {
            Ok(true)
        } else if a.is(i, "RIGHT") {
            Ok(false)
        } else {
            Err(Refusal::from(SYNTAX))
        }
    };
    shift(x, a.at(1), a.at(2), side(3)?, side(4)?, w)
}

pub(crate) fn rpoplpush(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    shift(x, a.at(1), a.at(2), false, true, w)
}
