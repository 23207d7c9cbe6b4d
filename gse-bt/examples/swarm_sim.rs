//! Prints what the scheduler would do with many hosts: `cargo run -p gse-bt --example swarm_sim --release [-- quick]`.

use gse_bt::sim::{Scenario, run};

fn main() {
    let quick = std::env::args().any(|arg| arg == "quick");
    let mib = 1 << 20;
    let pieces = std::env::var("PIECES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(512);
    let mut list = vec![
        Scenario::even("8 x 256 MiB, 200 Mbit/s", 256 * mib, 8, 200.0),
        Scenario::even("  one uplink at a tenth", 256 * mib, 8, 200.0).one_slow(),
        Scenario::even("8 x 8 MiB, 200 Mbit/s", 8 * mib, 8, 200.0),
        Scenario::even("24 x 64 MiB, 100 Mbit/s", 64 * mib, 24, 100.0),
        Scenario::even("24 x 64 MiB, mixed uplinks", 64 * mib, 24, 100.0).mixed(),
        Scenario::even("100 x 256 MiB, mixed uplinks", 256 * mib, 100, 200.0)
            .mixed()
            .coarse(1024),
        Scenario::even("1,000 x 256 MiB", 256 * mib, 1000, 200.0).coarse(pieces),
        Scenario::even("1,000 x 256 MiB, mixed uplinks", 256 * mib, 1000, 200.0)
            .mixed()
            .coarse(pieces),
    ];
    if !quick {
        list.push(
            Scenario::even("5,000 x 256 MiB, mixed uplinks", 256 * mib, 5000, 200.0)
                .mixed()
                .coarse(512),
        );
        list.push(
            Scenario::even("5,000 x 1 GiB, mixed uplinks", 1024 * mib, 5000, 200.0)
                .mixed()
                .coarse(1024),
        );
    }
    println!(
        "{:<34} {:>8} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7}",
        "scenario", "bound s", "p50", "p90", "p99", "last", "copies", "waste", "took s"
    );
    for mut scenario in list {
        tune(&mut scenario.plan);
        let began = std::time::Instant::now();
        let out = run(&scenario, 10_000.0);
        println!(
            "{:<34} {:>8.2} {:>7.3} {:>7.3} {:>7.3} {:>7.3} {:>7.3} {:>6.1}% {:>7.1}",
            scenario.name,
            out.bound,
            out.quantile(0.5),
            out.quantile(0.9),
            out.quantile(0.99),
            out.last(),
            out.source_copies,
            out.waste * 100.0,
            began.elapsed().as_secs_f64()
        );
    }
}

fn tune(plan: &mut gse_bt::plan::PlanConfig) {
    let get = |name: &str, old: f64| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(old)
    };
    plan.window = get("WINDOW", f64::from(plan.window)) as u32;
    plan.horizon = get("HORIZON", plan.horizon);
    plan.outstanding = get("OUT", f64::from(plan.outstanding)) as u32;
    plan.outstanding_bytes = get("BYTES", plan.outstanding_bytes as f64) as u64;
    plan.endgame_patience = get("PATIENCE", plan.endgame_patience);
    plan.endgame_part = get("PART", plan.endgame_part);
    plan.candidates = get("CAND", f64::from(plan.candidates)) as u32;
}
