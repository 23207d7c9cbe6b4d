//! Finds the tag of a script: the text in the last `job_success:[…]` or `job_fail:[…]` that it printed, anywhere in its output,
//! the part that is not kept included.

const MARKERS: [&[u8]; 2] = [b"job_success:[", b"job_fail:["];
/// Bytes that a marker can begin before its bracket.
const LOOK_BACK: usize = 12;
/// Characters kept of a tag.
pub(super) const TAG_CHARS: usize = 256;
/// Bytes that may make up so many characters.
const TAG_BYTES: usize = TAG_CHARS * 4;

/// Reads a stream in pieces and remembers the last whole marker.
#[derive(Debug, Default)]
pub(super) struct TagScanner {
    /// The last bytes seen while not inside a marker.
    tail: Vec<u8>,
    /// Inside a marker: what has been read of it.
    open: Option<Vec<u8>>,
    last: Option<Vec<u8>>,
}

impl TagScanner {
    /// Takes the next piece of the raw stream.
    pub(super) fn push(&mut self, mut input: &[u8]) {
        while !input.is_empty() {
            input = if self.open.is_some() {
                self.inside(input)
            } else {
                self.outside(input)
            };
        }
    }

    /// Looks for the beginning of a marker; returns what follows it.
    fn outside<'a>(&mut self, input: &'a [u8]) -> &'a [u8] {
        let mut from = 0;
        while let Some(step) = input[from..].iter().position(|b| *b == b'[') {
            let bracket = from + step;
            if self.ends_marker(&input[..=bracket]) {
                self.tail.clear();
                self.open = Some(Vec::new());
                return &input[bracket + 1..];
            }
            from = bracket + 1;
        }
        let keep = input.len().min(LOOK_BACK);
        self.tail.extend_from_slice(&input[input.len() - keep..]);
        let surplus = self.tail.len().saturating_sub(LOOK_BACK);
        self.tail.drain(..surplus);
        &[]
    }

    fn ends_marker(&self, upto: &[u8]) -> bool {
        MARKERS.iter().any(|marker| match upto.len().checked_sub(marker.len()) {
            Some(_) => upto.ends_with(marker),
            None => {
                let (before, here) = marker.split_at(marker.len() - upto.len());
                here == upto && self.tail.ends_with(before)
            }
        })
    }

    /// Reads on to the closing bracket; a line that ends first had no marker.
    fn inside<'a>(&mut self, input: &'a [u8]) -> &'a [u8] {
        let Some(text) = self.open.as_mut() else { return input };
        let end = input.iter().position(|b| *b == b']' || *b == b'\n');
        let part = &input[..end.unwrap_or(input.len())];
        let room = TAG_BYTES.saturating_sub(text.len());
        text.extend_from_slice(&part[..part.len().min(room)]);
        match end {
            Some(at) => {
                let text = self.open.take();
                if input[at] == b']' {
                    self.last = text;
                }
                &input[at + 1..]
            }
            None => &[],
        }
    }

    /// The tag, or the empty text when no marker was printed.
    pub(super) fn tag(&self) -> String {
        match &self.last {
            Some(bytes) => String::from_utf8_lossy(bytes).chars().take(TAG_CHARS).collect(),
            None => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scan(pieces: &[&[u8]]) -> String {
        let mut scanner = TagScanner::default();
        pieces.iter().for_each(|piece| scanner.push(piece));
        scanner.tag()
    }

    #[test]
    fn last_marker_wins() {
        assert_eq!(scan(&[b"x job_success:[one] y\njob_fail:[two]\n"]), "two");
        assert_eq!(scan(&[b"job_fail:[two] job_success:[]"]), "");
        assert_eq!(scan(&[b"job_success:[a][b]"]), "a");
    }

    #[test]
    fn what_is_no_marker_leaves_the_last_one() {
        assert_eq!(
            scan(&[b"job_success:[kept]\njob_fail:[cut\noff] job_failed:[no] JOB_FAIL:[no]"]),
            "kept"
        );
        assert_eq!(scan(&[b"nothing [here]"]), "");
    }

    #[test]
    fn at_most_256_characters() {
        let long = format!("job_success:[{}]", "\u{4e2d}".repeat(1000));
        assert_eq!(scan(&[long.as_bytes()]), "\u{4e2d}".repeat(TAG_CHARS));
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(cuts in proptest::collection::vec(0usize..80, 0..10), kind in 0usize..2) {
            let text = [b"[[job_success:[first] noise \xff job_success:job_fail:[".as_slice(), b"job_fail:[".as_slice()][kind];
            let text = [text, b"the tag] and job_succ job_success: [no]".as_slice()].concat();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            prop_assert_eq!(scan(&pieces), "the tag");
        }
    }
}
