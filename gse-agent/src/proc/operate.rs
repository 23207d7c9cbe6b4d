//! One operation from its turn to its outcome (contract procmgr-agent-lifecycle, 1.3, 1.5 and 1.11): checks, the command, the check after it,
//! what is registered from then on. Every step may be interrupted by the end of the agent, and is gone through again by the next one without
//! doing anything twice. The steps themselves are in [`super::steps`], what touches only registrations in [`super::hosting`].

use std::sync::Arc;
use std::time::Duration;

use gse_proto::proc::{AUTO_RESIDENT, OpType, Outcome, Policy, Process, Spec, code};

use super::find::Ident;
use super::hosting::{adopt, check, check_spec, last, register, unregister};
use super::journal::{Op, remove};
use super::registry::Key;
use super::stat::Stat;
use super::steps::{command_of, name, run_command, send, since, sleep, started, wait_for_end};
use super::{Held, Kind, Shared, respawn, status, unix_ms};
use crate::exec::command::{self, End, Leaving};

/// What an operation comes to.
#[derive(Debug)]
pub(super) struct Verdict {
    pub(super) code: i32,
    message: String,
    output: String,
    times: (u64, u64),
}

impl Verdict {
    pub(super) fn new(code: i32, message: impl Into<String>) -> Self {
        let now = unix_ms();
        Self {
            code,
            message: message.into(),
            output: String::new(),
            times: (now, now),
        }
    }

    pub(super) fn ok() -> Self {
        Self::new(code::OK, "success")
    }

    /// A command that did not succeed, in its own words if it had any.
    fn failed(end: &End) -> Self {
        let output = end.output.trim_end();
        let message = match (output.is_empty(), end.why.is_empty()) {
            (true, _) => end.why.clone(),
            (false, true) => output.to_owned(),
            (false, false) => format!("{output}\n({})", end.why),
        };
        Self {
            code: code::COMMAND_FAILED,
            message,
            output: end.output.clone(),
            times: (end.start_ms, end.end_ms),
        }
    }
}

/// Takes up what an earlier agent process has left.
pub(super) fn resume(shared: &Arc<Shared>, open: Vec<Arc<Op>>) {
    for op in open {
        let Ok(key) = Key::from_wire(op.order.key.as_ref()) else {
            continue;
        };
        // At start nobody else has one; a second operation on the same process waits like any other.
        let held = shared.try_turn(&key);
        if held.is_some()
            && let Some(entry) = shared.entries.lock().get_mut(&key)
        {
            if op.respawn {
                entry.machine.resume_start();
            } else {
                entry.machine.operation_begins();
            }
        }
        tracing::info!(process = %key, op_type = op.order.op_type, "an operation of the agent's earlier life is taken up");
        match (op.respawn, held) {
            (true, Some(held)) => respawn::spawn(shared, key, op, held),
            // It was in the middle of an operation: what that leaves is looked at like everything else.
            (true, None) => remove(&op.dir),
            (false, held) => spawn(shared, vec![op], held),
        }
    }
}

/// Carries out operations on one process, one after the other.
pub(super) fn spawn(shared: &Arc<Shared>, ops: Vec<Arc<Op>>, mut held: Option<Held>) {
    let task = Arc::clone(shared);
    shared.life.spawn_contained("process operation", async move {
        for op in ops {
            let Ok(outcome) = Box::pin(run(&task, &op, held.take())).await else {
                return;
            };
            finish(&task, &op, outcome).await;
        }
    });
}

async fn finish(shared: &Arc<Shared>, op: &Arc<Op>, outcome: Outcome) {
    let (at, writing, kept) = (unix_ms(), Arc::clone(op), outcome.clone());
    let written = tokio::task::spawn_blocking(move || writing.write_end(&kept, at)).await;
    match written {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "the end of an operation on a process cannot be recorded"),
        Err(error) => tracing::error!(%error, "the end of an operation on a process cannot be recorded"),
    }
    tracing::info!(
        process = op
            .order
            .key
            .as_ref()
            .map(|key| format!("{}:{}", key.namespace, key.name)),
        op_type = op.order.op_type,
        code = outcome.code,
        "operation: {}",
        outcome.message
    );
    let kind = OpType::from_number(op.order.op_type).map_or("illegal", name);
    shared.metrics.operations.get_or_create(&Kind { kind }).inc();
    op.end(outcome, at);
}

