//! Several replies made one. Bytes in, bytes out: where replies end is counted, and only heads and numbers are read.

use super::route::{Merge, Split};
use crate::engine::numbers::parse_int;
use crate::resp::skip::{End, Skipper};
use crate::resp::write::Writer;

const ODD: &str = "ERR a group answered in a way that can't be put together with the others";

/// Where each of `count` replies ends.
pub(crate) fn ends(replies: &[u8], count: usize) -> Vec<usize> {
    let (mut skipper, mut at, mut out) = (Skipper::default(), 0, Vec::with_capacity(count));
    while out.len() < count && at < replies.len() {
        match skipper.next(replies, at) {
            Ok(Some(End::Reply(end))) => {
                at = end;
                out.push(end);
            }
            Ok(Some(End::Push(end))) => at = end,
            Ok(None) | Err(_) => break,
        }
    }
    out
}

fn is_error(reply: &[u8]) -> bool {
    reply.first() == Some(&b'-')
}

/// The number after the first byte, and where the rest begins.
fn head(reply: &[u8]) -> Option<(u8, i64, usize)> {
    let nl = reply.iter().position(|b| *b == b'\n')?;
    let n = parse_int(reply.get(1..nl.checked_sub(1)?)?)?;
    Some((*reply.first()?, n, nl + 1))
}

/// What is in a bulk string.
pub(super) fn body(reply: &[u8]) -> Option<&[u8]> {
    let (kind, n, at) = head(reply)?;
    (kind == b'$').then(|| reply.get(at..at + usize::try_from(n).ok()?))?
}

/// The elements of a list.
pub(super) fn elements(reply: &[u8]) -> Option<Vec<&[u8]>> {
    let (kind, n, mut at) = head(reply)?;
    if !matches!(kind, b'*' | b'~' | b'%' | b'>') || n < 0 {
        return None;
    }
    let n = usize::try_from(n).ok()?.checked_mul(if kind == b'%' { 2 } else { 1 })?;
    let body = reply.get(at..)?;
    let ends = ends(body, n);
    if ends.len() != n {
        return None;
    }
    let start = at;
    Some(
        ends.into_iter()
            .map(|end| {
                let element = &reply[at..start + end];
                at = start + end;
                element
            })
            .collect(),
    )
}

fn sum(replies: &[&[u8]]) -> Option<i64> {
    replies.iter().try_fold(0i64, |sum, r| match head(r)? {
        (b':', n, _) => sum.checked_add(n),
        _ => None,
    })
}

/// Puts the replies of all groups together.
pub(super) fn all(how: Merge, replies: &[&[u8]], out: &mut Writer) {
    if let Some(error) = replies.iter().find(|r| is_error(r)) {
        return out.raw(error);
    }
    let done = match how {
        Merge::Sum => sum(replies).map(|n| out.int(n)),
        Merge::Join => replies
            .iter()
            .map(|r| elements(r))
            .collect::<Option<Vec<_>>>()
            .map(|lists| {
                out.array(lists.iter().map(Vec::len).sum());
                lists.iter().flatten().for_each(|e| out.raw(e));
            }),
        Merge::Same => replies.first().map(|r| out.raw(r)),
        Merge::AnyOf => {
            let there: Vec<&&[u8]> = replies
                .iter()
                .filter(|r| !r.starts_with(b"$-1") && !r.starts_with(b"_"))
                .collect();
            match rand::seq::IndexedRandom::choose(there.as_slice(), &mut rand::rng()) {
                Some(r) => out.raw(r),
                None => out.null(),
            }
            Some(())
        }
        Merge::Least => least(replies).map(|numbers| {
            out.array(numbers.len());
            numbers.into_iter().for_each(|n| out.int(n));
        }),
    };
    if done.is_none() {
        out.error(ODD.as_bytes());
    }
}

/// A reply that is a number.
pub(super) fn number(reply: &[u8]) -> Option<i64> {
    head(reply).filter(|h| h.0 == b':').map(|h| h.1)
}

/// `PUBLISH`: a group counts this process as one receiver for each subscription of its own; in its place come the clients behind it.
pub(super) fn published(reply: &[u8], clients: usize, ours: usize, out: &mut Writer) {
    match number(reply) {
        Some(n) => out.len(usize::try_from(n).unwrap_or(0).saturating_sub(ours) + clients),
        None => out.raw(reply),
    }
}

