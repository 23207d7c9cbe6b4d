//! Takes what an earlier agent process left in the journal back into memory, and goes on with it.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::drive;
use super::executor::Executor;
use super::job::{Ended, Files, Outcome};
use super::journal::{Found, Renewed};
use super::record::Record;
use super::state::{Kind, Target};
use super::window::{Phase, Stream};

impl Executor {
    /// Takes an entry of the journal back into memory and goes on with it.
    pub(super) async fn restore(&self, found: Found) {
        let (key, atomics, dispatch) = match found {
            Found::Done {
                key,
                not_after_ms,
                ends,
            } => {
                let now = Instant::now();
                let streams = ends.into_iter().map(|end| done_stream(end, now)).collect();
                let mut target = Target::new(Kind::Done, None, streams);
                target.not_after_ms = not_after_ms;
                self.shared.state.lock().insert(Arc::new(key), target);
                return;
            }
            Found::Live { key, atomics, dispatch } => (Arc::new(key), atomics, dispatch.map(|d| Arc::new(*d))),
        };
        let dir = self.shared.journal.dir(&key);
        let looked =
            tokio::task::spawn_blocking(move || (0..atomics).map(|at| what_is_left(&dir, at)).collect::<Vec<_>>())
                .await;
        let left = looked.unwrap_or_default();
        let now = Instant::now();
        let begun = left.iter().any(|l| l.begun);
        let lost = self.shared.journal.renewed() == Renewed::Lost;
        let streams = left.into_iter().map(|l| match l.end {
            Some(end) => Stream::new(Phase::Ended(Box::new(end)), l.spooled, now),
            None if lost && !l.begun => Stream::new(
                Phase::Ended(Box::new(Ended::without_run(Outcome::unknown(
                    "it is unknown whether it ran: the agent's journal was lost",
                )))),
                0,
                now,
            ),
            None => Stream::new(Phase::Queued, l.spooled, now),
        });
        let mut target = Target::new(Kind::Live, dispatch.as_deref(), streams.collect());
        target.intent_bytes = dispatch
            .as_ref()
            .map_or(0, |d| prost::Message::encoded_len(&**d) as u64);
        let stop = target.stop.clone();
        let over = target.streams.iter().all(|s| matches!(s.phase, Phase::Ended(_)));
        self.shared.state.lock().insert(Arc::clone(&key), target);
        let shared = Arc::clone(&self.shared);
        match dispatch {
            _ if over => {}
            Some(dispatch) if !begun => shared
                .life
                .clone()
                .spawn_contained("target", drive::fresh(shared, key, dispatch, stop)),
            dispatch => shared
                .life
                .clone()
                .spawn_contained("target", drive::adopted(shared, key, dispatch, stop)),
        }
    }
}

struct Left {
    begun: bool,
    end: Option<Ended>,
    spooled: u64,
}

fn what_is_left(dir: &Path, atomic: usize) -> Left {
    let files = Files::new(dir, atomic);
    let end = match Record::read(&files.end()).and_then(|record| Ended::from_record(&record)) {
        Ok(end) => Some(end),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => Some(Ended::without_run(Outcome::unknown(format!(
            "the record of how it ended is damaged: {error}"
        )))),
    };
    let on_disk = std::fs::metadata(files.out()).map(|meta| meta.len()).unwrap_or(0);
    let spooled = end.as_ref().map_or(on_disk, |end| end.output_len.min(on_disk));
    Left {
        begun: end.is_some() || files.starting().exists(),
        end,
        spooled,
    }
}

/// A row without its output, which has been forgotten.
pub(super) fn done_stream(end: Ended, now: Instant) -> Stream {
    let len = end.output_len;
    let mut stream = Stream::new(Phase::Ended(Box::new(end)), len, now);
    stream.acked = len;
    stream.sent = len;
    stream.unsent_since = None;
    stream.stored = true;
    stream
}
