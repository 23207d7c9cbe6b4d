use bytes::{BufMut as _, Bytes, BytesMut};
use proptest::prelude::*;

use super::*;
use crate::geometry::{Block, MAX_BLOCK, MAX_PIECES};

fn block() -> impl Strategy<Value = Block> {
    (any::<u32>(), any::<u32>(), any::<u32>()).prop_map(|(piece, begin, len)| Block { piece, begin, len })
}

fn bytes(most: usize) -> impl Strategy<Value = Bytes> {
    prop::collection::vec(any::<u8>(), 0..most).prop_map(Bytes::from)
}

fn message() -> impl Strategy<Value = Message> {
    prop_oneof![
        prop::sample::select(vec![
            Message::KeepAlive,
            Message::Choke,
            Message::Unchoke,
            Message::Interested,
            Message::NotInterested,
            Message::HaveAll,
            Message::HaveNone,
            Message::Unknown(99),
        ]),
        any::<u32>().prop_map(Message::Have),
        any::<u32>().prop_map(Message::Suggest),
        any::<u32>().prop_map(Message::AllowedFast),
        any::<u16>().prop_map(Message::Port),
        block().prop_map(Message::Request),
        block().prop_map(Message::Cancel),
        block().prop_map(Message::Reject),
        bytes(100).prop_map(Message::Bitfield),
        (any::<u32>(), any::<u32>(), bytes(200), any::<u8>()).prop_map(|(piece, begin, data, first)| Message::Piece {
            piece,
            begin,
            data: [&[first], data.as_ref()].concat().into(),
        }),
        (any::<u8>(), bytes(100)).prop_map(|(id, payload)| Message::Extended { id, payload }),
    ]
}

fn encoded(message: &Message) -> BytesMut {
    let mut buffer = BytesMut::new();
    message.encode(&mut buffer);
    buffer
}

fn refused(raw: &[u8]) -> WireError {
    Message::decode(&mut BytesMut::from(raw)).expect_err("refused")
}

#[test]
fn bytes_are_those_of_the_beps() {
    for (message, expected) in [
        (Message::KeepAlive, &b"\0\0\0\0"[..]),
        (Message::Unchoke, b"\0\0\0\x01\x01"),
        (Message::Have(258), b"\0\0\0\x05\x04\0\0\x01\x02"),
        (Message::Bitfield(Bytes::from_static(b"\x80")), b"\0\0\0\x02\x05\x80"),
        (
            Message::Request(Block {
                piece: 1,
                begin: 16384,
                len: 16384,
            }),
            b"\0\0\0\x0d\x06\0\0\0\x01\0\0\x40\0\0\0\x40\0",
        ),
        (
            Message::Piece {
                piece: 1,
                begin: 2,
                data: Bytes::from_static(b"ab"),
            },
            b"\0\0\0\x0b\x07\0\0\0\x01\0\0\0\x02ab",
        ),
        (Message::HaveAll, b"\0\0\0\x01\x0e"),
        (Message::HaveNone, b"\0\0\0\x01\x0f"),
        (Message::Suggest(1), b"\0\0\0\x05\x0d\0\0\0\x01"),
        (Message::AllowedFast(1), b"\0\0\0\x05\x11\0\0\0\x01"),
        (
            Message::Reject(Block {
                piece: 1,
                begin: 0,
                len: 1,
            }),
            b"\0\0\0\x0d\x10\0\0\0\x01\0\0\0\0\0\0\0\x01",
        ),
        (
            Message::Extended {
                id: 0,
                payload: Bytes::from_static(b"de"),
            },
            b"\0\0\0\x04\x14\0de",
        ),
    ] {
        assert_eq!(encoded(&message).as_ref(), expected, "{message:?}");
    }
}

#[test]
fn lengths_are_bounded_before_anything_is_kept() {
    let mut buffer = BytesMut::from(&[0xff, 0xff, 0xff, 0xff][..]);
    assert_eq!(Message::decode(&mut buffer), Err(WireError::TooLong(u32::MAX)));
    let mut buffer = BytesMut::new();
    buffer.put_u32(MAX_MESSAGE as u32 + 1);
    assert_eq!(
        Message::decode(&mut buffer),
        Err(WireError::TooLong(MAX_MESSAGE as u32 + 1))
    );
    assert!(buffer.capacity() < 1024);

    // The longest block, and the bitfield of the most pieces, just fit.
    let longest = Message::Piece {
        piece: 0,
        begin: 0,
        data: vec![1; MAX_BLOCK as usize].into(),
    };
    let most = Message::Bitfield(crate::Bitmap::full(MAX_PIECES).to_wire());
    for message in [longest, most] {
        assert_eq!(Message::decode(&mut encoded(&message)), Ok(Some(message)));
    }
}

