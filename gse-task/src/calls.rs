//! Calls of other services to agents (see `proto/gse/calls.proto`): passed to the sessions of this node and answered from them.
//!
//! Nothing is stored and nothing is looked into. A call that is under way is in one table, by session, until its answer comes, its session
//! ends or its time is up; who asked holds the entries, so that they go when nobody waits any more. Finding the node that holds an
//! agent's session, and asking again elsewhere, is the caller's business (`gse_core::fleet`).

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use gse_proto::calls as c;
use gse_proto::calls::agent_calls_server::AgentCalls;
use gse_proto::frame::Frame;
use gse_proto::ids::AgentId;
use gse_proto::prost::encoding::{WireType, encode_key, encode_varint};
use gse_proto::session as s;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use crate::Node;
use crate::config::CallsConfig;
use crate::session::outbox::Refused;

/// Calls handed to sessions before other tasks of the runtime get their turn.
const YIELD_EVERY: u32 = 256;

/// A call that an agent has not answered yet.
#[derive(Debug)]
struct Pending {
    index: u32,
    answers: mpsc::Sender<c::CallAnswer>,
}

impl Pending {
    /// Each call is answered once and there is a place for each answer; nobody may be there to read it any more.
    fn answer(self, failure: c::Failure, payload: Bytes) {
        let answer = c::CallAnswer {
            index: self.index,
            failure: failure.into(),
            payload,
        };
        self.answers.try_send(answer).ok();
    }
}

/// The calls that agents of this node have not answered yet, by session and call.
#[derive(Debug)]
pub struct Calls {
    pending: Mutex<BTreeMap<(u64, u64), Pending>>,
    limits: CallsConfig,
}

impl Calls {
    /// An empty table.
    #[must_use]
    pub fn new(limits: CallsConfig) -> Self {
        Self {
            pending: Mutex::default(),
            limits,
        }
    }

    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pending.lock().len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Notes a call; false when there are too many.
    fn insert(&self, key: (u64, u64), pending: Pending) -> bool {
        let mut table = self.pending.lock();
        if table.len() >= self.limits.max_pending {
            return false;
        }
        table.insert(key, pending);
        true
    }

    fn remove(&self, key: (u64, u64)) -> Option<Pending> {
        self.pending.lock().remove(&key)
    }

    /// An agent has answered.
    pub fn reply(&self, session: u64, reply: s::CallReply) {
        let Some(pending) = self.remove((session, reply.call_id)) else {
            tracing::debug!(session, call = reply.call_id, "an answer that nobody waits for");
            return;
        };
        let failure = match reply.failure() {
            s::CallFailure::None if reply.payload.len() > self.limits.max_reply_bytes => c::Failure::TooLong,
            s::CallFailure::None => c::Failure::None,
            s::CallFailure::Unsupported => c::Failure::Unsupported,
            s::CallFailure::Busy => c::Failure::Busy,
        };
        let payload = match failure {
            // Detached from the read buffer, of which it would hold all.
            c::Failure::None => Bytes::copy_from_slice(&reply.payload),
            _ => Bytes::new(),
        };
        pending.answer(failure, payload);
    }

    /// A session has ended, or its agent does not know calls: none of its calls will be answered.
    pub fn give_up(&self, session: u64, failure: c::Failure) {
        let given_up = {
            let mut table = self.pending.lock();
            let mut rest = table.split_off(&(session, 0));
            if let Some(after) = session.checked_add(1) {
                table.append(&mut rest.split_off(&(after, 0)));
            }
            rest
        };
        for (_, pending) in given_up {
            pending.answer(failure, Bytes::new());
        }
    }
}

/// The service. Who may call is decided by the listener: holders of a server's certificate.
pub struct Service {
    /// The node.
    pub node: Arc<Node>,
}

/// One request until its last answer: the calls that wait, and what is taken back when the caller goes away.
struct Waiting {
    node: Arc<Node>,
    keys: Vec<Option<(u64, u64)>>,
    answers: mpsc::Receiver<c::CallAnswer>,
    open: usize,
    deadline: Instant,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut table = self.node.calls.pending.lock();
        for key in self.keys.iter().flatten() {
            table.remove(key);
        }
    }
}

