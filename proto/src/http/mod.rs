//! The platforms' HTTP API: which call a path means ([`Route`]), the bodies of the calls, and the envelope around every answer.
//!
//! Only shapes live here. Reading sockets, authentication and limits are gse-core's; what a call does is each server's.

mod agent;
mod envelope;
mod file;
mod hostid;
mod message;
mod operator;
mod route;
mod script;

pub use agent::{AgentIdList, AgentInfo, AgentState, HostQuery, HostRef, V1AgentInfo, V1AgentStatus};
pub use envelope::{Envelope, envelope};
pub use file::{
    FileSource, FileTarget, PushFile, PushTask, TransferContent, TransferFile, TransferResultQuery, TransferRow,
    TransferSummary, TransferTask, XferListReply, XferListRequest,
};
pub use hostid::{
    HostIdContent, HostIdFailure, HostIdOne, HostIdPush, HostIdPushed, HostIdPut, HostIdShow, HostIdTaken, HostIdView,
};
pub use message::{AgentFailure, AgentMessage, DispatchMessage, DispatchMultiMessage, DispatchReply, PluginSaid};
pub use operator::{
    AgentDetail, AgentListReply, AgentListRequest, DataTailRequest, StateCount, TailLine, TailRecord,
    TaskDescribeReply, TaskDescribeRequest, TaskTarget, WatchReport,
};
pub use route::{Owner, Route, Shape, normalise};
pub use script::{
    AgentEndpoint, AgentTaskQuery, AtomicQuery, AtomicTaskSpec, ExecuteScript, Relation, RowsReply, ScriptFile,
    ScriptResultQuery, ScriptRow, TaskIdReply, TaskIdResult, TaskStateQuery, TaskStateReply, TaskStateResult,
    TerminateTask,
};

use serde::{Deserialize, Deserializer};

/// For optional fields that some clients send as `null`: absent, `null` and the default are the same.
pub(crate) fn null_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}
