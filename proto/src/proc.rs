//! Processes of hosts: messages between `gse_procmgr` and agents, generated from `proc.proto`, and what both sides must understand alike:
//! the numbers of operations and of their results, the defaults of a policy, and whether two specs mean the same.

use prost::Message;
use sha2::{Digest, Sha256};

#[allow(missing_docs, clippy::all, clippy::pedantic)]
mod wire {
    include!(concat!(env!("OUT_DIR"), "/gse.proc.v1.rs"));
}
pub use wire::*;

/// The service of calls about processes.
pub const SERVICE: &str = "proc";
/// Length of an operation's id, bytes.
pub const OP_ID: usize = 16;
/// Most operations in one call to one agent.
pub const MAX_OPERATIONS: usize = 2_000;
/// Most registrations in one call or answer.
pub const MAX_REGISTRATIONS: usize = 2_000;
/// Longest name of a namespace or of a process, bytes: any UTF-8 (GSEKIT names come from other tables).
pub const MAX_NAME: usize = 512;
/// Longest text in a spec, bytes.
pub const MAX_TEXT: usize = 8 << 10;
/// Most labels of a process, and most bytes of one.
pub const MAX_LABELS: usize = 64;
/// Most processes in one report.
pub const MAX_REPORTED: usize = 500;

/// What the contract calls op_type (1.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum OpType {
    /// Start it, and host it.
    Start = 0,
    /// Stop it, and host it no longer.
    Stop = 1,
    /// Look, change nothing.
    Status = 2,
    /// Host it; neither started nor stopped.
    Register = 3,
    /// Host it no longer; it goes on.
    Unregister = 4,
    /// Run `restart_cmd`.
    Restart = 7,
    /// Run `reload_cmd`.
    Reload = 8,
    /// Run `kill_cmd`, and host it no longer.
    Kill = 9,
}

impl OpType {
    /// The operation of this number, if there is one.
    #[must_use]
    pub fn from_number(number: i32) -> Option<Self> {
        [
            Self::Start,
            Self::Stop,
            Self::Status,
            Self::Register,
            Self::Unregister,
            Self::Restart,
            Self::Reload,
            Self::Kill,
        ]
        .into_iter()
        .find(|op| *op as i32 == number)
    }
}

/// Codes of entries (1.5).
pub mod code {
    /// Done.
    pub const OK: i32 = 0;
    /// Not finished.
    pub const RUNNING: i32 = 115;
    /// The agent is not there or not known.
    pub const NO_AGENT: i32 = 117;
    /// Started while it runs.
    pub const ALREADY_RUNNING: i32 = 828;
    /// Stopped or killed while it does not run.
    pub const NOT_RUNNING: i32 = 829;
    /// No such operation.
    pub const ILLEGAL_OP: i32 = 832;
    /// Not as it should be after the operation: not running after a start; still running, and the text begins with `stop`, after a stop.
    pub const CHECK_FAILED: i32 = 836;
    /// Registered already (the old register call only).
    pub const ALREADY_REGISTERED: i32 = 850;
    /// The control command failed; the text is its output. Everything else that keeps an operation from being carried out, too.
    pub const COMMAND_FAILED: i32 = 65_535;
}

/// `auto_type`: started again when it ends.
pub const AUTO_RESIDENT: u32 = 1;
/// `auto_type`: runs once, never started again.
pub const AUTO_SINGLE: u32 = 2;

/// The numbers of a policy with the defaults in their places (1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// 0 periodic, 1 resident, 2 single execution.
    pub auto_type: u32,
    /// Seconds from the end of a start command to the check.
    pub start_check_secs: u32,
    /// Seconds from the end of a stop command to the check at the latest.
    pub stop_check_secs: u32,
    /// Starts in a row before hosting is given up.
    pub start_retries: u32,
    /// Seconds between two of them.
    pub start_interval: u32,
    /// Seconds that a control command may take.
    pub op_timeout: u32,
}

impl Policy {
    /// Those of `spec`.
    #[must_use]
    pub fn of(spec: &Spec) -> Self {
        // contract: procmgr-agent-lifecycle#35
        let start_check_secs = spec.start_check_secs.unwrap_or(5);
        Self {
            auto_type: spec.auto_type.unwrap_or(AUTO_RESIDENT),
            start_check_secs,
            stop_check_secs: spec.stop_check_secs.unwrap_or(start_check_secs),
            start_retries: spec.start_retries.unwrap_or(4),
            start_interval: spec.start_interval.unwrap_or(10),
            op_timeout: spec.op_timeout.filter(|secs| *secs > 0).unwrap_or(60),
        }
    }
}

/// Whether two specs mean the same: equal for equal ones, defaults put in.
#[must_use]
pub fn spec_digest(spec: &Spec) -> u64 {
    let policy = Policy::of(spec);
    let spec = Spec {
        auto_type: Some(policy.auto_type),
        start_check_secs: Some(policy.start_check_secs),
        stop_check_secs: Some(policy.stop_check_secs),
        start_retries: Some(policy.start_retries),
        start_interval: Some(policy.start_interval),
        op_timeout: Some(policy.op_timeout),
        ..spec.clone()
    };
    let sum = Sha256::digest(spec.encode_to_vec());
    sum.iter().take(8).fold(0, |all, byte| (all << 8) | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_the_contracts() {
        // contract: procmgr-agent-lifecycle#35
        let policy = Policy::of(&Spec::default());
        assert_eq!((policy.start_check_secs, policy.op_timeout), (5, 60));
        assert_eq!((policy.start_retries, policy.start_interval), (4, 10));
        assert_eq!(policy.auto_type, AUTO_RESIDENT);
    }

    #[test]
    fn what_means_the_same_has_one_digest() {
        let said = Spec {
            start_retries: Some(4),
            op_timeout: Some(60),
            ..Spec::default()
        };
        assert_eq!(spec_digest(&said), spec_digest(&Spec::default()));
        let other = Spec {
            proc_name: "x".to_owned(),
            ..Spec::default()
        };
        assert_ne!(spec_digest(&other), spec_digest(&Spec::default()));
    }

    #[test]
    fn numbers_of_operations() {
        // contract: procmgr-agent-lifecycle#7
        let known: Vec<i32> = (-3..300).filter(|n| OpType::from_number(*n).is_some()).collect();
        assert_eq!(known, [0, 1, 2, 3, 4, 7, 8, 9]);
    }
}
