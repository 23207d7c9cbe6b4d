//! Results of agents on their way to the store: checked, batched, written, then acknowledged.
//!
//! The agent keeps everything until it is acknowledged and sends it again when nothing comes, so that this side may drop what it has
//! no room for, and never acknowledges before the store has replied. Each target always goes to the same writer, so that its
//! output is written in order; output is only taken where it joins on to what is there. Rows that this node itself decides about
//! (an agent that is offline, say) take the same way.
//!
//! * `admit`: what of it is taken;
//! * `row`: a row as it is kept;
//! * `work`: a batch in the making.

mod admit;
mod row;
mod work;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_core::random::HashMap;
use gse_core::store::{Batch, StoreError};
use gse_proto::keys;
use gse_proto::session as s;
use gse_proto::state::StoredRow;
use tokio::sync::mpsc;
use tokio::time::Instant;

use self::admit::Admission;
use self::row::stored_row;
use self::work::{After, Owner, Used, Work};
use super::cell::RunCell;
use super::store::RowPlace;
use crate::Node;
use crate::clock::unix_ms;
use crate::session::outbox::CloseReason;
use crate::session::registry::Session;

/// Most items in one write.
const BATCH_ITEMS: usize = 1024;
/// Payloads up to this size are copied out of the read buffer.
const SHORT: usize = 8 * 1024;
/// With a tail up to this size, the acknowledgement of a row may wait.
const SHORT_TAIL: usize = 4 * 1024;
/// Streams a writer remembers; beyond, all are forgotten (and the store is asked when one goes on).
const MAX_STREAMS: usize = 200_000;

/// Something to be stored.
#[derive(Debug)]
enum Item {
    Row(Arc<Session>, s::Row),
    Output(Arc<Session>, s::Output),
    Own(Arc<RunCell>, RowPlace, StoredRow),
}

/// The way in.
#[derive(Debug)]
pub struct Ingest {
    writers: Vec<mpsc::Sender<Item>>,
}

/// The other end of [`Ingest`], to be run.
#[derive(Debug)]
pub struct Writer {
    items: mpsc::Receiver<Item>,
}

impl Ingest {
    /// So many writers with so much room each.
    #[must_use]
    pub fn new(writers: usize, queue: usize) -> (Self, Vec<Writer>) {
        let (senders, receivers) = (0..writers)
            .map(|_| {
                let (sender, items) = mpsc::channel(queue);
                (sender, Writer { items })
            })
            .unzip();
        (Self { writers: senders }, receivers)
    }

    fn writer(&self, task: &str, bucket: u32, index: u32) -> &mpsc::Sender<Item> {
        let hash = keys::bucket_of(task, u32::MAX) ^ bucket.wrapping_mul(0x9e37_79b9) ^ index.wrapping_mul(0x85eb_ca6b);
        &self.writers[hash as usize % self.writers.len()]
    }

    /// A row from an agent. Dropped when there is no room: it is sent again.
    pub fn row(&self, node: &Node, session: &Arc<Session>, mut row: s::Row) {
        detach(&mut row.tail);
        let Some(target) = &row.target else { return };
        let writer = self.writer(&target.task_id, target.bucket, target.index);
        if writer.try_send(Item::Row(Arc::clone(session), row)).is_err() {
            node.metrics.ingest_dropped.inc();
        }
    }

    /// Output from an agent. Dropped when there is no room: it is sent again.
    pub fn output(&self, node: &Node, session: &Arc<Session>, mut output: s::Output) {
        detach(&mut output.data);
        let Some(target) = &output.target else { return };
        let writer = self.writer(&target.task_id, target.bucket, target.index);
        if writer.try_send(Item::Output(Arc::clone(session), output)).is_err() {
            node.metrics.ingest_dropped.inc();
        }
    }

    /// A terminal row that this node decided about. Waits for room.
    pub async fn own(&self, run: &Arc<RunCell>, place: RowPlace, row: StoredRow) {
        let writer = self.writer(&run.header.task_id, place.bucket, place.index);
        if writer.send(Item::Own(Arc::clone(run), place, row)).await.is_err() {
            tracing::debug!(task = run.header.task_id, "row not stored: the node is stopping");
        }
    }
}

/// A short payload gets memory of its own, so that what waits here does not hold a whole read buffer for a few bytes.
fn detach(payload: &mut Bytes) {
    if payload.len() <= SHORT {
        *payload = Bytes::copy_from_slice(payload);
    }
}

