//! Follows redirections for commands that a node did not execute: to where it says, or again in a moment, until the time for which commands are held is up. Commands of one
//! slot stay in the order in which the client sent them.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rand::RngExt as _;
use tokio::time::Instant;

use super::redirect::{Turn, turn};
use crate::sharded::{Answer, Fate, Sharded, merge};

pub(crate) const ASKING: &[u8] = b"*1\r\n$6\r\nASKING\r\n";
const FIRST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);
/// Redirections followed at once; from then on there is a pause before each.
const AT_ONCE: u32 = 3;

/// A command with the answer it has had so far.
pub(crate) struct Asked {
    pub(crate) group: usize,
    /// None when it names no key.
    pub(crate) slot: Option<u16>,
    pub(crate) bytes: Bytes,
    pub(crate) writes: bool,
    pub(crate) reply: BytesMut,
    pub(crate) fate: Fate,
    /// Whether it was asked again, so that the answer is another.
    pub(crate) again: bool,
}

impl Asked {
    fn turn(&self) -> Option<Turn> {
        turn(&self.reply, &self.fate, self.writes)
    }

    fn give_up(&mut self, why: String) {
        self.reply = BytesMut::new();
        self.fate = Fate::Unserved(why);
        self.again = true;
    }
}

/// The waiting between attempts at one command, and its end.
pub(crate) struct Patience {
    until: Instant,
    pause: Duration,
    turns: u32,
}

impl Patience {
    pub(crate) fn new(hold: Duration) -> Self {
        Self {
            until: Instant::now() + hold,
            pause: FIRST_PAUSE,
            turns: 0,
        }
    }

    /// Finds the group for the next attempt and whether that has to ask for a slot that is not its own yet; waits when that helps. An error: the time is up, and why.
    pub(crate) async fn next(
        &mut self,
        sharded: &Sharded,
        turn: &Turn,
        slot: Option<u16>,
        group: usize,
    ) -> Result<(usize, bool), String> {
        sharded.metrics().redirected();
        let owner = || match slot {
            Some(slot) => sharded.table().map.group(slot),
            None => group,
        };
        let Some(cluster) = sharded.cluster() else {
            return Err("this is no cluster".into());
        };
        let known = match turn {
            Turn::Moved(slot, place) => cluster.moved(sharded, *slot, place).map(|g| (g, false)),
            Turn::Ask(place) => super::at(&sharded.table(), place).map(|g| (g, true)),
            Turn::Later(_) => None,
        };
        self.turns += 1;
        if let Some(known) = known
            && self.turns <= AT_ONCE
        {
            return Ok(known);
        }
        let why = || match (turn, slot) {
            (Turn::Later(why), _) => (*why).to_owned(),
            (_, Some(slot)) => format!("slot {slot} is on its way between nodes"),
            (_, None) => "it is on its way between nodes".to_owned(),
        };
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(why());
        }
        let pause = self.pause.mul_f64(rand::rng().random_range(0.5..1.0)).min(left);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        tokio::time::sleep(pause).await;
        match (known, turn) {
            (Some(known), _) => Ok(known),
            (None, Turn::Later(_)) => Ok((owner(), false)),
            // Nobody is known at that place: whoever watches the cluster finds out.
            (None, Turn::Moved(_, place) | Turn::Ask(place)) => {
                cluster.look(left).await;
                let asking = matches!(turn, Turn::Ask(_));
                Ok(super::at(&sharded.table(), place).map_or_else(|| (owner(), false), |g| (g, asking)))
            }
        }
    }
}

/// Follows every redirection among the answers to one batch, which are in the order in which the client sent the commands.
pub(crate) async fn follow(sharded: &Sharded, client: u64, resp3: bool, asked: &mut [Asked]) {
    let Some(cluster) = sharded.cluster() else { return };
    let hold = cluster.hold();
    let mut chains: HashMap<(Option<u16>, usize), Vec<&mut Asked>> = HashMap::new();
    for (i, a) in asked.iter_mut().enumerate() {
        // What names no key stands alone.
        let alone = if a.slot.is_some() { 0 } else { i };
        chains.entry((a.slot, alone)).or_default().push(a);
    }
    let chains = chains.into_values().filter_map(|mut chain| {
        refuse_overtaken(&mut chain);
        chain.retain(|a| a.turn().is_some());
        (!chain.is_empty()).then(|| follow_chain(sharded, client, resp3, hold, chain.into()))
    });
    futures::future::join_all(chains).await;
}

