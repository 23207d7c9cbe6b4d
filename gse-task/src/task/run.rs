//! What is known of each target while a task is under way, as plain types without clock or socket.
//!
//! The rule that everything here serves: a target is started at most once. A dispatch is repeated only when it is certain that the
//! agent's journal has never seen it; where that can't be known the row says so and nothing is sent.

use std::sync::Arc;

use bytes::Bytes;
use gse_proto::ids::AgentId;
use gse_proto::state::{TargetBucket, TaskHeader};

/// How far a target has got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Nothing was sent.
    Waiting,
    /// Sent to an agent whose journal had this epoch, on this session; nothing heard yet.
    Sent(Bytes, u64),
    /// Another incarnation of this node, or another node, may have sent it.
    MaybeSent,
    /// As before, and its agent was asked on this session; it has not answered yet.
    Asked(u64),
    /// The agent has reported it, so it is in its journal of this epoch.
    Held(Bytes),
}

/// One target of a task under way.
#[derive(Debug, Clone)]
pub struct Target {
    /// Which agent it is; unknown until resolved.
    pub agent: Option<AgentId>,
    /// How far it has got.
    pub phase: Phase,
    /// Terminal rows, one bit an atomic task.
    pub done: u64,
    /// Its end was asked for.
    pub stop: bool,
}

impl Default for Target {
    fn default() -> Self {
        Self {
            agent: None,
            phase: Phase::Waiting,
            done: 0,
            stop: false,
        }
    }
}

/// What to do about a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Send it; nothing of it has ever been started.
    Dispatch,
    /// Tell the agent to end it.
    Terminate,
    /// Close its rows as ended on request: it was never started and never will be.
    CloseStopped,
    /// Close its rows: it was not started in time and never will be.
    CloseLate,
    /// Close its rows: it can't be known whether it ran.
    CloseUnknown,
    /// Ask the agent: if it has it, it reports it again; if not, its answer closes the rows. It starts nothing.
    Ask,
    /// Nothing.
    Leave,
}

/// Whether an agent's journal holds a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Has {
    /// It does.
    Yes,
    /// It does not.
    No,
    /// The agent has not been asked since it connected.
    Unsaid,
}

/// What is known of an agent with regard to one target.
#[derive(Debug, Clone, Copy)]
pub struct AgentView<'a> {
    /// The session it speaks on.
    pub session: u64,
    /// Epoch of its journal.
    pub epoch: &'a Bytes,
    /// Since when (unix ms, server clock) its journal is known to have this epoch; `None`: not known.
    pub epoch_since_ms: Option<u64>,
    /// Whether its journal holds the target.
    pub has: Has,
}

impl Target {
    /// Decides what to do when the agent of a target is there (again). Sets the phase of what is decided.
    ///
    /// An agent never starts a target that its journal has, or had until the start window was over. So what may have been sent may be
    /// sent again while nothing is known of the journal's content, as long as it is the same journal.
    pub fn on_agent(&mut self, view: AgentView<'_>, created_ms: u64, not_after_ms: u64, now_ms: u64) -> Decision {
        if view.has == Has::Yes {
            self.phase = Phase::Held(view.epoch.clone());
            return if self.stop {
                Decision::Terminate
            } else {
                Decision::Leave
            };
        }
        let never_started = match &self.phase {
            Phase::Waiting => true,
            // On its way already; a termination may have been lost on its way there.
            Phase::Sent(_, session) if *session == view.session => {
                return if self.stop && view.has == Has::Unsaid {
                    Decision::Terminate
                } else {
                    Decision::Leave
                };
            }
            Phase::Asked(session) if *session == view.session => return Decision::Leave,
            // The same journal does not have it: what was sent never arrived.
            Phase::Sent(epoch, _) => epoch == view.epoch,
            // The journal is older than the task and does not have it.
            Phase::MaybeSent | Phase::Asked(_) => view.epoch_since_ms.is_some_and(|since| since <= created_ms),
            Phase::Held(_) if view.has == Has::Unsaid => {
                return if self.stop {
                    Decision::Terminate
                } else {
                    Decision::Leave
                };
            }
            // It had it, and has lost it.
            Phase::Held(_) => false,
        };
        if view.has == Has::Unsaid && self.phase != Phase::Waiting {
            if never_started && !self.stop {
                self.phase = Phase::Sent(view.epoch.clone(), view.session);
                return Decision::Dispatch;
            }
            self.phase = Phase::Asked(view.session);
            return Decision::Ask;
        }
        if !never_started {
            return Decision::CloseUnknown;
        }
        if self.stop {
            return Decision::CloseStopped;
        }
        if now_ms > not_after_ms {
            return Decision::CloseLate;
        }
        self.phase = Phase::Sent(view.epoch.clone(), view.session);
        Decision::Dispatch
    }

