//! Types of values: how each is read and written with commands that every store knows.

use bytes::Bytes;

use super::{Reply, Trouble, Words};

/// Types that can be copied by commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    String,
    List,
    Set,
    Zset,
    Hash,
    Stream,
    /// A module's: only a server that has the module can take it, whole.
    Other,
}

impl Kind {
    /// From the reply to `TYPE`; None: there is no such key.
    pub(super) fn of(reply: &Reply) -> Option<Self> {
        Some(match reply.bytes().map(AsRef::as_ref)? {
            b"none" => return None,
            b"string" => Self::String,
            b"list" => Self::List,
            b"set" => Self::Set,
            b"zset" => Self::Zset,
            b"hash" => Self::Hash,
            b"stream" => Self::Stream,
            _ => Self::Other,
        })
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::String => "string",
            Self::List => "list",
            Self::Set => "set",
            Self::Zset => "zset",
            Self::Hash => "hash",
            Self::Stream => "stream",
            Self::Other => "module's value",
        }
    }

    /// Whether its elements have names, so that a change can be of one of them alone.
    pub(super) fn has_names(self) -> bool {
        matches!(self, Self::Hash | Self::Set | Self::Zset)
    }

    /// The command that says how long it is.
    pub(super) fn length(self) -> &'static [u8] {
        match self {
            Self::String => b"STRLEN",
            Self::List => b"LLEN",
            Self::Set => b"SCARD",
            Self::Zset => b"ZCARD",
            Self::Hash => b"HLEN",
            Self::Stream => b"XLEN",
            Self::Other => b"EXISTS",
        }
    }
}

/// What is known of a key before its value is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) kind: Kind,
    /// Milliseconds since 1970, or -1.
    pub(super) expires: i64,
    pub(super) len: u64,
    /// As far as known.
    pub(super) bytes: u64,
}

pub(super) fn cmd(parts: &[&[u8]]) -> Words {
    parts.iter().map(|p| Bytes::copy_from_slice(p)).collect()
}

/// The command with the key and words that are here already.
pub(super) fn with(name: &'static str, key: &Bytes, rest: impl IntoIterator<Item = Bytes>) -> Words {
    let mut w = vec![Bytes::from_static(name.as_bytes()), key.clone()];
    w.extend(rest);
    w
}

/// The command that reads a small value whole. Streams are read in parts only.
pub(super) fn read(kind: Kind, key: &Bytes) -> Words {
    match kind {
        Kind::String => cmd(&[b"GET", key]),
        Kind::List => cmd(&[b"LRANGE", key, b"0", b"-1"]),
        Kind::Set => cmd(&[b"SMEMBERS", key]),
        Kind::Zset => cmd(&[b"ZRANGE", key, b"0", b"-1", b"WITHSCORES"]),
        Kind::Hash => cmd(&[b"HGETALL", key]),
        Kind::Stream | Kind::Other => cmd(&[b"TYPE", key]),
    }
}

/// The words of a list reply.
pub(super) fn items(reply: &Reply) -> Option<Vec<Bytes>> {
    reply.list()?.iter().map(|r| r.bytes().cloned()).collect()
}

/// Commands that add what was read to `key`; the pieces are of at most `most` elements. None: the reply is of another type, so the key has changed meanwhile.
pub(super) fn add(kind: Kind, key: &Bytes, reply: &Reply, most: usize) -> Option<Vec<Words>> {
    let (name, step) = match kind {
        Kind::String => return Some(vec![with("SET", key, [reply.bytes()?.clone()])]),
        Kind::List => ("RPUSH", 1),
        Kind::Set => ("SADD", 1),
        Kind::Hash => ("HSET", 2),
        Kind::Zset => ("ZADD", 2),
        Kind::Stream | Kind::Other => return None,
    };
    let mut all = items(reply)?;
    if all.len() % step != 0 {
        return None;
    }
    if kind == Kind::Zset {
        // Read as member and score, written as score and member.
        all.chunks_exact_mut(2).for_each(|p| p.swap(0, 1));
    }
    Some(
        all.chunks(most.max(1) * step)
            .map(|c| with(name, key, c.iter().cloned()))
            .collect(),
    )
}

/// The commands that ask for a key's type and expiry, and how to understand the replies.
pub(super) fn ask_head(key: &Bytes, exact: bool) -> [Words; 2] {
    let expiry: &[u8] = if exact { b"PEXPIRETIME" } else { b"PTTL" };
    [cmd(&[b"TYPE", key]), cmd(&[expiry, key])]
}

/// Milliseconds since 1970 at which a key expires, from the reply; -1: never; None: there is no such key.
pub(super) fn expiry(reply: &Reply, exact: bool) -> Result<Option<i64>, Trouble> {
    let n = reply.int().ok_or_else(|| {
        Trouble::Unfit(format!(
            "a key's expiry can't be read: {}",
            reply.error().unwrap_or("no number")
        ))
    })?;
    Ok(match n {
        -2 => None,
        -1 => Some(-1),
        n if exact => Some(n),
        n => Some(n.saturating_add(now_ms())),
    })
}

pub(super) fn now_ms() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_is_written_in_pieces_of_bounded_size() {
        let b = |t: &str| Reply::Bulk(Bytes::copy_from_slice(t.as_bytes()));
        let key = Bytes::from("k");
        let show = |w: &Vec<Words>| -> Vec<String> {
            w.iter()
                .map(|c| {
                    c.iter()
                        .map(|w| String::from_utf8_lossy(w).into_owned())
                        .collect::<Vec<_>>()
                        .join(" ")
                })
                .collect()
        };
        let pairs = Reply::List(["a", "1", "b", "2", "c", "3"].map(b).to_vec());
        assert_eq!(
            show(&add(Kind::Hash, &key, &pairs, 2).unwrap()),
            ["HSET k a 1 b 2", "HSET k c 3"]
        );
        assert_eq!(show(&add(Kind::Zset, &key, &pairs, 9).unwrap()), ["ZADD k 1 a 2 b 3 c"]);
        assert_eq!(show(&add(Kind::Set, &key, &pairs, 9).unwrap()), ["SADD k a 1 b 2 c 3"]);
        assert!(add(Kind::Hash, &key, &Reply::List(vec![b("a")]), 9).is_none());
        assert!(
            add(Kind::Set, &key, &b("x"), 9).is_none(),
            "another type: it has changed meanwhile"
        );
    }
}
