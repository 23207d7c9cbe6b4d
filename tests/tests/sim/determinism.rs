//! F18: the same seed twice is the same run, line by line. `SIM_NET=1` adds to the lines what is on its way through the network, to see
//! where two runs begin to differ.

use super::soak;

fn repeats(seeds: impl IntoIterator<Item = u64>) {
    for seed in seeds {
        let runs: Vec<Vec<String>> = (0..2)
            .map(|_| {
                let (world, outcome) = soak::play(seed);
                assert!(outcome.is_ok(), "{outcome:?}");
                world.log.lines()
            })
            .collect();
        if let Some(n) = runs[0].iter().zip(&runs[1]).position(|(one, other)| one != other) {
            let around = |run: &[String]| run[n.saturating_sub(4)..run.len().min(n + 4)].join("\n");
            let (one, other) = (around(&runs[0]), around(&runs[1]));
            panic!("seed {seed}: two runs part at line {n}:\n{one}\n--\n{other}");
        }
        assert_eq!(runs[0].len(), runs[1].len(), "seed {seed}");
        assert!(runs[0].len() > 20, "next to nothing happened in the run of seed {seed}");
    }
}

#[test]
fn a_seed_repeats_a_run() {
    // contract: reliability#F18
    repeats(0..3);
}

#[test]
#[ignore = "full tier: 100 seeds"]
fn every_seed_repeats_its_run() {
    // contract: reliability#F18
    repeats(0..100);
}

#[test]
fn another_seed_is_another_run() {
    // contract: reliability#F18
    assert_ne!(soak::play(1).0.hash(), soak::play(2).0.hash());
}
