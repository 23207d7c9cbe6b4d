//! Takes a batch apart: each record goes where the routes of its data id lead, several routes get a copy each.
//!
//! The body of a batch is never copied: what a sink gets is the body and places in it, one place for each run of records of one id. The
//! routes are looked up once for such a run. What no route wants goes to the default sink, or is dropped and counted.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::{Buf, Bytes};
use gse_core::random::HashMap;
use gse_proto::datalink::{MAX_PAYLOAD, RECORD_HEADER, RecordError};

use crate::Node;
use crate::ingest::book::Ticket;
use crate::routes::table::{Fields, RouteTable, Rule};
use crate::sinks::{Chunk, Load, Part, SinkHandle};
use crate::stats::Stats;
use crate::tail::Tails;

/// Between two looks whether there is a new table.
const LOOK: Duration = Duration::from_millis(100);
/// A chunk for one sink is handed over when it has so many bytes: routes that lead to one sink often multiply a batch.
const LONG_CHUNK: usize = 24 << 20;

/// What becomes of records without a route.
#[derive(Default)]
pub enum Unrouted {
    /// Dropped and counted.
    #[default]
    Drop,
    /// To this sink.
    Sink(Arc<SinkHandle>),
    /// A proxy has no routes: what comes is passed on to servers that have.
    Upstream(Arc<SinkHandle>),
}

/// Routes of one moment and the sinks they lead to.
#[derive(Default)]
pub struct Plan {
    table: Arc<RouteTable>,
    sinks: HashMap<u64, Arc<SinkHandle>>,
    unrouted: Unrouted,
}

/// Holds the plan of the moment.
#[derive(Default)]
pub struct Router {
    plan: ArcSwap<Plan>,
}

impl Router {
    /// Whether routes were ever read. Until then nobody can tell what is routed.
    #[must_use]
    pub fn has_routes(&self) -> bool {
        self.plan.load().table.version > 0
    }

    /// The plan of the moment.
    #[must_use]
    pub fn plan(&self) -> Arc<Plan> {
        self.plan.load_full()
    }
}

/// Takes the routes of the moment into force.
pub async fn refresh(node: &Arc<Node>) {
    let table = node.routes.load_full();
    for problem in &table.problems {
        tracing::warn!(problem, "a route cannot be followed");
    }
    let sinks = node.sinks.follow(&table).await;
    let unrouted = node.sinks.unrouted();
    node.router.plan.store(Arc::new(Plan { table, sinks, unrouted }));
}

/// Takes each new table into force until the server drains.
pub async fn follow(node: Arc<Node>) {
    loop {
        tokio::select! {
            () = node.life.draining() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
        let new = !Arc::ptr_eq(&node.routes.load_full(), &node.router.plan.load().table);
        if new {
            refresh(&node).await;
        }
    }
}

/// What a batch was taken apart into.
pub struct Sorted {
    /// Chunks by sink.
    pub chunks: Vec<(Arc<SinkHandle>, Load)>,
    /// Records of the batch.
    pub records: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
}

/// Looks at the header of the record at `at`; its id, type, time and the place of its payload.
fn header(body: &[u8], at: usize) -> Result<(u32, u32, u16, usize, usize), RecordError> {
    let mut head = body.get(at..at + RECORD_HEADER).ok_or(RecordError::Short)?;
    let (data_id, utctime) = (head.get_u32(), head.get_u32());
    let (kind, reserved, length) = (head.get_u16(), head.get_u16(), head.get_u32());
    if reserved != 0 || length as usize > MAX_PAYLOAD {
        return Err(RecordError::Layout { length, reserved });
    }
    let (start, end) = (at + RECORD_HEADER, at + RECORD_HEADER + length as usize);
    if end > body.len() {
        return Err(RecordError::Short);
    }
    Ok((data_id, utctime, kind, start, end))
}

/// The records of a stretch of a body that was looked at before.
pub fn records(body: &[u8], from: usize, to: usize) -> impl Iterator<Item = &[u8]> {
    let mut at = from;
    std::iter::from_fn(move || {
        if at >= to {
            return None;
        }
        let (_, _, _, start, end) = header(body, at).ok()?;
        at = end;
        Some(&body[start..end])
    })
}

/// The same records with what their headers say.
fn fields(body: &[u8], from: usize, to: usize) -> impl Iterator<Item = Fields<'_>> {
    let mut at = from;
    std::iter::from_fn(move || {
        let (data_id, utctime, kind, start, end) = header(&body[..to], at).ok()?;
        at = end;
        Some(Fields {
            kind,
            data_id,
            utctime,
            payload: &body[start..end],
        })
    })
}

