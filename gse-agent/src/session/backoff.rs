//! How long to wait before the next round of tries: steps that double up to a limit, and a uniformly random part of the step (full
//! jitter), so that a fleet that lost its server comes back spread out. Only numbers; waiting is left to the caller.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use gse_core::random::Random;

use crate::config::ReconnectConfig;

/// The waits of one series of failures.
#[derive(Debug)]
pub(crate) struct Backoff {
    schedule: ExponentialBuilder,
    steps: ExponentialBackoff,
    longest: Duration,
    settled: Duration,
    random: Random,
}

impl Backoff {
    pub(crate) fn new(config: &ReconnectConfig, random: Random) -> Self {
        let longest = Duration::from_millis(config.max_ms);
        let schedule = ExponentialBuilder::new()
            .with_min_delay(Duration::from_millis(config.min_ms))
            .with_max_delay(longest)
            .with_factor(2.0)
            .without_max_times();
        Self {
            schedule,
            steps: schedule.build(),
            longest,
            settled: Duration::from_millis(config.settled_ms),
            random,
        }
    }

    /// The upper end of the next wait.
    pub(crate) fn step(&mut self) -> Duration {
        self.steps.next().unwrap_or(self.longest).min(self.longest)
    }

    /// The next wait.
    pub(crate) fn wait(&mut self) -> Duration {
        let step = self.step();
        self.random.up_to(step)
    }

    /// A session has ended: a long one ends the series, a short one is a failure like any other.
    pub(crate) fn session_lasted(&mut self, time: Duration) {
        if time >= self.settled {
            self.steps = self.schedule.build();
        }
    }
}

/// `base`, give or take a tenth.
pub(crate) fn about(base: Duration, random: &Random) -> Duration {
    base.mul_f64(0.9 + 0.2 * random.unit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backoff() -> Backoff {
        let config = ReconnectConfig {
            min_ms: 500,
            max_ms: 3_000,
            spread_ms: 0,
            settled_ms: 60_000,
        };
        Backoff::new(&config, Random::system())
    }

    #[test]
    fn steps_double_up_to_the_limit_and_stay_there() {
        let mut backoff = backoff();
        let steps: Vec<u128> = (0..6).map(|_| backoff.step().as_millis()).collect();
        assert_eq!(steps, [500, 1000, 2000, 3000, 3000, 3000]);
        for _ in 0..2_000 {
            assert_eq!(backoff.step().as_millis(), 3000);
        }
    }

    #[test]
    fn only_a_long_session_starts_over() {
        let mut backoff = backoff();
        backoff.step();
        backoff.session_lasted(Duration::from_secs(59));
        assert_eq!(backoff.step().as_millis(), 1000);
        backoff.session_lasted(Duration::from_secs(60));
        assert_eq!(backoff.step().as_millis(), 500);
    }

    #[test]
    fn waits_cover_the_whole_step() {
        let most = Duration::from_millis(1000);
        let mut backoff = backoff();
        backoff.step();
        backoff.steps = backoff.schedule.with_min_delay(most).with_max_delay(most).build();
        let waits: Vec<u128> = (0..400).map(|_| backoff.wait().as_millis()).collect();
        assert!(waits.iter().all(|wait| *wait <= 1000));
        assert!(waits.iter().any(|wait| *wait < 200) && waits.iter().any(|wait| *wait > 800));
        assert!((0..400).all(|_| (900..=1100).contains(&about(most, &Random::system()).as_millis())));
    }
}
