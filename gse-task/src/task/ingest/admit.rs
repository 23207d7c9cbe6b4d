//! Whether what an agent says about a target is taken: of tasks of this node, and of others.

use std::sync::Arc;

use gse_core::store::StoreError;
use gse_proto::session as s;

use super::State;
use super::work::Owner;
use crate::session::outbox::CloseReason;
use crate::session::registry::Session;
use crate::task::cell::Standing;
use crate::task::store::RowPlace;

/// What becomes of something that an agent reports.
pub(super) enum Admission {
    /// The row is open, as far as this node knows.
    Open(Owner),
    /// The row is closed; the task is under way.
    Late,
    /// The task is over: the agent may forget it.
    Gone,
    /// Nothing can be said now; the agent sends it again.
    TryLater,
}

impl State {
    /// Whether what an agent says about a target is to be taken.
    pub(super) async fn admit(&self, session: &Session, target: &s::TargetRef, place: RowPlace) -> Admission {
        if let Some(run) = self.node.tasks.run(&target.task_id) {
            return match run.standing(place, &session.agent) {
                Standing::Open => Admission::Open(Owner {
                    task: Arc::clone(&run.task),
                    header: Arc::clone(&run.header),
                    run: Some(run),
                }),
                Standing::Closed => Admission::Late,
                Standing::Unresolved => Admission::TryLater,
                Standing::Stranger => {
                    session.outbox.close(CloseReason::Protocol(format!(
                        "results of task {} for a target that is not this agent",
                        target.task_id
                    )));
                    Admission::TryLater
                }
            };
        }
        if !self.node.tasks.recovered() {
            return Admission::TryLater;
        }
        match self.admit_foreign(session, target, place).await {
            Ok(admission) => admission,
            Err(error) => {
                self.report(&error);
                Admission::TryLater
            }
        }
    }

    /// The same for a task that is not under way here: it was closed, it has expired, or another node owns it. That node is told of what
    /// is stored; a row that it has closed meanwhile stays as it is.
    async fn admit_foreign(
        &self,
        session: &Session,
        target: &s::TargetRef,
        place: RowPlace,
    ) -> Result<Admission, StoreError> {
        let store = &self.node.task_store;
        let Some(header) = store.header(&target.task_id).await? else {
            return Ok(Admission::Gone);
        };
        let Some(bucket) = store.bucket(&target.task_id, target.bucket).await? else {
            return Ok(Admission::Gone);
        };
        let asked = bucket.agent_id(target.index);
        let is_its = asked.is_some_and(|asked| {
            asked == session.agent.as_str() || session.aliases.iter().any(|alias| **alias == *asked)
        });
        if !is_its || place.atomic as usize >= header.atomics.len() {
            session.outbox.close(CloseReason::Protocol(format!(
                "results of task {} for a target that is not this agent",
                target.task_id
            )));
            return Ok(Admission::TryLater);
        }
        Ok(Admission::Open(Owner {
            task: header.task_id.as_str().into(),
            header,
            run: None,
        }))
    }
}
