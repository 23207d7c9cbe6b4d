//! How two peers find out who they are: TLS and a proof of membership between ours, the plain handshake of BitTorrent with foreign
//! clients.
//!
//! A dialler shows its proof at once; a listener looks at it before it says anything about the swarm. Whoever names a swarm that is
//! not here, or has no proof, or a wrong one, is closed after the same steps.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use gse_core::net::BoxDuplex;
use gse_core::tls::{self, PeerIdentity, Role};
use rustls::ConnectionCommon;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::proof::{self, Side};
use super::{ASK_FOREIGN, Established, Place, QUEUE, Who};
use crate::bencode::{self, Encoder};
use crate::engine::{ALPN, Shared};
use crate::swarm::{Callee, Entry, SwarmSpec};
use crate::wire::{EXT_HANDSHAKE, ExtHandshake, Handshake, Message, WireError};

/// Bytes of the first message of one of ours, at most.
const FIRST_MESSAGE: usize = 4096;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("not through the handshake in time")]
    Late,
    #[error("no more connections are possible at present")]
    Full,
    #[error("it speaks another protocol: {0}")]
    Wire(#[from] WireError),
    #[error("its certificate does not say who it is: {0}")]
    Identity(#[from] tls::TlsError),
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("it does not speak our peer protocol in TLS")]
    Alpn,
    #[error("unknown swarm, or no proof of membership")]
    NotMember,
    #[error("it is {0}, not whom we meant")]
    SomebodyElse(String),
    #[error("it answers for another swarm")]
    OtherSwarm,
    #[error("that is us")]
    Ourselves,
}

/// A stream, and what is known of it by TLS.
struct Channel {
    stream: BoxDuplex,
    identity: Option<PeerIdentity>,
    binding: Vec<u8>,
}

/// What a first message of one of ours says.
struct Claim {
    id: String,
    proof: Vec<u8>,
    /// It carries what we have into another zone.
    relay: bool,
}

/// Connects to a peer of a swarm. With somebody expected there, it is one of ours and has to be that one; without, it is foreign.
pub(crate) async fn dial(
    shared: &Shared,
    spec: &SwarmSpec,
    swarm: &[u8; 20],
    peer_id: &[u8; 20],
    address: &str,
    expected: Option<&Callee>,
) -> Result<Established, HandshakeError> {
    let permit = Arc::clone(&shared.permits)
        .try_acquire_owned()
        .map_err(|_| HandshakeError::Full)?;
    let dialling = async {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        let remote = tcp.peer_addr()?;
        let socket = tcp.as_fd().try_clone_to_owned()?;
        match expected {
            Some(expected) => dial_own(shared, spec, swarm, peer_id, tcp, socket, remote, expected, permit).await,
            None => dial_foreign(swarm, peer_id, tcp, socket, remote, permit).await,
        }
    };
    timeout(shared.config.link.handshake, dialling)
        .await
        .map_err(|_| HandshakeError::Late)?
}

#[allow(clippy::too_many_arguments)] // all of them are one call's facts, passed on once
async fn dial_own(
    shared: &Shared,
    spec: &SwarmSpec,
    swarm: &[u8; 20],
    peer_id: &[u8; 20],
    tcp: TcpStream,
    socket: OwnedFd,
    address: SocketAddr,
    expected: &Callee,
    permit: OwnedSemaphorePermit,
) -> Result<Established, HandshakeError> {
    let mut channel = match &shared.config.tls {
        Some(tls) => {
            let connector = TlsConnector::from(Arc::clone(&tls.client));
            let stream = connector.connect(tls::server_name(), tcp).await?;
            let (identity, binding) = of_tls(stream.get_ref().1)?;
            Channel {
                stream: Box::new(stream),
                identity: Some(identity),
                binding,
            }
        }
        None => Channel {
            stream: Box::new(tcp),
            identity: None,
            binding: Vec::new(),
        },
    };
    let own_ticket = || proof::ticket(&spec.swarm_key, &spec.own_id);
    let key = expected.ticket.unwrap_or_else(own_ticket);
    let proof = proof::make(&key, Side::Dialler, swarm, &channel.binding, &spec.own_id);
    let mut out = BytesMut::new();
    Handshake::new(*swarm, *peer_id).encode(&mut out);
    encode_claim(&spec.own_id, &proof, expected.upstream, &mut out);
    channel.stream.write_all(&out).await?;
    channel.stream.flush().await?;
    let mut buffer = BytesMut::new();
    let theirs = read_handshake(&mut channel.stream, &mut buffer).await?;
    let claim = read_claim(&mut channel.stream, &mut buffer)
        .await?
        .ok_or(HandshakeError::NotMember)?;
    if theirs.swarm_id != *swarm {
        return Err(HandshakeError::OtherSwarm);
    }
    if theirs.peer_id == *peer_id {
        return Err(HandshakeError::Ourselves);
    }
    let member = proof::holds(&key, Side::Listener, swarm, &channel.binding, &claim.id, &claim.proof);
    if !member || !may_be(&channel.identity, &claim.id) {
        return Err(HandshakeError::NotMember);
    }
    if claim.id != expected.id {
        return Err(HandshakeError::SomebodyElse(claim.id));
    }
    let place = match expected.upstream {
        true => Place::Upstream,
        false => Place::Here,
    };
    Ok(Established {
        stream: channel.stream,
        who: own(claim.id, theirs.peer_id, address, true, place),
        rest: buffer,
        socket,
        permit,
    })
}

