//! Large values: read and written in parts, under a name of their own until they are whole. Elements that change meanwhile are told by their marks.

use std::collections::HashSet;

use bytes::Bytes;

use super::digest::Digest;
use super::engine::{Copier, Side};
use super::streams::{field, field_int};
use super::values::{self, Head, Kind, cmd, with};
use super::{Progress, RESERVED, Reply, Trouble, Words};
use crate::sharded::slots::{SLOTS, slot};

/// Elements of one part at most.
pub(super) const MOST: u64 = 1000;

/// A name in the same slot as `key` for what is under way to it.
fn temporary(key: &[u8]) -> Bytes {
    let want = slot(key);
    let tag = (0..SLOTS as u32 * 64)
        .map(|n| n.to_string())
        .find(|t| slot(t.as_bytes()) == want)
        .unwrap_or_default();
    let mut name = RESERVED.to_vec();
    name.extend_from_slice(format!("copy:{{{tag}}}").as_bytes());
    Bytes::from(name)
}

pub(super) fn failed(replies: &[Reply], what: &str) -> Result<(), Trouble> {
    match replies.iter().find_map(Reply::error) {
        None => Ok(()),
        Some(e) => Err(Trouble::Unfit(format!("{what}: {e}"))),
    }
}

/// What a step over a value in parts gives.
enum Part {
    /// These elements, and there are more.
    More(Vec<Bytes>, Place),
    Last(Vec<Bytes>),
    /// It is something else now.
    Changed,
}

/// Where the next part begins.
enum Place {
    Cursor(Bytes),
    Index(u64),
    After(Bytes),
}

impl Place {
    fn first(kind: Kind) -> Self {
        match kind {
            Kind::Hash | Kind::Set | Kind::Zset => Self::Cursor(Bytes::from_static(b"0")),
            Kind::Stream => Self::After(Bytes::new()),
            _ => Self::Index(0),
        }
    }
}

impl Copier {
    /// Elements (bytes of a string) of one part.
    fn share(&self, h: &Head) -> u64 {
        let bytes = self.job.settings.part_bytes;
        if h.kind == Kind::String {
            return bytes;
        }
        let each = (h.bytes / h.len.max(1)).max(1);
        (bytes / each).clamp(1, MOST)
    }

    async fn part(&self, side: Side, kind: Kind, key: &Bytes, share: u64, place: Place) -> Result<Part, Trouble> {
        let n = share.to_string();
        let last = |from: u64| (from + share - 1).to_string();
        let command = match (&place, kind) {
            (Place::Cursor(c), Kind::Hash) => cmd(&[b"HSCAN", key, c, b"COUNT", n.as_bytes()]),
            (Place::Cursor(c), Kind::Set) => cmd(&[b"SSCAN", key, c, b"COUNT", n.as_bytes()]),
            (Place::Cursor(c), _) => cmd(&[b"ZSCAN", key, c, b"COUNT", n.as_bytes()]),
            (Place::Index(i), Kind::List) => cmd(&[b"LRANGE", key, i.to_string().as_bytes(), last(*i).as_bytes()]),
            (Place::Index(i), _) => cmd(&[b"GETRANGE", key, i.to_string().as_bytes(), last(*i).as_bytes()]),
            (Place::After(id), _) if id.is_empty() => cmd(&[b"XRANGE", key, b"-", b"+", b"COUNT", n.as_bytes()]),
            (Place::After(id), _) => cmd(&[
                b"XRANGE",
                key,
                &[b"(".as_slice(), id].concat(),
                b"+",
                b"COUNT",
                n.as_bytes(),
            ]),
        };
        let got = self.ask(side, &[command]).await?;
        let Some(reply) = got.first() else {
            return Ok(Part::Changed);
        };
        Ok(match place {
            Place::Cursor(_) => match reply.list() {
                Some([next, found]) => match (next.bytes(), values::items(found)) {
                    (Some(next), Some(found)) if next == "0" => Part::Last(found),
                    (Some(next), Some(found)) => Part::More(found, Place::Cursor(next.clone())),
                    _ => Part::Changed,
                },
                _ => Part::Changed,
            },
            Place::Index(i) if kind == Kind::List => match values::items(reply) {
                Some(found) if (found.len() as u64) < share => Part::Last(found),
                Some(found) => Part::More(found, Place::Index(i + share)),
                None => Part::Changed,
            },
            Place::Index(i) => match reply.bytes() {
                Some(found) if (found.len() as u64) < share => Part::Last(vec![found.clone()]),
                Some(found) => Part::More(vec![found.clone()], Place::Index(i + share)),
                None => Part::Changed,
            },
            Place::After(_) => match entries(reply) {
                Some((found, _)) if found.is_empty() => Part::Last(found),
                Some((found, Some(id))) => Part::More(found, Place::After(id)),
                _ => Part::Changed,
            },
        })
    }

