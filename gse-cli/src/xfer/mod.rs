//! `gse cp` and `gse xfer`: copying files to agents, from here or from other agents, and looking at what is under way.

pub mod board;
mod open;
pub mod place;
mod show;

use std::time::Duration;

use anyhow::{Context, bail};
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};
use gse_proto::http::{
    AgentEndpoint, Route, RowsReply, TaskIdReply, TerminateTask, TransferResultQuery, TransferRow, XferListReply,
    XferListRequest,
};
use gse_proto::ids::TaskId;
use serde::Deserialize;
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use self::board::{Report, bytes, exit_status, is_over, progress, summary, totals};
use self::place::{Destination, Manner, Source, bodies};
use self::show::Show;
use crate::args::{CpArgs, Format, ListFormat, XferArgs, XferCommand, XferListArgs, XferShowArgs, XferStopArgs};
use crate::client::{Api, Patience, Settings, data_dir};
use crate::outcome::EXIT_INTERRUPTED;
use crate::run::script::check_user;
use crate::targets::Targets;
use crate::text::one_line;
use crate::{agents, out, when};

/// First pause between two polls; it grows while nothing happens.
const POLL_MIN: Duration = Duration::from_millis(150);
/// Longest pause.
const POLL_MAX: Duration = Duration::from_secs(2);
/// What servers may need beyond the time-out to say how it ended.
const GRACE: Duration = Duration::from_secs(60);
/// The longest a task may take when the servers decide.
const LONGEST: Duration = Duration::from_secs(259_200);

/// `gse cp`; gives the exit status.
///
/// # Errors
/// Something can't be read, the call was refused, or the servers do not answer any more.
pub async fn copy(args: &CpArgs) -> anyhow::Result<u8> {
    let Some((to, from)) = args.words.split_last().filter(|(_, from)| !from.is_empty()) else {
        bail!("say what to copy, and where to: gse cp FILE... TARGETS:DIR");
    };
    let to = Destination::parse(to)?;
    let settings = Settings::load(&args.server)?;
    let user = args.user.clone().unwrap_or_else(|| settings.user.clone());
    check_user(&user)?;
    let local = args.from.clone().or_else(|| local_agent(args));
    let sources: Vec<Source> = from
        .iter()
        .map(|word| Source::parse(word, local.as_deref()))
        .collect::<anyhow::Result<_>>()?;
    let api = Api::new(&settings)?;
    let ids = to.targets.resolve(&api).await?;
    let manner = Manner {
        user,
        owner: args.owner.clone().unwrap_or_default(),
        mode: args.mode.unwrap_or_default(),
        limit: i64::from(args.limit),
        timeout: args.timeout,
        make_dirs: !args.no_mkdir,
    };
    let (push, transfer) = bodies(sources, &ids, &to.dir, &manner);
    // Caught before the submit, so that a task that was started can always be stopped.
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?;
    let mut tasks = Vec::new();
    if let Some(body) = push {
        let reply: TaskIdReply = api.call(Route::PushFile, &body).await?;
        tasks.push(reply.result.task_id);
    }
    if let Some(body) = transfer {
        let reply: anyhow::Result<TaskIdReply> = api.call(Route::TransferFile, &body).await;
        match reply {
            Ok(reply) => tasks.push(reply.result.task_id),
            Err(error) => {
                for task in &tasks {
                    out::note(&format!("gse: the small files are on their way: gse xfer show {task}"));
                }
                return Err(error);
            }
        }
    }
    if args.detach {
        match args.output {
            Format::Text => out::print(&format!("{}\n", tasks.join("\n")))?,
            Format::Json => out::print_json(&json!({ "task_ids": tasks }))?,
        }
        return Ok(0);
    }
    let timeout = match args.timeout {
        0 => LONGEST,
        seconds => Duration::from_secs(seconds.into()),
    };
    let mut watch = Watch {
        api: &api,
        tasks,
        rows: Vec::new(),
        show: Show::new(args.quiet || args.output == Format::Json),
        deadline: Instant::now() + timeout + GRACE,
    };
    if !watch.follow(&mut interrupt).await? {
        for task in &watch.tasks {
            watch.show.note(&format!(
                "gse: left; it goes on: gse xfer show {task}, gse xfer stop {task}"
            ));
        }
        return Ok(EXIT_INTERRUPTED);
    }
    watch.show.clear();
    let status = exit_status(&watch.rows);
    match args.output {
        Format::Json => out::print_json(&Report {
            task_ids: &watch.tasks,
            exit_status: status,
            rows: &watch.rows,
        })?,
        Format::Text => {
            for line in summary(&watch.rows) {
                out::note(&line);
            }
        }
    }
    Ok(status)
}

