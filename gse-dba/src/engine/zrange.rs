//! Ranges of sorted sets: by rank, by score, by name; shown, counted, removed or stored.

use super::db::{Exec, Outcome, Refusal, SYNTAX, int, slice};
use super::numbers::parse_double;
use super::value::{Value, Zset};
use crate::args::Args;
use crate::resp::write::Writer;

/// What a range is of, with its two ends.
enum By {
    Rank(i64, i64),
    Score(Bound, Bound),
    Lex(LexBound, LexBound),
}

#[derive(Clone, Copy)]
struct Bound {
    value: f64,
    exclusive: bool,
}

enum LexBound {
    Lowest,
    Highest,
    At(Vec<u8>, bool),
}

impl Bound {
    fn parse(arg: &[u8]) -> Result<Self, Refusal> {
        let (text, exclusive) = match arg {
            [b'(', rest @ ..] => (rest, true),
            all => (all, false),
        };
        let value = parse_double(text).ok_or("ERR min or max is not a float")?;
        Ok(Self { value, exclusive })
    }
}

impl LexBound {
    fn parse(arg: &[u8]) -> Result<Self, Refusal> {
        match arg {
            b"-" => Ok(LexBound::Lowest),
            b"+" => Ok(LexBound::Highest),
            [b'[', rest @ ..] => Ok(LexBound::At(rest.to_vec(), false)),
            [b'(', rest @ ..] => Ok(LexBound::At(rest.to_vec(), true)),
            _ => Err("ERR min or max not valid string range item".into()),
        }
    }
}

impl By {
    fn score(min: &[u8], max: &[u8]) -> Result<Self, Refusal> {
        Ok(By::Score(Bound::parse(min)?, Bound::parse(max)?))
    }

    fn lex(min: &[u8], max: &[u8]) -> Result<Self, Refusal> {
        Ok(By::Lex(LexBound::parse(min)?, LexBound::parse(max)?))
    }

    /// The ranks from and up to which pairs belong to the range. `reverse` matters to ranks alone: they then count from the end.
    fn ranks(&self, z: &Zset, reverse: bool) -> (usize, usize) {
        let (from, to) = match self {
            By::Rank(start, stop) => {
                let len = z.order.len();
                let (from, to) = slice(len, *start, *stop);
                if reverse { (len - to, len - from) } else { (from, to) }
            }
            By::Score(min, max) => {
                let from = z.order.count_below(|p| {
                    if min.exclusive {
                        p.0 <= min.value
                    } else {
                        p.0 < min.value
                    }
                });
                let to = z.order.count_below(|p| {
                    if max.exclusive {
                        p.0 < max.value
                    } else {
                        p.0 <= max.value
                    }
                });
                (from, to)
            }
            By::Lex(min, max) => {
                let from = match min {
                    LexBound::Lowest => 0,
                    LexBound::Highest => z.order.len(),
                    LexBound::At(m, exclusive) => z.order.count_below(|p| {
                        if *exclusive {
                            p.1.as_ref() <= m.as_slice()
                        } else {
                            p.1.as_ref() < m.as_slice()
                        }
                    }),
                };
                let to = match max {
                    LexBound::Lowest => 0,
                    LexBound::Highest => z.order.len(),
                    LexBound::At(m, exclusive) => z.order.count_below(|p| {
                        if *exclusive {
                            p.1.as_ref() < m.as_slice()
                        } else {
                            p.1.as_ref() <= m.as_slice()
                        }
                    }),
                };
                (from, to)
            }
        };
        (from, to.max(from))
    }
}

struct Range {
    by: By,
    reverse: bool,
    /// Offset and count; a negative count is no limit.
    limit: Option<(i64, i64)>,
    scores: bool,
}

impl Range {
    fn pairs<'z>(&self, z: &'z Zset) -> Vec<&'z super::ranked::Pair> {
        let (mut from, mut to) = self.by.ranks(z, self.reverse);
        if let Some((offset, count)) = self.limit {
            if offset < 0 {
                return Vec::new();
            }
            let offset = usize::try_from(offset).unwrap_or(usize::MAX).min(to - from);
            let count = if count < 0 { usize::MAX } else { count as usize };
            let count = count.min(to - from - offset);
            if self.reverse {
                to -= offset;
                from = to - count;
            } else {
                from += offset;
                to = from + count;
            }
        }
        if self.reverse {
            z.order.range_rev(from, to).collect()
        } else {
            z.order.range(from, to).collect()
        }
    }

    fn show(&self, x: &mut Exec<'_>, key: &[u8], w: &mut Writer) -> Outcome {
        let Some(z) = x.read::<Zset>(key)? else {
            w.array(0);
            return Ok(());
        };
        let pairs = self.pairs(z);
        let nested = self.scores && w.resp3;
        w.array(pairs.len() * if self.scores && !nested { 2 } else { 1 });
        for (score, member) in pairs {
            if nested {
                w.array(2);
            }
            w.bulk(member);
            if self.scores {
                w.double(*score);
            }
        }
        Ok(())
    }
}

/// The kinds of options that the older, special commands take.
#[derive(Clone, Copy, PartialEq)]
enum Style {
    Any,
    Rank,
    Score,
    Lex,
}