async fn run(shared: &Arc<Shared>, op: &Arc<Op>, held: Option<Held>) -> Result<Outcome, Leaving> {
    let order = &op.order;
    let refuse = |code, message: String| Outcome {
        op_id: order.op_id.clone(),
        code,
        message,
        start_ms: unix_ms(),
        end_ms: unix_ms(),
        ..Outcome::default()
    };
    let Some(kind) = OpType::from_number(order.op_type) else {
        return Ok(refuse(
            code::ILLEGAL_OP,
            format!("there is no operation of type {}", order.op_type),
        ));
    };
    let key = match check(order, kind) {
        Ok(key) => key,
        Err(text) => return Ok(refuse(code::COMMAND_FAILED, text)),
    };
    if kind == OpType::Status {
        return status::answer(shared, &key, order).await;
    }
    let _held = match held {
        Some(held) => held,
        None => shared.turn(&key).await?,
    };
    let result = match kind {
        OpType::Register => register(shared, &key, order).await?,
        OpType::Unregister => unregister(shared, &key, order).await?,
        _ => control(shared, &key, op, kind).await?,
    };
    let entries = shared.entries.lock();
    let process = match entries.get(&key) {
        Some(entry) => shared.process(&key, entry),
        None => Process {
            key: Some(key.to_wire()),
            pid: -1,
            ..Process::default()
        },
    };
    Ok(Outcome {
        op_id: order.op_id.clone(),
        code: result.code,
        message: result.message,
        output: result.output,
        process: Some(process),
        start_ms: result.times.0,
        end_ms: result.times.1,
        ..Outcome::default()
    })
}

/// Those that do something to a process.
async fn control(shared: &Arc<Shared>, key: &Key, op: &Arc<Op>, kind: OpType) -> Result<Verdict, Leaving> {
    let order = &op.order;
    let begun = {
        let dir = op.dir.clone();
        let look = tokio::task::spawn_blocking(move || command::was_started(&dir)).await;
        look.unwrap_or(true)
    };
    if !begun && order.not_after_ms > 0 && shared.server_now().unwrap_or_else(unix_ms) > order.not_after_ms {
        return Ok(Verdict::new(
            code::COMMAND_FAILED,
            "not begun in time: the moment after which it was not wanted any more has passed",
        ));
    }
    let spec = match adopt(shared, key, order) {
        Ok(spec) => spec,
        Err(refusal) => return Ok(refusal),
    };
    if let Err(text) = check_spec(&spec, true) {
        return Ok(Verdict::new(code::COMMAND_FAILED, text));
    }
    let hosted = {
        let mut entries = shared.entries.lock();
        entries.get_mut(key).is_some_and(|entry| {
            entry.machine.operation_begins();
            entry.kept.hosted
        })
    };
    let done = carry_out(shared, key, op, (kind, begun), &spec).await?;
    let resident = Policy::of(&spec).auto_type == AUTO_RESIDENT;
    let good = done.result.code == code::OK;
    let hosted = match kind {
        OpType::Start => hosted || good || done.result.code == code::ALREADY_RUNNING,
        OpType::Restart => hosted || (good && resident),
        OpType::Stop | OpType::Kill => hosted && !good && done.result.code != code::NOT_RUNNING,
        _ => hosted,
    };
    let leave_alone = !matches!(kind, OpType::Restart | OpType::Reload);
    let now = shared.now();
    let actions = shared.change(key, |entry| {
        let alive = done.found.is_some();
        let actions = entry.machine.operation_ended(now, alive, hosted, leave_alone);
        if good && matches!(kind, OpType::Start | OpType::Restart) {
            entry.kept.last_start_time = done.result.times.0 / 1000;
            if entry.kept.register_time == 0 {
                entry.kept.register_time = unix_ms() / 1000;
            }
        }
        entry.kept.trouble.clear();
        shared.seen_as(entry, done.found);
        actions
    });
    for action in actions.unwrap_or_default() {
        super::watch::act(shared, key, action, "").await;
    }
    if let Err(error) = shared.keeper.commit(shared).await? {
        tracing::error!(process = %key, "what an operation has changed is not kept over a restart: {error}");
    }
    Ok(done.result)
}

