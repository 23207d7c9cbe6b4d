//! From the body of a submit to what is stored: checks, limits, time-outs, order of the atomic tasks, buckets.
//!
//! What is wrong with the whole request is an error of the call. What is wrong with one target is a row of its own and never spoils
//! the others.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use gse_proto::codes::Inner;
use gse_proto::http::{AgentEndpoint, AtomicTaskSpec, ExecuteScript, Relation};
use gse_proto::ids::{AgentId, TaskId};
use gse_proto::keys;
use gse_proto::state::{StoredAtomic, StoredScript, StoredTarget, TargetBucket, TaskHeader};

use crate::config::TaskConfig;

/// Longest command: the kernel takes no longer single argument.
const MAX_COMMAND: usize = 128 * 1024 - 1;
/// Longest asked id, container id or account; far longer than any real one, so that a wrong one is a row and not an error.
const MAX_ASKED: usize = 4096;

/// A submit, checked and laid out.
#[derive(Debug)]
pub struct Plan {
    /// What is written last.
    pub header: TaskHeader,
    /// Targets by bucket.
    pub buckets: Vec<TargetBucket>,
}

/// Who asks, and when.
#[derive(Debug, Clone)]
pub struct Origin {
    /// Application.
    pub app: String,
    /// `X-Bk-Tenant-Id`, any value.
    pub tenant: String,
    /// Of the HTTP request.
    pub request_id: String,
    /// Unix ms.
    pub now_ms: u64,
    /// Node that takes it.
    pub node_id: String,
}

/// Lays a submit out.
///
/// # Errors
/// What is wrong with it, for the caller to read.
pub fn plan(body: ExecuteScript, id: &TaskId, origin: Origin, limits: &TaskConfig) -> Result<Plan, String> {
    check_counts(&body, limits)?;
    for (n, script) in body.scripts.iter().enumerate() {
        let name = &script.script_name;
        if name.is_empty() || name.len() > 255 || matches!(name.as_str(), "." | "..") || name.contains(['/', '\0']) {
            return Err(format!(
                "scripts[{n}].script_name must be a plain file name, not {name:?}"
            ));
        }
        let dir = &script.script_store_dir;
        if !dir.starts_with('/') || dir.contains('\0') || dir.len() > 4096 {
            return Err(format!(
                "scripts[{n}].script_store_dir must be an absolute directory, not {dir:?}"
            ));
        }
    }
    let atomics = atomics(&body.atomic_tasks, &body.atomic_tasks_relations, limits)?;
    let run_ms: u64 = atomics.iter().map(|atomic| atomic.timeout_ms).sum();
    let not_after_ms = origin.now_ms + limits.start_window_ms;
    let buckets = targets(body.agents)?;
    let header = TaskHeader {
        task_id: id.as_str().to_owned(),
        created_at_ms: origin.now_ms,
        app: origin.app,
        node_id: origin.node_id,
        tenant: origin.tenant,
        scripts: body
            .scripts
            .into_iter()
            .map(|script| StoredScript {
                name: script.script_name,
                store_dir: script.script_store_dir,
                content: Bytes::from(script.script_content),
            })
            .collect(),
        atomics,
        targets: buckets
            .iter()
            .map(|bucket| u32::try_from(bucket.targets.len()).unwrap_or(u32::MAX))
            .sum(),
        buckets: u32::try_from(buckets.len()).unwrap_or(u32::MAX),
        not_after_ms,
        deadline_ms: not_after_ms + run_ms + limits.return_grace_ms,
        output_limit: limits.output_limit_bytes,
        request_id: origin.request_id,
    };
    Ok(Plan { header, buckets })
}

/// SHA-256 over scripts and commands, for the audit trail.
#[must_use]
pub fn digest(header: &TaskHeader) -> String {
    use sha2::Digest;
    let mut hash = sha2::Sha256::new();
    for script in &header.scripts {
        // Lengths in between, so that no two submits have the same text.
        hash.update((script.content.len() as u64).to_be_bytes());
        hash.update(&script.content);
    }
    for atomic in &header.atomics {
        hash.update((atomic.command.len() as u64).to_be_bytes());
        hash.update(atomic.command.as_bytes());
    }
    hex::encode(hash.finalize())
}

fn check_counts(body: &ExecuteScript, limits: &TaskConfig) -> Result<(), String> {
    let bounds = [
        ("agents", body.agents.len(), 1, limits.max_targets),
        ("scripts", body.scripts.len(), 0, limits.max_scripts),
        ("atomic_tasks", body.atomic_tasks.len(), 1, limits.max_atomics),
    ];
    for (name, count, least, most) in bounds {
        if count < least {
            return Err(format!("{name} must not be empty"));
        }
        if count > most {
            return Err(format!("{name} has {count} entries, at most {most} are allowed"));
        }
    }
    let bytes: usize = body.scripts.iter().map(|script| script.script_content.len()).sum();
    if bytes > limits.max_script_bytes {
        return Err(format!(
            "the scripts have {bytes} bytes together, at most {} are allowed",
            limits.max_script_bytes
        ));
    }
    Ok(())
}

