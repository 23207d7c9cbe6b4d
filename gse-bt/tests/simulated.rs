//! What the scheduler does with more hosts than there are here, simulated. `cargo run --release -p gse-bt --example swarm_sim` prints
//! the figures as a table.

use gse_bt::sim::{Link, Outcome, Scenario, mbit, run};

const MIB: u64 = 1 << 20;

fn result(scenario: &Scenario) -> Outcome {
    let out = run(scenario, 1000.0);
    println!(
        "{}: bound {:.2} s; p50 {:.3}, p99 {:.3}, last {:.3}; source {:.3} copies, waste {:.1} %",
        scenario.name,
        out.bound,
        out.quantile(0.5),
        out.quantile(0.99),
        out.last(),
        out.source_copies,
        out.waste * 100.0
    );
    out
}

#[test]
fn eight_targets() {
    // contract: p2p#1
    // contract: p2p#2
    for seed in 1..4 {
        let mut scenario = Scenario::even("8 x 256 MiB", 256 * MIB, 8, 200.0);
        scenario.seed = seed;
        let out = result(&scenario);
        assert!(out.last() <= 1.15, "{}", out.last());
        assert!(out.source_copies <= 1.10, "{}", out.source_copies);
    }
}

#[test]
fn one_slow_uplink_of_eight() {
    // contract: p2p#3
    for seed in 1..4 {
        let mut scenario = Scenario::even("8 x 256 MiB, one uplink at a tenth", 256 * MIB, 8, 200.0).one_slow();
        scenario.seed = seed;
        let out = result(&scenario);
        assert!(out.last() <= 1.4, "{}", out.last());
        assert!(out.quantile(0.5) <= 1.15, "{}", out.quantile(0.5));
    }
}

#[test]
fn twenty_four_targets() {
    // contract: p2p#4
    let out = result(&Scenario::even("24 x 64 MiB", 64 * MIB, 24, 100.0));
    assert!(
        out.last() <= 1.5 && out.source_copies <= 1.3,
        "{} {}",
        out.last(),
        out.source_copies
    );
    let mixed = result(&Scenario::even("24 x 64 MiB, mixed", 64 * MIB, 24, 100.0).mixed());
    assert!(mixed.last() <= 1.5, "{}", mixed.last());
}

#[test]
fn the_source_leaves_after_one_copy() {
    // contract: p2p#20
    // All uplinks are slow: nobody is near its end when the source goes.
    let mut scenario = Scenario::even("8 x 64 MiB, the source leaves", 64 * MIB, 8, 200.0);
    for link in &mut scenario.targets {
        *link = Link {
            up: mbit(50.0),
            down: mbit(200.0),
        };
    }
    scenario.source_leaves_after = Some(1.05);
    let out = result(&scenario);
    assert!(out.last().is_finite(), "all have everything");
}

#[test]
fn a_thousand_targets() {
    let out = result(
        &Scenario::even("1,000 x 64 MiB, mixed", 64 * MIB, 1000, 200.0)
            .mixed()
            .coarse(256),
    );
    assert!(out.quantile(0.99) <= 1.5, "{}", out.quantile(0.99));
    assert!(out.last().is_finite());
}

#[test]
#[ignore = "full tier: minutes of computing"]
fn five_thousand_targets() {
    let out = result(
        &Scenario::even("5,000 x 256 MiB, mixed", 256 * MIB, 5000, 200.0)
            .mixed()
            .coarse(512),
    );
    assert!(out.quantile(0.99) <= 1.5, "{}", out.quantile(0.99));
    assert!(out.last().is_finite());
}

#[test]
#[ignore = "full tier: minutes of computing"]
fn a_thousand_targets_and_a_large_file() {
    let out = result(
        &Scenario::even("1,000 x 256 MiB, mixed", 256 * MIB, 1000, 200.0)
            .mixed()
            .coarse(1024),
    );
    assert!(out.quantile(0.99) <= 1.5, "{}", out.quantile(0.99));
}
