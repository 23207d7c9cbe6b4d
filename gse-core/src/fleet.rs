//! Calls to agents for services that hold no sessions themselves: finds, in the store, the node of gse_task that has each agent's session,
//! and asks through it (`proto/gse/calls.proto`).
//!
//! A call is repeated elsewhere when its node has lost the agent or can't be reached, until its deadline: what is asked of an agent has to
//! bear that. An agent that is not connected is said to be offline at once, unless it was heard a moment ago; then it is waited for.
//! What is asked is the services' business.

pub mod find;
pub mod processes;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::SelectAll;
use futures::{Stream, StreamExt};
use gse_proto::calls as c;
use gse_proto::calls::agent_calls_client::AgentCallsClient;
use gse_proto::ids::AgentId;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tonic::transport::Channel;

use self::find::Whereabouts;
use crate::clock::Clock;
use crate::config::Problems;
use crate::rpc::Dialler;
use crate::store::{Store, StoreError};

/// Channels to nodes that are kept; nodes come and go, and an address is not used for ever.
const MAX_CHANNELS: usize = 256;

/// How agents are called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FleetConfig {
    /// An agent without a session that was heard within this time is waited for. As `session.heartbeat_interval_ms` of gse_task.
    pub heartbeat_interval_ms: u64,
    /// How long it is waited for.
    pub reconnect_grace_ms: u64,
    /// Calls in one request to a node at most.
    pub max_per_request: usize,
    /// First pause before an agent is looked for again; it doubles.
    pub retry_min_ms: u64,
    /// Longest such pause.
    pub retry_max_ms: u64,
}

impl Default for FleetConfig {
    fn default() -> Self {
        Self {
            heartbeat_interval_ms: 30_000,
            reconnect_grace_ms: 15_000,
            max_per_request: 5_000,
            retry_min_ms: 50,
            retry_max_ms: 1_000,
        }
    }
}

impl FleetConfig {
    /// Adds what cannot work, under `key`.
    pub fn validate(&self, key: &str, problems: &mut Problems) {
        for (name, value, low, high) in [
            ("heartbeat_interval_ms", self.heartbeat_interval_ms, 100, 600_000),
            ("reconnect_grace_ms", self.reconnect_grace_ms, 0, 600_000),
            ("max_per_request", self.max_per_request as u64, 1, 20_000),
            ("retry_min_ms", self.retry_min_ms, 1, 60_000),
            ("retry_max_ms", self.retry_max_ms, self.retry_min_ms, 60_000),
        ] {
            problems.check_range(&format!("{key}.{name}"), value, low, high);
        }
    }
}

/// One question to many agents.
#[derive(Debug, Clone)]
pub struct Question {
    /// Which part of the agent is meant.
    pub service: &'static str,
    /// Who asks, for the logs of the nodes.
    pub caller: String,
    /// The part of the payload that all agents share; it stands behind each agent's own.
    pub shared: Bytes,
    /// Each agent (its id, or a `cloud:ip` name) and its own part of the payload.
    pub agents: Vec<(AgentId, Bytes)>,
    /// How long one try waits for its answer.
    pub patience: Duration,
    /// After this no answer is waited for.
    pub deadline: Instant,
}

/// Why an agent has not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Silence {
    /// It is not connected, or nobody knows it.
    #[error("{0}")]
    Offline(String),
    /// It is older than what is asked of it.
    #[error("the agent does not know this kind of request; upgrade it")]
    Unsupported,
    /// No answer in time; what was asked may have been done.
    #[error("{0}")]
    TimedOut(String),
    /// Its answer is too long to be passed on.
    #[error("the agent's answer is longer than is passed on (calls.max_reply_bytes of gse_task)")]
    TooLong,
}

/// What one agent has to say: its place in [`Question::agents`], and its answer.
pub type Answer = (usize, Result<Bytes, Silence>);

/// The way to the agents.
#[derive(Debug)]
pub struct Fleet {
    store: Store,
    dialler: Dialler,
    config: FleetConfig,
    clock: Clock,
    channels: Mutex<BTreeMap<String, Channel>>,
}

/// What comes in while calls are under way.
enum Event {
    Answer(usize, c::CallAnswer),
    /// The request to a node ended; these have no answer.
    Ended(Vec<usize>, String),
}

type Events = Pin<Box<dyn Stream<Item = Event> + Send>>;

/// An agent that has not answered.
struct Open {
    tries: u32,
    again: Instant,
    why: String,
    /// It is under way at the moment.
    asked: bool,
}

