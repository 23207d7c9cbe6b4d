//! Frames of plugins as a pure type: bytes in, frames out, whatever way the bytes were cut.
//!
//! Every message begins with 24 bytes (type, data id, time, length of the rest, two zeros), big-endian. What is too long is passed over,
//! byte by exact byte, so that the frames behind it are found; what can't be the beginning of a frame ends the connection, because nothing
//! behind it could be found any more. Reading sockets, and what becomes of a record, is left to [`super::connection`].

use bytes::Buf;
use gse_proto::datalink::MAX_PAYLOAD;

/// Bytes at the head of every message.
pub const HEADER: usize = 24;
/// Bytes that a dynamic report has between that and its meta area.
const DYNAMIC_HEADER: usize = 24;
/// The meta area may be declared so long; every known sender uses 408.
const MAX_META: usize = 64 << 10;
/// A length beyond this is not meant: the stream is out of step.
const ABSURD: usize = 256 << 20;
/// A question has no body; so much of one is passed over.
const MAX_QUESTION: usize = 64 << 10;

/// What a plugin wants, by the number in front of its message.
pub mod kind {
    /// A report without a layout that anybody knows; no known client sends one.
    pub const REPORT_EXT: u32 = 2;
    /// A report with a meta area: every normal record of libgse.
    pub const DYNAMIC: u32 = 9;
    /// The question who the agent is.
    pub const GET_CONF: u32 = 10;
    /// A plain report.
    pub const COMMON: u32 = 0xC01;
    /// A plain report on the operations' behalf.
    pub const OPS: u32 = 0xC0C;
}

/// Why a stream can't be read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Implausible {
    /// No message begins like this.
    #[error("a message of type {0:#x}, which is none")]
    Type(u32),
    /// A length that nobody means.
    #[error("a message of type {kind:#x} with {length} bytes, which nobody means")]
    Length {
        /// The message's type.
        kind: u32,
        /// What its header says.
        length: u32,
    },
    /// The parts of a dynamic report don't fit into each other.
    #[error("a report of {length} bytes with a meta area of {meta_max} bytes, {meta_used} of them used")]
    Meta {
        /// Bytes behind the header.
        length: u32,
        /// Declared size of the area.
        meta_max: u32,
        /// Declared use of it.
        meta_used: u32,
    },
}

/// A message at the front of the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frame<'a> {
    /// Who is the agent?
    GetConf,
    /// A record, to be passed on as it is.
    Record {
        /// The message's type.
        kind: u16,
        /// What it is routed by.
        data_id: u32,
        /// As the plugin wrote it.
        utctime: u32,
        /// What the plugin means.
        payload: &'a [u8],
    },
    /// A record that is longer than any may be; its bytes are passed over.
    TooLong {
        /// What it would have been routed by.
        data_id: u32,
        /// Bytes of its payload.
        length: usize,
    },
    /// A report whose layout nobody knows; its bytes are passed over.
    UnknownLayout {
        /// What it would have been routed by.
        data_id: u32,
    },
    /// Bytes of something that is passed over.
    Passed,
}

/// What the front of the bytes is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step<'a> {
    /// Not whole before there are so many bytes; never less than there are already and one more.
    Need(usize),
    /// A message, and how many bytes of the front it takes.
    Frame(Frame<'a>, usize),
}

/// Finds frames in a stream. One for each connection; all that it remembers is what remains to be passed over.
#[derive(Debug, Default)]
pub(super) struct Parser {
    pass_over: usize,
}

