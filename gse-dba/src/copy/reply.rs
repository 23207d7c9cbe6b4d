//! Replies of an end, decoded. Only RESP2 comes here: the ends ask for it. Nothing recurses on input.

use bytes::Bytes;

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Null,
    Simple(Bytes),
    Error(String),
    Int(i64),
    Bulk(Bytes),
    List(Vec<Reply>),
}

impl Reply {
    /// The bytes of a string, or none.
    pub(crate) fn bytes(&self) -> Option<&Bytes> {
        match self {
            Self::Bulk(b) | Self::Simple(b) => Some(b),
            _ => None,
        }
    }

    pub(crate) fn int(&self) -> Option<i64> {
        match self {
            Self::Int(n) => Some(*n),
            Self::Bulk(b) | Self::Simple(b) => crate::engine::numbers::parse_int(b),
            _ => None,
        }
    }

    pub(crate) fn list(&self) -> Option<&[Reply]> {
        match self {
            Self::List(l) => Some(l),
            _ => None,
        }
    }

    pub(crate) fn error(&self) -> Option<&str> {
        match self {
            Self::Error(e) => Some(e),
            _ => None,
        }
    }
}

/// Decodes as many replies as there are in `all`.
pub(crate) fn decode(all: &Bytes) -> Result<Vec<Reply>, String> {
    let mut done: Vec<Reply> = Vec::new();
    // Lists that are not whole yet, with what they still lack.
    let mut open: Vec<(usize, Vec<Reply>)> = Vec::new();
    let mut at = 0;
    while at < all.len() {
        let rest = &all[at..];
        let end = rest
            .windows(2)
            .position(|w| w == b"\r\n")
            .ok_or("a reply has no end of line")?;
        let (kind, line) = (rest[0], all.slice(at + 1..at + end));
        at += end + 2;
        let number = || {
            crate::engine::numbers::parse_int(&line)
                .ok_or_else(|| format!("a reply has the number {:?}", String::from_utf8_lossy(&line)))
        };
        let mut value = match kind {
            b'+' => Reply::Simple(line.clone()),
            b'-' => Reply::Error(String::from_utf8_lossy(&line).into_owned()),
            b':' => Reply::Int(number()?),
            b'$' => {
                let n = number()?;
                match usize::try_from(n) {
                    Err(_) => Reply::Null,
                    Ok(n) => {
                        let end = at
                            .checked_add(n)
                            .filter(|e| e + 2 <= all.len())
                            .ok_or("a reply is cut short")?;
                        if &all[end..end + 2] != b"\r\n" {
                            return Err("a string of a reply does not end where it should".into());
                        }
                        let body = all.slice(at..end);
                        at = end + 2;
                        Reply::Bulk(body)
                    }
                }
            }
            b'*' => match number()? {
                n if n < 0 => Reply::Null,
                0 => Reply::List(Vec::new()),
                n => {
                    open.push((n as usize, Vec::new()));
                    continue;
                }
            },
            other => return Err(format!("a reply begins with the byte {other:#04x}")),
        };
        loop {
            let Some((left, items)) = open.last_mut() else {
                done.push(value);
                break;
            };
            items.push(value);
            *left -= 1;
            if *left > 0 {
                break;
            }
            value = Reply::List(open.pop().map(|(_, items)| items).unwrap_or_default());
        }
    }
    if open.is_empty() {
        Ok(done)
    } else {
        Err("a reply is cut short".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_decoded_and_broken_ones_are_told() {
        let b = |t: &'static str| Bytes::from_static(t.as_bytes());
        let got = decode(&b(
            "+OK\r\n:7\r\n$4\r\na\r\nb\r\n$-1\r\n*-1\r\n*2\r\n*1\r\n$1\r\nx\r\n*0\r\n-ERR no\r\n",
        ))
        .unwrap();
        assert_eq!(
            got,
            vec![
                Reply::Simple(b("OK")),
                Reply::Int(7),
                Reply::Bulk(b("a\r\nb")),
                Reply::Null,
                Reply::Null,
                Reply::List(vec![Reply::List(vec![Reply::Bulk(b("x"))]), Reply::List(vec![])]),
                Reply::Error("ERR no".into()),
            ]
        );
        for bad in [
            "$5\r\nab\r\n",
            "$2\r\nabc\r\n",
            "*2\r\n:1\r\n",
            ":x\r\n",
            "+a",
            "%1\r\n",
        ] {
            assert!(decode(&b(bad)).is_err(), "{bad:?}");
        }
        let deep = "*1\r\n".repeat(100_000) + "*0\r\n";
        let mut depth = 0;
        let mut r = decode(&Bytes::from(deep)).unwrap().remove(0);
        // Taken apart by hand: dropping it whole would recurse.
        while let Reply::List(mut l) = r {
            depth += 1;
            match l.pop() {
                Some(next) => r = next,
                None => break,
            }
        }
        assert_eq!(depth, 100_001);
    }
}
