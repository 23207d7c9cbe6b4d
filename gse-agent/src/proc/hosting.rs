//! Operations that touch registrations alone, and what every operation's order is checked for and leaves behind in its registration. What is
//! done to processes is [`super::operate`]'s business.

use std::collections::BTreeMap;
use std::sync::Arc;

use gse_proto::proc::{MAX_TEXT, OpType, Operation, Spec, code, spec_digest};

use super::find::Ident;
use super::operate::Verdict;
use super::registry::{Key, Registration, labels};
use super::{Entry, Shared, unix_ms};
use crate::exec::command::Leaving;

/// What can be said about an order without looking at anything.
pub(super) fn check(order: &Operation, kind: OpType) -> Result<Key, String> {
    let key = Key::from_wire(order.key.as_ref())?;
    labels(&order.labels)?;
    let Some(spec) = &order.spec else { return Ok(key) };
    check_spec(spec, kind != OpType::Status && kind != OpType::Unregister)?;
    Ok(key)
}

/// Whether a spec can be worked with; `whole`: not only looked for.
pub(super) fn check_spec(spec: &Spec, whole: bool) -> Result<(), String> {
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
pub(super) fn adopt(shared: &Shared, key: &Key, order: &Operation) -> Result<Arc<Spec>, Verdict> {
    let labels = labels(&order.labels).map_err(|text| Verdict::new(code::COMMAND_FAILED, text))?;
    let mut entries = shared.entries.lock();
    if !entries.contains_key(key) {
        let Some(spec) = &order.spec else {
            return Err(Verdict::new(
                code::COMMAND_FAILED,
                format!("this host knows no process {key}; send its spec along, or register it first"),
            ));
        };
        if entries.len() >= shared.config.max_processes && !make_room(shared, &mut entries) {
            return Err(Verdict::new(
                code::COMMAND_FAILED,
                format!(
                    "{} processes are hosted or run on this host, more are not allowed (proc.max_processes)",
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
        return Err(Verdict::new(code::COMMAND_FAILED, "the registration is gone"));
    };
    // One that is older than what is known was overtaken.
    if order.revision == 0 || order.revision >= entry.kept.revision {
        entry.kept.revision = entry.kept.revision.max(order.revision);
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

/// Forgets the process that is of no use for the longest time: not hosted, not running. False when there is none.
pub(super) fn make_room(shared: &Shared, entries: &mut BTreeMap<Arc<Key>, Entry>) -> bool {
    let useless = entries
        .iter()
        .filter(|(_, entry)| !entry.kept.hosted && entry.stat.is_none() && entry.machine.is_free());
    let oldest = useless.min_by_key(|(_, entry)| (entry.kept.revision, entry.kept.register_time));
    let Some(key) = oldest.map(|(key, _)| Arc::clone(key)) else {
        return false;
    };
    entries.remove(&key);
    tracing::info!(process = %key, "forgotten: not hosted, not running, and room is needed (proc.max_processes)");
    shared.reporter.gone(&key);
    true
}

fn superseded(shared: &Shared, key: &Key, order: &Operation) -> bool {
    let entries = shared.entries.lock();
    order.revision > 0
        && entries
            .get(key)
            .is_some_and(|entry| entry.kept.revision > order.revision)
}

/// Which process it was last.
pub(super) fn last(shared: &Shared, key: &Key) -> Option<Ident> {
    shared.entries.lock().get(key)?.kept.ident.clone()
}

/// Hosts it.
pub(super) async fn register(shared: &Arc<Shared>, key: &Key, order: &Operation) -> Result<Verdict, Leaving> {
    if superseded(shared, key, order) {
        return Ok(Verdict::ok());
    }
    let hosted = shared.entries.lock().get(key).is_some_and(|entry| entry.kept.hosted);
    if order.only_new && hosted {
        return Ok(Verdict::new(
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

/// Hosts it no longer.
pub(super) async fn unregister(shared: &Arc<Shared>, key: &Key, order: &Operation) -> Result<Verdict, Leaving> {
    if superseded(shared, key, order) {
        return Ok(Verdict::ok());
    }
    let known = shared.entries.lock().contains_key(key);
    if !known && order.spec.is_none() {
        return Ok(Verdict::new(
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
async fn kept(shared: &Arc<Shared>) -> Result<Verdict, Leaving> {
    Ok(match shared.keeper.commit(shared).await? {
        Ok(()) => Verdict::ok(),
        Err(error) => Verdict::new(
            code::COMMAND_FAILED,
            format!("done, but it is not kept over a restart of the agent: {error}"),
        ),
    })
}