impl Fleet {
    /// Finds agents in `store` and calls their nodes with `dialler`.
    #[must_use]
    pub fn new(store: Store, dialler: Dialler, config: FleetConfig) -> Self {
        Self {
            store,
            dialler,
            config,
            clock: Clock::system(),
            channels: Mutex::default(),
        }
    }

    /// Asks agents and hands every answer to `answers`, one for each of them, in the order in which they come. Resolves when all have been
    /// handed over, or when nobody takes them any more.
    pub async fn ask(&self, question: Question, answers: &mpsc::Sender<Answer>) {
        let began = Instant::now();
        let mut open: BTreeMap<usize, Open> = BTreeMap::new();
        for n in 0..question.agents.len() {
            let fresh = Open {
                tries: 0,
                again: began,
                why: String::new(),
                asked: false,
            };
            open.insert(n, fresh);
        }
        let mut events: SelectAll<Events> = SelectAll::new();
        while !open.is_empty() {
            let now = Instant::now();
            if now >= question.deadline {
                break;
            }
            let due: Vec<usize> = open
                .iter()
                .filter(|(_, one)| !one.asked && one.again <= now)
                .map(|(n, _)| *n)
                .collect();
            if !due.is_empty() {
                for (n, silence) in self.send(&question, began, due, &mut open, &mut events).await {
                    open.remove(&n);
                    if answers.send((n, Err(silence))).await.is_err() {
                        return;
                    }
                }
                continue;
            }
            let next = open.values().filter(|one| !one.asked).map(|one| one.again).min();
            let until = next.map_or(question.deadline, |next| next.min(question.deadline));
            let event = tokio::select! {
                Some(event) = events.next() => event,
                () = sleep_until(until) => continue,
            };
            match event {
                Event::Answer(n, answer) => {
                    let outcome = match answer.failure() {
                        c::Failure::None => Ok(answer.payload),
                        c::Failure::Unsupported => Err(Silence::Unsupported),
                        c::Failure::TooLong => Err(Silence::TooLong),
                        c::Failure::Timeout => Err(Silence::TimedOut("the agent has not answered in time".to_owned())),
                        c::Failure::NotHere => {
                            self.later(&mut open, n, "the agent's session has gone elsewhere");
                            continue;
                        }
                        c::Failure::Lost => {
                            self.later(&mut open, n, "the agent's session ended before its answer came");
                            continue;
                        }
                        c::Failure::Busy => {
                            self.later(&mut open, n, "too much waits for the agent");
                            continue;
                        }
                    };
                    if open.remove(&n).is_some() && answers.send((n, outcome)).await.is_err() {
                        return;
                    }
                }
                Event::Ended(unanswered, why) => {
                    for n in unanswered {
                        self.later(&mut open, n, &why);
                    }
                }
            }
        }
        for (n, one) in open {
            let why = if one.why.is_empty() {
                "no answer in time".to_owned()
            } else {
                one.why
            };
            if answers.send((n, Err(Silence::TimedOut(why)))).await.is_err() {
                return;
            }
        }
    }

    /// One agent is looked for again after a pause.
    fn later(&self, open: &mut BTreeMap<usize, Open>, n: usize, why: &str) {
        let Some(one) = open.get_mut(&n) else { return };
        let ms = self.config.retry_min_ms.saturating_mul(1 << one.tries.min(10));
        one.tries += 1;
        one.again = Instant::now() + Duration::from_millis(ms.min(self.config.retry_max_ms));
        one.asked = false;
        why.clone_into(&mut one.why);
    }

