use proptest::prelude::*;

use super::*;
use crate::metainfo::Metainfo;

fn path(text: &str) -> Vec<Bytes> {
    text.split('/')
        .map(|part| Bytes::copy_from_slice(part.as_bytes()))
        .collect()
}

/// A manifest of files with their content, fed in uneven parts.
fn build(name: &str, files: &[(&str, Vec<u8>)]) -> Manifest {
    let total = files.iter().map(|(_, content)| content.len() as u64).sum();
    let mut builder = ManifestBuilder::new(name, total).expect("possible");
    for (file, content) in files {
        builder
            .begin_file(path(file), content.len() as u64, 0o644, 1)
            .expect("in order");
        for part in content.chunks(7001) {
            builder.data(part).expect("in order");
        }
        builder.end_file().expect("whole");
    }
    builder.finish().expect("whole")
}

fn content(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ seed)
        .collect()
}

fn good() -> Manifest {
    let mut manifest = build("tree", &[("a/b", content(70_000, 1)), ("c", content(10, 2))]);
    manifest.entries.push(Entry {
        kind: EntryKind::Directory.into(),
        path: path("a"),
        mode: 0o755,
        ..Entry::default()
    });
    manifest.entries.push(Entry {
        kind: EntryKind::Symlink.into(),
        path: path("a/link"),
        link: Bytes::from_static(b"../c"),
        ..Entry::default()
    });
    manifest
}

#[test]
fn pieces_are_about_a_thousand() {
    for (total, length) in [
        (0, 64 << 10),
        (1, 64 << 10),
        (64 << 20, 64 << 10),
        ((64 << 20) + 1, 128 << 10),
        (256 << 20, 256 << 10),
        (4 << 30, 4 << 20),
        (u64::MAX, 4 << 20),
    ] {
        assert_eq!(piece_length(total), length, "{total}");
    }
}

#[test]
fn hashes_are_those_of_the_pieces_and_files() {
    let (one, two) = (content(100_000, 1), content(70_000, 2));
    let manifest = build(
        "tree",
        &[("one", one.clone()), ("empty", Vec::new()), ("two", two.clone())],
    );
    assert_eq!(check(&manifest, &Bounds::default()), Ok(()));
    let all = [one.clone(), two].concat();
    let expected: Vec<u8> = all
        .chunks(manifest.piece_length as usize)
        .flat_map(|piece| digest(&SHA256, piece).as_ref().to_vec())
        .collect();
    assert_eq!(manifest.piece_hashes, expected);
    assert_eq!(piece_sha256(&manifest, 2), Some(&expected[64..96]));
    assert_eq!(piece_sha256(&manifest, 3), None);
    assert_eq!(manifest.entries[0].sha256, digest(&SHA256, &one).as_ref());
    assert_eq!(manifest.entries[1].sha256, digest(&SHA256, b"").as_ref());
}

#[test]
fn a_source_that_changes_is_found_out() {
    let mut builder = ManifestBuilder::new("x", 10).expect("possible");
    assert_eq!(builder.data(b"a"), Err(BuildError::OutOfOrder));
    assert_eq!(builder.end_file(), Err(BuildError::OutOfOrder));
    builder.begin_file(path("x"), 5, 0, 0).expect("the first");
    assert_eq!(builder.begin_file(path("y"), 5, 0, 0), Err(BuildError::OutOfOrder));
    assert!(matches!(
        builder.data(b"sixsix"),
        Err(BuildError::FileChanged { got: 6, size: 5, .. })
    ));

    let mut builder = ManifestBuilder::new("x", 10).expect("possible");
    builder.begin_file(path("x"), 5, 0, 0).expect("the first");
    builder.data(b"four").expect("fits");
    assert!(matches!(
        builder.end_file(),
        Err(BuildError::FileChanged { got: 4, size: 5, .. })
    ));

    let mut builder = ManifestBuilder::new("x", 10).expect("possible");
    builder.begin_file(path("x"), 5, 0, 0).expect("the first");
    builder.data(b"fives").expect("fits");
    builder.end_file().expect("whole");
    assert_eq!(builder.finish(), Err(BuildError::SourceChanged { got: 5, total: 10 }));
}

#[test]
fn names_are_pinned() {
    let manifest = good();
    assert_eq!(check(&manifest, &Bounds::default()), Ok(()));
    // What hosts of different versions agree on: neither may ever change for a manifest that there can be today.
    assert_eq!(
        hex::encode(manifest_id(&manifest)),
        "0ddc14f3c852cd1a7823b63c13d94ada62cac04dbd62589e6d0baae38c0349c0"
    );
    assert_eq!(
        hex::encode(swarm_id(&manifest)),
        "bada0990f108bec3ec6027b39b058a3396a6f9b7"
    );
    let mut other = manifest.clone();
    other.entries[0].mode = 0o600;
    assert_ne!(
        swarm_id(&manifest),
        swarm_id(&other),
        "the info-hash holds the whole manifest's id"
    );
}

