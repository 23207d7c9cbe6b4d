//! No acknowledged write is lost, and no read shows less than it must, whichever single thing breaks: real Redis, Sentinel and gse_dba processes under
//! recorded load, one fault at a time, and afterwards the history is checked.

mod disasters;
mod model;
mod nemesis;
mod net;
mod park;

use std::time::Duration;

use dba_check::load::Load;
use dba_check::{Kind, Outcome, Reply, Report, Wrong};
use parking_lot::{Mutex, MutexGuard};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use nemesis::{CUTS, Fault, LOCAL};
use park::{Park, Plan};

/// These tests are heavy: one at a time.
static ONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE.lock()
}

fn seed() -> u64 {
    let seed = std::env::var("GSE_DBA_SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| rand::rng().random_range(0..1_000_000));
    println!("GSE_DBA_SEED={seed}");
    seed
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|s| s.parse().ok()).unwrap_or(default)
}

/// Load, one fault, repair, a little more load, and what the history shows; also errors that no client should see.
fn shaken(park: &mut Park, fault: Fault, seed: u64, hold: Duration) -> (Report, Vec<String>) {
    let mut rng = StdRng::seed_from_u64(seed);
    let logins = (0..park.fronts.len()).map(|i| park.login(i)).collect();
    let load = Load::start(logins, &format!("s{seed}:"), seed);
    park::wait_long("the load to run", || load.answered() > 300);
    std::thread::park_timeout(Duration::from_millis(rng.random_range(0..500)));
    let broken = load.clock.now();
    fault.run(park, &mut rng, hold);
    let well = park.wait_well();
    let mended = load.clock.now();
    let before = load.answered();
    park::wait_long("the load to go on", || load.answered() > before + 200);
    let recorded = load.finish(Duration::from_secs(30));
    let report = dba_check::check(&recorded.events, &[], Duration::from_secs(20));
    println!(
        "{fault:?} seed {seed}: {} ms broken, well {well:?} after the repair; {report}",
        (mended - broken) / 1_000_000
    );
    (report, recorded.strange.into_iter().take(5).collect())
}

fn round(park: &mut Park, fault: Fault, seed: u64, hold: Duration) -> Report {
    let (report, strange) = shaken(park, fault, seed, hold);
    if !strange.is_empty() || !report.is_clean() {
        println!("{}", park.logs());
    }
    assert!(
        strange.is_empty(),
        "{fault:?} seed {seed}: errors that no client should see: {strange:?}"
    );
    report
}

fn must_be_clean(fault: Fault, seed: u64, report: &Report) {
    assert!(report.is_clean(), "{fault:?}, GSE_DBA_SEED={seed}: {report}");
    assert!(report.answered > 500, "next to nothing was done: {report}");
}

// contract: redis-proxy#24
#[test]
fn a_history_with_a_killed_primary_is_right() {
    let _one = alone();
    let mut park = Park::start(&Plan::default()).unwrap();
    let seed = seed();
    let report = round(&mut park, Fault::KillPrimary, seed, Duration::from_millis(500));
    must_be_clean(Fault::KillPrimary, seed, &report);
}

// contract: redis-proxy#24
#[test]
fn a_history_with_a_frozen_primary_is_right() {
    let _one = alone();
    let mut park = Park::start(&Plan::default()).unwrap();
    let seed = seed();
    let report = round(&mut park, Fault::FreezePrimary, seed, Duration::from_millis(2500));
    must_be_clean(Fault::FreezePrimary, seed, &report);
}

