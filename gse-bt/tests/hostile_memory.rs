//! What hostile torrents cost in memory. A program of its own, so that the most it has ever used is theirs.

use bytes::Bytes;
use gse_bt::metainfo::{MAX_METAINFO, Metainfo};
use nix::sys::resource::{UsageWho, getrusage};

/// `head`, then `unit` as often as it fits, then `tail`.
fn filled(head: &str, unit: &str, tail: &str) -> Bytes {
    let times = (MAX_METAINFO - head.len() - tail.len()) / unit.len();
    let mut out = Vec::with_capacity(MAX_METAINFO);
    out.extend_from_slice(head.as_bytes());
    for _ in 0..times {
        out.extend_from_slice(unit.as_bytes());
    }
    out.extend_from_slice(tail.as_bytes());
    out.into()
}

/// The most memory that this process has used so far, KiB.
fn peak() -> i64 {
    getrusage(UsageWho::RUSAGE_SELF).expect("known").max_rss()
}

#[test]
fn the_largest_hostile_torrents_take_little_memory() {
    // contract: p2p#14
    let info = "4:name1:x12:piece lengthi16384e6:pieces20:aaaaaaaaaaaaaaaaaaaae";
    let torrents = [
        (
            "many files",
            filled("d4:infod5:filesl", "d6:lengthi1e4:pathl1:aee", &format!("e{info}e")),
        ),
        (
            "many files in directories",
            filled(
                "d4:infod5:filesl",
                "d6:lengthi1e4:pathl1:a1:b1:cee",
                &format!("e{info}e"),
            ),
        ),
        (
            "many parts of a path",
            filled("d4:infod5:filesld6:lengthi1e4:pathl", "1:a", &format!("eee{info}e")),
        ),
        ("many keys", filled("d4:infod", "0:le", &format!("{info}e"))),
        ("many lists", filled("d4:infod1:al", "le", &format!("e{info}e"))),
        ("many trackers", filled("d13:announce-listl", "l1:ae", "e4:infodee")),
        (
            "many tiers of nothing",
            filled("d13:announce-listl", "le", "e4:infodee"),
        ),
        ("lists within lists", filled("", "l", "")),
        ("dictionaries within dictionaries", filled("", "d0:", "")),
        ("many numbers", filled("l", "i0e", "e")),
    ];
    let before = peak();
    for (what, torrent) in torrents {
        assert!(Metainfo::parse(&torrent).is_err(), "{what}");
    }
    let more = peak() - before;
    assert!(more < 64 * 1024, "{more} KiB");
}