struct Done {
    result: Verdict,
    found: Option<(Stat, Ident)>,
}

async fn carry_out(
    shared: &Arc<Shared>,
    key: &Key,
    op: &Arc<Op>,
    (kind, begun): (OpType, bool),
    spec: &Arc<Spec>,
) -> Result<Done, Leaving> {
    let policy = Policy::of(spec);
    let before = shared.find(spec, last(shared, key), None, true).await;
    if !begun {
        let refusal = match (kind, &before) {
            (OpType::Start, Some((stat, _))) => Some(Verdict::new(
                code::ALREADY_RUNNING,
                format!("{} is already running (pid {})", spec.proc_name, stat.pid),
            )),
            (OpType::Stop | OpType::Kill | OpType::Reload, None) => Some(Verdict::new(
                code::NOT_RUNNING,
                format!("{} is not running", spec.proc_name),
            )),
            _ => None,
        };
        if let Some(result) = refusal {
            return Ok(Done { result, found: before });
        }
    }
    let ident = before.as_ref().map(|(_, ident)| ident.clone());
    let end = match command_of(kind, spec) {
        Ok(command) => run_command(shared, op, spec, command).await?,
        // Nothing is configured for these; what they mean can be done without.
        Err(Some(signal)) => {
            let at = unix_ms();
            let why = match &ident {
                Some(ident) => send(shared, ident, &spec.user, signal).await,
                None => "it is not running".to_owned(),
            };
            End {
                ok: why.is_empty(),
                output: String::new(),
                why,
                start_ms: at,
                end_ms: unix_ms(),
            }
        }
        Err(None) => {
            let result = Verdict::new(
                code::COMMAND_FAILED,
                format!("{} has no {}_cmd", spec.proc_name, name(kind)),
            );
            return Ok(Done { result, found: before });
        }
    };
    let result = if end.ok {
        let mut result = Verdict::ok();
        result.output.clone_from(&end.output);
        result.times = (end.start_ms, end.end_ms);
        result
    } else {
        Verdict::failed(&end)
    };
    let checked = match kind {
        OpType::Stop | OpType::Kill => {
            let patience = if end.ok { policy.stop_check_secs } else { 0 };
            let found = wait_for_end(shared, spec, ident, Duration::from_secs(patience.into())).await?;
            (found.is_none(), found)
        }
        OpType::Start | OpType::Restart => {
            let since = since(shared, end.start_ms);
            let found = match end.ok {
                true => {
                    sleep(shared, Duration::from_secs(policy.start_check_secs.into())).await?;
                    started(shared, spec, ident, since).await?
                }
                false => shared.find(spec, ident, Some(since), true).await,
            };
            (found.is_some(), found)
        }
        _ => {
            let found = shared.find(spec, ident, None, true).await;
            (found.is_some(), found)
        }
    };
    let (as_it_should, found) = checked;
    let result = match (end.ok, as_it_should, kind) {
        (true, false, OpType::Stop | OpType::Kill) => Verdict {
            code: code::CHECK_FAILED,
            message: format!(
                "stop check failed: {} still runs {} s after its {}_cmd (pid {})",
                spec.proc_name,
                policy.stop_check_secs,
                name(kind),
                found.as_ref().map_or(-1, |(stat, _)| stat.pid)
            ),
            ..result
        },
        (true, false, _) => Verdict {
            code: code::CHECK_FAILED,
            message: format!(
                "{} check failed: {} does not run {} s after its {}_cmd",
                name(kind),
                spec.proc_name,
                policy.start_check_secs,
                name(kind)
            ),
            ..result
        },
        _ => result,
    };
    Ok(Done { result, found })
}
