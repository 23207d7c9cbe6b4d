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

/// Commands to send together, each with the key that says where it belongs.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    commands: Vec<Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    slot: u16,
    cmd: Cmd,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a command. `key` is the key it works on; a command on several keys needs them all to have the same hash tag.
    pub fn push(&mut self, key: impl AsRef<[u8]>, cmd: Cmd) {
        self.commands.push(Entry {
            slot: slot(key.as_ref()),
            cmd,
        });
    }

    /// How many commands there are.
    pub fn len(&self) -> usize {
        self.commands.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.commands.is_empty()
    }

    /// Sends everything over `conn`; replies in push order, errors among them. Each sign of life is noted in `heard`.
    pub(super) async fn run_on(self, conn: Conn, heard: &Heard) -> Result<Vec<Value>, RedisError> {
        match conn {
            Conn::Single(mut conn) => {
                let mut replies = Vec::with_capacity(self.commands.len());
                for pipeline in pipelines(self.commands.into_iter().map(|entry| entry.cmd)) {
                    let count = pipeline.len();
                    replies.extend(conn.send_packed_commands(&pipeline, 0, count).await?);
                    heard.note();
                }
                Ok(replies)
            }
            Conn::Cluster(conn) => {
                let total = self.commands.len();
                let mut groups: BTreeMap<u16, (Vec<usize>, Vec<Cmd>)> = BTreeMap::new();
                for (index, entry) in self.commands.into_iter().enumerate() {
                    let (indexes, commands) = groups.entry(entry.slot).or_default();
                    indexes.push(index);
                    commands.push(entry.cmd);
                }
                let mut replies = vec![Value::Nil; total];
                let mut answers = stream::iter(groups)
                    .map(|(slot, (indexes, commands))| {
                        let mut conn = conn.clone();
                        async move {
                            let mut values = Vec::with_capacity(indexes.len());
                            for pipeline in pipelines(commands.into_iter()) {
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

/// Cuts commands into pipelines of bounded size, in order.
fn pipelines(commands: impl Iterator<Item = Cmd>) -> impl Iterator<Item = Pipeline> {
    let mut commands = commands.peekable();
    std::iter::from_fn(move || {
        let mut pipeline = Pipeline::new();
        let mut bytes = 0;
        while let Some(cmd) = commands.next_if(|cmd| {
            let fits = pipeline.len() < PIPELINE_COMMANDS && bytes + size(cmd) <= PIPELINE_BYTES;
            pipeline.is_empty() || fits
        }) {
            bytes += size(&cmd);
            pipeline.add_command(cmd);
        }
        (!pipeline.is_empty()).then_some(pipeline)
    })
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

    fn sizes(commands: Vec<Cmd>) -> Vec<usize> {
        pipelines(commands.into_iter()).map(|pipeline| pipeline.len()).collect()
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

        let order: Vec<u8> = pipelines((0..2500).map(small))
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
