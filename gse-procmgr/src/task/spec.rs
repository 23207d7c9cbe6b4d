//! A task from the body of a submit: what clients may leave out or write in several ways is settled here.

use bytes::Bytes;
use gse_core::random::HashMap;
use gse_proto::http::{ProcMeta, ProcObject, ProcSpec};
use gse_proto::ids::TaskId;
use gse_proto::proc::{MAX_LABELS, MAX_NAME, MAX_TEXT, OpType, Policy, Spec};
use gse_proto::procstore::{ProcGroup, ProcHeader};
use prost::Message;

use crate::config::TaskConfig;

/// Beside the times of the policy, an operation may take so long.
const SLACK_S: u64 = 60;
/// For an operation whose policy only the agent knows.
const UNKNOWN_POLICY_S: u64 = 900;

/// Where a task comes from.
#[derive(Debug, Clone)]
pub struct Origin {
    /// Its id.
    pub id: TaskId,
    /// Application.
    pub app: String,
    /// Tenant.
    pub tenant: String,
    /// Request.
    pub request_id: String,
    /// When.
    pub now_ms: u64,
    /// Which instance took it.
    pub node_id: String,
    /// Random.
    pub seed: [u8; 16],
}

/// A task that does what `objects` say.
///
/// # Errors
/// What is not acceptable, for the caller.
pub fn header(
    objects: Vec<ProcObject>,
    origin: Origin,
    only_new: bool,
    limits: &TaskConfig,
) -> Result<ProcHeader, String> {
    if objects.len() > limits.max_elements {
        return Err(format!(
            "{} elements in one call, at most {} are allowed; send them in parts",
            objects.len(),
            limits.max_elements
        ));
    }
    let mut specs: Vec<Bytes> = Vec::new();
    let mut places: HashMap<Bytes, u32> = HashMap::default();
    let mut rows: HashMap<String, (i32, u32)> = HashMap::default();
    let mut groups = Vec::with_capacity(objects.len());
    let mut longest_s = 0;
    for (n, mut object) in objects.into_iter().enumerate() {
        let at = |text: String| format!("element {n}: {text}");
        check_meta(&object.meta).map_err(at)?;
        let op_type = object.op_type.ok_or_else(|| {
            at(
                "op_type is missing; 0 start, 1 stop, 2 status, 3 register, 4 unregister, 7 restart, 8 reload, 9 kill"
                    .into(),
            )
        })?;
        // One that does not even fit is as illegal as any.
        let op_type = i32::try_from(op_type).unwrap_or(-1);
        let ids = object.take_ids();
        let spec = object.spec.as_ref().map(spec).transpose().map_err(at)?;
        longest_s = longest_s.max(match (&spec, OpType::from_number(op_type)) {
            (_, Some(OpType::Status) | None) => 0,
            (None, _) => UNKNOWN_POLICY_S,
            (Some(spec), _) => {
                let policy = Policy::of(spec);
                u64::from(policy.op_timeout) + u64::from(policy.start_check_secs) + u64::from(policy.stop_check_secs)
            }
        });
        let place = match spec {
            None => 0,
            Some(spec) => {
                let bytes = Bytes::from(spec.encode_to_vec());
                *places.entry(bytes).or_insert_with_key(|bytes| {
                    specs.push(bytes.clone());
                    u32::try_from(specs.len()).unwrap_or(u32::MAX)
                })
            }
        };
        let mut group = ProcGroup {
            op_type,
            spec: place,
            only_new,
            labels: object
                .meta
                .labels
                .into_iter()
                .flat_map(|(key, value)| [key, value])
                .collect(),
            namespace: object.meta.namespace,
            name: object.meta.name,
            ids: Vec::with_capacity(ids.len()),
        };
        for id in ids {
            let key = format!("{id}:{}:{}", group.namespace, group.name);
            // One entry for each key: what is said twice is done once, what contradicts itself can't be shown.
            match rows.get(&key) {
                None => {
                    rows.insert(key, (op_type, place));
                    group.ids.push(id);
                }
                Some(before) if *before == (op_type, place) => {}
                Some((before, _)) => {
                    return Err(format!(
                        "element {n}: {key:?} is there before, with op_type {before} or another spec; a call has one entry for each host, \
                         namespace and name: send one after the other"
                    ));
                }
            }
            if rows.len() > limits.max_rows {
                return Err(format!(
                    "more than {} hosts times processes in one call; send them in parts",
                    limits.max_rows
                ));
            }
        }
        groups.push(group);
    }
    groups.retain(|group| !group.ids.is_empty());
    if groups.is_empty() {
        return Err("no hosts: give agent_id_list, or hosts with ip and bk_cloud_id".into());
    }
    let time_ms = (longest_s + SLACK_S).min(limits.max_time_s) * 1_000;
    Ok(ProcHeader {
        task_id: origin.id.as_str().to_owned(),
        created_at_ms: origin.now_ms,
        deadline_ms: origin.now_ms + time_ms,
        not_after_ms: origin.now_ms + limits.give_up_ms,
        app: origin.app,
        tenant: origin.tenant,
        request_id: origin.request_id,
        node_id: origin.node_id,
        seed: Bytes::copy_from_slice(&origin.seed),
        revision: origin.now_ms,
        specs,
        groups,
    })
}

