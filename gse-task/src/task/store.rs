//! The layout of a task in the store, and reading it back. Key names are in `gse_proto::keys`.
//!
//! A submit writes the buckets first and the header last: a task without a header does not exist. Headers and buckets never change,
//! so they are cached; rows and output are always read from the store, so that a poll is answered the same by any node.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_core::random::HashMap;
use gse_core::store::{Batch, Store, StoreError, as_array, as_bytes, as_pairs, command};
use gse_proto::keys;
use gse_proto::state::{StoredRow, TargetBucket, TaskHeader};
use moka::sync::Cache;
use prost::Message;
use tokio::time::Instant;

use super::layout::{IndexedBucket, pack_header, unpack_header, without_scripts};
use super::slice::{Chunk, MAX_CHUNK, decode_chunk};
use super::spec::Plan;

/// A header is read again after so long, so that an expired task is noticed.
const HEADER_FRESH: Duration = Duration::from_secs(30);

/// The list of a node that never comes back is forgotten after so long; no task lives longer.
const NODE_TTL_S: u64 = 40 * 24 * 3600;

/// Rows of one target: what was read of each atomic task.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RowState {
    /// Reported as running.
    pub running: Option<StoredRow>,
    /// Final.
    pub terminal: Option<StoredRow>,
}

/// Why a task was not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// It does not exist.
    #[error("the store has not taken the task")]
    Not(#[source] StoreError),
    /// The last write was not confirmed: it may exist, and has to be withdrawn.
    #[error("the store has not confirmed the task")]
    Unconfirmed(#[source] StoreError),
}

/// Where a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowPlace {
    /// Bucket.
    pub bucket: u32,
    /// Index in the bucket.
    pub index: u32,
    /// Position of the atomic task.
    pub atomic: u32,
}

/// What is stored of a row that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// When it started (unix ms); 0: not known.
    pub start_ms: u64,
    /// How much output there is.
    pub output_len: u64,
    /// Whether it was cut: nothing comes after that.
    pub cut: bool,
}

/// Which part of an output to read.
#[derive(Debug, Clone, Copy)]
pub struct OutputRange {
    /// Whose.
    pub place: RowPlace,
    /// First byte wanted.
    pub from: u64,
    /// Byte behind the last one wanted.
    pub to: u64,
}

/// Reading and writing tasks.
#[derive(Clone)]
pub struct TaskStore {
    store: Store,
    headers: Cache<String, (Instant, Arc<TaskHeader>)>,
    buckets: Cache<(String, u32), Arc<IndexedBucket>>,
}

impl std::fmt::Debug for TaskStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TaskStore").finish_non_exhaustive()
    }
}

fn expire(batch: &mut Batch, key: &str, ttl_s: u64) {
    let mut command = command("EXPIRE", key);
    command.arg(ttl_s);
    batch.push(key, command);
}

impl TaskStore {
    /// Over a store, with so many bytes of cache; what nobody has asked for in `cache_idle` is read anew if somebody does.
    #[must_use]
    pub fn new(store: Store, cache_bytes: u64, cache_idle: Duration) -> Self {
        let headers = Cache::builder()
            .max_capacity(cache_bytes / 4)
            .weigher(|_, (_, header): &(Instant, Arc<TaskHeader>)| {
                u32::try_from(header.encoded_len()).unwrap_or(u32::MAX)
            })
            .time_to_idle(cache_idle)
            .build();
        let buckets = Cache::builder()
            .max_capacity(cache_bytes / 4 * 3)
            .weigher(|_, bucket: &Arc<IndexedBucket>| bucket.weight())
            .time_to_idle(cache_idle)
            .build();
        Self {
            store,
            headers,
            buckets,
        }
    }

    /// Gives back the memory of what nobody has asked for.
    pub fn tidy(&self) {
        self.headers.run_pending_tasks();
        self.buckets.run_pending_tasks();
    }

    /// The store below, for keys that are not of a task.
    #[must_use]
    pub fn raw(&self) -> &Store {
        &self.store
    }

