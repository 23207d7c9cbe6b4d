//! Queries and answers of the HTTP tracker (BEP 3, 23, 7, 48).

use std::fmt::Write as _;

use super::{Announce, Event, Peers, Scrape};
use crate::bencode::{self, Encoder, Value};

/// Swarms that one scrape may ask for.
pub const MAX_SCRAPE: usize = 64;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// A peer announces itself.
    Announce(Announce),
    /// Asks for figures of these swarms.
    Scrape(Vec<[u8; 20]>),
}

/// Why a request can't be taken; said to the client in these words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// A path of nothing.
    #[error("no such path; there are /announce and /scrape")]
    Path,
    /// A parameter is missing or not what it must be.
    #[error("parameter {0} is missing or not what it must be")]
    Parameter(&'static str),
    /// Scrape of more swarms than are answered, or of all.
    #[error("a scrape names 1 to {MAX_SCRAPE} swarms by info_hash")]
    Scrape,
}

impl Request {
    /// Reads path and query of a GET. Parameters that are not known are left alone; so is `ip`, which anyone could say.
    pub fn parse(path: &str, query: &str) -> Result<Self, BadRequest> {
        match path {
            "/announce" => parse_announce(query).map(Request::Announce),
            "/scrape" => {
                let mut swarms = Vec::new();
                for (key, value) in parameters(query) {
                    if key == "info_hash" {
                        if swarms.len() == MAX_SCRAPE {
                            return Err(BadRequest::Scrape);
                        }
                        swarms.push(twenty(value).ok_or(BadRequest::Parameter("info_hash"))?);
                    }
                }
                match swarms.is_empty() {
                    true => Err(BadRequest::Scrape),
                    false => Ok(Request::Scrape(swarms)),
                }
            }
            _ => Err(BadRequest::Path),
        }
    }

    /// Path and query for a GET.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut out = String::new();
        match self {
            Request::Announce(announce) => {
                out.push_str("/announce?info_hash=");
                escape(&announce.swarm, &mut out);
                out.push_str("&peer_id=");
                escape(&announce.peer_id, &mut out);
                let event = match announce.event {
                    Event::None => "",
                    Event::Started => "&event=started",
                    Event::Stopped => "&event=stopped",
                    Event::Completed => "&event=completed",
                };
                // Writing to a string does not fail.
                let _ = write!(
                    out,
                    "&port={}&uploaded=0&downloaded=0&left={}&compact=1{event}",
                    announce.port, announce.left
                );
                if let Some(wanted) = announce.wanted {
                    let _ = write!(out, "&numwant={wanted}");
                }
            }
            Request::Scrape(swarms) => {
                out.push_str("/scrape");
                for (at, swarm) in swarms.iter().enumerate() {
                    out.push_str(if at == 0 { "?info_hash=" } else { "&info_hash=" });
                    escape(swarm, &mut out);
                }
            }
        }
        out
    }
}

fn parse_announce(query: &str) -> Result<Announce, BadRequest> {
    let (mut swarm, mut peer_id, mut port, mut left) = (None, None, None, None);
    let (mut event, mut wanted) = (Event::None, None);
    for (key, value) in parameters(query) {
        match key {
            "info_hash" => swarm = twenty(value),
            "peer_id" => peer_id = twenty(value),
            "port" => port = value.parse().ok(),
            "left" => left = value.parse().ok(),
            "event" => {
                event = match value {
                    "started" => Event::Started,
                    "stopped" => Event::Stopped,
                    "completed" => Event::Completed,
                    // Also "paused" of BEP 21, and what else there may come to be.
                    _ => Event::None,
                }
            }
            // What is no number, or below 0, is as good as not said.
            "numwant" => wanted = value.parse().ok(),
            _ => {}
        }
    }
    Ok(Announce {
        swarm: swarm.ok_or(BadRequest::Parameter("info_hash"))?,
        peer_id: peer_id.ok_or(BadRequest::Parameter("peer_id"))?,
        port: port.ok_or(BadRequest::Parameter("port"))?,
        // Some leave it out; who does not say that it has everything lacks something.
        left: left.unwrap_or(1),
        event,
        wanted,
    })
}

