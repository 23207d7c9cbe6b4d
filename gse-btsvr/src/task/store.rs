//! A file task in the store. Key names are in `gse_proto::keys`.
//!
//! A submit writes the header, and with it every row: one that is not in the hashes is not over. Ends of rows are set only if
//! absent. Headers never change but for what was pushed, which goes when the last row is over; so they are cached.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_core::random::HashMap;
use gse_core::store::{Batch, Store, StoreError, as_array, as_bytes, as_int, as_pairs, as_string};
use gse_proto::keys::{self, XFER_BUCKET_ROWS};
use gse_proto::xfer::{Endpoint, StoredEnd, XferHeader};
use moka::sync::Cache;
use prost::Message;
use tokio::time::Instant;

use super::layout::{Layout, pack, unpack, without_content};

/// A header that nobody asks for is dropped after so long.
const IDLE: Duration = Duration::from_secs(120);
/// A header is read again after so long, so that an expired task is noticed.
const FRESH: Duration = Duration::from_secs(30);
/// The list of an instance that never comes back is forgotten after so long; no task lives longer.
const LIST_TTL_S: u64 = 40 * 24 * 3600;
/// Stands for all endpoints where ends are asked for.
const EVERYBODY: &str = "*";

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
    /// Without what was pushed.
    pub header: Arc<XferHeader>,
    /// The rows.
    pub layout: Arc<Layout>,
}

/// Whose part of a task is to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stopped {
    /// Everybody's.
    All,
    /// That of endpoints, as [`endpoint_name`] writes them.
    Of(Vec<String>),
}

impl Stopped {
    /// Whether an endpoint is meant.
    #[must_use]
    pub fn has(&self, endpoint: &Endpoint) -> bool {
        match self {
            Stopped::All => true,
            Stopped::Of(names) => {
                let name = endpoint_name(&endpoint.agent_id, &endpoint.container_id);
                names.contains(&name)
            }
        }
    }
}

/// One text for an agent and its container.
#[must_use]
pub fn endpoint_name(agent: &str, container: &str) -> String {
    format!("{agent}/{container}")
}

/// Reading and writing file tasks.
#[derive(Clone)]
pub struct XferStore {
    store: Store,
    headers: Cache<String, (Instant, Known)>,
}

impl std::fmt::Debug for XferStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("XferStore").finish_non_exhaustive()
    }
}

fn cmd(name: &str, key: &str) -> redis::Cmd {
    let mut cmd = redis::cmd(name);
    cmd.arg(key);
    cmd
}

fn expire(batch: &mut Batch, key: &str, ttl_s: u64) {
    let mut command = cmd("EXPIRE", key);
    command.arg(ttl_s);
    batch.push(key, command);
}

fn buckets(layout: &Layout) -> u32 {
    layout.rows().div_ceil(XFER_BUCKET_ROWS).max(1)
}

impl XferStore {
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
    pub async fn create(&self, header: &XferHeader, ttl_s: u64, limit: Duration) -> Result<(), CreateError> {
        let begun = Instant::now();
        let list = keys::file_tasks(&header.node_id);
        let mut add = cmd("SADD", &list);
        add.arg(&header.task_id);
        let mut batch = Batch::new();
        batch.push(&list, add);
        expire(&mut batch, &list, LIST_TTL_S);
        self.store.run_within(batch, limit).await.map_err(CreateError::Not)?;
        let key = keys::xfer_header(&header.task_id);
        let mut set = cmd("SET", &key);
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

    /// Writes an unfinished task as one of the instance that its header names now; it lives for `ttl_s` unless it is finished before.
    ///
    /// # Errors
    /// When the store does not take it; to be tried again.
    pub async fn adopt(&self, header: &XferHeader, ttl_s: u64) -> Result<(), StoreError> {
        let list = keys::file_tasks(&header.node_id);
        let mut add = cmd("SADD", &list);
        add.arg(&header.task_id);
        let mut batch = Batch::new();
        batch.push(&list, add);
        expire(&mut batch, &list, LIST_TTL_S);
        self.store.run(batch).await?;
        let key = keys::xfer_header(&header.task_id);
        let mut set = cmd("SET", &key);
        // Only if it is still there: it may have been withdrawn.
        set.arg(pack(header)).arg("XX").arg("EX").arg(ttl_s);
        let mut batch = Batch::new();
        batch.push(&key, set);
        self.store.run(batch).await?;
        self.headers.invalidate(&header.task_id);
        Ok(())
    }

    /// A task as it is in the store at this moment.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn known_now(&self, task: &str) -> Result<Option<Known>, StoreError> {
        self.headers.invalidate(task);
        self.known(task).await
    }

