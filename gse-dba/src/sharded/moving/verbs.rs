//! `DBA MOVE|ADD|DRAIN|MOVES|ABORT|PAUSE|RESUME|RATE`: what an operator says about slots and groups. A change is decided in the topology; whichever gse_dba is asked,
//! all act by it.

use bytes::Bytes;
use serde_json::{Value, json};

use super::store::Shelf;
use super::topology::{Leg, SlotSet, Topology};
use crate::admin::{Answered, Refused};
use crate::config::sharded::Group as GroupConfig;
use crate::sharded::{Fate, Sharded};

fn text(word: &Bytes) -> Result<&str, Refused> {
    std::str::from_utf8(word).map_err(|_| Refused::new("ERR a word of the command is not UTF-8"))
}

fn usage(of: &str) -> Refused {
    Refused::new(format!("ERR usage: DBA {of}"))
}

fn refused(why: String) -> Refused {
    if why.starts_with("UNCERTAIN") {
        Refused::new(why)
    } else {
        Refused::new(format!("ERR {why}"))
    }
}

/// What was changed, and what happens now.
fn plan(topology: &Topology, job: Option<u64>) -> Value {
    let legs: Vec<Value> = topology
        .legs
        .iter()
        .filter(|l| job.is_none_or(|j| j == l.job))
        .map(leg)
        .collect();
    json!({ "epoch": topology.epoch, "job": job, "legs": legs })
}

fn leg(l: &Leg) -> Value {
    let count = SlotSet::of(&l.slots).map_or(0, |s| s.len());
    json!({
        "job": l.job,
        "from": l.from,
        "to": l.to,
        "slots": l.slots.join(","),
        "count": count,
        "mover": l.mover.as_ref().map(|m| m.address.clone()),
        "state": match (&l.mover, &l.cleaning) {
            (_, Some(group)) => format!("deleting what is left in group '{group}'"),
            (Some(_), None) => "moving".to_owned(),
            (None, None) => "waiting".to_owned(),
        },
    })
}

impl Sharded {
    /// Carries out a verb; none when it is not one of these.
    pub(crate) async fn topology_verb(&self, verb: &[u8], rest: &[Bytes]) -> Option<Answered> {
        if self.cluster().is_some() {
            // It moves its slots itself.
            return None;
        }
        Some(match verb {
            b"MOVE" => self.verb_move(rest).await,
            b"ADD" => self.verb_add(rest).await,
            b"DRAIN" => self.verb_drain(rest).await,
            b"MOVES" => self.verb_moves(rest).await,
            b"ABORT" => self.verb_abort(rest).await,
            b"PAUSE" | b"RESUME" => self.verb_pause(rest, verb == b"PAUSE").await,
            b"RATE" => self.verb_rate(rest).await,
            b"TOPOLOGY" => self.verb_topology(rest),
            _ => return None,
        })
    }

    /// Changes the topology, and takes on what is to be moved when nobody has.
    async fn decide(&self, mut f: impl FnMut(&Topology) -> Result<Topology, String>) -> Answered {
        let me = self.keeper().me().map_err(refused)?;
        let mut job = None;
        let done = self
            .change(|t| {
                let mut next = f(t)?;
                job = next.legs.last().filter(|l| l.job == next.epoch).map(|l| l.job);
                if let Some(first) = next.legs.first_mut()
                    && first.mover.is_none()
                {
                    first.mover = Some(me.clone());
                }
                Ok(next)
            })
            .await
            .map_err(refused)?;
        Ok(plan(&done, job))
    }

    async fn verb_move(&self, rest: &[Bytes]) -> Answered {
        let [slots, to, group] = rest else {
            return Err(usage("MOVE <slots, as 7 or 0-5460, several with commas> TO <group>"));
        };
        if !to.eq_ignore_ascii_case(b"TO") {
            return Err(usage("MOVE <slots> TO <group>"));
        }
        let slots = SlotSet::parse(text(slots)?).map_err(refused)?;
        let group = text(group)?.to_owned();
        self.decide(|t| t.with_move(&slots, &group)).await
    }

    /// `ADD <name> SERVERS a,b,c [SHARE]` or `ADD <name> SENTINELS a,b,c [SHARE]`.
    async fn verb_add(&self, rest: &[Bytes]) -> Answered {
        let how = || usage("ADD <group> SERVERS|SENTINELS <address,address,...> [SHARE]");
        let (name, kind, addresses, share) = match rest {
            [n, k, a] => (n, k, a, false),
            [n, k, a, s] if s.eq_ignore_ascii_case(b"SHARE") => (n, k, a, true),
            _ => return Err(how()),
        };
        let addresses: Vec<String> = text(addresses)?.split(',').map(|a| a.trim().to_owned()).collect();
        for a in &addresses {
            crate::sharded::control::place(a).map_err(|e| refused(format!("{e:#}")))?;
        }
        let mut group = GroupConfig {
            name: text(name)?.to_owned(),
            ..GroupConfig::default()
        };
        if group.name.is_empty() {
            return Err(how());
        }
        if kind.eq_ignore_ascii_case(b"SERVERS") {
            let copies = self.keeper().config.sharded.copies;
            if addresses.len() != copies {
                return Err(refused(format!(
                    "{} servers are listed, but sharded.copies is {copies}",
                    addresses.len()
                )));
            }
            group.servers = addresses;
        } else if kind.eq_ignore_ascii_case(b"SENTINELS") {
            group.sentinels = addresses;
        } else {
            return Err(how());
        }
        self.probe(&group).await.map_err(refused)?;
        self.expect_empty(&group.name).await.map_err(refused)?;
        self.decide(|t| {
            let with = t.with_group(&group)?;
            if share {
                // One change for both.
                with.with_share(&group.name).map(|s| Topology {
                    epoch: with.epoch,
                    legs: s
                        .legs
                        .into_iter()
                        .map(|l| Leg {
                            job: if l.job == s.epoch { with.epoch } else { l.job },
                            ..l
                        })
                        .collect(),
                    ..s
                })
            } else {
                Ok(with)
            }
        })
        .await
    }