impl Parser {
    /// Looks at the front of `input`. After [`Step::Frame`] the next look is at what follows the bytes that it takes; after [`Step::Need`]
    /// at the same bytes and more.
    ///
    /// # Errors
    /// The stream is of no use after one.
    pub(super) fn next<'a>(&mut self, input: &'a [u8]) -> Result<Step<'a>, Implausible> {
        if self.pass_over > 0 {
            if input.is_empty() {
                return Ok(Step::Need(1));
            }
            let taken = self.pass_over.min(input.len());
            self.pass_over -= taken;
            return Ok(Step::Frame(Frame::Passed, taken));
        }
        let Some((mut head, rest)) = input.split_at_checked(HEADER) else {
            // A type that is none is said before the header is whole: whoever sends a few wrong bytes and waits is not kept.
            if input.len() >= 4 {
                let mut head = input;
                known(head.get_u32())?;
            }
            return Ok(Step::Need(HEADER));
        };
        let kind = known(head.get_u32())?;
        let (data_id, utctime, length) = (head.get_u32(), head.get_u32(), head.get_u32());
        let body = length as usize;
        if body > ABSURD {
            return Err(Implausible::Length { kind, length });
        }
        match kind {
            kind::GET_CONF if body > MAX_QUESTION => Err(Implausible::Length { kind, length }),
            kind::GET_CONF => {
                self.pass_over = body;
                Ok(Step::Frame(Frame::GetConf, HEADER))
            }
            kind::REPORT_EXT => {
                self.pass_over = body;
                Ok(Step::Frame(Frame::UnknownLayout { data_id }, HEADER))
            }
            kind::DYNAMIC => {
                if body < DYNAMIC_HEADER {
                    return Err(Implausible::Length { kind, length });
                }
                let Some((mut more, _)) = rest.split_at_checked(DYNAMIC_HEADER) else {
                    return Ok(Step::Need(HEADER + DYNAMIC_HEADER));
                };
                more.advance(12);
                let (meta_used, meta_max) = (more.get_u32(), more.get_u32());
                let before = DYNAMIC_HEADER + meta_max as usize;
                if before > body || meta_used > meta_max || meta_max as usize > MAX_META {
                    return Err(Implausible::Meta {
                        length,
                        meta_max,
                        meta_used,
                    });
                }
                Ok(self.record(kind, data_id, utctime, rest, before, body))
            }
            _ => Ok(self.record(kind, data_id, utctime, rest, 0, body)),
        }
    }

    /// Passes over the message at the front although it is one: `length` bytes of it, of which none were taken yet.
    pub(super) fn pass_over(&mut self, length: usize) {
        self.pass_over = length;
    }

    /// A record whose payload begins `before` bytes behind the header.
    fn record<'a>(
        &mut self,
        kind: u32,
        data_id: u32,
        utctime: u32,
        rest: &'a [u8],
        before: usize,
        body: usize,
    ) -> Step<'a> {
        let length = body - before;
        if length > MAX_PAYLOAD {
            self.pass_over = body;
            return Step::Frame(Frame::TooLong { data_id, length }, HEADER);
        }
        match rest.get(before..body) {
            Some(payload) => {
                let frame = Frame::Record {
                    kind: kind as u16,
                    data_id,
                    utctime,
                    payload,
                };
                Step::Frame(frame, HEADER + body)
            }
            None => Step::Need(HEADER + body),
        }
    }
}

/// Where, inside of the `whole` bytes that look like one report, the same report begins anew.
///
/// libgse writes a report again from its first byte when it could not be written within five seconds, whatever part of it had been taken
/// before: an agent that was stopped for a while finds a part and then the whole. It is looked for where a report did not come in one
/// piece.
pub(super) fn sent_again(front: &[u8], whole: usize) -> Option<usize> {
    let is_dynamic = front.starts_with(&kind::DYNAMIC.to_be_bytes());
    let head = front.get(..if is_dynamic { HEADER + DYNAMIC_HEADER } else { HEADER })?;
    let known = front.len();
    let end = known.min(whole + head.len() - 1);
    let begins = memchr::memmem::find_iter(&front[1..end], head).map(|at| at + 1);
    // What was taken before is the beginning of what came then.
    let same = |at: usize| front[..at.min(known - at)] == front[at..known.min(2 * at)];
    begins.filter(|at| *at < whole).find(|at| same(*at)).or_else(|| {
        // Of its header only the first bytes may have come yet.
        let least = whole
            .saturating_sub(head.len() - 1)
            .max(1)
            .max(known.saturating_sub(head.len() - 1));
        (least..whole.saturating_sub(3)).find(|at| head.starts_with(&front[*at..]))
    })
}

