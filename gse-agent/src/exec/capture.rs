//! Keeps the head of a script's output as valid UTF-8, up to a limit that includes the marker which says at its end where it was cut
//! and how much there was, and watches all of it for the tag. Reading the pipe is left to [`super::runner`].

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::tag::TagScanner;
use super::utf8::{Sanitizer, boundary};

/// Output on its way into the spool.
#[derive(Debug)]
pub(super) struct Capture {
    file: File,
    sanitizer: Sanitizer,
    tags: TagScanner,
    limit: usize,
    /// In the file.
    kept: usize,
    /// Valid text behind what is in the file, in the last bytes under the limit: it is kept only if nothing follows that would
    /// make the marker necessary.
    held: Vec<u8>,
    /// Nothing more is kept.
    cut: bool,
    /// There was more than the limit allows.
    too_much: bool,
    /// Bytes that the script has written.
    written: u64,
    trouble: Option<String>,
}

fn marker(at: usize, written: u64) -> String {
    format!("\n[output cut at {at} bytes, {written} were written]\n")
}

/// Space set aside for the longest marker.
const MARKER: usize = "\n[output cut at 18446744073709551615 bytes, 18446744073709551615 were written]\n".len();

impl Capture {
    /// Begins an empty spool file.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn create(path: &Path, limit: u64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let (sanitizer, tags) = Default::default();
        Ok(Self {
            file,
            sanitizer,
            tags,
            limit,
            kept: 0,
            held: Vec::new(),
            cut: false,
            too_much: false,
            written: 0,
            trouble: None,
        })
    }

    /// Takes the next piece from the pipe. Returns whether the file grew.
    pub(super) fn push(&mut self, input: &[u8]) -> bool {
        self.tags.push(input);
        self.written += input.len() as u64;
        if self.cut {
            return false;
        }
        let mut text = std::mem::take(&mut self.held);
        self.sanitizer.push(input, &mut text);
        self.keep(text)
    }

    fn keep(&mut self, text: Vec<u8>) -> bool {
        let total = self.kept + text.len();
        let room = self.limit.saturating_sub(MARKER).saturating_sub(self.kept);
        let head = boundary(&text, room);
        let grew = self.append(&text[..head]);
        if self.cut {
            return grew;
        }
        if total > self.limit {
            // How much there was is known at the end only, so the marker is written then.
            self.cut = true;
            self.too_much = true;
            return grew;
        }
        self.held = text;
        self.held.drain(..head);
        grew
    }

    fn append(&mut self, text: &[u8]) -> bool {
        if text.is_empty() {
            return false;
        }
        match self.file.write_all(text) {
            Ok(()) => {
                self.kept += text.len();
                true
            }
            Err(error) => {
                // The script goes on; what cannot be kept is lost, and the row says so.
                self.trouble = Some(format!(
                    "only {} bytes of output could be kept in the agent's spool: {error}",
                    self.kept
                ));
                self.cut = true;
                let kept = u64::try_from(self.kept).unwrap_or(u64::MAX);
                if let Err(error) = self.file.set_len(kept) {
                    self.trouble = Some(format!("the agent's spool is damaged: {error}"));
                }
                false
            }
        }
    }

    /// Everything that will be kept has been read: completes the file and puts it on disk.
    pub(super) fn finish(&mut self) {
        if !self.cut {
            let mut text = std::mem::take(&mut self.held);
            self.sanitizer.finish(&mut text);
            if self.kept + text.len() <= self.limit {
                self.append(&text);
            } else {
                self.keep(text);
            }
        }
        self.cut = true;
        let mark = marker(self.kept, self.written);
        // A limit below the marker's own length leaves no place for it.
        if self.too_much && self.trouble.is_none() && self.kept + mark.len() <= self.limit {
            self.append(mark.as_bytes());
        }
        if let Err(error) = self.file.sync_all() {
            self.trouble
                .get_or_insert(format!("the output may not survive a power cut: {error}"));
        }
    }

    /// Bytes in the file.
    pub(super) fn len(&self) -> u64 {
        self.kept as u64
    }

    /// The tag so far.
    pub(super) fn tag(&self) -> String {
        self.tags.tag()
    }

    /// What went wrong with the spool, for the row.
    pub(super) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(limit: u64, pieces: &[&[u8]]) -> Vec<u8> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("out");
        let mut capture = Capture::create(&path, limit).expect("create");
        for piece in pieces {
            capture.push(piece);
            assert!(capture.len() <= limit);
        }
        capture.finish();
        let bytes = std::fs::read(&path).expect("read");
        assert_eq!(bytes.len() as u64, capture.len());
        assert!(capture.trouble().is_none());
        bytes
    }

    #[test]
    fn exactly_the_limit_is_whole() {
        let text = [b'x'; 200];
        assert_eq!(run(200, &[&text]), text);
        assert_eq!(run(200, &[&text[..199], &text[..1]]), text);
        let cut = run(200, &[&text, b"y", &text]);
        let kept = 200 - MARKER;
        let mark = format!("\n[output cut at {kept} bytes, 401 were written]\n");
        assert_eq!(String::from_utf8_lossy(&cut), format!("{}{mark}", "x".repeat(kept)));
    }

    #[test]
    fn the_tag_may_lie_behind_the_cut() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut capture = Capture::create(&dir.path().join("out"), 50).expect("create");
        capture.push(&[b'a'; 1000]);
        capture.push(b"job_success:[late]");
        capture.finish();
        assert_eq!(capture.tag(), "late");
        assert!(capture.len() <= 50);
    }

    proptest! {
        #[test]
        fn never_too_long_never_half_a_character(limit in 0u64..300, text in "[a-z\u{e9}\u{4e2d}\u{1f600}]{0,200}", step in 1usize..50) {
            let pieces: Vec<&[u8]> = text.as_bytes().chunks(step).collect();
            let out = run(limit, &pieces);
            prop_assert!(out.len() as u64 <= limit);
            let out = String::from_utf8(out).expect("valid text");
            if text.len() as u64 <= limit {
                prop_assert_eq!(out, text);
            } else if let Some((head, number)) = out.split_once("\n[output cut at ") {
                prop_assert!(text.starts_with(head));
                prop_assert_eq!(number, format!("{} bytes, {} were written]\n", head.len(), text.len()));
            } else {
                prop_assert!(limit < MARKER as u64);
            }
        }
    }
}
