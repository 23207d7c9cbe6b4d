//! The two calls that send messages to plugins.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use gse_core::fleet::{Question, Silence};
use gse_core::http::{ApiError, ContractRequest, Reply};
use gse_proto::calls as c;
use gse_proto::calls::agent_calls_server::AgentCalls;
use gse_proto::codes::{Code, Inner};
use gse_proto::http::{AgentFailure, DispatchMessage, DispatchMultiMessage, DispatchReply, Route};
use gse_proto::ids::AgentId;
use gse_proto::message::{Deliver, Delivered, SERVICE};
use prost::Message;
use subtle::ConstantTimeEq;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Messages, Slot};
use crate::calls;
use crate::http::{ScriptService, forbidden};

/// Longest id of a message, characters (contract v2-http-task#58).
const MAX_MESSAGE_ID: usize = 64;
/// Answers of other nodes' agents that wait to be looked at.
const ANSWERS: usize = 256;

/// A call of either kind.
struct Order {
    slot_id: i64,
    token: String,
    message_id: String,
    front: Bytes,
    back: Bytes,
    /// Each agent as asked, once, with what is its own.
    agents: BTreeMap<String, Bytes>,
}

/// Why an agent's plugin has not got it.
type Failure = (Inner, String);

impl From<DispatchMessage> for Order {
    fn from(body: DispatchMessage) -> Self {
        Self {
            slot_id: body.slot_id,
            token: body.token,
            message_id: body.message_id,
            front: body.content.into(),
            back: Bytes::new(),
            agents: body
                .agent_id_list
                .into_iter()
                .map(|agent| (agent, Bytes::new()))
                .collect(),
        }
    }
}

impl From<DispatchMultiMessage> for Order {
    fn from(body: DispatchMultiMessage) -> Self {
        let agents = body.agent_message_list.into_iter();
        Self {
            slot_id: body.slot_id,
            token: body.token,
            message_id: body.message_id,
            front: body.front_content.into(),
            back: body.back_content.into(),
            agents: agents.map(|agent| (agent.bk_agent_id, agent.content.into())).collect(),
        }
    }
}

/// Answers either call.
pub(crate) async fn call(service: &ScriptService, request: ContractRequest) -> Result<Reply, ApiError> {
    let order: Order = match request.route {
        Route::DispatchMultiMessage => request.decode::<DispatchMultiMessage>().await?.into(),
        _ => request.decode::<DispatchMessage>().await?.into(),
    };
    let node = &service.node;
    let Some(messages) = node.messages.get() else {
        return Err(ApiError::new(
            Code::Draining,
            "the server is not ready for messages yet",
        ));
    };
    let names = || order.agents.keys().map(String::as_str);
    let entry = request.audit_entry().with_targets(names());
    let clouds = names().map(|agent| (agent, service.cloud_of(agent)));
    let allowed = service
        .policy
        .check(&request.caller, request.operation, std::iter::empty(), clouds);
    if let Err(denied) = allowed {
        service.audit(entry.refused(denied.to_string())).await?;
        return Err(forbidden(&denied));
    }
    let slot = match messages.slot(&order) {
        Ok(slot) => slot,
        Err(error) => {
            service.audit(entry.refused(error.message.clone())).await?;
            return Err(error);
        }
    };
    service.audit(entry).await?;

    let asked = order.agents.len();
    let failures = messages.send(service, slot, order).await;
    messages.metrics.sent(asked - failures.len(), failures.len());
    let results = failures.into_iter().map(|(bk_agent_id, (code, message))| AgentFailure {
        bk_agent_id,
        code: code.code(),
        message,
    });
    Reply::json(&DispatchReply {
        results: results.collect(),
    })
}

impl Messages {
    /// The registration that an order means, if it is in order.
    fn slot(&self, order: &Order) -> Result<&Slot, ApiError> {
        // contract: v2-http-task#58
        let characters = order.message_id.chars().count();
        if characters == 0 || characters > MAX_MESSAGE_ID {
            return Err(ApiError::arguments(format!(
                "message_id has {characters} characters; it must have 1 to {MAX_MESSAGE_ID}"
            )));
        }
        if order.agents.is_empty() {
            return Err(ApiError::arguments("no agent is named; name at least one"));
        }
        if order.agents.len() > self.config.max_agents {
            return Err(ApiError::arguments(format!(
                "{} agents are named, at most {} are taken (messages.max_agents)",
                order.agents.len(),
                self.config.max_agents
            )));
        }
        let own = order.agents.values().map(Bytes::len).max().unwrap_or(0);
        let length = order.front.len() + own + order.back.len();
        if length > self.config.max_content_bytes {
            return Err(ApiError::arguments(format!(
                "a message of {length} bytes, at most {} are taken (messages.max_content_bytes)",
                self.config.max_content_bytes
            )));
        }
        let slot = self.config.slots.iter().find(|slot| slot.slot_id == order.slot_id);
        // The same words either way: nobody learns from them which slots there are.
        slot.filter(|slot| bool::from(slot.token.as_bytes().ct_eq(order.token.as_bytes())))
            .ok_or_else(|| {
                ApiError::new(
                    Code::Forbidden,
                    format!("there is no slot {} with this token", order.slot_id),
                )
            })
    }

