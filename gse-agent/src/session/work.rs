//! What a session needs from the part of the agent that does the work. The executor is one; tests put another in its place.

use bytes::Bytes;
use gse_proto::proc::{ProcReport, ProcReported};
use gse_proto::session::{Call, CallFailure, CallReply, Dispatch, PluginMessage, Stored, TargetRef};
use tokio::sync::mpsc;

pub use crate::exec::{Link, Report};

/// The executor as a session sees it. One session at a time is attached; attaching again takes the place of the one before, whose
/// receiver then ends.
pub trait Work: Send + Sync + 'static {
    /// Identifies the journal.
    fn epoch(&self) -> Bytes;
    /// Everything queued, running or not yet acknowledged.
    fn held(&self) -> Vec<TargetRef>;
    /// How many atomic tasks run and how many wait.
    fn counts(&self) -> (u32, u32);
    /// Takes an order; what can't be done becomes a row.
    fn dispatch(&self, order: Dispatch) -> impl Future<Output = ()> + Send;
    /// Ends a target's atomic tasks.
    fn terminate(&self, target: TargetRef) -> impl Future<Output = ()> + Send;
    /// The server has stored something.
    fn stored(&self, stored: Stored);
    /// Answers what another service asks. It may be asked twice, and an answer that is not waited for any more is dropped half-way.
    fn call(&self, call: Call) -> impl Future<Output = CallReply> + Send {
        std::future::ready(refused(call.call_id, CallFailure::Unsupported))
    }
    /// The next thing that a plugin of this host says to the servers. Dropped half-way, it takes nothing.
    fn said(&self) -> impl Future<Output = PluginMessage> + Send {
        std::future::pending()
    }
    /// The next report about processes of this host. Dropped half-way, it loses nothing.
    fn process_report(&self) -> impl Future<Output = ProcReport> + Send {
        std::future::pending()
    }
    /// The store has a report about processes.
    fn processes_stored(&self, _stored: ProcReported) {}
    /// Begins to report over a new session, starting with everything that was not acknowledged.
    fn attach(&self, link: Link) -> mpsc::Receiver<Report>;
}

/// The answer to a call that was not carried out.
#[must_use]
pub fn refused(call_id: u64, failure: CallFailure) -> CallReply {
    CallReply {
        call_id,
        failure: failure.into(),
        payload: Bytes::new(),
    }
}
