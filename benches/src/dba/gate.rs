//! Bounds that a short run must keep: far enough above what is measured on a loaded machine that only a real loss of speed breaks them.

use serde::Serialize;

use super::idle::Idle;
use super::{Figure, Kind};
use crate::report::Section;

/// Most CPU of gse_dba for an operation, microseconds, by target and pipeline. About twice what `docs/benchmarks.md` has, because what a
/// microsecond is worth differs that much between a quiet and a loaded machine.
const CPU_US: [(Kind, u32, f64); 6] = [
    (Kind::Single, 16, 3.0),
    (Kind::Single, 1, 24.0),
    (Kind::Sharded, 16, 5.0),
    (Kind::Sharded, 1, 36.0),
    (Kind::Group, 16, 5.0),
    (Kind::Group, 1, 32.0),
];
/// Least part of direct Redis' rate in the same round.
const RATIO: [(Kind, u32, f64); 2] = [(Kind::Single, 16, 0.35), (Kind::Single, 1, 0.30)];
/// Most memory of an idle client, KiB.
const IDLE_KIB: f64 = 8.0;

/// One figure and where it must be.
#[derive(Debug, Serialize)]
pub(crate) struct Bound {
    what: String,
    measured: f64,
    bound: f64,
    /// Whether the bound is the least it may be.
    at_least: bool,
}

impl Bound {
    pub(crate) fn kept(&self) -> bool {
        if self.at_least {
            self.measured >= self.bound
        } else {
            self.measured <= self.bound
        }
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let than = if self.at_least { "at least" } else { "at most" };
        write!(
            f,
            "{}: {:.2}, must be {than} {:.2}",
            self.what, self.measured, self.bound
        )
    }
}

/// All bounds that apply to what was measured.
// contract: redis-proxy#30
pub(crate) fn judge(figures: &[Figure], idle: Option<&Idle>) -> Vec<Bound> {
    let mut bounds = Vec::new();
    for f in figures.iter().filter(|f| f.build.is_empty()) {
        let of = |table: &[(Kind, u32, f64)]| {
            let found = table.iter().find(|(k, p, _)| *k == f.kind && *p == f.cell.pipeline);
            found.map(|(_, _, bound)| *bound)
        };
        if let (Some(bound), Some(cpu)) = (of(&CPU_US), &f.cpu_us) {
            bounds.push(Bound {
                what: format!("CPU us/op of {}, {}", f.kind.what(), f.cell),
                // The best round: what the machine did beside it can only add to it.
                measured: cpu.least,
                bound,
                at_least: false,
            });
        }
        if let Some(bound) = of(&RATIO) {
            bounds.push(Bound {
                what: format!("rate to direct of {}, {}", f.kind.what(), f.cell),
                measured: f.ratio.most,
                bound,
                at_least: true,
            });
        }
    }
    if let Some(idle) = idle {
        bounds.push(Bound {
            what: "KiB of an idle client".into(),
            measured: idle.worked_kib,
            bound: IDLE_KIB,
            at_least: false,
        });
    }
    bounds
}

pub(crate) fn section(bounds: &[Bound]) -> Section {
    let mut table = Section::new("bounds", &["what", "measured", "bound", "kept"]);
    for b in bounds {
        let kept = if b.kept() { "yes" } else { "NO" };
        table.row(
            &b.what,
            [format!("{:.2}", b.measured), format!("{:.2}", b.bound), kept.into()],
        );
    }
    table
}

#[cfg(test)]
mod tests {
    use super::super::Middle;
    use super::super::load::Cell;
    use super::*;

    fn figure(cpu: f64, ratio: f64) -> Figure {
        let same = |v: f64| Middle {
            median: v,
            least: v,
            most: v,
        };
        Figure {
            kind: Kind::Single,
            build: String::new(),
            cell: Cell {
                write: true,
                pipeline: 16,
            },
            rounds: 1,
            per_s: same(1.0),
            ratio: same(ratio),
            cpu_us: Some(same(cpu)),
            p50_ms: same(1.0),
            p99_ms: same(1.0),
            p99_over_ms: same(0.0),
        }
    }

    // contract: redis-proxy#30
    #[test]
    fn what_became_much_slower_is_out_of_bounds() {
        assert!(judge(&[figure(1.3, 0.8)], None).iter().all(Bound::kept));
        let slow = judge(&[figure(9.0, 0.8)], None);
        assert!(slow.iter().any(|b| !b.kept() && b.what.contains("CPU")), "{slow:?}");
        let slow = judge(&[figure(1.3, 0.1)], None);
        assert!(slow.iter().any(|b| !b.kept() && b.what.contains("rate")), "{slow:?}");
    }
}
