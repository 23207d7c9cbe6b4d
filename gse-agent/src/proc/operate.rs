//! One operation from its turn to its outcome (contract procmgr-agent-lifecycle, 1.3, 1.5 and 1.11): checks, the command, the check after it,
//! what is registered from then on. Every step may be interrupted by the end of the agent, and is gone through again by the next one without
//! doing anything twice.

use std::sync::Arc;
use std::time::Duration;

use gse_proto::proc::{AUTO_RESIDENT, MAX_TEXT, OpType, Operation, Outcome, Policy, Process, Spec, code, spec_digest};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::find::{self, Ident};
use super::journal::{Op, remove};
use super::registry::{Key, Registration, labels};
use super::stat::{self, Stat};
use super::{Held, Kind, Shared, respawn, status, unix_ms};
use crate::exec::command::{self, End, Leaving, Order};

/// Between two looks at whether a process has ended.
const LOOK: Duration = Duration::from_millis(100);
/// How much longer than was asked for a process may take to come up.
const MOMENT: Duration = Duration::from_secs(1);

/// What an operation comes to.
pub(super) struct Result {
    code: i32,
    message: String,
    output: String,
    times: (u64, u64),
}

impl Result {
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

fn name(kind: OpType) -> &'static str {
    match kind {
        OpType::Start => "start",
        OpType::Stop => "stop",
        OpType::Status => "status",
        OpType::Register => "register",
        OpType::Unregister => "unregister",
        OpType::Restart => "restart",
        OpType::Reload => "reload",
        OpType::Kill => "kill",
    }
}

