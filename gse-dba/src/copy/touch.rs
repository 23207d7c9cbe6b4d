//! What a command may change, as a pure function of its words. Where it is not known which words are keys, every word counts as one: a mark on a name that is no key
//! costs a look and changes nothing.

use crate::args::Args;
use crate::commands::{Run, SUBSCRIBES, Spec};
use crate::sharded::route;

/// What a command may change.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Touch<'a> {
    /// Nothing.
    None,
    /// These keys, in any way.
    Keys(Vec<&'a [u8]>),
    /// These elements of these keys (a hash, a set or a sorted set), if they are that at all.
    Elements(Vec<&'a [u8]>, Vec<&'a [u8]>),
    /// All keys are gone.
    All,
    /// Any key.
    Unknown,
}

/// A word longer than this is not taken for a key where keys are not known.
const LONGEST: usize = 64 * 1024;

/// Commands beyond the table whose only key is the first word.
static FIRST: &[&str] = &[
    "BITFIELD",
    "GEOADD",
    "PFADD",
    "RESTORE",
    "SETBIT",
    "XACK",
    "XAUTOCLAIM",
    "XCLAIM",
    "XDEL",
    "XSETID",
    "XTRIM",
    "XADD",
];

/// What a command may change.
pub(crate) fn of<'a>(spec: Option<&'static Spec>, a: Args<'a>) -> Touch<'a> {
    if !route::writes(spec, a)
        || spec.is_some_and(|s| s.is(SUBSCRIBES) || matches!(s.run, Run::Tx(_) | Run::Local(_) | Run::Refused))
    {
        return Touch::None;
    }
    let is = |names: &[&str]| names.iter().any(|n| a.is(0, n));
    if is(&["FLUSHALL", "FLUSHDB"]) {
        return Touch::All;
    }
    if is(&["PUBLISH", "SPUBLISH", "SCRIPT", "FUNCTION"]) {
        return Touch::None;
    }
    if is(&["EVAL", "EVALSHA", "FCALL"]) && a.at(2) == b"0" {
        return Touch::Unknown;
    }
    let from = |n: usize, step: usize| -> Vec<&'a [u8]> { (n..a.len()).step_by(step).map(|i| a.at(i)).collect() };
    if a.len() > 2 {
        if is(&["HSET", "HMSET", "HSETNX"]) {
            return Touch::Elements(vec![a.at(1)], from(2, 2));
        }
        if is(&["HINCRBY", "HINCRBYFLOAT"]) {
            return Touch::Elements(vec![a.at(1)], vec![a.at(2)]);
        }
        if is(&["HDEL", "SADD", "SREM", "ZREM"]) {
            return Touch::Elements(vec![a.at(1)], from(2, 1));
        }
        if is(&["ZINCRBY"]) {
            return Touch::Elements(vec![a.at(1)], vec![a.at(3)]);
        }
        if is(&["ZADD"]) {
            // Members, and options and scores among them: what is no member changes nothing.
            return Touch::Elements(vec![a.at(1)], from(2, 1));
        }
        if is(&["SMOVE"]) {
            return Touch::Elements(vec![a.at(1), a.at(2)], vec![a.at(3)]);
        }
    }
    let known = spec.filter(|s| s.keys.0 > 0).map(|s| s.keys);
    let known = known.or_else(|| is(FIRST).then_some((1, 1, 1)));
    if let Some((first, last, step)) = known {
        let last = if last < 0 {
            a.len().saturating_sub(usize::from(last.unsigned_abs()))
        } else {
            last as usize
        };
        // A store names where it stores first, in this table: what it reads does not matter.
        return Touch::Keys(
            (first as usize..=last.min(a.len().saturating_sub(1)))
                .step_by(step.max(1) as usize)
                .map(|i| a.at(i))
                .collect(),
        );
    }
    if (1..a.len()).any(|i| a.at(i).len() > LONGEST) && spec.is_none() {
        return Touch::Unknown;
    }
    Touch::Keys(a.iter().skip(1).filter(|w| w.len() <= LONGEST).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Span;
    use crate::commands;

    fn touched(line: &str) -> String {
        let mut at = 0;
        let spans: Vec<Span> = line
            .split(' ')
            .map(|w| {
                let s = Span {
                    start: at as u32,
                    end: (at + w.len()) as u32,
                };
                at += w.len() + 1;
                s
            })
            .collect();
        let a = Args::new(line.as_bytes(), &spans);
        let show = |l: &[&[u8]]| {
            l.iter()
                .map(|w| String::from_utf8_lossy(w).into_owned())
                .collect::<Vec<_>>()
                .join(" ")
        };
        match of(commands::find(a.at(0)), a) {
            Touch::None => "-".into(),
            Touch::All => "all".into(),
            Touch::Unknown => "any".into(),
            Touch::Keys(k) => show(&k),
            Touch::Elements(k, e) => format!("{}: {}", show(&k), show(&e)),
        }
    }

    #[test]
    fn every_way_to_change_a_key_is_noticed() {
        for (line, want) in [
            ("GET a", "-"),
            ("set a 1", "a"),
            ("MSET a 1 b 2", "a b"),
            ("DEL a b c", "a b c"),
            ("RENAME a b", "a b"),
            ("COPY a b", "a b"),
            ("FLUSHALL ASYNC", "all"),
            ("FLUSHDB", "all"),
            ("EXPIRE a 5", "a"),
            ("HSET h f 1 g 2", "h: f g"),
            ("HDEL h f g", "h: f g"),
            ("SMOVE s t m", "s t: m"),
            ("ZADD z NX 1 m", "z: NX 1 m"),
            ("ZINCRBY z 1 m", "z: m"),
            ("SPOP s", "s"),
            ("LMOVE a b LEFT LEFT", "a b"),
            ("BLPOP a b 0", "a b"),
            ("BITOP AND d x y", "AND d x y"),
            ("SETBIT a 7 1", "a"),
            ("EVAL code 2 a b c", "code 2 a b c"),
            ("EVAL code 0", "any"),
            ("LMPOP 2 a b LEFT", "2 a b LEFT"),
            ("XREADGROUP GROUP g c STREAMS s >", "GROUP g c STREAMS s >"),
            ("PUBLISH c m", "-"),
            ("NOSUCH a b", "a b"),
            ("SORT a STORE d", "a STORE d"),
            ("SINTERCARD 1 a", "-"),
            ("WATCH a", "-"),
        ] {
            assert_eq!(touched(line), want, "{line}");
        }
    }
}
