//! A process task in the store. Key names are in `gse_proto::keys`.
//!
//! A submit writes the header, and with it every row: one that is not in the hashes is not over. Ends of rows are set only if absent.
//! Headers never change; so they are cached.

use std::sync::Arc;
use std::time::Duration;

use gse_core::random::HashMap;
use gse_core::store::{Batch, Store, StoreError, as_array, as_bytes, as_pairs, as_string, command};
use gse_proto::keys::{self, PROC_BUCKET_ROWS};
use gse_proto::procstore::{ProcHeader, StoredResult};
use moka::sync::Cache;
use prost::Message;
use tokio::time::Instant;

use super::layout::{Layout, pack, unpack};

/// A header that nobody asks for is dropped after so long.
const IDLE: Duration = Duration::from_secs(120);
/// A header is read again after so long, so that an expired task is noticed.
const FRESH: Duration = Duration::from_secs(30);
/// The list of an instance that never comes back is forgotten after so long; no task lives longer.
const LIST_TTL_S: u64 = 40 * 24 * 3600;

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

/// A task's header and the numbers of its rows.
#[derive(Debug, Clone)]
pub struct Known {
    /// As submitted.
    pub header: Arc<ProcHeader>,
    /// The rows.
    pub layout: Arc<Layout>,
}

impl Known {
    /// That of a header.
    #[must_use]
    pub fn new(header: ProcHeader) -> Self {
        Self {
            layout: Arc::new(Layout::new(&header)),
            header: Arc::new(header),
        }
    }
}

/// Reading and writing process tasks.
#[derive(Clone)]
pub struct TaskStore {
    store: Store,
    headers: Cache<String, (Instant, Known)>,
}

impl std::fmt::Debug for TaskStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TaskStore").finish_non_exhaustive()
    }
}

fn expire(batch: &mut Batch, key: &str, ttl_s: u64) {
    let mut cmd = command("EXPIRE", key);
    cmd.arg(ttl_s);
    batch.push(key, cmd);
}

fn buckets(layout: &Layout) -> u32 {
    layout.rows().div_ceil(PROC_BUCKET_ROWS).max(1)
}

impl TaskStore {
    /// Over a store, with so many bytes of cache.
    #[must_use]
    pub fn new(store: Store, cache_bytes: u64) -> Self {
        let headers = Cache::builder()
            .max_capacity(cache_bytes)
            .weigher(|_, (_, known): &(Instant, Known)| u32::try_from(known.header.encoded_len()).unwrap_or(u32::MAX))
            .time_to_idle(IDLE)
            .build();
        Self { store, headers }
    }

    /// The store below, for keys that are not of a task.
    #[must_use]
    pub fn raw(&self) -> &Store {
        &self.store
    }

    /// Writes a new task; it lives for `ttl_s` unless it is finished before. The store has to take it within `limit`.
    ///
    /// # Errors
    /// [`CreateError`]: it does not exist, or it is not known whether it does and it has to be withdrawn.
    pub async fn create(&self, header: &ProcHeader, ttl_s: u64, limit: Duration) -> Result<(), CreateError> {
        let begun = Instant::now();
        self.note(&header.node_id, &header.task_id, limit)
            .await
            .map_err(CreateError::Not)?;
        let key = keys::proc_header(&header.task_id);
        let mut set = command("SET", &key);
        set.arg(pack(header)).arg("EX").arg(ttl_s);
        let mut batch = Batch::new();
        batch.push(&key, set);
        let left = limit.saturating_sub(begun.elapsed());
        self.store.run_within(batch, left).await.map_err(|error| match error {
            // The store has said no.
            StoreError::Reply { .. } => CreateError::Not(error),
            _ => CreateError::Unconfirmed(error),
        })?;
        Ok(())
    }

    /// Puts a task on an instance's list of unfinished ones.
    ///
    /// # Errors
    /// When the store does not take it.
    pub async fn note(&self, node: &str, task: &str, limit: Duration) -> Result<(), StoreError> {
        let list = keys::proc_tasks(node);
        let mut add = command("SADD", &list);
        add.arg(task);
        let mut batch = Batch::new();
        batch.push(&list, add);
        expire(&mut batch, &list, LIST_TTL_S);
        self.store.run_within(batch, limit).await.map(|_| ())
    }

    /// Takes back a task that the store has not confirmed.
    ///
    /// # Errors
    /// When the store does not take that either; to be tried again.
    pub async fn withdraw(&self, node: &str, task: &str) -> Result<(), StoreError> {
        let key = keys::proc_header(task);
        let mut batch = Batch::new();
        batch.push(&key, command("DEL", &key));
        self.store.run(batch).await?;
        self.headers.invalidate(task);
        self.forget(node, task).await
    }

