//! Any cutting of the input gives the same requests; noise never panics; the bounds hold.

use proptest::prelude::*;

use super::parse::{Limits, Parser, ProtocolError, UNAUTHENTICATED};
use super::skip::{End, Skipper};

const LIMITS: Limits = Limits {
    max_args: 1000,
    max_bulk: 100_000,
    max_query: 1_000_000,
};

type Parsed = (Vec<Vec<Vec<u8>>>, Option<ProtocolError>);

fn parse(pieces: &[&[u8]], limits: &Limits, max_frames: usize) -> Parsed {
    let mut parser = Parser::default();
    let mut all = Vec::new();
    for piece in pieces {
        parser.buf.extend_from_slice(piece);
        loop {
            let broken = parser.parse(limits, max_frames).err();
            let requests = parser.take();
            for i in 0..requests.len() {
                all.push(requests.args(i).iter().map(<[u8]>::to_vec).collect());
            }
            if broken.is_some() {
                return (all, broken);
            }
            if requests.len() < max_frames {
                break;
            }
        }
    }
    (all, None)
}

fn cut<'a>(bytes: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
    let mut places: Vec<usize> = cuts.iter().map(|c| c % (bytes.len() + 1)).collect();
    places.extend([0, bytes.len()]);
    places.sort_unstable();
    places.windows(2).map(|w| &bytes[w[0]..w[1]]).collect()
}

fn encode(commands: &[Vec<Vec<u8>>], inline: &[bool]) -> Vec<u8> {
    let mut out = Vec::new();
    for (c, inline) in commands.iter().zip(inline.iter().cycle()) {
        if *inline
            && c.iter()
                .all(|a| !a.is_empty() && a.iter().all(u8::is_ascii_alphanumeric))
        {
            out.extend_from_slice(&c.join(&b' '));
            out.extend_from_slice(b"\r\n");
        } else {
            out.extend_from_slice(format!("*{}\r\n", c.len()).as_bytes());
            for a in c {
                out.extend_from_slice(format!("${}\r\n", a.len()).as_bytes());
                out.extend_from_slice(a);
                out.extend_from_slice(b"\r\n");
            }
        }
    }
    out
}

fn word() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        "[a-z]{1,8}".prop_map(String::into_bytes)
    ]
}

proptest! {
    #[test]
    fn any_cutting_gives_the_same_requests(
        commands in prop::collection::vec(prop::collection::vec(word(), 1..6), 1..20),
        inline in prop::collection::vec(any::<bool>(), 1..5),
        cuts in prop::collection::vec(any::<usize>(), 0..40),
        max_frames in 1usize..8,
    ) {
        let bytes = encode(&commands, &inline);
        let (got, broken) = parse(&cut(&bytes, &cuts), &LIMITS, max_frames);
        prop_assert_eq!(broken, None);
        prop_assert_eq!(&got, &commands);
        let one_by_one: Vec<&[u8]> = bytes.chunks(1).collect();
        prop_assert_eq!(&parse(&one_by_one, &LIMITS, max_frames).0, &commands);
    }

    #[test]
    fn noise_is_an_error_or_nothing_and_the_same_however_it_is_cut(
        noise in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(b"*$\r\n-0123456789\"'\\ x".to_vec())], 0..300),
        cuts in prop::collection::vec(any::<usize>(), 0..20),
    ) {
        let whole = parse(&[&noise], &LIMITS, 4);
        prop_assert_eq!(parse(&cut(&noise, &cuts), &LIMITS, 4), whole);
        let _ = parse(&[&noise], &UNAUTHENTICATED, 4);
    }

    #[test]
    fn replies_end_where_they_end_however_they_are_cut(replies in prop::collection::vec(reply(3), 1..10), cuts in prop::collection::vec(any::<usize>(), 0..30)) {
        let bytes = replies.concat();
        let (mut skipper, mut ends, mut base) = (Skipper::default(), Vec::new(), 0);
        for piece in cut(&bytes, &cuts) {
            let mut at = 0;
            while at < piece.len() {
                match skipper.next(piece, at).unwrap() {
                    Some(End::Reply(end) | End::Push(end)) => { ends.push(base + end); at = end; }
                    None => break,
                }
            }
            base += piece.len();
        }
        let want: Vec<usize> = replies.iter().scan(0, |sum, r| { *sum += r.len(); Some(*sum) }).collect();
        prop_assert_eq!(ends, want);
    }

    #[test]
    fn noise_instead_of_replies_never_panics(noise in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(b"*$+-:%>|~,_\r\n0123456789".to_vec())], 0..300)) {
        let (mut skipper, mut at) = (Skipper::default(), 0);
        while at < noise.len() {
            match skipper.next(&noise, at) {
                Ok(Some(End::Reply(end) | End::Push(end))) => { prop_assert!(end > at); at = end; }
                Ok(None) | Err(_) => break,
            }
        }
    }
}