    /// What is in a group that was never one of ours would be hidden, and deleted by moves.
    async fn expect_empty(&self, name: &str) -> Result<(), String> {
        let group = self.named(name).ok_or("it is not there any more")?;
        let ask = Bytes::from_static(b"*1\r\n$6\r\nDBSIZE\r\n");
        let answer = group.send(0, false, ask, 1, false).await.await;
        match answer {
            Ok(a) if a.fate == Fate::Sealed && a.replies == ":0\r\n" => Ok(()),
            Ok(a) if a.fate == Fate::Sealed => Err(format!(
                "group {name:?} has {} keys already: a group that is added must be empty, for keys in it would be shown to nobody and deleted",
                String::from_utf8_lossy(&a.replies).trim_matches([':', '\r', '\n'])
            )),
            Ok(a) => Err(format!("group {name:?} did not say how many keys it has: {:?}", a.fate)),
            Err(_) => Err("this server is stopping".into()),
        }
    }

    async fn verb_drain(&self, rest: &[Bytes]) -> Answered {
        let [group] = rest else {
            return Err(usage("DRAIN <group>"));
        };
        let group = text(group)?.to_owned();
        self.decide(|t| t.with_drain(&group)).await
    }

    async fn verb_moves(&self, rest: &[Bytes]) -> Answered {
        if !rest.is_empty() {
            return Err(usage("MOVES"));
        }
        let keeper = self.keeper();
        let topology = keeper
            .topology()
            .ok_or_else(|| refused("the topology could not be read yet".into()))?;
        let mut legs: Vec<Value> = topology.legs.iter().map(leg).collect();
        if let (Some(first), Some(l)) = (legs.first_mut(), topology.legs.first()) {
            let work = match &l.mover {
                Some(m) if m.id == keeper.id => keeper.work.lock().as_ref().map(|w| w.told()),
                Some(m) => match self.named(&topology.home) {
                    Some(home) => Shelf::new(&home.seat)
                        .instances()
                        .await
                        .ok()
                        .and_then(|all| all.into_iter().find(|i| i.id == m.id))
                        .and_then(|i| i.work),
                    None => None,
                },
                None => None,
            };
            first["progress"] = work.unwrap_or(Value::Null);
        }
        Ok(json!({
            "epoch": topology.epoch,
            "paused": topology.speed.paused,
            "bytes_per_s": topology.speed.bytes,
            "keys_per_s": topology.speed.keys,
            "legs": legs,
        }))
    }

    async fn verb_abort(&self, rest: &[Bytes]) -> Answered {
        let job = match rest {
            [] => None,
            [job] => Some(
                text(job)?
                    .parse::<u64>()
                    .map_err(|_| refused("the job is no number; DBA MOVES shows it".into()))?,
            ),
            _ => return Err(usage("ABORT [job]")),
        };
        let done = self.change(|t| t.aborted(job)).await.map_err(refused)?;
        Ok(plan(&done, None))
    }

    async fn verb_pause(&self, rest: &[Bytes], paused: bool) -> Answered {
        if !rest.is_empty() {
            return Err(usage("PAUSE, or DBA RESUME"));
        }
        self.speed(|s| s.paused = paused).await
    }

    async fn verb_rate(&self, rest: &[Bytes]) -> Answered {
        let number = |w: &Bytes| {
            text(w)?
                .parse::<u64>()
                .map_err(|_| usage("RATE <bytes/s> <keys/s>; 0 is no bound"))
        };
        let [bytes, keys] = rest else {
            return Err(usage("RATE <bytes/s> <keys/s>; 0 is no bound"));
        };
        let (bytes, keys) = (number(bytes)?, number(keys)?);
        self.speed(|s| (s.bytes, s.keys) = (bytes, keys)).await
    }

    async fn speed(&self, f: impl Fn(&mut super::topology::Speed)) -> Answered {
        let done = self
            .change(|t| {
                let mut next = t.clone();
                next.epoch += 1;
                f(&mut next.speed);
                Ok(next)
            })
            .await
            .map_err(refused)?;
        Ok(json!({
            "epoch": done.epoch,
            "paused": done.speed.paused,
            "bytes_per_s": done.speed.bytes,
            "keys_per_s": done.speed.keys,
        }))
    }

    fn verb_topology(&self, rest: &[Bytes]) -> Answered {
        if !rest.is_empty() {
            return Err(usage("TOPOLOGY"));
        }
        let topology = self
            .keeper()
            .topology()
            .ok_or_else(|| refused("the topology could not be read yet".into()))?;
        serde_json::to_value(&*topology).map_err(|e| refused(e.to_string()))
    }
}