fn atomics(tasks: &[AtomicTaskSpec], relations: &[Relation], limits: &TaskConfig) -> Result<Vec<StoredAtomic>, String> {
    let mut positions = HashMap::new();
    for (position, task) in tasks.iter().enumerate() {
        if positions.insert(task.atomic_task_id, position).is_some() {
            return Err(format!("atomic_task_id {} is given twice", task.atomic_task_id));
        }
        if task.command.trim().is_empty() || task.command.contains('\0') || task.command.len() > MAX_COMMAND {
            return Err(format!(
                "command of atomic task {} must be 1 to {MAX_COMMAND} bytes of text",
                task.atomic_task_id
            ));
        }
    }
    let mut after: Vec<HashSet<usize>> = vec![HashSet::new(); tasks.len()];
    for relation in relations {
        let find = |id: &u32| {
            positions
                .get(id)
                .copied()
                .ok_or_else(|| format!("atomic_tasks_relations names atomic task {id}, which is not in atomic_tasks"))
        };
        let dependent = find(&relation.atomic_task_id)?;
        for id in &relation.atomic_task_id_idx {
            after[dependent].insert(find(id)?);
        }
    }
    check_acyclic(&after)?;
    let most = limits.max_timeout_s;
    Ok(tasks
        .iter()
        .zip(after)
        .map(|(task, after)| {
            let timeout_s = u64::try_from(task.timeout_seconds)
                .ok()
                .filter(|seconds| (1..=most).contains(seconds));
            let mut after: Vec<u32> = after.into_iter().filter_map(|n| u32::try_from(n).ok()).collect();
            after.sort_unstable();
            StoredAtomic {
                id: task.atomic_task_id,
                command: task.command.clone(),
                timeout_ms: timeout_s.unwrap_or(most) * 1000,
                after,
            }
        })
        .collect())
}

fn check_acyclic(after: &[HashSet<usize>]) -> Result<(), String> {
    let mut done = vec![false; after.len()];
    loop {
        let next = (0..after.len()).find(|n| !done[*n] && after[*n].iter().all(|before| done[*before]));
        match next {
            Some(n) => done[n] = true,
            None if done.iter().all(|d| *d) => return Ok(()),
            None => return Err("atomic_tasks_relations go in a circle".into()),
        }
    }
}

fn targets(agents: Vec<AgentEndpoint>) -> Result<Vec<TargetBucket>, String> {
    let count = keys::buckets_for(agents.len());
    let mut buckets = vec![TargetBucket::default(); count as usize];
    let mut seen = HashSet::with_capacity(agents.len());
    for (n, agent) in agents.into_iter().enumerate() {
        if agent.bk_agent_id.len() > MAX_ASKED
            || agent.bk_container_id.len() > MAX_ASKED
            || agent.user.len() > MAX_ASKED
        {
            return Err(format!(
                "agents[{n}]: bk_agent_id, bk_container_id and user have at most {MAX_ASKED} bytes"
            ));
        }
        // The same endpoint twice is one target: it has one row, and must not run twice.
        let container = agent.container().unwrap_or_default().to_owned();
        if !seen.insert((agent.bk_agent_id.clone(), container.clone())) {
            continue;
        }
        let (refused_code, refused_msg) = refusal(&agent);
        buckets[keys::bucket_of(&agent.bk_agent_id, count) as usize]
            .targets
            .push(StoredTarget {
                agent_id: agent.bk_agent_id,
                container_id: container,
                user: agent.user,
                refused_code,
                refused_msg,
            });
    }
    Ok(buckets)
}

