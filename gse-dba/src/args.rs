//! A command's arguments as slices of the buffer that they arrived in. Nothing is copied and nothing is counted until a value is stored.

/// A byte range in a request buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: u32,
    pub(crate) end: u32,
}

/// The arguments of one command; index 0 is its name.
#[derive(Clone, Copy)]
pub(crate) struct Args<'a> {
    buf: &'a [u8],
    spans: &'a [Span],
}

impl<'a> Args<'a> {
    pub(crate) fn new(buf: &'a [u8], spans: &'a [Span]) -> Self {
        Self { buf, spans }
    }

    pub(crate) fn len(&self) -> usize {
        self.spans.len()
    }

    /// The argument at `i`; an index past the end reads as empty, so that a wrong arity in the command table can never panic.
    pub(crate) fn at(&self, i: usize) -> &'a [u8] {
        self.spans
            .get(i)
            .and_then(|s| self.buf.get(s.start as usize..s.end as usize))
            .unwrap_or_default()
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &'a [u8]> + ExactSizeIterator + use<'a> {
        let (buf, spans) = (self.buf, self.spans);
        spans
            .iter()
            .map(move |s| buf.get(s.start as usize..s.end as usize).unwrap_or_default())
    }

    /// The arguments from `i` on.
    pub(crate) fn from(&self, i: usize) -> Args<'a> {
        Args {
            buf: self.buf,
            spans: self.spans.get(i..).unwrap_or_default(),
        }
    }

    /// The first `n` arguments.
    pub(crate) fn first(&self, n: usize) -> Args<'a> {
        Args {
            buf: self.buf,
            spans: self.spans.get(..n.min(self.spans.len())).unwrap_or_default(),
        }
    }

    /// Whether the argument at `i` is this word, whatever its case.
    pub(crate) fn is(&self, i: usize, word: &str) -> bool {
        self.at(i).eq_ignore_ascii_case(word.as_bytes())
    }
}