/// Where a stream of output has got to, on one session.
struct Stream {
    session: u64,
    at: At,
}

/// Where a stream of output has got to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// So much of it is stored.
    Next(u64),
    /// So much is stored, a marker at its end; what comes after that is taken and dropped (see [`super::budget`]).
    Cut(u64),
}

#[derive(Hash, PartialEq, Eq)]
struct StreamKey {
    task: Arc<str>,
    place: RowPlace,
}

impl StreamKey {
    fn new(owner: &Owner, place: RowPlace) -> Self {
        Self {
            task: Arc::clone(&owner.task),
            place,
        }
    }
}

/// Where a stream ends after a piece of it was taken.
#[derive(Debug, Clone, Copy)]
struct Taken {
    /// As the agent counts.
    agent: u64,
    /// How much of it callers can read, if that is not all.
    stored: Option<u64>,
}

impl Taken {
    fn all(end: u64) -> Self {
        Self {
            agent: end,
            stored: None,
        }
    }
}

/// A piece of a stream of output; `last`: it came with the terminal row.
struct Piece<'a> {
    offset: u64,
    data: &'a Bytes,
    last: bool,
}

struct State {
    node: Arc<Node>,
    streams: HashMap<StreamKey, Stream>,
    /// Sessions with acknowledgements that wait for company, and until when; in that order.
    waiting: VecDeque<(Instant, Arc<Session>)>,
}

impl Writer {
    /// Writes until the node has no sessions any more and nothing is left to write.
    pub async fn run(mut self, node: Arc<Node>) {
        let mut state = State {
            node: Arc::clone(&node),
            streams: HashMap::default(),
            waiting: VecDeque::new(),
        };
        let mut items = Vec::with_capacity(BATCH_ITEMS);
        loop {
            tokio::select! {
                biased;
                got = self.items.recv_many(&mut items, BATCH_ITEMS) => {
                    if got == 0 {
                        return;
                    }
                }
                () = node.sessions_gone() => return,
                () = state.patience_ends() => {}
            }
            if !items.is_empty() {
                state.store(items.drain(..)).await;
            }
            state.hurry(Instant::now());
        }
    }
}

impl State {
    /// Resolves when an acknowledgement has waited long enough.
    async fn patience_ends(&self) {
        match self.waiting.front() {
            Some((until, _)) => tokio::time::sleep_until(*until).await,
            None => std::future::pending().await,
        }
    }

    /// Acknowledgements that have waited long enough go without company.
    fn hurry(&mut self, now: Instant) {
        while let Some((_, session)) = self.waiting.pop_front_if(|(until, _)| *until <= now) {
            session.outbox.hurry();
        }
    }

    /// Tells the agent that something is stored. Where it does not wait for that with more output, this may wait a little: most
    /// likely there is soon something else to tell it, and one write is what this costs on either side.
    fn acknowledge(&mut self, session: Arc<Session>, stored: s::Stored, patient: bool, now: Instant) {
        let patience = self.node.config.session.ack_patience_ms;
        if !patient || patience == 0 {
            if session.outbox.control(&stored.into()).is_err() {
                tracing::debug!(agent = %session.agent, "not acknowledged: the session has ended; the agent sends it again");
            }
        } else if session.outbox.patient(&stored.into()) == Ok(true) {
            self.waiting.push_back((now + Duration::from_millis(patience), session));
        }
    }

    async fn store(&mut self, items: impl Iterator<Item = Item>) {
        let mut work = Work::default();
        for item in items {
            match item {
                Item::Row(session, row) => self.row(&mut work, session, row).await,
                Item::Output(session, output) => self.output(&mut work, session, output).await,
                Item::Own(run, place, row) => self.own(&mut work, run, place, &row),
            }
        }
        let batch = work.batch();
        fail::fail_point!("results-before");
        if !batch.is_empty() {
            let Some(replies) = self.write(&batch, work.after.len()).await else {
                return;
            };
            for (used, reply) in work.used.values().zip(replies) {
                if let redis::Value::Int(all) = reply {
                    used.all.at_least(u64::try_from(all).unwrap_or(0));
                }
            }
        }
        fail::fail_point!("results-stored");
        let now = Instant::now();
        for after in work.after {
            match after {
                After::Ack(session, stored, patient) => self.acknowledge(session, stored, patient, now),
                After::Mark(owner, place) => match &owner.run {
                    Some(run) => self.node.tasks.mark(run, place),
                    None => self
                        .node
                        .peers
                        .stored(&self.node, &owner.task, &owner.header.node_id, place),
                },
            }
        }
        fail::fail_point!("results-acked");
        if self.streams.len() > MAX_STREAMS {
            self.streams.clear();
        }
    }

