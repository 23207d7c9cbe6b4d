//! Swarms of our own engines, over real sockets on the loopback: over TLS with proof of membership.

#![allow(clippy::unwrap_used)] // what fails here fails the test

mod support;

use std::time::Duration;

use gse_bt::manifest::manifest_id;
use gse_bt::{Limits, ResumeFile, Swarm};
use gse_proto::file::PeerAddress;
use support::{Content, Node, Site, storage, wait_for};

async fn targets(site: &Site, content: &Content, count: usize) -> Vec<Node> {
    let mut targets = Vec::new();
    for at in 0..count {
        targets.push(site.target(&format!("t{at}"), content).await);
    }
    targets
}

/// Tells everybody of everybody.
fn introduce(seed: &Node, targets: &[Node]) {
    let everybody: Vec<PeerAddress> = targets
        .iter()
        .map(|target| target.address(false))
        .chain([seed.address(true)])
        .collect();
    for target in targets {
        assert!(target.swarm.add_peers(&everybody));
    }
}

fn copies(seed: &Swarm, content: &Content) -> f64 {
    seed.progress().borrow().uploaded as f64 / content.total() as f64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_target_gets_everything() {
    let site = Site::tls();
    let content = Content::of_one(5_000_000);
    let seed = site.seed("seed", &content).await;
    let target = site.target("t0", &content).await;
    target.swarm.add_peers(&[seed.address(true)]);
    target.finished(Duration::from_secs(10)).await;
    target.check(&content);
    let progress = target.swarm.progress().borrow().clone();
    assert_eq!((progress.have_bytes, progress.total), (5_000_000, 5_000_000));
    assert_eq!(progress.downloaded, 5_000_000);
    assert!(progress.failed.is_none() && progress.pieces.is_full());
    wait_for("the source knows what it has sent", || {
        seed.swarm.progress().borrow().uploaded == 5_000_000
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_at_all_is_complete_at_once() {
    let site = Site::tls();
    let content = Content::of_many(&[0, 0]);
    let seed = site.seed("seed", &content).await;
    let target = site.target("t0", &content).await;
    target.swarm.add_peers(&[seed.address(true)]);
    target.finished(Duration::from_secs(5)).await;
    target.swarm.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_targets_get_everything_and_the_source_sends_one_copy() {
    // contract: p2p#2
    let site = Site::tls();
    let content = Content::of_many(&[3_000_000, 0, 17, 12_000_000, 65_536, 1_000_001]);
    let seed = site.seed("seed", &content).await;
    let targets = targets(&site, &content, 8).await;
    // Slower than the processors: else the race is about those.
    seed.swarm.set_limits(Limits { up: 8_000_000, down: 0 });
    introduce(&seed, &targets);
    for target in &targets {
        target.finished(Duration::from_secs(20)).await;
        target.check(&content);
    }
    let copies = copies(&seed.swarm, &content);
    assert!(copies < 1.2, "{copies} copies came from the source");
    wait_for("the source knows", || seed.swarm.progress().borrow().first_copy_out).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_dies_holds_up_nobody() {
    let site = Site::tls();
    let content = Content::of_one(12_000_000);
    let seed = site.seed("seed", &content).await;
    seed.swarm.set_limits(Limits { up: 6_000_000, down: 0 });
    let mut targets = targets(&site, &content, 8).await;
    introduce(&seed, &targets);
    let mut progress = targets[3].swarm.progress();
    let third = content.total() / 3;
    tokio::time::timeout(
        Duration::from_secs(10),
        progress.wait_for(|progress| progress.have_bytes > third),
    )
    .await
    .unwrap()
    .unwrap();
    targets.remove(3).engine.stop().await;
    for target in &targets {
        target.finished(Duration::from_secs(15)).await;
        target.check(&content);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_source_may_go_when_every_piece_is_out() {
    // contract: p2p#20
    let site = Site::tls();
    let content = Content::of_one(10_000_000);
    let seed = site.seed("seed", &content).await;
    seed.swarm.set_limits(Limits { up: 8_000_000, down: 0 });
    let targets = targets(&site, &content, 8).await;
    for target in &targets {
        // What the others have is passed on slowly: nobody is near the end when the source goes.
        target.swarm.set_limits(Limits { up: 2_000_000, down: 0 });
    }
    introduce(&seed, &targets);
    let mut progress = seed.swarm.progress();
    tokio::time::timeout(
        Duration::from_secs(20),
        progress.wait_for(|progress| progress.first_copy_out),
    )
    .await
    .unwrap()
    .unwrap();
    seed.engine.stop().await;
    let unfinished = targets
        .iter()
        .filter(|target| !target.swarm.progress().borrow().complete)
        .count();
    assert!(unfinished > 0, "the source has gone too late to show anything");
    for target in &targets {
        target.swarm.set_limits(Limits::default());
    }
    for target in &targets {
        target.finished(Duration::from_secs(20)).await;
        target.check(&content);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_hold_both_ways_and_a_stop_stops() {
    // contract: p2p#23
    let site = Site::tls();
    let content = Content::of_one(64_000_000);
    let (down_seed, down) = (site.seed("s0", &content).await, site.target("t0", &content).await);
    let (up_seed, up) = (site.seed("s1", &content).await, site.target("t1", &content).await);
    down.swarm.set_limits(Limits { up: 0, down: 5_000_000 });
    up_seed.swarm.set_limits(Limits { up: 5_000_000, down: 0 });
    down.swarm.add_peers(&[down_seed.address(true)]);
    up.swarm.add_peers(&[up_seed.address(true)]);
    wait_for("both move", || {
        [&down, &up]
            .iter()
            .all(|node| node.swarm.progress().borrow().downloaded > 2_000_000)
    })
    .await;
    let began = tokio::time::Instant::now();
    let bytes = || {
        [
            down.swarm.progress().borrow().downloaded,
            up_seed.swarm.progress().borrow().uploaded,
        ]
    };
    let mut seen = vec![(0.0, bytes())];
    while began.elapsed() < Duration::from_secs(7) {
        let mut progress = down.swarm.progress();
        progress.borrow_and_update();
        progress.changed().await.unwrap();
        seen.push((began.elapsed().as_secs_f64(), bytes()));
    }
    let mut windows = 0;
    for (from, before) in &seen {
        let Some((to, after)) = seen.iter().find(|(at, _)| at - from >= 5.0) else {
            break;
        };
        windows += 1;
        for (before, after) in before.iter().zip(after) {
            let rate = (after - before) as f64 / (to - from);
            // Progress is told five times a second, so a window may be off by that.
            assert!((4_700_000.0..5_300_000.0).contains(&rate), "{rate} bytes a second");
        }
    }
    assert!(windows > 3);
    let stopped = tokio::time::timeout(Duration::from_secs(1), down.swarm.stop()).await;
    assert!(stopped.is_ok(), "a stop takes a second at most");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_there_before_a_restart_is_not_fetched_again() {
    // contract: p2p#19
    let site = Site::tls();
    let content = Content::of_one(64_000_000);
    let seed = site.seed("seed", &content).await;
    let first = site.target("t0", &content).await;
    first.swarm.set_limits(Limits {
        up: 0,
        down: 20_000_000,
    });
    first.swarm.add_peers(&[seed.address(true)]);
    let map = site.dir.path().join("map");
    let open = || {
        std::fs::File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&map)
            .unwrap()
    };
    let id = manifest_id(&content.manifest);
    let pieces = storage(&content, &first.paths).geometry().pieces();
    let (mut resume, none) = ResumeFile::open(open(), id, pieces).unwrap();
    assert!(none.is_none());
    let mut progress = first.swarm.progress();
    while progress.borrow().have_bytes < content.total() / 2 {
        tokio::time::timeout(Duration::from_secs(10), progress.changed())
            .await
            .unwrap()
            .unwrap();
        let pieces = progress.borrow_and_update().pieces.clone();
        resume.save(&pieces).unwrap();
    }
    // As a kill: nothing more is saved, whatever has been written meanwhile.
    first.engine.stop().await;
    let had = first.swarm.progress().borrow().have_bytes;
    let (_, kept) = ResumeFile::open(open(), id, pieces).unwrap();
    let kept = kept.unwrap();
    let mut node = site.config("t0");
    node.limits = Limits::default();
    let again = site.target_with("t0", &content, node, false, Some(kept)).await;
    again.swarm.add_peers(&[seed.address(true)]);
    again.finished(Duration::from_secs(15)).await;
    again.check(&content);
    let twice = (had + again.swarm.progress().borrow().downloaded).saturating_sub(content.total());
    assert!(
        twice as f64 <= content.total() as f64 * 0.02,
        "{twice} bytes were fetched twice"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_changes_says_so() {
    let site = Site::tls();
    let content = Content::of_one(4_000_000);
    let seed = site.seed("seed", &content).await;
    std::fs::write(&seed.paths[0], vec![1; 4_000_000]).unwrap();
    let target = site.target("t0", &content).await;
    target.swarm.add_peers(&[seed.address(true)]);
    let mut progress = seed.swarm.progress();
    tokio::time::timeout(
        Duration::from_secs(10),
        progress.wait_for(|progress| progress.failed.is_some()),
    )
    .await
    .unwrap()
    .unwrap();
    let failed = seed.swarm.progress().borrow().failed.clone().unwrap();
    assert!(failed.changed && !failed.disk_full, "{failed:?}");
    assert!(!target.swarm.progress().borrow().complete);
}
