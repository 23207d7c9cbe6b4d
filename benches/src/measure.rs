//! Readings of all processes of a run at one moment, and what lies between two of them.

use anyhow::Result;
use serde::Serialize;

use crate::proc::{self, Usage};
use crate::site::Site;
use crate::swarm::Progress;
use crate::swarm_child::SwarmChild;

/// All processes at one moment.
#[derive(Debug, Clone)]
pub(crate) struct Reading {
    /// Name and figures; gse_task, the store, gse_api, the swarm, this program.
    pub(crate) processes: Vec<(&'static str, Usage)>,
    pub(crate) swarm: Progress,
    pub(crate) store_bytes: u64,
    pub(crate) audit_bytes: u64,
    pub(crate) log_bytes: u64,
}

impl Reading {
    pub(crate) async fn take(site: &Site, swarm: &mut SwarmChild) -> Result<Self> {
        let progress = swarm.settled().await;
        let (audit_bytes, log_bytes) = site.trail_bytes()?;
        Ok(Self {
            processes: vec![
                (site.task.name, site.task.usage()?),
                (site.store.name, site.store.usage()?),
                (site.api.name, site.api.usage()?),
                ("swarm", proc::usage(swarm.pid()?)?),
                ("this client", proc::usage(std::process::id())?),
            ],
            swarm: progress,
            store_bytes: site.store_bytes()?,
            audit_bytes,
            log_bytes,
        })
    }
}

/// CPU and bytes of one agent-task.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Costs {
    pub(crate) agent_tasks: u64,
    /// Microseconds of CPU (user and system) per agent-task, by process.
    pub(crate) cpu_us: Vec<(&'static str, f64)>,
    /// TCP payload on the agents' connections per agent-task, TLS included: to the agent, from the agent.
    pub(crate) wire_down: f64,
    pub(crate) wire_up: f64,
    /// Growth of the store's files per agent-task (not meaningful when it compacted meanwhile).
    pub(crate) store_bytes: f64,
    /// Growth of gse_task's audit trail and of its log.
    pub(crate) audit_bytes: f64,
    pub(crate) log_bytes: f64,
    /// HTTP bodies between the client and gse_api.
    pub(crate) http_bytes: f64,
}

/// What `agent_tasks` have cost.
pub(crate) fn costs(before: &Reading, after: &Reading, agent_tasks: u64, http_bytes: u64) -> Costs {
    let each = |from: u64, to: u64| (to as f64 - from as f64) / agent_tasks.max(1) as f64;
    Costs {
        agent_tasks,
        cpu_us: before
            .processes
            .iter()
            .zip(&after.processes)
            .map(|((name, from), (_, to))| (*name, each(from.cpu_us, to.cpu_us)))
            .collect(),
        wire_down: each(before.swarm.wire_read, after.swarm.wire_read),
        wire_up: each(before.swarm.wire_written, after.swarm.wire_written),
        store_bytes: each(before.store_bytes, after.store_bytes),
        audit_bytes: each(before.audit_bytes, after.audit_bytes),
        log_bytes: each(before.log_bytes, after.log_bytes),
        http_bytes: http_bytes as f64 / agent_tasks.max(1) as f64,
    }
}

/// KiB for each of `agents` between two readings of memory.
pub(crate) fn kib_per_agent(from_kib: u64, to_kib: u64, agents: u32) -> f64 {
    (to_kib as f64 - from_kib as f64) / f64::from(agents.max(1))
}