fn known(kind: u32) -> Result<u32, Implausible> {
    match kind {
        kind::REPORT_EXT | kind::DYNAMIC | kind::GET_CONF | kind::COMMON | kind::OPS => Ok(kind),
        other => Err(Implausible::Type(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A frame as it was understood, with bytes of its own.
    #[derive(Debug, Clone, PartialEq)]
    enum Seen {
        GetConf,
        Record(u16, u32, u32, Vec<u8>),
        TooLong(u32, usize),
        Unknown(u32),
    }

    /// What comes of a stream that is cut at `cuts`; and what is left of it that makes no frame.
    fn read(wire: &[u8], mut cuts: impl FnMut() -> usize) -> Result<(Vec<Seen>, usize), Implausible> {
        let mut parser = Parser::default();
        let (mut buffer, mut at, mut seen) = (Vec::new(), 0, Vec::new());
        while at < wire.len() {
            let end = wire.len().min(at + cuts().max(1));
            buffer.extend_from_slice(&wire[at..end]);
            at = end;
            let mut from = 0;
            loop {
                match parser.next(&buffer[from..])? {
                    Step::Need(wanted) => {
                        assert!(wanted > buffer.len() - from, "a frame that is there was not found");
                        break;
                    }
                    Step::Frame(frame, taken) => {
                        assert!(taken > 0);
                        from += taken;
                        match frame {
                            Frame::GetConf => seen.push(Seen::GetConf),
                            Frame::Record {
                                kind,
                                data_id,
                                utctime,
                                payload,
                            } => seen.push(Seen::Record(kind, data_id, utctime, payload.to_vec())),
                            Frame::TooLong { data_id, length } => seen.push(Seen::TooLong(data_id, length)),
                            Frame::UnknownLayout { data_id } => seen.push(Seen::Unknown(data_id)),
                            Frame::Passed => {}
                        }
                    }
                }
            }
            buffer.drain(..from);
        }
        Ok((seen, buffer.len()))
    }

    fn hex(text: &str) -> Vec<u8> {
        hex::decode(text.replace([' ', '\n'], "")).unwrap()
    }

    fn plain(kind: u32, data_id: u32, payload: &[u8]) -> Vec<u8> {
        let mut wire = Vec::new();
        for number in [kind, data_id, 7, payload.len() as u32, 0, 0] {
            wire.extend_from_slice(&number.to_be_bytes());
        }
        wire.extend_from_slice(payload);
        wire
    }

    fn dynamic(data_id: u32, meta: &[u8], meta_max: u32, payload: &[u8]) -> Vec<u8> {
        let mut wire = Vec::new();
        let length = 24 + meta_max + payload.len() as u32;
        for number in [
            9,
            data_id,
            7,
            length,
            0,
            0,
            0,
            0,
            0,
            meta.len() as u32,
            meta_max,
            u32::from(!meta.is_empty()),
        ] {
            wire.extend_from_slice(&number.to_be_bytes());
        }
        wire.extend_from_slice(meta);
        wire.resize(48 + meta_max as usize, 0);
        wire.extend_from_slice(payload);
        wire
    }

    #[test]
    fn published_bytes_are_understood() {
        // contract: data-plane#5, data-plane#4, data-plane#41
        let payload = b"payload";
        for (head, kind) in [
            ("00000c01 00000596 64489136 00000007 00000000 00000000", 0xC01),
            ("00000c0c 00000596 64489136 00000007 00000000 00000000", 0xC0C),
        ] {
            let mut wire = hex(head);
            wire.extend_from_slice(payload);
            let (seen, left) = read(&wire, || 1000).unwrap();
            assert_eq!(seen, [Seen::Record(kind, 1430, 0x6448_9136, payload.to_vec())]);
            assert_eq!(left, 0);
        }
        let mut wire = hex(
            "00000009 00000596 64489136 000001b7 00000000 00000000 0000000000000000 00000000 00000000 00000198 00000000",
        );
        wire.resize(48 + 408, 0);
        wire.extend_from_slice(payload);
        assert_eq!(wire.len(), 463);
        let record = Seen::Record(9, 1430, 0x6448_9136, payload.to_vec());
        assert_eq!(read(&wire, || 1000).unwrap().0, std::slice::from_ref(&record));

        // With one entry in the meta area: `tlogc` = `2017-01-09 21:18`.
        let mut meta = hex("00000005 00000010");
        meta.extend_from_slice(b"tlogc2017-01-09 21:18");
        assert_eq!(meta.len(), 29);
        wire[36..40].copy_from_slice(&29_u32.to_be_bytes());
        wire[44..48].copy_from_slice(&1_u32.to_be_bytes());
        wire[48..48 + 29].copy_from_slice(&meta);
        assert_eq!(read(&wire, || 1000).unwrap().0, [record]);

        // The beginning of a frame of bkmonitorbeat that was seen on a host: 1,712 bytes in total.
        let mut seen_there = hex("00000009 00180015 64489136 00000698 00000000 00000000 0000000000000000 00000000");
        seen_there.extend_from_slice(&hex("00000000 00000198 00000000"));
        seen_there.resize(48 + 408, 0);
        seen_there.resize(1712, b'x');
        let (seen, left) = read(&seen_there, || 1000).unwrap();
        assert_eq!(seen, [Seen::Record(9, 1_572_885, 0x6448_9136, vec![b'x'; 1256])]);
        assert_eq!(left, 0);

        let mut question = hex("0000000a");
        question.resize(24, 0);
        assert_eq!(read(&question, || 1000).unwrap().0, [Seen::GetConf]);
    }

    #[test]
    fn what_is_too_long_is_passed_over_exactly() {
        // contract: data-plane#38
        let longest = vec![b'l'; MAX_PAYLOAD];
        let mut wire = plain(kind::COMMON, 1, &longest);
        wire.extend(dynamic(2, b"", 408, &longest));
        wire.extend(plain(kind::COMMON, 3, &vec![b'x'; MAX_PAYLOAD + 1]));
        wire.extend(dynamic(4, b"", 408, &vec![b'x'; MAX_PAYLOAD + 1]));
        wire.extend(plain(kind::REPORT_EXT, 5, b"whatever it may mean"));
        wire.extend(plain(kind::OPS, 6, b"behind it"));
        let (seen, left) = read(&wire, || 1 << 20).unwrap();
        assert_eq!(
            seen,
            [
                Seen::Record(0xC01, 1, 7, longest.clone()),
                Seen::Record(9, 2, 7, longest),
                Seen::TooLong(3, MAX_PAYLOAD + 1),
                Seen::TooLong(4, MAX_PAYLOAD + 1),
                Seen::Unknown(5),
                Seen::Record(0xC0C, 6, 7, b"behind it".to_vec()),
            ]
        );
        assert_eq!(left, 0);
    }

    #[test]
    fn what_can_be_no_frame_is_said() {
        // contract: data-plane#10
        let mut parser = Parser::default();
        assert_eq!(parser.next(b"GET "), Err(Implausible::Type(0x4745_5420)));
        assert_eq!(parser.next(b"GE"), Ok(Step::Need(HEADER)));
        let mut absurd = plain(kind::COMMON, 1, b"");
        absurd[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(matches!(parser.next(&absurd), Err(Implausible::Length { .. })));
        let mut meta = dynamic(1, b"", 408, b"payload");
        meta[40..44].copy_from_slice(&416_u32.to_be_bytes());
        assert!(matches!(parser.next(&meta), Err(Implausible::Meta { .. })));
        let mut used = dynamic(1, b"", 408, b"payload");
        used[36..40].copy_from_slice(&409_u32.to_be_bytes());
        assert!(matches!(parser.next(&used), Err(Implausible::Meta { .. })));
        let mut short = dynamic(1, b"", 408, b"payload");
        short[12..16].copy_from_slice(&23_u32.to_be_bytes());
        assert!(matches!(parser.next(&short), Err(Implausible::Length { .. })));
    }

    #[test]
    fn a_report_that_is_sent_again_is_found() {
        let payload: Vec<u8> = (0..3_000_u32).flat_map(|n| n.to_le_bytes()).collect();
        for whole in [plain(kind::COMMON, 7, &payload), dynamic(7, b"", 408, &payload)] {
            let mut wire = whole.clone();
            wire.extend_from_slice(&plain(kind::OPS, 8, b"behind it"));
            assert_eq!(sent_again(&wire, whole.len()), None);
            // Parts that end anywhere, and what has come of the second try.
            for part in [49, 500, 6_000, whole.len() - 60, whole.len() - 20, whole.len() - 4] {
                let mut wire = whole[..part].to_vec();
                wire.extend_from_slice(&whole);
                for come in [whole.len(), whole.len() + 10, wire.len()] {
                    assert_eq!(
                        sent_again(&wire[..come.min(wire.len())], whole.len()),
                        Some(part),
                        "{part}, {come}"
                    );
                }
            }
        }
        // The header of the report in its own payload is no second try.
        let mut odd = plain(kind::COMMON, 7, &payload);
        let head = odd[..HEADER].to_vec();
        odd[100..100 + HEADER].copy_from_slice(&head);
        assert_eq!(sent_again(&odd, odd.len()), None);
    }

    fn any_frame() -> impl Strategy<Value = (Vec<u8>, Seen)> {
        let payload = proptest::collection::vec(any::<u8>(), 0..600);
        prop_oneof![
            Just((plain(kind::GET_CONF, 0, b""), Seen::GetConf)),
            (any::<u32>(), payload.clone(), any::<bool>()).prop_map(|(id, payload, ops)| {
                let kind = if ops { kind::OPS } else { kind::COMMON };
                let seen = Seen::Record(kind as u16, id, 7, payload.clone());
                (plain(kind, id, &payload), seen)
            }),
            (any::<u32>(), 0..900_u32, payload.clone()).prop_map(|(id, meta_max, payload)| {
                let meta = vec![b'm'; meta_max as usize / 2];
                (dynamic(id, &meta, meta_max, &payload), Seen::Record(9, id, 7, payload))
            }),
            (any::<u32>(), payload).prop_map(|(id, body)| (plain(kind::REPORT_EXT, id, &body), Seen::Unknown(id))),
        ]
    }

    proptest! {
        #[test]
        fn however_the_bytes_are_cut(
            frames in proptest::collection::vec(any_frame(), 1..12),
            cuts in proptest::collection::vec(1usize..700, 1..40),
            half in 0usize..23,
        ) {
            // contract: data-plane#8, data-plane#50
            let mut wire: Vec<u8> = frames.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
            wire.extend_from_slice(&plain(kind::COMMON, 1, b"")[..half]);
            let mut next = cuts.iter().cycle();
            let (seen, left) = read(&wire, || *next.next().unwrap()).unwrap();
            let expected: Vec<Seen> = frames.into_iter().map(|(_, seen)| seen).collect();
            prop_assert_eq!(&seen, &expected);
            prop_assert_eq!(left, half, "what is not whole stays, and nothing else");
            prop_assert_eq!(read(&wire, || 1).unwrap().0, expected);
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400), kind in 0usize..6, step in 1usize..50) {
            let mut wire = bytes;
            if let Some(kind) = [2_u32, 9, 10, 0xC01, 0xC0C].get(kind) {
                wire.splice(0..4.min(wire.len()), kind.to_be_bytes());
            }
            // Whatever it is: it ends, in bounds.
            drop(read(&wire, || step));
        }
    }
}
