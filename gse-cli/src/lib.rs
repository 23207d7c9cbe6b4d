//! The operator's command, `gse`: starts a control plane on one machine ([`up`]), makes certificates ([`certs`]), and asks the
//! servers over their HTTP API like any platform would ([`agents`], [`run`], [`task`], [`xfer`], [`proc`],
//! [`route`], [`data`], [`hostid`]), asks gse_dba in its own protocol ([`dba`]), and reads the audit trail ([`audit`]).
//!
//! It holds no rule of the control plane itself: what it shows is what the servers answer.

pub mod agents;
pub mod args;
pub mod audit;
mod audit_filter;
pub mod certs;
pub mod client;
pub mod data;
pub mod dba;
pub mod duration;
pub mod fold;
pub mod hostid;
pub mod ids;
pub mod out;
pub mod outcome;
pub mod proc;
pub mod route;
pub mod run;
pub mod tail;
pub mod targets;
pub mod task;
pub mod text;
pub mod up;
pub mod when;
pub mod xfer;
