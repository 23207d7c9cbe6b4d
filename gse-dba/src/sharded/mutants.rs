//! Faults built in on purpose: with the feature `mutants` (which no normal build has) the environment variable `GSE_DBA_MUTANT` chooses one, and the checks
//! of recorded histories must find it. Without the feature every question here is answered with no, by the compiler.

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mutant {
    /// Writes count as safe on one server.
    OneCopy,
    /// Nobody waits for the copies.
    NoWait,
    /// Whoever answers is taken for the primary.
    NoDemotionCheck,
    /// After a while writes go to another group than reads, as if by an old table.
    WrongGroup,
}

#[cfg(feature = "mutants")]
pub(super) fn is(mutant: Mutant) -> bool {
    use std::sync::LazyLock;
    use std::time::{Duration, Instant};

    static CHOSEN: LazyLock<(Option<Mutant>, Instant)> = LazyLock::new(|| {
        let chosen = match std::env::var("GSE_DBA_MUTANT").as_deref() {
            Ok("one-copy") => Some(Mutant::OneCopy),
            Ok("no-wait") => Some(Mutant::NoWait),
            Ok("no-demotion-check") => Some(Mutant::NoDemotionCheck),
            Ok("wrong-group") => Some(Mutant::WrongGroup),
            _ => None,
        };
        (chosen, Instant::now())
    });
    let (chosen, since) = *CHOSEN;
    chosen == Some(mutant) && (mutant != Mutant::WrongGroup || since.elapsed() > Duration::from_secs(5))
}

#[cfg(not(feature = "mutants"))]
#[inline]
pub(super) const fn is(_: Mutant) -> bool {
    false
}

/// Where a command goes that should go to `group`.
#[inline]
pub(super) fn group(group: usize, groups: usize, writes: bool) -> usize {
    if writes && is(Mutant::WrongGroup) {
        (group + 1) % groups.max(1)
    } else {
        group
    }
}