    /// Writes a new task; its keys live for `ttl_s` unless it is finished before. The store has to take it within `limit`.
    ///
    /// # Errors
    /// [`CreateError`]: it does not exist, or it is not known whether it does and it has to be withdrawn.
    pub async fn create(
        &self,
        node: &str,
        plan: Plan,
        ttl_s: u64,
        limit: Duration,
    ) -> Result<(Arc<TaskHeader>, Vec<Arc<TargetBucket>>), CreateError> {
        let begun = tokio::time::Instant::now();
        let task = plan.header.task_id.clone();
        let mut batch = Batch::new();
        let nodes = keys::node_tasks(node);
        let mut member = command("SADD", &nodes);
        member.arg(&task);
        batch.push(&nodes, member);
        expire(&mut batch, &nodes, NODE_TTL_S);
        for (n, bucket) in (0..).zip(&plan.buckets) {
            let key = keys::task_targets(&task, n);
            let mut set = command("SET", &key);
            set.arg(bucket.encode_to_vec()).arg("EX").arg(ttl_s);
            batch.push(&key, set);
            // The hash of rows is made now, so that it has a TTL from the start.
            let rows = keys::task_rows(&task, n);
            let mut made = command("HSET", &rows);
            made.arg("").arg("");
            batch.push(&rows, made);
            expire(&mut batch, &rows, ttl_s);
        }
        self.store.run_within(batch, limit).await.map_err(CreateError::Not)?;
        fail::fail_point!("submit-buckets");
        let key = keys::task_header(&task);
        let mut set = command("SET", &key);
        set.arg(pack_header(&plan.header)).arg("EX").arg(ttl_s);
        let mut batch = Batch::new();
        batch.push(&key, set);
        let left = limit.saturating_sub(begun.elapsed());
        self.store.run_within(batch, left).await.map_err(|error| match error {
            // The store has said no.
            StoreError::Reply { .. } => CreateError::Not(error),
            _ => CreateError::Unconfirmed(error),
        })?;

        let header = Arc::new(without_scripts(plan.header));
        self.headers.insert(task.clone(), (Instant::now(), Arc::clone(&header)));
        let mut buckets = Vec::with_capacity(plan.buckets.len());
        for (n, bucket) in (0..).zip(plan.buckets) {
            self.buckets
                .insert((task.clone(), n), Arc::new(IndexedBucket::new(&bucket)));
            buckets.push(Arc::new(bucket));
        }
        Ok((header, buckets))
    }

