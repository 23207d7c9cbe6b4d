//! Sends reports to one session: takes what is due from the agenda, reads the spool, keeps the windows. A new session gets a new
//! pump; the old one ends.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use gse_proto::session::{Output, Row, RowStatus};
use tokio::sync::mpsc::Sender;

use super::executor::Shared;
use super::job::{Ended, Files};
use super::state::{Kind, StreamKey};
use super::window::{CHUNK, Phase, Step};

/// Something for the server.
#[derive(Debug, Clone, PartialEq)]
pub enum Report {
    /// The state of an atomic task.
    Row(Row),
    /// A piece of its output.
    Output(Output),
}

/// What has been decided under the lock, to be done without it.
enum Work {
    Running {
        start_ms: u64,
    },
    Chunk {
        from: u64,
        max: u64,
        file: PathBuf,
    },
    Terminal {
        from: u64,
        len: u64,
        file: Option<PathBuf>,
        ended: Box<Ended>,
    },
}

/// Runs until the session or the process ends.
pub(super) async fn pump(shared: Arc<Shared>, generation: u64, reports: Sender<Report>) {
    let cancel = match &shared.state.lock().session {
        Some(session) if session.generation == generation => session.cancel.clone(),
        _ => return,
    };
    tokio::select! {
        () = cancel.cancelled() => {}
        () = reports.closed() => {}
        () = shared.life.aborted() => {}
        () = send_what_is_due(&shared, generation, &reports) => {}
    }
}

async fn send_what_is_due(shared: &Arc<Shared>, generation: u64, reports: &Sender<Report>) {
    loop {
        let woken = shared.wake.notified();
        match next(shared, generation) {
            Next::Over => return,
            Next::Work(key, work) => {
                let Some(report) = prepare(shared, generation, &key, work).await else {
                    continue;
                };
                if reports.send(report).await.is_err() {
                    return;
                }
            }
            Next::At(Some(at)) => {
                tokio::select! {
                    () = woken => {}
                    () = tokio::time::sleep_until(at.into()) => {}
                }
            }
            Next::At(None) => woken.await,
        }
    }
}

enum Next {
    Over,
    Work(StreamKey, Work),
    At(Option<Instant>),
}

/// Decides on streams until one has something to send.
fn next(shared: &Shared, generation: u64) -> Next {
    let mut state = shared.state.lock();
    loop {
        let window = match &state.session {
            Some(session) if session.generation == generation => session.stream_window,
            _ => return Next::Over,
        };
        let now = Instant::now();
        let key = match state.next_due(now) {
            Ok(key) => key,
            Err(at) => return Next::At(at),
        };
        let free = state.free();
        let Some(kind) = state.targets.get(&key.0).filter(|t| !t.closing).map(|t| t.kind) else {
            continue;
        };
        let files = Files::new(&shared.journal.dir(&key.0), key.1 as usize);
        let decided = state.with(&key, |stream| {
            let step = stream.step(now, &shared.timing, window, free);
            let work = match (&step, &stream.phase) {
                (Step::Running, Phase::Running { start_ms, .. }) => {
                    stream.running_sent = true;
                    Some(Work::Running { start_ms: *start_ms })
                }
                (Step::Chunk { from, max }, _) => Some(Work::Chunk {
                    from: *from,
                    max: *max,
                    file: files.out(),
                }),
                (Step::Terminal { from }, Phase::Ended(ended)) => {
                    let file = (kind == Kind::Live).then(|| files.out());
                    let work = Work::Terminal {
                        from: *from,
                        len: stream.spooled,
                        file,
                        ended: ended.clone(),
                    };
                    stream.sent = stream.spooled;
                    stream.row_sent = Some(now);
                    Some(work)
                }
                _ => None,
            };
            (step, work)
        });
        let Some((step, work)) = decided else { continue };
        match step {
            Step::Sleep(Some(at)) => state.schedule(&key, at),
            Step::Sleep(None) => {}
            Step::Blocked => {
                state.block(key.clone());
                state.schedule(&key, now + shared.timing.resend);
            }
            Step::Running | Step::Chunk { .. } => state.schedule(&key, now),
            Step::Terminal { .. } => state.schedule(&key, now + shared.timing.resend),
        }
        if let Some(work) = work {
            return Next::Work(key, work);
        }
    }
}

