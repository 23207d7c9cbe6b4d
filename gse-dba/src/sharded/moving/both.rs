//! Commands about all keys while some of them are in two groups: in the old one and, copied or left over, in another.

use std::sync::Arc;

use bytes::Bytes;

use crate::args::Args;
use crate::copy::Reply;
use crate::resp::write::Writer;
use crate::sharded::route::Merge;
use crate::sharded::session::{Session, command, everywhere, told};
use crate::sharded::{Answer, Fate, Group, merge};

impl Session {
    /// Deletes everything, so that whoever moves slots knows.
    pub(in crate::sharded) async fn empty(
        &mut self,
        moving: &Arc<Group>,
        bytes: &Bytes,
        a: Args<'_>,
        out: &mut Writer,
    ) {
        let stopping = |_| Answer::lost(true, "this server is stopping");
        let Some(gate) = moving.gate() else {
            let waiting = moving.send(self.client.id, out.resp3, bytes.clone(), 1, true).await;
            let answer = waiting.await.unwrap_or_else(stopping);
            match answer.fate {
                Fate::Sealed => out.raw(&answer.replies),
                fate => out.error(told(&self.sharded, &fate, &[], crate::sharded::slots::MOVING, true).as_bytes()),
            }
            return;
        };
        let way = gate.enter_all().await;
        let bytes = everywhere(a).unwrap_or_else(|| bytes.clone());
        let mut waiting = Vec::new();
        for (g, group) in self.table.groups.iter().enumerate() {
            if self.table.is_used(g) {
                waiting.push((g, group.send(self.client.id, out.resp3, bytes.clone(), 1, true).await));
            }
        }
        let (mut replies, mut failed) = (Vec::new(), None);
        for (g, w) in waiting {
            let answer = w.await.unwrap_or_else(stopping);
            match answer.fate {
                Fate::Sealed => replies.push(answer.replies),
                fate => failed = failed.or_else(|| Some(told(&self.sharded, &fate, &[], g, true))),
            }
        }
        drop(way);
        match failed {
            Some(e) => out.error(e.as_bytes()),
            None => {
                let all: Vec<&[u8]> = replies.iter().map(AsRef::as_ref).collect();
                merge::all(Merge::Same, &all, out);
            }
        }
    }

    /// How many keys there are, each counted where it is served.
    pub(in crate::sharded) async fn count(&mut self, out: &mut Writer) {
        let mut total = 0i64;
        for (g, group) in self.table.groups.iter().enumerate() {
            if !self.table.is_used(g) {
                continue;
            }
            let mut cursor = Bytes::from_static(b"0");
            loop {
                let scan = Bytes::from(command(&[b"SCAN", &cursor, b"COUNT", b"2000"]));
                let answer = group
                    .send(self.client.id, false, scan, 1, false)
                    .await
                    .await
                    .unwrap_or_else(|_| Answer::lost(true, "this server is stopping"));
                if answer.fate != Fate::Sealed {
                    out.error(told(&self.sharded, &answer.fate, &[], g, false).as_bytes());
                    return;
                }
                let page = crate::copy::reply::decode(&answer.replies.freeze())
                    .ok()
                    .and_then(|mut r| r.pop());
                let Some((next, keys)) = page.as_ref().and_then(Reply::list).and_then(|l| match l {
                    [next, keys] => Some((next.bytes()?, keys.list()?)),
                    _ => None,
                }) else {
                    out.error(b"ERR a group answered in a way that can't be put together with the others");
                    return;
                };
                let shown = keys.iter().filter_map(Reply::bytes).filter(|k| self.table.shows(g, k));
                total += shown.count() as i64;
                if next == "0" {
                    break;
                }
                cursor = next.clone();
            }
        }
        out.int(total);
    }
}
