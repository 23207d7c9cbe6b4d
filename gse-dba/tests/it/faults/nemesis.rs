//! One thing that breaks, and its repair.

use std::time::Duration;

use nix::sys::signal::Signal;
use rand::RngExt as _;
use rand::rngs::StdRng;

use super::park::{Park, wait_long};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    KillPrimary,
    KillCopy,
    KillSentinel,
    KillFront,
    /// Longer than Sentinel waits.
    FreezePrimary,
    FreezeCopies,
    /// The primary alone, from everything but the clients' side.
    Isolate,
    /// The primary and one gse_dba with its clients, from everything else.
    IsolateWithFront,
    /// Nothing that the primary sends arrives at its copies and Sentinels.
    Mute,
    /// Nothing that copies and Sentinels send arrives at the primary.
    Deaf,
    /// The primary's copies follow it, but no Sentinel hears it.
    HiddenFromSentinels,
    /// And one gse_dba is on its side.
    HiddenWithFront,
    /// The primary is back before Sentinel has noticed, with all that it had on its disk.
    PowerCycle,
    /// The primary's machine is lost with its disk; what comes back does so after Sentinel has noticed.
    KillAndWipe,
    /// An operator's fail-over of which one gse_dba hears nothing, and the old primary is cut off from its new one: it has old data, and says that it is a copy.
    DemoteUnheard,
}

pub(crate) const LOCAL: [Fault; 8] = [
    Fault::KillPrimary,
    Fault::FreezePrimary,
    Fault::KillCopy,
    Fault::KillSentinel,
    Fault::KillFront,
    Fault::FreezeCopies,
    Fault::PowerCycle,
    Fault::KillAndWipe,
];

pub(crate) const CUTS: [Fault; 7] = [
    Fault::Isolate,
    Fault::IsolateWithFront,
    Fault::Mute,
    Fault::Deaf,
    Fault::HiddenFromSentinels,
    Fault::HiddenWithFront,
    Fault::DemoteUnheard,
];

impl Fault {
    /// Breaks something, holds it for as long, repairs it, and waits until all is well.
    pub(crate) fn run(self, park: &mut Park, rng: &mut StdRng, hold: Duration) {
        let group = rng.random_range(0..park.groups.len());
        let primary = park.primary(group).expect("a group has no primary before the fault");
        let copy = (primary + rng.random_range(1..3)) % 3;
        match self {
            Fault::KillPrimary | Fault::KillCopy | Fault::KillAndWipe => {
                let at = (group, if self == Fault::KillCopy { copy } else { primary });
                park.groups[group][at.1].kill();
                std::thread::park_timeout(hold);
                if self != Fault::KillCopy {
                    // Otherwise it would be a restart that nobody notices.
                    wait_long("another primary", || park.primary(group).is_some_and(|p| p != primary));
                }
                if self == Fault::KillAndWipe {
                    park.groups[group][at.1].cut_log(None);
                }
                park.restart(at);
            }
            Fault::DemoteUnheard => {
                let mine = park.fronts[rng.random_range(0..park.fronts.len())].host;
                let sentinels: Vec<usize> = park.sentinels.iter().map(|s| s.host).collect();
                let Some(net) = &mut park.net else {
                    panic!("a cut needs a network")
                };
                for s in &sentinels {
                    net.cut(Some(*s), Some(mine));
                    net.cut(Some(mine), Some(*s));
                }
                // Longer than their word holds: it does not stand against an operator who does not wait for a primary to be silent.
                std::thread::park_timeout(Duration::from_secs(3));
                park.sentinels[0].ask(&["SENTINEL", "FAILOVER", &format!("g{group}")]);
                wait_long("another primary", || park.primary(group).is_some_and(|p| p != primary));
                wait_long("the old one to be a copy", || !park.groups[group][primary].is_primary());
                let host = park.groups[group][primary].host;
                let copies = (0..3).filter(|i| *i != primary).map(|i| park.groups[group][i].host);
                let others: Vec<usize> = copies.collect();
                let Some(net) = &mut park.net else {
                    panic!("a cut needs a network")
                };
                for other in others {
                    net.cut(Some(host), Some(other));
                    net.cut(Some(other), Some(host));
                }
                std::thread::park_timeout(hold);
                net.heal();
            }
            Fault::KillSentinel => {
                let at = rng.random_range(0..park.sentinels.len());
                park.sentinels[at].kill();
                std::thread::park_timeout(hold);
                park.restart_sentinel(at);
            }
            Fault::KillFront => {
                let at = rng.random_range(0..park.fronts.len());
                park.fronts[at].kill();
                std::thread::park_timeout(hold);
                park.restart_front(at);
            }
            Fault::FreezePrimary => {
                // The worst is when it goes on while it is being replaced.
                park.groups[group][primary].signal(Signal::SIGSTOP);
                std::thread::park_timeout(Duration::from_millis(rng.random_range(1500..4000)));
                park.groups[group][primary].signal(Signal::SIGCONT);
            }
            Fault::FreezeCopies => {
                for i in (0..3).filter(|i| *i != primary) {
                    park.groups[group][i].signal(Signal::SIGSTOP);
                }
                std::thread::park_timeout(hold);
                for i in (0..3).filter(|i| *i != primary) {
                    park.groups[group][i].signal(Signal::SIGCONT);
                }
            }
            Fault::PowerCycle => {
                park.groups[group][primary].kill();
                park.restart((group, primary));
                std::thread::park_timeout(hold);
            }
            _ => {
                self.cut(park, group, primary, rng);
                std::thread::park_timeout(hold);
                if let Some(net) = &mut park.net {
                    net.heal();
                }
            }
        }
    }

    fn cut(self, park: &mut Park, group: usize, primary: usize, rng: &mut StdRng) {
        let host = park.groups[group][primary].host;
        let copies: Vec<usize> = (0..3)
            .filter(|i| *i != primary)
            .map(|i| park.groups[group][i].host)
            .collect();
        let sentinels: Vec<usize> = park.sentinels.iter().map(|s| s.host).collect();
        let fronts: Vec<usize> = park.fronts.iter().map(|f| f.host).collect();
        // The gse_dba that is on the primary's side, and what is on the other.
        let mine = rng.random_range(0..fronts.len());
        let others: Vec<usize> = match self {
            Fault::IsolateWithFront | Fault::HiddenWithFront => {
                fronts.iter().copied().filter(|f| *f != fronts[mine]).collect()
            }
            Fault::Isolate => fronts.clone(),
            _ => Vec::new(),
        };
        let Some(net) = &mut park.net else {
            panic!("a cut needs a network")
        };
        let mut both = |a: usize, b: usize| {
            net.cut(Some(a), Some(b));
            net.cut(Some(b), Some(a));
        };
        match self {
            Fault::Isolate | Fault::IsolateWithFront => {
                for other in copies.iter().chain(&sentinels).chain(&others) {
                    both(host, *other);
                }
                if self == Fault::IsolateWithFront {
                    for other in copies.iter().chain(&sentinels) {
                        both(fronts[mine], *other);
                    }
                }
            }
            Fault::HiddenFromSentinels | Fault::HiddenWithFront => {
                for s in &sentinels {
                    both(host, *s);
                    if self == Fault::HiddenWithFront {
                        both(fronts[mine], *s);
                    }
                }
            }
            Fault::Mute => {
                for other in copies.iter().chain(&sentinels) {
                    net.cut(Some(host), Some(*other));
                }
            }
            Fault::Deaf => {
                for other in copies.iter().chain(&sentinels) {
                    net.cut(Some(*other), Some(host));
                }
            }
            _ => unreachable!(),
        }
    }
}
