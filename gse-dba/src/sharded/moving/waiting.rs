//! Commands that wait for something to happen, while slots move: one that waits in the old group is woken there and waits again in the new one.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::Gate;
use crate::args::Args;
use crate::sharded::session::command;
use crate::sharded::table::Table;
use crate::sharded::{Answer, Fate, Group, Pinned, Sharded};

/// Between attempts to wake it: it may not have begun to wait when it is tried first.
const AGAIN: Duration = Duration::from_millis(20);

impl Sharded {
    /// Sends a command that may wait, and waits with it. None: its slot moves, and nothing was executed. `table` is what is held in use; it follows.
    pub(in crate::sharded) async fn wait_at(
        &self,
        table: &mut Arc<Table>,
        slot: Option<u16>,
        group: &Arc<Group>,
        pinned: &mut Pinned,
        bytes: &[u8],
    ) -> Option<Answer> {
        if group.is_elsewhere() {
            // The other one cares for it, for as long as it waits.
            *table = self.no_table();
            return Some(group.exchange(pinned, bytes, 1, true, true).await);
        }
        let id = pinned.id;
        let straight = match group.gate() {
            Some(gate) => Arc::clone(gate.group(pinned.side)),
            None => Arc::clone(group),
        };
        if self.cluster().is_some() {
            return Some(group.exchange(pinned, bytes, 1, true, true).await);
        }
        let mut epochs = self.keeper().epochs();
        let gate = group.gate().cloned();
        let displaced = async {
            let mut holding = gate.as_deref().map(Gate::holding);
            loop {
                epochs.borrow_and_update();
                let now = self.table();
                let there = now.group(slot.map_or_else(|| now.home(), |s| now.map.group(s)));
                if !there.is_some_and(|g| Arc::ptr_eq(g, group)) {
                    return;
                }
                *table = now;
                let held = async {
                    match &mut holding {
                        Some(h) => {
                            if h.wait_for(|held| *held).await.is_err() {
                                std::future::pending::<()>().await;
                            }
                        }
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    _ = epochs.changed() => {}
                    () = held => return,
                }
            }
        };
        let pass = group.exchange(pinned, bytes, 1, true, true);
        tokio::pin!(pass);
        tokio::select! {
            biased;
            answer = &mut pass => return (answer.fate != Fate::Moved).then_some(answer),
            () = displaced => {}
        }
        let wake = Bytes::from(command(&[
            b"CLIENT",
            b"UNBLOCK",
            id.unwrap_or(0).to_string().as_bytes(),
            b"TIMEOUT",
        ]));
        let mut woken = false;
        loop {
            let waking = async {
                let told = straight.send(0, false, wake.clone(), 1, false).await.await;
                tokio::time::sleep(AGAIN).await;
                told.is_ok_and(|a| a.fate == Fate::Sealed && a.replies == ":1\r\n")
            };
            tokio::pin!(waking);
            let answer = tokio::select! {
                answer = &mut pass => {
                    // Whether it was us who ended it is known only by that.
                    woken |= waking.await;
                    Some(answer)
                }
                done = &mut waking => {
                    woken |= done;
                    None
                }
            };
            match answer {
                None => {}
                Some(a) if a.fate == Fate::Moved => return None,
                Some(a) if woken && a.fate == Fate::Sealed && is_nothing(&a.replies) => return None,
                Some(a) => return Some(a),
            }
        }
    }
}

fn is_nothing(reply: &[u8]) -> bool {
    matches!(reply, b"*-1\r\n" | b"$-1\r\n" | b"_\r\n")
}

/// The command with the time that is left of what it may wait.
pub(in crate::sharded) fn shortened(a: Args<'_>, waited: Duration) -> Vec<u8> {
    let mut words: Vec<Vec<u8>> = a.iter().map(<[u8]>::to_vec).collect();
    let (at, milliseconds) = match () {
        () if a.is(0, "XREAD") || a.is(0, "XREADGROUP") => {
            ((1..a.len()).find(|i| a.is(*i, "BLOCK")).map_or(0, |i| i + 1), true)
        }
        () if a.is(0, "BLMPOP") || a.is(0, "BZMPOP") => (1, false),
        () => (a.len().saturating_sub(1), false),
    };
    let told = std::str::from_utf8(a.at(at)).ok().and_then(|t| t.parse::<f64>().ok());
    if let (Some(limit), Some(word)) = (told.filter(|l| *l > 0.0), words.get_mut(at)) {
        // Zero would be for ever.
        *word = if milliseconds {
            (limit - waited.as_millis() as f64)
                .max(1.0)
                .round()
                .to_string()
                .into_bytes()
        } else {
            format!("{:.3}", (limit - waited.as_secs_f64()).max(0.001)).into_bytes()
        };
    }
    let words: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
    command(&words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resp::parse::Parser;
    use crate::sharded::moving::UNLIMITED;

    #[test]
    fn what_is_left_of_a_wait_is_what_is_waited_again() {
        let left = |line: &str| {
            let mut parser = Parser::default();
            let words: Vec<&[u8]> = line.split(' ').map(str::as_bytes).collect();
            parser.buf.extend_from_slice(&command(&words));
            parser.parse(&UNLIMITED, 1).unwrap();
            let requests = parser.take();
            let out = shortened(requests.args(0), Duration::from_millis(1500));
            parser.buf.extend_from_slice(&out);
            parser.parse(&UNLIMITED, 1).unwrap();
            let requests = parser.take();
            let words: Vec<String> = requests
                .args(0)
                .iter()
                .map(|w| String::from_utf8(w.to_vec()).unwrap())
                .collect();
            words.join(" ")
        };
        assert_eq!(left("BLPOP a b 2"), "BLPOP a b 0.500");
        assert_eq!(left("BLPOP a 0"), "BLPOP a 0");
        assert_eq!(left("BRPOP a 1"), "BRPOP a 0.001");
        assert_eq!(left("BLMPOP 5 1 a LEFT"), "BLMPOP 3.500 1 a LEFT");
        assert_eq!(left("XREAD BLOCK 2000 STREAMS s 0"), "XREAD BLOCK 500 STREAMS s 0");
    }
}
