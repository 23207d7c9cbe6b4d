//! How much a process takes, in per cent of the whole machine, over a window and not at one moment. What follows from too much is left to
//! [`super::machine`].

use std::collections::VecDeque;

use super::stat::{Stat, Units};

/// Samples kept for one process at most.
const SAMPLES: usize = 64;

#[derive(Debug, Clone, Copy)]
struct Sample {
    at_ms: u64,
    ticks: u64,
    rss: u64,
}

/// The samples of one process.
#[derive(Debug, Clone)]
pub(super) struct Meter {
    window_ms: u64,
    /// Which process they are of.
    of: (i32, u64),
    samples: VecDeque<Sample>,
}

/// Shares of the machine, in per cent.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Usage {
    /// Of all processors.
    pub(super) cpu: f64,
    /// Of the memory.
    pub(super) mem: f64,
}

impl Meter {
    /// Over a window of so many milliseconds.
    pub(super) fn new(window_ms: u64) -> Self {
        Self {
            window_ms,
            of: (0, 0),
            samples: VecDeque::new(),
        }
    }

    /// Takes a sample. Those of another process are forgotten.
    pub(super) fn push(&mut self, now_ms: u64, stat: &Stat) {
        let of = (stat.pid, stat.started);
        if self.of != of {
            self.of = of;
            self.samples.clear();
        }
        let sample = Sample {
            at_ms: now_ms,
            ticks: stat.utime.saturating_add(stat.stime),
            rss: stat.rss,
        };
        // Closer than the window needs them, the last one is replaced: the window is always covered.
        let gap = self.window_ms / (SAMPLES as u64 / 2);
        let close = |a: &Sample, b: &Sample| b.at_ms.saturating_sub(a.at_ms) < gap;
        if self.samples.len() >= 2
            && let Some(before) = self.samples.get(self.samples.len() - 2)
            && close(before, &sample)
        {
            self.samples.pop_back();
        }
        self.samples.push_back(sample);
        // One sample at or before the window's beginning stays.
        let begin = now_ms.saturating_sub(self.window_ms);
        while self.samples.get(1).is_some_and(|second| second.at_ms <= begin) || self.samples.len() > SAMPLES {
            self.samples.pop_front();
        }
    }

    /// Nothing runs.
    pub(super) fn clear(&mut self) {
        self.samples.clear();
    }

    /// Over as much of the window as there is.
    pub(super) fn usage(&self, units: Units) -> Usage {
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else {
            return Usage::default();
        };
        let span_ms = last.at_ms.saturating_sub(first.at_ms);
        let cpu = if span_ms == 0 {
            0.0
        } else {
            let seconds = last.ticks.saturating_sub(first.ticks) as f64 / units.ticks as f64;
            100.0 * seconds / (span_ms as f64 / 1000.0) / units.processors as f64
        };
        let pages = self.samples.iter().map(|s| s.rss as f64).sum::<f64>() / self.samples.len() as f64;
        Usage {
            cpu,
            mem: 100.0 * pages * units.page as f64 / units.memory.max(1) as f64,
        }
    }

    /// What is too much, as a text: only when the whole window has been seen. A limit of 0 is none.
    pub(super) fn over(&self, units: Units, cpu_limit: f64, mem_limit: f64) -> Option<String> {
        let (first, last) = (self.samples.front()?, self.samples.back()?);
        if last.at_ms.saturating_sub(first.at_ms) < self.window_ms {
            return None;
        }
        let usage = self.usage(units);
        for (what, used, limit) in [("cpu", usage.cpu, cpu_limit), ("memory", usage.mem, mem_limit)] {
            if limit > 0.0 && used > limit {
                return Some(format!("{what} usage {used:.2}% is over its limit of {limit}%"));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNITS: Units = Units {
        ticks: 100,
        page: 4096,
        processors: 4,
        memory: 4096 * 1000,
    };

    fn stat(pid: i32, ticks: u64, rss: u64) -> Stat {
        Stat {
            pid,
            comm: String::new(),
            state: 'S',
            parent: 1,
            utime: ticks / 2,
            stime: ticks - ticks / 2,
            threads: 1,
            started: 5,
            rss,
        }
    }

    #[test]
    fn per_cent_of_the_whole_machine() {
        // contract: procmgr-agent-lifecycle#34
        let mut meter = Meter::new(10_000);
        for second in 0..=10u64 {
            // One of four processors, a tenth of the memory.
            meter.push(second * 1000, &stat(1, second * 100, 100));
        }
        let usage = meter.usage(UNITS);
        assert!(
            (usage.cpu - 25.0).abs() < 0.01 && (usage.mem - 10.0).abs() < 0.01,
            "{usage:?}"
        );
        assert!(meter.over(UNITS, 26.0, 11.0).is_none());
        assert!(meter.over(UNITS, 24.0, 0.0).unwrap().starts_with("cpu"));
        assert!(meter.over(UNITS, 0.0, 9.0).unwrap().starts_with("memory"));
        assert!(meter.over(UNITS, 0.0, 0.0).is_none(), "no limits");
    }

    #[test]
    fn one_peak_is_not_too_much() {
        let mut meter = Meter::new(10_000);
        for second in 0..=10u64 {
            let busy = if second >= 5 { 400 } else { 0 };
            meter.push(second * 1000, &stat(1, busy, if second == 5 { 900 } else { 50 }));
        }
        assert!(meter.over(UNITS, 20.0, 20.0).is_none());
    }

    #[test]
    fn nothing_is_said_before_the_window_is_full_nor_of_another_process() {
        let mut meter = Meter::new(10_000);
        for half in 0..19u64 {
            meter.push(half * 500, &stat(1, half * 200, 900));
            assert!(meter.over(UNITS, 1.0, 1.0).is_none());
        }
        meter.push(11_000, &stat(2, 0, 1));
        assert!(meter.over(UNITS, 1.0, 1.0).is_none());
        assert_eq!(meter.usage(UNITS).cpu, 0.0);
    }

    #[test]
    fn many_looks_in_a_window_do_not_empty_it() {
        let mut meter = Meter::new(60_000);
        for step in 0..3_000u64 {
            meter.push(step * 100, &stat(1, step * 40, 10));
        }
        assert!(meter.samples.len() <= SAMPLES);
        let usage = meter.usage(UNITS);
        assert!((usage.cpu - 100.0).abs() < 1.0, "{usage:?}");
        assert!(meter.over(UNITS, 50.0, 0.0).is_some());
    }
}
