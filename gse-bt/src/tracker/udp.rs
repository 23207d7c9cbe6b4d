//! Datagrams of BEP 15.

use std::net::{SocketAddrV4, SocketAddrV6};

use bytes::Buf as _;

use super::{Announce, Event, Peers, Scrape};

/// What a connect request begins with.
pub const MAGIC: u64 = 0x0417_2710_1980;
/// Bytes of a connect request and of its answer.
pub const CONNECT_LEN: usize = 16;
/// Bytes of an announce request, without what BEP 41 may put behind it.
pub const ANNOUNCE_LEN: usize = 98;
/// Swarms that one scrape may ask for.
pub const MAX_SCRAPE: usize = 74;

const CONNECT: u32 = 0;
const ANNOUNCE: u32 = 1;
const SCRAPE: u32 = 2;
const ERROR: u32 = 3;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Asks for a connection id.
    Connect {
        /// Given back with the answer.
        transaction: u32,
    },
    /// A peer announces itself.
    Announce {
        /// From the answer to a connect.
        connection: u64,
        /// Given back with the answer.
        transaction: u32,
        /// What it says.
        announce: Announce,
    },
    /// Asks for figures.
    Scrape {
        /// From the answer to a connect.
        connection: u64,
        /// Given back with the answer.
        transaction: u32,
        /// Of these swarms.
        swarms: Vec<[u8; 20]>,
    },
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Response {
    /// A connection id.
    Connect {
        /// As in the request.
        transaction: u32,
        /// The id.
        connection: u64,
    },
    /// Peers; those of the address family that was asked over.
    Announce {
        /// As in the request.
        transaction: u32,
        /// The answer.
        peers: Peers,
    },
    /// Figures, in the order of the request.
    Scrape {
        /// As in the request.
        transaction: u32,
        /// The figures.
        swarms: Vec<Scrape>,
    },
    /// A refusal.
    Error {
        /// As in the request.
        transaction: u32,
        /// In words.
        message: String,
    },
}

/// A datagram that is none of BEP 15.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a datagram of BEP 15")]
pub struct Malformed;

impl Request {
    /// Reads a request.
    pub fn parse(datagram: &[u8]) -> Result<Self, Malformed> {
        let mut rest = datagram;
        if rest.len() < CONNECT_LEN {
            return Err(Malformed);
        }
        let connection = rest.get_u64();
        let action = rest.get_u32();
        let transaction = rest.get_u32();
        match action {
            CONNECT if connection == MAGIC => Ok(Request::Connect { transaction }),
            ANNOUNCE => Ok(Request::Announce {
                connection,
                transaction,
                announce: parse_announce(rest)?,
            }),
            SCRAPE => {
                let (swarms, odd) = rest.as_chunks::<20>();
                if swarms.is_empty() || swarms.len() > MAX_SCRAPE || !odd.is_empty() {
                    return Err(Malformed);
                }
                Ok(Request::Scrape {
                    connection,
                    transaction,
                    swarms: swarms.to_vec(),
                })
            }
            _ => Err(Malformed),
        }
    }

    /// The datagram.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(ANNOUNCE_LEN);
        let mut head = |connection: u64, action: u32, transaction: u32| {
            out.extend_from_slice(&connection.to_be_bytes());
            out.extend_from_slice(&action.to_be_bytes());
            out.extend_from_slice(&transaction.to_be_bytes());
        };
        match self {
            Request::Connect { transaction } => head(MAGIC, CONNECT, *transaction),
            Request::Announce {
                connection,
                transaction,
                announce,
            } => {
                head(*connection, ANNOUNCE, *transaction);
                out.extend_from_slice(&announce.swarm);
                out.extend_from_slice(&announce.peer_id);
                out.extend_from_slice(&0_u64.to_be_bytes());
                out.extend_from_slice(&announce.left.to_be_bytes());
                out.extend_from_slice(&0_u64.to_be_bytes());
                let event = match announce.event {
                    Event::None => 0_u32,
                    Event::Completed => 1,
                    Event::Started => 2,
                    Event::Stopped => 3,
                };
                out.extend_from_slice(&event.to_be_bytes());
                // Address and key: the tracker takes the address that the datagram comes from.
                out.extend_from_slice(&[0; 8]);
                let wanted = announce
                    .wanted
                    .map_or(-1, |wanted| i32::try_from(wanted).unwrap_or(i32::MAX));
                out.extend_from_slice(&wanted.to_be_bytes());
                out.extend_from_slice(&announce.port.to_be_bytes());
            }
            Request::Scrape {
                connection,
                transaction,
                swarms,
            } => {
                head(*connection, SCRAPE, *transaction);
                out.extend(swarms.iter().flatten());
            }
        }
        out
    }
}

/// What follows the head of an announce.
fn parse_announce(mut rest: &[u8]) -> Result<Announce, Malformed> {
    if rest.len() < ANNOUNCE_LEN - CONNECT_LEN {
        return Err(Malformed);
    }
    let mut announce = Announce {
        swarm: [0; 20],
        peer_id: [0; 20],
        port: 0,
        left: 0,
        event: Event::None,
        wanted: None,
    };
    rest.copy_to_slice(&mut announce.swarm);
    rest.copy_to_slice(&mut announce.peer_id);
    let _downloaded = rest.get_u64();
    announce.left = rest.get_u64();
    let _uploaded = rest.get_u64();
    announce.event = match rest.get_u32() {
        1 => Event::Completed,
        2 => Event::Started,
        3 => Event::Stopped,
        _ => Event::None,
    };
    let _address_and_key = rest.get_u64();
    announce.wanted = u32::try_from(rest.get_i32()).ok();
    announce.port = rest.get_u16();
    Ok(announce)
}

