//! `gse proc`: operating processes on hosts as a platform would, following it, and listing what the servers know of them.
//!
//! What a row of an answer means is [`rows`]'; the specification of a process is put together in [`spec`].

mod list;
pub mod rows;
pub mod spec;

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use anyhow::{Context, bail};
use gse_proto::http::Route;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use self::rows::{Answer, Report, Row, exit_status};
use crate::args::{ListFormat, ProcArgs, ProcCommand, ProcOperateArgs, SpecArgs};
use crate::client::{Api, MAX_ROWS, Patience, Settings};
use crate::outcome::EXIT_INTERRUPTED;
use crate::targets::Targets;
use crate::text::one_line;
use crate::{agents, out};

/// First pause between two polls; it grows while nothing happens.
const POLL_MIN: Duration = Duration::from_millis(200);
/// Longest pause.
const POLL_MAX: Duration = Duration::from_secs(2);
/// Longest name or namespace that is sent.
const MAX_NAME: usize = 1024;

/// What is done to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Run it and keep it alive.
    Start,
    /// End it.
    Stop,
    /// Look at it.
    Status,
    /// Keep it alive.
    Register,
    /// Keep it alive no longer.
    Unregister,
    /// Run its restart command.
    Restart,
    /// Run its reload command.
    Reload,
    /// Run its kill command.
    Kill,
}

impl Operation {
    /// The number in a call (contract procmgr-agent-lifecycle#7).
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Operation::Start => 0,
            Operation::Stop => 1,
            Operation::Status => 2,
            Operation::Register => 3,
            Operation::Unregister => 4,
            Operation::Restart => 7,
            Operation::Reload => 8,
            Operation::Kill => 9,
        }
    }
}

/// `gse proc`; gives the exit status.
///
/// # Errors
/// The call was refused, or the servers do not answer any more.
pub async fn run(args: &ProcArgs) -> anyhow::Result<u8> {
    match &args.what {
        ProcCommand::Ls(args) => list::run(args).await,
        ProcCommand::Status(args) => operate(args, Operation::Status).await,
        ProcCommand::Start(args) => operate(args, Operation::Start).await,
        ProcCommand::Stop(args) => operate(args, Operation::Stop).await,
        ProcCommand::Restart(args) => operate(args, Operation::Restart).await,
        ProcCommand::Reload(args) => operate(args, Operation::Reload).await,
        ProcCommand::Kill(args) => operate(args, Operation::Kill).await,
        ProcCommand::Register(args) => operate(args, Operation::Register).await,
        ProcCommand::Unregister(args) => operate(args, Operation::Unregister).await,
    }
}

async fn operate(args: &ProcOperateArgs, operation: Operation) -> anyhow::Result<u8> {
    let pick = &args.pick;
    let targets = Targets::parse(&pick.targets)?;
    let mut names = pick.names.clone();
    names.sort();
    names.dedup();
    for name in names.iter().chain([&pick.namespace]) {
        check_name(name)?;
    }
    let settings = Settings::load(&pick.server)?;
    let spec = read_spec(&args.spec, &settings.user).await?;
    let api = Api::new(&settings)?;
    let ids = targets.resolve(&api).await?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?;

    let mut watch = Watch {
        api: &api,
        operation,
        tasks: Vec::new(),
        bar: bar(pick.output, ids.len() * names.len()),
        deadline: Instant::now() + Duration::from_secs(pick.timeout.into()),
    };
    for ids in ids.chunks(MAX_ROWS) {
        match submit(&api, operation, &pick.namespace, &names, ids, spec.as_ref()).await {
            Ok(task) => watch.tasks.push(task),
            // What was asked of the hosts before is shown, or else nobody would know of it.
            Err(error) if watch.tasks.is_empty() => return Err(error),
            Err(error) => {
                let why = format!("{error:#}");
                watch.tasks.push(Task::refused(&pick.namespace, &names, ids, &why));
            }
        }
    }
    let followed = watch.follow(&mut interrupt).await;
    if let Some(bar) = &watch.bar {
        bar.finish_and_clear();
    }
    let waited = followed?;
    let rows: Vec<&Row> = watch.tasks.iter().flat_map(|task| task.rows.values()).collect();
    let status = if waited {
        exit_status(&rows, operation)
    } else {
        EXIT_INTERRUPTED
    };
    match pick.output {
        ListFormat::Json => {
            let task_ids = watch.tasks.iter().filter_map(|task| task.id.as_deref()).collect();
            out::print_json(&Report::new(task_ids, status, &rows))?;
        }
        ListFormat::Table => out::print(&agents::trimmed(&rows::table(&rows, operation)))?,
    }
    if rows.iter().any(|row| !row.is_over()) {
        out::note("gse: not over; it goes on, and gse proc status shows how it is then");
    }
    Ok(status)
}

fn check_name(name: &str) -> anyhow::Result<()> {
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        bail!("\"{}\" is no name of a process or namespace", one_line(name));
    }
    Ok(())
}

/// Reads the specification; the file may be a terminal, so not on this thread.
async fn read_spec(args: &SpecArgs, user: &str) -> anyhow::Result<Option<Value>> {
    let (args, user) = (args.clone(), user.to_owned());
    let read = tokio::task::spawn_blocking(move || spec::read(&args, &user)).await;
    read.context("reading the specification has crashed")?
}

#[derive(Deserialize)]
struct TaskId {
    task_id: String,
}

