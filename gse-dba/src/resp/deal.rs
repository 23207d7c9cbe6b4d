//! Replies of another server, dealt out to those who wait for them: counted and cut where what somebody waits for ends, never decoded, and looked through once.

use bytes::BytesMut;

use super::skip::{End, Skipper};

/// Those who wait, in order. What one of them waits for is a piece: so many replies.
pub(crate) trait Waiting {
    /// One more reply has come: whether the piece is whole with it, or `None` when nobody had asked for it.
    fn counts(&mut self) -> Option<bool>;
    /// Bytes of the piece that comes now.
    fn keep(&mut self, bytes: &[u8]);
    /// The piece is whole; the bytes that follow are of the next one.
    fn next(&mut self);
}

/// Deals out all of `buf`.
///
/// # Errors
/// When it is not what a Redis sends, or more than was asked for.
pub(crate) fn deal(buf: &mut BytesMut, skipper: &mut Skipper, to: &mut impl Waiting) -> Result<(), String> {
    let (mut from, mut at) = (0, 0);
    let mut end = buf.len();
    while at < buf.len() {
        match skipper.next(buf, at)? {
            Some(End::Push(past)) => {
                // Nobody subscribes on a shared connection; what it says unasked is for nobody.
                to.keep(&buf[from..at]);
                (from, at) = (past, past);
            }
            Some(End::Reply(past)) => {
                at = past;
                let whole = to.counts().ok_or("the store sent a reply that nobody had asked for")?;
                if whole {
                    to.keep(&buf[from..at]);
                    to.next();
                    from = at;
                }
            }
            None => {
                if skipper.in_push() {
                    end = at;
                }
                break;
            }
        }
    }
    to.keep(&buf[from..end]);
    buf.clear();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Kept {
        wanted: Vec<usize>,
        got: usize,
        at: usize,
        pieces: Vec<Vec<u8>>,
    }

    impl Waiting for Kept {
        fn counts(&mut self) -> Option<bool> {
            self.got += 1;
            self.wanted.get(self.at).map(|n| *n == self.got)
        }

        fn keep(&mut self, bytes: &[u8]) {
            self.pieces.resize(self.pieces.len().max(self.at + 1), Vec::new());
            self.pieces[self.at].extend_from_slice(bytes);
        }

        fn next(&mut self) {
            self.at += 1;
            self.got = 0;
        }
    }

    #[test]
    fn pieces_are_whole_wherever_the_stream_is_cut() {
        let stream = b"+OK\r\n>2\r\n$3\r\nfoo\r\n:1\r\n$2\r\nab\r\n*2\r\n:1\r\n$-1\r\n>1\r\n+x\r\n-ERR no\r\n";
        for cut in 0..=stream.len() {
            let mut kept = Kept {
                wanted: vec![3, 1],
                ..Kept::default()
            };
            let mut skipper = Skipper::default();
            for part in [&stream[..cut], &stream[cut..]] {
                deal(&mut BytesMut::from(part), &mut skipper, &mut kept).unwrap();
            }
            let pieces: Vec<&[u8]> = kept
                .pieces
                .iter()
                .map(Vec::as_slice)
                .filter(|p| !p.is_empty())
                .collect();
            let want: [&[u8]; 2] = [b"+OK\r\n$2\r\nab\r\n*2\r\n:1\r\n$-1\r\n", b"-ERR no\r\n"];
            assert_eq!(pieces, want, "cut at {cut}");
        }
    }

    #[test]
    fn a_reply_too_many_is_an_error() {
        let mut kept = Kept {
            wanted: vec![1],
            ..Kept::default()
        };
        let got = deal(
            &mut BytesMut::from(&b"+OK\r\n+OK\r\n"[..]),
            &mut Skipper::default(),
            &mut kept,
        );
        assert!(got.unwrap_err().contains("nobody had asked"));
    }
}
