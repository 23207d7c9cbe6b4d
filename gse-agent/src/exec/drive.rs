//! Takes one target from the queue to its last row: waits for a turn, starts a runner for each atomic task in order, and
//! writes the end itself where a runner cannot. Watching a runner is left to [`super::watch`], reporting to [`super::pump`].

use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gse_proto::session::Dispatch;
use tokio::process::Command;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::executor::Shared;
use super::job::{Ended, Files, Job, Outcome, ScriptFile, code};
use super::journal::Key;
use super::names::Claim;
use super::order::run_order;
use super::record::Record;
use super::room::ScriptLimits;
use super::state::StreamKey;
use super::stuck::Bounds;
use super::watch::{Leaving, watch};
use super::window::Phase;
use super::{clean, orphans};

/// Counts a target among the queued or running ones for as long as it lives.
struct Counted<'a> {
    shared: &'a Shared,
    running: bool,
}

impl<'a> Counted<'a> {
    fn new(shared: &'a Shared, running: bool) -> Self {
        let mut state = shared.state.lock();
        *(if running { &mut state.running } else { &mut state.queued }) += 1;
        drop(state);
        Self { shared, running }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        let count = if self.running {
            &mut state.running
        } else {
            &mut state.queued
        };
        *count = count.saturating_sub(1);
    }
}

/// What a target has for as long as it runs.
struct Turn {
    /// Its script files are its own.
    _files: Option<Claim>,
    /// One of the places.
    _slot: Option<OwnedSemaphorePermit>,
}

/// Runs a target that has not been started.
pub(super) async fn fresh(shared: Arc<Shared>, key: Arc<Key>, dispatch: Arc<Dispatch>, stop: CancellationToken) {
    let turn = match turn(&shared, &dispatch, &stop).await {
        Ok(Ok(turn)) => turn,
        Ok(Err(outcome)) => return finish_rest(&shared, &key, &outcome).await,
        Err(Leaving) => return,
    };
    run(shared, key, Some(dispatch), stop, turn).await;
}

/// Takes over a target that an earlier process may have started.
pub(super) async fn adopted(
    shared: Arc<Shared>,
    key: Arc<Key>,
    dispatch: Option<Arc<Dispatch>>,
    stop: CancellationToken,
) {
    // It runs whether there is a free place or not; one that is free is not given to another.
    let turn = Turn {
        _files: dispatch.as_ref().and_then(|d| shared.names.try_claim(d).ok()),
        _slot: Arc::clone(&shared.slots).try_acquire_owned().ok(),
    };
    run(shared, key, dispatch, stop, turn).await;
}

/// Waits for a place and for the server's clock.
async fn turn(
    shared: &Shared,
    dispatch: &Dispatch,
    stop: &CancellationToken,
) -> Result<Result<Turn, Outcome>, Leaving> {
    let _queued = Counted::new(shared, false);
    let mut clock = shared.clock.subscribe();
    tokio::select! {
        // Fails only when the executor is gone.
        known = clock.wait_for(Option::is_some) => drop(known.map_err(|_| Leaving)?),
        () = stop.cancelled() => return Ok(Err(Outcome::stopped("stopped before it was started"))),
        () = shared.life.draining() => return Err(Leaving),
    }
    let wait = Duration::from_millis(shared.cfg.queue_wait_ms);
    let left = match dispatch.not_after_ms {
        0 => None,
        at => Some(Duration::from_millis(
            at.saturating_sub(shared.server_now().unwrap_or(0)),
        )),
    };
    let late = || {
        Outcome::not_run(
            code::LATE,
            "not started in time: the moment after which the server did not want it started any more has passed",
        )
    };
    if left.is_some_and(|left| left.is_zero()) {
        return Ok(Err(late()));
    }
    let deadline = left.map_or(wait, |left| left.min(wait));
    tokio::select! {
        biased;
        () = stop.cancelled() => Ok(Err(Outcome::stopped("stopped before it was started"))),
        () = shared.life.draining() => Err(Leaving),
        // The files first: who waits for them takes no place from anybody.
        turn = async {
            let files = shared.names.claim(dispatch).await;
            let slot = Arc::clone(&shared.slots).acquire_owned().await.map_err(|_| Leaving)?;
            Ok(Ok(Turn { _files: Some(files), _slot: Some(slot) }))
        } => turn,
        () = tokio::time::sleep(deadline) => Ok(Err(match (left, shared.names.try_claim(dispatch)) {
            (Some(left), _) if left <= wait => late(),
            (_, Err(path)) => Outcome::not_run(code::BUSY, format!(
                "another script ran as {path} for all of the {} s that this one may wait, and the two differ; try again later, or under a name of its own",
                wait.as_secs_f64()
            )),
            (_, Ok(_)) => Outcome::not_run(code::BUSY, format!(
                "the agent is busy: {} scripts ran for all of the {} s that this one may wait; try again later",
                shared.cfg.concurrency, wait.as_secs_f64()
            )),
        })),
    }
}

