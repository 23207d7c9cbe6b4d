//! Carries out what the run of one task asks for: orders to agents, ends to the store. One task of the runtime for each file task.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_core::fleet::find::{self, Whereabouts};
use gse_core::fleet::{Question, Silence};
use gse_core::store::StoreError;
use gse_proto::codes::Inner;
use gse_proto::file::{Report, ReportStored, SwarmOver};
use gse_proto::ids::AgentId;
use prost::Message;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use super::engine::{self, Cell};
use super::layout::Place;
use super::orders;
use super::run::{CallFailed, Effect};
use crate::Node;
use crate::path;
use crate::peer;

/// Ends stored in one go.
const STORE_ENDS: usize = 4_000;
/// Answers of agents that wait to be taken.
const ANSWERS: usize = 1_024;
/// Time between two looks at what is due.
const TICK: Duration = Duration::from_millis(500);
/// Pause after the store has not taken something, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(2));

/// An order on its way: row, agent, its own part.
type Own = (u32, AgentId, Bytes);

/// Sees a task through to its end, or until the instance drains: then its next life goes on with it.
pub async fn drive(node: Arc<Node>, cell: Arc<Cell>) {
    tokio::select! {
        () = node.life.draining() => return,
        () = cell.gone() => return,
        () = prepare(&node, &cell) => {}
    }
    let mut calls = JoinSet::new();
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut pause = PAUSE.0;
    loop {
        let effects = cell.run.lock().effects();
        carry_out(&node, &cell, effects, &mut calls);
        match store_ends(&node, &cell).await {
            Ok(()) => pause = PAUSE.0,
            Err(error) => {
                tracing::warn!(task = cell.task(), %error, "ends of a file task can't be stored yet");
                tokio::select! {
                    () = node.life.draining() => return,
                    () = cell.gone() => return,
                    () = tokio::time::sleep(pause) => {}
                }
                pause = (pause * 2).min(PAUSE.1);
                continue;
            }
        }
        if cell.run.lock().is_finished() {
            match node.store.finish(&cell.known, node.config.task.result_ttl_s).await {
                Ok(()) => break,
                Err(error) => tracing::warn!(task = cell.task(), %error, "the end of a file task can't be stored yet"),
            }
        }
        tokio::select! {
            () = node.life.draining() => return,
            () = cell.gone() => return,
            () = cell.wake.notified() => {}
            Some(ended) = calls.join_next() => {
                if let Err(error) = ended {
                    tracing::error!(task = cell.task(), %error, "a fan-out has crashed; its rows are asked again");
                }
            }
            _ = ticks.tick() => {
                let now = node.clock.unix_ms();
                cell.run.lock().tick(now, |row| cell.agent(row).is_some_and(|agent| node.links.has(&agent)));
            }
        }
    }
    node.transfers.remove(cell.task());
    node.metrics.tasks_finished.inc();
    if node.quotas.counts_running(&cell.header.app) {
        node.quotas.ended(&cell.header.app, cell.task()).await;
    }
    tracing::info!(
        task = cell.task(),
        rows = cell.known.layout.rows(),
        "file task finished"
    );
    if cell.header.push {
        for group in (0..).take(cell.header.groups.len()) {
            close_swarms(&node, cell.task(), group);
        }
    }
    // Who was told to stop should hear it, although nobody waits for that.
    let effects = cell.run.lock().effects();
    carry_out(&node, &cell, effects, &mut calls);
    let rest = async { while calls.join_next().await.is_some() {} };
    let grace = Duration::from_millis(node.config.task.stop_grace_ms);
    if tokio::time::timeout(grace, rest).await.is_err() {
        tracing::debug!(task = cell.task(), "calls of a finished file task are given up");
    }
}

