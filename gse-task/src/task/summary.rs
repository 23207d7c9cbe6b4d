//! A task as a whole: `get_task_state`, and the description for operators.

use std::collections::BTreeMap;

use gse_core::random::{HashMap, HashSet};
use gse_core::store::StoreError;
use gse_proto::codes::Inner;
use gse_proto::http::{StateCount, TaskDescribeReply, TaskStateResult, TaskTarget};
use gse_proto::session::RowStatus;
use gse_proto::state::{StoredRow, TaskHeader};

use super::store::{RowPlace, RowState, TaskStore};

/// Buckets read in one round trip.
const STEP: u32 = 8;

/// How one target stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Pending { started: bool },
    Succeeded,
    TimedOut,
    Offline,
    Restarted,
    Failed,
}

fn standing<'a>(rows: impl Iterator<Item = Option<&'a RowState>>) -> Standing {
    let mut started = false;
    let mut pending = false;
    let mut worst = Standing::Succeeded;
    for row in rows {
        match row {
            None => pending = true,
            Some(RowState { terminal: None, .. }) => {
                pending = true;
                started = true;
            }
            Some(RowState {
                terminal: Some(row), ..
            }) => {
                started = true;
                if worst == Standing::Succeeded {
                    worst = of_row(row);
                }
            }
        }
    }
    if pending { Standing::Pending { started } } else { worst }
}

fn of_row(row: &StoredRow) -> Standing {
    if row.error_code == Inner::AgentOffline.code() {
        return Standing::Offline;
    }
    match RowStatus::try_from(row.status) {
        Ok(RowStatus::Succeeded) => Standing::Succeeded,
        Ok(RowStatus::TimedOut) => Standing::TimedOut,
        Ok(RowStatus::Restarted) => Standing::Restarted,
        _ => Standing::Failed,
    }
}

/// State of a task, or of those of its targets that have one of `ids` (none given: all).
///
/// # Errors
/// When the store does not answer.
pub async fn task_state(store: &TaskStore, header: &TaskHeader, ids: &[String]) -> Result<TaskStateResult, StoreError> {
    let wanted: HashSet<&str> = ids.iter().map(String::as_str).collect();
    let mut result = TaskStateResult::default();
    let mut started = false;
    for first in (0..header.buckets).step_by(STEP as usize) {
        let range = first..(first + STEP).min(header.buckets);
        let rows = store.all_rows(&header.task_id, range.clone()).await?;
        for bucket in range {
            let Some(indexed) = store.bucket(&header.task_id, bucket).await? else {
                continue;
            };
            for index in (0..).take(indexed.len()) {
                let asked = indexed.agent_id(index).unwrap_or_default();
                if !wanted.is_empty() && !wanted.contains(asked) {
                    continue;
                }
                let list = match standing(rows_of(header, &rows, bucket, index)) {
                    Standing::Pending { started: running } => {
                        started |= running;
                        &mut result.pending_agents
                    }
                    other => {
                        started = true;
                        match other {
                            Standing::TimedOut => &mut result.timeout_agents,
                            Standing::Offline => &mut result.offline_agents,
                            Standing::Restarted => &mut result.restarted_agents,
                            Standing::Failed => &mut result.failed_agents,
                            Standing::Succeeded | Standing::Pending { .. } => &mut result.successed_agents,
                        }
                    }
                };
                list.push(asked.to_owned());
            }
        }
    }
    result.state = overall(&result, started).to_owned();
    Ok(result)
}

fn rows_of<'a>(
    header: &TaskHeader,
    rows: &'a HashMap<RowPlace, RowState>,
    bucket: u32,
    index: u32,
) -> impl Iterator<Item = Option<&'a RowState>> {
    let atomics = u32::try_from(header.atomics.len()).unwrap_or(0);
    (0..atomics).map(move |atomic| rows.get(&RowPlace { bucket, index, atomic }))
}

