//! What callers read of a script task: rows with slices of output.
//!
//! A poll reads rows in one round trip and output in as few as the budget of an answer allows. A row is only shown as finished when
//! the last byte of its output is in the answer; what does not fit stays "in progress" until the next poll.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use gse_core::store::StoreError;
use gse_proto::codes::{Code, Inner};
use gse_proto::http::{AtomicQuery, ScriptResultQuery, ScriptRow};
use gse_proto::keys;
use gse_proto::state::{StoredRow, TaskHeader};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::layout::IndexedBucket;
use super::slice::{assemble, before};
use super::store::{OutputRange, RowPlace, RowState, TaskStore};
use crate::config::TaskConfig;

/// Output asked for in one round trip, about.
const WAVE_BYTES: u64 = 16 << 20;
/// What a running row is taken to have.
const RUNNING_ESTIMATE: u64 = 64 << 10;
/// An answer is in memory twice: as rows and as JSON.
const COPIES: usize = 2;
/// Output that any answer may have, so that rows that are running move on too.
const MIN_ANSWER: usize = 1 << 20;
/// How long an answer waits for room.
const ROOM_WAIT: Duration = Duration::from_secs(5);
/// Rows in one round trip.
const WAVE_ROWS: usize = 1024;

/// Why a query has no answer.
#[derive(Debug)]
pub enum QueryError {
    /// For the caller.
    Refused(Code, String),
    /// The store.
    Store(StoreError),
}

impl From<StoreError> for QueryError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// One row asked for.
struct Asked {
    agent: String,
    container: String,
    query: AtomicQuery,
    /// `None`: not a row of this task.
    place: Option<RowPlace>,
}

/// Answers a result query about a task that the caller may read. What the answer takes of `room` (in KiB, for all answers together)
/// comes with it, to be kept until it is sent; where there is no room, output waits for the next poll.
///
/// # Errors
/// When it asks too much, or the store does not answer.
pub async fn script_rows(
    store: &TaskStore,
    header: &Arc<TaskHeader>,
    query: ScriptResultQuery,
    limits: &TaskConfig,
    room: &Arc<Semaphore>,
) -> Result<(Vec<ScriptRow>, Option<OwnedSemaphorePermit>), QueryError> {
    let count: usize = query.agent_tasks.iter().map(|agent| agent.atomic_tasks.len()).sum();
    if count > limits.max_rows {
        let text = format!(
            "{count} rows are asked for, at most {} are answered at a time",
            limits.max_rows
        );
        return Err(QueryError::Refused(Code::Arguments, text));
    }
    let asked = locate(store, header, query).await?;
    let places: Vec<RowPlace> = asked.iter().filter_map(|a| a.place).collect();
    let mut states = store.rows(&header.task_id, &places).await?.into_iter();
    let states: Vec<RowState> = asked
        .iter()
        .map(|a| a.place.and_then(|_| states.next()).unwrap_or_default())
        .collect();

    let mut rows: Vec<ScriptRow> = asked
        .iter()
        .zip(&states)
        .map(|(a, state)| without_output(a, state))
        .collect();
    let (permit, mut budget) = reserve(room, wanted(&asked, &states), limits).await;
    let mut next = 0;
    while next < asked.len() {
        let (wave, until) = plan_wave(&asked, &states, next);
        next = until;
        let ranges: Vec<OutputRange> = wave.iter().map(|(_, range)| *range).collect();
        let outputs = if ranges.is_empty() || budget == 0 {
            vec![]
        } else {
            store.output(&header.task_id, &ranges).await?
        };
        for ((n, range), chunks) in wave.into_iter().zip(outputs) {
            if budget == 0 {
                // It comes with the next poll; so does everything after it.
                break;
            }
            let limit = match slice_limit(&asked[n].query) {
                0 => budget,
                limit => limit.min(budget),
            };
            // Room was set aside for what the row says; more would be at the cost of the rows behind, with every poll again.
            let chunks = match &states[n].terminal {
                Some(terminal) => before(chunks, terminal.output_len),
                None => chunks,
            };
            let (screen, end) = assemble(chunks, range.from, limit);
            budget = budget.saturating_sub(screen.len());
            rows[n].screen = screen;
            if let Some(terminal) = &states[n].terminal
                && end >= terminal.output_len
            {
                finish(&mut rows[n], terminal);
            }
        }
    }
    Ok((rows, permit))
}