/// `PUBSUB NUMSUB`: the same for each channel.
pub(super) fn subscribers(reply: &[u8], here: impl Fn(&[u8]) -> usize, out: &mut Writer) {
    let Some(list) = elements(reply) else {
        return out.raw(reply);
    };
    out.array(list.len());
    for pair in list.chunks(2) {
        let [name, count] = pair else { continue };
        let clients = body(name).map_or(0, &here);
        let there = usize::try_from(number(count).unwrap_or(0)).unwrap_or(0);
        out.raw(name);
        out.len(there.saturating_sub(usize::from(clients > 0)) + clients);
    }
}

/// Parameters that are nobody's business who comes through here.
const SECRET: [&[u8]; 6] = [
    b"requirepass",
    b"masterauth",
    b"masteruser",
    b"tls-key-file-pass",
    b"tls-client-key-file-pass",
    b"aclfile",
];

/// `CONFIG GET` without what is secret.
pub(super) fn settings(reply: &[u8], out: &mut Writer) {
    let Some(list) = elements(reply) else {
        return out.raw(reply);
    };
    let shown: Vec<&[&[u8]]> = list
        .chunks(2)
        .filter(|pair| !pair.first().and_then(|k| body(k)).is_some_and(|k| SECRET.contains(&k)))
        .collect();
    out.map(shown.len());
    shown.into_iter().flatten().for_each(|e| out.raw(e));
}

/// `SCRIPT EXISTS`: what every group has, and what can be sent to them again.
pub(super) fn exist(replies: &[&[u8]], here: impl Fn(usize) -> bool, out: &mut Writer) {
    match least(replies) {
        Some(numbers) => {
            out.array(numbers.len());
            for (i, n) in numbers.into_iter().enumerate() {
                out.int(if here(i) { 1 } else { n });
            }
        }
        None => out.raw(replies.first().copied().unwrap_or(b"*0\r\n")),
    }
}

fn least(replies: &[&[u8]]) -> Option<Vec<i64>> {
    let mut out: Option<Vec<i64>> = None;
    for r in replies {
        let row = elements(r)?
            .into_iter()
            .map(|e| head(e).map(|h| h.1))
            .collect::<Option<Vec<i64>>>()?;
        out = Some(match out {
            None => row,
            Some(o) if o.len() == row.len() => o.into_iter().zip(row).map(|(a, b)| a.min(b)).collect(),
            Some(_) => return None,
        });
    }
    out
}

/// Puts the parts of a command together; `parts` says for each reply which keys it is about, of `total`.
pub(super) fn parts(how: Split, parts: &[(&[u8], &[u32])], total: usize, out: &mut Writer) {
    if let Some((error, _)) = parts.iter().find(|(r, _)| is_error(r)) {
        return out.raw(error);
    }
    let replies: Vec<&[u8]> = parts.iter().map(|(r, _)| *r).collect();
    let done = match how {
        Split::Counts => sum(&replies).map(|n| out.int(n)),
        Split::Pairs => {
            out.ok();
            Some(())
        }
        Split::Values => values(parts, total).map(|all| {
            out.array(all.len());
            all.into_iter().for_each(|e| out.raw(e));
        }),
    };
    if done.is_none() {
        out.error(ODD.as_bytes());
    }
}

fn values<'a>(parts: &[(&'a [u8], &[u32])], total: usize) -> Option<Vec<&'a [u8]>> {
    let mut all: Vec<Option<&[u8]>> = vec![None; total];
    for (reply, keys) in parts {
        let elements = elements(reply)?;
        if elements.len() != keys.len() {
            return None;
        }
        for (e, k) in elements.into_iter().zip(*keys) {
            *all.get_mut(*k as usize)? = Some(e);
        }
    }
    all.into_iter().collect()
}

/// What a client's cursor stands for: the group and that group's own cursor. `None` when it is no cursor.
pub(super) fn cursor(text: &[u8], groups: usize) -> Option<(usize, u64)> {
    let n: u64 = std::str::from_utf8(text).ok()?.parse().ok()?;
    let groups = groups.max(1) as u64;
    Some(((n % groups) as usize, n / groups))
}