/// Takes a batch apart by `plan`. Nothing is handed over or counted if the body is not a sequence of records.
///
/// # Errors
/// See [`RecordError`].
pub fn sort(plan: &Plan, stats: &Stats, tails: &Tails, body: &Bytes) -> Result<Sorted, RecordError> {
    let mut sorted = Sorted {
        chunks: vec![],
        records: 0,
        bytes: 0,
    };
    let mut runs = Vec::new();
    let mut at = 0;
    let mut run: Option<(u32, usize, u32)> = None;
    while at < body.len() {
        let (data_id, _, _, start, end) = header(body, at)?;
        match &mut run {
            Some((id, _, records)) if *id == data_id => *records += 1,
            other => {
                if let Some((id, from, records)) = other.replace((data_id, at, 1)) {
                    runs.push((id, from, at, records));
                }
            }
        }
        sorted.records += 1;
        sorted.bytes += (end - start) as u64;
        at = end;
    }
    if let Some((id, from, records)) = run {
        runs.push((id, from, body.len(), records));
    }
    let watched = tails.watched();
    for (data_id, from, to, records) in runs {
        if let Some(watched) = &*watched {
            watched.show(data_id, || fields(body, from, to));
        }
        let counts = stats.id(data_id);
        counts.records.fetch_add(records.into(), Relaxed);
        let payload = (to - from) - records as usize * RECORD_HEADER;
        counts.bytes.fetch_add(payload as u64, Relaxed);
        let whole = |target: Arc<str>| Part {
            data_id,
            target,
            from,
            to,
            records,
        };
        match plan.table.rules(data_id) {
            None => {
                if !matches!(plan.unrouted, Unrouted::Upstream(_)) {
                    counts.unrouted.fetch_add(records.into(), Relaxed);
                }
                match &plan.unrouted {
                    Unrouted::Upstream(sink) => add(&mut sorted, sink, body, whole(Arc::default())),
                    Unrouted::Drop => counts.drop_copies("unrouted", records.into()),
                    Unrouted::Sink(sink) => add(&mut sorted, sink, body, whole(Arc::from(data_id.to_string()))),
                }
                counts.copies.fetch_add(records.into(), Relaxed);
            }
            Some(rules) => {
                for rule in rules.iter() {
                    let Some(sink) = plan.sinks.get(&rule.stream) else {
                        counts.copies.fetch_add(records.into(), Relaxed);
                        counts.drop_copies("no_sink", records.into());
                        continue;
                    };
                    if rule.takes_all() {
                        counts.copies.fetch_add(records.into(), Relaxed);
                        add(&mut sorted, sink, body, whole(Arc::clone(&rule.target)));
                    } else {
                        for part in wanted(rule, body, whole(Arc::clone(&rule.target))) {
                            counts.copies.fetch_add(part.records.into(), Relaxed);
                            add(&mut sorted, sink, body, part);
                        }
                    }
                }
                if rules.is_empty() {
                    counts.copies.fetch_add(records.into(), Relaxed);
                    counts.drop_copies("no_sink", records.into());
                }
            }
        }
    }
    Ok(sorted)
}

/// The stretches of `part` that a rule with filters wants.
fn wanted(rule: &Rule, body: &Bytes, part: Part) -> Vec<Part> {
    let mut found: Vec<Part> = Vec::new();
    let mut at = part.from;
    while at < part.to {
        let Ok((data_id, utctime, kind, start, end)) = header(body, at) else {
            break;
        };
        let fields = Fields {
            kind,
            data_id,
            utctime,
            payload: &body[start..end],
        };
        if rule.takes(&fields) {
            match found.last_mut() {
                Some(last) if last.to == at => {
                    last.to = end;
                    last.records += 1;
                }
                _ => found.push(Part {
                    from: at,
                    to: end,
                    records: 1,
                    ..part.clone()
                }),
            }
        }
        at = end;
    }
    found
}

fn add(sorted: &mut Sorted, sink: &Arc<SinkHandle>, body: &Bytes, part: Part) {
    let size = part.to - part.from;
    let place = sorted
        .chunks
        .iter_mut()
        .rev()
        .find(|(other, _)| Arc::ptr_eq(other, sink));
    match place {
        Some((_, load)) if load.size + size <= LONG_CHUNK => load.push(part),
        _ => {
            let mut load = Load::new(body.clone());
            load.push(part);
            sorted.chunks.push((Arc::clone(sink), load));
        }
    }
}

/// Hands the chunks of a batch to their sinks, in order. Waits for sinks whose queue is full.
pub async fn hand_over(sorted: Sorted, ticket: &Ticket) {
    for (sink, load) in sorted.chunks {
        sink.give(Chunk {
            load,
            ticket: ticket.share(),
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;
    use gse_proto::datalink::put_record;

    #[test]
    fn a_cut_body_is_refused_whole() {
        let mut body = BytesMut::new();
        put_record(&mut body, 5, 0, 9, b"one");
        put_record(&mut body, 6, 0, 9, b"two");
        let (plan, stats, tails) = (Plan::default(), Stats::new(10), Tails::default());
        let whole = body.clone().freeze();
        assert!(sort(&plan, &stats, &tails, &whole.slice(..whole.len() - 1)).is_err());
        assert!(stats.all().is_empty(), "nothing of it may be counted");
        let sorted = sort(&plan, &stats, &tails, &whole).unwrap();
        assert_eq!((sorted.records, sorted.bytes), (2, 6));
        assert_eq!(stats.all()[&5].unrouted, 1);
        assert_eq!(stats.all()[&5].lag, 0);
        assert_eq!(records(&whole, 0, whole.len()).collect::<Vec<_>>(), [b"one", b"two"]);
    }
}