impl Waiting {
    async fn next(&mut self) -> Option<c::CallAnswer> {
        if self.open == 0 {
            return None;
        }
        let answer = match tokio::time::timeout_at(self.deadline, self.answers.recv()).await {
            Ok(answer) => answer?,
            Err(_) => self.timed_out()?,
        };
        self.open -= 1;
        if let Some(key) = self.keys.get_mut(answer.index as usize) {
            *key = None;
        }
        self.node.metrics.call_answered(answer.failure());
        Some(answer)
    }

    /// What is still there when the time is up: answers that came at the last moment, then the calls that have none.
    fn timed_out(&mut self) -> Option<c::CallAnswer> {
        if let Ok(answer) = self.answers.try_recv() {
            return Some(answer);
        }
        for (index, key) in (0..).zip(&self.keys) {
            if let Some(key) = key
                && self.node.calls.remove(*key).is_some()
            {
                return Some(c::CallAnswer {
                    index,
                    failure: c::Failure::Timeout.into(),
                    payload: Bytes::new(),
                });
            }
        }
        // Whoever took the last entry away has answered it in between.
        self.answers.try_recv().ok()
    }
}

/// The part of a [`s::Call`] that is one agent's own, so made that `shared` bytes behind it complete it.
fn head(call_id: u64, service: &str, own: &[u8], shared: usize) -> Vec<u8> {
    let mut head = s::Call {
        call_id,
        service: service.to_owned(),
        payload: Bytes::new(),
    }
    .encode_to_vec();
    // `payload` is field 3, the last one.
    encode_key(3, WireType::LengthDelimited, &mut head);
    encode_varint((own.len() + shared) as u64, &mut head);
    head.extend_from_slice(own);
    head
}

impl Service {
    /// Hands one call to its agent. Whether an answer will come.
    fn send(
        &self,
        waiting: &mut Waiting,
        answers: &mpsc::Sender<c::CallAnswer>,
        index: u32,
        call: &c::AgentCall,
        service: &str,
        shared: &Bytes,
    ) {
        let node = &self.node;
        let pending = Pending {
            index,
            answers: answers.clone(),
        };
        let session = AgentId::parse(&call.agent_id)
            .ok()
            .and_then(|agent| node.registry.find(&agent));
        let Some(session) = session else {
            return pending.answer(c::Failure::NotHere, Bytes::new());
        };
        let call_id = node.random.u64();
        let key = (session.id, call_id);
        let busy = Pending {
            index,
            answers: answers.clone(),
        };
        // In the table before it is sent, so that neither an answer nor the end of the session can miss it.
        if !node.calls.insert(key, pending) {
            return busy.answer(c::Failure::Busy, Bytes::new());
        }
        if let Some(place) = waiting.keys.get_mut(index as usize) {
            *place = Some(key);
        }
        let head = head(call_id, service, &call.own, shared.len());
        let failure = match session.outbox.call(Frame::CALL, &head, shared.clone()) {
            Ok(()) => return,
            Err(Refused::Closed) => c::Failure::NotHere,
            Err(Refused::Full) => c::Failure::Busy,
        };
        if let Some(pending) = node.calls.remove(key) {
            pending.answer(failure, Bytes::new());
        }
    }
}

#[tonic::async_trait]
impl AgentCalls for Service {
    type CallStream = Pin<Box<dyn Stream<Item = Result<c::CallAnswer, Status>> + Send>>;

