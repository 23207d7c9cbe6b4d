//! What the several gse_dba in front of a group tell each other: to hold commands back for a moment, and who is primary now. They say it on a channel of the group's
//! primary; whoever misses it finds out by its own looks.

use std::time::Duration;

use futures::StreamExt as _;
use redis::aio::MultiplexedConnection;

use super::control;
use super::plain::List;
use super::seat::Seat;
use crate::config::sharded::Member;
use crate::single::dial::Place;

/// How long what is under way may take to come back once the gate is shut.
pub(super) const QUIET: Duration = Duration::from_millis(80);
/// For how long a gate stays shut when nobody opens it again.
pub(super) const SHUT: Duration = Duration::from_millis(1500);

pub(super) fn channel(seat: &Seat) -> String {
    format!("gse_dba:{}", seat.name)
}

pub(super) fn answers(seat: &Seat) -> String {
    format!("gse_dba:{}:held", seat.name)
}

/// Says something to all; how many there are.
pub(super) async fn say(conn: &mut MultiplexedConnection, channel: &str, text: &str) -> anyhow::Result<usize> {
    Ok(redis::cmd("PUBLISH").arg(channel).arg(text).query_async(conn).await?)
}

/// Listens for as long as the group is followed.
pub(super) async fn listen(seat: &Seat) {
    loop {
        let mut heads = seat.heads();
        let Ok(place) = heads.wait_for(|h| h.place.is_some()).await.map(|h| h.place.clone()) else {
            return;
        };
        let Some(place) = place else { continue };
        tokio::select! {
            told = attend(seat, &place) => {
                if let Err(e) = told {
                    tracing::debug!(group = %seat.name, error = %format!("{e:#}"), "other gse_dba can't be heard");
                }
            }
            _ = heads.wait_for(|h| h.place.as_ref() != Some(&place)) => {
                // Whatever it was shut for is over.
                seat.gate.open();
                continue;
            }
        }
        tokio::time::sleep(Duration::from_millis(seat.config.poll_ms)).await;
    }
}

/// The socket over which a server beside us is spoken to.
pub(super) fn beside(sockets: &[String], known: &str) -> Option<Place> {
    let mut all = sockets.iter().filter_map(|s| Member::read(s).ok());
    all.find(|m| m.known == known).map(|m| m.place)
}

/// What the other servers of the group know one by.
pub(super) fn known(seat: &Seat, place: &Place) -> String {
    let group = seat.group();
    let mut all = group
        .servers
        .iter()
        .chain(&group.sockets)
        .filter_map(|s| Member::read(s).ok());
    all.find(|m| m.place == *place)
        .map_or_else(|| place.to_string(), |m| m.known)
}

async fn attend(seat: &Seat, place: &Place) -> anyhow::Result<()> {
    let channel = channel(seat);
    let mut heard = control::news(place, &seat.login, &[channel.as_str()]).await?;
    let mut conn = control::connect(place, &seat.login).await?;
    let mut messages = heard.on_message();
    while let Some(message) = messages.next().await {
        let text: String = message.get_payload()?;
        match text.split_once(' ') {
            Some(("hold", token)) => {
                seat.gate.shut(SHUT);
                if seat.gate.quiet(QUIET).await {
                    say(&mut conn, &answers(seat), token).await?;
                }
            }
            Some(("primary", known)) => {
                let group = seat.group();
                let place = match List::of(&group) {
                    Ok(list) if group.sentinels.is_empty() => {
                        list.find(known).await.map(|i| list.members[i].place.clone())
                    }
                    _ => beside(&group.sockets, known).or_else(|| control::place(known).ok()),
                };
                if let Some(place) = place {
                    // A look would find the same, a moment later: connections make sure that it is a primary before anything is sent.
                    let _turn = super::change::turn(seat).await?;
                    seat.set_copies(seat.need);
                    if seat.set_head(Some(place)) {
                        seat.metrics.switched();
                    }
                    seat.gate.open();
                }
                seat.news.notify_one();
            }
            _ => seat.gate.open(),
        }
    }
    anyhow::bail!("the connection to {place} was lost")
}
