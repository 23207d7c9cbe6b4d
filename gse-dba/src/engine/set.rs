//! Set commands of the embedded store.

use super::db::{Exec, Outcome, Refusal, SYNTAX, int};
use super::hash::{MAX_DRAWS, draw};
use super::keys::Scan;
use super::list::positive;
use super::value::{Blob, Set, Value};
use crate::args::Args;
use crate::resp::write::Writer;

pub(crate) fn sadd(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let key = a.at(1);
    x.check::<Set>(key)?;
    let new = x
        .edit::<Set, _>(key, true, |s| a.iter().skip(2).filter(|m| s.insert(m)).count())?
        .unwrap_or(0);
    if new > 0 {
        x.log.push_args(a);
        x.touch(key);
    }
    w.len(new);
    Ok(())
}

pub(crate) fn srem(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let key = a.at(1);
    let gone = x
        .edit::<Set, _>(key, false, |s| a.iter().skip(2).filter(|m| s.remove(m)).count())?
        .unwrap_or(0);
    if gone > 0 {
        x.log.push_args(a);
        x.touch(key);
    }
    w.len(gone);
    Ok(())
}

pub(crate) fn smembers(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let s = x.read::<Set>(a.at(1))?;
    w.set(s.map_or(0, |s| s.set.len()));
    s.into_iter().flat_map(|s| &s.set).for_each(|m| w.bulk(m));
    Ok(())
}

pub(crate) fn sismember(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    w.int(i64::from(
        x.read::<Set>(a.at(1))?.is_some_and(|s| s.set.contains(a.at(2))),
    ));
    Ok(())
}

pub(crate) fn smismember(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let s = x.read::<Set>(a.at(1))?;
    w.array(a.len() - 2);
    a.iter()
        .skip(2)
        .for_each(|m| w.int(i64::from(s.is_some_and(|s| s.set.contains(m)))));
    Ok(())
}

pub(crate) fn scard(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    w.len(x.read::<Set>(a.at(1))?.map_or(0, |s| s.set.len()));
    Ok(())
}

pub(crate) fn spop(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let key = a.at(1);
    if a.len() > 3 {
        return Err(SYNTAX.into());
    }
    let count = if a.len() == 3 { Some(positive(a.at(2))?) } else { None };
    let there = x.check::<Set>(key)?;
    if !there || count == Some(0) {
        if count.is_some() {
            w.set(0)
        } else {
            w.null()
        }
        return Ok(());
    }
    let gone: Vec<Blob> = x
        .edit::<Set, _>(key, false, |s| {
            use rand::RngExt as _;
            let mut rng = rand::rng();
            (0..count.unwrap_or(1).min(s.set.len()))
                .filter_map(|_| s.remove_at(rng.random_range(0..s.set.len())))
                .collect()
        })?
        .unwrap_or_default();
    // What was drawn is what is logged: the draw itself could not be repeated.
    x.log.push_many(b"SREM", key, gone.iter().map(AsRef::as_ref));
    x.touch(key);
    if count.is_some() {
        w.set(gone.len());
    }
    gone.iter().for_each(|m| w.bulk(m));
    Ok(())
}

pub(crate) fn srandmember(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    if a.len() > 3 {
        return Err(SYNTAX.into());
    }
    let count = if a.len() == 3 { Some(int(a.at(2))?) } else { None };
    if count.is_some_and(|c| c < -MAX_DRAWS) {
        return Err("ERR value is out of range".into());
    }
    let s = x.read::<Set>(a.at(1))?;
    let places = draw(s.map_or(0, |s| s.set.len()), count.unwrap_or(1));
    let member = |i: usize| s.and_then(|s| s.set.get_index(i)).map(AsRef::as_ref);
    match count {
        None => w.bulk_or_null(places.first().and_then(|i| member(*i))),
        Some(_) => {
            w.array(places.len());
            places.into_iter().filter_map(member).for_each(|m| w.bulk(m));
        }
    }
    Ok(())
}

pub(crate) fn smove(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let (from, to, member) = (a.at(1), a.at(2), a.at(3));
    if !x.live(from) {
        w.int(0);
        return Ok(());
    }
    let here = x.read::<Set>(from)?.is_some_and(|s| s.set.contains(member));
    x.check::<Set>(to)?;
    if !here || from == to {
        w.int(i64::from(here));
        return Ok(());
    }
    x.edit::<Set, _>(from, false, |s| s.remove(member))?;
    x.edit::<Set, _>(to, true, |s| s.insert(member))?;
    x.log.push_args(a);
    x.touch(from);
    x.touch(to);
    w.int(1);
    Ok(())
}

#[derive(Clone, Copy, PartialEq)]
enum Op {
    Inter,
    Union,
    Diff,
}

