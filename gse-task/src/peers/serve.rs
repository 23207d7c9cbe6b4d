//! Answers the calls of other nodes (see `proto/gse/peer.proto`). Who may call is decided by the listener: holders of a server's
//! certificate.

use std::sync::Arc;
use std::time::Duration;

use gse_proto::frame::Frame;
use gse_proto::ids::AgentId;
use gse_proto::peer as p;
use gse_proto::peer::task_peer_server::TaskPeer;
use gse_proto::session as s;
use tonic::{Request, Response, Status};

use super::takeover;
use crate::Node;
use crate::session::outbox::{CloseReason, Refused};
use crate::task::remote::There;
use crate::task::store::RowPlace;

/// The service.
pub struct Service {
    /// The node.
    pub node: Arc<Node>,
}

fn place_of(place: Option<p::Place>) -> (u32, u32) {
    let place = place.unwrap_or_default();
    (place.bucket, place.index)
}

#[tonic::async_trait]
impl TaskPeer for Service {
    async fn deliver(&self, request: Request<p::DeliverRequest>) -> Result<Response<p::DeliverReply>, Status> {
        let node = &self.node;
        let request = request.into_inner();
        let mut reply = p::DeliverReply::default();
        if request.deliveries.iter().any(|delivery| !delivery.dispatch.is_empty()) {
            node.peers.set_owner(&request.task_id, &request.node_id);
        }
        for (n, delivery) in (0..).zip(request.deliveries) {
            if n % 256 == 255 {
                tokio::task::yield_now().await;
            }
            let session = AgentId::parse(&delivery.agent_id)
                .ok()
                .and_then(|agent| node.registry.get(&agent));
            let session = session.filter(|session| delivery.session_id == 0 || session.id == delivery.session_id);
            let Some(session) = session else {
                reply.gone.push(n);
                continue;
            };
            let sent = if delivery.dispatch.is_empty() {
                let (bucket, index) = place_of(delivery.place);
                let target = Some(s::TargetRef {
                    task_id: request.task_id.clone(),
                    bucket,
                    index,
                });
                session.outbox.control(&s::Terminate { target }.into())
            } else {
                session
                    .outbox
                    .work(Frame::DISPATCH, &delivery.dispatch, request.shared.clone())
            };
            match sent {
                Ok(()) => {}
                Err(Refused::Closed) => reply.gone.push(n),
                Err(Refused::Full) => reply.full.push(n),
            }
        }
        Ok(Response::new(reply))
    }

    async fn opened(&self, request: Request<p::OpenedRequest>) -> Result<Response<p::OpenedReply>, Status> {
        let node = &self.node;
        let request = request.into_inner();
        node.peers.called_by(&request.node_id);
        let mut sessions = Vec::with_capacity(request.sessions.len());
        for opened in request.sessions {
            let Ok(agent) = AgentId::parse(&opened.agent_id) else {
                return Err(Status::invalid_argument(format!(
                    "{:?} is not an agent id",
                    opened.agent_id
                )));
            };
            let here = node.registry.get(&agent);
            if here
                .as_ref()
                .is_some_and(|here| here.age().as_millis() < u128::from(opened.age_ms))
            {
                // It has come back to this node since; the notice is an old one.
                continue;
            }
            if let Some(old) = here
                && node.registry.remove(&old)
            {
                // Its connection here may be half open; anything given to it would be lost.
                tracing::info!(%agent, node = request.node_id, "the agent is connected to another node now; its session here is ended");
                node.presence.forget(&agent);
                old.outbox.close(CloseReason::Elsewhere);
            }
            let held = opened.held.into_iter().map(|held| {
                let (bucket, index) = place_of(held.place);
                s::TargetRef {
                    task_id: held.task_id,
                    bucket,
                    index,
                }
            });
            let there = There {
                agent,
                node: request.node_id.clone(),
                session: opened.session_id,
                epoch: opened.journal_epoch,
                since_ms: Some(opened.epoch_since_ms).filter(|at| *at != 0),
            };
            sessions.push((there, held.collect()));
        }
        node.tasks.opened_there(sessions).await;
        Ok(Response::new(p::OpenedReply {}))
    }

    async fn stored(&self, request: Request<p::StoredRequest>) -> Result<Response<p::StoredReply>, Status> {
        let node = &self.node;
        let mut unknown = Vec::new();
        for task in request.into_inner().tasks {
            let Some(cell) = node.tasks.run(&task.task_id) else {
                unknown.push(task.task_id);
                continue;
            };
            for row in task.rows {
                let (bucket, index) = place_of(row.place);
                node.tasks.mark(
                    &cell,
                    RowPlace {
                        bucket,
                        index,
                        atomic: row.atomic,
                    },
                );
            }
        }
        Ok(Response::new(p::StoredReply { unknown }))
    }

    async fn stop(&self, request: Request<p::StopRequest>) -> Result<Response<p::StopReply>, Status> {
        let node = &self.node;
        let request = request.into_inner();
        let owner = node.tasks.run(&request.task_id).is_some();
        if owner {
            let places: Vec<(u32, u32)> = request.places.into_iter().map(|place| place_of(Some(place))).collect();
            node.tasks.terminate(&request.task_id, &places).await;
        }
        Ok(Response::new(p::StopReply { owner }))
    }

    async fn adopt(&self, request: Request<p::AdoptRequest>) -> Result<Response<p::AdoptReply>, Status> {
        let node = &self.node;
        if node.life.is_draining() || !node.tasks.recovered() {
            return Err(Status::unavailable("this node is starting or stopping itself"));
        }
        let request = request.into_inner();
        let mut taken = Vec::new();
        for task in request.tasks {
            match takeover::take(node, &request.node_id, &task.task_id, Some(&task.open)).await {
                Ok(_) => taken.push(task.task_id),
                Err(error) => {
                    tracing::warn!(task = task.task_id, from = request.node_id, %error, "a task could not be taken over");
                }
            }
        }
        Ok(Response::new(p::AdoptReply { taken }))
    }

    async fn probe(&self, request: Request<p::ProbeRequest>) -> Result<Response<p::ProbeReply>, Status> {
        let node = &self.node;
        let request = request.into_inner();
        let session = AgentId::parse(&request.agent_id)
            .ok()
            .and_then(|agent| node.registry.get(&agent));
        let session = session.filter(|session| request.session_id == 0 || session.id == request.session_id);
        let alive = match session {
            Some(session) => {
                let nonce = node.random.u64() | 1;
                let limit = Duration::from_millis(node.config.session.probe_ms);
                session.outbox.control(&s::Ping { nonce }.into()).is_ok()
                    && tokio::time::timeout(limit, session.answered(nonce)).await.is_ok()
            }
            None => false,
        };
        Ok(Response::new(p::ProbeReply { alive }))
    }
}