    /// Looks agents up and asks those that are found; returns those that are offline.
    async fn send(
        &self,
        question: &Question,
        began: Instant,
        due: Vec<usize>,
        open: &mut BTreeMap<usize, Open>,
        events: &mut SelectAll<Events>,
    ) -> Vec<(usize, Silence)> {
        let asked: Vec<AgentId> = due.iter().map(|n| question.agents[*n].0.clone()).collect();
        let places = match find::whereabouts(&self.store, &asked).await {
            Ok(places) => places,
            Err(error) => {
                let why = store_words(&error);
                due.into_iter().for_each(|n| self.later(open, n, &why));
                return vec![];
            }
        };
        let grace = Duration::from_millis(self.config.reconnect_grace_ms);
        let elapsed = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let waiting = began.elapsed() < grace;
        let mut offline = Vec::new();
        let mut groups: BTreeMap<String, Vec<(usize, AgentId)>> = BTreeMap::new();
        for (n, place) in due.into_iter().zip(places) {
            let said = |text: &str| (n, Silence::Offline(text.to_owned()));
            match place {
                Whereabouts::At { agent, address, .. } => groups.entry(address).or_default().push((n, agent)),
                Whereabouts::NoCalls { node } => {
                    let why = format!("node {node} of gse_task takes no calls of other servers; set its rpc.listen");
                    self.later(open, n, &why);
                }
                Whereabouts::Between if waiting => self.later(open, n, "the agent is looking for another server"),
                Whereabouts::Between => offline.push(said("the agent did not come back after its server had gone")),
                Whereabouts::Away { seen_ms, stopped } => {
                    let ago_ms = self.clock.unix_ms().saturating_sub(seen_ms);
                    if waiting && !stopped && ago_ms.saturating_sub(elapsed) <= self.config.heartbeat_interval_ms {
                        self.later(open, n, "the agent is not connected");
                    } else {
                        offline.push(said(&format!(
                            "the agent is offline; it was last heard {} s ago",
                            ago_ms / 1000
                        )));
                    }
                }
                Whereabouts::Unknown => offline.push(said("no agent with this id has ever connected")),
            }
        }
        for (address, members) in groups {
            let channel = match self.channel(&address) {
                Ok(channel) => channel,
                Err(error) => {
                    let why = format!("{error:#}");
                    members.into_iter().for_each(|(n, _)| self.later(open, n, &why));
                    continue;
                }
            };
            for some in members.chunks(self.config.max_per_request) {
                for (n, _) in some {
                    if let Some(one) = open.get_mut(n) {
                        one.asked = true;
                    }
                }
                events.push(self.request(question, channel.clone(), address.clone(), some));
            }
        }
        offline
    }

    fn channel(&self, address: &str) -> anyhow::Result<Channel> {
        let mut channels = self.channels.lock();
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        if channels.len() >= MAX_CHANNELS {
            channels.clear();
        }
        let channel = self.dialler.channel(address)?;
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }

    /// One request to a node, as the events that come of it.
    fn request(&self, question: &Question, channel: Channel, address: String, members: &[(usize, AgentId)]) -> Events {
        let mut unanswered: Vec<Option<usize>> = members.iter().map(|(n, _)| Some(*n)).collect();
        let left = question.deadline.saturating_duration_since(Instant::now());
        let request = c::CallRequest {
            service: question.service.to_owned(),
            caller: question.caller.clone(),
            shared: question.shared.clone(),
            calls: members
                .iter()
                .map(|(n, agent)| c::AgentCall {
                    agent_id: agent.as_str().to_owned(),
                    own: question.agents[*n].1.clone(),
                })
                .collect(),
            timeout_ms: u32::try_from(question.patience.min(left).as_millis()).unwrap_or(u32::MAX),
        };
        let longest = self.dialler.max_message_bytes();
        let mut client = AgentCallsClient::new(channel)
            .max_decoding_message_size(longest)
            .max_encoding_message_size(longest);
        let (sender, receiver) = mpsc::channel::<Event>(64);
        let talk = async move {
            let why = match client.call(request).await {
                Err(status) => format!("gse_task at {address}: {}", status.message()),
                Ok(response) => {
                    let mut stream = response.into_inner();
                    loop {
                        match stream.message().await {
                            Ok(Some(answer)) => {
                                let n = unanswered.get_mut(answer.index as usize).and_then(Option::take);
                                if let Some(n) = n
                                    && sender.send(Event::Answer(n, answer)).await.is_err()
                                {
                                    return;
                                }
                            }
                            Ok(None) => break format!("gse_task at {address} has left calls without an answer"),
                            Err(status) => break format!("gse_task at {address}: {}", status.message()),
                        }
                    }
                }
            };
            let rest: Vec<usize> = unanswered.into_iter().flatten().collect();
            if !rest.is_empty() {
                // Nobody there any more: then nobody wants to know.
                sender.send(Event::Ended(rest, why)).await.ok();
            }
        };
        // The talk is driven by whoever polls its events.
        let events = futures::stream::unfold(receiver, |mut receiver| async move {
            Some((receiver.recv().await?, receiver))
        });
        let driven = futures::stream::once(talk).filter_map(|()| async { None });
        Box::pin(futures::stream::select(driven, events))
    }
}

fn store_words(error: &StoreError) -> String {
    format!("the agent could not be looked up: {error}")
}
