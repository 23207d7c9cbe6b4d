//! What the nodes of a cluster say about it, as plain values. Nodes may disagree for a while (one may be cut off); of several owners of a slot the one with the newest
//! configuration is right, by the cluster's own rule.

use std::collections::HashMap;

use redis::Value;

use crate::sharded::slots::SLOTS;
use crate::single::dial::Place;

/// One server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) id: String,
    pub(crate) place: Place,
}

/// A primary, its copies, its slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shard {
    pub(crate) primary: Node,
    pub(crate) copies: Vec<Node>,
    /// Ranges, both ends included.
    pub(crate) slots: Vec<(u16, u16)>,
    /// Of the primary's configuration.
    pub(crate) epoch: u64,
    /// Whether the node that was asked can reach the primary.
    pub(crate) healthy: bool,
}

/// What the cluster is: shards, and for each slot which of them serves it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Topology {
    pub(crate) shards: Vec<Shard>,
    pub(crate) owners: Vec<Option<usize>>,
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::BulkString(b) => String::from_utf8(b.clone()).ok(),
        Value::SimpleString(s) => Some(s.clone()),
        Value::VerbatimString { text, .. } => Some(text.clone()),
        _ => None,
    }
}

fn number(value: &Value) -> Option<u16> {
    match value {
        Value::Int(n) => u16::try_from(*n).ok(),
        other => text(other)?.parse().ok(),
    }
}

fn list(value: &Value) -> &[Value] {
    match value {
        Value::Array(v) | Value::Set(v) => v,
        _ => &[],
    }
}

/// The fields of a map, or of a list that stands for one.
fn fields(value: &Value) -> HashMap<String, &Value> {
    match value {
        Value::Map(pairs) => pairs.iter().filter_map(|(k, v)| Some((text(k)?, v))).collect(),
        other => list(other)
            .chunks_exact(2)
            .filter_map(|pair| match pair {
                [k, v] => Some((text(k)?, v)),
                _ => None,
            })
            .collect(),
    }
}

/// A node that does not know its own address is where it was asked.
fn place(host: Option<String>, port: u16, asked: &Place) -> Option<Place> {
    match (host.filter(|h| !h.is_empty() && h != "?"), asked) {
        (Some(host), _) => Some(Place::Tcp(host, port)),
        (None, Place::Tcp(host, _)) => Some(Place::Tcp(host.clone(), port)),
        (None, Place::Unix(_)) => None,
    }
}

/// Reads `CLUSTER SHARDS`.
pub(crate) fn of_shards(value: &Value, asked: &Place, tls: bool) -> Result<Vec<Shard>, String> {
    let ports = if tls {
        ["tls-port", "port"]
    } else {
        ["port", "tls-port"]
    };
    let mut out = Vec::new();
    for shard in list(value) {
        let f = fields(shard);
        let bounds: Vec<u16> = f
            .get("slots")
            .map_or(&[][..], |s| list(s))
            .iter()
            .filter_map(number)
            .collect();
        let slots = bounds
            .chunks_exact(2)
            .filter_map(|b| match b {
                [from, to] if from <= to && usize::from(*to) < SLOTS => Some((*from, *to)),
                _ => None,
            })
            .collect();
        let (mut primary, mut copies, mut healthy) = (None, Vec::new(), false);
        for node in f.get("nodes").map_or(&[][..], |n| list(n)) {
            let n = fields(node);
            let get = |name: &str| n.get(name).copied();
            let said = |name: &str| get(name).and_then(text);
            let (Some(id), Some(port)) = (said("id"), get(ports[0]).or(get(ports[1])).and_then(number)) else {
                continue;
            };
            let Some(place) = place(said("endpoint").or(said("ip")), port, asked) else {
                continue;
            };
            let well = said("health").is_none_or(|h| h == "online");
            let node = Node { id, place };
            if said("role").as_deref() == Some("master") {
                // Of two, the one that can be reached is it.
                if primary.is_none() || well {
                    primary = Some(node);
                    healthy = well;
                }
            } else {
                copies.push(node);
            }
        }
        if let Some(primary) = primary {
            out.push(Shard {
                primary,
                copies,
                slots,
                epoch: 0,
                healthy,
            });
        }
    }
    if out.is_empty() {
        Err("it knows no shards".into())
    } else {
        Ok(out)
    }
}