/// Bytes of output that an answer may need; of running rows that is not known.
fn wanted(asked: &[Asked], states: &[RowState]) -> u64 {
    asked
        .iter()
        .zip(states)
        .map(|(asked, state)| {
            let limit = match slice_limit(&asked.query) {
                0 => u64::MAX,
                limit => limit as u64,
            };
            match state {
                RowState {
                    terminal: Some(row), ..
                } => row.output_len.saturating_sub(offset(&asked.query)).min(limit),
                RowState {
                    terminal: None,
                    running: Some(_),
                } => RUNNING_ESTIMATE.min(limit),
                RowState { .. } => 0,
            }
        })
        .sum()
}

/// Sets room aside for an answer: the rows and their JSON. Gives the output that the answer may then have.
async fn reserve(room: &Arc<Semaphore>, wanted: u64, limits: &TaskConfig) -> (Option<OwnedSemaphorePermit>, usize) {
    if wanted == 0 {
        return (None, 0);
    }
    let most = limits.answer_bytes.min(limits.answers_total_bytes / COPIES);
    let bytes = usize::try_from(wanted)
        .unwrap_or(usize::MAX)
        .clamp(MIN_ANSWER.min(most), most);
    let Ok(kib) = u32::try_from(bytes.saturating_mul(COPIES).div_ceil(1024)) else {
        return (None, 0);
    };
    match tokio::time::timeout(ROOM_WAIT, Arc::clone(room).acquire_many_owned(kib)).await {
        Ok(Ok(permit)) => (Some(permit), bytes),
        // Nothing is lost: rows with output stay in progress, and the next poll gets it.
        Ok(Err(_)) | Err(_) => (None, 0),
    }
}

async fn locate(store: &TaskStore, header: &TaskHeader, query: ScriptResultQuery) -> Result<Vec<Asked>, StoreError> {
    let mut asked = Vec::with_capacity(query.agent_tasks.len());
    // A query touches every bucket many times.
    let mut buckets: HashMap<u32, Option<Arc<IndexedBucket>>> = HashMap::new();
    for agent in query.agent_tasks {
        let host = agent.bk_container_id.bytes().all(|b| b == b'0');
        let container = if host { String::new() } else { agent.bk_container_id };
        let bucket = keys::bucket_of(&agent.bk_agent_id, header.buckets);
        let indexed = match buckets.entry(bucket) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(store.bucket(&header.task_id, bucket).await?),
        };
        let index = indexed
            .as_ref()
            .and_then(|indexed| indexed.place(&agent.bk_agent_id, &container));
        for query in agent.atomic_tasks {
            let atomic = header
                .atomics
                .iter()
                .position(|atomic| atomic.id == query.atomic_task_id);
            let place = index.zip(atomic).map(|(index, atomic)| RowPlace {
                bucket,
                index,
                atomic: u32::try_from(atomic).unwrap_or(u32::MAX),
            });
            asked.push(Asked {
                agent: agent.bk_agent_id.clone(),
                container: container.clone(),
                query,
                place,
            });
        }
    }
    Ok(asked)
}

/// The limit that holds for a row: none where a caller always asks from the start, since it could never get beyond it
/// (contract v2-http-task#27).
fn slice_limit(query: &AtomicQuery) -> usize {
    if query.atomic_task_id > 0 && query.offset <= 0 {
        return 0;
    }
    usize::try_from(query.limit).unwrap_or(0)
}

fn offset(query: &AtomicQuery) -> u64 {
    u64::try_from(query.offset).unwrap_or(0)
}

/// Rows from `first` on whose output is read together, and where the next wave starts.
fn plan_wave(asked: &[Asked], states: &[RowState], first: usize) -> (Vec<(usize, OutputRange)>, usize) {
    let mut wave = Vec::new();
    let mut bytes = 0;
    for n in first..asked.len() {
        if wave.len() >= WAVE_ROWS || bytes >= WAVE_BYTES {
            return (wave, n);
        }
        let (Some(place), query) = (asked[n].place, &asked[n].query) else {
            continue;
        };
        let from = offset(query);
        let limit = slice_limit(query) as u64;
        // A little more than asked, to end on a whole character.
        let to = if limit == 0 {
            u64::MAX
        } else {
            from.saturating_add(limit.max(4))
        };
        match &states[n] {
            RowState {
                terminal: Some(row), ..
            } if from < row.output_len => bytes += (row.output_len - from).min(to - from),
            RowState {
                terminal: None,
                running: Some(_),
            } => bytes += RUNNING_ESTIMATE,
            _ => continue,
        }
        wave.push((n, OutputRange { place, from, to }));
    }
    (wave, asked.len())
}