#[derive(Deserialize)]
struct Identity {
    agent_id: String,
}

/// The agent that `gse up` runs on this machine, if the command is about that site.
fn local_agent(args: &CpArgs) -> Option<String> {
    if args.server.api.is_some() {
        return None;
    }
    let file = data_dir(&args.server.data).ok()?.join("up.toml");
    let text = std::fs::read_to_string(file).ok()?;
    toml::from_str::<Identity>(&text).ok().map(|identity| identity.agent_id)
}

/// File tasks that are being followed.
struct Watch<'a> {
    api: &'a Api,
    tasks: Vec<String>,
    rows: Vec<TransferRow>,
    show: Show,
    deadline: Instant,
}

impl Watch<'_> {
    /// Polls until every row is over. False when the user did not want to wait for that.
    async fn follow(&mut self, interrupt: &mut Signal) -> anyhow::Result<bool> {
        let mut stopping = false;
        let mut pause = POLL_MIN;
        let mut patience = Patience::default();
        loop {
            let asked = Instant::now();
            let round = tokio::select! {
                biased;
                _ = interrupt.recv() => None,
                rows = all_rows(self.api, &self.tasks) => Some(rows),
            };
            let mut interrupted = round.is_none();
            match round {
                None => {}
                Some(Ok(rows)) => {
                    patience.answered();
                    let before = totals(&self.rows);
                    self.rows = rows;
                    let now = totals(&self.rows);
                    self.show.rows(&self.rows);
                    if self.rows.iter().all(is_over) {
                        return Ok(true);
                    }
                    // An answer with very many rows is not asked for all the time.
                    let least = POLL_MIN.max(asked.elapsed() * 2);
                    pause = if now == before {
                        (pause * 3 / 2).min(POLL_MAX)
                    } else {
                        least.min(POLL_MAX)
                    };
                }
                Some(Err(error)) => {
                    if let Some(line) = patience.endure(error, "gave up; what was asked for may go on")? {
                        self.show.note(&line);
                    }
                    pause = POLL_MAX;
                }
            }
            if Instant::now() > self.deadline {
                let hints: Vec<String> = self.tasks.iter().map(|task| format!("gse xfer show {task}")).collect();
                bail!("not over in time; how it stands: {}", hints.join(", "));
            }
            if !interrupted {
                interrupted = tokio::select! {
                    biased;
                    _ = interrupt.recv() => true,
                    () = tokio::time::sleep(pause) => false,
                };
            }
            if interrupted {
                if stopping || !self.ask_to_stop(interrupt).await {
                    return Ok(false);
                }
                stopping = true;
                pause = POLL_MIN;
            }
        }
    }

    /// Ctrl-C: the servers are asked to stop the tasks. False when the user pressed it again meanwhile.
    async fn ask_to_stop(&self, interrupt: &mut Signal) -> bool {
        self.show.note(&format!(
            "gse: stopping {}; Ctrl-C again leaves it alone and quits",
            self.tasks.join(" ")
        ));
        for task in &self.tasks {
            tokio::select! {
                biased;
                _ = interrupt.recv() => return false,
                asked = terminate(self.api, task, vec![]) => if let Err(error) = asked {
                    let error = one_line(&format!("{error:#}"));
                    self.show.note(&format!("gse: cannot stop it: {error}; later: gse xfer stop {task}"));
                }
            }
        }
        true
    }
}

async fn all_rows(api: &Api, tasks: &[String]) -> anyhow::Result<Vec<TransferRow>> {
    let mut rows = Vec::new();
    for task in tasks {
        let query = TransferResultQuery {
            task_id: task.clone(),
            ..TransferResultQuery::default()
        };
        let reply: RowsReply<TransferRow> = api.call(Route::TransferResult, &query).await?;
        rows.extend(reply.result);
    }
    Ok(rows)
}