    /// Nothing has been heard of it for long: what was sent may have been lost on its way, and is sent again the next time its agent is
    /// looked at. An agent that has it reports it again.
    pub fn send_again(&mut self) {
        if let Phase::Sent(_, session) = &mut self.phase {
            *session = u64::MAX;
        }
    }

    /// Decides what to do when its end is asked for; `here`: its agent is connected.
    pub fn on_terminate(&mut self, here: bool) -> Decision {
        self.stop = true;
        match self.phase {
            Phase::Waiting => Decision::CloseStopped,
            _ if here => Decision::Terminate,
            _ => Decision::Leave,
        }
    }
}

/// A task under way.
#[derive(Debug)]
pub struct Run {
    /// What was submitted.
    pub header: Arc<TaskHeader>,
    /// To whom.
    pub buckets: Vec<Arc<TargetBucket>>,
    /// Same indexes as `buckets`.
    pub targets: Vec<Vec<Target>>,
    /// Rows that are not terminal.
    pub open_rows: usize,
}

impl Run {
    /// A task of which nothing has happened.
    #[must_use]
    pub fn new(header: Arc<TaskHeader>, buckets: Vec<Arc<TargetBucket>>) -> Self {
        let targets: Vec<Vec<Target>> = buckets
            .iter()
            .map(|bucket| vec![Target::default(); bucket.targets.len()])
            .collect();
        let open_rows = targets.iter().map(Vec::len).sum::<usize>() * header.atomics.len();
        Self {
            header,
            buckets,
            targets,
            open_rows,
        }
    }

    /// The target at a place, if there is one.
    pub fn target(&mut self, bucket: u32, index: u32) -> Option<&mut Target> {
        self.targets.get_mut(bucket as usize)?.get_mut(index as usize)
    }

    /// All bits of a finished target.
    #[must_use]
    pub fn all_done(&self) -> u64 {
        match self.header.atomics.len() {
            64.. => u64::MAX,
            n => (1 << n) - 1,
        }
    }

    /// Notes a terminal row. True when it was the target's last one.
    pub fn mark(&mut self, bucket: u32, index: u32, atomic: u32) -> bool {
        let all = self.all_done();
        let Some(target) = self
            .targets
            .get_mut(bucket as usize)
            .and_then(|t| t.get_mut(index as usize))
        else {
            return false;
        };
        let bit = 1_u64.checked_shl(atomic).unwrap_or(0) & all;
        if bit == 0 || target.done & bit != 0 {
            return false;
        }
        target.done |= bit;
        self.open_rows -= 1;
        target.done == all
    }

    /// Positions of the atomic tasks of a target that have no terminal row.
    #[must_use]
    pub fn open_atomics(&self, bucket: u32, index: u32) -> Vec<u32> {
        let done = self
            .targets
            .get(bucket as usize)
            .and_then(|targets| targets.get(index as usize))
            .map_or(u64::MAX, |target| target.done);
        (0..u32::try_from(self.header.atomics.len()).unwrap_or(64))
            .filter(|n| done & (1 << n) == 0)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::state::{StoredAtomic, StoredTarget};
    use proptest::prelude::*;

    fn view(epoch: &Bytes, since: Option<u64>, held: bool) -> AgentView<'_> {
        let has = if held { Has::Yes } else { Has::No };
        static SESSION: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        AgentView {
            session: SESSION.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            epoch,
            epoch_since_ms: since,
            has,
        }
    }

    #[test]
    fn a_target_is_sent_again_only_when_it_cannot_have_run() {
        let (a, b) = (Bytes::from_static(b"a"), Bytes::from_static(b"b"));
        let mut target = Target::default();
        assert_eq!(
            target.on_agent(view(&a, Some(0), false), 10, 100, 20),
            Decision::Dispatch
        );
        // The connection broke; the agent is back with the same journal and does not have it.
        assert_eq!(
            target.on_agent(view(&a, Some(0), false), 10, 100, 30),
            Decision::Dispatch
        );
        // Back with another journal: nobody knows.
        assert_eq!(
            target.clone().on_agent(view(&b, Some(0), false), 10, 100, 40),
            Decision::CloseUnknown
        );
        // It has it: never again, whatever happens.
        assert_eq!(target.on_agent(view(&a, Some(0), true), 10, 100, 40), Decision::Leave);
        assert_eq!(
            target.on_agent(view(&a, Some(0), false), 10, 100, 50),
            Decision::CloseUnknown
        );
    }

    #[test]
    fn after_a_restart_only_an_old_journal_proves_that_nothing_ran() {
        let a = Bytes::from_static(b"a");
        for (since, expect) in [
            (Some(5), Decision::Dispatch),
            (Some(11), Decision::CloseUnknown),
            (None, Decision::CloseUnknown),
        ] {
            let mut target = Target {
                phase: Phase::MaybeSent,
                ..Default::default()
            };
            assert_eq!(target.on_agent(view(&a, since, false), 10, 100, 20), expect);
        }
    }

