//! Sorted set commands of the embedded store: members and scores. Ranges are in `zrange`.

use super::db::{Exec, Outcome, Refusal, SYNTAX, float};
use super::keys::Scan;
use super::list::positive;
use super::numbers::format_double;
use super::set::counted;
use super::value::{Value, Zset};
use crate::args::Args;
use crate::resp::write::Writer;

fn log_add(x: &mut Exec<'_>, key: &[u8], changed: &[(f64, &[u8])]) {
    let scores: Vec<String> = changed.iter().map(|(s, _)| format_double(*s)).collect();
    let parts: Vec<&[u8]> = scores
        .iter()
        .zip(changed)
        .flat_map(|(s, (_, m))| [s.as_bytes(), *m])
        .collect();
    x.log.push_many(b"ZADD", key, parts.into_iter());
}

#[derive(Clone, Copy, Default)]
struct AddOptions {
    nx: bool,
    xx: bool,
    gt: bool,
    lt: bool,
    ch: bool,
    incr: bool,
}

pub(crate) fn zadd(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let mut o = AddOptions::default();
    let mut i = 2;
    while i < a.len() {
        match a.at(i).to_ascii_uppercase().as_slice() {
            b"NX" => o.nx = true,
            b"XX" => o.xx = true,
            b"GT" => o.gt = true,
            b"LT" => o.lt = true,
            b"CH" => o.ch = true,
            b"INCR" => o.incr = true,
            _ => break,
        }
        i += 1;
    }
    let rest = a.from(i);
    if rest.len() == 0 || !rest.len().is_multiple_of(2) {
        return Err(SYNTAX.into());
    }
    if o.nx && o.xx {
        return Err("ERR XX and NX options at the same time are not compatible".into());
    }
    if (o.gt && o.lt) || (o.nx && (o.gt || o.lt)) {
        return Err("ERR GT, LT, and/or NX options at the same time are not compatible".into());
    }
    if o.incr && rest.len() > 2 {
        return Err("ERR INCR option supports a single increment-element pair".into());
    }
    add(x, a.at(1), rest, o, w)
}

fn add(x: &mut Exec<'_>, key: &[u8], pairs: Args<'_>, o: AddOptions, w: &mut Writer) -> Outcome {
    let mut scores = Vec::with_capacity(pairs.len() / 2);
    for i in (0..pairs.len()).step_by(2) {
        scores.push((float(pairs.at(i))?, pairs.at(i + 1)));
    }
    let current = x.read::<Zset>(key)?;
    if o.incr
        && let (Some((by, member)), Some(z)) = (scores.first().copied(), current)
        && z.score(member).is_some_and(|s| (s + by).is_nan())
    {
        return Err("ERR resulting score is not a number (NaN)".into());
    }
    if current.is_none() && o.xx {
        if o.incr {
            w.null()
        } else {
            w.int(0)
        }
        return Ok(());
    }
    let (mut added, mut updated, mut result) = (0, 0, None);
    let mut changed: Vec<(f64, &[u8])> = Vec::new();
    x.edit::<Zset, _>(key, true, |z| {
        for (score, member) in scores {
            match z.score(member) {
                None if o.xx => {}
                None => {
                    z.insert(member, score);
                    added += 1;
                    result = Some(score);
                    changed.push((score, member));
                }
                Some(_) if o.nx => {}
                Some(old) => {
                    let new = if o.incr { old + score } else { score };
                    if (o.gt && new <= old) || (o.lt && new >= old) {
                        continue;
                    }
                    result = Some(new);
                    if new != old {
                        z.insert(member, new);
                        updated += 1;
                        changed.push((new, member));
                    }
                }
            }
        }
    })?;
    if !changed.is_empty() {
        log_add(x, key, &changed);
        x.touch(key);
    }
    if o.incr {
        match result {
            Some(s) => w.double(s),
            None => w.null(),
        }
    } else {
        w.int(if o.ch { added + updated } else { added });
    }
    Ok(())
}

