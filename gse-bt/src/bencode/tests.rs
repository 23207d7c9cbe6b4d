use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone, PartialEq)]
enum Tree {
    Int(i64),
    Bytes(Vec<u8>),
    List(Vec<Tree>),
    Dict(BTreeMap<Vec<u8>, Tree>),
}

fn tree() -> impl Strategy<Value = Tree> {
    let leaf = prop_oneof![
        any::<i64>().prop_map(Tree::Int),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Tree::Bytes),
    ];
    leaf.prop_recursive(6, 64, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Tree::List),
            prop::collection::btree_map(prop::collection::vec(any::<u8>(), 0..8), inner, 0..8).prop_map(Tree::Dict),
        ]
    })
}

fn encode(tree: &Tree, out: &mut Encoder) {
    match tree {
        Tree::Int(value) => out.int(*value),
        Tree::Bytes(value) => out.bytes(value),
        Tree::List(values) => out.list(|out| values.iter().for_each(|value| encode(value, out))),
        Tree::Dict(values) => out.dict(|out| values.iter().for_each(|(key, value)| encode(value, out.key(key)))),
    }
}

fn to_bytes(tree: &Tree) -> Vec<u8> {
    let mut out = Encoder::new();
    encode(tree, &mut out);
    out.finish()
}

fn from_value(value: Value<'_>) -> Tree {
    match value {
        Value::Int(value) => Tree::Int(value),
        Value::Bytes(value) => Tree::Bytes(value.to_vec()),
        Value::List(list) => Tree::List(list.iter().map(from_value).collect()),
        Value::Dict(dict) => Tree::Dict(
            dict.iter()
                .map(|(key, value)| (key.to_vec(), from_value(value)))
                .collect(),
        ),
    }
}

/// The same, read by somebody else's decoder.
fn by_bendy(object: bendy::decoding::Object<'_, '_>) -> Result<Tree, bendy::decoding::Error> {
    use bendy::decoding::Object;
    Ok(match object {
        Object::Integer(digits) => Tree::Int(digits.parse()?),
        Object::Bytes(bytes) => Tree::Bytes(bytes.to_vec()),
        Object::List(mut list) => {
            let mut out = Vec::new();
            while let Some(object) = list.next_object()? {
                out.push(by_bendy(object)?);
            }
            Tree::List(out)
        }
        Object::Dict(mut dict) => {
            let mut out = BTreeMap::new();
            while let Some((key, object)) = dict.next_pair()? {
                out.insert(key.to_vec(), by_bendy(object)?);
            }
            Tree::Dict(out)
        }
    })
}

fn kind(input: &[u8]) -> ErrorKind {
    decode(input).expect_err("refused").kind
}

#[test]
fn numbers_are_canonical() {
    for (input, value) in [
        (&b"i0e"[..], 0),
        (b"i-1e", -1),
        (b"i9223372036854775807e", i64::MAX),
        (b"i-9223372036854775808e", i64::MIN),
    ] {
        assert_eq!(decode(input), Ok(Value::Int(value)));
    }
    for input in [
        &b"ie"[..],
        b"i-e",
        b"i-0e",
        b"i00e",
        b"i01e",
        b"i-01e",
        b"i1",
        b"i1x",
        b"i 1e",
        b"i+1e",
        b"01:a",
        b"-1:a",
    ] {
        assert!(decode(input).is_err(), "{}", input.escape_ascii());
    }
    assert_eq!(kind(b"i9223372036854775808e"), ErrorKind::NumberTooLarge);
    assert_eq!(kind(b"i-9223372036854775809e"), ErrorKind::NumberTooLarge);
    assert_eq!(kind(b"99999999999999999999:a"), ErrorKind::NumberTooLarge);
}

#[test]
fn what_is_cut_or_mixed_up_is_refused() {
    assert_eq!(kind(b""), ErrorKind::Ended);
    assert_eq!(kind(b"5:abc"), ErrorKind::Ended);
    assert_eq!(kind(b"9223372036854775807:abc"), ErrorKind::Ended);
    assert_eq!(kind(b"l"), ErrorKind::Ended);
    assert_eq!(kind(b"d1:a"), ErrorKind::Ended);
    assert_eq!(kind(b"d1:ae"), ErrorKind::KeyWithoutValue);
    assert_eq!(kind(b"di1ei2ee"), ErrorKind::KeyNotAString);
    assert_eq!(kind(b"e"), ErrorKind::NotAValue);
    assert_eq!(kind(b"x"), ErrorKind::NotAValue);
    assert_eq!(kind(b"i1ei2e"), ErrorKind::Trailing);
    assert_eq!(decode_prefix(b"i1ei2e"), Ok((Value::Int(1), 3)));
}

#[test]
fn depth_has_a_bound() {
    let nested = |depth: usize| [vec![b'l'; depth], vec![b'e'; depth]].concat();
    assert!(decode(&nested(MAX_DEPTH)).is_ok());
    assert_eq!(kind(&nested(MAX_DEPTH + 1)), ErrorKind::TooDeep);
    assert_eq!(kind(&vec![b'l'; 16 << 20]), ErrorKind::TooDeep);
    assert_eq!(kind(&b"d0:".repeat(1 << 20)), ErrorKind::TooDeep);
}

#[test]
fn keys_out_of_order_are_taken_and_the_first_of_two_counts() {
    let value = decode(b"d1:bi1e1:ai2e1:bi3ee").expect("taken");
    let dict = value.dict().expect("a dictionary");
    assert_eq!(dict.get(b"b"), Some(Value::Int(1)));
    assert_eq!(dict.get(b"a"), Some(Value::Int(2)));
    assert_eq!(dict.get(b"c"), None);
    assert_eq!(dict.iter().count(), 3);
}

proptest! {
    #[test]
    fn round_trip_and_the_same_as_bendy(tree in tree()) {
        let bytes = to_bytes(&tree);
        prop_assert_eq!(&from_value(decode(&bytes).expect("own encoding")), &tree);
        let mut theirs = bendy::decoding::Decoder::new(&bytes);
        let object = theirs.next_object().expect("canonical").expect("a value");
        prop_assert_eq!(&by_bendy(object).expect("canonical"), &tree);
    }

    #[test]
    fn cut_and_changed_input_never_panics(tree in tree(), cut in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = to_bytes(&tree);
        let at = cut.index(bytes.len());
        prop_assert!(decode(&bytes[..at]).is_err(), "no beginning of a value is a value");
        bytes[at] = byte;
        if let Ok(value) = decode(&bytes) {
            from_value(value);
        }
    }

    /// Whatever our decoder takes with sorted keys, another strict one takes too.
    #[test]
    fn random_input_never_panics(bytes in prop::collection::vec(prop::sample::select(&b"ilde0123:-a"[..]), 0..40)) {
        if let Ok((value, used)) = decode_prefix(&bytes) {
            prop_assert!(used <= bytes.len());
            let tree = from_value(value);
            if to_bytes(&tree) == bytes[..used] {
                let mut theirs = bendy::decoding::Decoder::new(&bytes[..used]);
                let object = theirs.next_object().expect("taken by both").expect("a value");
                prop_assert_eq!(&by_bendy(object).expect("taken by both"), &tree);
            }
        }
    }
}