    #[test]
    fn nothing_is_sent_twice_on_one_session() {
        let a = Bytes::from_static(b"a");
        let mut target = Target::default();
        let same = view(&a, None, false);
        assert_eq!(target.on_agent(same, 10, 100, 20), Decision::Dispatch);
        assert_eq!(target.on_agent(same, 10, 100, 20), Decision::Leave);
    }

    #[test]
    fn late_and_stopped_targets_are_closed() {
        let a = Bytes::from_static(b"a");
        let mut late = Target::default();
        assert_eq!(late.on_agent(view(&a, None, false), 10, 100, 101), Decision::CloseLate);
        let mut stopped = Target::default();
        assert_eq!(stopped.on_terminate(false), Decision::CloseStopped);
        let mut sent = Target {
            phase: Phase::Sent(a.clone(), u64::MAX),
            ..Default::default()
        };
        assert_eq!(sent.on_terminate(false), Decision::Leave);
        assert_eq!(
            sent.clone().on_agent(view(&a, None, false), 10, 100, 20),
            Decision::CloseStopped
        );
        assert_eq!(sent.on_agent(view(&a, None, true), 10, 100, 20), Decision::Terminate);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Connect,
        FoundConnected,
        Deliver,
        LoseJournal,
        NodeRestart,
        Terminate,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Connect),
            Just(Step::FoundConnected),
            Just(Step::Deliver),
            Just(Step::LoseJournal),
            Just(Step::NodeRestart),
            Just(Step::Terminate)
        ]
    }

    proptest! {
        /// Whatever is lost and restarted in whatever order, the host starts the target at most once.
        #[test]
        fn at_most_once(steps in proptest::collection::vec(step(), 0..60)) {
            let mut target = Target::default();
            let (mut epoch, mut since, mut clock) = (0_u64, 0_u64, 10_u64);
            let created = 10;
            let mut journal_has = false;
            let mut in_flight = None;
            let mut starts = 0;
            let mut closed = false;
            for step in steps {
                clock += 1;
                match step {
                    Step::Connect if !closed => {
                        // A new session: what was in flight on the old one is lost.
                        in_flight = None;
                        let bytes = Bytes::from(epoch.to_be_bytes().to_vec());
                        match target.on_agent(view(&bytes, Some(since), journal_has), created, u64::MAX, clock) {
                            Decision::Dispatch => in_flight = Some(epoch),
                            Decision::CloseUnknown | Decision::CloseStopped | Decision::CloseLate => closed = true,
                            Decision::Terminate | Decision::Leave | Decision::Ask => {}
                        }
                    }
                    // Another node holds the session; what the journal has is not known here. What was sent before may still arrive.
                    Step::FoundConnected if !closed => {
                        let bytes = Bytes::from(epoch.to_be_bytes().to_vec());
                        let unsaid = AgentView { has: Has::Unsaid, ..view(&bytes, Some(since), false) };
                        match target.on_agent(unsaid, created, u64::MAX, clock) {
                            Decision::Dispatch => in_flight = Some(epoch),
                            Decision::CloseUnknown | Decision::CloseStopped | Decision::CloseLate => closed = true,
                            Decision::Terminate | Decision::Leave | Decision::Ask => {}
                        }
                    }
                    Step::Deliver => {
                        if let Some(for_epoch) = in_flight.take() {
                            // What the agent does: refuses a foreign epoch and what its journal knows.
                            if for_epoch == epoch && !journal_has {
                                journal_has = true;
                                starts += 1;
                            }
                        }
                    }
                    Step::LoseJournal => {
                        epoch += 1;
                        since = clock;
                        journal_has = false;
                        in_flight = None;
                    }
                    Step::NodeRestart => {
                        in_flight = None;
                        target.phase = Phase::MaybeSent;
                    }
                    Step::Terminate if !closed => {
                        if target.on_terminate(false) == Decision::CloseStopped {
                            closed = true;
                        }
                    }
                    Step::Connect | Step::FoundConnected | Step::Terminate => {}
                }
            }
            prop_assert!(starts <= 1, "started {} times", starts);
        }
    }

    #[test]
    fn rows_are_counted_once() {
        let header = TaskHeader {
            atomics: vec![StoredAtomic::default(); 2],
            ..Default::default()
        };
        let bucket = TargetBucket {
            targets: vec![StoredTarget::default(); 2],
        };
        let mut run = Run::new(Arc::new(header), vec![Arc::new(bucket)]);
        assert_eq!(run.open_rows, 4);
        assert!(!run.mark(0, 0, 0));
        assert!(!run.mark(0, 0, 0), "a repeated row changes nothing");
        assert_eq!(run.open_atomics(0, 0), [1]);
        assert!(run.mark(0, 0, 1));
        assert!(
            !run.mark(9, 0, 0) && !run.mark(0, 9, 0) && !run.mark(0, 1, 63) && !run.mark(0, 1, 200),
            "places that do not exist change nothing"
        );
        assert_eq!(run.open_rows, 2);
    }
}
