//! What a client is told: the replies of all groups that a command went to made one, and for what gets no reply the error that says what is known. How replies are merged
//! is left to `merge`.

use bytes::BytesMut;

use super::load::Load;
use super::{Kind, Session, Step};
use crate::args::Args;
use crate::conn::Ended;
use crate::resp::parse::Requests;
use crate::resp::write::Writer;
use crate::sharded::route::{Merge, Split};
use crate::sharded::{Answer, Fate, Sharded, merge};

impl Session {
    pub(super) fn answer(
        &self,
        requests: &Requests,
        step: Step,
        loads: &mut [Load],
        out: &mut Writer,
    ) -> Result<(), Ended> {
        match step.kind {
            Kind::Here(bytes) => out.raw(&bytes),
            Kind::One(g) | Kind::Instead(g, _) => {
                if let Some(l) = loads.get_mut(g.min(self.table.map.groups())) {
                    one(&self.sharded, l, g, step.writes, out)?;
                }
            }
            Kind::Digest(g) | Kind::Publish(g, ..) | Kind::Subscribers(g, _) | Kind::Settings(g) => {
                let Some(l) = loads.get_mut(g.min(self.table.map.groups())) else {
                    return Ok(());
                };
                let reply = match whole(&self.sharded, l, g, step.writes)? {
                    Ok(reply) => reply,
                    Err(e) => {
                        out.error(e.as_bytes());
                        return Ok(());
                    }
                };
                let a = requests.args(step.i);
                match step.kind {
                    Kind::Publish(_, clients, ours) => merge::published(&reply, clients, ours, out),
                    Kind::Subscribers(_, kind) => {
                        merge::subscribers(&reply, |name| self.sharded.hub().here(kind, name), out);
                    }
                    Kind::Settings(_) => merge::settings(&reply, out),
                    _ => {
                        if reply.starts_with(b"-NOSCRIPT") {
                            self.sharded.scripts().unknown(a.at(1));
                        }
                        out.raw(&reply);
                    }
                }
            }
            Kind::Scan(g, own) => {
                let Some(l) = loads.get_mut(g) else { return Ok(()) };
                match whole(&self.sharded, l, g, step.writes)? {
                    Ok(reply) if own.is_some() => {
                        let shows = |k: &[u8]| self.table.shows(g, k);
                        merge::scanned(&reply, g, self.table.after(g), self.table.generation(), shows, out);
                    }
                    Ok(reply) => out.raw(&reply),
                    Err(e) => out.error(e.as_bytes()),
                }
            }
            Kind::All(how) => {
                let mut replies = Vec::with_capacity(loads.len());
                for (g, l) in loads.iter_mut().take(self.table.map.groups()).enumerate() {
                    if self.table.is_used(g) {
                        let reply = whole(&self.sharded, l, g, step.writes)?;
                        replies.push(match how {
                            // What another group serves is not this one's to show.
                            Merge::Join => reply.map(|r| merge::shown(r, |k| self.table.shows(g, k))),
                            Merge::AnyOf => reply.map(|r| merge::shown_one(r, |k| self.table.shows(g, k))),
                            _ => reply,
                        });
                    }
                }
                match worst(&replies) {
                    Some(e) => out.error(e.as_bytes()),
                    None if how == Merge::Least => {
                        let a = requests.args(step.i);
                        let all: Vec<&[u8]> = replies.iter().flatten().map(AsRef::as_ref).collect();
                        merge::exist(&all, |n| self.sharded.scripts().has(a.at(2 + n)), out);
                    }
                    None => {
                        let all: Vec<&[u8]> = replies.iter().flatten().map(AsRef::as_ref).collect();
                        merge::all(how, &all, out);
                    }
                }
            }
            Kind::Parts(how, parts) => {
                let mut replies = Vec::with_capacity(parts.len());
                for (g, _) in &parts {
                    if let Some(l) = loads.get_mut((*g).min(self.table.map.groups())) {
                        replies.push(whole(&self.sharded, l, *g, step.writes)?);
                    }
                }
                let a = requests.args(step.i);
                match worst(&replies) {
                    Some(e) if replies.iter().any(Result::is_ok) && step.writes => out.error(
                        format!(
                            "{e}; other keys of this command were served: {}",
                            failed_keys(&replies, &parts, a, how)
                        )
                        .as_bytes(),
                    ),
                    Some(e) => out.error(e.as_bytes()),
                    None => {
                        let all: Vec<(&[u8], &[u32])> = replies
                            .iter()
                            .flatten()
                            .map(AsRef::as_ref)
                            .zip(parts.iter().map(|(_, k)| k.as_slice()))
                            .collect();
                        let step = if how == Split::Pairs { 2 } else { 1 };
                        merge::parts(how, &all, (a.len() - 1) / step, out);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Which keys of a command were not served.
fn failed_keys(replies: &[Result<BytesMut, String>], parts: &[(usize, Vec<u32>)], a: Args<'_>, how: Split) -> String {
    let step = if how == Split::Pairs { 2 } else { 1 };
    let names: Vec<String> = replies
        .iter()
        .zip(parts)
        .filter(|(r, _)| r.is_err())
        .flat_map(|(_, (_, keys))| keys.iter())
        .take(8)
        .map(|k| {
            String::from_utf8_lossy(a.at(1 + step * *k as usize))
                .chars()
                .take(64)
                .collect()
        })
        .collect();
    format!("not these: {}", names.join(" "))
}

/// The error that says most: what may have happened before what has not.
fn worst(replies: &[Result<BytesMut, String>]) -> Option<&str> {
    let errors = || replies.iter().filter_map(|r| r.as_ref().err());
    errors()
        .find(|e| e.starts_with("UNCERTAIN"))
        .or_else(|| errors().next())
        .map(String::as_str)
}

fn whole(sharded: &Sharded, load: &mut Load, g: usize, writes: bool) -> Result<Result<BytesMut, String>, Ended> {
    let (reply, fate) = load.next();
    match fate {
        Fate::Sealed => Ok(Ok(BytesMut::from(reply))),
        Fate::TooLarge => Err(Ended::LargeReply),
        fate => Ok(Err(told(sharded, fate, reply, g, writes))),
    }
}

pub(super) fn one(sharded: &Sharded, load: &mut Load, g: usize, writes: bool, out: &mut Writer) -> Result<(), Ended> {
    let (reply, fate) = load.next();
    match fate {
        Fate::Sealed => out.raw(reply),
        Fate::TooLarge => return Err(Ended::LargeReply),
        fate => out.error(told(sharded, fate, reply, g, writes).as_bytes()),
    }
    Ok(())
}

/// Writes the answer to one command on a private connection.
pub(in crate::sharded) fn settle(
    sharded: &Sharded,
    answer: Answer,
    g: usize,
    writes: bool,
    out: &mut Writer,
) -> Result<(), Ended> {
    match answer.fate {
        Fate::Sealed => out.raw(&answer.replies),
        Fate::TooLarge => return Err(Ended::LargeReply),
        fate => out.error(told(sharded, &fate, &answer.replies, g, writes).as_bytes()),
    }
    Ok(())
}

pub(in crate::sharded) fn unsent(sharded: &Sharded, g: usize, why: &str) -> String {
    let lost = Fate::Lost {
        sent: false,
        reason: why.to_owned(),
    };
    told(sharded, &lost, &[], g, true)
}

/// What a client is told that gets no reply.
pub(in crate::sharded) fn told(sharded: &Sharded, fate: &Fate, reply: &[u8], g: usize, writes: bool) -> String {
    let group = sharded.group(g);
    let (name, need) = group.as_ref().map_or(("", 0), |g| (g.seat.name.as_str(), g.seat.need));
    let m = sharded.metrics();
    let text = match fate {
        // It says itself that nothing was done.
        Fate::Demoted if reply.starts_with(b"-BUSY") => String::from_utf8_lossy(reply.get(1..).unwrap_or_default())
            .trim_end()
            .to_owned(),
        Fate::Sealed | Fate::TooLarge => "ERR the reply was lost".to_owned(),
        Fate::Moved => "UNAVAILABLE the slot has just moved to another group; nothing was executed".to_owned(),
        Fate::Refused(why) => format!("NOREPLICAS {why}; nothing was executed"),
        Fate::Unserved(why) => format!("UNAVAILABLE {why}; nothing was executed, try it again"),
        Fate::Short(n) if writes => format!(
            "UNCERTAIN the primary of group '{name}' has executed this, but {n} of the {need} other copies that it needs have confirmed it in time: it may or may not survive"
        ),
        Fate::Short(_) => {
            format!(
                "UNAVAILABLE what was read from group '{name}' could not be confirmed by enough copies; nothing was changed"
            )
        }
        Fate::Demoted if writes && !reply.starts_with(b"-READONLY") => {
            format!(
                "UNCERTAIN the server that answered for group '{name}' is no primary any more: this may or may not have taken effect"
            )
        }
        Fate::Demoted => format!("UNAVAILABLE group '{name}' is changing its primary; nothing was executed"),
        Fate::Lost { sent: false, reason } => {
            format!("UNAVAILABLE group '{name}' is not reachable ({reason}); the command was not sent")
        }
        Fate::Lost { reason, .. } if writes => format!(
            "UNCERTAIN group '{name}' was lost before it answered ({reason}): this may or may not have taken effect"
        ),
        Fate::Lost { reason, .. } => format!(
            "UNAVAILABLE group '{name}' was lost before it answered ({reason}); nothing was changed by this command"
        ),
    };
    if text.starts_with("UNCERTAIN") {
        m.uncertain();
    } else if text.starts_with("NOREPLICAS") {
        m.noreplicas();
    }
    text
}
