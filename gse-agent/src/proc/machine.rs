//! When a hosted process is started again, when hosting it is given up, and what is told about it: a pure type, fed with what is seen and
//! with the time. Looking, starting and telling are left to [`super::watch`] and [`super::operate`].
//!
//! An operation has the process to itself: between [`Machine::operation_begins`] and [`Machine::operation_ended`] nothing is started here, and
//! no operation begins while a start of the machine's own is under way. What was stopped, or registered while it did not run, is left alone
//! until it has been seen running once (contract procmgr-agent-lifecycle, 1.3).

/// How a process is kept alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rules {
    /// Whether it is started again at all (resident).
    pub(super) respawn: bool,
    /// Starts in a row at most.
    pub(super) retries: u32,
    /// Milliseconds from its end, or from a failed start, to the next start.
    pub(super) interval_ms: u64,
    /// Milliseconds that it has to run before a start counts as the end of the row.
    pub(super) settled_ms: u64,
}

/// What is told about a process, each as one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Told {
    /// It had ended and was started again.
    Restarted,
    /// It had ended and a start did not help.
    RestartFailed,
    /// It is not hosted any more: every start was in vain.
    GivenUp,
    /// It took more than it may and is killed.
    OverLimit,
}

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Run the start command; [`Machine::started`] must follow.
    Start,
    /// Kill it.
    Kill,
    /// Send this event.
    Tell(Told),
    /// Its registration is no longer hosted.
    Unhost,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Not running, and nothing is done about that.
    Rest,
    /// Seen running.
    Up { since: u64 },
    /// Kill was said; it is about to end.
    Dying { since: u64 },
    /// It has ended; to be started then.
    Down { due: u64 },
    /// A start of the machine's own is under way.
    Starting,
}

/// See the module. Times are milliseconds of any clock that only goes forward.
#[derive(Debug, Clone)]
pub(super) struct Machine {
    rules: Rules,
    hosted: bool,
    /// Seen running since it was registered or stopped.
    seen: bool,
    phase: Phase,
    operation: bool,
    /// Starts since it last ran for long.
    tries: u32,
}

impl Machine {
    /// As the registration on disk has it; nothing was seen by this agent yet.
    pub(super) fn new(rules: Rules, hosted: bool, seen: bool) -> Self {
        Self {
            rules,
            hosted,
            seen,
            phase: Phase::Rest,
            operation: false,
            tries: 0,
        }
    }

    /// Whether it is hosted.
    pub(super) fn hosted(&self) -> bool {
        self.hosted
    }

    /// Whether it was seen running since it was registered or stopped.
    pub(super) fn seen(&self) -> bool {
        self.seen
    }

    /// Whether it is this machine's turn: no operation, no start under way.
    pub(super) fn is_free(&self) -> bool {
        !self.operation && self.phase != Phase::Starting
    }

    /// When [`Machine::tick`] has something to do.
    #[cfg(test)]
    pub(super) fn due(&self) -> Option<u64> {
        match self.phase {
            Phase::Down { due } if self.is_free() => Some(due),
            _ => None,
        }
    }

    /// It was looked at.
    pub(super) fn observe(&mut self, now: u64, alive: bool) -> Vec<Action> {
        if !self.is_free() {
            return Vec::new();
        }
        match (alive, self.phase) {
            (true, Phase::Up { .. } | Phase::Dying { .. } | Phase::Starting) => Vec::new(),
            (true, Phase::Rest | Phase::Down { .. }) => {
                self.seen = true;
                self.phase = Phase::Up { since: now };
                Vec::new()
            }
            (false, Phase::Up { since } | Phase::Dying { since }) => {
                if now.saturating_sub(since) >= self.rules.settled_ms {
                    self.tries = 0;
                }
                self.ended(now)
            }
            // First look of a new agent process: it ended while nobody watched.
            (false, Phase::Rest) if self.seen => self.ended(now),
            (false, Phase::Rest | Phase::Down { .. } | Phase::Starting) => Vec::new(),
        }
    }

    fn ended(&mut self, now: u64) -> Vec<Action> {
        self.phase = Phase::Rest;
        if !self.hosted || !self.rules.respawn {
            // Nothing is done about this end, so it need not be found again.
            self.seen = false;
            return Vec::new();
        }
        if self.tries >= self.rules.retries {
            return self.give_up();
        }
        self.phase = Phase::Down {
            due: now.saturating_add(self.rules.interval_ms),
        };
        Vec::new()
    }

    fn give_up(&mut self) -> Vec<Action> {
        self.phase = Phase::Rest;
        self.hosted = false;
        self.seen = false;
        self.tries = 0;
        vec![Action::Unhost, Action::Tell(Told::GivenUp)]
    }

