//! What a command comes to: which groups it concerns, and in which form it goes to them. A command that can't be planned is done at once, after all that was planned
//! before it. The bytes are left to `load`.

use std::collections::HashMap;

use super::{Kind, Session, Step, command};
use crate::args::Args;
use crate::commands::{Run, Spec};
use crate::conn::Ended;
use crate::resp::parse::Requests;
use crate::resp::write::Writer;
use crate::sharded::hub::Kind as HubKind;
use crate::sharded::route::{self, Route, Split};
use crate::sharded::slots::slot;
use crate::sharded::{merge, mutants};
use crate::single::session::encode;

impl Session {
    pub(super) async fn plan(
        &mut self,
        requests: &Requests,
        i: usize,
        spec: Option<&'static Spec>,
        out: &mut Writer,
    ) -> Result<(), Ended> {
        let a = requests.args(i);
        let is_tx = spec.is_some_and(|s| matches!(s.run, Run::Tx(_)));
        if is_tx || self.transaction.is_open() {
            self.send(requests, out).await?;
            return self.transact(requests, i, spec, out).await;
        }
        if (a.is(0, "SCRIPT") || a.is(0, "FUNCTION")) && a.is(1, "KILL") && a.len() == 2 {
            self.send(requests, out).await?;
            let words: Vec<&[u8]> = a.iter().collect();
            self.kill(&words, out).await;
            return Ok(());
        }
        let route = if self.undivided() {
            route::undivided(&self.table.map, spec, a)
        } else {
            route::route(&self.table.map, spec, a, self.sharded.split_mset())
        };
        if matches!(route, Route::All(_))
            && let Some(s) = spec
        {
            if flushes(s)
                && let Some(moving) = self.table.moving.clone()
            {
                self.send(requests, out).await?;
                self.empty(&moving, &encode(requests, i), a, out).await;
                return Ok(());
            }
            if s.name == "DBSIZE" && self.table.is_moving() {
                self.send(requests, out).await?;
                self.count(out).await;
                return Ok(());
            }
        }
        if let Some(s) = spec
            && s.name == "WAIT"
            && s.arity_fits(a.len())
        {
            // Whatever this client has written and was acknowledged is on so many other copies already.
            let need = self.table.group(self.table.home()).map_or(0, |g| g.seat.need);
            let kind = Kind::Here(format!(":{need}\r\n").into_bytes());
            self.steps.push(Step {
                i,
                kind,
                writes: false,
                slot: None,
            });
            return Ok(());
        }
        if route::blocks(spec, a) {
            match route {
                Route::Slot(_) | Route::Any => {
                    self.send(requests, out).await?;
                    return self.block(requests, i, spec, &route, out).await;
                }
                _ => {}
            }
        }
        if self.table.map.is_strict() {
            self.keep_apart(requests, i, spec, &route, out).await?;
        }
        let map = &self.table.map;
        let slot_of = match route {
            Route::Slot(s) => Some(s),
            _ => None,
        };
        let kind = match route {
            Route::Slot(s) => {
                let g = mutants::group(map.group(s), map.groups(), route::writes(spec, a));
                self.script(a, g, a.len())
            }
            Route::Any => match (spec.map_or("", |s| s.name), a.len()) {
                ("PING", 1) => Kind::Here(b"+PONG\r\n".to_vec()),
                ("PING" | "ECHO", 2) => {
                    let mut w = Writer::new(false);
                    w.bulk(a.at(1));
                    Kind::Here(w.buf.to_vec())
                }
                ("CONFIG", _) if a.is(1, "GET") => Kind::Settings(self.table.home()),
                (name, n) => self
                    .channels(name, a)
                    .unwrap_or_else(|| self.script(a, self.table.home(), n)),
            },
            Route::Split(how) => {
                let step = if how == Split::Pairs { 2 } else { 1 };
                let mut parts: Vec<(usize, Vec<u32>)> = Vec::new();
                let mut places: HashMap<usize, usize> = HashMap::new();
                for (n, at) in (1..a.len()).step_by(step).enumerate() {
                    let s = slot(a.at(at));
                    let place = *places.entry(map.part(s)).or_insert(parts.len());
                    match parts.get_mut(place) {
                        Some((_, keys)) => keys.push(n as u32),
                        None => parts.push((map.group(s), vec![n as u32])),
                    }
                }
                Kind::Parts(how, parts)
            }
            Route::All(how) => {
                if a.is(0, "SCRIPT") && a.is(1, "LOAD") && a.len() == 3 {
                    let all = self.table.groups.iter().enumerate();
                    let all = all.map(|(g, group)| (g, group.seat.head().generation));
                    self.sharded.scripts().learn(a.at(2), all);
                } else if a.is(0, "SCRIPT") && a.is(1, "FLUSH") {
                    self.sharded.scripts().flush();
                }
                Kind::All(how)
            }
            Route::Scan => match merge::cursor(a.at(1), self.table.generation()) {
                Some((g, own)) if self.table.is_used(g) && g < map.groups() => Kind::Scan(g, Some(own)),
                // It has gone since.
                Some((g, _)) => match self.table.after(g) {
                    Some(next) => Kind::Scan(next, Some(0)),
                    None => Kind::Here(b"*2\r\n$1\r\n0\r\n*0\r\n".to_vec()),
                },
                None => Kind::Scan(0, None),
            },
            Route::Refuse(why) => {
                if why.starts_with("CROSSSLOT") {
                    self.sharded.metrics().crossslot();
                }
                let mut w = Writer::new(false);
                w.error(why.as_bytes());
                Kind::Here(w.buf.to_vec())
            }
        };
        let writes = route::writes(spec, a);
        self.steps.push(Step {
            i,
            kind,
            writes,
            slot: slot_of.or_else(|| a.is(0, "SPUBLISH").then(|| slot(a.at(1)))),
        });
        Ok(())
    }