/// Reads `CLUSTER SLOTS`, which older servers have.
pub(crate) fn of_slots(value: &Value, asked: &Place) -> Result<Vec<Shard>, String> {
    let mut out: Vec<Shard> = Vec::new();
    for range in list(value) {
        let [from, to, nodes @ ..] = list(range) else { continue };
        let (Some(from), Some(to)) = (number(from), number(to)) else {
            continue;
        };
        if from > to || usize::from(to) >= SLOTS {
            continue;
        }
        let mut nodes = nodes.iter().filter_map(|n| match list(n) {
            [host, port, rest @ ..] => {
                let port = number(port)?;
                let place = place(text(host), port, asked)?;
                let id = rest.first().and_then(text).unwrap_or_else(|| place.to_string());
                Some(Node { id, place })
            }
            _ => None,
        });
        let Some(primary) = nodes.next() else { continue };
        match out.iter_mut().find(|s| s.primary.id == primary.id) {
            Some(s) => s.slots.push((from, to)),
            None => out.push(Shard {
                primary,
                copies: nodes.collect(),
                slots: vec![(from, to)],
                epoch: 0,
                healthy: true,
            }),
        }
    }
    if out.is_empty() {
        Err("it knows no slots".into())
    } else {
        Ok(out)
    }
}

/// The configuration epoch of each node, out of `CLUSTER NODES`.
pub(crate) fn epochs(nodes: &str) -> HashMap<&str, u64> {
    nodes
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let id = words.next()?;
            // id, address, flags, primary, ping, pong, epoch
            Some((id, words.nth(5)?.parse().ok()?))
        })
        .collect()
}