pub(crate) fn zincrby(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    add(
        x,
        a.at(1),
        a.from(2),
        AddOptions {
            incr: true,
            ..AddOptions::default()
        },
        w,
    )
}

pub(crate) fn zrem(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let key = a.at(1);
    let gone = x
        .edit::<Zset, _>(key, false, |z| {
            a.iter().skip(2).filter(|m| z.remove(m).is_some()).count()
        })?
        .unwrap_or(0);
    if gone > 0 {
        x.log.push_args(a);
        x.touch(key);
    }
    w.len(gone);
    Ok(())
}

pub(crate) fn zscore(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    match x.read::<Zset>(a.at(1))?.and_then(|z| z.score(a.at(2))) {
        Some(s) => w.double(s),
        None => w.null(),
    }
    Ok(())
}

pub(crate) fn zmscore(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let z = x.read::<Zset>(a.at(1))?;
    w.array(a.len() - 2);
    for m in a.iter().skip(2) {
        match z.and_then(|z| z.score(m)) {
            Some(s) => w.double(s),
            None => w.null(),
        }
    }
    Ok(())
}

pub(crate) fn zcard(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    w.len(x.read::<Zset>(a.at(1))?.map_or(0, |z| z.scores.len()));
    Ok(())
}

fn rank(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer, reverse: bool) -> Outcome {
    match x.read::<Zset>(a.at(1))?.and_then(|z| {
        z.rank(a.at(2))
            .map(|r| if reverse { z.scores.len() - 1 - r } else { r })
    }) {
        Some(r) => w.len(r),
        None => w.null(),
    }
    Ok(())
}

pub(crate) fn zrank(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    rank(x, a, w, false)
}

pub(crate) fn zrevrank(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    rank(x, a, w, true)
}

fn pop(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer, max: bool, name: &str) -> Outcome {
    let key = a.at(1);
    if a.len() > 3 {
        return Err(format!("ERR wrong number of arguments for '{name}' command").into());
    }
    let count = if a.len() == 3 { Some(positive(a.at(2))?) } else { None };
    if !x.check::<Zset>(key)? || count == Some(0) {
        w.array(0);
        return Ok(());
    }
    let gone: Vec<_> = x
        .edit::<Zset, _>(key, false, |z| {
            let n = count.unwrap_or(1).min(z.order.len());
            let gone: Vec<_> = if max {
                z.order.range_rev(z.order.len() - n, z.order.len()).cloned().collect()
            } else {
                z.order.range(0, n).cloned().collect()
            };
            gone.iter().for_each(|(_, m)| {
                z.remove(m);
            });
            gone
        })?
        .unwrap_or_default();
    x.log.push_many(b"ZREM", key, gone.iter().map(|(_, m)| m.as_ref()));
    x.touch(key);
    let nested = w.resp3 && count.is_some();
    w.array(if nested { gone.len() } else { gone.len() * 2 });
    for (score, member) in gone {
        if nested {
            w.array(2);
        }
        w.bulk(&member);
        w.double(score);
    }
    Ok(())
}

pub(crate) fn zpopmin(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    pop(x, a, w, false, "zpopmin")
}

pub(crate) fn zpopmax(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    pop(x, a, w, true, "zpopmax")
}

