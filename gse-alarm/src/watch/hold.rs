//! Why alarms are held back: the fault may be ours.

use gse_proto::alarm::MassSilence;

use super::{BREATH_MS, Rules, Span};

/// Masses that are remembered; more at a time are no news.
const MOST: usize = 16;

/// Why a host is held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Why {
    /// No instance of gse_alarm was looking.
    Start,
    /// The active instance was stalled.
    Alarm,
    /// The store was away.
    Store,
    /// The host's node of gse_task was or is away or stalled, or its clock was set.
    Task,
    /// Much of the fleet went silent in one minute.
    Mass,
}

impl Why {
    /// One word, for figures.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Alarm => "alarm",
            Self::Store => "store",
            Self::Task => "task",
            Self::Mass => "mass",
        }
    }

    /// For people.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::Start => "no gse_alarm was looking before",
            Self::Alarm => "gse_alarm itself was stalled",
            Self::Store => "the store was away",
            Self::Task => "their nodes of gse_task are or were away or stalled",
            Self::Mass => "much of the fleet went silent in the same minute",
        }
    }
}

#[derive(Debug)]
struct Mass {
    /// First stamp, and how many there were in the fleet.
    from: u64,
    fleet: u64,
    noticed: u64,
    /// How many of those that went silent still are, and when the last one came back.
    silent: u64,
    returned: u64,
    /// There are still enough of them, or they are coming back: the others wait.
    holds: bool,
}

#[derive(Debug)]
pub(super) struct Holds {
    settle_ms: u64,
    quiet_ms: u64,
    hold_ms: u64,
    least: u64,
    percent: u64,
    window_ms: u64,
    /// How long a mass is remembered, so that it is not noticed again.
    remember_ms: u64,
    fault: Option<(u64, Why)>,
    breath_until: u64,
    masses: Vec<Mass>,
}

impl Holds {
    pub(super) fn new(rules: &Rules) -> Self {
        Self {
            settle_ms: rules.settle_ms(),
            quiet_ms: rules.quiet_ms,
            hold_ms: rules.hold_ms,
            least: rules.mass_hosts,
            percent: rules.mass_percent,
            window_ms: rules.mass_window_ms,
            remember_ms: rules.hold_ms + rules.overdue_ms + 2 * rules.mass_window_ms,
            fault: None,
            breath_until: 0,
            masses: vec![],
        }
    }

    /// Something of ours was away until now.
    pub(super) fn fault(&mut self, now: u64, why: Why) {
        self.fault = Some((now, why));
        self.breathe(now, BREATH_MS);
    }

    /// Nothing is sent for so long: what was heard while nobody looked is being written.
    pub(super) fn breathe(&mut self, now: u64, time: u64) {
        self.breath_until = self.breath_until.max(now + time.min(self.settle_ms));
    }

    /// Nobody has looked for so long.
    pub(super) fn shift(&mut self, gap: u64) {
        for mass in &mut self.masses {
            mass.noticed += gap;
            mass.returned += gap;
        }
    }

    /// Before this nothing is sent.
    pub(super) fn breath_until(&self) -> u64 {
        self.breath_until
    }

    /// Whether a host with this stamp is held back, and why.
    pub(super) fn why(&self, now: u64, seen: u64, node_steady: bool) -> Option<Why> {
        if let Some((at, why)) = self.fault
            && now < at + self.settle_ms
        {
            return Some(why);
        }
        if !node_steady {
            return Some(Why::Task);
        }
        let within = |mass: &&Mass| seen >= mass.from && seen - mass.from <= self.window_ms;
        let mass = self.masses.iter().find(within)?;
        (mass.holds && now < mass.noticed + self.hold_ms).then_some(Why::Mass)
    }

    pub(super) fn spans(&self) -> Vec<Span> {
        let span = |mass: &Mass| Span {
            from: mass.from,
            to: mass.from + self.window_ms,
        };
        self.masses.iter().map(span).collect()
    }

    fn is_mass(&self, silent: u64, fleet: u64) -> bool {
        silent >= self.least && silent.saturating_mul(100) >= fleet.saturating_mul(self.percent)
    }

    pub(super) fn count(&mut self, now: u64, heard: u64, recent: u64, masses: &[u64]) -> bool {
        let (least, percent) = (self.least, self.percent);
        for (mass, silent) in self.masses.iter_mut().zip(masses) {
            if *silent < mass.silent {
                mass.returned = now;
            }
            mass.silent = *silent;
            let many = *silent >= least && silent.saturating_mul(100) >= mass.fleet.saturating_mul(percent);
            mass.holds = many || now < mass.returned + self.quiet_ms;
        }
        self.masses.retain(|mass| now < mass.noticed + self.remember_ms);
        let noticed: u64 = masses.iter().sum();
        self.is_mass(recent, heard + recent) && recent.saturating_sub(noticed) >= self.least
    }

    /// Looks for the minute with the most stamps among those that are in no minute yet.
    pub(super) fn silent(&mut self, now: u64, heard: u64, mut stamps: Vec<u64>) {
        let fleet = heard + stamps.len() as u64;
        let known = self.spans();
        stamps.retain(|at| !known.iter().any(|span| span.from <= *at && *at <= span.to));
        stamps.sort_unstable();
        let (mut most, mut from, mut start) = (0, 0, 0);
        for (end, at) in stamps.iter().enumerate() {
            while at - stamps[start] > self.window_ms {
                start += 1;
            }
            if end + 1 - start > most {
                most = end + 1 - start;
                from = stamps[start];
            }
        }
        if self.is_mass(most as u64, fleet) && self.masses.len() < MOST {
            self.masses.push(Mass {
                from,
                fleet,
                noticed: now,
                silent: most as u64,
                returned: now,
                holds: true,
            });
        }
    }

    pub(super) fn state(&self, stored: impl Fn(u64) -> u64) -> Vec<MassSilence> {
        let kept = self.masses.iter().map(|mass| MassSilence {
            from_seen_ms: mass.from,
            noticed_ms: stored(mass.noticed),
            fleet: u32::try_from(mass.fleet).unwrap_or(u32::MAX),
        });
        kept.collect()
    }

    pub(super) fn restore(&mut self, masses: &[MassSilence], ago: impl Fn(u64) -> u64) {
        let known = masses.iter().take(MOST).map(|mass| Mass {
            from: mass.from_seen_ms,
            fleet: mass.fleet.into(),
            noticed: ago(mass.noticed_ms),
            silent: mass.fleet.into(),
            returned: ago(mass.noticed_ms),
            holds: true,
        });
        self.masses = known.collect();
    }
}