fn parameters(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

/// Exactly twenty bytes, with or without escapes.
fn twenty(value: &str) -> Option<[u8; 20]> {
    let mut out = [0; 20];
    let mut bytes = value.bytes();
    for slot in &mut out {
        *slot = match bytes.next()? {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                (digit()? << 4 | digit()?) as u8
            }
            b'+' => b' ',
            byte => byte,
        };
    }
    bytes.next().is_none().then_some(out)
}

fn escape(raw: &[u8], out: &mut String) {
    for byte in raw {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(*byte)),
            _ => {
                // Writing to a string does not fail.
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
}

/// An answer, as a client reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Response {
    /// To an announce.
    Announce(Peers),
    /// To a scrape.
    Scrape(Vec<([u8; 20], Scrape)>),
    /// A refusal, in words.
    Failure(String),
}

/// An answer that is not bencoding, or lacks something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an answer of a tracker")]
pub struct Malformed;

impl Response {
    /// The body.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Encoder::new();
        out.dict(|root| match self {
            Response::Failure(reason) => root.bytes(b"failure reason", reason.as_bytes()),
            Response::Announce(answer) => {
                root.int(b"complete", i64::from(answer.seeds));
                root.int(b"incomplete", i64::from(answer.leechers));
                root.int(b"interval", i64::from(answer.interval));
                root.int(b"min interval", i64::from(answer.min_interval));
                let mut peers = Vec::with_capacity(answer.v4.len() * 6);
                answer.write(&mut peers, false);
                root.bytes(b"peers", &peers);
                if !answer.v6.is_empty() {
                    let mut peers = Vec::with_capacity(answer.v6.len() * 18);
                    answer.write(&mut peers, true);
                    root.bytes(b"peers6", &peers);
                }
            }
            Response::Scrape(swarms) => {
                let mut sorted = swarms.clone();
                sorted.sort_unstable_by_key(|(swarm, _)| *swarm);
                sorted.dedup_by_key(|(swarm, _)| *swarm);
                root.key(b"files").dict(|files| {
                    for (swarm, figures) in &sorted {
                        files.key(swarm).dict(|file| {
                            file.int(b"complete", i64::from(figures.seeds));
                            file.int(b"downloaded", i64::from(figures.completed));
                            file.int(b"incomplete", i64::from(figures.leechers));
                        });
                    }
                });
            }
        });
        out.finish()
    }

    /// Reads a body.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        let root = bencode::decode(body).ok().and_then(Value::dict).ok_or(Malformed)?;
        let number = |dict: bencode::Dict<'_>, key: &[u8]| {
            let value = dict.get(key).and_then(Value::int).unwrap_or(0);
            u32::try_from(value).unwrap_or(0)
        };
        if let Some(reason) = root.get(b"failure reason") {
            let reason = reason.bytes().ok_or(Malformed)?;
            return Ok(Response::Failure(String::from_utf8_lossy(reason).into_owned()));
        }
        if let Some(files) = root.get(b"files") {
            let files = files.dict().ok_or(Malformed)?;
            let figures = files.iter().map(|(swarm, value)| {
                let dict = value.dict().ok_or(Malformed)?;
                let swarm = swarm.try_into().map_err(|_| Malformed)?;
                Ok((
                    swarm,
                    Scrape {
                        seeds: number(dict, b"complete"),
                        completed: number(dict, b"downloaded"),
                        leechers: number(dict, b"incomplete"),
                    },
                ))
            });
            return figures.collect::<Result<_, _>>().map(Response::Scrape);
        }
        let mut peers = Peers {
            interval: number(root, b"interval"),
            min_interval: number(root, b"min interval"),
            seeds: number(root, b"complete"),
            leechers: number(root, b"incomplete"),
            ..Peers::default()
        };
        for (key, v6) in [(&b"peers"[..], false), (b"peers6", true)] {
            if let Some(raw) = root.get(key) {
                peers.read(raw.bytes().ok_or(Malformed)?, v6).ok_or(Malformed)?;
            }
        }
        Ok(Response::Announce(peers))
    }
}
