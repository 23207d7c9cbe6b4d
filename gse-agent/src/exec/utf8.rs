//! Makes a stream of bytes valid UTF-8, whatever pieces it arrives in: each invalid sequence becomes U+FFFD, and a character
//! that is split between two pieces is held back until it is whole. Where the bytes come from and how many of them are kept is
//! left to [`super::capture`].

/// The replacement character in UTF-8.
const REPLACEMENT: &[u8] = "\u{FFFD}".as_bytes();

/// The state between two pieces: at most three bytes of a character that has begun.
#[derive(Debug, Default)]
pub(super) struct Sanitizer {
    carry: Vec<u8>,
}

impl Sanitizer {
    /// Appends to `out` everything in `input` that is decided by now.
    pub(super) fn push(&mut self, input: &[u8], out: &mut Vec<u8>) {
        if self.carry.is_empty() {
            let rest = decode(input, out);
            self.carry.extend_from_slice(rest);
            return;
        }
        // A begun character is completed byte by byte, so that the bulk of the input is never copied.
        let mut taken = 0;
        while !self.carry.is_empty() && taken < input.len() {
            self.carry.push(input[taken]);
            taken += 1;
            let whole = std::mem::take(&mut self.carry);
            let rest = decode(&whole, out);
            self.carry.extend_from_slice(rest);
        }
        let rest = decode(&input[taken..], out);
        self.carry.extend_from_slice(rest);
    }

    /// The stream is over: a character that was begun and never finished becomes U+FFFD.
    pub(super) fn finish(&mut self, out: &mut Vec<u8>) {
        if !self.carry.is_empty() {
            self.carry.clear();
            out.extend_from_slice(REPLACEMENT);
        }
    }
}

/// Appends what is valid or certainly invalid and returns the undecided end.
fn decode<'a>(mut input: &'a [u8], out: &mut Vec<u8>) -> &'a [u8] {
    loop {
        match std::str::from_utf8(input) {
            Ok(_) => {
                out.extend_from_slice(input);
                return &[];
            }
            Err(error) => {
                let (valid, rest) = input.split_at(error.valid_up_to());
                out.extend_from_slice(valid);
                match error.error_len() {
                    Some(bad) => {
                        out.extend_from_slice(REPLACEMENT);
                        input = &rest[bad..];
                    }
                    None => return rest,
                }
            }
        }
    }
}

/// The largest `n <= at` at which `text` (valid UTF-8) can be cut without splitting a character.
pub(super) fn boundary(text: &[u8], at: usize) -> usize {
    let mut at = at.min(text.len());
    while at > 0 && at < text.len() && (text[at] & 0xC0) == 0x80 {
        at -= 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn in_pieces(pieces: &[Vec<u8>]) -> Vec<u8> {
        let mut sanitizer = Sanitizer::default();
        let mut out = Vec::new();
        for piece in pieces {
            sanitizer.push(piece, &mut out);
            assert!(std::str::from_utf8(&out).is_ok(), "split a character");
        }
        sanitizer.finish(&mut out);
        out
    }

    /// Bytes that are close to being UTF-8: whole characters, and pieces of them.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            any::<u8>().prop_map(|b| vec![b]),
            any::<char>().prop_map(|c| c.to_string().into_bytes()),
            any::<char>().prop_map(|c| {
                let mut bytes = c.to_string().into_bytes();
                bytes.pop();
                bytes
            }),
        ];
        proptest::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn any_chunking_is_the_lossy_whole(pieces in proptest::collection::vec(bytes(), 0..8)) {
            let whole = pieces.concat();
            prop_assert_eq!(in_pieces(&pieces), String::from_utf8_lossy(&whole).into_owned().into_bytes());
        }

        #[test]
        fn a_boundary_is_one(text in ".{0,40}", at in 0usize..200) {
            let cut = boundary(text.as_bytes(), at);
            prop_assert!(text.is_char_boundary(cut));
            prop_assert!(cut <= at && at.min(text.len()) - cut < 4);
        }
    }

    #[test]
    fn byte_by_byte() {
        let input = b"a\xF0\x9F\x98\x80b\xF0\x9F\xFFc\xE2\x82";
        let pieces: Vec<Vec<u8>> = input.iter().map(|b| vec![*b]).collect();
        assert_eq!(
            in_pieces(&pieces),
            String::from_utf8_lossy(input).into_owned().into_bytes()
        );
    }
}