/// All atomic tasks, in order.
async fn run(shared: Arc<Shared>, key: Arc<Key>, dispatch: Option<Arc<Dispatch>>, stop: CancellationToken, turn: Turn) {
    let _running = Counted::new(&shared, true);
    let count = shared.state.lock().targets.get(&key).map_or(0, |t| t.streams.len());
    let after: Vec<&[u32]> = match &dispatch {
        Some(dispatch) => dispatch.atomic_tasks.iter().map(|a| a.after.as_slice()).collect(),
        None => vec![&[]; count],
    };
    // Checked when it was accepted.
    let order = run_order(&after).unwrap_or_else(|_| (0..count).collect());
    for atomic in order.iter().copied() {
        let stream: StreamKey = (Arc::clone(&key), u32::try_from(atomic).unwrap_or(u32::MAX));
        let files = Files::new(&shared.journal.dir(&key), atomic);
        if shared
            .state
            .lock()
            .with(&stream, |s| matches!(s.phase, Phase::Ended(_)))
            .unwrap_or(true)
        {
            continue;
        }
        let started = exists(files.starting()).await;
        let result = match &dispatch {
            _ if started => watch(&shared, &stream, &files, None, None, &stop).await,
            None => Ok(Ended::without_run(Outcome::unknown(
                "the agent's record of this task is damaged: it is unknown whether it ran",
            ))),
            Some(_) if stop.is_cancelled() => Ok(Ended::without_run(Outcome::stopped("stopped before it was started"))),
            Some(dispatch) => match failed_before(&shared, &key, dispatch, atomic) {
                Some(before) => Ok(Ended::without_run(Outcome::not_run(
                    code::FAILED,
                    format!("not run: atomic task {before}, on which it depends, did not succeed"),
                ))),
                None if shared.life.is_draining() => Err(Leaving),
                None => {
                    start(
                        &shared,
                        &stream,
                        &files,
                        dispatch,
                        order.first() == Some(&atomic),
                        &stop,
                    )
                    .await
                }
            },
        };
        match result {
            Ok(ended) => {
                if let Some(dispatch) = &dispatch {
                    clean::remember(&shared, dispatch).await;
                }
                publish_end(&shared, &stream, &files, ended).await;
            }
            Err(Leaving) => return,
        }
    }
    drop(turn);
}

async fn exists(path: PathBuf) -> bool {
    tokio::task::spawn_blocking(move || path.exists())
        .await
        .unwrap_or(false)
}

/// The caller's id of a dependency that did not succeed.
fn failed_before(shared: &Shared, key: &Arc<Key>, dispatch: &Dispatch, atomic: usize) -> Option<u32> {
    let state = shared.state.lock();
    let target = state.targets.get(key)?;
    let failed = dispatch.atomic_tasks.get(atomic)?.after.iter().find(|at| {
        let phase = target.streams.get(**at as usize).map(|s| &s.phase);
        !matches!(phase, Some(Phase::Ended(end)) if end.outcome.succeeded())
    })?;
    dispatch.atomic_tasks.get(*failed as usize).map(|a| a.id)
}

fn job_of(shared: &Shared, dispatch: &Dispatch, atomic: usize, write_scripts: bool) -> Option<Job> {
    let cfg = &shared.cfg;
    let task = dispatch.atomic_tasks.get(atomic)?;
    let most = |asked: u64, max: u64| if asked == 0 { max } else { asked.min(max) };
    let scripts = dispatch.scripts.iter().map(|script| ScriptFile {
        name: script.name.clone(),
        dir: script.store_dir.clone(),
        // Later atomic tasks must find the files as the earlier ones left them; only their beginning is of interest.
        content: if write_scripts {
            script.content.to_vec()
        } else {
            script.content.iter().take(2).copied().collect()
        },
    });
    Some(Job {
        lead: cfg.self_exec.iter().skip(1).cloned().collect(),
        user: dispatch.user.clone(),
        command: task.command.clone(),
        scripts: scripts.collect(),
        write_scripts,
        script_limits: ScriptLimits {
            roots: cfg.allowed_script_dirs.clone(),
            prefix: cfg.script_prefix.clone(),
            dir_bytes: cfg.max_script_dir_bytes,
            free_bytes: cfg.min_free_disk_bytes,
        },
        timeout_ms: most(task.timeout_ms, cfg.max_timeout_ms),
        refused_timeout_ms: if task.timeout_ms > cfg.max_timeout_ms {
            task.timeout_ms
        } else {
            0
        },
        control_group: cfg.control_groups,
        kill_grace_ms: cfg.kill_grace_ms,
        quiet_ms: cfg.quiet_after_exit_ms,
        chatter_ms: cfg.max_chatter_after_exit_ms.max(cfg.quiet_after_exit_ms),
        output_limit: most(u64::from(dispatch.output_limit), u64::from(cfg.max_output)),
        work_dir: String::new(),
        keep_daemons: false,
    })
}