/// A reply of at most this depth.
fn reply(depth: u32) -> BoxedStrategy<Vec<u8>> {
    let leaf = prop_oneof![
        Just(b"+OK\r\n".to_vec()),
        Just(b"-ERR no\r\n".to_vec()),
        Just(b":42\r\n".to_vec()),
        Just(b"$-1\r\n".to_vec()),
        Just(b"*-1\r\n".to_vec()),
        Just(b"_\r\n".to_vec()),
        Just(b"*0\r\n".to_vec()),
        Just(b",1.5\r\n".to_vec()),
        Just(b"=7\r\ntxt:abc\r\n".to_vec()),
        prop::collection::vec(any::<u8>(), 0..20).prop_map(|b| {
            let mut out = format!("${}\r\n", b.len()).into_bytes();
            out.extend(b);
            out.extend(b"\r\n");
            out
        }),
    ];
    leaf.prop_recursive(depth, 40, 5, |inner| {
        (
            prop::sample::select(b"*~>%|".to_vec()),
            prop::collection::vec(inner, 0..6),
        )
            .prop_map(|(kind, items)| {
                // Pairs for maps; an attribute is followed by what it belongs to.
                let mut items = items;
                if matches!(kind, b'%' | b'|') && items.len() % 2 == 1 {
                    items.pop();
                }
                let n = if matches!(kind, b'%' | b'|') {
                    items.len() / 2
                } else {
                    items.len()
                };
                let mut out = vec![kind];
                out.extend(format!("{n}\r\n").bytes());
                out.extend(items.concat());
                if kind == b'|' {
                    out.extend(b":1\r\n");
                }
                out
            })
    })
    .boxed()
}

#[test]
fn the_bounds_hold_before_anything_is_stored() {
    let error = |input: &[u8], limits: &Limits| parse(&[input], limits, 10).1.map(|e| e.0).unwrap_or_default();
    assert_eq!(error(b"*1001\r\n", &LIMITS), "Protocol error: invalid multibulk length");
    assert_eq!(
        error(b"*2147483648\r\n", &LIMITS),
        "Protocol error: invalid multibulk length"
    );
    assert_eq!(
        error(b"*1\r\n$100001\r\n", &LIMITS),
        "Protocol error: invalid bulk length"
    );
    assert_eq!(error(b"*1\r\n$-1\r\n", &LIMITS), "Protocol error: invalid bulk length");
    assert_eq!(error(b"*1\r\n+a\r\n", &LIMITS), "Protocol error: expected '$', got '+'");
    assert_eq!(
        error(b"*11\r\n", &UNAUTHENTICATED),
        "Protocol error: unauthenticated multibulk length"
    );
    assert_eq!(
        error(b"*1\r\n$16385\r\n", &UNAUTHENTICATED),
        "Protocol error: unauthenticated bulk length"
    );
    assert_eq!(
        error(&[b'*'; 100], &LIMITS),
        "Protocol error: too big mbulk count string"
    );
    assert_eq!(
        error(&vec![b'a'; 70_000], &LIMITS),
        "Protocol error: too big inline request"
    );
    assert_eq!(
        error(b"set a \"b\r\n", &LIMITS),
        "Protocol error: unbalanced quotes in request"
    );
    // Many arguments, each within its bound, are still bounded as a whole.
    let mut large = b"*1000\r\n".to_vec();
    for _ in 0..12 {
        large.extend_from_slice(b"$99999\r\n");
        large.extend(vec![b'x'; 99_999]);
        large.extend_from_slice(b"\r\n");
    }
    assert_eq!(
        error(&large, &LIMITS),
        "Protocol error: request is larger than this server accepts"
    );
}

#[test]
fn inline_words_may_be_quoted() {
    let (got, broken) = parse(&[b"set \"a b\" 'c\\'d' \"\\x41\\n\"\r\n\r\nping\n"], &LIMITS, 10);
    assert_eq!(broken, None);
    let want: Vec<Vec<&[u8]>> = vec![vec![b"set", b"a b", b"c'd", b"A\n"], vec![b"ping"]];
    assert_eq!(got, want);
}