fn overall(result: &TaskStateResult, started: bool) -> &'static str {
    if !result.pending_agents.is_empty() {
        return if started { "executing" } else { "pending" };
    }
    let failed = [&result.failed_agents, &result.offline_agents, &result.restarted_agents];
    if failed.iter().any(|list| !list.is_empty()) {
        "failed"
    } else if !result.timeout_agents.is_empty() {
        "timeout"
    } else {
        "successed"
    }
}

/// What a task is, how its rows stand, and `limit` of its targets from `start` on.
///
/// # Errors
/// When the store does not answer.
pub async fn describe(
    store: &TaskStore,
    header: &TaskHeader,
    start: u32,
    limit: u32,
) -> Result<TaskDescribeReply, StoreError> {
    let mut counts: BTreeMap<(i32, i32), u64> = BTreeMap::new();
    let mut targets = Vec::new();
    let mut position = 0_u32;
    let mut terminal_or_running = 0_u64;
    for first in (0..header.buckets).step_by(STEP as usize) {
        let range = first..(first + STEP).min(header.buckets);
        for row in store.all_rows(&header.task_id, range.clone()).await?.values() {
            let state = match (&row.terminal, &row.running) {
                (Some(row), _) => (row.error_code, row.status),
                (None, Some(_)) => (Inner::Running.code(), 1),
                (None, None) => continue,
            };
            terminal_or_running += 1;
            *counts.entry(state).or_default() += 1;
        }
        for bucket in range {
            let Some(all) = store.targets(&header.task_id, bucket).await? else {
                continue;
            };
            for target in all.targets {
                if position >= start && targets.len() < limit as usize {
                    targets.push(TaskTarget {
                        bk_agent_id: target.agent_id,
                        bk_container_id: target.container_id,
                        user: target.user,
                    });
                }
                position += 1;
            }
        }
    }
    let all = u64::from(header.targets) * header.atomics.len() as u64;
    if all > terminal_or_running {
        *counts.entry((Inner::Running.code(), 0)).or_default() += all - terminal_or_running;
    }
    Ok(TaskDescribeReply {
        task_id: header.task_id.clone(),
        app: header.app.clone(),
        created_at: header.created_at_ms,
        deadline: header.deadline_ms,
        atomic_task_ids: header.atomics.iter().map(|atomic| atomic.id).collect(),
        target_count: header.targets,
        states: counts
            .into_iter()
            .map(|((error_code, status), count)| StateCount {
                error_code,
                status,
                count,
            })
            .collect(),
        targets,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(status: i32, error_code: i32) -> RowState {
        RowState {
            terminal: Some(StoredRow {
                status,
                error_code,
                ..Default::default()
            }),
            running: None,
        }
    }

    #[test]
    fn the_five_words() {
        // contract: v2-http-task#57, procmgr-agent-lifecycle#60
        let running = RowState {
            running: Some(StoredRow::default()),
            terminal: None,
        };
        let (ok, bad, gone) = (row(2, 0), row(5, 0), row(5, 117));
        assert_eq!(
            standing([Some(&ok), None].into_iter()),
            Standing::Pending { started: true }
        );
        assert_eq!(standing([None, None].into_iter()), Standing::Pending { started: false });
        assert_eq!(
            standing([Some(&running)].into_iter()),
            Standing::Pending { started: true }
        );
        assert_eq!(standing([Some(&ok), Some(&bad)].into_iter()), Standing::Failed);
        assert_eq!(standing([Some(&gone)].into_iter()), Standing::Offline);
        assert_eq!(standing([Some(&row(3, 0))].into_iter()), Standing::TimedOut);
        assert_eq!(standing([Some(&row(6, -1))].into_iter()), Standing::Restarted);

        let mut result = TaskStateResult::default();
        assert_eq!(overall(&result, true), "successed");
        result.timeout_agents.push("a".into());
        assert_eq!(overall(&result, true), "timeout");
        result.failed_agents.push("b".into());
        assert_eq!(overall(&result, true), "failed");
        result.pending_agents.push("c".into());
        assert_eq!(overall(&result, true), "executing");
        assert_eq!(overall(&result, false), "pending");
    }
}
