//! Swarms of our own engines, over real sockets on the loopback: over TLS with proof of membership, and plainly.

mod support;

use std::time::Duration;

use gse_bt::{Limits, PlanConfig};
use support::{Content, Site, wait_for};

// contract: p2p#2
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
    assert!(progress.failed.is_none());
    wait_for("the source has sent it once", || seed.swarm.progress().borrow().uploaded == 5_000_000).await;
}

// contract: p2p#1
// contract: p2p#2
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_targets_get_everything_and_the_source_sends_one_copy() {
    let site = Site::tls();
    let content = Content::of_many(&[3_000_000, 0, 17, 12_000_000, 65_536, 1_000_001]);
    let seed = site.seed("seed", &content).await;
    let mut targets = Vec::new();
    for at in 0..8 {
        targets.push(site.target(&format!("t{at}"), &content).await);
    }
    // A link that is slower than the processors: else the race is about those.
    seed.swarm.set_limits(Limits { up: 10_000_000, down: 0 });
    let everybody: Vec<_> = targets.iter().map(|target| target.address(false)).chain([seed.address(true)]).collect();
    for target in &targets {
        target.swarm.add_peers(&everybody);
    }
    for target in &targets {
        target.finished(Duration::from_secs(15)).await;
        target.check(&content);
    }
    let copies = seed.swarm.progress().borrow().uploaded as f64 / content.total() as f64;
    assert!(copies < 1.25, "{copies} copies came from the source");
    assert!(seed.swarm.progress().borrow().first_copy_out);
    let plan = PlanConfig::default();
    assert!(plan.window > 0);
}
