//! `DBA STATUS` and `DBA SLOTS`: what this server stands in front of, what it promises, and how that is going.

use bytes::Bytes;
use serde_json::{Value, json};

use super::{Answered, Refused};
use crate::config::cluster;
use crate::config::sharded::Reads;
use crate::server::{Shared, Store};
use crate::sharded::Sharded;
use crate::sharded::slots::{SLOTS, SlotMap, slot};

pub(super) async fn status(shared: &Shared, rest: &[Bytes]) -> Answered {
    if !rest.is_empty() {
        return Err(Refused::new("ERR DBA STATUS takes no arguments"));
    }
    let [noreplicas, uncertain, crossslot, switches] = shared.metrics.troubles();
    let mut told = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "uptime_s": shared.started.elapsed().as_secs(),
        "clients": {
            "connected": shared.clients.lock().len(),
            "max": shared.config.limits.max_clients,
            "refused": shared.metrics.refused_clients(),
        },
        "since_start": {
            "noreplicas": noreplicas,
            "uncertain": uncertain,
            "crossslot": crossslot,
            "primary_switches": switches,
        },
    });
    let (view, current) = (shared.office.views.now(), shared.office.current());
    let (mode, durability) = (view.backend.name(), view.durability.clone());
    let health = match &*view.store {
        Store::Embedded(_) => shared
            .metrics
            .outage_reason()
            .map_or(Ok(()), |why| Err(format!("writes are refused: {why}"))),
        Store::Single(s) => {
            told["endpoint"] = s.capabilities().map_or(Value::Null, |c| c.status());
            if shared.metrics.upstream_connections() > 0 {
                Ok(())
            } else {
                Err("no connection to the Redis behind".to_owned())
            }
        }
        Store::Sharded(s) if s.cluster().is_some() => {
            let c = &current.config.cluster;
            told["copies"] = c.copies.into();
            told["acknowledged"] = c.acknowledged.into();
            told["reads"] = match c.reads {
                cluster::Reads::Confirmed => "confirmed: on as many copies as a write before it is answered",
                cluster::Reads::Primary => {
                    "primary: what the primary has; one that was cut off can answer until it is replaced"
                }
                cluster::Reads::Replica => "replica: what a copy has, no older than cluster.max_read_lag_ms",
            }
            .into();
            told["epoch"] = s.table().epoch.into();
            told["groups"] = groups(s);
            s.state()
        }
        Store::Sharded(s) => {
            let c = &current.config.sharded;
            told["copies"] = c.copies.into();
            told["acknowledged"] = c.acknowledged.into();
            told["reads"] = match c.reads {
                Reads::Confirmed => "confirmed: on as many copies as a write before it is answered",
                Reads::Primary => "primary: what the primary has; one that was cut off can answer until it is replaced",
            }
            .into();
            told["epoch"] = s.table().epoch.into();
            told["groups"] = groups(s);
            s.state()
        }
    };
    told["mode"] = mode.into();
    told["durability"] = durability.into();
    told["health"] = json!({ "ok": health.is_ok(), "reason": health.err() });
    Ok(told)
}

fn groups(sharded: &Sharded) -> Value {
    let table = sharded.table();
    let counts = table.owners().counts();
    let all = table.groups.iter().enumerate().zip(counts).map(|((i, g), slots)| {
        let head = g.seat.head();
        let short = g.seat.short();
        let lags: Vec<Value> = g
            .seat
            .lags()
            .into_iter()
            .map(|l| json!({ "address": l.address, "lag_s": l.seconds, "behind_bytes": l.bytes }))
            .collect();
        json!({
            "name": g.seat.name,
            "slots": slots,
            "ranges": ranges(table.owners(), i),
            "primary": head.place.as_ref().map(ToString::to_string),
            "primary_for_s": head.since.elapsed().as_secs(),
            "copies": g.seat.copies(),
            "followers": lags,
            "needs": g.seat.need,
            "state": match (&head.place, &short) {
                // It has a primary, and it is not known yet which slots it serves: commands wait.
                (Some(_), None) if !g.seat.lease.holds() => "no-topology",
                (None, _) => "no-primary",
                (Some(_), Some(_)) => "no-writes",
                (Some(_), None) => "ok",
            },
            "short": short,
            "problems": g.seat.problems(),
            "failover": g.seat.failover(),
            "waits_for_operator": g.seat.troubles(),
        })
    });
    all.collect()
}

/// The slots of a group as ranges.
fn ranges(map: &SlotMap, group: usize) -> Vec<String> {
    let mut out = Vec::new();
    let mut from: Option<usize> = None;
    for s in 0..=SLOTS {
        let ours = s < SLOTS && u16::try_from(s).is_ok_and(|s| map.group(s) == group);
        match (ours, from) {
            (true, None) => from = Some(s),
            (false, Some(first)) => {
                out.push(if first + 1 == s {
                    first.to_string()
                } else {
                    format!("{first}-{}", s - 1)
                });
                from = None;
            }
            _ => {}
        }
    }
    out
}

/// `DBA SLOTS`, `DBA SLOTS KEY key`.
pub(super) fn slots(shared: &Shared, rest: &[Bytes]) -> Answered {
    let store = shared.store();
    let Store::Sharded(sharded) = &*store else {
        return Err(Refused::new(
            "ERR there are no slots here: keys are not spread over groups in this mode (see DBA STATUS)",
        ));
    };
    let table = sharded.table();
    match rest {
        [] => {
            let groups: Vec<Value> = table
                .groups
                .iter()
                .enumerate()
                .zip(table.owners().counts())
                .map(|((i, g), n)| json!({ "name": g.seat.name, "slots": n, "ranges": ranges(table.owners(), i) }))
                .collect();
            Ok(json!({ "epoch": table.epoch, "groups": groups }))
        }
        [word, key] if word.eq_ignore_ascii_case(b"KEY") => {
            let slot = slot(key);
            let group = table.group(table.owners().group(slot));
            Ok(json!({
                "key": String::from_utf8_lossy(key),
                "slot": slot,
                "group": group.map(|g| g.seat.name.clone()),
                "primary": group.and_then(|g| g.seat.head().place).map(|p| p.to_string()),
            }))
        }
        _ => Err(Refused::new("ERR say DBA SLOTS, or DBA SLOTS KEY <key>")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::sharded::Group;

    #[test]
    fn slots_are_told_as_ranges() {
        let group = |slots: &[&str]| Group {
            slots: slots.iter().map(|s| (*s).to_owned()).collect(),
            ..Group::default()
        };
        let map = SlotMap::of(&[group(&["0-99", "200", "16383"]), group(&["100-199", "201-16382"])]).unwrap();
        assert_eq!(ranges(&map, 0), ["0-99", "200", "16383"]);
        assert_eq!(ranges(&map, 1), ["100-199", "201-16382"]);
        assert!(ranges(&map, 2).is_empty());
    }
}
