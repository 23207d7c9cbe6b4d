//! Who is let in: protocol version, the certificate's id against the claimed one, room, and the fence against clones.
//!
//! The same host (machine and boot id) replaces its own half-open session at once. A different host with the id of a connected
//! agent makes the node probe the connected one; the newcomer is fenced only if the probe is answered, so that a rebuilt or rebooted
//! host gets in and a cloned image does not.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use gse_core::tls::PeerIdentity;
use gse_proto::ids::AgentId;
use gse_proto::session as s;
use gse_proto::session::{Hello, Refuse, RefuseCode};

use super::outbox::Outbox;
use super::registry::Session;
use crate::Node;

/// Decides about a hello. On success the session is registered.
///
/// # Errors
/// The refusal to send.
pub(super) async fn admit(
    node: &Arc<Node>,
    hello: &Hello,
    peer: SocketAddr,
    identity: &PeerIdentity,
) -> Result<Arc<Session>, Refuse> {
    if hello.protocol_min > s::PROTOCOL || hello.protocol < s::PROTOCOL_MIN {
        return Err(refuse(
            RefuseCode::Protocol,
            format!(
                "the agent speaks session protocol {} to {}, this server {} to {}",
                hello.protocol_min,
                hello.protocol,
                s::PROTOCOL_MIN,
                s::PROTOCOL
            ),
            600_000,
        ));
    }
    let agent = AgentId::parse(&hello.agent_id)
        .map_err(|error| refuse(RefuseCode::Identity, format!("agent id: {error}"), 600_000))?;
    match identity.id.as_deref() {
        Some(id) if id == agent.as_str() => {}
        None if node.config.agents.allow_shared_certificate => {}
        None => {
            let text = "the certificate is shared by the fleet; this site asks for one that names the agent";
            return Err(refuse(RefuseCode::Identity, text.into(), 600_000));
        }
        Some(id) => {
            let text = format!("the certificate is for agent {id}, not {agent}");
            return Err(refuse(RefuseCode::Identity, text, 600_000));
        }
    }
    if node.registry.len() >= node.config.session.max_sessions {
        return Err(refuse(
            RefuseCode::Busy,
            "this server has as many agents as it may".into(),
            // Not all of them at the same moment.
            u32::try_from(15_000 + node.random.below(30_000)).unwrap_or(30_000),
        ));
    }
    fence_elsewhere(node, hello, &agent, peer).await?;
    let limits = &node.config.session;
    let session = Arc::new(Session::new(
        node.next_session.fetch_add(1, Ordering::Relaxed),
        agent,
        hello,
        peer,
        Outbox::new(limits.outbox_frames, limits.outbox_bytes),
        node.ticks.now(),
    ));
    let mut expected: Option<Arc<Session>> = None;
    loop {
        match node.registry.replace(&session, expected.as_ref()) {
            Ok(()) => return Ok(session),
            Err(None) => expected = None,
            Err(Some(old)) => {
                if old.host != session.host && answers(node, &old).await {
                    node.metrics.clones.inc();
                    tracing::warn!(agent = %session.agent, holder = %old.peer, newcomer = %peer, machine = hello.machine_id,
                        "agent id is claimed by a second host; the newcomer is fenced");
                    node.presence
                        .clone_seen(&session.agent, format!("{peer} machine {}", hello.machine_id));
                    let text = format!(
                        "agent id {} belongs to the host at {}, which is connected and answers; give this host an id of its own",
                        session.agent, old.peer
                    );
                    return Err(refuse(
                        RefuseCode::Clone,
                        text,
                        u32::try_from(limits.fence_retry_ms).unwrap_or(u32::MAX),
                    ));
                }
                if old.host == session.host {
                    tracing::info!(agent = %session.agent, old = %old.peer, new = %peer, "the same host is back; its old session is ended");
                } else {
                    tracing::warn!(agent = %session.agent, old = %old.peer, new = %peer, machine = hello.machine_id,
                        "the host that has this agent id does not answer; the id passes to another one");
                }
                expected = Some(old);
            }
        }
    }
}

/// The fence for an id whose holder is connected to another node. While the store does not answer everybody is let in: the session there
/// ends as soon as that node hears of the one here.
async fn fence_elsewhere(node: &Node, hello: &Hello, agent: &AgentId, peer: SocketAddr) -> Result<(), Refuse> {
    if node.peers.is_empty() || node.registry.get(agent).is_some() {
        return Ok(());
    }
    let Ok(Some(record)) = node.presence.stored(agent).await else {
        return Ok(());
    };
    let same_host = record.machine_id == hello.machine_id && record.boot_id == hello.boot_id;
    let holder = node
        .peers
        .get(&record.node_id)
        .filter(|holder| holder.life == record.node_life);
    let Some(holder) = holder.filter(|_| !same_host && record.disconnected_at_ms == 0) else {
        return Ok(());
    };
    let request = gse_proto::peer::ProbeRequest {
        agent_id: agent.as_str().to_owned(),
        session_id: record.session_id,
    };
    // A node that does not answer does not hold anybody off.
    if !holder.probe(request).await.unwrap_or(false) {
        return Ok(());
    }
    node.metrics.clones.inc();
    tracing::warn!(%agent, holder = record.peer, node = record.node_id, newcomer = %peer, machine = hello.machine_id,
        "agent id is claimed by a second host; the newcomer is fenced");
    let text = format!(
        "agent id {agent} belongs to the host at {}, which is connected to node {} and answers; give this host an id of its own",
        record.peer, record.node_id
    );
    let retry_ms = u32::try_from(node.config.session.fence_retry_ms).unwrap_or(u32::MAX);
    Err(refuse(RefuseCode::Clone, text, retry_ms))
}

/// Asks a connected agent for a sign of life.
async fn answers(node: &Node, old: &Session) -> bool {
    let nonce = node.random.u64() | 1;
    if old.outbox.control(&s::Ping { nonce }.into()).is_err() {
        return false;
    }
    let limit = Duration::from_millis(node.config.session.probe_ms);
    tokio::time::timeout(limit, old.answered(nonce)).await.is_ok()
}

fn refuse(code: RefuseCode, reason: String, retry_after_ms: u32) -> Refuse {
    Refuse {
        code: code.into(),
        reason,
        retry_after_ms,
    }
}