    /// Writes a batch however long the store is away; every command in it may be repeated (the use of a task may then be counted twice,
    /// which is on the safe side). `None` when the node stops first.
    async fn write(&self, batch: &Batch, results: usize) -> Option<Vec<redis::Value>> {
        let mut wait = Duration::from_millis(50);
        loop {
            match self.node.task_store.raw().send(batch).await {
                Ok(replies) => {
                    self.node.metrics.rows_stored.inc_by(results as u64);
                    return Some(replies);
                }
                Err(error) => self.report(&error),
            }
            tokio::select! {
                () = self.node.sessions_gone() => return None,
                () = tokio::time::sleep(self.node.random.jittered(wait)) => {}
            }
            wait = (wait * 2).min(Duration::from_secs(2));
        }
    }

    fn report(&self, error: &StoreError) {
        self.node.metrics.ingest_retries.inc();
        tracing::warn!(%error, "results can't be stored; agents keep them until they are");
    }

    async fn output(&mut self, work: &mut Work, session: Arc<Session>, output: s::Output) {
        let Some(target) = output.target.clone() else { return };
        let place = place(&target, output.atomic);
        if !acceptable(&session, output.offset, &output.data) {
            return;
        }
        match self.admit(&session, &target, place).await {
            Admission::Open(owner) => {
                let Some(at) = self.reached(&session, &owner, place, output.offset).await else {
                    return;
                };
                let piece = Piece {
                    offset: output.offset,
                    data: &output.data,
                    last: false,
                };
                let next = self.take(work, &session, &owner, place, at, &piece).await;
                ack(work, session, target, output.atomic, next.agent, false, false);
            }
            Admission::Late => {
                // Its row is closed already; what it printed after that is of no use to anybody.
                let end = output.offset + output.data.len() as u64;
                ack(work, session, target, output.atomic, end, false, false);
            }
            Admission::Gone => {
                let end = output.offset + output.data.len() as u64;
                ack(work, session, target, output.atomic, end, true, false);
            }
            Admission::TryLater => {}
        }
    }

    async fn row(&mut self, work: &mut Work, session: Arc<Session>, row: s::Row) {
        let Some(target) = row.target.clone() else { return };
        let place = place(&target, row.atomic);
        if !acceptable(&session, row.tail_offset, &row.tail) {
            return;
        }
        let terminal = row.status > s::RowStatus::Running as i32;
        match self.admit(&session, &target, place).await {
            Admission::Open(owner) => {
                if let Some(run) = &owner.run {
                    run.held(place.bucket, place.index, &session.epoch);
                }
                if !terminal {
                    let field = keys::running_field(place.index, place.atomic);
                    let stored = stored_row(row, unix_ms());
                    work.bucket(&owner, place.bucket).row("HSET", field, &stored);
                    return;
                }
                let total = row.output_len;
                let Some(at) = self.reached(&session, &owner, place, row.tail_offset).await else {
                    return;
                };
                let piece = Piece {
                    offset: row.tail_offset,
                    data: &row.tail,
                    last: true,
                };
                let next = self.take(work, &session, &owner, place, at, &piece).await;
                if next.agent < total {
                    // Something before it is missing; the agent goes back to what is stored.
                    ack(work, session, target, row.atomic, next.agent, false, false);
                    return;
                }
                let atomic = row.atomic;
                // A long tail takes room in the agent's window.
                let patient = row.tail.len() <= SHORT_TAIL;
                if !self.streams.is_empty() {
                    self.streams.remove(&StreamKey::new(&owner, place));
                }
                let mut kept = stored_row(row, unix_ms());
                // Callers read what there is.
                kept.output_len = next.stored.unwrap_or(kept.output_len);
                work.terminal_row(owner, place, &kept);
                ack(work, session, target, atomic, total, true, patient);
            }
            Admission::Late | Admission::Gone => {
                let offset = row.output_len;
                ack(work, session, target, row.atomic, offset, terminal, false);
            }
            Admission::TryLater => {}
        }
    }