    /// Time has passed.
    pub(super) fn tick(&mut self, now: u64) -> Vec<Action> {
        match self.phase {
            Phase::Down { due } if due <= now && self.is_free() => {
                self.phase = Phase::Starting;
                self.tries += 1;
                vec![Action::Start]
            }
            _ => Vec::new(),
        }
    }

    /// The start that was asked for is over, and its check too.
    pub(super) fn started(&mut self, now: u64, alive: bool) -> Vec<Action> {
        if self.phase != Phase::Starting {
            return Vec::new();
        }
        if alive {
            self.seen = true;
            self.phase = Phase::Up { since: now };
            return vec![Action::Tell(Told::Restarted)];
        }
        let mut actions = vec![Action::Tell(Told::RestartFailed)];
        if self.tries >= self.rules.retries {
            actions.extend(self.give_up());
        } else {
            self.phase = Phase::Down {
                due: now.saturating_add(self.rules.interval_ms),
            };
        }
        actions
    }

    /// A start of an earlier agent process is still under way; [`Machine::started`] must follow.
    pub(super) fn resume_start(&mut self) {
        self.phase = Phase::Starting;
        self.tries += 1;
    }

    /// It takes more than it may.
    pub(super) fn over_limit(&mut self) -> Vec<Action> {
        match self.phase {
            Phase::Up { since } if self.hosted && !self.operation => {
                self.phase = Phase::Dying { since };
                vec![Action::Tell(Told::OverLimit), Action::Kill]
            }
            _ => Vec::new(),
        }
    }

    /// An operation takes the process over. False when it has to wait: another one, or a start, is under way.
    pub(super) fn operation_begins(&mut self) -> bool {
        let free = self.is_free();
        self.operation |= free;
        free
    }

    /// The operation is over, and this is how it has left the process: whether it runs, whether it is hosted from now on, and whether it is
    /// to be left alone when it does not run (it was stopped, registered, or could not be started on request).
    pub(super) fn operation_ended(&mut self, now: u64, alive: bool, hosted: bool, leave_alone: bool) -> Vec<Action> {
        self.operation = false;
        self.hosted = hosted;
        if alive {
            self.seen = true;
            self.tries = 0;
            self.phase = Phase::Up { since: now };
            return Vec::new();
        }
        let was_up = self.seen;
        self.phase = Phase::Rest;
        if leave_alone || !was_up {
            self.seen = false;
            return Vec::new();
        }
        self.ended(now)
    }

