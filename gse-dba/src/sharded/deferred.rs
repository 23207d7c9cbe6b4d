//! Transactions in front of a cluster whose slot is on its way: nothing of one is executed before `EXEC`, so that all of it can be sent again where the slot is then. What a
//! transaction watches can't be taken along: it counts as changed.

use bytes::{Bytes, BytesMut};

use super::session::{Session, give_back, settle};
use super::{Answer, Fate, merge};
use crate::cluster::redirect::{Turn, turn};
use crate::cluster::retry::{ASKING, Patience};
use crate::conn::Ended;
use crate::resp::write::Writer;

const MULTI: &[u8] = b"*1\r\n$5\r\nMULTI\r\n";
const EXEC: &[u8] = b"*1\r\n$4\r\nEXEC\r\n";

/// What is queued, kept until `EXEC`.
#[derive(Default)]
pub(super) struct Kept {
    commands: Vec<Bytes>,
    bytes: usize,
    /// No node has any of it: all is sent at `EXEC`.
    pub(super) all_at_once: bool,
    /// A node has refused one of the commands: none may be executed.
    pub(super) failed: bool,
    /// What is watched is watched at a node that gets the slot, and must be asked as such.
    pub(super) asking: bool,
}

impl Kept {
    pub(super) fn add(&mut self, command: Bytes) {
        self.bytes += command.len();
        self.commands.push(command);
    }

    pub(super) fn fits(&self, more: usize, max: usize) -> bool {
        self.bytes.saturating_add(more) <= max
    }
}

impl Session {
    /// Sends a transaction as a whole until somebody executes it. `why` is what was said to the first attempt, if there was one.
    pub(super) async fn exec_at_once(
        &mut self,
        mut why: Option<Turn>,
        writes: bool,
        out: &mut Writer,
    ) -> Result<(), Ended> {
        let sharded = self.sharded.clone();
        let Some(cluster) = sharded.cluster() else {
            return Ok(());
        };
        let (kept, slot) = self.transaction.take_kept();
        if kept.failed {
            out.error(b"EXECABORT Transaction discarded because of previous errors.");
            return Ok(());
        }
        let table = sharded.table();
        let (mut g, mut asking) = (slot.map_or_else(|| table.home(), |s| table.map.group(s)), false);
        let mut patience = Patience::new(cluster.hold());
        loop {
            if let Some(turn) = &why {
                match patience.next(&sharded, turn, slot, g).await {
                    Ok(next) => (g, asking) = next,
                    Err(why) => return settle(&sharded, Answer::without(Fate::Unserved(why)), g, writes, out),
                }
            }
            let Some(group) = sharded.group(g) else {
                let lost = Answer::lost(false, "there is no such shard");
                return settle(&sharded, lost, g, writes, out);
            };
            if writes && group.seat.short().is_some() {
                group.seat.patience_ends().await;
                if let Some(short) = group.seat.short() {
                    return settle(&sharded, Answer::without(Fate::Refused(short)), g, writes, out);
                }
            }
            let Ok(mut pinned) = group.private(out.resp3).await else {
                why = Some(Turn::Later("the shard is not reachable"));
                continue;
            };
            let mut bytes = BytesMut::new();
            if asking {
                bytes.extend_from_slice(ASKING);
            }
            bytes.extend_from_slice(MULTI);
            kept.commands.iter().for_each(|c| bytes.extend_from_slice(c));
            bytes.extend_from_slice(EXEC);
            let count = kept.commands.len() + 2 + usize::from(asking);
            let answer = group.exchange(&mut pinned, &bytes, count, true, false).await;
            let ends = merge::ends(&answer.replies, count);
            let mut from = 0;
            let mut found = None;
            let mut last = BytesMut::new();
            for end in &ends {
                let reply = answer.replies.get(from..*end).unwrap_or_default();
                found = found.or_else(|| turn(reply, &answer.fate, writes));
                if reply.starts_with(b"-NOREPLICAS") {
                    // A new primary refuses writes until its copies are there, and with them the transaction: nothing of it was executed.
                    found = found.or(Some(Turn::Later("the shard has too few copies")));
                }
                from = *end;
                last = BytesMut::from(reply);
            }
            if ends.is_empty() {
                found = turn(b"", &answer.fate, writes);
            }
            if !matches!(answer.fate, Fate::Lost { .. } | Fate::TooLarge) {
                give_back(&sharded, g, pinned);
            }
            if found.is_none() {
                let answer = Answer {
                    replies: last,
                    fate: answer.fate,
                };
                return settle(&sharded, answer, g, writes, out);
            }
            why = found;
        }
    }

    /// Watches where the slot is, after a node has said that it is not there.
    pub(super) async fn watch_elsewhere(&mut self, command: &[u8], mut why: Turn, out: &mut Writer) {
        let sharded = self.sharded.clone();
        let Some(cluster) = sharded.cluster() else { return };
        if self.transaction.is_watching() {
            // What was watched before is not where this is.
            self.transaction.lost();
            out.ok();
            return;
        }
        let slot = self.transaction.slot;
        let mut g = self.transaction.pinned.take().map_or(0, |(g, _)| g);
        let mut patience = Patience::new(cluster.hold());
        loop {
            let asking;
            match patience.next(&sharded, &why, slot, g).await {
                Ok(next) => (g, asking) = next,
                Err(why) => {
                    out.error(format!("UNAVAILABLE {why}; nothing is watched, try it again").as_bytes());
                    return;
                }
            }
            let pinned = match sharded.group(g) {
                Some(group) => group.private(out.resp3).await.map(|p| (group, p)),
                None => Err("there is no such shard".to_owned()),
            };
            let Ok((group, mut pinned)) = pinned else {
                why = Turn::Later("the shard is not reachable");
                continue;
            };
            let bytes = [if asking { ASKING } else { b"" }, command].concat();
            let count = 1 + usize::from(asking);
            let answer = group.exchange(&mut pinned, &bytes, count, false, false).await;
            let ends = merge::ends(&answer.replies, count);
            let from = if asking { ends.first().copied().unwrap_or(0) } else { 0 };
            let reply = answer.replies.get(from..).unwrap_or_default();
            match turn(reply, &answer.fate, false) {
                Some(t) => why = t,
                None => {
                    if reply.starts_with(b"+") {
                        self.transaction.watches(g, pinned, asking);
                    }
                    if reply.is_empty() {
                        out.error(b"UNAVAILABLE the shard was lost; nothing is watched, try it again");
                    } else {
                        out.raw(reply);
                    }
                    return;
                }
            }
        }
    }
}