/// Records the start, starts the runner and watches it.
async fn start(
    shared: &Arc<Shared>,
    stream: &StreamKey,
    files: &Files,
    dispatch: &Arc<Dispatch>,
    write_scripts: bool,
    stop: &CancellationToken,
) -> Result<Ended, Leaving> {
    let failed = |text: String| Ok(Ended::without_run(Outcome::not_run(code::FAILED, text)));
    let atomic = stream.1 as usize;
    let prepared = {
        let (shared, files, dispatch) = (Arc::clone(shared), files.clone(), Arc::clone(dispatch));
        tokio::task::spawn_blocking(move || {
            let job = job_of(&shared, &dispatch, atomic, write_scripts)
                .ok_or_else(|| io::Error::other("no such atomic task"))?;
            shared.journal.before_start(&files, &job)?;
            io::Result::Ok(Bounds::of(&job, &shared.cfg))
        })
    };
    let bounds = match prepared.await {
        Ok(Ok(bounds)) => bounds,
        Ok(Err(error)) => {
            return failed(format!(
                "not run: the start cannot be recorded in the agent's journal: {error}"
            ));
        }
        Err(error) => return failed(format!("not run: the agent failed inside: {error}")),
    };
    let Some(program) = shared.cfg.self_exec.first() else {
        return failed("not run: the agent does not know its own program (self_exec)".to_owned());
    };
    let mut command = Command::new(program);
    command
        .args(&shared.cfg.self_exec[1..])
        .arg("run")
        .arg(files.dir())
        .arg(atomic.to_string());
    command
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(false);
    let (mut child, pid) = match orphans::spawn_owned(&mut command) {
        Ok(spawned) => spawned,
        Err(error) => {
            return failed(format!(
                "not run: the agent's own program {} cannot be started: {error}",
                program.display()
            ));
        }
    };
    let pipe = child.stdout.take();
    let dead = CancellationToken::new();
    let gone = dead.clone();
    shared.life.spawn_contained("script runner", {
        let life = shared.life.clone();
        async move {
            tokio::select! {
                // How it ended is in its record; that it ended is all that counts here.
                status = child.wait() => {
                    if let Err(error) = status {
                        tracing::warn!(pid, %error, "a script's runner could not be waited for");
                    }
                    orphans::disown(pid);
                    gone.cancel();
                }
                // A runner that outlives the agent, for a daemon or because its script still runs, is not waited for.
                () = life.draining() => {}
            }
        }
    });
    watch(shared, stream, files, pipe.map(|pipe| (pipe, dead)), Some(bounds), stop).await
}

/// The end is on disk, or put there, before anybody is told.
async fn publish_end(shared: &Arc<Shared>, stream: &StreamKey, files: &Files, ended: Ended) {
    let task = {
        let (shared, files, ended) = (Arc::clone(shared), files.clone(), ended.clone());
        tokio::task::spawn_blocking(
            move || match Record::read(&files.end()).and_then(|r| Ended::from_record(&r)) {
                Ok(_) => Ok(()),
                Err(_) => shared.journal.leave_end(&files, &ended),
            },
        )
    };
    let kept = match task.await {
        Ok(kept) => kept,
        Err(error) => Err(io::Error::other(error)),
    };
    if let Err(error) = kept {
        // It is reported all the same; after a restart it would be "unknown", never run again.
        tracing::error!(target = %stream.0, atomic = stream.1, %error, "the end of a task cannot be recorded");
    }
    let now = Instant::now();
    let mut state = shared.state.lock();
    state.with(stream, |s| {
        s.grown(ended.output_len, now);
        s.spooled = ended.output_len.max(s.acked);
        s.sent = s.sent.min(s.spooled);
        s.phase = Phase::Ended(Box::new(ended));
    });
    state.schedule(stream, now);
    drop(state);
    shared.wake.notify_one();
}

/// Ends everything that has not ended.
async fn finish_rest(shared: &Arc<Shared>, key: &Arc<Key>, outcome: &Outcome) {
    let count = shared.state.lock().targets.get(key).map_or(0, |t| t.streams.len());
    for atomic in 0..count {
        let stream: StreamKey = (Arc::clone(key), u32::try_from(atomic).unwrap_or(u32::MAX));
        let files = Files::new(&shared.journal.dir(key), atomic);
        publish_end(shared, &stream, &files, Ended::without_run(outcome.clone())).await;
    }
}