/// Many rounds; `GSE_DBA_ROUNDS` says how many, `GSE_DBA_FAULT` which fault alone.
fn many(plan: &Plan, faults: &[Fault]) {
    let Some(mut park) = Park::start(plan) else {
        println!("skipped: network namespaces need root and the program ip");
        return;
    };
    let only = std::env::var("GSE_DBA_FAULT").unwrap_or_default();
    let faults: Vec<Fault> = faults
        .iter()
        .copied()
        .filter(|f| only.is_empty() || format!("{f:?}") == only)
        .collect();
    assert!(!faults.is_empty(), "GSE_DBA_FAULT={only} names none of them");
    let (first, rounds) = (seed(), number("GSE_DBA_ROUNDS", 20));
    let (mut bad, mut answered, mut lost) = (Vec::new(), 0, 0);
    for n in 0..rounds {
        let seed = first + n;
        // Each in turn, so that none is left out.
        let fault = faults[(n as usize) % faults.len()];
        let report = round(&mut park, fault, seed, Duration::from_secs(number("GSE_DBA_HOLD", 7)));
        answered += report.answered;
        lost += report.count(Wrong::Lost);
        if !report.is_clean() {
            bad.push(format!("{fault:?}, GSE_DBA_SEED={seed}: {report}"));
        }
    }
    println!(
        "{rounds} rounds, {answered} operations answered, {lost} lost, {} rounds with faults",
        bad.len()
    );
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

// contract: redis-proxy#24
#[test]
#[ignore = "full tier: twenty rounds of about twenty seconds"]
fn histories_under_killed_and_frozen_processes_are_right() {
    let _one = alone();
    many(&Plan::default(), &LOCAL);
}

// contract: redis-proxy#24
#[test]
#[ignore = "full tier: twenty rounds of about twenty seconds; needs root for network namespaces"]
fn histories_under_cuts_of_the_network_are_right() {
    let _one = alone();
    let plan = Plan {
        net: true,
        ..Plan::default()
    };
    many(&plan, &CUTS);
}

// contract: redis-proxy#24
#[test]
#[ignore = "full tier: ten rounds of about twenty seconds"]
fn copies_of_unequal_priority_lose_nothing_either() {
    let _one = alone();
    let plan = Plan {
        priorities: [100, 10, 200],
        more: "checks = \"warn\"\n".into(),
        ..Plan::default()
    };
    many(&plan, &[Fault::KillPrimary, Fault::FreezePrimary]);
}

/// Each fault built in on purpose, and which fault of the world brings it out.
const MUTANTS: [(&str, Fault); 4] = [
    ("one-copy", Fault::IsolateWithFront),
    ("no-wait", Fault::IsolateWithFront),
    ("no-demotion-check", Fault::DemoteUnheard),
    ("wrong-group", Fault::KillSentinel),
];

// contract: redis-proxy#25
#[test]
#[ignore = "full tier: builds gse_dba with faults on purpose, about five minutes; needs root for network namespaces"]
fn each_mutant_is_caught_and_what_is_released_passes_the_same() {
    let _one = alone();
    let ours = std::path::Path::new(env!("CARGO_BIN_EXE_gse_dba"));
    let target = ours.parent().and_then(std::path::Path::parent).unwrap();
    let built = std::process::Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()))
        .args([
            "build",
            "-p",
            "gse-dba",
            "--features",
            "mutants",
            "--bin",
            "gse_dba_mutant",
            "--target-dir",
        ])
        .arg(target)
        .status()
        .unwrap();
    assert!(built.success(), "the mutants do not build");
    let first = seed();
    let hold = Duration::from_secs(6);
    let mut missed = Vec::new();
    for (mutant, fault) in MUTANTS {
        let plan = Plan {
            net: true,
            binary: target.join("debug/gse_dba_mutant"),
            env: vec![("GSE_DBA_MUTANT".into(), mutant.into())],
            poll_ms: 2000,
            ..Plan::default()
        };
        let Some(mut park) = Park::start(&plan) else {
            println!("skipped: network namespaces need root and the program ip");
            return;
        };
        let mut seeds = Vec::new();
        let caught = (first..first + 4).any(|seed| {
            seeds.push(seed);
            let (report, _) = shaken(&mut park, fault, seed, hold);
            !report.faults.is_empty()
        });
        drop(park);
        println!(
            "mutant {mutant}: {} with {fault:?} and seeds {seeds:?}",
            if caught { "caught" } else { "NOT caught" }
        );
        if !caught {
            missed.push(mutant);
        }
        let plan = Plan {
            binary: ours.into(),
            env: Vec::new(),
            ..plan
        };
        let mut park = Park::start(&plan).unwrap();
        for seed in seeds {
            let report = round(&mut park, fault, seed, hold);
            must_be_clean(fault, seed, &report);
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}

/// How long a primary that is cut off together with a gse_dba is still read through it: until the Sentinels' word is too old, which is before they can have
/// made another. Confirmed reads end at once.
// contract: redis-proxy#24
#[test]
#[ignore = "full tier: half a minute; needs root for network namespaces"]
fn reads_of_a_primary_that_is_cut_off_with_its_gse_dba_end_before_there_is_another() {
    let _one = alone();
    for mode in ["confirmed", "primary"] {
        let plan = Plan {
            groups: 1,
            net: true,
            more: format!("reads = \"{mode}\"\nhold_ms = 300\n"),
            ..Plan::default()
        };
        let Some(mut park) = Park::start(&plan) else {
            println!("skipped: network namespaces need root and the program ip");
            return;
        };
        let mut c = park.client(0);
        assert_eq!(c.perform("n", &Kind::Write(1)), Outcome::Ok(Reply::Done));
        let primary = park.primary(0).unwrap();
        let inside = [park.groups[0][primary].host, park.fronts[0].host];
        let outside: Vec<usize> = (0..3)
            .filter(|i| *i != primary)
            .map(|i| park.groups[0][i].host)
            .chain(park.sentinels.iter().map(|s| s.host))
            .chain([park.fronts[1].host])
            .collect();
        let net = park.net.as_mut().unwrap();
        for a in inside {
            for b in &outside {
                net.cut(Some(a), Some(*b));
                net.cut(Some(*b), Some(a));
            }
        }
        let cut = std::time::Instant::now();
        let other = {
            let (addr, login) = (park.groups[0][primary].addr, park.login(1));
            std::thread::spawn(move || {
                // When a write through the other side is acknowledged, what the first side has is old.
                let mut c = dba_check::client::Client::new(login);
                park::wait_long("a write on the other side", || {
                    c.perform("n", &Kind::Write(2)) == Outcome::Ok(Reply::Done)
                });
                println!("another than {addr} has a write {:?} after the cut", cut.elapsed());
                cut.elapsed()
            })
        };
        let mut last = Duration::ZERO;
        while cut.elapsed() < Duration::from_secs(8) {
            let asked = cut.elapsed();
            if c.perform("n", &Kind::Read) == Outcome::Ok(Reply::Value(Some(1))) {
                last = asked;
            }
        }
        let another = other.join().unwrap();
        println!("reads = {mode}: the last old value was read {last:?} after the cut");
        assert!(
            last < another,
            "{mode}: an old value {last:?} after the cut, when another had written at {another:?}"
        );
        if mode == "confirmed" {
            assert!(last < Duration::from_millis(500), "{mode}: {last:?}");
        }
        park.net.as_mut().unwrap().heal();
        park.wait_well();
    }
}