    /// Copies a large value. When it is replaced or deleted meanwhile, or changes and has no named elements, its mark says so and it is copied again later.
    pub(super) async fn copy_big(&mut self, key: &Bytes, h: Head) -> Result<u64, Trouble> {
        // With an expiry it could end and begin anew without a command that says so: then it is always copied whole.
        self.job.tracker.large(key, h.kind.has_names() && h.expires < 0);
        let temp = temporary(key);
        let refused = format!(
            "{} does not take a part of {:?}",
            self.job.target.name(),
            String::from_utf8_lossy(key)
        );
        failed(&self.ask(Side::Target, &[cmd(&[b"UNLINK", &temp])]).await?, &refused)?;
        let (share, mut place, mut total) = (self.share(&h), Place::first(h.kind), 0);
        loop {
            let (found, next) = match self.part(Side::Source, h.kind, key, share, place).await? {
                Part::More(found, next) => (found, Some(next)),
                Part::Last(found) => (found, None),
                Part::Changed => {
                    self.job.tracker.again(std::iter::once(key));
                    self.ask(Side::Target, &[cmd(&[b"UNLINK", &temp])]).await?;
                    return Ok(total);
                }
            };
            let bytes: u64 = found.iter().map(|f| f.len() as u64).sum();
            total += bytes;
            let write = append(h.kind, &temp, found);
            if !self.send_part(h.kind, &write, &refused).await? {
                self.job.tracker.again(std::iter::once(key));
                self.ask(Side::Target, &[cmd(&[b"UNLINK", &temp])]).await?;
                return Ok(total);
            }
            Progress::add(&self.job.progress.parts, 1);
            self.pause_for(bytes).await?;
            match next {
                Some(n) => place = n,
                None => break,
            }
        }
        if h.kind == Kind::Stream {
            self.stream_rest(key, &temp, &refused).await?;
        }
        // An empty one has no name to be renamed from.
        let there = self.ask(Side::Target, &[cmd(&[b"EXISTS", &temp])]).await?;
        let mut last = vec![cmd(&[b"UNLINK", key])];
        if there.first().and_then(Reply::int) == Some(1) {
            last = vec![cmd(&[b"RENAME", &temp, key])];
            if h.expires >= 0 {
                last.push(cmd(&[b"PEXPIREAT", key, h.expires.to_string().as_bytes()]));
            }
        } else {
            self.job.tracker.again(std::iter::once(key));
        }
        failed(&self.ask(Side::Target, &last).await?, &refused)?;
        Ok(total)
    }