fn check_meta(meta: &ProcMeta) -> Result<(), String> {
    for (key, text) in [("namespace", &meta.namespace), ("name", &meta.name)] {
        if text.is_empty() {
            return Err(format!("meta.{key} is missing"));
        }
        check_name(text).map_err(|why| format!("meta.{key} {why}"))?;
    }
    if meta.labels.len() > MAX_LABELS {
        return Err(format!(
            "{} labels, at most {MAX_LABELS} are allowed",
            meta.labels.len()
        ));
    }
    match meta
        .labels
        .iter()
        .find(|(key, value)| key.len() > MAX_TEXT || value.len() > MAX_TEXT)
    {
        Some(_) => Err(format!("a label longer than {MAX_TEXT} bytes")),
        None => Ok(()),
    }
}

/// Whether a namespace or a name can be one: any UTF-8 of a length, without control characters.
///
/// # Errors
/// Why not.
pub fn check_name(text: &str) -> Result<(), String> {
    if text.len() > MAX_NAME {
        return Err(format!("has {} bytes, at most {MAX_NAME} are allowed", text.len()));
    }
    match text.chars().find(|c| c.is_control()) {
        Some(c) => Err(format!("holds a control character: {c:?}")),
        None => Ok(()),
    }
}

/// A spec as agents get it.
fn spec(spec: &ProcSpec) -> Result<Spec, String> {
    let (identity, control, policy) = (&spec.identity, &spec.control, spec.policy());
    let resource = &spec.resource;
    // Absent, and what no clock can count, mean the default.
    let seconds = |number: Option<i64>| number.and_then(|number| u32::try_from(number).ok());
    let limit = |number: Option<f64>| number.filter(|number| *number > 0.0).unwrap_or(0.0);
    let texts = [
        ("identity.proc_name", &identity.proc_name),
        ("identity.setup_path", &identity.setup_path),
        ("identity.pid_path", &identity.pid_path),
        ("identity.config_path", &identity.config_path),
        ("identity.log_path", &identity.log_path),
        ("identity.user", &identity.user),
        ("control.start_cmd", &control.start_cmd),
        ("control.stop_cmd", &control.stop_cmd),
        ("control.restart_cmd", &control.restart_cmd),
        ("control.reload_cmd", &control.reload_cmd),
        ("control.kill_cmd", &control.kill_cmd),
        ("control.version_cmd", &control.version_cmd),
        ("control.health_cmd", &control.health_cmd),
        ("monitor_policy.crontab_rule", &policy.crontab_rule),
    ];
    for (key, text) in texts {
        if text.len() > MAX_TEXT {
            return Err(format!(
                "spec.{key} has {} bytes, at most {MAX_TEXT} are allowed",
                text.len()
            ));
        }
        if text.contains('\0') {
            return Err(format!("spec.{key} holds a zero character"));
        }
    }
    Ok(Spec {
        proc_name: identity.proc_name.clone(),
        setup_path: identity.setup_path.clone(),
        pid_path: identity.pid_path.clone(),
        config_path: identity.config_path.clone(),
        log_path: identity.log_path.clone(),
        user: identity.user.clone(),
        start_cmd: control.start_cmd.clone(),
        stop_cmd: control.stop_cmd.clone(),
        restart_cmd: control.restart_cmd.clone(),
        reload_cmd: control.reload_cmd.clone(),
        kill_cmd: control.kill_cmd.clone(),
        version_cmd: control.version_cmd.clone(),
        health_cmd: control.health_cmd.clone(),
        cpu_limit: limit(resource.cpu),
        mem_limit: limit(resource.mem),
        auto_type: seconds(policy.auto_type),
        start_check_secs: seconds(policy.start_check_secs),
        stop_check_secs: seconds(policy.stop_check_secs),
        start_retries: seconds(policy.start_retries),
        start_interval: seconds(policy.start_interval),
        op_timeout: seconds(policy.op_timeout),
        crontab_rule: policy.crontab_rule.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn made(objects: Value) -> Result<ProcHeader, String> {
        let origin = Origin {
            id: TaskId::process("20261123130000", 1),
            app: "a".into(),
            tenant: String::new(),
            request_id: String::new(),
            now_ms: 1_000,
            node_id: "local".into(),
            seed: [7; 16],
        };
        let objects = serde_json::from_value(objects).unwrap();
        header(objects, origin, false, &TaskConfig::default())
    }

    fn object(ids: &[&str], op: i64) -> Value {
        json!({"meta": {"namespace": "n", "name": "p"}, "op_type": op, "agent_id_list": ids,
               "spec": {"identity": {"proc_name": "x"}, "monitor_policy": {"op_timeout": 100}}})
    }

    #[test]
    fn one_entry_for_each_key() {
        // contract: procmgr-agent-lifecycle#2
        let header = made(json!([object(&["a", "b", "a"], 0), object(&["b", "c"], 0)])).unwrap();
        let ids: Vec<&[String]> = header.groups.iter().map(|group| &group.ids[..]).collect();
        assert_eq!(ids, [&["a".to_owned(), "b".to_owned()][..], &["c".to_owned()][..]]);
        assert_eq!(header.specs.len(), 1);
        assert_eq!(header.deadline_ms, 1_000 + (100 + 5 + 5 + 60) * 1_000);
        let error = made(json!([object(&["a"], 0), object(&["a"], 1)])).unwrap_err();
        assert!(error.contains("element 1") && error.contains("a:n:p"), "{error}");
    }

    #[test]
    fn mistakes_are_named() {
        for (objects, words) in [
            (json!([]), "no hosts"),
            (json!([object(&[], 0)]), "no hosts"),
            (json!([{"meta": {"namespace": "n"}, "op_type": 0}]), "meta.name"),
            (
                json!([{"meta": {"namespace": "n", "name": "a\nb"}, "op_type": 0}]),
                "control character",
            ),
            (
                json!([{"meta": {"namespace": "n", "name": "p"}, "agent_id_list": ["a"]}]),
                "op_type",
            ),
            (
                json!([{"meta": {"namespace": "n", "name": "x".repeat(600)}, "op_type": 0}]),
                "600 bytes",
            ),
        ] {
            let error = made(objects.clone()).unwrap_err();
            assert!(error.contains(words), "{objects}: {error}");
        }
        // contract: procmgr-agent-lifecycle#7
        assert_eq!(made(json!([object(&["a"], 1 << 40)])).unwrap().groups[0].op_type, -1);
    }
}