/// The row before its output is known: finished only if no output is left to be read.
fn without_output(asked: &Asked, state: &RowState) -> ScriptRow {
    let mut row = ScriptRow {
        bk_agent_id: asked.agent.clone(),
        bk_container_id: asked.container.clone(),
        atomic_task_id: asked.query.atomic_task_id,
        error_code: Inner::Running.code(),
        ..Default::default()
    };
    if asked.place.is_none() {
        let text = "not a target or not an atomic task of this task";
        let never = StoredRow {
            status: 5,
            error_code: Inner::Arguments.code(),
            error_msg: text.into(),
            exit_code: 255,
            start_ms: 1,
            end_ms: 1,
            ..Default::default()
        };
        finish(&mut row, &never);
        return row;
    }
    match state {
        RowState {
            terminal: Some(terminal),
            ..
        } => {
            if offset(&asked.query) >= terminal.output_len {
                finish(&mut row, terminal);
            } else {
                row.status = 1;
                row.start_time = terminal.start_ms;
            }
        }
        RowState {
            running: Some(running), ..
        } => {
            row.status = running.status.clamp(0, 1);
            row.start_time = running.start_ms;
        }
        RowState { .. } => {}
    }
    row
}

fn finish(row: &mut ScriptRow, terminal: &StoredRow) {
    row.status = terminal.status;
    row.error_code = terminal.error_code;
    row.error_msg.clone_from(&terminal.error_msg);
    row.script_exit_code = terminal.exit_code;
    row.start_time = terminal.start_ms;
    row.end_time = terminal.end_ms;
    row.tag.clone_from(&terminal.tag);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(query: AtomicQuery) -> Asked {
        let place = RowPlace {
            bucket: 0,
            index: 0,
            atomic: 0,
        };
        Asked {
            agent: "a".into(),
            container: String::new(),
            query,
            place: Some(place),
        }
    }

    #[test]
    fn a_row_with_unread_output_is_not_finished() {
        // contract: v2-http-task#8, v2-http-task#12, v2-http-task#13, v2-http-task#22
        let terminal = StoredRow {
            status: 2,
            end_ms: 9,
            output_len: 10,
            ..Default::default()
        };
        let state = RowState {
            terminal: Some(terminal),
            running: None,
        };
        let early = without_output(&asked(AtomicQuery::default()), &state);
        assert_eq!((early.error_code, early.status), (115, 1));
        let at_end = AtomicQuery {
            offset: 10,
            ..Default::default()
        };
        let done = without_output(&asked(at_end), &state);
        assert_eq!((done.error_code, done.status, done.end_time), (0, 2, 9));
        let queued = without_output(&asked(AtomicQuery::default()), &RowState::default());
        assert_eq!((queued.error_code, queued.status), (115, 0));
    }

    #[test]
    fn the_second_atomic_task_is_read_whole() {
        // contract: v2-http-task#27
        let query = |atomic_task_id, offset| AtomicQuery {
            atomic_task_id,
            offset,
            limit: 100,
        };
        assert_eq!(slice_limit(&query(0, 0)), 100);
        assert_eq!(slice_limit(&query(1, 0)), 0);
        assert_eq!(slice_limit(&query(1, 50)), 100);
        assert_eq!(
            slice_limit(&AtomicQuery {
                limit: -1,
                ..Default::default()
            }),
            0
        );
    }

    #[test]
    fn rows_nobody_submitted_end_at_once() {
        // contract: v2-http-task#24, v2-http-task#52
        let mut stranger = asked(AtomicQuery::default());
        stranger.place = None;
        let row = without_output(&stranger, &RowState::default());
        assert!(!matches!(row.error_code, 0 | 115 | 126) && row.status == 5 && row.script_exit_code != 0);
    }
}
