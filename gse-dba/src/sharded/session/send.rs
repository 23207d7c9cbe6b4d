//! Sends what is planned to all groups at once and takes their answers, asks copies where that is allowed, and in front of a cluster asks again where nodes have refused.
//! The client is told by `answer`, except of what can go through as it came.

use bytes::{Bytes, BytesMut};

use super::answer::one;
use super::load::Load;
use super::{Kind, Session, Step};
use crate::cluster::{Cluster, redirect, retry};
use crate::conn::Ended;
use crate::resp::parse::Requests;
use crate::resp::write::Writer;
use crate::sharded::route::Split;
use crate::sharded::slots::{MOVING, slot};
use crate::sharded::{Answer, Fate, Group, merge};

/// Room for steps that is kept for the next ones.
const KEPT: usize = 32;

impl Session {
    pub(super) async fn send(&mut self, requests: &Requests, out: &mut Writer) -> Result<(), Ended> {
        let steps = std::mem::take(&mut self.steps);
        self.several.clear();
        let (Some(first), Some(last)) = (steps.first(), steps.last()) else {
            return Ok(());
        };
        // The usual case is one group for all of it: then bytes go through as they came.
        if let Kind::One(g) = first.kind
            && steps.iter().all(|s| matches!(s.kind, Kind::One(of) if of == g))
            && last.i - first.i + 1 == steps.len()
            && let Some(bytes) = requests.raw_run(first.i, last.i + 1)
            && let Some(group) = self.table.group(g)
        {
            let writes = steps.iter().any(|s| s.writes);
            let answer = self.ask(g, group, out.resp3, bytes, steps.len(), writes).await;
            let odd = self.sharded.cluster().is_some() && is_odd(&answer);
            if answer.fate == Fate::Sealed && !odd {
                if out.buf.is_empty() {
                    out.buf = answer.replies;
                } else {
                    out.raw(&answer.replies);
                }
                let mut steps = steps;
                steps.clear();
                if steps.capacity() <= KEPT {
                    self.steps = steps;
                }
                return Ok(());
            }
            let mut load = Load {
                ends: merge::ends(&answer.replies, steps.len()),
                answer: Some(answer),
                ..Load::default()
            };
            if odd {
                let mut loads: Vec<Load> = (0..g).map(|_| Load::default()).collect();
                loads.push(load);
                self.follow(requests, &steps, &mut loads, out.resp3).await;
                load = loads.pop().unwrap_or_default();
            }
            for step in &steps {
                one(&self.sharded, &mut load, g, step.writes, out)?;
            }
            return Ok(());
        }
        let mut loads = self.load(requests, &steps);
        if self.sharded.cluster().is_some_and(|c| c.readers().is_some()) {
            self.ask_all(&mut loads, out.resp3).await;
        }
        let mut waiting = Vec::with_capacity(loads.len());
        let moving = loads.len() - 1;
        for (g, load) in loads.iter_mut().enumerate() {
            waiting.push(match self.table.group(if g == moving { MOVING } else { g }) {
                Some(group) if load.count > 0 && load.answer.is_none() => {
                    let bytes = Bytes::from(std::mem::take(&mut load.bytes));
                    Some(
                        group
                            .send(self.client.id, out.resp3, bytes, load.count, load.writes)
                            .await,
                    )
                }
                _ => None,
            });
        }
        for (load, waiting) in loads.iter_mut().zip(waiting) {
            if let Some(waiting) = waiting {
                let answer = waiting
                    .await
                    .unwrap_or_else(|_| Answer::lost(true, "this server is stopping"));
                load.ends = merge::ends(&answer.replies, load.count);
                load.answer = Some(answer);
            }
        }
        let is_odd = |l: &Load| l.answer.as_ref().is_some_and(is_odd);
        if self.sharded.cluster().is_some() && loads.iter().any(is_odd) {
            self.follow(requests, &steps, &mut loads, out.resp3).await;
        }
        let mut steps = steps;
        for step in steps.drain(..) {
            self.answer(requests, step, &mut loads, out)?;
        }
        if steps.capacity() <= KEPT {
            self.steps = steps;
        }
        Ok(())
    }

    /// Asks a group, or for a read one of its copies where that is allowed.
    async fn ask(&self, g: usize, group: &Group, resp3: bool, bytes: Bytes, count: usize, writes: bool) -> Answer {
        if !writes
            && let Some(readers) = self.sharded.cluster().and_then(Cluster::readers)
            && let Some(answer) = readers.read(g, &group.seat, resp3, &bytes, count).await
        {
            return answer;
        }
        let waiting = group.send(self.client.id, resp3, bytes, count, writes).await;
        waiting
            .await
            .unwrap_or_else(|_| Answer::lost(true, "this server is stopping"))
    }

    /// The same for what goes to several groups.
    async fn ask_all(&self, loads: &mut [Load], resp3: bool) {
        let asked = loads
            .iter_mut()
            .enumerate()
            .filter(|(_, l)| l.count > 0)
            .filter_map(|(g, load)| {
                let group = self.table.group(g)?;
                let bytes = Bytes::from(std::mem::take(&mut load.bytes));
                Some(async move {
                    let answer = self.ask(g, group, resp3, bytes, load.count, load.writes).await;
                    load.ends = merge::ends(&answer.replies, load.count);
                    load.answer = Some(answer);
                })
            });
        futures::future::join_all(asked).await;
    }

    /// In front of a cluster: what a node did not execute is asked for again, where it belongs.
    async fn follow(&self, requests: &Requests, steps: &[Step], loads: &mut [Load], resp3: bool) {
        let mut asked = Vec::new();
        let mut taken = vec![0; loads.len()];
        let mut places = Vec::new();
        for step in steps {
            let a = requests.args(step.i);
            let slots: Vec<Option<u16>> = match &step.kind {
                Kind::Parts(how, parts) => {
                    let width = if *how == Split::Pairs { 2 } else { 1 };
                    let first = |keys: &[u32]| keys.first().map(|k| slot(a.at(1 + width * *k as usize)));
                    parts.iter().map(|(_, keys)| first(keys)).collect()
                }
                _ => vec![step.slot],
            };
            let mut part = 0;
            self.each(requests, step, loads.len(), |g, bytes| {
                let at = taken.get_mut(g).map_or(0, |t| std::mem::replace(t, *t + 1));
                let (reply, fate) = loads.get(g).map_or((&[][..], Fate::TooLarge), |l| l.peek(at));
                places.push((g, at));
                asked.push(retry::Asked {
                    group: g,
                    slot: slots.get(part).copied().flatten(),
                    bytes: Bytes::copy_from_slice(bytes),
                    writes: step.writes,
                    reply: BytesMut::from(reply),
                    fate,
                    again: false,
                });
                part += 1;
            });
        }
        retry::follow(&self.sharded, self.client.id, resp3, &mut asked).await;
        for (a, (g, at)) in asked.into_iter().zip(places) {
            if a.again
                && let Some(l) = loads.get_mut(g)
            {
                l.instead.insert(at, (a.reply, a.fate));
            }
        }
    }
}

/// Whether a node may have refused some of a batch.
fn is_odd(answer: &Answer) -> bool {
    answer.fate != Fate::Sealed || redirect::any_error(&answer.replies)
}