    /// A task as polls need it; `None` when there is no such task (any more).
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn known(&self, task: &str) -> Result<Option<Known>, StoreError> {
        if let Some((read, known)) = self.headers.get(task)
            && read.elapsed() < FRESH
        {
            return Ok(Some(known));
        }
        Ok(self.header(task).await?.map(|header| {
            let known = Known::new(header);
            self.headers.insert(task.to_owned(), (Instant::now(), known.clone()));
            known
        }))
    }

    /// The header of a task; never cached.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn header(&self, task: &str) -> Result<Option<ProcHeader>, StoreError> {
        let key = keys::proc_header(task);
        let mut batch = Batch::new();
        batch.push(&key, command("GET", &key));
        let reply = self.store.run(batch).await?.into_iter().next();
        let Some(bytes) = reply.map_or(Ok(None), as_bytes)? else {
            return Ok(None);
        };
        let header = unpack(bytes);
        if header.is_none() {
            tracing::error!(
                task,
                "header of a process task in the store is damaged; the task counts as gone"
            );
        }
        Ok(header)
    }

    /// Rows that are over.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn results(&self, task: &str, layout: &Layout) -> Result<HashMap<u32, StoredResult>, StoreError> {
        let mut batch = Batch::new();
        for bucket in 0..buckets(layout) {
            let key = keys::proc_rows(task, bucket);
            batch.push(&key, command("HGETALL", &key));
        }
        let mut results = HashMap::default();
        for reply in self.store.run(batch).await? {
            for (field, value) in as_pairs(reply)? {
                let row = std::str::from_utf8(&field).ok().and_then(|text| text.parse().ok());
                match (row, StoredResult::decode(value)) {
                    (Some(row), Ok(result)) => {
                        results.insert(row, result);
                    }
                    _ => tracing::error!(task, "a row of a process task in the store is damaged and left out"),
                }
            }
        }
        Ok(results)
    }

    /// Stores rows that are over; one that was stored before stays as it is.
    ///
    /// # Errors
    /// When the store does not take them; some may be stored.
    pub async fn put_results(&self, task: &str, results: &[(u32, StoredResult)], ttl_s: u64) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        let mut touched: Vec<u32> = Vec::new();
        for (row, result) in results {
            let bucket = row / PROC_BUCKET_ROWS;
            let key = keys::proc_rows(task, bucket);
            let mut set = command("HSETNX", &key);
            set.arg(*row).arg(result.encode_to_vec());
            batch.push(&key, set);
            if !touched.contains(&bucket) {
                touched.push(bucket);
            }
        }
        for bucket in touched {
            expire(&mut batch, &keys::proc_rows(task, bucket), ttl_s);
        }
        self.store.run(batch).await.map(|_| ())
    }

    /// Unfinished tasks of an instance.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn unfinished(&self, node: &str) -> Result<Vec<String>, StoreError> {
        let key = keys::proc_tasks(node);
        let mut batch = Batch::new();
        batch.push(&key, command("SMEMBERS", &key));
        let reply = self.store.run(batch).await?.into_iter().next();
        let mut members = Vec::new();
        for member in reply.map_or(Ok(vec![]), as_array)? {
            members.extend(as_string(member)?);
        }
        Ok(members)
    }

    /// Takes a task off the list of unfinished ones without touching it.
    ///
    /// # Errors
    /// When the store does not take it.
    pub async fn forget(&self, node: &str, task: &str) -> Result<(), StoreError> {
        let key = keys::proc_tasks(node);
        let mut remove = command("SREM", &key);
        remove.arg(task);
        let mut batch = Batch::new();
        batch.push(&key, remove);
        self.store.run(batch).await.map(|_| ())
    }

    /// Every row of a task is over: its keys live for `ttl_s` more.
    ///
    /// # Errors
    /// When the store does not take it.
    pub async fn finish(&self, node: &str, known: &Known, ttl_s: u64) -> Result<(), StoreError> {
        let task = &known.header.task_id;
        let mut batch = Batch::new();
        for bucket in 0..buckets(&known.layout) {
            expire(&mut batch, &keys::proc_rows(task, bucket), ttl_s);
        }
        expire(&mut batch, &keys::proc_header(task), ttl_s);
        self.store.run(batch).await?;
        // Last, so that a crash in between is repaired by the next start.
        self.forget(node, task).await
    }
}