/// A command that was not executed while a later one of the same slot was must not be executed after it.
fn refuse_overtaken(chain: &mut [&mut Asked]) {
    let (mut executed, mut written) = (false, false);
    for a in chain.iter_mut().rev() {
        if a.turn().is_some() {
            if written || (executed && a.writes) {
                let slot = a.slot.unwrap_or(0);
                a.give_up(format!(
                    "slot {slot} was on its way between nodes, and a later command of the same pipeline came through"
                ));
            }
        } else if !matches!(a.fate, Fate::Unserved(_) | Fate::Refused(_)) {
            executed = true;
            written |= a.writes;
        }
    }
}

/// Asks again for the commands of one slot until each has an answer.
async fn follow_chain(sharded: &Sharded, client: u64, resp3: bool, hold: Duration, mut waiting: VecDeque<&mut Asked>) {
    let mut patience = Patience::new(hold);
    while let Some(first) = waiting.front() {
        let Some(t) = first.turn() else {
            waiting.pop_front();
            continue;
        };
        let (group, asking) = match patience.next(sharded, &t, first.slot, first.group).await {
            Ok(next) => next,
            Err(why) => {
                waiting.iter_mut().for_each(|a| a.give_up(why.clone()));
                return;
            }
        };
        // Those that were sent the same way go together; the others wait for them.
        let n = waiting
            .iter()
            .take_while(|a| a.turn().as_ref() == Some(&t))
            .count()
            .max(1);
        let mut now: Vec<&mut Asked> = waiting.drain(..n).collect();
        again(sharded, client, resp3, group, asking, &mut now).await;
        refuse_overtaken(&mut now);
        for a in now.into_iter().rev() {
            if a.turn().is_some() {
                waiting.push_front(a);
            }
        }
    }
}

async fn again(sharded: &Sharded, client: u64, resp3: bool, g: usize, asking: bool, now: &mut [&mut Asked]) {
    let mut bytes = BytesMut::new();
    for a in now.iter() {
        if asking {
            bytes.extend_from_slice(ASKING);
        }
        bytes.extend_from_slice(&a.bytes);
    }
    let each = if asking { 2 } else { 1 };
    let (count, writes) = (now.len() * each, now.iter().any(|a| a.writes));
    let answer = match sharded.group(g) {
        Some(group) => {
            let waiting = group.send(client, resp3, bytes.freeze(), count, writes).await;
            waiting
                .await
                .unwrap_or_else(|_| Answer::lost(true, "this server is stopping"))
        }
        None => Answer::lost(false, "there is no such shard"),
    };
    let ends = merge::ends(&answer.replies, count);
    for (i, a) in now.iter_mut().enumerate() {
        let at = i * each + each - 1;
        let from = at.checked_sub(1).map_or(Some(0), |n| ends.get(n).copied());
        let reply = from
            .zip(ends.get(at))
            .and_then(|(from, to)| answer.replies.get(from..*to));
        a.reply = BytesMut::from(reply.unwrap_or_default());
        a.fate = answer.fate.clone();
        a.group = g;
        a.again = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(reply: &str, writes: bool) -> Asked {
        Asked {
            group: 0,
            slot: Some(7),
            bytes: Bytes::new(),
            writes,
            reply: BytesMut::from(reply),
            fate: Fate::Sealed,
            again: false,
        }
    }

    fn given_up(all: &[(&str, bool)]) -> Vec<bool> {
        let mut all: Vec<Asked> = all.iter().map(|(r, w)| asked(r, *w)).collect();
        refuse_overtaken(&mut all.iter_mut().collect::<Vec<_>>());
        all.iter().map(|a| matches!(a.fate, Fate::Unserved(_))).collect()
    }

    #[test]
    fn nothing_is_executed_after_what_the_client_sent_later() {
        const TRY: &str = "-TRYAGAIN x\r\n";
        assert_eq!(given_up(&[(TRY, true), (TRY, true)]), [false, false]);
        assert_eq!(given_up(&[("+OK\r\n", true), (TRY, true)]), [false, false]);
        assert_eq!(given_up(&[(TRY, true), ("+OK\r\n", true)]), [true, false]);
        assert_eq!(
            given_up(&[(TRY, false), ("+OK\r\n", true)]),
            [true, false],
            "a read must not see what comes later"
        );
        assert_eq!(given_up(&[(TRY, true), ("$1\r\nx\r\n", false)]), [true, false]);
        assert_eq!(
            given_up(&[(TRY, false), ("$1\r\nx\r\n", false)]),
            [false, false],
            "two reads may change places"
        );
        assert_eq!(
            given_up(&[(TRY, true), (TRY, true), ("+OK\r\n", true)]),
            [true, true, false]
        );
    }
}
