//! `gse run`: submit a script as a platform would, follow it, show what it printed.

pub mod board;
pub mod script;
pub mod show;

use std::time::Duration;

use anyhow::{Context, bail};
use gse_proto::http::{Route, RowsReply, ScriptResultQuery, ScriptRow, TaskIdReply};
use rand::RngExt;
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use self::board::Board;
use self::script::{Script, check_user};
use self::show::{Mode, Show};
use crate::args::{Format, RunArgs};
use crate::client::{Api, MAX_ROWS, Patience, Settings};
use crate::outcome::{EXIT_INTERRUPTED, exit_status};
use crate::targets::Targets;
use crate::text::one_line;
use crate::{out, task};

/// First pause between two polls; it grows while nothing happens.
const POLL_MIN: Duration = Duration::from_millis(200);
/// Longest pause.
const POLL_MAX: Duration = Duration::from_secs(2);
/// What servers may need beyond the time-out of the script to say how it ended.
const GRACE: Duration = Duration::from_secs(300);
/// The longest a task may take when the servers decide.
const LONGEST: Duration = Duration::from_secs(259_200);

/// Runs the command and gives the exit status.
///
/// # Errors
/// The submit was refused, or the servers do not answer any more.
pub async fn run(args: &RunArgs) -> anyhow::Result<u8> {
    let targets = Targets::parse(&args.targets)?;
    let settings = Settings::load(&args.server)?;
    let user = args.user.clone().unwrap_or_else(|| settings.user.clone());
    check_user(&user)?;
    let script = Script::of(args.script.as_deref(), &args.command)?;
    let api = Api::new(&settings)?;
    let targets = targets.resolve(&api).await?;
    // Caught before the submit, so that a task that was started can always be stopped.
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?;

    let body = script.body(&targets, &user, args.timeout, &unique());
    let reply: TaskIdReply = api.call(Route::ExecuteScript, &body).await?;
    drop(body);
    let task_id = reply.result.task_id;
    if args.detach {
        match args.output {
            Format::Text => out::print(&format!("{task_id}\n"))?,
            Format::Json => out::print_json(&json!({ "task_id": task_id }))?,
        }
        return Ok(0);
    }
    let mode = match (args.output, targets.len()) {
        (Format::Json, _) => Mode::Json,
        (Format::Text, 1) => Mode::Single,
        (Format::Text, _) if args.no_fold => Mode::Lines,
        (Format::Text, _) => Mode::Fold { live: !args.quiet },
    };
    let show = Show::new(mode, args.color, targets.len());
    let timeout = if args.timeout == 0 {
        LONGEST
    } else {
        Duration::from_secs(args.timeout.into())
    };
    let mut watch = Watch {
        api: &api,
        task_id,
        board: Board::new(0, targets),
        show,
        deadline: Instant::now() + timeout + GRACE,
    };
    if !watch.follow(&mut interrupt).await? {
        watch
            .show
            .note(&format!("gse: left; the task goes on: gse task {}", watch.task_id));
        return Ok(EXIT_INTERRUPTED);
    }
    let status = exit_status(&watch.board.outcomes());
    watch.show.end(&watch.task_id, &watch.board, status)?;
    Ok(status)
}

fn unique() -> String {
    let bytes: [u8; 16] = rand::rng().random();
    hex::encode(bytes)
}

/// A task that is being followed.
struct Watch<'a> {
    api: &'a Api,
    task_id: String,
    board: Board,
    show: Show,
    deadline: Instant,
}

impl Watch<'_> {
    /// Polls until every target has ended. False when the user did not want to wait for that.
    async fn follow(&mut self, interrupt: &mut Signal) -> anyhow::Result<bool> {
        let mut stopping = false;
        let mut pause = POLL_MIN;
        let mut patience = Patience::default();
        loop {
            let round = tokio::select! {
                biased;
                _ = interrupt.recv() => None,
                round = self.round() => Some(round),
            };
            let mut interrupted = round.is_none();
            match round {
                None => {}
                Some(Ok(true)) => {
                    patience.answered();
                    pause = POLL_MIN;
                }
                Some(Ok(false)) => {
                    patience.answered();
                    pause = (pause * 3 / 2).min(POLL_MAX);
                }
                Some(Err(error)) => {
                    let leaving = format!("gave up on task {}, which may go on", self.task_id);
                    if let Some(line) = patience.endure(error, &leaving)? {
                        self.show.note(&line);
                    }
                    pause = POLL_MAX;
                }
            }
            if self.board.pending().is_empty() {
                return Ok(true);
            }
            if Instant::now() > self.deadline {
                bail!(
                    "task {}: some targets have not ended in time; gse task {} shows which",
                    self.task_id,
                    self.task_id
                );
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

    /// Asks about every target that has not ended. True when something has changed.
    async fn round(&mut self) -> anyhow::Result<bool> {
        let mut changed = false;
        for part in self.board.pending().chunks(MAX_ROWS) {
            let query = ScriptResultQuery {
                task_id: self.task_id.clone(),
                agent_tasks: self.board.query(part),
            };
            let reply: RowsReply<ScriptRow> = self.api.call(Route::ScriptResult, &query).await?;
            for row in reply.result {
                if let Some(news) = self.board.take(row) {
                    changed = true;
                    self.show.news(&self.board, &news)?;
                }
            }
        }
        Ok(changed)
    }

    /// Ctrl-C: the servers are asked to stop the task. False when the user pressed it again meanwhile.
    async fn ask_to_stop(&self, interrupt: &mut Signal) -> bool {
        self.show
            .note("gse: stopping the task; Ctrl-C again leaves it alone and quits");
        tokio::select! {
            biased;
            _ = interrupt.recv() => return false,
            asked = task::terminate(self.api, &self.task_id, Vec::new()) => {
                if let Err(error) = asked {
                    self.show.note(&format!("gse: cannot stop it: {}", one_line(&format!("{error:#}"))));
                }
            }
        }
        true
    }
}
