//! Commands that wait: each has a connection of its own to the group of its keys, and waits on in another when its slot moves. What a wait is there, is left to
//! `moving::waiting`.

use std::sync::Arc;

use tokio::time::Instant;

use super::answer::{settle, told, unsent};
use super::{Session, command};
use crate::commands::Spec;
use crate::conn::Ended;
use crate::resp::parse::Requests;
use crate::resp::write::Writer;
use crate::sharded::moving::Side;
use crate::sharded::moving::waiting::shortened;
use crate::sharded::route::{self, Route};
use crate::sharded::{Fate, everywhere, merge};
use crate::single::session::encode;

impl Session {
    pub(super) async fn block(
        &mut self,
        requests: &Requests,
        i: usize,
        spec: Option<&'static Spec>,
        route: &Route,
        out: &mut Writer,
    ) -> Result<(), Ended> {
        let slot = match route {
            Route::Slot(s) => Some(*s),
            _ => None,
        };
        let (begun, mut bytes) = (Instant::now(), encode(requests, i));
        while !self.block_at(slot, requests, i, spec, &bytes, out).await? {
            // Its slot is on its way to another group: it waits there for as long as is left.
            self.table = self.sharded.table();
            bytes = shortened(requests.args(i), begun.elapsed()).into();
        }
        Ok(())
    }

    /// False when its slot moves and nothing was executed.
    async fn block_at(
        &mut self,
        slot: Option<u16>,
        requests: &Requests,
        i: usize,
        spec: Option<&'static Spec>,
        bytes: &[u8],
        out: &mut Writer,
    ) -> Result<bool, Ended> {
        let g = slot.map_or_else(|| self.table.home(), |s| self.table.map.group(s));
        let writes = route::writes(spec, requests.args(i));
        let sharded = self.sharded.clone();
        let Some(group) = self.table.group(g).cloned() else {
            return Ok(true);
        };
        if writes && group.seat.short().is_some() {
            group.seat.patience_ends().await;
        }
        if writes && let Some(why) = group.seat.short() {
            out.error(told(&sharded, &Fate::Refused(why), &[], g, true).as_bytes());
            return Ok(true);
        }
        let mut pinned = match group.private(out.resp3).await {
            Ok(p) => p,
            Err(why) => {
                out.error(unsent(&sharded, g, &why).as_bytes());
                return Ok(true);
            }
        };
        if pinned.id.is_none() {
            let answer = group
                .exchange(&mut pinned, &command(&[b"CLIENT", b"ID"]), 1, false, false)
                .await;
            pinned.id = merge::number(&answer.replies);
        }
        let client = Arc::clone(&self.client);
        let (answer, woken) = {
            let _counted = sharded.metrics().blocked();
            let _waits = pinned.id.map(|id| client.waits(g, id));
            let id = pinned.id;
            let going = sharded.wait_at(&mut self.table, slot, &group, &mut pinned, bytes);
            tokio::pin!(going);
            tokio::select! {
                biased;
                answer = &mut going => (answer, false),
                () = client.turn.over(), if id.is_some() => {
                    // It is told to give up: what it has got by then it has got, and otherwise it gets nothing.
                    let wake = command(&[b"CLIENT", b"UNBLOCK", id.unwrap_or_default().to_string().as_bytes(), b"TIMEOUT"]);
                    let straight = group.gate().map_or(&group.seat, |gate| &gate.group(Side::Source).seat);
                    if everywhere::ask(straight, &wake).await.is_none() {
                        tracing::debug!("a command that waits could not be woken; it ends by itself");
                    }
                    (going.await, true)
                }
            }
        };
        let Some(answer) = answer else { return Ok(false) };
        if woken && answer.fate == Fate::Sealed && crate::single::is_null(&answer.replies) {
            client.turn.disturb();
            group.give_back(pinned);
            return Ok(true);
        }
        settle(&sharded, answer, g, writes, out)?;
        group.give_back(pinned);
        Ok(true)
    }
}