    /// Sends to every agent; returns those that failed.
    async fn send(&self, service: &ScriptService, slot: &Slot, order: Order) -> BTreeMap<String, Failure> {
        let node = &service.node;
        let timeout = Duration::from_millis(self.config.dispatch_timeout_ms);
        let shared: Bytes = Deliver {
            plugin: slot.plugin.clone(),
            message_id: order.message_id,
            delivery_id: Bytes::copy_from_slice(&node.random.u64().to_be_bytes()),
            front: order.front,
            own: Bytes::new(),
            back: order.back,
        }
        .encode_to_vec()
        .into();
        let mut failures = BTreeMap::new();
        let (mut here, mut elsewhere) = (Vec::new(), Vec::new());
        for (asked, own) in order.agents {
            let Ok(agent) = AgentId::parse(&asked) else {
                let text = format!("{asked:?} is no agent id");
                failures.insert(asked, (Inner::Arguments, text));
                continue;
            };
            let own: Bytes = Deliver {
                own,
                ..Deliver::default()
            }
            .encode_to_vec()
            .into();
            if node.registry.find(&agent).is_some() {
                here.push((asked, agent, own));
            } else if self.fleet.is_some() {
                elsewhere.push((asked, agent, own));
            } else {
                failures.insert(asked, (Inner::AgentOffline, "the agent is not connected".to_owned()));
            }
        }
        let (local, remote) = tokio::join!(
            here_now(service, &shared, here, timeout),
            self.ask(&shared, elsewhere, timeout)
        );
        failures.extend(local);
        failures.extend(remote);
        failures
    }

    /// Asks agents of other nodes.
    async fn ask(
        &self,
        shared: &Bytes,
        agents: Vec<(String, AgentId, Bytes)>,
        timeout: Duration,
    ) -> BTreeMap<String, Failure> {
        let mut failures = BTreeMap::new();
        let (Some(fleet), false) = (&self.fleet, agents.is_empty()) else {
            return failures;
        };
        let question = Question {
            service: SERVICE,
            caller: "gse_task: messages".to_owned(),
            shared: shared.clone(),
            agents: agents
                .iter()
                .map(|(_, agent, own)| (agent.clone(), own.clone()))
                .collect(),
            patience: timeout,
            deadline: Instant::now() + timeout,
        };
        let (sender, mut answers) = mpsc::channel(ANSWERS);
        let asking = async {
            fleet.ask(question, &sender).await;
            drop(sender);
        };
        let listening = async {
            while let Some((n, answer)) = answers.recv().await {
                let failure = match answer {
                    Ok(payload) => said(payload),
                    Err(Silence::Offline(why)) => Some((Inner::AgentOffline, why)),
                    Err(Silence::TimedOut(why)) => Some((Inner::Timeout, why)),
                    Err(other @ (Silence::Unsupported | Silence::TooLong)) => Some((Inner::System, other.to_string())),
                };
                if let (Some(failure), Some((asked, _, _))) = (failure, agents.get(n)) {
                    failures.insert(asked.clone(), failure);
                }
            }
        };
        tokio::join!(asking, listening);
        failures
    }
}

/// Asks agents whose sessions are on this node.
async fn here_now(
    service: &ScriptService,
    shared: &Bytes,
    agents: Vec<(String, AgentId, Bytes)>,
    timeout: Duration,
) -> BTreeMap<String, Failure> {
    let node = &service.node;
    let mut failures = BTreeMap::new();
    for some in agents.chunks(node.config.calls.max_per_request) {
        let request = c::CallRequest {
            service: SERVICE.to_owned(),
            caller: "messages".to_owned(),
            shared: shared.clone(),
            calls: some
                .iter()
                .map(|(_, agent, own)| c::AgentCall {
                    agent_id: agent.as_str().to_owned(),
                    own: own.clone(),
                })
                .collect(),
            timeout_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
        };
        let service = calls::Service { node: Arc::clone(node) };
        let mut answers = match service.call(tonic::Request::new(request)).await {
            Ok(response) => response.into_inner(),
            Err(status) => {
                let all = some
                    .iter()
                    .map(|(asked, _, _)| (asked.clone(), (Inner::System, status.message().to_owned())));
                failures.extend(all);
                continue;
            }
        };
        while let Some(Ok(answer)) = answers.next().await {
            let failure = match answer.failure() {
                c::Failure::None => said(answer.payload),
                c::Failure::NotHere => Some((Inner::AgentOffline, "the agent is not connected any more".to_owned())),
                c::Failure::Busy => Some((Inner::Limit, "too much waits for the agent".to_owned())),
                c::Failure::Lost => Some((
                    Inner::Unknown,
                    "the agent's session ended before it answered; its plugin may have got the message".to_owned(),
                )),
                c::Failure::Timeout => Some((Inner::Timeout, "the agent has not answered in time".to_owned())),
                c::Failure::Unsupported => Some((
                    Inner::System,
                    "the agent does not know messages to plugins; upgrade it".to_owned(),
                )),
                c::Failure::TooLong => Some((Inner::System, "the agent's answer is too long".to_owned())),
            };
            if let (Some(failure), Some((asked, _, _))) = (failure, some.get(answer.index as usize)) {
                failures.insert(asked.clone(), failure);
            }
        }
    }
    failures
}

/// What an agent said, if that is a failure.
fn said(payload: Bytes) -> Option<Failure> {
    match Delivered::decode(payload) {
        Ok(delivered) if delivered.code == Inner::Ok.code() => None,
        Ok(delivered) => {
            let known = Inner::ALL.iter().find(|code| code.code() == delivered.code);
            Some((known.copied().unwrap_or(Inner::System), delivered.text))
        }
        Err(error) => Some((Inner::System, format!("the agent's answer does not decode: {error}"))),
    }
}
