//! `gse task` and `gse stop`: a task that was submitted, by this command or by a platform.

use std::collections::BTreeMap;

use anyhow::bail;
use gse_proto::http::{
    AgentEndpoint, Route, RowsReply, ScriptResultQuery, ScriptRow, TaskDescribeReply, TaskDescribeRequest, TaskIdReply,
    TerminateTask,
};
use gse_proto::ids::TaskId;
use serde_json::json;

use crate::args::{Format, StopArgs, TaskArgs};
use crate::client::{Api, MAX_ROWS, Settings};
use crate::outcome::{Outcome, exit_status};
use crate::run::board::Board;
use crate::run::show::{Report, print_folded, summary};
use crate::targets::Targets;
use crate::text::one_line;
use crate::{out, when};

/// Targets that a page of the description holds at most.
const PAGE: u32 = 1000;

/// Prints what is known of a task.
///
/// # Errors
/// The servers cannot be asked, or do not know the task.
pub async fn show(args: &TaskArgs) -> anyhow::Result<()> {
    let id = task_id(&args.id)?;
    let api = Api::new(&Settings::load(&args.server)?)?;
    let task = describe(&api, &id).await?;
    let mut boards = BTreeMap::new();
    for atomic in &task.atomic_task_ids {
        boards.insert(*atomic, rows(&api, &task, *atomic, !args.no_output).await?);
    }
    if args.output == Format::Json {
        let reports: BTreeMap<String, Report<'_>> = boards
            .iter()
            .map(|(atomic, board)| {
                (
                    atomic.to_string(),
                    Report::new(&id, board, exit_status(&board.outcomes())),
                )
            })
            .collect();
        let head = TaskDescribeReply {
            targets: Vec::new(),
            ..task.clone()
        };
        return out::print_json(&json!({ "task": head, "atomic_tasks": reports }));
    }
    let now = when::now_ms();
    let mut text = format!(
        "task       {}\nby         {}\nsubmitted  {} ({})\nover by    {}\ntargets    {}\n",
        one_line(&task.task_id),
        one_line(&task.app),
        when::utc(task.created_at),
        when::ago(task.created_at, now),
        when::utc(task.deadline),
        task.target_count,
    );
    for (atomic, board) in &boards {
        let name = if boards.len() > 1 {
            format!("atomic task {atomic}: ")
        } else {
            "states     ".to_owned()
        };
        text += &format!("{name}{}\n", states(board));
        for line in summary(board).iter().filter(|line| line.starts_with("  ")) {
            text += &format!("{line}\n");
        }
        if let [only] = board.targets()
            && only.outcome.is_over()
            && !only.outcome.is_success()
        {
            text += &format!("  {}: {}\n", one_line(&only.id), only.outcome.describe());
        }
    }
    out::print(&text)?;
    if !args.no_output {
        for (atomic, board) in &boards {
            if boards.len() > 1 {
                out::print(&format!("\natomic task {atomic}:\n"))?;
            }
            print_folded(board, args.color)?;
        }
    }
    Ok(())
}

/// How many targets are in which state.
fn states(board: &Board) -> String {
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for target in board.targets() {
        let word = match &target.outcome {
            Outcome::Running if target.row.status == 0 => "queued",
            Outcome::Exited(_) => "failed",
            Outcome::TimedOut(_) => "timed out",
            other => other.word(),
        };
        match counts.iter_mut().find(|(known, _)| *known == word) {
            Some((_, count)) => *count += 1,
            None => counts.push((word, 1)),
        }
    }
    counts
        .iter()
        .map(|(word, count)| format!("{count} {word}"))
        .collect::<Vec<_>>()
        .join(", ")
}

/// The task with all its targets.
async fn describe(api: &Api, id: &str) -> anyhow::Result<TaskDescribeReply> {
    let mut start = 0;
    let mut task: Option<TaskDescribeReply> = None;
    loop {
        let request = TaskDescribeRequest {
            task_id: id.to_owned(),
            start,
            limit: PAGE,
        };
        let page: TaskDescribeReply = api.call(Route::TaskDescribe, &request).await?;
        let came = u32::try_from(page.targets.len()).unwrap_or(u32::MAX);
        let whole = match &mut task {
            None => task.insert(page),
            Some(task) => {
                task.targets.extend(page.targets);
                task
            }
        };
        start = start.saturating_add(came);
        if came == 0 || start >= whole.target_count {
            return Ok(std::mem::take(whole));
        }
    }
}

/// The rows of one atomic task, with the outputs or without.
async fn rows(api: &Api, task: &TaskDescribeReply, atomic: u32, outputs: bool) -> anyhow::Result<Board> {
    let targets = task
        .targets
        .iter()
        .map(|target| (target.bk_agent_id.clone(), target.bk_container_id.clone()));
    let mut board = Board::with_containers(atomic, targets);
    let mut ask: Vec<usize> = board.pending();
    // A row whose output did not fit into the answer stays "in progress" until it has been read to its end.
    while !ask.is_empty() {
        let mut again = Vec::new();
        for part in ask.chunks(MAX_ROWS) {
            let mut query = board.query(part);
            if !outputs {
                // Past every end there is no output left, so that rows show their true state.
                query
                    .iter_mut()
                    .flat_map(|agent| &mut agent.atomic_tasks)
                    .for_each(|atomic| atomic.offset = 1 << 40);
            }
            let query = ScriptResultQuery {
                task_id: task.task_id.clone(),
                agent_tasks: query,
            };
            let reply: RowsReply<ScriptRow> = api.call(Route::ScriptResult, &query).await?;
            again.extend(
                reply
                    .result
                    .into_iter()
                    .filter_map(|row| board.take(row))
                    .filter(|news| !news.ended)
                    .map(|news| news.target),
            );
        }
        ask = again;
    }
    Ok(board)
}

/// Asks the servers to stop a task.
///
/// # Errors
/// The servers cannot be asked, or do not know the task.
pub async fn stop(args: &StopArgs) -> anyhow::Result<()> {
    let targets = Targets::parse(&args.targets)?;
    let id = task_id(&args.id)?;
    // To the servers no agents are all of them.
    let ids = if targets.all { Vec::new() } else { targets.ids };
    let agents: Vec<AgentEndpoint> = ids
        .into_iter()
        .map(|id| AgentEndpoint {
            bk_agent_id: id,
            ..Default::default()
        })
        .collect();
    let api = Api::new(&Settings::load(&args.server)?)?;
    let count = agents.len();
    terminate(&api, &id, agents).await?;
    let on = if count == 0 {
        "all its targets".to_owned()
    } else {
        format!("{count} of its targets")
    };
    out::print(&format!(
        "{id}: asked to stop on {on}; gse task {id} shows how it goes\n"
    ))?;
    Ok(())
}

/// The call behind `gse stop` and Ctrl-C. No agents: all of them.
///
/// # Errors
/// As [`stop`].
pub async fn terminate(api: &Api, id: &str, agents: Vec<AgentEndpoint>) -> anyhow::Result<()> {
    let body = TerminateTask {
        task_id: id.to_owned(),
        agents,
    };
    let _: TaskIdReply = api.call(Route::TerminateScript, &body).await?;
    Ok(())
}

fn task_id(text: &str) -> anyhow::Result<String> {
    match TaskId::parse(text) {
        Ok(id) => Ok(id.as_str().to_owned()),
        Err(error) => bail!("\"{}\" is no task id: {error}", one_line(text)),
    }
}