    async fn call(&self, request: Request<c::CallRequest>) -> Result<Response<Self::CallStream>, Status> {
        let node = &self.node;
        let limits = &node.config.calls;
        let request = request.into_inner();
        if request.service.is_empty() || request.service.len() > 64 {
            return Err(Status::invalid_argument(
                "the service of a call has a name of 1 to 64 bytes",
            ));
        }
        if request.calls.len() > limits.max_per_request {
            return Err(Status::invalid_argument(format!(
                "{} calls in one request, at most {} are taken (calls.max_per_request)",
                request.calls.len(),
                limits.max_per_request
            )));
        }
        let longest = request.calls.iter().map(|call| call.own.len()).max().unwrap_or(0);
        if longest + request.shared.len() > limits.max_call_bytes {
            return Err(Status::invalid_argument(format!(
                "a call of {} bytes, at most {} are passed on (calls.max_call_bytes)",
                longest + request.shared.len(),
                limits.max_call_bytes
            )));
        }
        let timeout = u64::from(request.timeout_ms).clamp(1, limits.max_timeout_ms);
        let (sender, answers) = mpsc::channel(request.calls.len().max(1));
        let mut waiting = Waiting {
            node: Arc::clone(node),
            keys: vec![None; request.calls.len()],
            answers,
            open: request.calls.len(),
            deadline: Instant::now() + Duration::from_millis(timeout),
        };
        tracing::debug!(
            service = request.service,
            caller = request.caller,
            calls = request.calls.len(),
            "calls to agents"
        );
        for (index, call) in (0..).zip(&request.calls) {
            if index % YIELD_EVERY == YIELD_EVERY - 1 {
                tokio::task::yield_now().await;
            }
            self.send(&mut waiting, &sender, index, call, &request.service, &request.shared);
        }
        drop(sender);
        let stream = futures::stream::unfold(waiting, |mut waiting| async move {
            let answer = waiting.next().await?;
            Some((Ok(answer), waiting))
        });
        Ok(Response::new(Box::pin(stream)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(index: u32) -> (Pending, mpsc::Receiver<c::CallAnswer>) {
        let (answers, receiver) = mpsc::channel(1);
        (Pending { index, answers }, receiver)
    }

    #[test]
    fn own_and_shared_are_one_message() {
        let shared = b"shared part".as_slice();
        let mut wire = head(7, "file", b"own and ", shared.len());
        wire.extend_from_slice(shared);
        let call = s::Call::decode(&wire[..]).unwrap();
        assert_eq!(
            (call.call_id, call.service.as_str(), &call.payload[..]),
            (7, "file", b"own and shared part".as_slice())
        );
    }

    #[test]
    fn an_ended_session_answers_its_own_calls_only() {
        let calls = Calls::new(CallsConfig {
            max_pending: 3,
            ..CallsConfig::default()
        });
        let (one, mut first) = pending(0);
        let (two, mut second) = pending(1);
        let (three, mut third) = pending(2);
        assert!(calls.insert((5, u64::MAX), one));
        assert!(calls.insert((5, 0), two));
        assert!(calls.insert((6, 0), three));
        assert!(!calls.insert((7, 0), pending(3).0), "there is a bound");
        calls.give_up(5, c::Failure::Lost);
        for answers in [&mut first, &mut second] {
            assert_eq!(answers.try_recv().unwrap().failure(), c::Failure::Lost);
        }
        assert_eq!(calls.len(), 1);
        calls.reply(
            6,
            s::CallReply {
                call_id: 0,
                failure: 0,
                payload: Bytes::from_static(b"yes"),
            },
        );
        let answer = third.try_recv().unwrap();
        assert_eq!(
            (answer.index, answer.failure(), &answer.payload[..]),
            (2, c::Failure::None, b"yes".as_slice())
        );
        // Nobody waits for it any more.
        calls.reply(6, s::CallReply::default());
        assert!(calls.is_empty());
    }

    #[test]
    fn an_answer_that_is_too_long_is_not_passed_on() {
        let calls = Calls::new(CallsConfig::default());
        let (one, mut answers) = pending(0);
        calls.insert((1, 1), one);
        calls.reply(
            1,
            s::CallReply {
                call_id: 1,
                failure: 0,
                payload: vec![0; CallsConfig::default().max_reply_bytes + 1].into(),
            },
        );
        let answer = answers.try_recv().unwrap();
        assert_eq!(answer.failure(), c::Failure::TooLong);
        assert!(answer.payload.is_empty());
    }
}