    /// Takes back a task that the store has not confirmed.
    ///
    /// # Errors
    /// When the store does not take that either; to be tried again.
    pub async fn withdraw(&self, node: &str, task: &str) -> Result<(), StoreError> {
        let key = keys::xfer_header(task);
        let mut batch = Batch::new();
        batch.push(&key, cmd("DEL", &key));
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
            let known = Known {
                layout: Arc::new(Layout::new(&header)),
                header: Arc::new(without_content(header)),
            };
            self.headers.insert(task.to_owned(), (Instant::now(), known.clone()));
            known
        }))
    }

    /// The whole header of a task; never cached.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn header(&self, task: &str) -> Result<Option<XferHeader>, StoreError> {
        let key = keys::xfer_header(task);
        let mut batch = Batch::new();
        batch.push(&key, cmd("GET", &key));
        let reply = self.store.run(batch).await?.into_iter().next();
        let Some(bytes) = reply.map_or(Ok(None), as_bytes)? else {
            return Ok(None);
        };
        let header = unpack(bytes);
        if header.is_none() {
            tracing::error!(
                task,
                "header of a file task in the store is damaged; the task counts as gone"
            );
        }
        Ok(header)
    }

    /// Rows that are over.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn ends(&self, task: &str, layout: &Layout) -> Result<HashMap<u32, StoredEnd>, StoreError> {
        let mut batch = Batch::new();
        for bucket in 0..buckets(layout) {
            let key = keys::xfer_rows(task, bucket);
            batch.push(&key, cmd("HGETALL", &key));
        }
        let mut ends = HashMap::default();
        for reply in self.store.run(batch).await? {
            for (field, value) in as_pairs(reply)? {
                let row = std::str::from_utf8(&field).ok().and_then(|text| text.parse().ok());
                match (row, StoredEnd::decode(value)) {
                    (Some(row), Ok(end)) => {
                        ends.insert(row, end);
                    }
                    _ => tracing::error!(task, "a row of a file task in the store is damaged and left out"),
                }
            }
        }
        Ok(ends)
    }

    /// Stores ends; returns those that were stored before with another one.
    ///
    /// # Errors
    /// When the store does not take them; some may be stored.
    pub async fn put_ends(
        &self,
        task: &str,
        ends: &[(u32, Arc<StoredEnd>)],
        ttl_s: u64,
    ) -> Result<HashMap<u32, StoredEnd>, StoreError> {
        let mut batch = Batch::new();
        let mut touched: Vec<u32> = Vec::new();
        for (row, end) in ends {
            let bucket = row / XFER_BUCKET_ROWS;
            let key = keys::xfer_rows(task, bucket);
            let mut set = cmd("HSETNX", &key);
            set.arg(*row).arg(end.encode_to_vec());
            batch.push(&key, set);
            if !touched.contains(&bucket) {
                touched.push(bucket);
            }
        }
        for bucket in touched {
            expire(&mut batch, &keys::xfer_rows(task, bucket), ttl_s);
        }
        let replies = self.store.run(batch).await?;
        let mut there = Vec::new();
        for ((row, _), reply) in ends.iter().zip(replies) {
            if as_int(reply)? == 0 {
                there.push(*row);
            }
        }
        if there.is_empty() {
            return Ok(HashMap::default());
        }
        let mut batch = Batch::new();
        for row in &there {
            let key = keys::xfer_rows(task, row / XFER_BUCKET_ROWS);
            let mut get = cmd("HGET", &key);
            get.arg(*row);
            batch.push(&key, get);
        }
        let mut other = HashMap::default();
        for (row, reply) in there.into_iter().zip(self.store.run(batch).await?) {
            if let Some(end) = as_bytes(reply)?.and_then(|bytes: Bytes| StoredEnd::decode(bytes).ok()) {
                other.insert(row, end);
            }
        }
        Ok(other)
    }

    /// Notes that the end of parts of a task was asked for, so that it holds over a restart.
    ///
    /// # Errors
    /// When the store does not take it.
    pub async fn mark_stopped(&self, task: &str, stopped: &Stopped, ttl_s: u64) -> Result<(), StoreError> {
        let key = keys::xfer_stopped(task);
        let mut add = cmd("SADD", &key);
        match stopped {
            Stopped::All => add.arg(EVERYBODY),
            Stopped::Of(names) if names.is_empty() => return Ok(()),
            Stopped::Of(names) => add.arg(names),
        };
        let mut batch = Batch::new();
        batch.push(&key, add);
        expire(&mut batch, &key, ttl_s);
        self.store.run(batch).await.map(|_| ())
    }

    /// What was noted so; `None`: nothing.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn stopped(&self, task: &str) -> Result<Option<Stopped>, StoreError> {
        let names = self.members(&keys::xfer_stopped(task)).await?;
        Ok(match names {
            names if names.is_empty() => None,
            names if names.iter().any(|name| name == EVERYBODY) => Some(Stopped::All),
            names => Some(Stopped::Of(names)),
        })
    }

    /// Unfinished tasks of an instance.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn unfinished(&self, node: &str) -> Result<Vec<String>, StoreError> {
        self.members(&keys::file_tasks(node)).await
    }

    async fn members(&self, key: &str) -> Result<Vec<String>, StoreError> {
        let mut batch = Batch::new();
        batch.push(key, cmd("SMEMBERS", key));
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
        let key = keys::file_tasks(node);
        let mut remove = cmd("SREM", &key);
        remove.arg(task);
        let mut batch = Batch::new();
        batch.push(&key, remove);
        self.store.run(batch).await.map(|_| ())
    }

    /// Every row of a task is over: its keys live for `ttl_s` more, and what was pushed goes.
    ///
    /// # Errors
    /// When the store does not take it.
    pub async fn finish(&self, known: &Known, ttl_s: u64) -> Result<(), StoreError> {
        let task = &known.header.task_id;
        let mut batch = Batch::new();
        for bucket in 0..buckets(&known.layout) {
            expire(&mut batch, &keys::xfer_rows(task, bucket), ttl_s);
        }
        expire(&mut batch, &keys::xfer_stopped(task), ttl_s);
        let key = keys::xfer_header(task);
        if known.header.push {
            let mut set = cmd("SET", &key);
            set.arg(pack(&known.header)).arg("EX").arg(ttl_s);
            batch.push(&key, set);
        } else {
            expire(&mut batch, &key, ttl_s);
        }
        self.store.run(batch).await?;
        // Last, so that a crash in between is repaired by the next start.
        self.forget(&known.header.node_id, task).await
    }
}
