//! A batch of commands: how it is cut into pipelines, and how a cluster's share of it finds its node.

use std::collections::BTreeMap;

use futures::stream::{self, StreamExt, TryStreamExt};
use redis::cluster_routing::{Route, SingleNodeRoutingInfo, SlotAddr};
use redis::{Arg, Cmd, Pipeline, RedisError, Value};

use super::silence::Heard;
use super::{Conn, StoreError, error};

/// A pipeline holds at most this many commands …
const PIPELINE_COMMANDS: usize = 1000;
/// … and, beyond its first command, at most this many bytes.
const PIPELINE_BYTES: usize = 1024 * 1024;
/// Groups of one batch that are on their way to a cluster at a time.
const CLUSTER_GROUPS: usize = 32;
/// What an argument costs on the wire beyond itself, near enough.
const ARG_OVERHEAD: usize = 16;

/// A command on one key; its other arguments are added by the caller.
#[must_use]
pub fn command(name: &str, key: impl AsRef<str>) -> Cmd {
    let mut cmd = redis::cmd(name);
    cmd.arg(key.as_ref());
    cmd
}

/// Commands to send together, each with the key that says where it belongs.
///
/// Kept in the shape in which one Redis gets them, so that nothing is copied on the way out or when a batch is sent again.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    pipelines: Vec<Pipeline>,
    /// Slot of each command, in push order.
    slots: Vec<u16>,
    /// Of the last pipeline.
    bytes: usize,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a command. `key` is the key it works on; a command on several keys needs them all to have the same hash tag.
    pub fn push(&mut self, key: impl AsRef<[u8]>, cmd: Cmd) {
        self.slots.push(slot(key.as_ref()));
        let size = size(&cmd);
        match self.pipelines.last_mut() {
            Some(last) if last.len() < PIPELINE_COMMANDS && self.bytes + size <= PIPELINE_BYTES => {
                self.bytes += size;
                last.add_command(cmd);
            }
            _ => {
                let mut first = Pipeline::new();
                first.add_command(cmd);
                self.pipelines.push(first);
                self.bytes = size;
            }
        }
    }

    /// How many commands there are.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Sends everything over `conn`; replies in push order, errors among them. Each sign of life is noted in `heard`.
    pub(super) async fn run_on(&self, conn: Conn, heard: &Heard) -> Result<Vec<Value>, RedisError> {
        match conn {
            Conn::Single(mut conn) => {
                let mut replies = Vec::new();
                for pipeline in &self.pipelines {
                    let some = conn.send_packed_commands(pipeline, 0, pipeline.len()).await?;
                    heard.note();
                    if replies.is_empty() {
                        replies = some;
                    } else {
                        replies.extend(some);
                    }
                }
                Ok(replies)
            }
            Conn::Cluster(conn) => {
                let mut groups: BTreeMap<u16, (Vec<usize>, Self)> = BTreeMap::new();
                let commands = self.pipelines.iter().flat_map(Pipeline::cmd_iter);
                for (index, (slot, cmd)) in self.slots.iter().zip(commands).enumerate() {
                    let (indexes, group) = groups.entry(*slot).or_default();
                    indexes.push(index);
                    group.push("", cmd.clone());
                }
                let mut replies = vec![Value::Nil; self.len()];
                let mut answers = stream::iter(groups)
                    .map(|(slot, (indexes, group))| {
                        let mut conn = conn.clone();
                        async move {
                            let mut values = Vec::with_capacity(indexes.len());
                            for pipeline in group.pipelines {
                                let route = SingleNodeRoutingInfo::SpecificNode(Route::new(slot, SlotAddr::Master));
                                let count = pipeline.len();
                                values.extend(conn.route_pipeline(pipeline, 0, count, route).await?);
                                heard.note();
                            }
                            Ok::<_, RedisError>((indexes, values))
                        }
                    })
                    .buffer_unordered(CLUSTER_GROUPS);
                while let Some((indexes, values)) = answers.try_next().await? {
                    for (index, value) in indexes.into_iter().zip(values) {
                        replies[index] = value;
                    }
                }
                Ok(replies)
            }
        }
    }

    /// The replies, or the first error among them.
    pub(super) fn refuse_errors(replies: Vec<Value>) -> Result<Vec<Value>, StoreError> {
        match replies
            .iter()
            .enumerate()
            .find_map(|(index, value)| error::of_reply(index, value))
        {
            Some(error) => Err(error),
            None => Ok(replies),
        }
    }
}

fn size(cmd: &Cmd) -> usize {
    cmd.args_iter()
        .map(|arg| match arg {
            Arg::Simple(bytes) => bytes.len() + ARG_OVERHEAD,
            _ => ARG_OVERHEAD,
        })
        .sum()
}

/// The cluster slot of `key`: CRC-16 of its hash tag, the part between the first `{` and the next `}` if that is not empty, or
/// else of all of it.
pub fn slot(key: &[u8]) -> u16 {
    let tag = key.iter().position(|byte| *byte == b'{').and_then(|open| {
        let rest = &key[open + 1..];
        rest.iter()
            .position(|byte| *byte == b'}')
            .filter(|len| *len > 0)
            .map(|len| &rest[..len])
    });
    crc16::State::<crc16::XMODEM>::calculate(tag.unwrap_or(key)) % 16384
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_redis() {
        // Checked against CLUSTER KEYSLOT of a real server.
        assert_eq!(slot(b"123456789"), 12739);
        assert_eq!(slot(b"foo"), 12182);
        assert_eq!(slot(b"{foo}.bar"), slot(b"foo"));
        assert_eq!(slot(b"x{foo}.{bar}"), slot(b"foo"));
        assert_ne!(slot(b"{}foo"), slot(b"foo"));
        assert_eq!(
            slot(b"foo{}{bar}"),
            crc16::State::<crc16::XMODEM>::calculate(b"foo{}{bar}") % 16384
        );
        assert_eq!(slot(b""), 0);
    }

    fn batch(commands: impl IntoIterator<Item = Cmd>) -> Batch {
        let mut batch = Batch::new();
        for cmd in commands {
            batch.push("key", cmd);
        }
        batch
    }

    fn sizes(commands: Vec<Cmd>) -> Vec<usize> {
        batch(commands).pipelines.iter().map(Pipeline::len).collect()
    }

    #[test]
    fn pipelines_are_bounded_in_commands_and_bytes_and_keep_the_order() {
        let small = |index: usize| redis::cmd("ECHO").arg(index).clone();
        assert_eq!(sizes((0..2500).map(small).collect()), [1000, 1000, 500]);
        let large = || redis::cmd("ECHO").arg(vec![0_u8; 400 * 1024]).clone();
        assert_eq!(sizes((0..5).map(|_| large()).collect()), [2, 2, 1]);
        let huge = || redis::cmd("ECHO").arg(vec![0_u8; 3 * 1024 * 1024]).clone();
        assert_eq!(sizes(vec![huge(), small(0), huge()]), [1, 1, 1]);
        assert!(sizes(Vec::new()).is_empty());

        let order: Vec<u8> = batch((0..2500).map(small))
            .pipelines
            .iter()
            .flat_map(|pipeline| {
                pipeline
                    .cmd_iter()
                    .flat_map(Cmd::get_packed_command)
                    .collect::<Vec<_>>()
            })
            .collect();
        let expected: Vec<u8> = (0..2500).flat_map(|index| small(index).get_packed_command()).collect();
        assert_eq!(order, expected);
    }
}