async fn run(shared: &Arc<Shared>, op: &Arc<Op>, held: Option<Held>) -> std::result::Result<Outcome, Leaving> {
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

/// What can be said about an order without looking at anything.
fn check(order: &Operation, kind: OpType) -> std::result::Result<Key, String> {
    let key = Key::from_wire(order.key.as_ref())?;
    labels(&order.labels)?;
    let Some(spec) = &order.spec else { return Ok(key) };
    check_spec(spec, kind != OpType::Status && kind != OpType::Unregister)?;
    Ok(key)
}

/// Whether a spec can be worked with; `whole`: not only looked for.
pub(super) fn check_spec(spec: &Spec, whole: bool) -> std::result::Result<(), String> {
    for (what, text) in [
        ("identity.proc_name", &spec.proc_name),
        ("identity.setup_path", &spec.setup_path),
        ("identity.pid_path", &spec.pid_path),
        ("identity.config_path", &spec.config_path),
        ("identity.log_path", &spec.log_path),
        ("identity.user", &spec.user),
        ("control.start_cmd", &spec.start_cmd),
        ("control.stop_cmd", &spec.stop_cmd),
        ("control.restart_cmd", &spec.restart_cmd),
        ("control.reload_cmd", &spec.reload_cmd),
        ("control.kill_cmd", &spec.kill_cmd),
        ("control.version_cmd", &spec.version_cmd),
        ("control.health_cmd", &spec.health_cmd),
        ("monitor_policy.crontab_rule", &spec.crontab_rule),
    ] {
        if text.len() > MAX_TEXT || text.contains('\0') {
            return Err(format!("spec.{what} must have at most {MAX_TEXT} bytes and no NUL"));
        }
    }
    for (what, path) in [("setup_path", &spec.setup_path), ("pid_path", &spec.pid_path)] {
        if !path.is_empty() && !path.starts_with('/') {
            return Err(format!("spec.identity.{what} must be an absolute path, not {path:?}"));
        }
    }
    for (what, limit) in [("cpu", spec.cpu_limit), ("mem", spec.mem_limit)] {
        if !limit.is_finite() || limit < 0.0 {
            return Err(format!(
                "spec.resource.{what} must be a share in per cent, 0 for no limit"
            ));
        }
    }
    if whole {
        for (what, text) in [
            ("proc_name", &spec.proc_name),
            ("setup_path", &spec.setup_path),
            ("user", &spec.user),
        ] {
            if text.is_empty() {
                return Err(format!("spec.identity.{what} must not be empty"));
            }
        }
    }
    Ok(())
}

/// Puts what the order says into the registration, making one when there is none. What comes of it otherwise is for the caller.
fn adopt(shared: &Shared, key: &Key, order: &Operation) -> std::result::Result<Arc<Spec>, Result> {
    let labels = labels(&order.labels).map_err(|text| Result::new(code::COMMAND_FAILED, text))?;
    let mut entries = shared.entries.lock();
    if !entries.contains_key(key) {
        let Some(spec) = &order.spec else {
            return Err(Result::new(
                code::COMMAND_FAILED,
                format!("this host knows no process {key}; send its spec along, or register it first"),
            ));
        };
        if entries.len() >= shared.config.max_processes {
            return Err(Result::new(
                code::COMMAND_FAILED,
                format!(
                    "{} processes are known on this host, more are not allowed (proc.max_processes)",
                    entries.len()
                ),
            ));
        }
        let entry = shared.entry(Registration {
            spec: Arc::new(spec.clone()),
            labels: labels.clone(),
            register_time: unix_ms() / 1000,
            ..Registration::default()
        });
        entries.insert(Arc::new(key.clone()), entry);
        shared
            .metrics
            .known
            .set(i64::try_from(entries.len()).unwrap_or(i64::MAX));
    }
    let Some(entry) = entries.get_mut(key) else {
        return Err(Result::new(code::COMMAND_FAILED, "the registration is gone"));
    };
    // One that is older than what is known was overtaken.
    if order.revision >= entry.kept.revision {
        entry.kept.revision = order.revision;
        if let Some(spec) = &order.spec {
            entry.kept.spec = Arc::new(spec.clone());
            entry.digest = spec_digest(spec);
            entry.machine.rules(shared.rules(spec));
        }
        if !labels.is_empty() {
            entry.kept.labels = labels;
        }
    }
    Ok(Arc::clone(&entry.kept.spec))
}

fn superseded(shared: &Shared, key: &Key, order: &Operation) -> bool {
    let entries = shared.entries.lock();
    order.revision > 0
        && entries
            .get(key)
            .is_some_and(|entry| entry.kept.revision > order.revision)
}

fn last(shared: &Shared, key: &Key) -> Option<Ident> {
    shared.entries.lock().get(key)?.kept.ident.clone()
}

async fn register(shared: &Arc<Shared>, key: &Key, order: &Operation) -> std::result::Result<Result, Leaving> {
    if superseded(shared, key, order) {
        return Ok(Result::ok());
    }
    let hosted = shared.entries.lock().get(key).is_some_and(|entry| entry.kept.hosted);
    if order.only_new && hosted {
        return Ok(Result::new(
            code::ALREADY_REGISTERED,
            "Fail to register, for the process info already exists.",
        ));
    }
    let spec = match adopt(shared, key, order) {
        Ok(spec) => spec,
        Err(refusal) => return Ok(refusal),
    };
    let found = shared.find(&spec, last(shared, key), None, true).await;
    let now = shared.now();
    shared.change(key, |entry| {
        entry.machine.operation_begins();
        entry.machine.operation_ended(now, found.is_some(), true, true);
        entry.kept.register_time = unix_ms() / 1000;
        entry.kept.trouble.clear();
        shared.seen_as(entry, found);
    });
    kept(shared).await
}

async fn unregister(shared: &Arc<Shared>, key: &Key, order: &Operation) -> std::result::Result<Result, Leaving> {
    if superseded(shared, key, order) {
        return Ok(Result::ok());
    }
    let known = shared.entries.lock().contains_key(key);
    if !known && order.spec.is_none() {
        return Ok(Result::new(
            code::NOT_RUNNING,
            format!("the process {key} is not registered on this host"),
        ));
    }
    let spec = match adopt(shared, key, order) {
        Ok(spec) => spec,
        Err(refusal) => return Ok(refusal),
    };
    let found = shared.find(&spec, last(shared, key), None, true).await;
    let now = shared.now();
    shared.change(key, |entry| {
        entry.machine.operation_begins();
        entry.machine.operation_ended(now, found.is_some(), false, true);
        entry.kept.trouble.clear();
        shared.seen_as(entry, found);
    });
    kept(shared).await
}

/// A registration is one only when it is on disk.
async fn kept(shared: &Arc<Shared>) -> std::result::Result<Result, Leaving> {
    Ok(match shared.keeper.commit(shared).await? {
        Ok(()) => Result::ok(),
        Err(error) => Result::new(
            code::COMMAND_FAILED,
            format!("done, but it is not kept over a restart of the agent: {error}"),
        ),
    })
}

/// Those that do something to a process.
async fn control(shared: &Arc<Shared>, key: &Key, op: &Arc<Op>, kind: OpType) -> std::result::Result<Result, Leaving> {
    let order = &op.order;
    let begun = {
        let dir = op.dir.clone();
        let look = tokio::task::spawn_blocking(move || command::was_started(&dir)).await;
        look.unwrap_or(true)
    };
    if !begun && order.not_after_ms > 0 && shared.server_now().is_some_and(|now| now > order.not_after_ms) {
        return Ok(Result::new(
            code::COMMAND_FAILED,
            "not begun in time: the moment after which it was not wanted any more has passed",
        ));
    }
    let spec = match adopt(shared, key, order) {
        Ok(spec) => spec,
        Err(refusal) => return Ok(refusal),
    };
    if let Err(text) = check_spec(&spec, true) {
        return Ok(Result::new(code::COMMAND_FAILED, text));
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
    result: Result,
    found: Option<(Stat, Ident)>,
}

async fn carry_out(
    shared: &Arc<Shared>,
    key: &Key,
    op: &Arc<Op>,
    (kind, begun): (OpType, bool),
    spec: &Arc<Spec>,
) -> std::result::Result<Done, Leaving> {
    let policy = Policy::of(spec);
    let before = shared.find(spec, last(shared, key), None, true).await;
    if !begun {
        let refusal = match (kind, &before) {
            (OpType::Start, Some((stat, _))) => Some(Result::new(
                code::ALREADY_RUNNING,
                format!("{} is already running (pid {})", spec.proc_name, stat.pid),
            )),
            (OpType::Stop | OpType::Kill | OpType::Reload, None) => Some(Result::new(
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
                Some(ident) => send(shared, ident, signal).await,
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
            let result = Result::new(
                code::COMMAND_FAILED,
                format!("{} has no {}_cmd", spec.proc_name, name(kind)),
            );
            return Ok(Done { result, found: before });
        }
    };
    let result = if end.ok {
        let mut result = Result::ok();
        result.output.clone_from(&end.output);
        result.times = (end.start_ms, end.end_ms);
        result
    } else {
        Result::failed(&end)
    };
    let checked = match kind {
        OpType::Stop | OpType::Kill => {
            let patience = if end.ok { policy.stop_check_secs } else { 0 };
            let found = wait_for_end(shared, spec, ident, Duration::from_secs(patience.into())).await?;
            (found.is_none(), found)
        }
        OpType::Start | OpType::Restart => {
            let since = since(shared, end.start_ms);
            if end.ok {
                sleep(shared, Duration::from_secs(policy.start_check_secs.into())).await?;
            }
            let found = started(shared, spec, ident, since).await?;
            (found.is_some(), found)
        }
        _ => {
            let found = shared.find(spec, ident, None, true).await;
            (found.is_some(), found)
        }
    };
    let (as_it_should, found) = checked;
    let result = match (end.ok, as_it_should, kind) {
        (true, false, OpType::Stop | OpType::Kill) => Result {
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
        (true, false, _) => Result {
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

/// The command for an operation; a signal that does the same when none is configured; nothing when it can't be done without.
fn command_of(kind: OpType, spec: &Spec) -> std::result::Result<String, Option<Signal>> {
    let (command, instead) = match kind {
        OpType::Start => (&spec.start_cmd, None),
        OpType::Stop => (&spec.stop_cmd, Some(Signal::SIGTERM)),
        OpType::Restart if spec.restart_cmd.is_empty() && !spec.stop_cmd.is_empty() && !spec.start_cmd.is_empty() => {
            return Ok(format!("{}\n{}", spec.stop_cmd, spec.start_cmd));
        }
        OpType::Restart => (&spec.restart_cmd, None),
        OpType::Reload => (&spec.reload_cmd, None),
        OpType::Kill => (&spec.kill_cmd, Some(Signal::SIGKILL)),
        OpType::Status | OpType::Register | OpType::Unregister => return Err(None),
    };
    if command.trim().is_empty() {
        Err(instead)
    } else {
        Ok(command.clone())
    }
}

/// Runs a control command of `op`, which is on disk before that.
pub(super) async fn run_command(
    shared: &Arc<Shared>,
    op: &Arc<Op>,
    spec: &Spec,
    command: String,
) -> std::result::Result<End, Leaving> {
    let refuse = |why: String| End {
        ok: false,
        output: String::new(),
        why,
        start_ms: unix_ms(),
        end_ms: unix_ms(),
    };
    if !shared.accounts.allows(&spec.user) {
        return Ok(refuse(format!(
            "not run: this agent's settings (exec.allowed_accounts) do not allow commands as {}",
            spec.user
        )));
    }
    let writing = Arc::clone(op);
    let written = tokio::task::spawn_blocking(move || writing.write()).await;
    if let Some(error) = match written {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(error) => Some(error.to_string()),
    } {
        return Ok(refuse(format!(
            "not run: the operation cannot be recorded in the agent's journal: {error}"
        )));
    }
    let _slot = tokio::select! {
        slot = shared.slots.acquire() => slot.map_err(|_| Leaving)?,
        () = shared.life.draining() => return Err(Leaving),
    };
    let seconds = u64::from(Policy::of(spec).op_timeout).min(shared.config.max_op_timeout_s);
    let order = Order {
        user: spec.user.clone(),
        work_dir: spec.setup_path.clone(),
        command,
        timeout: Duration::from_secs(seconds),
        output_limit: shared.config.max_output,
    };
    command::carry_out(op.dir.clone(), order, &shared.config.self_exec, &shared.life).await
}

/// Ticks since boot of a moment, a little before it to be sure.
pub(super) fn since(shared: &Shared, start_ms: u64) -> u64 {
    let ago = unix_ms().saturating_sub(start_ms) as f64 / 1000.0;
    let at = (stat::uptime() - ago - 0.1).max(0.0);
    (at * shared.units.ticks as f64) as u64
}

pub(super) async fn sleep(shared: &Shared, time: Duration) -> std::result::Result<(), Leaving> {
    tokio::select! {
        () = tokio::time::sleep(time) => Ok(()),
        () = shared.life.draining() => Err(Leaving),
    }
}

/// What runs after a start; what only just comes up, on a busy host, is waited for a moment longer.
pub(super) async fn started(
    shared: &Arc<Shared>,
    spec: &Arc<Spec>,
    ident: Option<Ident>,
    since: u64,
) -> std::result::Result<Option<(Stat, Ident)>, Leaving> {
    let until = tokio::time::Instant::now() + MOMENT;
    loop {
        let found = shared.find(spec, ident.clone(), Some(since), true).await;
        if found.is_some() || tokio::time::Instant::now() >= until {
            return Ok(found);
        }
        sleep(shared, LOOK).await?;
    }
}

/// Waits until it runs no more; what runs still when patience is over.
async fn wait_for_end(
    shared: &Arc<Shared>,
    spec: &Arc<Spec>,
    ident: Option<Ident>,
    patience: Duration,
) -> std::result::Result<Option<(Stat, Ident)>, Leaving> {
    let until = tokio::time::Instant::now() + patience;
    // Who is known by more than a name is not looked for by name: another one of that name is not meant.
    let by_name = ident.is_none() || spec.pid_path.is_empty();
    loop {
        let over = tokio::time::Instant::now() >= until;
        let found = shared.find(spec, ident.clone(), None, by_name).await;
        if found.is_none() || over {
            return Ok(found);
        }
        sleep(shared, LOOK).await?;
    }
}

/// Sends a signal to a process, if it is still the one; why that was not possible.
async fn send(shared: &Shared, ident: &Ident, signal: Signal) -> String {
    let (ident, boot) = (ident.clone(), shared.boot.clone());
    let sent = tokio::task::spawn_blocking(move || match find::still(&ident, &boot) {
        Some(stat) => kill(Pid::from_raw(stat.pid), signal).map_err(|error| error.desc().to_owned()),
        None => Ok(()),
    });
    match sent.await {
        Ok(Ok(())) => String::new(),
        Ok(Err(error)) => format!("{signal} could not be sent: {error}"),
        Err(error) => error.to_string(),
    }
}

/// Kills a process and everything below it.
pub(super) async fn kill_tree(shared: &Shared, ident: Ident) {
    let boot = shared.boot.clone();
    let task = tokio::task::spawn_blocking(move || {
        let Some(head) = find::still(&ident, &boot) else { return };
        let table = stat::all();
        let mut doomed = vec![head.pid];
        let mut at = 0;
        while let Some(parent) = doomed.get(at).copied() {
            let children = table.iter().filter(|stat| stat.parent == parent).map(|stat| stat.pid);
            let fresh: Vec<i32> = children.filter(|pid| !doomed.contains(pid)).collect();
            doomed.extend(fresh);
            at += 1;
        }
        for pid in doomed {
            if let Err(error) = kill(Pid::from_raw(pid), Signal::SIGKILL) {
                tracing::debug!(pid, error = error.desc(), "a process could not be killed");
            }
        }
    });
    if let Err(error) = task.await {
        tracing::error!(%error, "a process could not be killed");
    }
}
