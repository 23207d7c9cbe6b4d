//! Readings of all processes of a run at one moment, and what lies between two of them.

use anyhow::Result;
use serde::Serialize;

use crate::proc::{self, Usage};
use crate::report::{Section, one};
use crate::site::Site;
use crate::swarm::Progress;
use crate::swarm_child::SwarmChild;

/// One process at one moment.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Process {
    pub(crate) name: String,
    #[serde(flatten)]
    pub(crate) usage: Usage,
}

/// All processes at one moment: nodes of gse_task, the store, gse_api, the swarms, this program.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Snapshot {
    pub(crate) when: String,
    pub(crate) processes: Vec<Process>,
}

impl Snapshot {
    pub(crate) fn take(when: &str, site: &Site, swarms: &[(&str, &SwarmChild)]) -> Result<Self> {
        let mut processes = vec![];
        let mut add = |name: &str, usage| {
            let name = name.to_owned();
            processes.push(Process { name, usage });
        };
        for server in site.servers() {
            add(&server.name, server.usage()?);
        }
        for (name, swarm) in swarms {
            add(name, proc::usage(swarm.pid()?)?);
        }
        add("this client", proc::usage(std::process::id())?);
        Ok(Self {
            when: when.to_owned(),
            processes,
        })
    }

    fn of(&self, name: &str) -> Option<Usage> {
        let process = self.processes.iter().find(|process| process.name == name);
        process.map(|process| process.usage)
    }

    /// Of all nodes of gse_task together.
    pub(crate) fn task(&self) -> Usage {
        let those = self
            .processes
            .iter()
            .filter(|process| process.name.starts_with("gse_task"));
        those.map(|process| process.usage).sum()
    }

    /// CPU used since, of each process that was there then and still is, in microseconds.
    pub(crate) fn cpu_since(&self, before: &Self) -> Vec<(String, f64)> {
        let each = |process: &Process| {
            let from = before.of(&process.name)?.cpu_us;
            // A process that was started again counts from nothing.
            let used = process.usage.cpu_us.checked_sub(from).unwrap_or(process.usage.cpu_us);
            Some((process.name.clone(), used as f64))
        };
        self.processes.iter().filter_map(each).collect()
    }
}

/// Memory of every process at each of some moments.
pub(crate) fn memory(title: impl Into<String>, moments: &[Snapshot]) -> Section {
    let names = moments
        .iter()
        .flat_map(|at| at.processes.iter().map(|p| p.name.as_str()));
    let mut seen: Vec<&str> = vec![];
    for name in names {
        if !seen.contains(&name) {
            seen.push(name);
        }
    }
    let columns: Vec<&str> = ["process"]
        .into_iter()
        .chain(moments.iter().map(|at| at.when.as_str()))
        .collect();
    let mut table = Section::new(title, &columns);
    for name in seen {
        let kib = |at: &Snapshot| at.of(name).map_or_else(String::new, |usage| usage.rss_kib.to_string());
        table.row(name, moments.iter().map(kib));
    }
    table
}

/// CPU of every process between two moments, for each of `count` things.
pub(crate) fn cpu_each(from: &Snapshot, to: &Snapshot, count: u64) -> Vec<(String, f64)> {
    let each = |(name, us): (String, f64)| (name, us / count.max(1) as f64);
    to.cpu_since(from).into_iter().map(each).collect()
}

/// A table of such figures, with their sums.
pub(crate) fn cpu_table(title: impl Into<String>, unit: &str, cpu: &[(String, f64)]) -> Section {
    let mut table = Section::new(title, &["process", unit]);
    for (name, us) in cpu {
        table.row(name, [one(*us)]);
    }
    let server = |name: &str| name != "this client" && !name.starts_with("swarm");
    let servers = cpu.iter().filter(|(name, _)| server(name)).map(|(_, us)| us).sum();
    table.row("all servers", [one(servers)]);
    table.row("all", [one(cpu.iter().map(|(_, us)| us).sum())]);
    table
}

/// All that is counted at one moment.
#[derive(Debug, Clone)]
pub(crate) struct Reading {
    pub(crate) processes: Snapshot,
    pub(crate) swarm: Progress,
    pub(crate) store_bytes: u64,
    pub(crate) audit_bytes: u64,
    pub(crate) log_bytes: u64,
}

impl Reading {
    pub(crate) async fn take(when: &str, site: &Site, swarm: &mut SwarmChild) -> Result<Self> {
        let progress = swarm.settled().await?;
        let (audit_bytes, log_bytes) = site.trail_bytes()?;
        Ok(Self {
            processes: Snapshot::take(when, site, &[("swarm", swarm)])?,
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
    pub(crate) cpu_us: Vec<(String, f64)>,
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
        cpu_us: cpu_each(&before.processes, &after.processes, agent_tasks),
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