async fn dial_foreign(
    swarm: &[u8; 20],
    peer_id: &[u8; 20],
    mut tcp: TcpStream,
    socket: OwnedFd,
    address: SocketAddr,
    permit: OwnedSemaphorePermit,
) -> Result<Established, HandshakeError> {
    let mut out = BytesMut::new();
    Handshake::new(*swarm, *peer_id).encode(&mut out);
    tcp.write_all(&out).await?;
    let mut buffer = BytesMut::new();
    let theirs = read_handshake(&mut tcp, &mut buffer).await?;
    if theirs.swarm_id != *swarm {
        return Err(HandshakeError::OtherSwarm);
    }
    if theirs.peer_id == *peer_id {
        return Err(HandshakeError::Ourselves);
    }
    Ok(Established {
        stream: Box::new(tcp),
        who: foreign(&theirs, address, true),
        rest: buffer,
        socket,
        permit,
    })
}

/// Takes a connection that somebody has made to us, and says which swarm it is for.
pub(crate) async fn accept(
    shared: &Shared,
    tcp: TcpStream,
    address: SocketAddr,
    plain: bool,
    permit: OwnedSemaphorePermit,
) -> Result<(Entry, Established), HandshakeError> {
    let accepting = async {
        tcp.set_nodelay(true)?;
        let socket = tcp.as_fd().try_clone_to_owned()?;
        if plain {
            accept_foreign(shared, tcp, socket, address, permit).await
        } else {
            accept_own(shared, tcp, socket, address, permit).await
        }
    };
    timeout(shared.config.link.handshake, accepting)
        .await
        .map_err(|_| HandshakeError::Late)?
}

async fn accept_own(
    shared: &Shared,
    tcp: TcpStream,
    socket: OwnedFd,
    address: SocketAddr,
    permit: OwnedSemaphorePermit,
) -> Result<(Entry, Established), HandshakeError> {
    let mut channel = match &shared.config.tls {
        Some(tls) => {
            let stream = TlsAcceptor::from(Arc::clone(&tls.server)).accept(tcp).await?;
            let (identity, binding) = of_tls(stream.get_ref().1)?;
            Channel {
                stream: Box::new(stream),
                identity: Some(identity),
                binding,
            }
        }
        None => Channel {
            stream: Box::new(tcp),
            identity: None,
            binding: Vec::new(),
        },
    };
    let mut buffer = BytesMut::new();
    let theirs = read_handshake(&mut channel.stream, &mut buffer).await?;
    let claim = read_claim(&mut channel.stream, &mut buffer).await?;
    let entry = shared.find(&theirs.swarm_id);
    // The proof is looked at even when there is no such swarm, so that the answer takes as long.
    let key = entry.as_ref().map_or([0; 32], |entry| entry.spec.swarm_key);
    let claim = claim.unwrap_or(Claim {
        id: String::new(),
        proof: Vec::new(),
        relay: false,
    });
    let key = proof::ticket(&key, &claim.id);
    let holds = proof::holds(
        &key,
        Side::Dialler,
        &theirs.swarm_id,
        &channel.binding,
        &claim.id,
        &claim.proof,
    );
    let member = holds && !claim.id.is_empty() && may_be(&channel.identity, &claim.id);
    let Some(entry) = entry.filter(|_| member) else {
        return Err(HandshakeError::NotMember);
    };
    if theirs.peer_id == entry.peer_id || claim.id == entry.spec.own_id {
        return Err(HandshakeError::Ourselves);
    }
    // An agent that says so would be shown everything at once.
    let may_relay = channel
        .identity
        .as_ref()
        .is_none_or(|identity| identity.role == Role::Server);
    let place = match claim.relay && may_relay {
        true => Place::Relay,
        false => Place::Here,
    };
    let own_id = &entry.spec.own_id;
    let proof = proof::make(&key, Side::Listener, &theirs.swarm_id, &channel.binding, own_id);
    let mut out = BytesMut::new();
    Handshake::new(theirs.swarm_id, entry.peer_id).encode(&mut out);
    encode_claim(own_id, &proof, false, &mut out);
    channel.stream.write_all(&out).await?;
    channel.stream.flush().await?;
    let connection = Established {
        stream: channel.stream,
        who: own(claim.id, theirs.peer_id, address, false, place),
        rest: buffer,
        socket,
        permit,
    };
    Ok((entry, connection))
}