fn combine(x: &mut Exec<'_>, keys: Args<'_>, op: Op, limit: usize) -> Result<Vec<Blob>, Refusal> {
    // Every key is looked at first: one of another kind refuses even when the answer is plain without it.
    let mut missing = false;
    for key in keys.iter() {
        missing |= !x.check::<Set>(key)?;
    }
    let db = &*x.db;
    let get = |key: &[u8]| {
        db.map.get(key).and_then(|e| {
            if let Value::Set(s) = &e.value {
                Some(&s.set)
            } else {
                None
            }
        })
    };
    let sets: Vec<_> = keys.iter().map(get).collect();
    Ok(match op {
        Op::Inter if missing => Vec::new(),
        Op::Inter => {
            let mut sets: Vec<_> = sets.into_iter().flatten().collect();
            sets.sort_by_key(|s| s.len());
            let Some((smallest, others)) = sets.split_first() else {
                return Ok(Vec::new());
            };
            smallest
                .iter()
                .filter(|m| others.iter().all(|s| s.contains(m.as_ref())))
                .take(limit)
                .cloned()
                .collect()
        }
        Op::Union => {
            let mut all: indexmap::IndexSet<&Blob, ahash::RandomState> = indexmap::IndexSet::default();
            sets.into_iter().flatten().for_each(|s| all.extend(s.iter()));
            all.into_iter().cloned().collect()
        }
        Op::Diff => {
            let Some((first, others)) = sets.split_first() else {
                return Ok(Vec::new());
            };
            let Some(first) = first else { return Ok(Vec::new()) };
            first
                .iter()
                .filter(|m| !others.iter().flatten().any(|s| s.contains(m.as_ref())))
                .cloned()
                .collect()
        }
    })
}

fn reply(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer, op: Op) -> Outcome {
    let members = combine(x, a.from(1), op, usize::MAX)?;
    w.set(members.len());
    members.iter().for_each(|m| w.bulk(m));
    Ok(())
}

fn store(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer, op: Op) -> Outcome {
    let key = a.at(1);
    let members = combine(x, a.from(2), op, usize::MAX)?;
    if members.is_empty() {
        x.delete(key);
    } else {
        x.live(key);
        let mut set = Set::default();
        members.iter().for_each(|m| {
            set.insert(m);
        });
        x.put(key, Value::Set(set), 0);
        x.log.push(&[b"DEL", key]);
        x.log.push_many(b"SADD", key, members.iter().map(AsRef::as_ref));
    }
    w.len(members.len());
    Ok(())
}

pub(crate) fn sinter(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    reply(x, a, w, Op::Inter)
}

pub(crate) fn sunion(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    reply(x, a, w, Op::Union)
}

pub(crate) fn sdiff(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    reply(x, a, w, Op::Diff)
}

pub(crate) fn sinterstore(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    store(x, a, w, Op::Inter)
}

pub(crate) fn sunionstore(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    store(x, a, w, Op::Union)
}

pub(crate) fn sdiffstore(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    store(x, a, w, Op::Diff)
}

/// The span of keys in a command of the form `NAME numkeys key... [options]`, whose count stands at `at`.
pub(crate) fn counted(a: Args<'_>, at: usize) -> Result<usize, Refusal> {
    let n = super::numbers::parse_int(a.at(at))
        .filter(|n| *n > 0)
        .ok_or("ERR numkeys should be greater than 0")?;
    match usize::try_from(n) {
        Ok(n) if n < a.len() - at => Ok(n),
        _ => Err("ERR Number of keys can't be greater than number of args".into()),
    }
}

pub(crate) fn sintercard(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let n = counted(a, 1)?;
    let mut limit = 0;
    let mut i = 2 + n;
    while i < a.len() {
        if !a.is(i, "LIMIT") || i + 1 >= a.len() {
            return Err(SYNTAX.into());
        }
        limit = super::numbers::parse_int(a.at(i + 1))
            .filter(|n| *n >= 0)
            .ok_or("ERR LIMIT can't be negative")?;
        i += 2;
    }
    let limit = if limit == 0 { usize::MAX } else { limit as usize };
    let keys = a.first(2 + n).from(2);
    let len = combine(x, keys, Op::Inter, limit)?.len();
    w.len(len);
    Ok(())
}

pub(crate) fn sscan(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let scan = Scan::parse(a, 2)?;
    match x.read::<Set>(a.at(1))? {
        Some(s) => scan.page(s.set.len(), w, false, |i| {
            s.set.get_index(i).map(|m| (m.as_ref(), Vec::new()))
        }),
        None => Scan::nothing(w),
    }
    Ok(())
}
