//! Torrents of ours, read by other people's programs, and theirs by us; and a collection of hostile torrents, judged by libtorrent, too.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use bytes::Bytes;
use gse_bt::manifest::{Bounds, ManifestBuilder, check, swarm_id, torrent_file};
use gse_bt::metainfo::{Metainfo, MetainfoError};
use gse_core::random::Random;
use gse_proto::file::Manifest;

/// Debian's interpreter, which python3-libtorrent is for.
const PYTHON: &str = "/usr/bin/python3";

/// Standard output of a program that must do well.
fn output(program: &str, args: &[&OsStr]) -> String {
    let done = Command::new(program).args(args).output();
    let done = done.unwrap_or_else(|error| panic!("{program}: {error}; scripts/test full installs it"));
    assert!(
        done.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// What follows `label` on its line.
fn labelled<'t>(text: &'t str, label: &str) -> &'t str {
    let line = text.lines().find_map(|line| line.trim().strip_prefix(label));
    line.unwrap_or_else(|| panic!("no {label} in {text}")).trim()
}

/// Some files in some directories, with what they hold.
fn random_tree(random: &Random) -> Vec<(Vec<String>, Vec<u8>)> {
    let mut tree: Vec<(Vec<String>, Vec<u8>)> = (0..1 + random.below(6))
        .map(|n| {
            let mut path: Vec<String> = (0..random.below(3))
                .map(|_| format!("dir {}", random.below(3)))
                .collect();
            path.push(format!("file-{n} {}.bin", ["é", "x", "中"][random.below(3) as usize]));
            let size = [0, 1, 16_384, 65_536, 65_537, 300_000][random.below(6) as usize];
            (path, (0..size).map(|_| random.u64() as u8).collect())
        })
        .collect();
    // A torrent without any content is none.
    tree.push((
        vec!["last".to_owned()],
        vec![n_byte(random); 1 + random.below(100_000) as usize],
    ));
    tree
}

fn n_byte(random: &Random) -> u8 {
    random.u64() as u8
}

fn manifest(name: &str, tree: &[(Vec<String>, Vec<u8>)]) -> Manifest {
    let total = tree.iter().map(|(_, content)| content.len() as u64).sum();
    let mut builder = ManifestBuilder::new(name, total).expect("possible");
    for (path, content) in tree {
        let path = path.iter().cloned().map(Bytes::from).collect();
        builder
            .begin_file(path, content.len() as u64, 0o644, 0)
            .expect("in order");
        builder.data(content).expect("fits");
        builder.end_file().expect("whole");
    }
    let manifest = builder.finish().expect("whole");
    check(&manifest, &Bounds::default()).expect("good");
    manifest
}

