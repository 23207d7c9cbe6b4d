//! Follows one runner, of this process or of an earlier one, to its end, and keeps the target's memory up to date meanwhile. A runner
//! that dies without an end is found out and cleaned up after here; one that does not react is left to [`super::stuck`].

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::process::ChildStdout;
use tokio_util::sync::CancellationToken;

use super::executor::Shared;
use super::job::{Ended, Files, Job, Outcome, Running};
use super::orphans;
use super::proc;
use super::record::Record;
use super::state::StreamKey;
use super::stuck::{self, Bounds, Minder};
use super::window::Phase;

/// A stop that could not be passed on yet is tried again after this.
const STOP_AGAIN: Duration = Duration::from_millis(50);
/// Safety net of the notices: how often the spool is looked at without one.
const LOOK_ANYWAY: Duration = Duration::from_secs(1);
/// How long after a restart of the agent a runner may take to show that it exists.
const SHOW_UP: Duration = Duration::from_secs(3);

/// The process is being stopped: the runners go on, the next agent process takes over.
pub(super) struct Leaving;

/// What the spool says about an atomic task.
struct Seen {
    running: Option<Running>,
    /// Somebody has stopped the runner (SIGSTOP).
    stopped: bool,
    spooled: u64,
    end: Option<io::Result<Ended>>,
    /// Nobody holds the runner's lock.
    unlocked: bool,
}

async fn look(files: &Files, probe: bool) -> Seen {
    let files = files.clone();
    let task = tokio::task::spawn_blocking(move || {
        // The lock before the end: a runner writes the end first and lets the lock go afterwards.
        let unlocked = probe && std::fs::File::open(files.starting()).is_ok_and(|file| file.try_lock().is_ok());
        let running = Record::read(&files.run())
            .and_then(|record| Running::from_record(&record))
            .ok();
        let runner = running.as_ref().and_then(stuck::find);
        let end = match Record::read(&files.end()).and_then(|record| Ended::from_record(&record)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            result => Some(result),
        };
        let spooled = std::fs::metadata(files.out()).map(|meta| meta.len()).unwrap_or(0);
        Seen {
            running,
            stopped: runner.is_some_and(|p| p.state == b'T'),
            spooled,
            end,
            unlocked,
        }
    });
    // A panic in there shows nothing: the next look will.
    task.await.unwrap_or(Seen {
        running: None,
        stopped: false,
        spooled: 0,
        end: None,
        unlocked: false,
    })
}

/// What the runner's job bounds it to, as its own record has it: the settings may be others by now.
async fn bounds_of(shared: &Arc<Shared>, files: &Files) -> Bounds {
    let (task, job) = (Arc::clone(shared), files.job());
    let read = tokio::task::spawn_blocking(move || {
        let job = Record::read(&job).and_then(|record| Job::from_record(&record));
        job.map(|job| Bounds::of(&job, &task.cfg))
    });
    match read.await {
        Ok(Ok(bounds)) => bounds,
        Ok(Err(_)) | Err(_) => Bounds::widest(&shared.cfg),
    }
}

