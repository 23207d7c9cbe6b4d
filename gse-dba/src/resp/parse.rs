//! Requests: an own, iterative, capped and resumable parser. It never recurses, never allocates for a length that a client merely claims, and a request that
//! arrives in any number of pieces costs no more than one that arrives whole. Replies of other servers are `skip`'s.

use bytes::{Bytes, BytesMut};

use crate::args::{Args, Span};

/// What one request may be. Bytes and counts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) max_args: usize,
    pub(crate) max_bulk: usize,
    /// The whole request, headers included.
    pub(crate) max_query: usize,
}

/// What a client that has not shown its password may send.
pub(crate) const UNAUTHENTICATED: Limits = Limits {
    max_args: 10,
    max_bulk: 16 * 1024,
    max_query: 64 * 1024,
};

/// Descriptions of arguments and commands that are kept for the next commands.
const KEPT: usize = 64;
const MAX_INLINE: usize = 64 * 1024;
/// A count or length line is at most a sign and twenty digits; this leaves room without letting a line grow.
const MAX_HEAD: usize = 32;

/// Why a connection's input cannot be understood any further. The text is what the client is told before it is disconnected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProtocolError(pub(crate) String);

fn fail<T>(text: impl Into<String>) -> Result<T, ProtocolError> {
    Err(ProtocolError(text.into()))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Frame {
    first: u32,
    argc: u32,
    start: u32,
    end: u32,
    inline: bool,
}

/// Whole commands, in the order they came.
#[derive(Default, Debug)]
pub(crate) struct Requests {
    buf: Bytes,
    spans: Vec<Span>,
    frames: Vec<Frame>,
}

impl Requests {
    pub(crate) fn len(&self) -> usize {
        self.frames.len()
    }

    /// The arguments of command `i`.
    pub(crate) fn args(&self, i: usize) -> Args<'_> {
        let f = self.frames.get(i).copied().unwrap_or(Frame {
            first: 0,
            argc: 0,
            start: 0,
            end: 0,
            inline: false,
        });
        Args::new(
            &self.buf,
            self.spans
                .get(f.first as usize..(f.first + f.argc) as usize)
                .unwrap_or_default(),
        )
    }

    /// Command `i` as it arrived, if it arrived as an array: what may be passed on byte for byte.
    pub(crate) fn raw(&self, i: usize) -> Option<Bytes> {
        let f = self.frames.get(i)?;
        (!f.inline).then(|| self.buf.slice(f.start as usize..f.end as usize))
    }

    /// The bytes of command `i`, under the same condition.
    pub(crate) fn raw_bytes(&self, i: usize) -> Option<&[u8]> {
        let f = self.frames.get(i).filter(|f| !f.inline)?;
        self.buf.get(f.start as usize..f.end as usize)
    }

    /// The byte range of commands `from..to` when they all arrived as arrays and without gaps: one write for many commands.
    pub(crate) fn raw_run(&self, from: usize, to: usize) -> Option<Bytes> {
        let frames = self.frames.get(from..to)?;
        let (first, last) = (frames.first()?, frames.last()?);
        let gapless = frames.windows(2).all(|w| w[0].end == w[1].start);
        (gapless && frames.iter().all(|f| !f.inline)).then(|| self.buf.slice(first.start as usize..last.end as usize))
    }
}

/// A parser over one connection's input.
#[derive(Default)]
pub(crate) struct Parser {
    /// Bytes read and not yet taken. Reads append here.
    pub(crate) buf: BytesMut,
    pos: usize,
    start: usize,
    spans: Vec<Span>,
    frames: Vec<Frame>,
    /// Arguments of the open request still to come; `None` between requests.
    open: Option<(usize, u32)>,
    /// Length of the open bulk argument, once its header was read.
    bulk: Option<usize>,
}

impl Parser {
    /// Reads as many whole commands as there are, `max_frames` at most, and returns how many are ready for [`Parser::take`]. After an error the commands before it are still ready;
    /// the connection cannot be read any further.
    pub(crate) fn parse(&mut self, limits: &Limits, max_frames: usize) -> Result<usize, ProtocolError> {
        while self.frames.len() < max_frames {
            if !self.step(limits)? {
                break;
            }
        }
        Ok(self.frames.len())
    }

    /// How many whole commands are ready.
    pub(crate) fn ready(&self) -> usize {
        self.frames.len()
    }

    /// Whether bytes are left that were not looked at yet.
    pub(crate) fn has_more(&self) -> bool {
        self.pos < self.buf.len()
    }