#[test]
fn a_kind_has_its_length() {
    for (kind, good) in [
        (0, 0),
        (3, 0),
        (4, 4),
        (6, 12),
        (8, 12),
        (9, 2),
        (13, 4),
        (14, 0),
        (15, 0),
        (16, 12),
        (17, 4),
    ] {
        for len in 0..20_usize {
            let mut raw = BytesMut::new();
            raw.put_u32(len as u32 + 1);
            raw.put_u8(kind);
            // Without what follows: it is not waited for.
            let outcome = Message::decode(&mut raw.clone());
            if len == good {
                raw.put_bytes(1, len);
                assert!(matches!(Message::decode(&mut raw), Ok(Some(_))), "{kind}");
            } else {
                assert_eq!(outcome, Err(WireError::BadLength { kind, len }));
            }
        }
    }
    assert_eq!(
        refused(b"\0\0\0\x09\x07\0\0\0\0\0\0\0\0"),
        WireError::BadLength { kind: 7, len: 8 }
    );
    assert_eq!(refused(b"\0\0\0\x01\x14"), WireError::BadLength { kind: 20, len: 0 });
}

#[test]
fn a_block_is_not_copied() {
    let mut buffer = encoded(&Message::Piece {
        piece: 1,
        begin: 2,
        data: vec![7; 1000].into(),
    });
    let lies = buffer.as_ptr() as usize + PIECE_HEAD;
    let Ok(Some(Message::Piece { data, .. })) = Message::decode(&mut buffer) else {
        panic!("a block");
    };
    assert_eq!(data.as_ptr() as usize, lies);
    assert_eq!(
        encoded(&Message::Piece {
            piece: 1,
            begin: 2,
            data: data.clone()
        })[..PIECE_HEAD],
        piece_head(1, 2, data.len())
    );
}

#[test]
fn another_protocol_is_refused_at_its_first_byte() {
    for raw in [&b"G"[..], b"\x13BitTorrent protocoL", b"\x16\x03\x01", b"\x12"] {
        assert_eq!(
            Handshake::decode(&mut BytesMut::from(raw)),
            Err(WireError::NotBitTorrent)
        );
    }
    let ours = Handshake::new([1; 20], [2; 20]);
    let mut buffer = BytesMut::new();
    ours.encode(&mut buffer);
    assert_eq!(buffer.len(), HANDSHAKE_LEN);
    assert_eq!(buffer[20..28], [0, 0, 0, 0, 0, 0x10, 0, 0x04], "no DHT, nothing else");
    for end in 0..HANDSHAKE_LEN {
        assert_eq!(Handshake::decode(&mut BytesMut::from(&buffer[..end])), Ok(None));
    }
    assert_eq!(Handshake::decode(&mut buffer), Ok(Some(ours)));
    assert!(buffer.is_empty());
}

#[test]
fn extension_handshakes_of_others_are_read() {
    let payload = Bytes::from_static(b"d1:ei0e1:md11:ut_metadatai2e6:ut_pexi1ee13:metadata_sizei31235e1:pi6881e4:reqqi500e1:v15:aria2 \n1.36.0\x07ee");
    let read = ExtHandshake::decode(&payload).expect("good");
    assert_eq!((read.port, read.reqq, read.gse), (Some(6881), Some(500), None));
    assert_eq!(read.client.as_deref(), Some("aria2 1.36.0e"));
    let odd = Bytes::from_static(b"d1:pi70000e4:reqqi-1e1:vi5ee");
    assert_eq!(ExtHandshake::decode(&odd), Ok(ExtHandshake::default()));
    for bad in [&b"le"[..], b"", b"d", b"d3:gsei1ee", b"i5e"] {
        assert!(ExtHandshake::decode(&Bytes::from_static(bad)).is_err());
    }
    let long = [b"d1:v1000:".as_slice(), &[b'x'; 1000], b"e"].concat();
    let read = ExtHandshake::decode(&long.into()).expect("good");
    assert_eq!(read.client.map(|name| name.len()), Some(64));
}

proptest! {
    #[test]
    fn round_trip_in_any_parts(messages in prop::collection::vec(message(), 1..8), cut in 1_usize..50) {
        let mut wire = BytesMut::new();
        for message in &messages {
            message.encode(&mut wire);
        }
        let (mut buffer, mut got) = (BytesMut::new(), Vec::new());
        for part in wire.chunks(cut) {
            buffer.extend_from_slice(part);
            while let Some(message) = Message::decode(&mut buffer).expect("good") {
                got.push(message);
            }
        }
        prop_assert!(buffer.is_empty());
        prop_assert_eq!(got, messages);
    }

    #[test]
    fn random_bytes_never_panic(raw in prop::collection::vec(any::<u8>(), 0..200), short in 0_u32..40, kind in 0_u8..24) {
        let mut buffer = BytesMut::from(raw.as_slice());
        while let Ok(Some(_)) = Message::decode(&mut buffer) {}
        let mut buffer = BytesMut::new();
        buffer.put_u32(short);
        buffer.put_u8(kind);
        buffer.put_slice(&raw);
        while let Ok(Some(_)) = Message::decode(&mut buffer) {}
        let _ = Handshake::decode(&mut BytesMut::from(raw.as_slice()));
        let _ = ExtHandshake::decode(&raw.into());
    }

    #[test]
    fn extension_handshakes_round_trip(reqq in any::<Option<u32>>(), port in prop::option::of(1_u16..), client in prop::option::of("[ -~]{1,64}"), own in any::<bool>()) {
        let gse = own.then(|| Bytes::from_static(b"d5:proof3:abc4:typei1ee"));
        let said = ExtHandshake { reqq, client, port, gse };
        prop_assert_eq!(ExtHandshake::decode(&said.encode()), Ok(said));
    }
}
