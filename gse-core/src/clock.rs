//! The clock that is handed to whoever needs one, instead of being reached for.
//!
//! What is decided by time (deadlines, start windows, terms) is decided on [`Clock::unix_ms`]: Unix time as it was when the clock was
//! made, carried on by the monotonic clock. A step of the host's wall clock does not move it; it only draws near, by a hundredth of
//! the time that passes, so that a task of an hour is at most 36 seconds off whatever somebody does to the clock meanwhile. A new
//! process begins with the wall clock as it is then. What only waits uses Tokio's timers.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// The wall clock is looked at this often.
const LOOK_EVERY_MS: u64 = 1_000;
/// Of the time passed, the part by which the clock may draw near the wall clock.
const SLEW: u64 = 100;
/// A difference that is said in the log.
const STEP_MS: u64 = 5_000;

/// Where the wall clock is read.
#[derive(Debug, Clone)]
enum Wall {
    System,
    Simulated { start_ms: u64, skew: Skew },
}

/// By how much a simulated wall clock is wrong, in milliseconds; can be changed while clocks run on it.
#[derive(Debug, Clone, Default)]
pub struct Skew(Arc<AtomicI64>);

impl Skew {
    /// Makes the wall clock jump by so many milliseconds.
    pub fn jump(&self, by_ms: i64) {
        self.0.fetch_add(by_ms, Ordering::Relaxed);
    }

    fn ms(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct Inner {
    origin: Instant,
    wall: Wall,
    /// What the wall clock showed at the origin.
    start_ms: u64,
    /// What has been added since, to draw near the wall clock.
    adjusted_ms: AtomicI64,
    /// When (monotonic) the wall clock was last looked at.
    looked_ms: AtomicU64,
    /// The last difference that was said.
    said_ms: AtomicI64,
}

/// A clock. Cheap to clone; every clone is the same.
#[derive(Debug, Clone)]
pub struct Clock(Arc<Inner>);

impl Clock {
    /// The one clock of this process.
    #[must_use]
    pub fn system() -> Self {
        static SYSTEM: OnceLock<Clock> = OnceLock::new();
        SYSTEM.get_or_init(|| Self::new(Wall::System)).clone()
    }

    /// A clock that starts at `start_ms`, give or take the skew, and goes on with Tokio's time, which a test may have stopped or
    /// simulate.
    #[must_use]
    pub fn simulated(start_ms: u64, skew: &Skew) -> Self {
        Self::new(Wall::Simulated {
            start_ms,
            skew: skew.clone(),
        })
    }

    fn new(wall: Wall) -> Self {
        let start_ms = wall.ms(0);
        Self(Arc::new(Inner {
            origin: Instant::now(),
            wall,
            start_ms,
            adjusted_ms: AtomicI64::new(0),
            looked_ms: AtomicU64::new(0),
            said_ms: AtomicI64::new(0),
        }))
    }

    /// Milliseconds since the clock was made; never goes back and never jumps.
    #[must_use]
    pub fn mono_ms(&self) -> u64 {
        u64::try_from(self.0.origin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Unix milliseconds that a step of the wall clock does not move. For everything that is decided by time.
    #[must_use]
    pub fn unix_ms(&self) -> u64 {
        self.at(self.mono_ms())
    }

    fn at(&self, mono: u64) -> u64 {
        let inner = &*self.0;
        let looked = inner.looked_ms.load(Ordering::Relaxed);
        let passed = mono.saturating_sub(looked);
        if passed >= LOOK_EVERY_MS
            && inner
                .looked_ms
                .compare_exchange(looked, mono, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        {
            self.draw_near(mono, passed);
        }
        (inner.start_ms + mono).saturating_add_signed(inner.adjusted_ms.load(Ordering::Relaxed))
    }

    /// What the wall clock shows now, jumps and all. For people only.
    #[must_use]
    pub fn wall_ms(&self) -> u64 {
        self.0.wall.ms(self.mono_ms())
    }

    fn draw_near(&self, mono: u64, passed: u64) {
        let inner = &*self.0;
        let adjusted = inner.adjusted_ms.load(Ordering::Relaxed);
        let shown = (inner.start_ms + mono).saturating_add_signed(adjusted);
        let off = signed(inner.wall.ms(mono)) - signed(shown);
        let most = signed(passed / SLEW);
        inner
            .adjusted_ms
            .store(adjusted + off.clamp(-most, most), Ordering::Relaxed);
        let said = inner.said_ms.load(Ordering::Relaxed);
        if off.abs_diff(said) >= STEP_MS {
            inner.said_ms.store(off, Ordering::Relaxed);
            if off.unsigned_abs() >= STEP_MS {
                tracing::warn!(
                    off_ms = off,
                    "the host's wall clock was set, or the host stood still; what is under way is not affected, and times draw near the new ones slowly (a restart takes them up at once)"
                );
            }
        }
    }
}

impl Wall {
    fn ms(&self, mono_ms: u64) -> u64 {
        match self {
            Self::System => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)),
            Self::Simulated { start_ms, skew } => (start_ms + mono_ms).saturating_add_signed(skew.ms()),
        }
    }
}

fn signed(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_of_the_wall_clock_moves_no_deadline() {
        // contract: reliability#F13
        const START: u64 = 1_800_000_000_000;
        for jump in [300_000, 3_600_000, -3_600_000, 86_400_000, -86_400_000] {
            let skew = Skew::default();
            let clock = Clock::simulated(START, &skew);
            assert_eq!(clock.at(10_000), START + 10_000);
            skew.jump(jump);
            for second in 11..=610 {
                let shown = clock.at(second * 1000) - START;
                let off = shown.abs_diff(second * 1000);
                assert!(off <= (second - 10) * 1000 / SLEW, "{jump}: {second} s, {off} ms off");
            }
            let wall = clock.0.wall.ms(610_000);
            assert_eq!(wall, (START + 610_000).saturating_add_signed(jump));
        }
    }

    #[test]
    fn small_corrections_are_followed() {
        let skew = Skew::default();
        let clock = Clock::simulated(1_800_000_000_000, &skew);
        skew.jump(300);
        let off = |second: u64| clock.0.wall.ms(second * 1000) - clock.at(second * 1000);
        assert!(off(1) > 200);
        assert_eq!((2..=60).map(off).next_back(), Some(0));
    }

    #[test]
    fn the_system_clock_is_about_right() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
        assert!(Clock::system().unix_ms().abs_diff(now) < 60_000);
    }
}
