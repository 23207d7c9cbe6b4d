//! Replies in RESP2 or RESP3, appended to one buffer. The protocol is the connection's; a command writes what it means (a map, a set, a double, a null)
//! and this turns it into what that connection understands.

use bytes::{BufMut, BytesMut};

use crate::engine::numbers::{format_double, push_int};

/// The replies of one batch.
#[derive(Default)]
pub(crate) struct Writer {
    pub(crate) buf: BytesMut,
    /// RESP3 when set.
    pub(crate) resp3: bool,
}

impl Writer {
    pub(crate) fn new(resp3: bool) -> Self {
        Self {
            buf: BytesMut::new(),
            resp3,
        }
    }

    fn head(&mut self, kind: u8, n: i64) {
        self.buf.put_u8(kind);
        push_int(&mut self.buf, n);
        self.buf.put_slice(b"\r\n");
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.buf.put_slice(bytes);
    }

    pub(crate) fn ok(&mut self) {
        self.buf.put_slice(b"+OK\r\n");
    }

    pub(crate) fn simple(&mut self, text: &str) {
        self.buf.put_u8(b'+');
        self.buf.put_slice(text.as_bytes());
        self.buf.put_slice(b"\r\n");
    }

    /// An error line; line breaks in `text` become spaces so that it can never be read as two replies.
    pub(crate) fn error(&mut self, text: &[u8]) {
        self.buf.put_u8(b'-');
        let from = self.buf.len();
        self.buf.put_slice(text);
        for b in &mut self.buf[from..] {
            if *b == b'\r' || *b == b'\n' {
                *b = b' ';
            }
        }
        self.buf.put_slice(b"\r\n");
    }

    pub(crate) fn int(&mut self, n: i64) {
        self.head(b':', n);
    }

    pub(crate) fn len(&mut self, n: usize) {
        self.int(i64::try_from(n).unwrap_or(i64::MAX));
    }

    pub(crate) fn bulk(&mut self, bytes: &[u8]) {
        self.buf.reserve(bytes.len() + 24);
        self.head(b'$', bytes.len() as i64);
        self.buf.put_slice(bytes);
        self.buf.put_slice(b"\r\n");
    }

    pub(crate) fn bulk_or_null(&mut self, bytes: Option<&[u8]>) {
        match bytes {
            Some(b) => self.bulk(b),
            None => self.null(),
        }
    }

    pub(crate) fn null(&mut self) {
        self.buf.put_slice(if self.resp3 { b"_\r\n" } else { b"$-1\r\n" });
    }

    pub(crate) fn null_array(&mut self) {
        self.buf.put_slice(if self.resp3 { b"_\r\n" } else { b"*-1\r\n" });
    }

    pub(crate) fn array(&mut self, n: usize) {
        self.head(b'*', n as i64);
    }

    /// A map of `n` pairs: a flat array in RESP2.
    pub(crate) fn map(&mut self, n: usize) {
        if self.resp3 {
            self.head(b'%', n as i64)
        } else {
            self.head(b'*', n as i64 * 2)
        }
    }

    pub(crate) fn set(&mut self, n: usize) {
        self.head(if self.resp3 { b'~' } else { b'*' }, n as i64);
    }

    pub(crate) fn double(&mut self, d: f64) {
        let text = format_double(d);
        if self.resp3 {
            self.buf.put_u8(b',');
            self.buf.put_slice(text.as_bytes());
            self.buf.put_slice(b"\r\n");
        } else {
            self.bulk(text.as_bytes());
        }
    }

    /// Text for people: a verbatim string in RESP3.
    pub(crate) fn verbatim(&mut self, text: &str) {
        if self.resp3 {
            self.head(b'=', text.len() as i64 + 4);
            self.buf.put_slice(b"txt:");
            self.buf.put_slice(text.as_bytes());
            self.buf.put_slice(b"\r\n");
        } else {
            self.bulk(text.as_bytes());
        }
    }
}