/// One truth out of what several nodes say.
pub(crate) fn merge(views: &[Vec<Shard>]) -> Topology {
    let mut shards: Vec<Shard> = Vec::new();
    let mut owners: Vec<Option<(u64, usize)>> = vec![None; SLOTS];
    for shard in views.iter().flatten() {
        let at = match shards.iter().position(|s| s.primary.id == shard.primary.id) {
            Some(at) => at,
            None => {
                shards.push(Shard {
                    slots: Vec::new(),
                    ..shard.clone()
                });
                shards.len() - 1
            }
        };
        if let Some(known) = shards.get_mut(at)
            && (shard.epoch > known.epoch || (shard.epoch == known.epoch && shard.copies.len() > known.copies.len()))
        {
            known.copies.clone_from(&shard.copies);
            known.primary.clone_from(&shard.primary);
            known.epoch = shard.epoch;
        }
        if let Some(known) = shards.get_mut(at) {
            known.healthy |= shard.healthy;
        }
        for slot in shard.slots.iter().flat_map(|(from, to)| *from..=*to) {
            if let Some(owner) = owners.get_mut(usize::from(slot))
                && owner.is_none_or(|(epoch, _)| shard.epoch > epoch)
            {
                *owner = Some((shard.epoch, at));
            }
        }
    }
    for (slot, owner) in owners.iter().enumerate() {
        let slot = slot as u16;
        if let Some(shard) = owner.and_then(|(_, at)| shards.get_mut(at)) {
            match shard.slots.last_mut() {
                Some((_, to)) if *to + 1 == slot => *to = slot,
                _ => shard.slots.push((slot, slot)),
            }
        }
    }
    Topology {
        shards,
        owners: owners.into_iter().map(|o| o.map(|(_, at)| at)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(s: &str) -> Value {
        Value::BulkString(s.as_bytes().to_vec())
    }

    fn node(id: &str, port: i64, role: &str, health: &str) -> Value {
        Value::Array(vec![
            bulk("id"),
            bulk(id),
            bulk("port"),
            Value::Int(port),
            bulk("ip"),
            bulk("10.0.0.1"),
            bulk("endpoint"),
            bulk("10.0.0.1"),
            bulk("role"),
            bulk(role),
            bulk("health"),
            bulk(health),
        ])
    }

    fn shard(slots: &[i64], nodes: Vec<Value>) -> Value {
        let slots = slots.iter().map(|n| Value::Int(*n)).collect();
        Value::Array(vec![
            bulk("slots"),
            Value::Array(slots),
            bulk("nodes"),
            Value::Array(nodes),
        ])
    }

    fn asked() -> Place {
        Place::Tcp("seed".into(), 1)
    }

    #[test]
    fn shards_are_read_in_both_protocols() {
        let reply = Value::Array(vec![
            shard(
                &[0, 99, 200, 16383],
                vec![node("a", 1, "master", "online"), node("b", 2, "replica", "online")],
            ),
            shard(&[100, 199], vec![node("c", 3, "master", "failed")]),
        ]);
        let shards = of_shards(&reply, &asked(), false).unwrap();
        assert_eq!(shards[0].slots, vec![(0, 99), (200, 16383)]);
        assert_eq!(shards[0].primary.place, Place::Tcp("10.0.0.1".into(), 1));
        assert_eq!(shards[0].copies[0].id, "b");
        assert!(shards[0].healthy && !shards[1].healthy);
        let Value::Array(nodes) = node("z", 9, "master", "online") else {
            panic!()
        };
        let map = Value::Map(vec![
            (bulk("slots"), Value::Array(vec![Value::Int(5), Value::Int(5)])),
            (
                bulk("nodes"),
                Value::Array(vec![Value::Map(
                    nodes.chunks(2).map(|p| (p[0].clone(), p[1].clone())).collect(),
                )]),
            ),
        ]);
        assert_eq!(
            of_shards(&Value::Array(vec![map]), &asked(), false).unwrap()[0].slots,
            vec![(5, 5)]
        );
        for nothing in [
            Value::Nil,
            Value::Array(vec![]),
            Value::Array(vec![shard(&[9, 3], vec![])]),
        ] {
            assert!(of_shards(&nothing, &asked(), false).is_err());
        }
    }

    #[test]
    fn slots_are_read_and_a_node_without_an_address_is_where_it_was_asked() {
        let at = |host: &str, port: i64, id: &str| Value::Array(vec![bulk(host), Value::Int(port), bulk(id)]);
        let reply = Value::Array(vec![
            Value::Array(vec![Value::Int(0), Value::Int(9), at("", 7, "a"), at("h", 8, "b")]),
            Value::Array(vec![Value::Int(20), Value::Int(29), at("", 7, "a"), at("h", 8, "b")]),
        ]);
        let shards = of_slots(&reply, &asked()).unwrap();
        assert_eq!(shards.len(), 1);
        assert_eq!(shards[0].slots, vec![(0, 9), (20, 29)]);
        assert_eq!(shards[0].primary.place, Place::Tcp("seed".into(), 7));
        assert_eq!(shards[0].copies[0].place, Place::Tcp("h".into(), 8));
    }

    fn plain(id: &str, epoch: u64, slots: &[(u16, u16)]) -> Shard {
        Shard {
            primary: Node {
                id: id.into(),
                place: Place::Tcp(id.into(), 1),
            },
            copies: Vec::new(),
            slots: slots.to_vec(),
            epoch,
            healthy: true,
        }
    }

    #[test]
    fn the_newest_configuration_owns_a_slot_whoever_says_otherwise() {
        let stale = vec![plain("a", 1, &[(0, 16383)])];
        let fresh = vec![
            plain("a", 1, &[]),
            plain("b", 7, &[(0, 9999)]),
            plain("c", 3, &[(10_000, 16383)]),
        ];
        for views in [[stale.clone(), fresh.clone()], [fresh, stale]] {
            let t = merge(&views);
            let of = |slot: usize| t.shards[t.owners[slot].unwrap()].primary.id.as_str();
            assert_eq!((of(0), of(9999), of(10_000), of(16383)), ("b", "b", "c", "c"));
            let a = t.shards.iter().find(|s| s.primary.id == "a").unwrap();
            assert!(a.slots.is_empty());
        }
        assert_eq!(merge(&[vec![plain("a", 1, &[(5, 6)])]]).owners[4], None);
    }

    #[test]
    fn epochs_are_read_from_the_list_of_nodes() {
        let text = "07c3 127.0.0.1:30004@31004,h slave e7d1 0 1426238317239 4 connected\ne7d1 127.0.0.1:30001@31001 myself,master - 0 0 12 connected 0-5460 [93->-07c3]\n";
        let e = epochs(text);
        assert_eq!((e["07c3"], e["e7d1"]), (4, 12));
    }
}