async fn prepare(shared: &Arc<Shared>, generation: u64, key: &StreamKey, work: Work) -> Option<Report> {
    match work {
        Work::Running { start_ms } => Some(Report::Row(Row {
            target: Some(key.0.to_ref()),
            atomic: key.1,
            status: RowStatus::Running.into(),
            error_code: 115,
            start_ms,
            ..Row::default()
        })),
        Work::Chunk { from, max, file } => {
            let data = match read(file, from, max).await {
                Ok(data) => data,
                Err(error) => {
                    lost(shared, key, from, &error);
                    return None;
                }
            };
            let mut state = shared.state.lock();
            if state.session.as_ref().is_none_or(|s| s.generation != generation) {
                return None;
            }
            let now = Instant::now();
            let upto = from + data.len() as u64;
            state.with(key, |stream| stream.sent(upto, (data.len() as u64) < CHUNK, now));
            if data.is_empty() {
                // The runner is in the middle of writing: look again after the next notice, or soon.
                state.schedule(key, now + shared.timing.flush);
                return None;
            }
            Some(Report::Output(Output {
                target: Some(key.0.to_ref()),
                atomic: key.1,
                offset: from,
                data,
            }))
        }
        Work::Terminal { from, len, file, ended } => {
            let mut tail = Bytes::new();
            let mut output_len = ended.output_len;
            let mut message = ended.outcome.message.clone();
            if let Some(file) = file.filter(|_| len > from) {
                match read(file, from, len - from).await {
                    Ok(data) => {
                        // A runner that was killed while it wrote may have left half a character.
                        output_len = output_len.min(from + data.len() as u64);
                        tail = data;
                    }
                    Err(error) => {
                        lost(shared, key, from, &error);
                        let gap = if message.is_empty() { "" } else { "; " };
                        message = format!(
                            "{message}{gap}the rest of the output cannot be read from the agent's spool: {error}"
                        );
                        output_len = from;
                    }
                }
            }
            Some(Report::Row(Row {
                target: Some(key.0.to_ref()),
                atomic: key.1,
                status: ended.outcome.status,
                error_code: ended.outcome.error_code,
                error_msg: message,
                exit_code: ended.outcome.exit_code,
                start_ms: ended.start_ms,
                end_ms: ended.end_ms,
                tag: ended.tag.clone(),
                output_len,
                tail_offset: from,
                tail,
            }))
        }
    }
}

/// Output that cannot be read will not be readable later: what is left of the stream ends here.
fn lost(shared: &Shared, key: &StreamKey, from: u64, error: &io::Error) {
    tracing::error!(target = %key.0, atomic = key.1, offset = from, %error, "output cannot be read from the spool; the rest of it is lost");
    let mut state = shared.state.lock();
    state.with(key, |stream| {
        stream.spooled = from.max(stream.acked);
        stream.sent = stream.sent.min(stream.spooled);
        stream.unsent_since = None;
    });
}

/// Reads whole characters.
async fn read(file: PathBuf, from: u64, max: u64) -> io::Result<Bytes> {
    let task = tokio::task::spawn_blocking(move || {
        let file = File::open(file)?;
        let mut data = vec![0u8; usize::try_from(max).map_err(io::Error::other)?];
        let mut filled = 0;
        while filled < data.len() {
            match file.read_at(&mut data[filled..], from + filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        data.truncate(filled);
        let whole = std::str::from_utf8(&data).map_or_else(|e| e.valid_up_to(), str::len);
        if whole + 4 <= data.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it is not the text that was written",
            ));
        }
        data.truncate(whole);
        Ok(Bytes::from(data))
    });
    task.await.map_err(io::Error::other)?
}