    /// In front of a cluster: a command of several keys may have to wait while its slot is on its way, when commands of single keys need not. What comes after it for the
    /// same slot is sent when it is done.
    async fn keep_apart(
        &mut self,
        requests: &Requests,
        i: usize,
        spec: Option<&'static Spec>,
        route: &Route,
        out: &mut Writer,
    ) -> Result<(), Ended> {
        let a = requests.args(i);
        let (slots, several): (Vec<u16>, bool) = match route {
            Route::Slot(s) => (vec![*s], !spec.is_some_and(|s| s.keys.0 == 1 && s.keys.1 == 1)),
            Route::Split(_) => ((1..a.len()).map(|k| slot(a.at(k))).collect(), true),
            _ => return Ok(()),
        };
        if !self.several.is_empty() && slots.iter().any(|s| self.several.contains(s)) {
            self.flush(requests, out).await?;
            self.table = self.sharded.table();
        }
        if several {
            self.several.extend(slots);
        }
        Ok(())
    }

    /// What is to be done with a command about channels.
    fn channels(&self, name: &str, a: Args<'_>) -> Option<Kind> {
        let shard = a.is(0, "SPUBLISH");
        if (name == "PUBLISH" || shard) && a.len() == 3 {
            let kind = if shard { HubKind::Shard } else { HubKind::Channel };
            let (clients, ours) = self.sharded.hub().reach(kind, a.at(1));
            // Every node of a cluster hands it on to the others; the one that we have subscribed at knows best who gets it. A channel does not move.
            let g = if self.table.map.is_strict() && !shard {
                self.table.home()
            } else {
                self.table.owners().group(slot(a.at(1)))
            };
            return Some(Kind::Publish(g, clients, ours));
        }
        if a.is(0, "PUBSUB") && a.is(1, "NUMSUB") {
            return Some(Kind::Subscribers(self.table.home(), HubKind::Channel));
        }
        (a.is(0, "PUBSUB") && a.is(1, "SHARDNUMSUB")).then_some(Kind::Subscribers(self.table.home(), HubKind::Shard))
    }

    /// A command for one group; scripts are remembered, and sent whole where they may not be known.
    fn script(&self, a: Args<'_>, g: usize, n: usize) -> Kind {
        match self.in_full(a, g, n) {
            Some(bytes) => Kind::Instead(g, bytes),
            None if n > 2 && (a.is(0, "EVALSHA") || a.is(0, "EVALSHA_RO")) => Kind::Digest(g),
            None => Kind::One(g),
        }
    }

    /// `EVALSHA` as `EVAL`, for a group that may not have the script.
    pub(in crate::sharded) fn in_full(&self, a: Args<'_>, g: usize, n: usize) -> Option<Vec<u8>> {
        let first = a.at(0).first().map(u8::to_ascii_uppercase);
        if n < 3 || first != Some(b'E') || !a.at(0).get(..4).is_some_and(|e| e.eq_ignore_ascii_case(b"EVAL")) {
            return None;
        }
        let generation = self.table.group(g)?.seat.head().generation;
        if a.is(0, "EVAL") || a.is(0, "EVAL_RO") {
            self.sharded.scripts().learn(a.at(1), std::iter::once((g, generation)));
            return None;
        }
        let body = self.sharded.scripts().instead(a.at(1), g, generation)?;
        let name: &[u8] = if a.is(0, "EVALSHA_RO") { b"EVAL_RO" } else { b"EVAL" };
        let words: Vec<&[u8]> = [name, &body].into_iter().chain(a.iter().skip(2)).collect();
        Some(command(&words))
    }
}

/// Whether a command deletes everything.
fn flushes(spec: &'static Spec) -> bool {
    matches!(spec.name, "FLUSHALL" | "FLUSHDB")
}