/// Follows a runner to its end. Without a pipe it was started by an earlier process, and without bounds they are in its job.
pub(super) async fn watch(
    shared: &Arc<Shared>,
    stream: &StreamKey,
    files: &Files,
    mut pipe: Option<(ChildStdout, CancellationToken)>,
    bounds: Option<Bounds>,
    stop: &CancellationToken,
) -> Result<Ended, Leaving> {
    let bounds = match bounds {
        Some(bounds) => bounds,
        None => bounds_of(shared, files).await,
    };
    let own = pipe.is_some();
    let dead = pipe.as_ref().map(|(_, dead)| dead.clone());
    let began = Instant::now();
    let mut running: Option<Running> = None;
    let mut minder: Option<Minder> = None;
    let mut ended_here: Option<Outcome> = None;
    let mut buffer = [0u8; 256];
    loop {
        let died = dead.as_ref().is_some_and(CancellationToken::is_cancelled);
        let seen = look(files, !own).await;
        if running.is_none() {
            running = seen.running;
            if let Some(running) = &running {
                publish_start(shared, stream, running.start_ms);
                minder = Some(Minder::new(bounds, running, own));
            }
        }
        match seen.end {
            Some(Ok(end)) => {
                if let Some(running) = running {
                    shared.lingering.add(running);
                }
                return Ok(end);
            }
            Some(Err(error)) => {
                return Ok(Ended::without_run(Outcome::unknown(format!(
                    "the record of how it ended is damaged: {error}"
                ))));
            }
            None => {}
        }
        publish_output(shared, stream, seen.spooled);
        let lost = if own {
            died
        } else {
            seen.unlocked && (running.is_some() || began.elapsed() >= SHOW_UP)
        };
        if lost {
            return Ok(lose(files, running, own, ended_here).await);
        }
        let mut unheard = stop.is_cancelled();
        if let (Some(running), Some(minder)) = (&running, &mut minder) {
            if seen.stopped {
                minder.resume(running);
            }
            unheard = unheard && !minder.ask(running);
            if let Some(reason) = minder.overdue(Instant::now()).filter(|_| ended_here.is_none()) {
                let running = running.clone();
                let ending = tokio::task::spawn_blocking(move || stuck::end(bounds, &running, reason));
                // That it is gone is seen at the next look; a panic in there makes for another try.
                ended_here = ending.await.unwrap_or_default();
            }
        }
        let again = match (own, unheard) {
            (_, true) => STOP_AGAIN,
            (true, _) => LOOK_ANYWAY,
            (false, _) => Duration::from_millis(shared.cfg.adopted_poll_ms),
        };
        tokio::select! {
            () = shared.life.draining() => return Err(Leaving),
            () = stop.cancelled(), if !stop.is_cancelled() => {}
            end = notice(&mut pipe, &mut buffer) => if end { pipe = None },
            () = gone(&dead), if own && !died => {}
            () = tokio::time::sleep(again) => {}
        }
    }
}

/// Resolves at the next notice of the runner; true when there will be no more.
async fn notice(pipe: &mut Option<(ChildStdout, CancellationToken)>, buffer: &mut [u8]) -> bool {
    match pipe {
        Some((pipe, _)) => !matches!(pipe.read(buffer).await, Ok(n) if n > 0),
        None => std::future::pending().await,
    }
}

async fn gone(dead: &Option<CancellationToken>) {
    match dead {
        Some(dead) => dead.cancelled().await,
        None => std::future::pending().await,
    }
}

/// The runner is gone without an end: ends what it left behind and says that nobody knows, or what is known when it was ended here.
async fn lose(files: &Files, running: Option<Running>, own: bool, ended_here: Option<Outcome>) -> Ended {
    let start_ms = running.as_ref().map(|r| r.start_ms);
    let same_boot = running.as_ref().is_some_and(|r| r.boot == proc::boot_id());
    let what = match (&running, same_boot) {
        (None, _) => {
            "the script's runner process ended before it reported a start: it is unknown whether the script ran"
                .to_owned()
        }
        (Some(_), false) => "the host was restarted while the script ran: it is unknown how far it came".to_owned(),
        (Some(running), true) => {
            let killed = orphans::kill_left_behind(running.clone(), own).await;
            tracing::warn!(
                runner = running.runner,
                killed,
                "a script's runner process was killed; what it left behind was ended"
            );
            format!(
                "the script's runner process was killed, so its result is lost; {killed} processes that it left behind were ended"
            )
        }
    };
    let spool = files.out();
    let spooled = tokio::task::spawn_blocking(move || std::fs::metadata(spool).map(|meta| meta.len()).unwrap_or(0))
        .await
        .unwrap_or(0);
    let mut ended = Ended::without_run(ended_here.unwrap_or_else(|| Outcome::unknown(what)));
    ended.start_ms = start_ms.unwrap_or(ended.start_ms);
    ended.output_len = spooled;
    ended
}

fn publish_start(shared: &Shared, stream: &StreamKey, start_ms: u64) {
    let now = Instant::now();
    let mut state = shared.state.lock();
    state.with(stream, |s| {
        if matches!(s.phase, Phase::Queued) {
            s.phase = Phase::Running { start_ms, since: now };
        }
    });
    state.schedule(stream, now + shared.timing.running_after);
    drop(state);
    shared.wake.notify_one();
}

fn publish_output(shared: &Shared, stream: &StreamKey, spooled: u64) {
    let now = Instant::now();
    let mut state = shared.state.lock();
    let grew = state.with(stream, |s| {
        let before = s.spooled;
        s.grown(spooled, now);
        s.spooled > before
    });
    if grew == Some(true) {
        state.schedule(stream, now);
        drop(state);
        shared.wake.notify_one();
    }
}
