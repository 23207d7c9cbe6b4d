//! Processes of a simulated agent: it has as many as the swarm is told, all of them running, reports them once in each session, and answers
//! every operation at once as done.

use std::time::Duration;

use bytes::Bytes;
use gse_proto::proc as p;
use gse_proto::session as s;
use prost::Message;
use tokio::time::Instant;

/// Namespace of all of them.
pub(crate) const NAMESPACE: &str = "bench";
/// A report without an answer is sent again after this long.
const RESEND: Duration = Duration::from_secs(5);

/// Name of a process by its number.
pub(crate) fn name(process: u32) -> String {
    format!("process_{process}")
}

/// The processes of one agent.
#[derive(Debug)]
pub(crate) struct Procs {
    index: u32,
    count: u32,
    /// Until the report is acknowledged.
    due: Option<Instant>,
    sequence: u64,
}

impl Procs {
    pub(crate) fn new(index: u32, count: u32) -> Self {
        Self {
            index,
            count,
            due: None,
            sequence: 0,
        }
    }

    /// A session begins: everything is told.
    pub(crate) fn opened(&mut self, now_ms: u64) {
        self.sequence = now_ms;
        self.due = (self.count > 0).then(Instant::now);
    }

    /// When there is something to say.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// The report, if it is time for it.
    pub(crate) fn report(&mut self) -> Option<p::ProcReport> {
        let due = self.due.as_mut().filter(|due| **due <= Instant::now())?;
        *due += RESEND;
        Some(p::ProcReport {
            sequence: self.sequence,
            snapshot: self.sequence,
            last: true,
            processes: (0..self.count).map(|n| self.process(n)).collect(),
            ..p::ProcReport::default()
        })
    }

    /// A report has been stored.
    pub(crate) fn reported(&mut self, sequence: u64) {
        if sequence == self.sequence {
            self.due = None;
        }
    }

    /// Answers a call.
    pub(crate) fn call(&self, call: &s::Call) -> s::CallReply {
        let mut reply = s::CallReply {
            call_id: call.call_id,
            ..s::CallReply::default()
        };
        let asked = p::ProcCall::decode(call.payload.clone())
            .ok()
            .and_then(|asked| asked.call);
        let answer = match asked {
            Some(p::proc_call::Call::Operate(operate)) if call.service == p::SERVICE => {
                let outcomes = operate.operations.iter().map(|operation| self.outcome(operation));
                p::proc_answer::Answer::Operated(p::Operated {
                    outcomes: outcomes.collect(),
                })
            }
            Some(p::proc_call::Call::Read(read)) => p::proc_answer::Answer::Registrations(p::Registrations {
                registrations: (0..self.count)
                    .map(|n| self.registration(n))
                    .filter(|mine| read.keys.is_empty() || mine.key.as_ref().is_some_and(|key| read.keys.contains(key)))
                    .collect(),
                more: false,
            }),
            Some(p::proc_call::Call::Reconcile(reconcile)) => p::proc_answer::Answer::Reconciled(p::Reconciled {
                processes: reconcile.put.iter().map(|_| p::Process::default()).collect(),
            }),
            _ => {
                reply.failure = s::CallFailure::Unsupported.into();
                return reply;
            }
        };
        reply.payload = Bytes::from(p::ProcAnswer { answer: Some(answer) }.encode_to_vec());
        reply
    }

    fn spec() -> p::Spec {
        p::Spec {
            proc_name: "bench_process".into(),
            setup_path: "/usr/local/gse_bkte/plugins/bin".into(),
            pid_path: "/var/run/gse/bench_process.pid".into(),
            user: "root".into(),
            start_cmd: "./start.sh bench_process".into(),
            stop_cmd: "./stop.sh bench_process".into(),
            restart_cmd: "./restart.sh bench_process".into(),
            reload_cmd: "./reload.sh bench_process".into(),
            ..p::Spec::default()
        }
    }

    fn key(n: u32) -> p::Key {
        p::Key {
            namespace: NAMESPACE.into(),
            name: name(n),
        }
    }

    fn registration(&self, n: u32) -> p::Registration {
        p::Registration {
            key: Some(Self::key(n)),
            spec: Some(Self::spec()),
            hosted: true,
            revision: 1,
            register_time: 1_763_900_000,
            was_running: true,
            ..p::Registration::default()
        }
    }

    fn process(&self, n: u32) -> p::Process {
        p::Process {
            key: Some(Self::key(n)),
            known: true,
            hosted: true,
            pid: i32::try_from(1_000 + self.index % 1_000_000 * 10 + n).unwrap_or(1),
            version: "1.2.3".into(),
            register_time: 1_763_900_000,
            last_start_time: 1_763_900_100,
            report_time: self.sequence / 1_000,
            cpu_usage: 0.5,
            mem_usage: 0.25,
            revision: 1,
            spec_digest: p::spec_digest(&Self::spec()),
            proc_name: "bench_process".into(),
            setup_path: "/usr/local/gse_bkte/plugins/bin".into(),
            ..p::Process::default()
        }
    }

    fn outcome(&self, operation: &p::Operation) -> p::Outcome {
        let number = operation
            .key
            .as_ref()
            .and_then(|key| key.name.rsplit_once('_')?.1.parse().ok())
            .unwrap_or(0);
        let process = self.process(number);
        p::Outcome {
            op_id: operation.op_id.clone(),
            status: (operation.op_type == p::OpType::Status as i32).then(|| p::Status {
                pid: process.pid,
                cmdline: "./bench_process -c ../etc/bench_process.conf".into(),
                version: "1.2.3".into(),
                cpu_usage: 0.5,
                cpu_usage_average: 0.4,
                mem_usage: 0.25,
                mem_bytes: 40 << 20,
                disk_bytes: 90 << 20,
                start_time: "2026-11-23 13:00:00".into(),
                stat: "S".into(),
                utime: "12.34".into(),
                stime: "5.67".into(),
                threads: 12,
                elapsed_secs: 3_600,
                timezone: 8,
                local_time: "2026-11-23 21:00:00".into(),
                utc_time: "2026-11-23 13:00:00".into(),
                ..p::Status::default()
            }),
            process: Some(process),
            ..p::Outcome::default()
        }
    }
}
