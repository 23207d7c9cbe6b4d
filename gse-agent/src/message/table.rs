//! Which plugins are connected, by name, and which deliveries were made: a call may come twice, a message must not.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use gse_proto::codes::Inner;
use parking_lot::Mutex;

use super::connection::Outbox;

/// Deliveries that are remembered.
const REMEMBERED: usize = 4_096;

/// Connected plugins.
#[derive(Debug, Default)]
pub(super) struct Table {
    inside: Mutex<Inside>,
}

#[derive(Debug, Default)]
struct Inside {
    /// Connections of each name, the latest last.
    plugins: HashMap<String, Vec<(u64, Outbox)>>,
    delivered: HashMap<Bytes, Outcome>,
    order: VecDeque<Bytes>,
}

/// What became of a delivery.
pub(super) type Outcome = Result<(), (Inner, String)>;

impl Table {
    /// A connection has said its name.
    pub(super) fn enter(&self, name: &str, connection: u64, outbox: &Outbox) {
        let mut inside = self.inside.lock();
        let same = inside.plugins.entry(name.to_owned()).or_default();
        if !same.iter().any(|(other, _)| *other == connection) {
            same.push((connection, outbox.clone()));
        }
    }

    /// A connection has ended, or has another name now.
    pub(super) fn leave(&self, name: &str, connection: u64) {
        let mut inside = self.inside.lock();
        if let Some(same) = inside.plugins.get_mut(name) {
            same.retain(|(other, _)| *other != connection);
            if same.is_empty() {
                inside.plugins.remove(name);
            }
        }
    }

    /// Names of those that are connected.
    pub(super) fn len(&self) -> usize {
        self.inside.lock().plugins.len()
    }

    /// Gives `frame` to the plugin that connected last under `name`, once for each `delivery`.
    pub(super) fn deliver(&self, delivery: &Bytes, name: &str, frame: Bytes) -> Outcome {
        let mut inside = self.inside.lock();
        if let Some(outcome) = inside.delivered.get(delivery) {
            return outcome.clone();
        }
        let outcome = match inside.plugins.get(name).and_then(|same| same.last()) {
            None => Err((Inner::NoPlugin, format!("no plugin {name:?} is connected to the agent"))),
            Some((_, outbox)) => outbox.put(frame).map_err(|()| {
                (
                    Inner::Limit,
                    format!("plugin {name:?} does not read what was sent to it before"),
                )
            }),
        };
        // What was not given to a plugin may be tried again; an answer for what was is given again.
        if outcome.is_ok() && !delivery.is_empty() {
            if inside.order.len() >= REMEMBERED
                && let Some(oldest) = inside.order.pop_front()
            {
                inside.delivered.remove(&oldest);
            }
            inside.order.push_back(delivery.clone());
            inside.delivered.insert(delivery.clone(), outcome.clone());
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_delivery_is_made_once_and_to_the_latest() {
        let table = Table::default();
        let (first, mut first_out) = Outbox::new(100);
        let (second, mut second_out) = Outbox::new(100);
        table.enter("beat", 1, &first);
        table.enter("beat", 2, &second);
        table.enter("beat", 1, &first);
        let id = Bytes::from_static(b"delivery");
        for _ in 0..2 {
            table.deliver(&id, "beat", Bytes::from_static(b"frame")).unwrap();
        }
        assert_eq!(second_out.try_next().unwrap().len(), 5);
        assert!(second_out.try_next().is_none(), "once");
        table.leave("beat", 2);
        let other = Bytes::from_static(b"other");
        table.deliver(&other, "beat", Bytes::from_static(b"frame")).unwrap();
        assert_eq!(first_out.try_next().unwrap().len(), 5);
        table.leave("beat", 1);
        let third = Bytes::from_static(b"third");
        let (code, _) = table.deliver(&third, "beat", Bytes::new()).unwrap_err();
        assert_eq!(code, Inner::NoPlugin);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn a_plugin_that_does_not_read_costs_no_more_than_it_may() {
        let table = Table::default();
        let (outbox, mut out) = Outbox::new(100);
        table.enter("beat", 1, &outbox);
        let frame = Bytes::from(vec![0; 60]);
        table.deliver(&Bytes::from_static(b"1"), "beat", frame.clone()).unwrap();
        let (code, _) = table
            .deliver(&Bytes::from_static(b"2"), "beat", frame.clone())
            .unwrap_err();
        assert_eq!(code, Inner::Limit);
        assert!(out.try_next().is_some());
        // It was not made, so it may be made now.
        table.deliver(&Bytes::from_static(b"2"), "beat", frame).unwrap();
    }
}