/// Finds out which agents are meant, closes what can't be done, and asks for the rest.
async fn prepare(node: &Node, cell: &Cell) {
    let mut pause = PAUSE.0;
    let away = loop {
        match look_up(node, cell).await {
            Ok(away) => break away,
            Err(error) => tracing::warn!(task = cell.task(), %error, "agents of a file task can't be looked up yet"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    };
    let now = node.clock.unix_ms();
    let mut run = cell.run.lock();
    // Each row with its own reason, before any that it shares with others.
    run.refuse(now);
    // Those that are surely not there get their rows at once, and nothing is read for them in vain.
    for row in (0..cell.known.layout.rows()).rev() {
        let Some(endpoint) = cell.subject(row).map(|subject| subject.endpoint) else {
            continue;
        };
        if endpoint.refused_code == 0
            && !run.is_over(row)
            && let Some(why) = away.get(endpoint.agent_id.as_str())
        {
            run.fail(row, Inner::AgentOffline.code(), why, now);
        }
    }
    run.begin(now);
}

/// Notes the agents behind other names; returns those that are not there, and why.
async fn look_up(node: &Node, cell: &Cell) -> Result<BTreeMap<String, String>, StoreError> {
    let header = &cell.header;
    let sources = header.uploads.iter().filter_map(|upload| upload.source.as_ref());
    let targets = header.lists.iter().flat_map(|list| &list.endpoints);
    let mut asked: Vec<AgentId> = sources
        .chain(targets)
        .filter_map(|endpoint| AgentId::parse(&endpoint.agent_id).ok())
        .collect();
    asked.sort_unstable();
    asked.dedup();
    let agents = find::resolve(node.store.raw(), &asked).await?;
    {
        let mut names = cell.names.lock();
        for (asked, agent) in asked.iter().zip(&agents) {
            if asked != agent {
                names.insert(asked.as_str().to_owned(), agent.clone());
            }
        }
    }
    let now = node.clock.unix_ms();
    let lately_ms = node.config.fleet.heartbeat_interval_ms;
    let mut away = BTreeMap::new();
    for (asked, place) in asked.iter().zip(find::whereabouts(node.store.raw(), &asked).await?) {
        let why = match place {
            Whereabouts::Unknown => "no agent with this id has ever connected".to_owned(),
            Whereabouts::Away { stopped: true, .. } => "the agent was stopped".to_owned(),
            Whereabouts::Away { seen_ms, .. } if now.saturating_sub(seen_ms) > lately_ms => {
                format!(
                    "the agent is offline; it was last heard {} s ago",
                    now.saturating_sub(seen_ms) / 1000
                )
            }
            // Waited for by the call itself.
            _ => continue,
        };
        away.insert(asked.as_str().to_owned(), why);
    }
    Ok(away)
}

fn carry_out(node: &Arc<Node>, cell: &Arc<Cell>, effects: Vec<Effect>, calls: &mut JoinSet<()>) {
    let mut groups: BTreeMap<u32, Vec<(u32, u32)>> = BTreeMap::new();
    for effect in effects {
        match effect {
            Effect::Ask(row) => match cell.known.layout.place(row) {
                Some(Place::Upload(upload)) => ask_source(node, cell, upload, calls),
                Some(Place::Download { group, target }) => groups.entry(group).or_default().push((row, target)),
                None => {}
            },
            Effect::Cancel(row) => cancel(node, cell, row, calls),
            Effect::Over(upload) => upload_over(node, cell, upload, calls),
        }
    }
    for (group, rows) in groups {
        ask_targets(node, cell, group, &rows, calls);
    }
}

fn ask_source(node: &Arc<Node>, cell: &Arc<Cell>, upload: u32, calls: &mut JoinSet<()>) {
    let (Some(agent), Some(what)) = (cell.agent(upload), cell.header.uploads.get(upload as usize)) else {
        return;
    };
    let targets = cell.run.lock().open_downloads(upload) as usize;
    let limit = path::inline_limit(&node.config.path, targets);
    let order = orders::of_upload(&cell.header, &node.link_addresses(), upload, what, limit);
    calls.spawn(ask(
        Arc::clone(node),
        Arc::clone(cell),
        Bytes::new(),
        vec![(upload, agent, order)],
    ));
}

fn ask_targets(node: &Arc<Node>, cell: &Arc<Cell>, group: u32, rows: &[(u32, u32)], calls: &mut JoinSet<()>) {
    let header = &cell.header;
    let Some(what) = header.groups.get(group as usize) else {
        return;
    };
    let Some(list) = header.lists.get(what.list as usize) else {
        return;
    };
    if header.push {
        let by_swarm =
            node.peer.is_some() && path::push_by_swarm(&node.config.path, what.content.len() as u64, rows.len());
        let (node, cell, rows) = (Arc::clone(node), Arc::clone(cell), rows.to_vec());
        calls.spawn(push(node, cell, group, rows, by_swarm));
        return;
    }
    let servers = node.link_addresses();
    let Some(content) = cell.content(what.upload) else {
        return;
    };
    let source = header.uploads.get(what.upload as usize);
    let from = source.and_then(|_| cell.agent(what.upload));
    let swarm = engine::swarm_of(node, &content);
    let shared = orders::of_targets(header, &servers, &content);
    if let (Some((id, manifest)), Some(from)) = (&swarm, &from) {
        node.swarms.open(*id, manifest, cell.task(), what.upload);
        node.swarms.join(id, from.as_str(), true);
        node.tell_peers(id, from);
        peer::consider(node, *id, manifest);
    }
    let mut members: Vec<Own> = Vec::with_capacity(rows.len());
    for (row, target) in rows {
        let (Some(endpoint), Some(agent)) = (list.endpoints.get(*target as usize), cell.agent(*row)) else {
            continue;
        };
        let same_host = source.filter(|_| from.as_ref() == Some(&agent));
        let own = orders::own_target(header, *row, what, endpoint, same_host);
        if let Some((id, _)) = &swarm {
            node.swarms.join(id, agent.as_str(), false);
            // Those that have a link are told now, the others when they have one.
            node.tell_peers(id, &agent);
        }
        members.push((*row, agent, own));
    }
    calls.spawn(ask(Arc::clone(node), Arc::clone(cell), shared, members));
}

/// Content of a call goes to its targets: in the orders, or through a swarm that this instance is the source of.
async fn push(node: Arc<Node>, cell: Arc<Cell>, group: u32, rows: Vec<(u32, u32)>, by_swarm: bool) {
    let header = &cell.header;
    let Some(what) = header.groups.get(group as usize) else {
        return;
    };
    let Some(list) = header.lists.get(what.list as usize) else {
        return;
    };
    let servers = node.link_addresses();
    let swarm = if by_swarm {
        peer::offer(&node, cell.task(), group, &what.name, what.content.clone()).await
    } else {
        None
    };
    let shared = match &swarm {
        Some((id, manifest)) => {
            node.metrics.path("push_swarm");
            let content = orders::Content {
                manifest_id: Bytes::copy_from_slice(id),
                manifest: manifest.clone(),
                inline: None,
            };
            orders::of_targets(header, &servers, &content)
        }
        None => orders::of_push(header, &servers, what),
    };
    let mut members: Vec<Own> = Vec::with_capacity(rows.len());
    for (row, target) in rows {
        let (Some(endpoint), Some(agent)) = (list.endpoints.get(target as usize), cell.agent(row)) else {
            continue;
        };
        let own = match &swarm {
            Some((id, _)) => {
                node.swarms.join(id, agent.as_str(), false);
                node.tell_peers(id, &agent);
                orders::own_target(header, row, what, endpoint, None)
            }
            None => orders::own_push(header, row, what, endpoint),
        };
        members.push((row, agent, own));
    }
    ask(Arc::clone(&node), Arc::clone(&cell), shared, members).await;
}

fn cancel(node: &Arc<Node>, cell: &Arc<Cell>, row: u32, calls: &mut JoinSet<()>) {
    let Some(agent) = cell.agent(row) else { return };
    let order = orders::cancel(&cell.header, &node.link_addresses(), row);
    // Its link is the shorter way; without one it may still be at it, or have the order on its way.
    if node.links.send(&agent, order.clone().into()) {
        return;
    }
    let own = Bytes::from(order.encode_to_vec());
    calls.spawn(ask(
        Arc::clone(node),
        Arc::clone(cell),
        Bytes::new(),
        vec![(row, agent, own)],
    ));
}

/// The source of an upload, and the swarm if there was one, are not needed any more.
fn upload_over(node: &Arc<Node>, cell: &Arc<Cell>, upload: u32, calls: &mut JoinSet<()>) {
    close_swarms(node, cell.task(), upload);
    if cell.run.lock().was_asked(upload) {
        cancel(node, cell, upload, calls);
    }
}

/// What a part of a task has moved through swarms is not needed by it any more.
pub(crate) fn close_swarms(node: &Node, task: &str, part: u32) {
    for (id, members) in node.swarms.close(task, part) {
        if let Some(peer) = &node.peer {
            peer.over(&id);
        }
        for member in &members {
            let over = SwarmOver {
                manifest_id: Bytes::copy_from_slice(&id),
            };
            // To relays, too; this instance has no link to itself.
            node.links.send_to(member, over.into());
        }
    }
}

/// Asks agents and takes their answers.
async fn ask(node: Arc<Node>, cell: Arc<Cell>, shared: Bytes, members: Vec<Own>) {
    // One place each, given back with the answer: an agent that is waited for holds up nobody else.
    let wanted = members.len().min(node.config.task.orders_at_once);
    let Ok(mut places) = node
        .orders
        .acquire_many(u32::try_from(wanted).unwrap_or(u32::MAX))
        .await
    else {
        return;
    };
    node.metrics.orders.inc_by(members.len() as u64);
    let limit = Duration::from_millis(node.config.task.call_timeout_ms);
    let rows: Vec<u32> = members.iter().map(|(row, ..)| *row).collect();
    let question = Question {
        service: SERVICE,
        caller: format!("gse_btsvr {}", node.config.node_id),
        shared,
        agents: members.into_iter().map(|(_, agent, own)| (agent, own)).collect(),
        patience: limit,
        deadline: Instant::now() + limit + Duration::from_millis(node.config.fleet.reconnect_grace_ms),
    };
    let (sender, mut answers) = mpsc::channel(ANSWERS);
    let asking = async {
        node.fleet.ask(question, &sender).await;
        drop(sender);
    };
    let taking = async {
        while let Some((n, answer)) = answers.recv().await {
            drop(places.split(1));
            if let Some(row) = rows.get(n) {
                take_answer(&node, &cell, *row, answer);
            }
        }
    };
    tokio::join!(asking, taking);
}

/// The part of the agent that is meant.
const SERVICE: &str = "file";

fn take_answer(node: &Node, cell: &Cell, row: u32, answer: Result<Bytes, Silence>) {
    let failed = match answer {
        Ok(bytes) => match Report::decode(bytes) {
            Ok(report) => {
                if engine::take_report(node, cell, row, &report) == engine::Answer::Unwanted {
                    cell.run.lock().cancel(row);
                }
                return;
            }
            Err(error) => CallFailed::Passing(format!("its answer does not decode: {error}")),
        },
        Err(Silence::Offline(why)) => CallFailed::Offline(why),
        Err(Silence::Unsupported) => CallFailed::Unsupported(Silence::Unsupported.to_string()),
        Err(other) => CallFailed::Passing(other.to_string()),
    };
    node.metrics.orders_unanswered.inc();
    cell.run.lock().call_failed(row, &failed, node.clock.unix_ms());
    cell.wake.notify_one();
}

/// Stores what is over, and tells the agents.
async fn store_ends(node: &Node, cell: &Cell) -> Result<(), StoreError> {
    loop {
        let ends = cell.run.lock().unstored(STORE_ENDS);
        if ends.is_empty() {
            return Ok(());
        }
        let left_s = cell.header.deadline_ms.saturating_sub(node.clock.unix_ms()) / 1000;
        let ttl_s = left_s + node.config.task.result_ttl_s;
        let other = node.store.put_ends(cell.task(), &ends, ttl_s).await?;
        let rows: Vec<u32> = ends.iter().map(|(row, _)| *row).collect();
        node.metrics.rows_stored.inc_by(rows.len() as u64);
        cell.run.lock().stored(&rows, other);
        for row in rows {
            if let Some(agent) = cell.agent(row) {
                let stored = ReportStored {
                    task_id: cell.task().to_owned(),
                    order: row,
                };
                node.links.send(&agent, stored.into());
            }
        }
    }
}
