//! What agents report of their processes (see `proto/gse/proc.proto`): written to the store, then acknowledged.
//!
//! Reports of all sessions go through one bounded queue to one writer, which makes one batch of what waits. A report is acknowledged after
//! the store has replied; one that finds no room, or that the store has not taken, is left to the agent, which says it again. What reports
//! mean is gse_procmgr's business.

use std::sync::Arc;

use gse_core::fleet::processes::Writes;
use gse_core::store::StoreError;
use gse_proto::keys;
use gse_proto::proc::{ProcReport, ProcReported};
use tokio::sync::mpsc;

use crate::Node;
use crate::clock::unix_ms;
use crate::session::registry::Session;

/// Reports that wait for the writer.
const WAITING: usize = 8_192;
/// Reports written in one batch.
const TOGETHER: usize = 512;
/// Processes written in one batch, about.
const PROCESSES: usize = 4_000;

type Said = (Arc<Session>, ProcReport);

/// Where sessions put reports.
#[derive(Debug)]
pub struct Reports {
    queue: mpsc::Sender<Said>,
    waiting: parking_lot::Mutex<Option<mpsc::Receiver<Said>>>,
}

impl Default for Reports {
    fn default() -> Self {
        let (queue, waiting) = mpsc::channel(WAITING);
        Self {
            queue,
            waiting: parking_lot::Mutex::new(Some(waiting)),
        }
    }
}

impl Reports {
    /// Takes a report, if there is room.
    pub fn said(&self, node: &Node, session: &Arc<Session>, report: ProcReport) {
        if self.queue.try_send((Arc::clone(session), report)).is_err() {
            node.metrics.proc_reports_dropped.inc();
        }
    }
}

/// Writes reports until the node's sessions have ended.
pub async fn write(node: Arc<Node>) {
    let Some(mut waiting) = node.reports.waiting.lock().take() else {
        return;
    };
    let mut some: Vec<Said> = Vec::new();
    loop {
        tokio::select! {
            () = node.sessions_gone() => return,
            count = waiting.recv_many(&mut some, TOGETHER) => if count == 0 {
                return;
            },
        }
        while !some.is_empty() {
            let mut processes = 0;
            let fit = some.iter().take_while(|(_, report)| {
                let fits = processes < PROCESSES;
                processes += report.processes.len() + report.gone.len();
                fits
            });
            let now: Vec<Said> = {
                let count = fit.count().max(1);
                some.drain(..count).collect()
            };
            match put(&node, &now).await {
                Ok(()) => acknowledge(&node, &now),
                Err(error) => {
                    node.metrics.proc_reports_dropped.inc_by(now.len() as u64);
                    tracing::debug!(%error, reports = now.len(), "reports of processes are left to their agents until the store takes them");
                }
            }
        }
    }
}

async fn put(node: &Node, reports: &[Said]) -> Result<(), StoreError> {
    let mut writes = Writes::new(unix_ms());
    for (session, report) in reports {
        let agent = session.agent.as_str();
        for process in &report.processes {
            writes.state(agent, process, report.snapshot);
        }
        for key in &report.gone {
            writes.remove(agent, &keys::proc_state_field(&key.namespace, &key.name));
        }
        if report.snapshot > 0 && report.last {
            writes.field(agent, keys::PROC_SNAPSHOT_FIELD, report.snapshot.to_string().as_bytes());
        }
        if report.last || !report.gone.is_empty() {
            writes.check(agent);
        }
    }
    node.task_store.raw().run(writes.batch()).await.map(|_| ())
}

fn acknowledge(node: &Node, reports: &[Said]) {
    node.metrics.proc_reports.inc_by(reports.len() as u64);
    for (session, report) in reports {
        let done = ProcReported {
            sequence: report.sequence,
        };
        if session.outbox.control(&done.into()).is_err() {
            tracing::debug!(agent = %session.agent, "a session ended before its report was acknowledged");
        }
    }
}