pub(crate) fn zscan(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let scan = Scan::parse(a, 2)?;
    match x.read::<Zset>(a.at(1))? {
        Some(z) => scan.page(z.scores.len(), w, true, |i| {
            z.scores
                .get_index(i)
                .map(|(m, s)| (m.as_ref(), format_double(*s).into_bytes()))
        }),
        None => Scan::nothing(w),
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Aggregate {
    Sum,
    Min,
    Max,
}

impl Aggregate {
    fn join(self, a: f64, b: f64) -> f64 {
        match self {
            // Opposite infinities make zero, as in Redis.
            Aggregate::Sum => Some(a + b).filter(|s| !s.is_nan()).unwrap_or(0.0),
            Aggregate::Min => a.min(b),
            Aggregate::Max => a.max(b),
        }
    }
}

/// Members and their scores.
type Members = Vec<(Vec<u8>, f64)>;

/// A source of ZUNIONSTORE and its kin: a sorted set, or a set whose members all score 1.
fn source(x: &mut Exec<'_>, key: &[u8]) -> Result<Option<Members>, Refusal> {
    match x.entry(key).map(|e| &e.value) {
        None => Ok(None),
        Some(Value::Zset(z)) => Ok(Some(z.scores.iter().map(|(m, s)| (m.to_vec(), *s)).collect())),
        Some(Value::Set(s)) => Ok(Some(s.set.iter().map(|m| (m.to_vec(), 1.0)).collect())),
        Some(_) => Err(super::db::WRONG_TYPE.into()),
    }
}

fn store(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer, inter: bool, name: &str) -> Outcome {
    let n = match super::numbers::parse_int(a.at(2)) {
        None => return Err(super::db::NOT_INT.into()),
        Some(n) if n < 1 => return Err(format!("ERR at least 1 input key is needed for '{name}' command").into()),
        Some(_) => counted(a, 2).map_err(|_| Refusal::from(SYNTAX))?,
    };
    let mut sources = Vec::with_capacity(n);
    for key in a.first(3 + n).from(3).iter() {
        sources.push(source(x, key)?);
    }
    let mut weights = vec![1.0; n];
    let mut aggregate = Aggregate::Sum;
    let mut i = 3 + n;
    while i < a.len() {
        if a.is(i, "WEIGHTS") && i + n < a.len() {
            for (k, weight) in weights.iter_mut().enumerate() {
                *weight = super::numbers::parse_double(a.at(i + 1 + k)).ok_or("ERR weight value is not a float")?;
            }
            i += n + 1;
        } else if a.is(i, "AGGREGATE") && i + 1 < a.len() {
            aggregate = if a.is(i + 1, "SUM") {
                Aggregate::Sum
            } else if a.is(i + 1, "MIN") {
                Aggregate::Min
            } else if a.is(i + 1, "MAX") {
                Aggregate::Max
            } else {
                return Err(SYNTAX.into());
            };
            i += 2;
        } else {
            return Err(SYNTAX.into());
        }
    }
    let weigh = |s: f64, weight: f64| Some(s * weight).filter(|s| !s.is_nan()).unwrap_or(0.0);
    let mut sums: indexmap::IndexMap<Vec<u8>, (f64, usize), ahash::RandomState> = indexmap::IndexMap::default();
    for (k, source) in sources.into_iter().enumerate() {
        for (member, score) in source.into_iter().flatten() {
            let score = weigh(score, weights[k]);
            sums.entry(member)
                .and_modify(|(s, seen)| (*s, *seen) = (aggregate.join(*s, score), *seen + 1))
                .or_insert((score, 1));
        }
    }
    let mut zset = Zset::default();
    for (member, (score, seen)) in &sums {
        if !inter || *seen == n {
            zset.insert(member, *score);
        }
    }
    let (key, len) = (a.at(1), zset.scores.len());
    if len == 0 {
        x.delete(key);
    } else {
        x.live(key);
        x.log.push(&[b"DEL", key]);
        let pairs: Vec<(f64, &[u8])> = zset.scores.iter().map(|(m, s)| (*s, m.as_ref())).collect();
        log_add(x, key, &pairs);
        drop(pairs);
        x.put(key, Value::Zset(zset), 0);
    }
    w.len(len);
    Ok(())
}

pub(crate) fn zunionstore(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    store(x, a, w, false, "zunionstore")
}

pub(crate) fn zinterstore(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    store(x, a, w, true, "zinterstore")
}