async fn accept_foreign(
    shared: &Shared,
    mut tcp: TcpStream,
    socket: OwnedFd,
    address: SocketAddr,
    permit: OwnedSemaphorePermit,
) -> Result<(Entry, Established), HandshakeError> {
    let mut buffer = BytesMut::new();
    let theirs = read_handshake(&mut tcp, &mut buffer).await?;
    let entry = shared.find(&theirs.swarm_id).filter(|entry| entry.spec.foreign);
    let Some(entry) = entry else {
        return Err(HandshakeError::NotMember);
    };
    if theirs.peer_id == entry.peer_id {
        return Err(HandshakeError::Ourselves);
    }
    let mut out = BytesMut::new();
    Handshake::new(theirs.swarm_id, entry.peer_id).encode(&mut out);
    tcp.write_all(&out).await?;
    let connection = Established {
        stream: Box::new(tcp),
        who: foreign(&theirs, address, false),
        rest: buffer,
        socket,
        permit,
    };
    Ok((entry, connection))
}

fn own(id: String, peer_id: [u8; 20], address: SocketAddr, dialled: bool, place: Place) -> Who {
    Who {
        id: Some(id),
        peer_id,
        address,
        dialled,
        place,
        fast: true,
        extended: true,
        queue: QUEUE,
    }
}

fn foreign(theirs: &Handshake, address: SocketAddr, dialled: bool) -> Who {
    Who {
        id: None,
        peer_id: theirs.peer_id,
        address,
        dialled,
        place: Place::Here,
        fast: theirs.fast,
        extended: theirs.extended,
        queue: ASK_FOREIGN,
    }
}

/// Who the other end of a TLS connection is, and what binds a proof to it.
fn of_tls<Side>(connection: &ConnectionCommon<Side>) -> Result<(PeerIdentity, Vec<u8>), HandshakeError> {
    if connection.alpn_protocol() != Some(ALPN) {
        return Err(HandshakeError::Alpn);
    }
    let identity = tls::identity_of(connection)?;
    let binding = connection.export_keying_material(vec![0; 32], proof::EXPORTER, None)?;
    Ok((identity, binding))
}

/// Whether a certificate is in the way of a claim: an agent's that has an id has this one.
fn may_be(identity: &Option<PeerIdentity>, id: &str) -> bool {
    match identity {
        Some(PeerIdentity {
            role: Role::Agent,
            id: Some(own),
            ..
        }) => own == id,
        _ => true,
    }
}

async fn read_handshake(
    stream: &mut (impl gse_core::net::Duplex + ?Sized),
    buffer: &mut BytesMut,
) -> Result<Handshake, HandshakeError> {
    loop {
        if let Some(handshake) = Handshake::decode(buffer)? {
            return Ok(handshake);
        }
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
}

/// The first message of one of ours: who it is, with a proof. `None` if it says nothing of the kind.
async fn read_claim(
    stream: &mut (impl gse_core::net::Duplex + ?Sized),
    buffer: &mut BytesMut,
) -> Result<Option<Claim>, HandshakeError> {
    let message = loop {
        if let Some(message) = Message::decode(buffer)? {
            break message;
        }
        if buffer.len() > FIRST_MESSAGE {
            return Ok(None);
        }
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    };
    match message {
        Message::Extended {
            id: EXT_HANDSHAKE,
            payload,
        } => Ok(decode_claim(&payload)),
        _ => Ok(None),
    }
}

fn decode_claim(payload: &Bytes) -> Option<Claim> {
    let shake = ExtHandshake::decode(payload).ok()?;
    let gse = shake.gse?;
    let dict = bencode::decode(&gse).ok()?.dict()?;
    let id = std::str::from_utf8(dict.get(b"id")?.bytes()?).ok()?;
    let proof = dict.get(b"proof")?.bytes()?;
    if id.is_empty() || id.len() > proof::MAX_ID || proof.len() != proof::LEN {
        return None;
    }
    let relay = dict.get(b"relay").and_then(|value| value.int()) == Some(1);
    Some(Claim {
        id: id.to_owned(),
        proof: proof.to_vec(),
        relay,
    })
}

fn encode_claim(id: &str, proof: &[u8], relay: bool, out: &mut BytesMut) {
    let mut gse = Encoder::new();
    gse.dict(|dict| {
        dict.bytes(b"id", id.as_bytes());
        dict.bytes(b"proof", proof);
        if relay {
            dict.int(b"relay", 1);
        }
    });
    let shake = ExtHandshake {
        reqq: Some(QUEUE as u32),
        gse: Some(gse.finish().into()),
        ..ExtHandshake::default()
    };
    let payload = shake.encode();
    Message::Extended {
        id: EXT_HANDSHAKE,
        payload,
    }
    .encode(out);
}