    fn own(&mut self, work: &mut Work, run: Arc<RunCell>, place: RowPlace, row: &StoredRow) {
        if run.is_done(place) {
            return;
        }
        let owner = Owner {
            task: Arc::clone(&run.task),
            header: Arc::clone(&run.header),
            run: Some(run),
        };
        work.terminal_row(owner, place, row);
    }

    /// Puts a piece of output into the batch if it joins on, and says where the stream then ends.
    async fn take(
        &mut self,
        work: &mut Work,
        session: &Session,
        owner: &Owner,
        place: RowPlace,
        at: At,
        piece: &Piece<'_>,
    ) -> Taken {
        let Piece { offset, data, last } = *piece;
        let end = offset + data.len() as u64;
        let next = match at {
            At::Next(next) => next,
            At::Cut(stored) => {
                if !last {
                    self.remember(session, owner, place, at);
                }
                return Taken {
                    agent: end,
                    stored: Some(stored),
                };
            }
        };
        if offset > next || end <= next {
            return Taken::all(next);
        }
        if end > u64::from(owner.header.output_limit) {
            session.outbox.close(CloseReason::Protocol(format!(
                "output of {end} bytes, of which {} were asked for",
                owner.header.output_limit
            )));
            return Taken::all(next);
        }
        let used = self.node.budget.of(&self.node, &owner.task).await;
        if let Some(marker) = self.node.budget.cut(&used) {
            let stored = next + marker.len() as u64;
            let bucket = work.output_bucket(owner, place.bucket);
            self.node.metrics.outputs_cut.inc();
            bucket.put(place, next, marker.as_bytes());
            bucket.note_cut(place);
            if !last {
                self.remember(session, owner, place, At::Cut(stored));
            }
            return Taken {
                agent: end,
                stored: Some(stored),
            };
        }
        // What overlaps with what is stored already is written again, as the same chunk.
        let written = work.output_bucket(owner, place.bucket).put(place, offset, data);
        self.node.budget.wrote(written);
        used.add(data.len() as u64);
        let in_batch = work.used.entry(Arc::clone(&owner.task)).or_insert_with(|| Used {
            all: used,
            bytes: 0,
            ttl_s: owner.ttl_s(),
        });
        in_batch.bytes += data.len() as u64;
        if !last {
            self.remember(session, owner, place, At::Next(end));
        }
        Taken::all(end)
    }

    fn remember(&mut self, session: &Session, owner: &Owner, place: RowPlace, at: At) {
        let session = session.id;
        self.streams
            .insert(StreamKey::new(owner, place), Stream { session, at });
    }

    /// Where the stream of a row on this session has got to. Of one that is not known here the store is asked, unless it begins now:
    /// what came before may have been stored by another node or in another life of this one, or have been dropped for want of room.
    /// `None`: the store does not say.
    async fn reached(&self, session: &Session, owner: &Owner, place: RowPlace, offset: u64) -> Option<At> {
        // The hash is only worth its while when there is anything to find.
        if !self.streams.is_empty()
            && let Some(stream) = self.streams.get(&StreamKey::new(owner, place))
            && stream.session == session.id
        {
            return Some(stream.at);
        }
        if offset == 0 {
            return Some(At::Next(0));
        }
        match self.node.task_store.progress(&owner.task, place).await {
            Ok(stored) if stored.cut => Some(At::Cut(stored.output_len)),
            Ok(stored) => Some(At::Next(stored.output_len)),
            Err(error) => {
                self.report(&error);
                None
            }
        }
    }
}

fn place(target: &s::TargetRef, atomic: u32) -> RowPlace {
    RowPlace {
        bucket: target.bucket,
        index: target.index,
        atomic,
    }
}

/// Output must be text and fit the layout; anything else is not our agent.
fn acceptable(session: &Session, offset: u64, data: &Bytes) -> bool {
    let fits = offset.checked_add(data.len() as u64).is_some_and(|end| end < 1 << 24);
    if fits && std::str::from_utf8(data).is_ok() {
        return true;
    }
    session.outbox.close(CloseReason::Protocol(
        "output that is not UTF-8 or beyond any limit".into(),
    ));
    false
}

fn ack(
    work: &mut Work,
    session: Arc<Session>,
    target: s::TargetRef,
    atomic: u32,
    offset: u64,
    terminal: bool,
    patient: bool,
) {
    let stored = s::Stored {
        target: Some(target),
        atomic,
        offset,
        terminal,
    };
    work.after.push(After::Ack(session, stored, patient));
}