/// Parses `min max [options]` that begin at `at`.
fn parse(a: Args<'_>, at: usize, style: Style, reverse: bool, store: bool) -> Result<Range, Refusal> {
    let (mut style_now, mut reverse, mut limit, mut scores) = (style, reverse, None, false);
    let mut i = at + 2;
    while i < a.len() {
        if !store && a.is(i, "WITHSCORES") {
            scores = true;
        } else if a.is(i, "LIMIT") && i + 2 < a.len() {
            limit = Some((int(a.at(i + 1))?, int(a.at(i + 2))?));
            i += 2;
        } else if style == Style::Any && a.is(i, "REV") {
            reverse = true;
        } else if style == Style::Any && a.is(i, "BYSCORE") {
            style_now = Style::Score;
        } else if style == Style::Any && a.is(i, "BYLEX") {
            style_now = Style::Lex;
        } else {
            return Err(SYNTAX.into());
        }
        i += 1;
    }
    if limit.is_some() && matches!(style_now, Style::Any | Style::Rank) {
        return Err("ERR syntax error, LIMIT is only supported in combination with either BYSCORE or BYLEX".into());
    }
    if scores && style_now == Style::Lex {
        return Err("ERR syntax error, WITHSCORES not supported in combination with BYLEX".into());
    }
    let (mut min, mut max) = (a.at(at), a.at(at + 1));
    if reverse && matches!(style_now, Style::Score | Style::Lex) {
        std::mem::swap(&mut min, &mut max);
    }
    let by = match style_now {
        Style::Any | Style::Rank => By::Rank(int(min)?, int(max)?),
        Style::Score => By::score(min, max)?,
        Style::Lex => By::lex(min, max)?,
    };
    Ok(Range {
        by,
        reverse,
        limit,
        scores,
    })
}

pub(crate) fn zrange(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    parse(a, 2, Style::Any, false, false)?.show(x, a.at(1), w)
}

pub(crate) fn zrevrange(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    parse(a, 2, Style::Rank, true, false)?.show(x, a.at(1), w)
}

pub(crate) fn zrangebyscore(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    parse(a, 2, Style::Score, false, false)?.show(x, a.at(1), w)
}

pub(crate) fn zrevrangebyscore(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    parse(a, 2, Style::Score, true, false)?.show(x, a.at(1), w)
}

pub(crate) fn zrangebylex(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    parse(a, 2, Style::Lex, false, false)?.show(x, a.at(1), w)
}

pub(crate) fn zrevrangebylex(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    parse(a, 2, Style::Lex, true, false)?.show(x, a.at(1), w)
}

pub(crate) fn zrangestore(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    let range = parse(a, 3, Style::Any, false, true)?;
    let key = a.at(1);
    let pairs: Vec<(f64, Vec<u8>)> = x
        .read::<Zset>(a.at(2))?
        .map(|z| range.pairs(z).into_iter().map(|(s, m)| (*s, m.to_vec())).collect())
        .unwrap_or_default();
    if pairs.is_empty() {
        x.delete(key);
    } else {
        let mut zset = Zset::default();
        x.log.push(&[b"DEL", key]);
        for (score, member) in &pairs {
            zset.insert(member, *score);
            x.log
                .push(&[b"ZADD", key, super::numbers::format_double(*score).as_bytes(), member]);
        }
        x.put(key, Value::Zset(zset), 0);
    }
    w.len(pairs.len());
    Ok(())
}

fn count(x: &mut Exec<'_>, key: &[u8], by: &By, w: &mut Writer) -> Outcome {
    let n = x.read::<Zset>(key)?.map_or(0, |z| {
        let (from, to) = by.ranks(z, false);
        to - from
    });
    w.len(n);
    Ok(())
}

pub(crate) fn zcount(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    count(x, a.at(1), &By::score(a.at(2), a.at(3))?, w)
}

pub(crate) fn zlexcount(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    count(x, a.at(1), &By::lex(a.at(2), a.at(3))?, w)
}

fn remove(x: &mut Exec<'_>, key: &[u8], by: &By, w: &mut Writer) -> Outcome {
    let gone = x
        .edit::<Zset, _>(key, false, |z| {
            let (from, to) = by.ranks(z, false);
            let gone: Vec<_> = z.order.range(from, to).map(|p| std::sync::Arc::clone(&p.1)).collect();
            gone.iter().for_each(|m| {
                z.remove(m);
            });
            gone
        })?
        .unwrap_or_default();
    if !gone.is_empty() {
        x.log.push_many(b"ZREM", key, gone.iter().map(AsRef::as_ref));
        x.touch(key);
    }
    w.len(gone.len());
    Ok(())
}

pub(crate) fn zremrangebyrank(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    remove(x, a.at(1), &By::Rank(int(a.at(2))?, int(a.at(3))?), w)
}

pub(crate) fn zremrangebyscore(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    remove(x, a.at(1), &By::score(a.at(2), a.at(3))?, w)
}

pub(crate) fn zremrangebylex(x: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    remove(x, a.at(1), &By::lex(a.at(2), a.at(3))?, w)
}