#[test]
#[ignore = "full tier: needs transmission, aria2, mktorrent and libtorrent"]
fn the_same_info_hash_as_others_compute() {
    // contract: p2p#13, contract: p2p#15
    let random = Random::seeded(4);
    let dir = tempfile::tempdir().expect("a directory");
    let trackers = vec![vec![
        "http://127.0.0.1:6969/announce".to_owned(),
        "udp://127.0.0.1:6969".to_owned(),
    ]];
    for n in 0..100 {
        let mut tree = random_tree(&random);
        let single = n % 10 == 0;
        let name = if single { "last".to_owned() } else { format!("tree {n}") };
        if single {
            tree = tree.split_off(tree.len() - 1);
        }
        let manifest = manifest(&name, &tree);
        let ours = hex::encode(swarm_id(&manifest));
        let file = dir.path().join(format!("{n}.torrent"));
        std::fs::write(&file, torrent_file(&manifest, &trackers)).expect("written");

        let shown = output("transmission-show", &[file.as_os_str()]);
        assert_eq!(labelled(&shown, "Hash:"), ours, "transmission, tree {n}");
        assert_eq!(labelled(&shown, "Privacy:"), "Private torrent");
        let shown = output("aria2c", &[OsStr::new("-S"), file.as_os_str()]);
        assert_eq!(labelled(&shown, "Info Hash:"), ours, "aria2, tree {n}");
        let script = "import libtorrent, sys; t = libtorrent.torrent_info(sys.argv[1]); print(t.info_hash(), t.priv(), t.num_pieces(), t.total_size())";
        let shown = output(PYTHON, &[OsStr::new("-c"), OsStr::new(script), file.as_os_str()]);
        let pieces = manifest.piece_sha1.len() / 20;
        assert_eq!(
            shown.trim(),
            format!("{ours} True {pieces} {}", manifest.total),
            "libtorrent, tree {n}"
        );

        // The other way round: mktorrent reads the same tree and cuts it in the same pieces.
        let root = dir.path().join(format!("{n}"));
        write_tree(&root, &name, &tree, single);
        let theirs = dir.path().join(format!("{n}.mktorrent"));
        let power = manifest.piece_length.trailing_zeros().to_string();
        let args: [&OsStr; 6] = [
            OsStr::new("-p"),
            OsStr::new("-l"),
            OsStr::new(&power),
            OsStr::new("-o"),
            theirs.as_os_str(),
            &root.join(&name).into_os_string(),
        ];
        output("mktorrent", &args);
        let read = Metainfo::parse(&std::fs::read(&theirs).expect("made").into()).expect("good");
        assert!(read.private);
        assert_eq!(read.geometry.total(), manifest.total);
        let shown = output("transmission-show", &[theirs.as_os_str()]);
        assert_eq!(labelled(&shown, "Hash:"), hex::encode(read.info_hash));
        if single {
            assert_eq!(read.pieces, manifest.piece_sha1, "the same content in the same pieces");
        }
    }
}

fn write_tree(root: &Path, name: &str, tree: &[(Vec<String>, Vec<u8>)], single: bool) {
    for (path, content) in tree {
        let mut file = root.to_owned();
        if !single {
            file.push(name);
        }
        file.extend(path);
        std::fs::create_dir_all(file.parent().expect("below the root")).expect("made");
        std::fs::write(file, content).expect("written");
    }
}

