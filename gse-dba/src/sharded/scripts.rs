//! Scripts that clients have sent. A Redis forgets them on a restart and its copies never knew them, so `EVALSHA` goes out as `EVAL` wherever the group is not known
//! to have the script: a client that has loaded it need not load it again because a group has another primary.

use std::collections::{HashMap, HashSet};

use ahash::RandomState;
use bytes::Bytes;
use parking_lot::Mutex;
use sha1::{Digest as _, Sha1};

/// Bodies kept at most; past it all are forgotten, and clients are told `NOSCRIPT` as a Redis would after a restart.
const MAX_BYTES: usize = 64 << 20;
const MAX_SCRIPTS: usize = 100_000;

type Sha = [u8; 40];

#[derive(Default)]
struct Book {
    bodies: HashMap<Sha, Bytes, RandomState>,
    shas: HashMap<Bytes, Sha, RandomState>,
    bytes: usize,
    /// Which group has which script, and as of which of its primaries.
    known: HashSet<(usize, u64, Sha), RandomState>,
}

/// A handle.
#[derive(Default)]
pub(crate) struct Scripts(Mutex<Book>);

fn sha(text: &[u8]) -> Option<Sha> {
    let mut sha = Sha::try_from(text).ok()?;
    sha.make_ascii_lowercase();
    Some(sha)
}

fn digest(body: &[u8]) -> Sha {
    let mut out = [0; 40];
    for (pair, byte) in out.chunks_exact_mut(2).zip(Sha1::digest(body)) {
        for (digit, n) in pair.iter_mut().zip([byte >> 4, byte & 15]) {
            *digit = char::from_digit(u32::from(n), 16).map_or(b'0', |c| c as u8);
        }
    }
    out
}

impl Scripts {
    /// A script has been sent whole, to these groups with these primaries.
    pub(crate) fn learn(&self, body: &[u8], groups: impl Iterator<Item = (usize, u64)>) {
        let mut book = self.0.lock();
        let sha = match book.shas.get(body) {
            Some(sha) => *sha,
            None => {
                if book.bytes + body.len() > MAX_BYTES || book.bodies.len() >= MAX_SCRIPTS {
                    *book = Book::default();
                }
                let (sha, body) = (digest(body), Bytes::copy_from_slice(body));
                book.bytes += body.len();
                book.bodies.insert(sha, body.clone());
                book.shas.insert(body, sha);
                sha
            }
        };
        for (group, generation) in groups {
            book.known.insert((group, generation, sha));
        }
        if book.known.len() > MAX_SCRIPTS * 4 {
            book.known.clear();
        }
    }

    /// The body to send in place of the digest, when the group may not have it and it is here.
    pub(crate) fn instead(&self, digest: &[u8], group: usize, generation: u64) -> Option<Bytes> {
        let sha = sha(digest)?;
        let mut book = self.0.lock();
        if book.known.contains(&(group, generation, sha)) {
            return None;
        }
        let body = book.bodies.get(&sha).cloned()?;
        book.known.insert((group, generation, sha));
        Some(body)
    }

    pub(crate) fn has(&self, digest: &[u8]) -> bool {
        sha(digest).is_some_and(|s| self.0.lock().bodies.contains_key(&s))
    }

    /// A group has turned out not to have a script.
    pub(crate) fn unknown(&self, digest: &[u8]) {
        if let Some(sha) = sha(digest) {
            self.0.lock().known.retain(|k| k.2 != sha);
        }
    }

    /// `SCRIPT FLUSH`.
    pub(crate) fn flush(&self) {
        *self.0.lock() = Book::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_sent_where_the_script_is_not_known() {
        let scripts = Scripts::default();
        let one = b"e0e1f9fabfc9d4800c877a703b823ac0578ff8db";
        assert_eq!(scripts.instead(one, 0, 1), None);
        scripts.learn(b"return 1", [(0, 1)].into_iter());
        assert!(scripts.has(&one.to_ascii_uppercase()));
        assert_eq!(scripts.instead(one, 0, 1), None, "that group has it");
        assert_eq!(scripts.instead(one, 1, 1).as_deref(), Some(&b"return 1"[..]));
        assert_eq!(scripts.instead(one, 1, 1), None, "now it has");
        assert!(scripts.instead(one, 0, 2).is_some(), "another primary");
        scripts.unknown(one);
        assert!(scripts.instead(one, 0, 1).is_some());
        scripts.flush();
        assert!(!scripts.has(one));
    }
}