async fn submit(
    api: &Api,
    operation: Operation,
    namespace: &str,
    names: &[String],
    ids: &[String],
    spec: Option<&Value>,
) -> anyhow::Result<Task> {
    let element = |name: &String| {
        let mut element = json!({
            "meta": { "namespace": namespace, "name": name },
            "op_type": operation.number(),
            "agent_id_list": ids,
        });
        if let Some(spec) = spec {
            element["spec"] = spec.clone();
        }
        element
    };
    let body = json!({ "proc_operate_req": names.iter().map(element).collect::<Vec<_>>() });
    let reply: TaskId = api.call(Route::OperateProcMulti, &body).await?;
    if reply.task_id.is_empty() {
        bail!("the servers have taken it, but have not said under which id");
    }
    Ok(Task::new(Some(reply.task_id), namespace, names, ids))
}

/// One task at the servers, with what is known of its rows.
struct Task {
    /// None if it was refused.
    id: Option<String>,
    rows: BTreeMap<String, Row>,
}

impl Task {
    fn new(id: Option<String>, namespace: &str, names: &[String], ids: &[String]) -> Self {
        let rows = ids.iter().flat_map(|agent| {
            names.iter().map(move |name| {
                let row = Row::new(agent, namespace, name);
                (row.key(), row)
            })
        });
        Self {
            id,
            rows: rows.collect(),
        }
    }

    fn refused(namespace: &str, names: &[String], ids: &[String], why: &str) -> Self {
        let mut task = Self::new(None, namespace, names, ids);
        task.rows.values_mut().for_each(|row| row.refuse(why));
        task
    }

    fn is_over(&self) -> bool {
        self.rows.values().all(Row::is_over)
    }
}

/// Tasks that are being followed.
struct Watch<'a> {
    api: &'a Api,
    operation: Operation,
    tasks: Vec<Task>,
    bar: Option<ProgressBar>,
    deadline: Instant,
}

impl Watch<'_> {
    /// Polls until every row is over or the time is up. False when the user did not want to wait for that.
    async fn follow(&mut self, interrupt: &mut Signal) -> anyhow::Result<bool> {
        let mut pause = POLL_MIN;
        let mut patience = Patience::default();
        loop {
            let asked = Instant::now();
            let round = tokio::select! {
                biased;
                _ = interrupt.recv() => return Ok(false),
                round = self.round() => round,
            };
            match round {
                Ok(changed) => {
                    patience.answered();
                    // An answer with very many rows is not asked for all the time.
                    let least = POLL_MIN.max(asked.elapsed() * 2);
                    pause = if changed { least } else { pause * 3 / 2 }.min(POLL_MAX);
                }
                Err(error) => {
                    let leaving = "gave up; what was asked for may go on: gse proc status";
                    if let Some(line) = patience.endure(error, leaving)? {
                        self.note(&line);
                    }
                    pause = POLL_MAX;
                }
            }
            let now = Instant::now();
            if self.tasks.iter().all(Task::is_over) || now >= self.deadline {
                return Ok(true);
            }
            tokio::select! {
                biased;
                _ = interrupt.recv() => return Ok(false),
                () = tokio::time::sleep(pause.min(self.deadline - now)) => {}
            }
        }
    }

    /// Asks about every task that is not over. True when something has changed.
    async fn round(&mut self) -> anyhow::Result<bool> {
        let mut changed = 0;
        for task in self.tasks.iter_mut().filter(|task| !task.is_over()) {
            let Some(id) = &task.id else { continue };
            let body = json!({ "task_id": id });
            let answers: BTreeMap<String, Answer> = self.api.call(Route::ProcResult, &body).await?;
            for (key, row) in &mut task.rows {
                if let Some(answer) = answers.get(key)
                    && !row.is_over()
                {
                    row.take(answer, self.operation);
                    changed += u64::from(row.is_over());
                }
            }
        }
        if let Some(bar) = &self.bar {
            bar.inc(changed);
        }
        Ok(changed > 0)
    }

    fn note(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| out::note(line)),
            None => out::note(line),
        }
    }
}

/// Progress on a terminal, where there is some to show.
fn bar(output: ListFormat, rows: usize) -> Option<ProgressBar> {
    let wanted = output == ListFormat::Table && rows > 1 && std::io::stderr().is_terminal();
    wanted.then(|| {
        let style = ProgressStyle::with_template("{elapsed_precise} [{bar:30}] {pos}/{len}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::new(rows as u64).with_style(style.progress_chars("=> "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_and_name_has_a_row_under_the_key_of_the_contract() {
        // contract: procmgr-agent-lifecycle#3
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let task = Task::new(None, "ns", &words(&["b", "a"]), &words(&["0:10.0.0.1", "x"]));
        let keys: Vec<&str> = task.rows.keys().map(String::as_str).collect();
        assert_eq!(keys, ["0:10.0.0.1:ns:a", "0:10.0.0.1:ns:b", "x:ns:a", "x:ns:b"]);
        assert!(!task.is_over());
        assert!(Task::refused("ns", &words(&["a"]), &words(&["x"]), "no").is_over());
    }

    #[test]
    fn names_are_looked_at_before_anybody_is_asked() {
        assert!(check_name("bkmonitorbeat_1").is_ok() && check_name("数据 1").is_ok());
        for wrong in ["", "a\nb", &"x".repeat(MAX_NAME + 1)] {
            assert!(check_name(wrong).is_err());
        }
    }
}