/// Torrents that are bad in one way each, and whether libtorrent refuses them as well: where it does not, it renames, and we refuse.
fn hostile() -> Vec<(&'static str, Vec<u8>, bool)> {
    let hash = "a".repeat(20);
    let whole = |info: &str| format!("d4:info{info}e").into_bytes();
    let single = |length: &str, piece_length: &str, pieces: usize| {
        let pieces = "a".repeat(pieces);
        whole(&format!(
            "d6:lengthi{length}e4:name1:x12:piece lengthi{piece_length}e6:pieces{}:{pieces}e",
            pieces.len()
        ))
    };
    let multi = |files: &str| {
        whole(&format!(
            "d5:filesl{files}e4:name1:x12:piece lengthi16384e6:pieces20:{hash}e"
        ))
    };
    let file = |path: &[&str]| {
        let path: String = path.iter().map(|part| format!("{}:{part}", part.len())).collect();
        format!("d6:lengthi5e4:pathl{path}ee")
    };
    let hybrid = |length: u32| {
        let root = "r".repeat(32);
        let tree = format!("d1:xd0:d6:lengthi{length}e11:pieces root32:{root}eee");
        whole(&format!(
            "d9:file tree{tree}6:lengthi5e12:meta versioni2e4:name1:x12:piece lengthi16384e6:pieces20:{hash}e"
        ))
    };
    assert!(Metainfo::parse(&hybrid(5).into()).is_ok());
    vec![
        ("negative size", single("-5", "16384", 20), true),
        (
            "negative size of one of several",
            multi("d6:lengthi-5e4:pathl1:aee"),
            true,
        ),
        ("size beyond 64 bits", single("99999999999999999999", "16384", 20), true),
        ("huge size", single("9223372036854775807", "16384", 20), true),
        ("no content", single("0", "16384", 0), true),
        ("zero piece length", single("5", "0", 20), true),
        ("negative piece length", single("5", "-16384", 20), true),
        ("huge piece length", single("5", "9223372036854775807", 20), true),
        ("a hash too few", single("16385", "16384", 20), true),
        ("a hash too many", single("5", "16384", 40), true),
        ("hashes that are cut", single("5", "16384", 19), true),
        ("no hashes", whole("d6:lengthi5e4:name1:x12:piece lengthi16384ee"), true),
        ("no info", b"d8:announce1:ae".to_vec(), true),
        ("info that is a string", b"d4:info3:abce".to_vec(), true),
        ("a list", b"le".to_vec(), true),
        ("nothing", Vec::new(), true),
        ("not bencoding", b"<html></html>".to_vec(), true),
        ("cut", single("5", "16384", 20)[..50].to_vec(), true),
        (
            "deep recursion of lists",
            ["d4:info", &"l".repeat(500_000)].concat().into_bytes(),
            true,
        ),
        (
            "deep recursion of dictionaries",
            "d1:a".repeat(500_000).into_bytes(),
            true,
        ),
        (
            "a string beyond the end",
            b"d4:infod6:pieces99999999:aee".to_vec(),
            true,
        ),
        (
            "files that are a number",
            whole(&format!("d5:filesi5e4:name1:x12:piece lengthi16384e6:pieces20:{hash}e")),
            true,
        ),
        ("a file that is a string", multi("5:abcde"), true),
        ("a file without a length", multi("d4:pathl1:aee"), true),
        ("another file for version 2", hybrid(6), true),
        ("parent path", multi(&file(&["..", "..", "etc", "passwd"])), false),
        ("parent in one part", multi(&file(&["../../etc/passwd"])), false),
        ("absolute name", multi(&file(&["/etc/passwd"])), false),
        ("same file twice", multi(&[file(&["a"]), file(&["a"])].concat()), false),
        (
            "file below a file",
            multi(&[file(&["a"]), file(&["a", "b"])].concat()),
            false,
        ),
        (
            "parent as name",
            whole(&format!(
                "d6:lengthi5e4:name2:..12:piece lengthi16384e6:pieces20:{hash}e"
            )),
            true,
        ),
        (
            "link out, with a file below it",
            multi(
                &[
                    "d4:attr1:l6:lengthi0e4:pathl1:ae12:symlink pathl2:..3:etcee",
                    &file(&["a", "passwd"]),
                ]
                .concat(),
            ),
            false,
        ),
    ]
}

#[test]
fn hostile_torrents_are_refused() {
    // contract: p2p#14
    for (what, bytes, _) in hostile() {
        let error = Metainfo::parse(&bytes.into()).expect_err(what);
        assert!(
            !matches!(error, MetainfoError::TooLong(_)),
            "{what}: for its own reason"
        );
    }
}

/// Whatever libtorrent refuses we refuse; what it takes under other names, because of the names alone.
#[test]
#[ignore = "full tier: needs libtorrent"]
fn hostile_torrents_are_judged_as_libtorrent_does() {
    // contract: p2p#14
    let dir = tempfile::tempdir().expect("a directory");
    let script = "import libtorrent, sys\ntry:\n  libtorrent.torrent_info(sys.argv[1]); print('taken')\nexcept RuntimeError: print('refused')";
    for (n, (what, bytes, they_refuse)) in hostile().into_iter().enumerate() {
        let file = dir.path().join(format!("{n}.torrent"));
        std::fs::write(&file, &bytes).expect("written");
        let said = output(PYTHON, &[OsStr::new("-c"), OsStr::new(script), file.as_os_str()]);
        assert_eq!(said.trim(), if they_refuse { "refused" } else { "taken" }, "{what}");
        let error = Metainfo::parse(&bytes.into()).expect_err(what);
        assert!(
            they_refuse || matches!(error, MetainfoError::Path { .. }),
            "{what}: {error}"
        );
    }
}