    /// Takes back a task that the store has not confirmed.
    ///
    /// # Errors
    /// When the store does not take that either; to be tried again.
    pub async fn withdraw(&self, node: &str, task: &str, buckets: u32) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        // The header first: without it the task does not exist.
        let header = keys::task_header(task);
        batch.push(&header, command("DEL", &header));
        for n in 0..buckets {
            for key in [keys::task_targets(task, n), keys::task_rows(task, n)] {
                batch.push(&key, command("DEL", &key));
            }
        }
        self.store.run(batch).await?;
        self.headers.invalidate(task);
        self.forget_unfinished(node, task).await
    }

    /// The header of a task, without the content of its scripts; `None` when there is no such task (any more).
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn header(&self, task: &str) -> Result<Option<Arc<TaskHeader>>, StoreError> {
        if let Some((read, header)) = self.headers.get(task)
            && read.elapsed() < HEADER_FRESH
        {
            return Ok(Some(header));
        }
        Ok(self.whole_header(task).await?.map(|header| {
            let header = Arc::new(without_scripts(header));
            self.headers
                .insert(task.to_owned(), (Instant::now(), Arc::clone(&header)));
            header
        }))
    }

    /// The header of a task with its scripts, as long as it is not finished; never cached.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn whole_header(&self, task: &str) -> Result<Option<TaskHeader>, StoreError> {
        let Some(bytes) = self.get(&keys::task_header(task)).await? else {
            return Ok(None);
        };
        let header = unpack_header(bytes);
        if header.is_none() {
            tracing::error!(
                task,
                "header of a task in the store is damaged; the task counts as gone"
            );
        }
        Ok(header)
    }

    /// A bucket of a task, to look targets up; `None` when it is not there.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn bucket(&self, task: &str, n: u32) -> Result<Option<Arc<IndexedBucket>>, StoreError> {
        let name = (task.to_owned(), n);
        if let Some(bucket) = self.buckets.get(&name) {
            return Ok(Some(bucket));
        }
        Ok(self.targets(task, n).await?.map(|bucket| {
            let bucket = Arc::new(IndexedBucket::new(&bucket));
            self.buckets.insert(name, Arc::clone(&bucket));
            bucket
        }))
    }

    /// A bucket of a task with all that is known of its targets; never cached.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn targets(&self, task: &str, n: u32) -> Result<Option<TargetBucket>, StoreError> {
        let Some(bytes) = self.get(&keys::task_targets(task, n)).await? else {
            return Ok(None);
        };
        match TargetBucket::decode(bytes) {
            Ok(bucket) => Ok(Some(bucket)),
            Err(error) => {
                tracing::error!(task, bucket = n, %error, "targets of a task in the store are damaged");
                Ok(None)
            }
        }
    }

    async fn get(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        let mut batch = Batch::new();
        batch.push(key, command("GET", key));
        let reply = self.store.run(batch).await?.into_iter().next();
        reply.map_or(Ok(None), as_bytes)
    }

    /// Rows at `places`, in their order: one round trip, one command a bucket.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn rows(&self, task: &str, places: &[RowPlace]) -> Result<Vec<RowState>, StoreError> {
        let mut by_bucket: HashMap<u32, Vec<usize>> = HashMap::default();
        for (n, place) in places.iter().enumerate() {
            by_bucket.entry(place.bucket).or_default().push(n);
        }
        let by_bucket: Vec<(u32, Vec<usize>)> = by_bucket.into_iter().collect();
        let mut batch = Batch::new();
        for (bucket, members) in &by_bucket {
            let key = keys::task_rows(task, *bucket);
            let mut get = redis::Cmd::with_capacity(2 * members.len() + 2, 16 * members.len() + key.len() + 8);
            get.arg("HMGET").arg(&key);
            for n in members {
                let place = places[*n];
                get.arg(keys::terminal_field(place.index, place.atomic))
                    .arg(keys::running_field(place.index, place.atomic));
            }
            batch.push(&key, get);
        }
        let replies = self.store.run(batch).await?;
        let mut rows = vec![RowState::default(); places.len()];
        for ((_, members), reply) in by_bucket.iter().zip(replies) {
            let mut values = as_array(reply)?.into_iter();
            for n in members {
                rows[*n].terminal = read_row(values.next())?;
                rows[*n].running = read_row(values.next())?;
            }
        }
        Ok(rows)
    }

    /// All rows of the buckets `range`, by place.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn all_rows(
        &self,
        task: &str,
        range: std::ops::Range<u32>,
    ) -> Result<HashMap<RowPlace, RowState>, StoreError> {
        let mut rows: HashMap<RowPlace, RowState> = HashMap::default();
        let mut batch = Batch::new();
        for bucket in range.clone() {
            let key = keys::task_rows(task, bucket);
            batch.push(&key, command("HGETALL", &key));
        }
        let replies = self.store.run(batch).await?;
        for (bucket, reply) in range.zip(replies) {
            for (field, value) in as_pairs(reply)? {
                let Some((kind, index, atomic)) = parse_field(&field) else {
                    continue;
                };
                let state = rows.entry(RowPlace { bucket, index, atomic }).or_default();
                let row = StoredRow::decode(value).ok();
                match kind {
                    b't' => state.terminal = row,
                    _ => state.running = row,
                }
            }
        }
        Ok(rows)
    }

    /// Targets of a bucket whose end was asked for.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn stopped(&self, task: &str, bucket: u32) -> Result<Vec<u32>, StoreError> {
        let key = keys::task_rows(task, bucket);
        let mut batch = Batch::new();
        batch.push(&key, command("HKEYS", &key));
        let reply = self.store.run(batch).await?.into_iter().next();
        let mut stopped = Vec::new();
        for field in reply.map_or(Ok(vec![]), as_array)? {
            let field = as_bytes(field)?.unwrap_or_default();
            if let Some(index) = field.strip_prefix(b"x").and_then(parse_number) {
                stopped.push(index);
            }
        }
        Ok(stopped)
    }

    /// Notes that the end of targets was asked for, so that it holds over a restart. `ttl_s`: how long a finished task's note is kept.
    ///
    /// # Errors
    /// When the store does not take it.
    pub async fn mark_stopped(&self, task: &str, places: &[(u32, u32)], ttl_s: Option<u64>) -> Result<(), StoreError> {
        let mut by_bucket: HashMap<u32, redis::Cmd> = HashMap::default();
        for (bucket, index) in places {
            by_bucket
                .entry(*bucket)
                .or_insert_with(|| command("HSET", keys::task_rows(task, *bucket)))
                .arg(keys::terminate_field(*index))
                .arg("1");
        }
        let mut batch = Batch::new();
        for (bucket, command) in by_bucket {
            let key = keys::task_rows(task, bucket);
            batch.push(&key, command);
            if let Some(ttl_s) = ttl_s {
                expire(&mut batch, &key, ttl_s);
            }
        }
        self.store.run(batch).await.map(|_| ())
    }

    /// What is stored of a row that is under way.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn progress(&self, task: &str, place: RowPlace) -> Result<Progress, StoreError> {
        let RowPlace { bucket, index, atomic } = place;
        let rows = keys::task_rows(task, bucket);
        let mut get = command("HMGET", &rows);
        get.arg(keys::running_field(index, atomic))
            .arg(keys::cut_field(index, atomic));
        let output = keys::task_output(task, bucket);
        let mut last = command("ZREVRANGEBYSCORE", &output);
        last.arg(keys::output_score(index, atomic, 0xff_ffff))
            .arg(keys::output_score(index, atomic, 0))
            .arg("LIMIT")
            .arg(0)
            .arg(1);
        let mut batch = Batch::new();
        batch.push(&rows, get);
        batch.push(&output, last);
        let mut replies = self.store.run(batch).await?.into_iter();
        let mut fields = replies.next().map_or(Ok(vec![]), as_array)?.into_iter();
        let start_ms = read_row(fields.next())?.map_or(0, |row| row.start_ms);
        let cut = fields.next().map_or(Ok(None), as_bytes)?.is_some();
        let mut end = 0;
        for member in replies.next().map_or(Ok(vec![]), as_array)? {
            if let Some(chunk) = as_bytes(member)?.as_ref().and_then(decode_chunk) {
                end = chunk.offset + chunk.text.len() as u64;
            }
        }
        Ok(Progress {
            start_ms,
            output_len: end,
            cut,
        })
    }

    /// Chunks that cover `ranges`, in their order: one round trip.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn output(&self, task: &str, ranges: &[OutputRange]) -> Result<Vec<Vec<Chunk>>, StoreError> {
        let mut batch = Batch::new();
        for range in ranges {
            let key = keys::task_output(task, range.place.bucket);
            let RowPlace { index, atomic, .. } = range.place;
            // A chunk that covers the first byte starts at most one chunk length before it.
            let first = keys::output_score(
                index,
                atomic,
                range.from.saturating_sub(MAX_CHUNK as u64).min(0xff_ffff),
            );
            let last = keys::output_score(index, atomic, range.to.min(0xff_ffff));
            let mut get = command("ZRANGEBYSCORE", &key);
            get.arg(first).arg(last);
            batch.push(&key, get);
        }
        let replies = self.store.run(batch).await?;
        let mut outputs = Vec::with_capacity(ranges.len());
        for reply in replies {
            let mut chunks = Vec::new();
            for member in as_array(reply)? {
                if let Some(member) = as_bytes(member)? {
                    match decode_chunk(&member) {
                        Some(chunk) => chunks.push(chunk),
                        None => tracing::error!(task, "a chunk of output in the store is damaged and left out"),
                    }
                }
            }
            outputs.push(chunks);
        }
        Ok(outputs)
    }

    /// Unfinished tasks of a node.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn unfinished(&self, node: &str) -> Result<Vec<String>, StoreError> {
        let key = keys::node_tasks(node);
        let mut batch = Batch::new();
        batch.push(&key, command("SMEMBERS", &key));
        let reply = self.store.run(batch).await?.into_iter().next();
        fail::fail_point!("recover-read");
        let mut tasks = Vec::new();
        for member in reply.map_or(Ok(vec![]), as_array)? {
            if let Some(task) = gse_core::store::as_string(member)? {
                tasks.push(task);
            }
        }
        Ok(tasks)
    }

    /// Puts a task on the list of unfinished ones of a node.
    ///
    /// # Errors
    /// When the store does not take it.
    pub async fn note_unfinished(&self, node: &str, task: &str) -> Result<(), StoreError> {
        let key = keys::node_tasks(node);
        let mut add = command("SADD", &key);
        add.arg(task);
        let mut batch = Batch::new();
        batch.push(&key, add);
        expire(&mut batch, &key, NODE_TTL_S);
        self.store.run(batch).await.map(|_| ())
    }

    /// Takes a task off the list of unfinished ones without touching it.
    ///
    /// # Errors
    /// When the store does not take it.
    pub async fn forget_unfinished(&self, node: &str, task: &str) -> Result<(), StoreError> {
        let key = keys::node_tasks(node);
        let mut remove = command("SREM", &key);
        remove.arg(task);
        let mut batch = Batch::new();
        batch.push(&key, remove);
        self.store.run(batch).await.map(|_| ())
    }

    /// Every row of a task is terminal: its keys live for `ttl_s` more. `header` is the one without scripts.
    ///
    /// # Errors
    /// When the store does not take it.
    pub async fn finish(&self, node: &str, header: &TaskHeader, now_ms: u64, ttl_s: u64) -> Result<(), StoreError> {
        fail::fail_point!("finish-before");
        let task = &header.task_id;
        let mut batch = Batch::new();
        for n in 0..header.buckets {
            for key in [
                keys::task_targets(task, n),
                keys::task_rows(task, n),
                keys::task_output(task, n),
            ] {
                expire(&mut batch, &key, ttl_s);
            }
        }
        // Nothing of it is sent any more: the scripts need not be kept with the results.
        let key = keys::task_header(task);
        let mut set = command("SET", &key);
        set.arg(pack_header(header)).arg("EX").arg(ttl_s);
        batch.push(&key, set);
        expire(&mut batch, &keys::task_output_bytes(task), ttl_s);
        let end = keys::task_end(task);
        let mut set = command("SET", &end);
        set.arg(now_ms).arg("EX").arg(ttl_s);
        batch.push(&end, set);
        self.store.run(batch).await?;
        fail::fail_point!("finish-stored");
        // Last, so that a crash in between is repaired by the next start.
        self.forget_unfinished(node, task).await
    }
}

fn read_row(value: Option<redis::Value>) -> Result<Option<StoredRow>, StoreError> {
    let bytes = value.map_or(Ok(None), as_bytes)?;
    Ok(bytes.and_then(|bytes| StoredRow::decode(bytes).ok()))
}

fn parse_number(text: &[u8]) -> Option<u32> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// `t5.1` or `r5.1`.
fn parse_field(field: &[u8]) -> Option<(u8, u32, u32)> {
    let (kind, rest) = field.split_first()?;
    if !matches!(kind, b't' | b'r') {
        return None;
    }
    let dot = rest.iter().position(|byte| *byte == b'.')?;
    Some((*kind, parse_number(&rest[..dot])?, parse_number(&rest[dot + 1..])?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_read_back() {
        assert_eq!(parse_field(keys::terminal_field(17, 3).as_bytes()), Some((b't', 17, 3)));
        assert_eq!(parse_field(keys::running_field(0, 0).as_bytes()), Some((b'r', 0, 0)));
        for other in [&b""[..], b"x5", b"t5", b"t.1", b"q1.1", b"t1.x"] {
            assert_eq!(parse_field(other), None);
        }
    }
}