    /// Whether a request has begun and not ended.
    pub(crate) fn is_partial(&self) -> bool {
        self.open.is_some() || self.start < self.buf.len()
    }

    /// Hands out the whole commands. Their bytes leave the buffer; a request that is only partly here stays.
    pub(crate) fn take(&mut self) -> Requests {
        let Some(last) = self.frames.last() else {
            return Requests::default();
        };
        let cut = last.end as usize;
        let kept = (last.first + last.argc) as usize;
        let rest: Vec<Span> = self.spans.split_off(kept);
        let requests = Requests {
            buf: if cut == self.buf.len() {
                // Nothing is left of it here: what is idle holds no buffer.
                std::mem::take(&mut self.buf).freeze()
            } else {
                self.buf.split_to(cut).freeze()
            },
            spans: std::mem::take(&mut self.spans),
            frames: std::mem::take(&mut self.frames),
        };
        let shift = cut as u32;
        self.spans = rest
            .into_iter()
            .map(|s| Span {
                start: s.start - shift,
                end: s.end - shift,
            })
            .collect();
        if let Some((_, first)) = &mut self.open {
            *first -= kept as u32;
        }
        self.pos -= cut;
        self.start -= cut;
        requests
    }

    /// Takes back what the last commands were described in, for the next ones. Only a little of it is kept while nothing comes.
    pub(crate) fn recycle(&mut self, mut used: Requests) {
        if self.spans.is_empty() && used.spans.capacity() <= KEPT {
            used.spans.clear();
            self.spans = used.spans;
        }
        if self.frames.is_empty() && used.frames.capacity() <= KEPT {
            used.frames.clear();
            self.frames = used.frames;
        }
    }

    /// One step: true when something was consumed, false when more bytes are needed.
    fn step(&mut self, limits: &Limits) -> Result<bool, ProtocolError> {
        if self.pos - self.start > limits.max_query {
            return fail("Protocol error: request is larger than this server accepts");
        }
        match self.open {
            Some((left, first)) => self.argument(left, first, limits),
            None => match self.buf.get(self.pos) {
                None => Ok(false),
                Some(b'*') => self.array_head(limits),
                Some(_) => self.inline(limits),
            },
        }
    }

    /// The line at `pos + 1` as a number: `None` when it is not complete yet.
    fn head(&self, too_long: &str, invalid: &str) -> Result<Option<(i64, usize)>, ProtocolError> {
        let rest = self.buf.get(self.pos + 1..).unwrap_or_default();
        let window = &rest[..rest.len().min(MAX_HEAD + 2)];
        let Some(cr) = window.iter().position(|b| *b == b'\r') else {
            return if rest.len() > MAX_HEAD {
                fail(too_long)
            } else {
                Ok(None)
            };
        };
        if rest.len() < cr + 2 {
            return Ok(None);
        }
        let Some(n) = crate::engine::numbers::parse_int(&rest[..cr]) else {
            return fail(invalid);
        };
        Ok(Some((n, self.pos + 1 + cr + 2)))
    }

    fn array_head(&mut self, limits: &Limits) -> Result<bool, ProtocolError> {
        let Some((n, next)) = self.head(
            "Protocol error: too big mbulk count string",
            "Protocol error: invalid multibulk length",
        )?
        else {
            return Ok(false);
        };
        if n > i64::from(i32::MAX) {
            return fail("Protocol error: invalid multibulk length");
        }
        if n > limits.max_args as i64 {
            let unauthenticated = limits.max_args == UNAUTHENTICATED.max_args;
            return fail(if unauthenticated {
                "Protocol error: unauthenticated multibulk length"
            } else {
                "Protocol error: invalid multibulk length"
            });
        }
        self.pos = next;
        if n <= 0 {
            self.skip_to(next);
        } else {
            self.open = Some((n as usize, self.spans.len() as u32));
        }
        Ok(true)
    }

    /// An empty request: nothing to answer. Its bytes go with the request before it, or are dropped.
    fn skip_to(&mut self, next: usize) {
        if self.frames.is_empty() && self.start == 0 {
            let _ = self.buf.split_to(next);
            self.pos = 0;
        } else {
            self.start = next;
            self.pos = next;
        }
    }

