//! The real code of gse_task's sessions and tasks, of the agent's session and of the embedded store on a simulated network, in one
//! thread and in simulated time. Everything that happens follows from a seed; `tests/README.md` says how to repeat one.
//!
//! Stood in for: TLS (streams are given), HTTP (calls go to the service behind it) and the agent's executor ([`host`]).

mod chaos;
mod chaos_relay;
mod clocks;
mod determinism;
mod host;
mod log;
mod partition;
mod script;
mod slow;
mod soak;
mod store_outage;
mod storm;
mod truth;
mod world;

/// Runs `one` for every seed, and says which one failed and how it is run again.
fn for_seeds(test: &str, seeds: impl IntoIterator<Item = u64>, one: impl Fn(u64) -> Result<(), String>) {
    let only = std::env::var("SIM_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds: Vec<u64> = match only {
        Some(seed) => vec![seed],
        None => seeds.into_iter().collect(),
    };
    for seed in seeds {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| one(seed)));
        let why = match outcome {
            Ok(Ok(())) => continue,
            Ok(Err(why)) => why,
            Err(panic) => panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_else(|| "panicked".to_owned()),
        };
        panic!(
            "{test}: seed {seed} failed: {why}\nagain: SIM_SEED={seed} cargo test -p gse-tests --test sim -- {test} --include-ignored\n\
             when it is mended: add the line \"{test} {seed}\" to tests/sim_seeds.txt"
        );
    }
}

/// Seeds of `test` that have failed once.
fn past(test: &str) -> Vec<u64> {
    include_str!("../../sim_seeds.txt")
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next()? == test).then(|| words.next()?.parse().ok())?
        })
        .collect()
}