impl Response {
    /// The datagram.
    #[must_use]
    pub fn encode(&self, v6: bool) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Response::Connect {
                transaction,
                connection,
            } => write_connect(&mut out, *transaction, *connection),
            Response::Announce { transaction, peers } => write_announce(&mut out, *transaction, peers, v6),
            Response::Scrape { transaction, swarms } => write_scrape(&mut out, *transaction, swarms.iter().copied()),
            Response::Error { transaction, message } => write_error(&mut out, *transaction, message),
        }
        out
    }

    /// Reads an answer that came over IPv6 (`v6`) or IPv4.
    pub fn parse(datagram: &[u8], v6: bool) -> Result<Self, Malformed> {
        let mut rest = datagram;
        if rest.len() < 8 {
            return Err(Malformed);
        }
        let action = rest.get_u32();
        let transaction = rest.get_u32();
        match action {
            CONNECT if rest.len() >= 8 => Ok(Response::Connect {
                transaction,
                connection: rest.get_u64(),
            }),
            ANNOUNCE if rest.len() >= 12 => {
                let mut peers = Peers {
                    interval: rest.get_u32(),
                    leechers: rest.get_u32(),
                    seeds: rest.get_u32(),
                    ..Peers::default()
                };
                peers.read(rest, v6).ok_or(Malformed)?;
                Ok(Response::Announce { transaction, peers })
            }
            SCRAPE => {
                let (swarms, odd) = rest.as_chunks::<12>();
                if !odd.is_empty() {
                    return Err(Malformed);
                }
                let figures = |mut raw: &[u8]| Scrape {
                    seeds: raw.get_u32(),
                    completed: raw.get_u32(),
                    leechers: raw.get_u32(),
                };
                Ok(Response::Scrape {
                    transaction,
                    swarms: swarms.iter().map(|raw| figures(raw)).collect(),
                })
            }
            ERROR => Ok(Response::Error {
                transaction,
                message: String::from_utf8_lossy(rest).into_owned(),
            }),
            _ => Err(Malformed),
        }
    }
}

impl Peers {
    /// Takes peers in compact form, of one family; `None` if bytes are left over.
    pub(super) fn read(&mut self, raw: &[u8], v6: bool) -> Option<()> {
        if v6 {
            let (peers, odd) = raw.as_chunks::<18>();
            self.v6.extend(peers.iter().map(|peer| {
                let (mut ip, mut rest) = ([0; 16], peer.as_slice());
                rest.copy_to_slice(&mut ip);
                SocketAddrV6::new(ip.into(), rest.get_u16(), 0, 0)
            }));
            odd.is_empty().then_some(())
        } else {
            let (peers, odd) = raw.as_chunks::<6>();
            self.v4.extend(peers.iter().map(|peer| {
                let mut rest = peer.as_slice();
                SocketAddrV4::new(rest.get_u32().into(), rest.get_u16())
            }));
            odd.is_empty().then_some(())
        }
    }

    /// Puts the peers of one family behind `out` in compact form (BEP 23, BEP 7).
    pub(super) fn write(&self, out: &mut Vec<u8>, v6: bool) {
        if v6 {
            for peer in &self.v6 {
                out.extend_from_slice(&peer.ip().octets());
                out.extend_from_slice(&peer.port().to_be_bytes());
            }
        } else {
            for peer in &self.v4 {
                out.extend_from_slice(&peer.ip().octets());
                out.extend_from_slice(&peer.port().to_be_bytes());
            }
        }
    }
}

pub(super) fn write_connect(out: &mut Vec<u8>, transaction: u32, connection: u64) {
    head(out, CONNECT, transaction);
    out.extend_from_slice(&connection.to_be_bytes());
}

pub(super) fn write_announce(out: &mut Vec<u8>, transaction: u32, peers: &Peers, v6: bool) {
    head(out, ANNOUNCE, transaction);
    for number in [peers.interval, peers.leechers, peers.seeds] {
        out.extend_from_slice(&number.to_be_bytes());
    }
    peers.write(out, v6);
}

pub(super) fn write_scrape(out: &mut Vec<u8>, transaction: u32, swarms: impl Iterator<Item = Scrape>) {
    head(out, SCRAPE, transaction);
    for swarm in swarms {
        for number in [swarm.seeds, swarm.completed, swarm.leechers] {
            out.extend_from_slice(&number.to_be_bytes());
        }
    }
}

pub(super) fn write_error(out: &mut Vec<u8>, transaction: u32, message: &str) {
    head(out, ERROR, transaction);
    out.extend_from_slice(message.as_bytes());
}

fn head(out: &mut Vec<u8>, action: u32, transaction: u32) {
    out.extend_from_slice(&action.to_be_bytes());
    out.extend_from_slice(&transaction.to_be_bytes());
}