#[test]
fn the_torrent_says_what_the_manifest_says() {
    // contract: p2p#13, contract: p2p#15
    let trackers = vec![vec![
        "http://127.0.0.1:1/announce".to_owned(),
        "udp://127.0.0.1:2".to_owned(),
    ]];
    let manifest = good();
    let torrent = Metainfo::parse(&torrent_file(&manifest, &trackers)).expect("good");
    assert_eq!(torrent.info_hash, swarm_id(&manifest));
    assert!(torrent.private && torrent.multi);
    assert_eq!(torrent.trackers, trackers);
    assert_eq!(torrent.pieces, manifest.piece_sha1);
    assert_eq!(torrent.geometry, geometry(&manifest).expect("good"));
    assert_eq!(
        torrent.source.expect("a source").as_ref(),
        format!("gse {}", hex::encode(manifest_id(&manifest))).as_bytes()
    );
    let files: Vec<(&[u8], u64)> = torrent
        .files
        .iter()
        .map(|file| (file.path.as_ref(), file.length))
        .collect();
    assert_eq!(files, [(&b"a/b"[..], 70_000), (b"c", 10)], "no directories, no links");

    let single = build("one", &[("one", content(10, 0))]);
    let torrent = Metainfo::parse(&torrent_file(&single, &[])).expect("good");
    assert!(!torrent.multi && torrent.trackers.is_empty());
    let nested = build("one", &[("d/one", content(10, 0))]);
    assert!(Metainfo::parse(&torrent_file(&nested, &[])).expect("good").multi);
}

#[test]
fn what_does_not_fit_together_is_refused() {
    // contract: p2p#14
    type Change = fn(&mut Manifest);
    let bad: &[(&str, Change)] = &[
        ("piece length 0", |m| m.piece_length = 0),
        ("piece length not a power of two", |m| m.piece_length = 65_537),
        ("piece length too small", |m| m.piece_length = 32 << 10),
        ("piece length too large", |m| m.piece_length = 8 << 20),
        ("a huge total", |m| m.total = u64::MAX),
        ("another total", |m| m.total += 1),
        ("sizes that overflow", |m| {
            m.entries[0].size = u64::MAX;
            m.entries[1].size = 70_011;
        }),
        ("hashes cut", |m| m.piece_hashes.truncate(63)),
        ("no SHA-1", |m| m.piece_sha1.clear()),
        ("a file without a hash", |m| m.entries[0].sha256.clear()),
        ("a directory with content", |m| m.entries[2].size = 1),
        ("a directory with a hash", |m| m.entries[2].sha256 = vec![0; 32].into()),
        ("a directory that leads elsewhere", |m| {
            m.entries[2].link = Bytes::from_static(b"c")
        }),
        ("an unknown kind", |m| m.entries[2].kind = 7),
        ("a mode with a file type", |m| m.entries[0].mode = 0o100_644),
        ("an unsafe name", |m| m.name = "..".to_owned()),
        ("no name", |m| m.name.clear()),
        ("no path", |m| m.entries[0].path.clear()),
        ("a parent", |m| m.entries[0].path = path("../b")),
        ("an absolute path", |m| m.entries[0].path = path("/etc/x")),
        ("a separator in a part", |m| {
            m.entries[0].path = vec![Bytes::from_static(b"a/../../b")]
        }),
        ("a NUL", |m| m.entries[0].path = path("a\0b")),
        ("a path of many parts", |m| {
            m.entries[0].path = vec![Bytes::from_static(b"a"); 300]
        }),
        ("a long path", |m| m.entries[0].path = vec![vec![b'a'; 255].into(); 17]),
        ("a path twice", |m| m.entries[1].path = path("a/b")),
        ("a file below a file", |m| m.entries[1].path = path("a/b/c")),
        ("a file below a link", |m| m.entries[1].path = path("a/link/c")),
        ("a directory in place of a file", |m| m.entries[2].path = path("c")),
        ("an absolute link", |m| {
            m.entries[3].link = Bytes::from_static(b"/etc/passwd")
        }),
        ("a link out", |m| m.entries[3].link = Bytes::from_static(b"../../x")),
        ("a link up again", |m| {
            m.entries[3].link = Bytes::from_static(b"b/../../c")
        }),
        ("a link up behind a link", |m| {
            m.entries[3].link = Bytes::from_static(b"x/..")
        }),
        ("a link nowhere", |m| m.entries[3].link.clear()),
        ("a link with a NUL", |m| m.entries[3].link = Bytes::from_static(b"c\0")),
    ];
    for (what, change) in bad {
        let mut manifest = good();
        change(&mut manifest);
        let error = check(&manifest, &Bounds::default()).expect_err(what);
        assert!(!error.to_string().is_empty());
    }
    let tight = |change: fn(&mut Bounds)| {
        let mut bounds = Bounds::default();
        change(&mut bounds);
        check(&good(), &bounds)
    };
    assert!(matches!(
        tight(|b| b.total = 70_009),
        Err(ManifestError::TooMuch { .. })
    ));
    assert!(matches!(tight(|b| b.entries = 3), Err(ManifestError::TooMuch { .. })));
    assert!(matches!(
        tight(|b| b.path_bytes = 12),
        Err(ManifestError::TooMuch { .. })
    ));
}

proptest! {
    /// Whatever passes the check has a torrent that passes its own.
    #[test]
    fn random_trees_become_torrents(
        names in prop::collection::btree_set(prop::collection::vec(prop::collection::vec(any::<u8>(), 0..4), 1..4), 1..12),
        sizes in prop::collection::vec(0_usize..90_000, 12),
    ) {
        let total = sizes.iter().take(names.len()).sum::<usize>() as u64;
        let mut builder = ManifestBuilder::new("tree", total).expect("possible");
        for (name, size) in names.into_iter().zip(&sizes) {
            let path = name.into_iter().map(Bytes::from).collect();
            builder.begin_file(path, *size as u64, 0o600, 0).expect("in order");
            builder.data(&content(*size, 3)).expect("fits");
            builder.end_file().expect("whole");
        }
        let manifest = builder.finish().expect("whole");
        if check(&manifest, &Bounds::default()).is_ok() && total > 0 {
            let torrent = Metainfo::parse(&torrent_file(&manifest, &[])).expect("good");
            prop_assert_eq!(torrent.info_hash, swarm_id(&manifest));
            prop_assert_eq!(torrent.files.len(), manifest.entries.len());
        }
    }
}