/// A step of `SCAN` by one group with the cursor that leads on, over the groups, at last to 0. `then` is the group that follows this one.
pub(super) fn scanned(reply: &[u8], group: usize, groups: usize, then: Option<usize>, out: &mut Writer) {
    if is_error(reply) {
        return out.raw(reply);
    }
    let next = elements(reply).and_then(|e| match e.as_slice() {
        [cursor, rest] => {
            let (_, len, at) = head(cursor)?;
            let own: u64 = std::str::from_utf8(cursor.get(at..at + usize::try_from(len).ok()?)?)
                .ok()?
                .parse()
                .ok()?;
            let next = match own {
                0 => then.unwrap_or(0) as u64,
                own => own.checked_mul(groups as u64)?.checked_add(group as u64)?,
            };
            Some((next, *rest))
        }
        _ => None,
    });
    match next {
        Some((next, rest)) => {
            out.array(2);
            out.bulk(next.to_string().as_bytes());
            out.raw(rest);
        }
        None => out.error(ODD.as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(f: impl FnOnce(&mut Writer)) -> String {
        let mut w = Writer::new(false);
        f(&mut w);
        String::from_utf8(w.buf.to_vec()).unwrap()
    }

    // contract: redis-proxy#6
    #[test]
    fn parts_come_back_in_the_order_of_the_keys() {
        let a: (&[u8], &[u32]) = (b"*2\r\n$1\r\na\r\n$-1\r\n", &[2, 0]);
        let b: (&[u8], &[u32]) = (b"*1\r\n$1\r\nb\r\n", &[1]);
        assert_eq!(
            written(|w| parts(Split::Values, &[a, b], 3, w)),
            "*3\r\n$-1\r\n$1\r\nb\r\n$1\r\na\r\n"
        );
        let a: (&[u8], &[u32]) = (b":2\r\n", &[0, 1]);
        let b: (&[u8], &[u32]) = (b":1\r\n", &[2]);
        assert_eq!(written(|w| parts(Split::Counts, &[a, b], 3, w)), ":3\r\n");
        let bad: (&[u8], &[u32]) = (b"-ERR no\r\n", &[2]);
        assert_eq!(written(|w| parts(Split::Counts, &[a, bad], 3, w)), "-ERR no\r\n");
    }

    #[test]
    fn replies_of_all_groups_are_put_together() {
        assert_eq!(written(|w| all(Merge::Sum, &[b":2\r\n", b":3\r\n"], w)), ":5\r\n");
        assert_eq!(
            written(|w| all(Merge::Join, &[b"*1\r\n$1\r\na\r\n", b"*0\r\n", b"*1\r\n$1\r\nb\r\n"], w)),
            "*2\r\n$1\r\na\r\n$1\r\nb\r\n"
        );
        assert_eq!(
            written(|w| all(Merge::AnyOf, &[b"$-1\r\n", b"$1\r\nk\r\n"], w)),
            "$1\r\nk\r\n"
        );
        assert_eq!(written(|w| all(Merge::AnyOf, &[b"$-1\r\n", b"$-1\r\n"], w)), "$-1\r\n");
        assert_eq!(
            written(|w| all(Merge::Least, &[b"*2\r\n:1\r\n:1\r\n", b"*2\r\n:1\r\n:0\r\n"], w)),
            "*2\r\n:1\r\n:0\r\n"
        );
        assert!(written(|w| all(Merge::Sum, &[b"+OK\r\n"], w)).starts_with("-ERR"));
    }

    // contract: redis-proxy#12
    #[test]
    fn cursors_lead_through_all_groups() {
        let step = |own: &str, g| {
            written(|w| {
                scanned(
                    format!("*2\r\n${}\r\n{own}\r\n*0\r\n", own.len()).as_bytes(),
                    g,
                    3,
                    (g < 2).then_some(g + 1),
                    w,
                )
            })
        };
        assert_eq!(step("0", 0), "*2\r\n$1\r\n1\r\n*0\r\n");
        assert_eq!(step("0", 2), "*2\r\n$1\r\n0\r\n*0\r\n");
        assert_eq!(step("7", 1), "*2\r\n$2\r\n22\r\n*0\r\n");
        assert_eq!(cursor(b"22", 3), Some((1, 7)));
        assert_eq!(cursor(b"1", 3), Some((1, 0)));
        assert_eq!(cursor(b"x", 3), None);
        assert!(step("18446744073709551615", 0).starts_with("-ERR"));
    }
}