/// Why a target can't be served whatever its agent says; code 0: it can.
fn refusal(agent: &AgentEndpoint) -> (i32, String) {
    if let Err(error) = AgentId::parse(&agent.bk_agent_id) {
        return (
            Inner::AgentOffline.code(),
            format!("no agent has the id {:?}: {error}", agent.bk_agent_id),
        );
    }
    if agent.container().is_some() {
        let text = "scripts inside containers are not supported; leave bk_container_id empty to run on the host";
        return (Inner::Arguments.code(), text.into());
    }
    if !agent.pwd.is_empty() {
        let text = "passwords are for Windows accounts, and Windows agents are not supported; leave pwd empty";
        return (Inner::WindowsPassword.code(), text.into());
    }
    if agent.user.is_empty() || agent.user.contains('\0') {
        return (Inner::NoSuchUser.code(), "no OS account was given; set user".into());
    }
    (0, String::new())
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::http::ScriptFile;

    fn body() -> ExecuteScript {
        ExecuteScript {
            agents: vec![endpoint("0:10.0.0.1"), endpoint("agent-2")],
            scripts: vec![ScriptFile {
                script_name: "bk_gse_script_1.sh".into(),
                script_store_dir: "/tmp/bkjob/root".into(),
                script_content: "true".into(),
            }],
            atomic_tasks: vec![task(0, 60)],
            atomic_tasks_relations: vec![],
        }
    }

    fn endpoint(id: &str) -> AgentEndpoint {
        AgentEndpoint {
            bk_agent_id: id.into(),
            user: "root".into(),
            ..Default::default()
        }
    }

    fn task(id: u32, timeout: i64) -> AtomicTaskSpec {
        AtomicTaskSpec {
            atomic_task_id: id,
            command: "/tmp/bkjob/root/bk_gse_script_1.sh".into(),
            timeout_seconds: timeout,
        }
    }

    fn relation(id: u32, after: &[u32]) -> Relation {
        Relation {
            atomic_task_id: id,
            atomic_task_id_idx: after.to_vec(),
        }
    }

    fn lay_out(body: ExecuteScript) -> Result<Plan, String> {
        let origin = Origin {
            app: "bk_job".into(),
            tenant: String::new(),
            request_id: "r".into(),
            now_ms: 1_000_000,
            node_id: "local".into(),
        };
        plan(
            body,
            &TaskId::script("20261122000000", 1),
            origin,
            &TaskConfig::default(),
        )
    }

    #[test]
    fn all_shapes_of_relations() {
        // contract: v2-http-task#28
        let mut job = body();
        job.atomic_tasks = vec![task(0, 60), task(1, 60), task(2, 60)];
        for (relations, expect) in [
            (vec![], vec![vec![], vec![], vec![]]),
            (vec![relation(0, &[])], vec![vec![], vec![], vec![]]),
            (
                vec![relation(1, &[0]), relation(2, &[0, 1])],
                vec![vec![], vec![0], vec![0, 1]],
            ),
        ] {
            job.atomic_tasks_relations = relations;
            let plan = lay_out(job.clone()).unwrap();
            assert_eq!(
                plan.header.atomics.iter().map(|a| a.after.clone()).collect::<Vec<_>>(),
                expect
            );
        }
        for wrong in [
            vec![relation(0, &[1]), relation(1, &[0])],
            vec![relation(0, &[0])],
            vec![relation(7, &[0])],
            vec![relation(0, &[7])],
        ] {
            job.atomic_tasks_relations = wrong;
            assert!(lay_out(job.clone()).is_err());
        }
    }

    #[test]
    fn relation_values_are_ids_not_indexes() {
        let mut body = body();
        body.atomic_tasks = vec![task(7, 60), task(3, 60)];
        body.atomic_tasks_relations = vec![relation(7, &[3])];
        let plan = lay_out(body).unwrap();
        assert_eq!(plan.header.atomics[0].after, [1]);
        assert!(plan.header.atomics[1].after.is_empty());
    }

    #[test]
    fn no_limit_means_the_configured_maximum() {
        for (given, expect) in [
            (0, 259_200),
            (-5, 259_200),
            (10, 10),
            (259_200, 259_200),
            (1 << 40, 259_200),
        ] {
            let mut body = body();
            body.atomic_tasks = vec![task(0, given)];
            assert_eq!(lay_out(body).unwrap().header.atomics[0].timeout_ms, expect * 1000);
        }
    }

    #[test]
    fn a_bad_target_is_a_row_and_a_bad_request_is_an_error() {
        // contract: v2-http-task#19
        let mut mixed = body();
        mixed.agents.push(endpoint(""));
        mixed.agents.push(AgentEndpoint {
            bk_container_id: "ab12".into(),
            ..endpoint("agent-3")
        });
        mixed.agents.push(AgentEndpoint {
            pwd: "secret".into(),
            ..endpoint("agent-4")
        });
        mixed.agents.push(AgentEndpoint {
            user: String::new(),
            ..endpoint("agent-5")
        });
        mixed.agents.push(endpoint("agent-2"));
        mixed.agents.push(endpoint(&"x".repeat(300)));
        let plan = lay_out(mixed).unwrap();
        let codes: Vec<i32> = plan.buckets[0].targets.iter().map(|t| t.refused_code).collect();
        assert_eq!(codes, [0, 0, 117, 106, 1326, 122, 117]);
        assert_eq!(plan.header.targets, 7);

        type Breaker = fn(&mut ExecuteScript);
        let breakers: [Breaker; 7] = [
            |b| b.agents.clear(),
            |b| b.atomic_tasks.clear(),
            |b| b.atomic_tasks.push(task(0, 1)),
            |b| b.atomic_tasks[0].command = " ".into(),
            |b| b.scripts[0].script_name = "../x".into(),
            |b| b.scripts[0].script_store_dir = "tmp".into(),
            |b| b.agents[0].bk_agent_id = "x".repeat(5000),
        ];
        for (n, breaker) in breakers.iter().enumerate() {
            let mut broken = body();
            breaker(&mut broken);
            assert!(lay_out(broken).is_err(), "breaker {n}");
        }
    }

    #[test]
    fn fifty_thousand_targets_fall_into_even_buckets() {
        // contract: v2-http-task#25
        let mut body = body();
        body.agents = (0..50_000)
            .map(|n| endpoint(&format!("0:10.{}.{}.{}", n / 65_536, n / 256 % 256, n % 256)))
            .collect();
        let plan = lay_out(body).unwrap();
        assert_eq!(plan.header.targets, 50_000);
        assert_eq!(plan.buckets.len(), 98);
        assert!(plan.buckets.iter().all(|bucket| bucket.targets.len() < 1_000));
    }
}