    /// Its registration is another one now; the process itself was not touched.
    pub(super) fn rules(&mut self, rules: Rules) {
        self.rules = rules;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RULES: Rules = Rules {
        respawn: true,
        retries: 3,
        interval_ms: 100,
        settled_ms: 1_000,
    };

    fn up() -> Machine {
        let mut machine = Machine::new(RULES, true, false);
        assert!(machine.observe(0, true).is_empty());
        machine
    }

    #[test]
    fn started_again_after_the_interval_and_given_up_after_the_retries() {
        // contract: procmgr-agent-lifecycle#22
        let mut machine = up();
        let mut now = 10;
        for _ in 0..RULES.retries {
            assert!(machine.observe(now, false).is_empty());
            assert_eq!(machine.due(), Some(now + 100));
            assert!(machine.tick(now + 99).is_empty());
            assert_eq!(machine.tick(now + 100), [Action::Start]);
            assert!(machine.tick(now + 100_000).is_empty(), "one start at a time");
            assert_eq!(machine.started(now + 150, true), [Action::Tell(Told::Restarted)]);
            now += 200;
        }
        assert_eq!(
            machine.observe(now, false),
            [Action::Unhost, Action::Tell(Told::GivenUp)]
        );
        assert!(!machine.hosted());
        assert!(machine.tick(now + 10_000).is_empty());
    }

    #[test]
    fn a_long_run_ends_the_row() {
        let mut machine = up();
        for n in 0..10u64 {
            let now = (n + 1) * 2_000;
            assert!(machine.observe(now, false).is_empty());
            assert_eq!(machine.tick(now + 100), [Action::Start]);
            machine.started(now + 100, true);
        }
        assert!(machine.hosted());
    }

    #[test]
    fn what_was_stopped_or_registered_in_that_state_is_left_alone() {
        // contract: procmgr-agent-lifecycle#20
        let mut machine = up();
        assert!(machine.operation_begins());
        assert!(machine.observe(5, false).is_empty(), "the operation has it");
        machine.operation_ended(6, false, false, true);
        assert!(machine.operation_begins());
        machine.operation_ended(7, false, true, true);
        for now in [8, 1_000, 100_000] {
            assert!(machine.observe(now, false).is_empty());
            assert!(machine.tick(now).is_empty());
        }
        machine.observe(100_001, true);
        machine.observe(100_002, false);
        assert_eq!(machine.tick(100_102), [Action::Start]);
    }

    #[test]
    fn a_single_execution_is_never_started_again() {
        // contract: procmgr-agent-lifecycle#22
        let mut machine = Machine::new(
            Rules {
                respawn: false,
                ..RULES
            },
            true,
            false,
        );
        machine.observe(0, true);
        assert!(machine.observe(1, false).is_empty());
        assert!(machine.tick(1_000_000).is_empty() && machine.hosted());
    }

    #[test]
    fn what_ended_while_no_agent_was_there_is_started_again() {
        let mut machine = Machine::new(RULES, true, true);
        assert!(machine.observe(50, false).is_empty());
        assert_eq!(machine.tick(150), [Action::Start]);
    }

    #[test]
    fn killed_once_for_its_limit() {
        // contract: procmgr-agent-lifecycle#37
        let mut machine = up();
        assert_eq!(machine.over_limit(), [Action::Tell(Told::OverLimit), Action::Kill]);
        assert!(machine.over_limit().is_empty());
        machine.observe(10, false);
        assert_eq!(machine.tick(110), [Action::Start]);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Wait(u64),
        Look(bool),
        Tick,
        Started(bool),
        OverLimit,
        Begin,
        End {
            alive: bool,
            hosted: bool,
            leave_alone: bool,
        },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let one = prop_oneof![
            (0u64..400).prop_map(Step::Wait),
            any::<bool>().prop_map(Step::Look),
            Just(Step::Tick),
            any::<bool>().prop_map(Step::Started),
            Just(Step::OverLimit),
            Just(Step::Begin),
            any::<(bool, bool, bool)>().prop_map(|(alive, hosted, leave_alone)| Step::End {
                alive,
                hosted,
                leave_alone
            }),
        ];
        proptest::collection::vec(one, 1..200)
    }

    proptest! {
        #[test]
        fn whatever_happens(steps in steps(), retries in 0u32..4, respawn: bool, hosted: bool, seen: bool) {
            let rules = Rules { respawn, retries, ..RULES };
            let mut machine = Machine::new(rules, hosted, seen);
            let (mut now, mut starting, mut operation) = (0u64, false, false);
            // Starts since a long run or an operation that left it running; whether it may be started at all.
            let (mut row, mut up_since) = (0u32, None::<u64>);
            let mut may = seen;
            for step in steps {
                let actions = match step {
                    Step::Wait(ms) => { now += ms; Vec::new() }
                    Step::Look(alive) => {
                        if !starting && !operation {
                            if alive {
                                may = true;
                                up_since.get_or_insert(now);
                            } else if let Some(since) = up_since.take() && now - since >= rules.settled_ms {
                                row = 0;
                            }
                        }
                        machine.observe(now, alive)
                    }
                    Step::Tick => machine.tick(now),
                    Step::Started(alive) => {
                        let was = std::mem::take(&mut starting);
                        let actions = machine.started(now, alive);
                        let told = actions.iter().filter(|a| matches!(a, Action::Tell(Told::Restarted | Told::RestartFailed))).count();
                        prop_assert_eq!(told, usize::from(was), "one event for each start");
                        if was { up_since = alive.then_some(now); }
                        actions
                    }
                    Step::OverLimit => machine.over_limit(),
                    Step::Begin => {
                        let begun = machine.operation_begins();
                        prop_assert_eq!(begun, !starting && !operation);
                        operation |= begun;
                        Vec::new()
                    }
                    Step::End { alive, hosted, leave_alone } => {
                        if !std::mem::take(&mut operation) { continue; }
                        if alive { row = 0; may = true; up_since = Some(now); } else { up_since = None; may &= !leave_alone; }
                        machine.operation_ended(now, alive, hosted, leave_alone)
                    }
                };
                for action in actions {
                    match action {
                        Action::Start => {
                            prop_assert!(!starting, "two starts at once");
                            prop_assert!(!operation, "a start in the middle of an operation");
                            prop_assert!(machine.hosted() && respawn, "a start of what is not hosted");
                            prop_assert!(may, "a start of what was stopped");
                            row += 1;
                            prop_assert!(row <= retries, "{} starts in a row", row);
                            starting = true;
                        }
                        Action::Unhost => { prop_assert!(!machine.hosted()); row = 0; may = false; }
                        Action::Tell(Told::GivenUp) => prop_assert!(!machine.hosted()),
                        Action::Kill | Action::Tell(_) => {}
                    }
                }
            }
        }
    }
}
