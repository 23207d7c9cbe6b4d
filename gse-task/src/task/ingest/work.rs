//! A batch of results in the making: what is written to each bucket of a task, in which order, and what is to be done after that.

use std::sync::Arc;

use gse_core::random::HashMap;
use gse_core::store::Batch;
use gse_proto::keys;
use gse_proto::session as s;
use gse_proto::state::{StoredRow, TaskHeader};
use prost::Message;

use crate::clock::unix_ms;
use crate::session::registry::Session;
use crate::task::budget::TaskUse;
use crate::task::cell::{RunCell, ttl_s};
use crate::task::slice::{MAX_CHUNK, encode_chunk};
use crate::task::store::RowPlace;

/// Chunks of output in one command, in bytes, unless one alone is longer.
const OUTPUT_COMMAND: usize = 256 * 1024;

/// What is to be done once a batch is stored.
pub(super) enum After {
    /// True: it may wait for company.
    Ack(Arc<Session>, s::Stored, bool),
    Mark(Owner, RowPlace),
}

/// The task that something is reported of.
#[derive(Clone)]
pub(super) struct Owner {
    pub(super) task: Arc<str>,
    pub(super) header: Arc<TaskHeader>,
    /// Only of a task that this node owns.
    pub(super) run: Option<Arc<RunCell>>,
}

impl Owner {
    pub(super) fn ttl_s(&self) -> u64 {
        ttl_s(&self.header, unix_ms())
    }
}

/// A batch in the making.
#[derive(Default)]
pub(super) struct Work {
    pub(super) buckets: HashMap<(Arc<str>, u32), BucketWork>,
    pub(super) after: Vec<After>,
    /// Output in this batch, by task.
    pub(super) used: HashMap<Arc<str>, Used>,
}

/// Output of one task in a batch.
pub(super) struct Used {
    pub(super) all: Arc<TaskUse>,
    pub(super) bytes: u64,
    pub(super) ttl_s: u64,
}

/// What is to be written to one bucket of a task. Output goes before rows: who sees a finished row finds all of its output.
#[derive(Default)]
pub(super) struct BucketWork {
    pub(super) output_key: String,
    /// How long the output has to live.
    pub(super) ttl_s: u64,
    pub(super) chunks: Vec<redis::Cmd>,
    /// Bytes of the last command of `chunks`.
    pub(super) chunk_bytes: usize,
    pub(super) rows_key: String,
    pub(super) rows: Vec<redis::Cmd>,
}

impl BucketWork {
    /// One command carries chunks of many targets, up to a size.
    pub(super) fn chunk(&mut self, score: u64, member: &[u8]) {
        if self.chunks.is_empty() || self.chunk_bytes + member.len() > OUTPUT_COMMAND {
            let mut cmd = redis::cmd("ZADD");
            cmd.arg(&self.output_key);
            self.chunks.push(cmd);
            self.chunk_bytes = 0;
        }
        self.chunk_bytes += member.len();
        if let Some(cmd) = self.chunks.last_mut() {
            cmd.arg(score).arg(member);
        }
    }

    /// A piece of output; returns the bytes that it takes.
    pub(super) fn put(&mut self, place: RowPlace, offset: u64, data: &[u8]) -> u64 {
        let RowPlace { index, atomic, .. } = place;
        let mut written = 0;
        for (n, chunk) in data.chunks(MAX_CHUNK).enumerate() {
            let at = offset + (n * MAX_CHUNK) as u64;
            let member = encode_chunk(index, atomic, at, chunk);
            written += member.len() as u64;
            self.chunk(keys::output_score(index, atomic, at), &member);
        }
        written
    }

    /// Notes for whoever goes on with the stream that nothing comes after what is stored.
    pub(super) fn note_cut(&mut self, place: RowPlace) {
        let mut cmd = redis::cmd("HSET");
        cmd.arg(&self.rows_key)
            .arg(keys::cut_field(place.index, place.atomic))
            .arg(1);
        self.rows.push(cmd);
    }

    pub(super) fn row(&mut self, command: &str, field: String, row: &StoredRow) {
        let value = row.encode_to_vec();
        let mut cmd = redis::Cmd::with_capacity(4, command.len() + self.rows_key.len() + field.len() + value.len());
        cmd.arg(command).arg(&self.rows_key).arg(field).arg(value);
        self.rows.push(cmd);
    }
}

impl Work {
    pub(super) fn bucket(&mut self, owner: &Owner, bucket: u32) -> &mut BucketWork {
        self.buckets
            .entry((Arc::clone(&owner.task), bucket))
            .or_insert_with(|| BucketWork {
                rows_key: keys::task_rows(&owner.task, bucket),
                ..BucketWork::default()
            })
    }

    /// The bucket, ready for output.
    pub(super) fn output_bucket(&mut self, owner: &Owner, bucket: u32) -> &mut BucketWork {
        let work = self.bucket(owner, bucket);
        if work.output_key.is_empty() {
            work.output_key = keys::task_output(&owner.task, bucket);
            work.ttl_s = owner.ttl_s();
        }
        work
    }

    pub(super) fn terminal_row(&mut self, owner: Owner, place: RowPlace, row: &StoredRow) {
        // Only if absent: a row is terminal once.
        self.bucket(&owner, place.bucket)
            .row("HSETNX", keys::terminal_field(place.index, place.atomic), row);
        self.after.push(After::Mark(owner, place));
    }

    /// The commands: first what is added to the use of each task, then output before rows within a bucket.
    pub(super) fn batch(&mut self) -> Batch {
        let mut batch = Batch::new();
        for (task, used) in &self.used {
            let key = keys::task_output_bytes(task);
            let mut add = redis::cmd("INCRBY");
            add.arg(&key).arg(used.bytes);
            batch.push(&key, add);
        }
        for (task, used) in &self.used {
            let key = keys::task_output_bytes(task);
            let mut expire = redis::cmd("EXPIRE");
            expire.arg(&key).arg(used.ttl_s);
            batch.push(&key, expire);
        }
        for (_, bucket) in self.buckets.drain() {
            if !bucket.chunks.is_empty() {
                for cmd in bucket.chunks {
                    batch.push(&bucket.output_key, cmd);
                }
                let mut cmd = redis::cmd("EXPIRE");
                cmd.arg(&bucket.output_key).arg(bucket.ttl_s);
                batch.push(&bucket.output_key, cmd);
            }
            for cmd in bucket.rows {
                batch.push(&bucket.rows_key, cmd);
            }
        }
        batch
    }
}