/// Asks the servers to end a file task. No agents: all of it.
async fn terminate(api: &Api, task: &str, agents: Vec<AgentEndpoint>) -> anyhow::Result<()> {
    let body = TerminateTask {
        task_id: task.to_owned(),
        agents,
    };
    let _: TaskIdReply = api.call(Route::TerminateTransfer, &body).await?;
    Ok(())
}

/// `gse xfer`; gives the exit status.
///
/// # Errors
/// The servers cannot be asked, or do not know the task.
pub async fn run(args: &XferArgs) -> anyhow::Result<u8> {
    match &args.what {
        XferCommand::Ls(args) => list(args).await,
        XferCommand::Show(args) => show(args).await,
        XferCommand::Stop(args) => stop(args).await,
        XferCommand::Open(args) => open::open(args).await,
        XferCommand::Close(args) => open::close(args).await,
        XferCommand::Torrent(args) => open::torrent(args).await,
    }
}

async fn list(args: &XferListArgs) -> anyhow::Result<u8> {
    let api = Api::new(&Settings::load(&args.server)?)?;
    let request = XferListRequest { limit: args.last };
    let reply: XferListReply = api.call(Route::XferList, &request).await?;
    if args.output == ListFormat::Json {
        out::print_json(&reply.tasks)?;
        return Ok(0);
    }
    if reply.tasks.is_empty() {
        out::note("gse: no files are on their way");
        return Ok(0);
    }
    let now = when::now_ms();
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .force_no_tty()
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(["TASK", "BY", "SUBMITTED", "FIRST", "ROWS", "OVER"]);
    for task in &reply.tasks {
        let rows = u64::from(task.uploads) + u64::from(task.downloads);
        table.add_row([
            Cell::new(one_line(&task.task_id)),
            Cell::new(one_line(&task.app)),
            Cell::new(when::ago(task.created_at, now)),
            Cell::new(one_line(&task.first)),
            Cell::new(rows).set_alignment(CellAlignment::Right),
            Cell::new(task.over).set_alignment(CellAlignment::Right),
        ]);
    }
    out::print(&agents::trimmed(&table))?;
    Ok(0)
}

async fn show(args: &XferShowArgs) -> anyhow::Result<u8> {
    let id = task_id(&args.id)?;
    let api = Api::new(&Settings::load(&args.server)?)?;
    let tasks = [id];
    let rows = all_rows(&api, &tasks).await?;
    if args.output == Format::Json {
        out::print_json(&Report {
            task_ids: &tasks,
            exit_status: exit_status(&rows),
            rows: &rows,
        })?;
        return Ok(0);
    }
    let totals = totals(&rows);
    let mut text = format!(
        "task       {}\ncontent    {} of {}\nstate      {}\n\n",
        tasks[0],
        bytes(totals.moved),
        bytes(totals.bytes),
        progress(&totals)
    );
    let (table, more) = board::table(&rows);
    text += &agents::trimmed(&table);
    if more {
        text += "\nand more; --output json has all rows. What went wrong:\n";
        for line in summary(&rows).iter().skip(1) {
            text += &format!("{line}\n");
        }
    }
    out::print(&text)?;
    Ok(0)
}

async fn stop(args: &XferStopArgs) -> anyhow::Result<u8> {
    let targets = Targets::parse(&args.targets)?;
    let id = task_id(&args.id)?;
    let ids = if targets.all { Vec::new() } else { targets.ids };
    let agents: Vec<AgentEndpoint> = ids
        .into_iter()
        .map(|id| AgentEndpoint {
            bk_agent_id: id,
            ..AgentEndpoint::default()
        })
        .collect();
    let api = Api::new(&Settings::load(&args.server)?)?;
    terminate(&api, &id, agents).await?;
    out::print(&format!("{id}: asked to stop; gse xfer show {id} shows how it goes\n"))?;
    Ok(0)
}

fn task_id(text: &str) -> anyhow::Result<String> {
    match TaskId::parse(text) {
        Ok(id) => Ok(id.as_str().to_owned()),
        Err(error) => bail!("\"{}\" is no task id: {error}", one_line(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_checked_before_anybody_is_asked() {
        assert!(task_id("GSETASK:F:20250101000000:1000000").is_ok());
        for wrong in ["", "a b", "x\ny"] {
            assert!(task_id(wrong).is_err(), "{wrong:?}");
        }
    }
}