    fn argument(&mut self, left: usize, first: u32, limits: &Limits) -> Result<bool, ProtocolError> {
        let len = match self.bulk {
            Some(len) => len,
            None => {
                match self.buf.get(self.pos) {
                    None => return Ok(false),
                    Some(b'$') => {}
                    Some(c) => {
                        return fail(format!(
                            "Protocol error: expected '$', got '{}'",
                            char::from(*c).escape_default()
                        ));
                    }
                }
                let Some((n, next)) = self.head(
                    "Protocol error: too big bulk count string",
                    "Protocol error: invalid bulk length",
                )?
                else {
                    return Ok(false);
                };
                if n < 0 || n > limits.max_bulk as i64 {
                    let unauthenticated = limits.max_bulk == UNAUTHENTICATED.max_bulk && n >= 0;
                    return fail(if unauthenticated {
                        "Protocol error: unauthenticated bulk length"
                    } else {
                        "Protocol error: invalid bulk length"
                    });
                }
                if next - self.start + n as usize > limits.max_query {
                    return fail("Protocol error: request is larger than this server accepts");
                }
                self.pos = next;
                self.bulk = Some(n as usize);
                n as usize
            }
        };
        if self.buf.len() < self.pos + len + 2 {
            return Ok(false);
        }
        self.spans.push(Span {
            start: self.pos as u32,
            end: (self.pos + len) as u32,
        });
        self.pos += len + 2;
        self.bulk = None;
        if left == 1 {
            self.close(first, false);
        } else {
            self.open = Some((left - 1, first));
        }
        Ok(true)
    }

    fn close(&mut self, first: u32, inline: bool) {
        self.open = None;
        self.frames.push(Frame {
            first,
            argc: self.spans.len() as u32 - first,
            start: self.start as u32,
            end: self.pos as u32,
            inline,
        });
        self.start = self.pos;
    }

    /// A request typed by hand: words, with quotes, on one line.
    fn inline(&mut self, limits: &Limits) -> Result<bool, ProtocolError> {
        let rest = &self.buf[self.pos..];
        let window = &rest[..rest.len().min(MAX_INLINE + 1)];
        let Some(nl) = window.iter().position(|b| *b == b'\n') else {
            return if rest.len() > MAX_INLINE {
                fail("Protocol error: too big inline request")
            } else {
                Ok(false)
            };
        };
        let mut end = self.pos + nl;
        let next = end + 1;
        if end > self.pos && self.buf[end - 1] == b'\r' {
            end -= 1;
        }
        let first = self.spans.len() as u32;
        if !self.words(end) {
            self.spans.truncate(first as usize);
            return fail("Protocol error: unbalanced quotes in request");
        }
        self.pos = next;
        let argc = self.spans.len() - first as usize;
        if argc > limits.max_args {
            return fail("Protocol error: invalid multibulk length");
        }
        if argc == 0 {
            self.skip_to(next)
        } else {
            self.close(first, true)
        }
        Ok(true)
    }

    /// Splits `pos..end` into words. Escapes are undone in place: what they stand for is never longer than they are.
    fn words(&mut self, end: usize) -> bool {
        let mut i = self.pos;
        loop {
            while i < end && self.buf[i].is_ascii_whitespace() {
                i += 1;
            }
            if i >= end {
                return true;
            }
            let start = i;
            let mut to = i;
            let mut quote: Option<u8> = None;
            loop {
                if i >= end {
                    if quote.is_some() {
                        return false;
                    }
                    break;
                }
                let c = self.buf[i];
                match quote {
                    None if c.is_ascii_whitespace() => break,
                    None if c == b'"' || c == b'\'' => {
                        quote = Some(c);
                        i += 1;
                        continue;
                    }
                    Some(q) if c == q => {
                        // A closing quote ends the word.
                        if i + 1 < end && !self.buf[i + 1].is_ascii_whitespace() {
                            return false;
                        }
                        i += 1;
                        break;
                    }
                    _ => {}
                }
                let (byte, used) = if quote == Some(b'"') && c == b'\\' && i + 1 < end {
                    unescape(&self.buf[i..end])
                } else if quote == Some(b'\'') && c == b'\\' && i + 1 < end && self.buf[i + 1] == b'\'' {
                    (b'\'', 2)
                } else {
                    (c, 1)
                };
                self.buf[to] = byte;
                to += 1;
                i += used;
            }
            self.spans.push(Span {
                start: start as u32,
                end: to as u32,
            });
        }
    }
}

fn unescape(text: &[u8]) -> (u8, usize) {
    let hex = |b: u8| char::from(b).to_digit(16);
    if let (Some(b'x'), Some(h), Some(l)) = (
        text.get(1),
        text.get(2).and_then(|b| hex(*b)),
        text.get(3).and_then(|b| hex(*b)),
    ) {
        return ((h * 16 + l) as u8, 4);
    }
    let byte = match text.get(1).copied().unwrap_or(b'\\') {
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        b'b' => 8,
        b'a' => 7,
        other => other,
    };
    (byte, 2)
}
