use proptest::prelude::*;

use super::*;

const PIECE: i64 = 16 * 1024;

/// A file of a torrent to be: path, length, attributes.
type Spec<'a> = (&'a [&'a [u8]], i64, &'a [u8]);

fn torrent(fill: impl FnOnce(&mut Encoder)) -> Bytes {
    let mut out = Encoder::new();
    out.dict(|root| {
        root.bytes(b"announce", b"http://tracker/announce");
        fill(root.key(b"info"));
    });
    out.finish().into()
}

/// A torrent of several files with as many hashes as their lengths ask for.
fn multi(name: &[u8], files: &[Spec<'_>]) -> Bytes {
    let total: i64 = files.iter().fold(0, |sum, file| sum.saturating_add(file.1.max(0)));
    let pieces = vec![7; (total.clamp(0, 1 << 30) as usize).div_ceil(PIECE as usize) * 20];
    torrent(|info| {
        info.dict(|info| {
            info.key(b"files").list(|list| {
                for (path, length, attr) in files {
                    list.dict(|file| {
                        if !attr.is_empty() {
                            file.bytes(b"attr", attr);
                        }
                        file.int(b"length", *length);
                        file.key(b"path")
                            .list(|parts| path.iter().for_each(|part| parts.bytes(part)));
                    });
                }
            });
            info.bytes(b"name", name);
            info.int(b"piece length", PIECE);
            info.bytes(b"pieces", &pieces);
        });
    })
}

/// A torrent of one file with these numbers and so many bytes of hashes.
fn single(length: i64, piece_length: i64, pieces: usize) -> Bytes {
    torrent(|info| {
        info.dict(|info| {
            info.int(b"length", length);
            info.bytes(b"name", b"x");
            info.int(b"piece length", piece_length);
            info.bytes(b"pieces", &vec![7; pieces]);
        });
    })
}

fn refused(what: &str, bytes: &Bytes) -> MetainfoError {
    let error = Metainfo::parse(bytes).expect_err(what);
    assert!(error.to_string().len() < 2000, "{what}: what is said has a bound");
    error
}

#[test]
fn good_ones_are_read() {
    let parsed = Metainfo::parse(&single(40_000, PIECE, 60)).expect("good");
    assert_eq!(
        (parsed.geometry.pieces(), parsed.files.len(), parsed.multi),
        (3, 1, false)
    );
    assert_eq!(parsed.piece_sha1(2), Some(&[7; 20][..]));
    assert_eq!(parsed.piece_sha1(3), None);
    assert_eq!(parsed.trackers, [["http://tracker/announce"]]);
    assert!(!parsed.private);

    let files: &[Spec<'_>] = &[
        (&[b"a b", b"\xff\n"], 10, b"xh"),
        (&[b".pad", b"6"], 6, b"p"),
        (&[b".pad", b"6"], 6, b"p"),
        (&[b"link"], 0, b"l"),
        (&[b"empty"], 0, b""),
    ];
    let parsed = Metainfo::parse(&multi(b"dir", files)).expect("good");
    assert_eq!(parsed.files[0].path.as_ref(), b"a b/\xff\n");
    assert!(parsed.files[0].attr.executable && parsed.files[0].attr.hidden && !parsed.files[0].attr.padding);
    assert!(parsed.files[1].attr.padding && parsed.files[3].attr.symlink);
    assert_eq!(parsed.geometry.total(), 22);

    // A line break at the end is common.
    let mut ended = single(1, PIECE, 20).to_vec();
    ended.push(b'\n');
    assert!(Metainfo::parse(&ended.into()).is_ok());
}

#[test]
fn trackers_that_are_of_no_use_are_left_out() {
    let mut out = Encoder::new();
    out.dict(|root| {
        root.bytes(b"announce", b"http://not-this");
        root.key(b"announce-list").list(|tiers| {
            tiers.list(|tier| {
                tier.bytes(b"udp://one");
                tier.bytes(b"\xff\xfe");
                tier.int(5);
                tier.bytes(&[b'a'; 5000]);
            });
            tiers.list(|_| {});
            tiers.int(3);
            tiers.list(|tier| (0..1000).for_each(|at| tier.bytes(format!("http://{at}").as_bytes())));
        });
        root.key(b"info").raw(&info_of(&single(1, PIECE, 20)));
    });
    let parsed = Metainfo::parse(&out.finish().into()).expect("good");
    assert_eq!(parsed.trackers[0], ["udp://one"]);
    assert_eq!(parsed.trackers.iter().flatten().count(), MAX_TRACKERS);
}

fn info_of(torrent: &Bytes) -> Vec<u8> {
    let root = bencode::decode(torrent)
        .expect("bencoding")
        .dict()
        .expect("a dictionary");
    root.get(b"info").and_then(Value::dict).expect("info").raw().to_vec()
}

#[test]
fn hostile_numbers_are_refused() {
    // contract: p2p#14
    for (what, bytes) in [
        ("negative size", single(-1, PIECE, 20)),
        ("least number as size", single(i64::MIN, PIECE, 20)),
        ("no content", single(0, PIECE, 0)),
        ("zero piece length", single(1, 0, 20)),
        ("negative piece length", single(1, -16_384, 20)),
        ("huge piece length", single(1, i64::from(u32::MAX), 20)),
        ("piece length of 64 bits", single(1, i64::MAX, 20)),
        ("huge count of pieces", single(i64::MAX, PIECE, 20)),
        (
            "more pieces than there may be",
            single(i64::from(MAX_PIECES) + 1, 1, (MAX_PIECES as usize + 1) * 20 / 64),
        ),
        ("a hash too few", single(PIECE + 1, PIECE, 20)),
        ("a hash too many", single(PIECE, PIECE, 40)),
        ("hashes that are cut", single(1, PIECE, 19)),
        ("no hashes", single(1, PIECE, 0)),
        (
            "negative size of one of several",
            multi(b"d", &[(&[b"a"], 5, b""), (&[b"b"], -5, b"")]),
        ),
        (
            "sizes that overflow",
            multi(b"d", &[(&[b"a"], i64::MAX, b""), (&[b"b"], i64::MAX, b"")]),
        ),
        (
            "negative filler",
            multi(b"d", &[(&[b"a"], 5, b""), (&[b"b"], -5, b"p")]),
        ),
        ("no files", multi(b"d", &[])),
    ] {
        refused(what, &bytes);
    }
    assert_eq!(
        refused("a hash too few", &single(PIECE + 1, PIECE, 20)),
        MetainfoError::Pieces { got: 20, pieces: 2 }
    );
}

#[test]
fn hostile_paths_are_refused() {
    // contract: p2p#14
    let path = |parts: &[&[u8]]| multi(b"d", &[(parts, 5, b"")]);
    let long = [b'a'; 256];
    let deep = vec![&b"aaaaaaaa"[..]; 1000];
    for (what, bytes) in [
        ("parent path", path(&[b"..", b"x"])),
        ("parent in the middle", path(&[b"a", b"..", b"..", b"x"])),
        ("parent in one part", path(&[b"../../x"])),
        ("absolute name", path(&[b"/etc/passwd"])),
        ("absolute by an empty part", path(&[b"", b"etc", b"passwd"])),
        ("dot", path(&[b"."])),
        ("NUL", path(&[b"a\0b"])),
        ("long part", path(&[&long])),
        ("deep path", path(&deep)),
        ("no parts", path(&[])),
        ("parent as name", multi(b"..", &[(&[b"a"], 5, b"")])),
        ("absolute as name", multi(b"/tmp", &[(&[b"a"], 5, b"")])),
        ("empty name", multi(b"", &[(&[b"a"], 5, b"")])),
        ("same file twice", multi(b"d", &[(&[b"a"], 5, b""), (&[b"a"], 6, b"")])),
        (
            "file below a file",
            multi(b"d", &[(&[b"a", b"b"], 5, b""), (&[b"a"], 6, b"")]),
        ),
        (
            "file below a link",
            multi(b"d", &[(&[b"a"], 0, b"l"), (&[b"a", b"b"], 6, b"")]),
        ),
        (
            "parent path of filler",
            multi(b"d", &[(&[b"a"], 5, b""), (&[b"..", b"b"], 6, b"p")]),
        ),
        (
            "parent path of a link",
            multi(b"d", &[(&[b"a"], 5, b""), (&[b"..", b"b"], 0, b"l")]),
        ),
    ] {
        assert!(matches!(refused(what, &bytes), MetainfoError::Path { .. }), "{what}");
    }
}

#[test]
fn hostile_shapes_are_refused() {
    // contract: p2p#14
    let raw = |text: &[u8]| Bytes::copy_from_slice(text);
    let deep = [b"d4:info".as_slice(), &vec![b'l'; 1_000_000]].concat();
    for (what, bytes) in [
        ("empty", raw(b"")),
        ("not bencoding", raw(b"<html>")),
        ("a list", raw(b"le")),
        ("no info", raw(b"d8:announce1:ae")),
        ("info that is a string", raw(b"d4:info3:abce")),
        ("info that is empty", raw(b"d4:infodee")),
        ("deep recursion", raw(&deep)),
        ("a string beyond the end", raw(b"d4:infod6:pieces999999999999:aee")),
        (
            "files that are a string",
            torrent(|info| info.raw(b"d5:files1:a4:name1:x12:piece lengthi1e6:pieces0:e")),
        ),
        (
            "files of numbers",
            torrent(|info| info.raw(b"d5:filesli1ee4:name1:x12:piece lengthi1e6:pieces0:e")),
        ),
        (
            "path of numbers",
            torrent(|info| {
                info.raw(
                    b"d5:filesld6:lengthi1e4:pathli1eeee4:name1:x12:piece lengthi1e6:pieces20:aaaaaaaaaaaaaaaaaaaae",
                )
            }),
        ),
        (
            "pieces that are a number",
            torrent(|info| info.raw(b"d6:lengthi1e4:name1:x12:piece lengthi1e6:piecesi1ee")),
        ),
        (
            "name that is a list",
            torrent(|info| info.raw(b"d6:lengthi1e4:namele12:piece lengthi1e6:pieces20:aaaaaaaaaaaaaaaaaaaae")),
        ),
        (
            "length that is a string",
            torrent(|info| info.raw(b"d6:length1:14:name1:x12:piece lengthi1e6:pieces20:aaaaaaaaaaaaaaaaaaaae")),
        ),
    ] {
        refused(what, &bytes);
    }
    let v2 = torrent(|info| {
        info.raw(b"d9:file treed1:xd0:d6:lengthi1eeee12:meta versioni2e4:name1:x12:piece lengthi16384ee")
    });
    assert_eq!(refused("only version 2", &v2), MetainfoError::VersionTwo);
    let long = Bytes::from(vec![b'l'; MAX_METAINFO + 1]);
    assert_eq!(refused("too long", &long), MetainfoError::TooLong(MAX_METAINFO + 1));
}

#[test]
fn the_two_lists_of_a_hybrid_are_the_same() {
    // contract: p2p#14
    let root = "r".repeat(32);
    let file = |length: i64| format!("d0:d6:lengthi{length}e11:pieces root32:{root}ee");
    let hybrid = |tree: &str| {
        let files = format!(
            "d6:lengthi5e4:pathl1:a1:beed4:attr1:p6:lengthi{}e4:pathl4:.pad5:16379eed6:lengthi6e4:pathl1:cee",
            PIECE - 5
        );
        let hashes = "a".repeat(40);
        let info = format!("d9:file treed{tree}e5:filesl{files}e4:name1:x12:piece lengthi{PIECE}e6:pieces40:{hashes}e");
        torrent(|out| out.raw(info.as_bytes()))
    };
    let good = format!("1:ad1:b{}e1:c{}", file(5), file(6));
    assert_eq!(Metainfo::parse(&hybrid(&good)).expect("good").files.len(), 3);
    for (what, tree) in [
        ("another path", format!("1:ad1:x{}e1:c{}", file(5), file(6))),
        ("another length", format!("1:ad1:b{}e1:c{}", file(5), file(7))),
        ("a file less", format!("1:ad1:b{}e", file(5))),
        (
            "a file more",
            format!("1:ad1:b{}e1:c{}1:d{}", file(5), file(6), file(1)),
        ),
        ("another order", format!("1:c{}1:ad1:b{}e", file(6), file(5))),
    ] {
        assert_eq!(refused(what, &hybrid(&tree)), MetainfoError::Hybrid, "{what}");
    }
    for (what, tree) in [
        ("a file that is no dictionary", "1:ai5e".to_owned()),
        ("a file without a hash", "1:ad1:bd0:d6:lengthi5eeee".to_owned()),
        ("a negative length", format!("1:ad1:b{}e1:c{}", file(-5), file(6))),
    ] {
        assert_eq!(refused(what, &hybrid(&tree)), MetainfoError::Key("file tree"), "{what}");
    }
}

#[test]
fn many_files_are_refused_at_a_bound_and_in_little_memory() {
    // contract: p2p#14
    let many = |count: usize| {
        let mut files = b"d4:infod5:filesl".to_vec();
        for at in 0..count {
            files.extend_from_slice(format!("d6:lengthi1e4:pathl{}:{at:x}ee", format!("{at:x}").len()).as_bytes());
        }
        let pieces = count.div_ceil(PIECE as usize) * 20;
        files.extend_from_slice(format!("e4:name1:x12:piece lengthi{PIECE}e6:pieces{pieces}:").as_bytes());
        files.resize(files.len() + pieces, 1);
        files.extend_from_slice(b"ee");
        Bytes::from(files)
    };
    assert_eq!(
        Metainfo::parse(&many(MAX_FILES)).expect("just fits").files.len(),
        MAX_FILES
    );
    assert_eq!(refused("too many", &many(MAX_FILES + 1)), MetainfoError::TooManyFiles);
    // What a file takes, times the most files, is a small part of 64 MiB; paths of one part point into the torrent itself.
    assert!(
        size_of::<File>() * MAX_FILES * 3 < 64 << 20,
        "with the growth of its vector"
    );
}

proptest! {
    #[test]
    fn changed_torrents_never_panic(at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()) {
        let good = multi(b"d", &[(&[b"a", b"b"], 50_000, b"x"), (&[b"c"], 5, b"")]);
        let mut bytes = good.to_vec();
        bytes[at.index(good.len())] = byte;
        let _ = Metainfo::parse(&bytes.clone().into());
        bytes.truncate(cut.index(good.len()));
        prop_assert!(Metainfo::parse(&bytes.into()).is_err());
    }

    /// What we write, others read, and the other way round.
    #[test]
    fn the_same_as_another_reader(
        names in prop::collection::btree_set("[a-z]{1,12}", 1..6),
        sizes in prop::collection::vec(1_u64..200_000, 6),
        private in any::<bool>(),
    ) {
        // contract: p2p#13
        let paths: Vec<Vec<Bytes>> = names.into_iter().map(|name| vec![Bytes::from_static(b"sub"), name.into()]).collect();
        let files: Vec<(&[Bytes], u64)> = paths.iter().map(Vec::as_slice).zip(sizes.iter().copied()).collect();
        let total: u64 = files.iter().map(|file| file.1).sum();
        let pieces = vec![0xff; (total.div_ceil(PIECE as u64) * 20) as usize];
        let info = Info {
            name: b"tree",
            piece_length: PIECE as u32,
            pieces: &pieces,
            private,
            source: Some(b"us"),
            content: Content::Multi(files),
        };
        let bytes = torrent_file(&info.encode(), &[vec!["http://a".to_owned()], vec!["udp://b".to_owned()]]);
        let ours = Metainfo::parse(&bytes).expect("good");
        let theirs = lava_torrent::torrent::v1::Torrent::read_from_bytes(&bytes).expect("good");
        prop_assert_eq!(hex::encode(ours.info_hash), theirs.info_hash());
        prop_assert_eq!(ours.private, theirs.is_private());
        prop_assert_eq!(ours.geometry.total() as i64, theirs.length);
        prop_assert_eq!(ours.geometry.pieces() as usize, theirs.pieces.len());
        prop_assert_eq!(Some(ours.trackers.clone()), theirs.announce_list.clone());
        let our_files: Vec<(String, i64)> = ours
            .files
            .iter()
            .map(|file| (String::from_utf8_lossy(&file.path).into_owned(), file.length as i64))
            .collect();
        let their_files: Vec<(String, i64)> = theirs
            .files
            .clone()
            .unwrap_or_default()
            .iter()
            .map(|file| (file.path.display().to_string(), file.length))
            .collect();
        prop_assert_eq!(our_files, their_files);
        let again: Bytes = theirs.encode().expect("good").into();
        prop_assert_eq!(Metainfo::parse(&again).expect("good").info_hash, ours.info_hash);
    }
}
