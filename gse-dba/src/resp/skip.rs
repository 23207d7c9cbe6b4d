//! Where a reply of another server ends. Nothing is decoded and nothing recurses: a reply nested thousands deep is one counter.

/// Finds the ends of replies in a stream that arrives in pieces.
#[derive(Default, Debug)]
pub(crate) struct Skipper {
    /// Elements still to come before the open reply is whole; zero between replies.
    left: u64,
    /// Whether the open top-level frame is a push (RESP3) and so no reply to anything.
    push: bool,
    /// Bytes of a bulk body (with its line end) still to pass over.
    body: u64,
    /// Header line collected so far, when it was cut by the end of a piece.
    line: Vec<u8>,
}

/// What ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// A reply ended at this offset of the piece.
    Reply(usize),
    /// An out-of-band push ended at this offset.
    Push(usize),
}

const MAX_LINE: usize = 64 * 1024;

impl Skipper {
    /// Passes over `piece` from `from`; returns where the first frame ends, or `None` when the piece ends first (all of it is then consumed).
    pub(crate) fn next(&mut self, piece: &[u8], from: usize) -> Result<Option<End>, String> {
        let mut at = from;
        loop {
            if self.body > 0 {
                let n = self.body.min((piece.len() - at) as u64);
                at += n as usize;
                self.body -= n;
                if self.body > 0 {
                    return Ok(None);
                }
                if let Some(end) = self.element_done(at) {
                    return Ok(Some(end));
                }
                continue;
            }
            let Some(nl) = piece.get(at..).and_then(|rest| rest.iter().position(|b| *b == b'\n')) else {
                self.line.extend_from_slice(piece.get(at..).unwrap_or_default());
                return if self.line.len() > MAX_LINE {
                    Err("a reply line of the store is too long".into())
                } else {
                    Ok(None)
                };
            };
            let end = at + nl + 1;
            let done = if self.line.is_empty() {
                self.head(&piece[at..end])?
            } else {
                let mut line = std::mem::take(&mut self.line);
                line.extend_from_slice(&piece[at..end]);
                self.head(&line)?
            };
            at = end;
            if done && let Some(end) = self.element_done(at) {
                return Ok(Some(end));
            }
        }
    }

    /// Whether what is under way is a push.
    pub(crate) fn in_push(&self) -> bool {
        self.push || (self.left == 0 && self.line.first() == Some(&b'>'))
    }

    /// An element ended; so did the whole frame when nothing more is expected.
    fn element_done(&mut self, at: usize) -> Option<End> {
        self.left -= 1;
        (self.left == 0).then(|| {
            if std::mem::take(&mut self.push) {
                End::Push(at)
            } else {
                End::Reply(at)
            }
        })
    }

    /// Takes one header line in; true when the element is complete with it.
    fn head(&mut self, line: &[u8]) -> Result<bool, String> {
        let kind = line.first().copied().unwrap_or(0);
        let text = line.get(1..line.len().saturating_sub(2)).unwrap_or_default();
        let number = || {
            crate::engine::numbers::parse_int(text).ok_or_else(|| {
                format!(
                    "a reply of the store has the length {:?}",
                    String::from_utf8_lossy(text)
                )
            })
        };
        if self.left == 0 {
            self.left = 1;
            self.push = kind == b'>';
        }
        match kind {
            b'+' | b'-' | b':' | b'_' | b'#' | b',' | b'(' => Ok(true),
            b'$' | b'=' | b'!' => {
                let n = number()?;
                if n < 0 {
                    return Ok(true);
                }
                self.body = n as u64 + 2;
                Ok(false)
            }
            b'*' | b'~' | b'>' | b'%' | b'|' => {
                let n = number()?.max(0) as u64;
                let n = if kind == b'%' || kind == b'|' {
                    n.saturating_mul(2)
                } else {
                    n
                };
                self.left = self.left.saturating_add(n);
                if kind == b'|' {
                    // An attribute stands before the element that it belongs to: it is not that element. When it is empty there is nothing to wait for.
                    return Ok(false);
                }
                Ok(true)
            }
            other => Err(format!("a reply of the store begins with the byte {other:#04x}")),
        }
    }
}