    /// Sends a part. What would be appended a second time must not be sent twice: false says that this may have to begin anew.
    async fn send_part(&self, kind: Kind, write: &[Words], refused: &str) -> Result<bool, Trouble> {
        if kind.has_names() || write.is_empty() {
            return failed(&self.ask(Side::Target, write).await?, refused).map(|()| true);
        }
        match self.ask_once(Side::Target, write).await {
            Ok(got) => failed(&got, refused).map(|()| true),
            Err(Trouble::Later(why)) => {
                tracing::debug!(why, "a large value is begun anew");
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    async fn pause_for(&self, bytes: u64) -> Result<(), Trouble> {
        if self.deadline.is_some() {
            return Ok(());
        }
        self.job.pace.spent(bytes, 0, &self.job.stop).await
    }

    /// Copies these elements of a large value as they are now.
    pub(super) async fn patch(&mut self, key: &Bytes, elements: &HashSet<Bytes>) -> Result<u64, Trouble> {
        let heads = self.heads(Side::Source, std::slice::from_ref(key)).await?;
        let Some(h) = heads
            .first()
            .copied()
            .flatten()
            .filter(|h| h.kind.has_names() && h.expires < 0)
        else {
            return self.copy(std::slice::from_ref(key)).await;
        };
        let all: Vec<Bytes> = elements.iter().cloned().collect();
        let mut total = 0;
        for part in all.chunks(MOST as usize) {
            let read = match h.kind {
                Kind::Hash => "HMGET",
                Kind::Set => "SMISMEMBER",
                _ => "ZMSCORE",
            };
            let got = self.ask(Side::Source, &[with(read, key, part.iter().cloned())]).await?;
            let Some(now) = got.first().and_then(Reply::list).filter(|l| l.len() == part.len()) else {
                self.job.tracker.again(std::iter::once(key));
                return Ok(total);
            };
            let (mut set, mut gone) = (Vec::new(), Vec::new());
            for (e, v) in part.iter().zip(now) {
                match (h.kind, v) {
                    (Kind::Set, Reply::Int(1)) => set.push(e.clone()),
                    (Kind::Hash, Reply::Bulk(v)) => set.extend([e.clone(), v.clone()]),
                    (Kind::Zset, Reply::Bulk(v)) => set.extend([v.clone(), e.clone()]),
                    _ => gone.push(e.clone()),
                }
            }
            total += set.iter().map(|s| s.len() as u64).sum::<u64>();
            let (add, remove) = match h.kind {
                Kind::Hash => ("HSET", "HDEL"),
                Kind::Set => ("SADD", "SREM"),
                _ => ("ZADD", "ZREM"),
            };
            let mut write = Vec::new();
            if !set.is_empty() {
                write.push(with(add, key, set));
            }
            if !gone.is_empty() {
                write.push(with(remove, key, gone));
            }
            let done = self.ask(Side::Target, &write).await?;
            if done.iter().any(|r| r.error().is_some()) {
                self.job.tracker.again(std::iter::once(key));
                return Ok(total);
            }
        }
        Progress::add(&self.job.progress.bytes, total);
        Ok(total)
    }

    /// Expiry and digest of each key; None for one that is not there, or is changing.
    pub(super) async fn digests(&mut self, side: Side, keys: &[Bytes]) -> Result<Vec<Option<(i64, u128)>>, Trouble> {
        let heads = self.heads(side, keys).await?;
        let mut out: Vec<Option<(i64, u128)>> = vec![None; keys.len()];
        let (mut asked, mut of, mut waiting) = (Vec::new(), Vec::new(), 0);
        for (i, (key, head)) in keys.iter().zip(&heads).enumerate() {
            let Some(h) = head else { continue };
            if h.kind == Kind::Stream || self.is_big(h) {
                if let Some(o) = out.get_mut(i) {
                    *o = self.digest_big(side, key, h).await?.map(|d| (h.expires, d));
                }
                continue;
            }
            asked.push(if h.kind == Kind::Other {
                cmd(&[b"DUMP", key])
            } else {
                values::read(h.kind, key)
            });
            of.push((i, *h));
            waiting += h.bytes;
            if waiting > self.job.settings.part_bytes {
                let got = self.ask(side, &asked).await?;
                digest_small(&of, &got, &mut out);
                asked.clear();
                of.clear();
                waiting = 0;
            }
        }
        let got = self.ask(side, &asked).await?;
        digest_small(&of, &got, &mut out);
        Ok(out)
    }

    async fn digest_big(&self, side: Side, key: &Bytes, h: &Head) -> Result<Option<u128>, Trouble> {
        let mut d = Digest::new(h.kind);
        let (share, mut place, pages) = (self.share(h), Place::first(h.kind), h.kind.has_names());
        let mut text = bytes::BytesMut::new();
        loop {
            let (found, next) = match self.part(side, h.kind, key, share, place).await? {
                Part::More(found, next) => (found, Some(next)),
                Part::Last(found) => (found, None),
                Part::Changed => return Ok(None),
            };
            if h.kind == Kind::String {
                found.iter().for_each(|f| text.extend_from_slice(f));
            } else {
                d.add(&found, pages);
            }
            match next {
                Some(n) => place = n,
                None => break,
            }
        }
        if h.kind == Kind::String {
            d.add(&[text.freeze()], false);
        }
        if h.kind == Kind::Stream {
            let asked = [cmd(&[b"XINFO", b"STREAM", key]), cmd(&[b"XINFO", b"GROUPS", key])];
            let got = self.ask(side, &asked).await?;
            let [info, groups] = got.as_slice() else {
                return Ok(None);
            };
            let mut rest: Vec<Bytes> = field(info, "last-generated-id").into_iter().collect();
            for g in groups.list().unwrap_or_default() {
                rest.extend(
                    ["name", "last-delivered-id", "pending", "consumers"]
                        .iter()
                        .filter_map(|f| field(g, f).or_else(|| field_int(g, f).map(|n| Bytes::from(n.to_string())))),
                );
            }
            d.add(&rest, false);
        }
        Ok(Some(d.done()))
    }
}

fn digest_small(of: &[(usize, Head)], got: &[Reply], out: &mut [Option<(i64, u128)>]) {
    for ((i, h), r) in of.iter().zip(got) {
        let items = match h.kind {
            Kind::String | Kind::Other => r.bytes().map(|b| vec![b.clone()]),
            _ => values::items(r),
        };
        if let (Some(items), Some(o)) = (items, out.get_mut(*i)) {
            let mut d = Digest::new(h.kind);
            d.add(&items, false);
            *o = Some((h.expires, d.done()));
        }
    }
}

/// Commands that add a part to what is there already.
fn append(kind: Kind, key: &Bytes, mut found: Vec<Bytes>) -> Vec<Words> {
    if found.is_empty() {
        return Vec::new();
    }
    match kind {
        Kind::Hash => vec![with("HSET", key, found)],
        Kind::Set => vec![with("SADD", key, found)],
        Kind::Zset => {
            found.chunks_exact_mut(2).for_each(|p| p.swap(0, 1));
            vec![with("ZADD", key, found)]
        }
        Kind::List => vec![with("RPUSH", key, found)],
        Kind::Stream => {
            // Flat: an id, a count, and as many words.
            let (mut out, mut at) = (Vec::new(), 0);
            while let (Some(id), Some(n)) = (found.get(at), found.get(at + 1)) {
                let n = crate::engine::numbers::parse_int(n).unwrap_or(0).max(0) as usize;
                let fields = found.get(at + 2..at + 2 + n).unwrap_or_default();
                out.push(with(
                    "XADD",
                    key,
                    std::iter::once(id.clone()).chain(fields.iter().cloned()),
                ));
                at += 2 + n;
            }
            out
        }
        Kind::String | Kind::Other => found
            .into_iter()
            .filter(|f| !f.is_empty())
            .map(|f| with("APPEND", key, [f]))
            .collect(),
    }
}

/// The entries of a stream, flat: an id, a count, and as many words; and the last id.
fn entries(reply: &Reply) -> Option<(Vec<Bytes>, Option<Bytes>)> {
    let (mut flat, mut last) = (Vec::new(), None);
    for e in reply.list()? {
        let [id, fields] = e.list()? else { return None };
        let (id, fields) = (id.bytes()?.clone(), values::items(fields)?);
        flat.push(id.clone());
        flat.push(Bytes::from(fields.len().to_string()));
        flat.extend(fields);
        last = Some(id);
    }
    Some((flat, last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_under_way_is_in_the_slot_of_its_key() {
        for key in ["a", "{x}y", "}{", "{}", "{}a}", "", "user:1"] {
            let t = temporary(key.as_bytes());
            assert_eq!(slot(&t), slot(key.as_bytes()), "{key}");
            assert!(t.starts_with(RESERVED));
        }
    }
}
