//! A fail-over of Sentinel's, seen before all Sentinels know it. The leading Sentinel has made a copy the primary and asks it once a second whether it is one; here it
//! is asked at once, and the other copies are told to follow it, as the Sentinel will tell them a moment later. What is acknowledged then is on the new primary and
//! on copies of it, so whichever of them the Sentinels come to in the end has it.

use std::collections::HashMap;
use std::time::Duration;

use redis::aio::MultiplexedConnection;

use super::control;
use super::record;
use super::seat::Seat;
use super::tell;
use crate::single::dial::Place;

/// What a Sentinel says when it has chosen a copy, and when it has told it.
pub(super) const CHOSEN: &str = "+selected-slave";
pub(super) const TOLD: &str = "+failover-state-wait-promotion";

/// A choice is worth so long: the Sentinels agree long before, or have given up.
pub(super) const FRESH: Duration = Duration::from_secs(5);
const ASK: Duration = Duration::from_millis(500);

/// The copy of a group that a Sentinel says it has chosen: `slave <name> <ip> <port> @ <group> <ip> <port>`.
pub(super) fn chosen(payload: &str, group: &str) -> Option<String> {
    let (copy, of) = payload.split_once(" @ ")?;
    let mut copy = copy.split(' ').skip(2);
    let (ip, port) = (copy.next()?, copy.next()?);
    let address = if ip.contains(':') {
        format!("[{ip}]:{port}")
    } else {
        format!("{ip}:{port}")
    };
    (of.split(' ').next()? == group).then_some(address)
}

/// The chosen copy, if it is a primary by now, with its other copies on their way to it.
pub(super) async fn promoted(seat: &Seat, address: &str) -> Option<(Place, MultiplexedConnection)> {
    let ask = async {
        let place = reach(seat, address)?;
        let mut conn = control::connect(&place, &seat.login).await?;
        let whole = record::look(&mut conn).await?;
        anyhow::Ok((place, conn, whole))
    };
    let (place, conn, whole) = tokio::time::timeout(ASK, ask).await.ok()?.ok()?;
    if !whole.replication.is_primary {
        return None;
    }
    if whole.replication.copies.len() < seat.need {
        let others = copies(seat).await.into_iter().filter(|c| c != address);
        futures::future::join_all(others.map(|other| {
            let history = &whole.history_before;
            async move {
                let told = tokio::time::timeout(ASK, redirect(seat, &other, address, history)).await;
                match told {
                    Ok(Ok(true)) => tracing::info!(group = %seat.name, copy = other, primary = address, "told to follow the new primary"),
                    Ok(Ok(false)) | Err(_) => {}
                    Ok(Err(e)) => tracing::debug!(group = %seat.name, copy = other, error = %format!("{e:#}"), "Sentinel tells it"),
                }
            }
        }))
        .await;
    }
    Some((place, conn))
}

fn reach(seat: &Seat, address: &str) -> anyhow::Result<Place> {
    tell::beside(&seat.group().sockets, address).map_or_else(|| control::place(address), Ok)
}

/// The copies that a Sentinel knows and reaches.
async fn copies(seat: &Seat) -> Vec<String> {
    let (group, login) = (seat.group(), seat.sentinel_login());
    for sentinel in &group.sentinels {
        let asked = async {
            let mut conn = control::connect(&control::place(sentinel)?, &login).await?;
            let all: Vec<HashMap<String, String>> = redis::cmd("SENTINEL")
                .arg("REPLICAS")
                .arg(&group.name)
                .query_async(&mut conn)
                .await?;
            anyhow::Ok(all)
        };
        if let Ok(Ok(all)) = tokio::time::timeout(ASK, asked).await {
            let down = |f: &HashMap<String, String>| f.get("flags").is_some_and(|f| f.contains("s_down"));
            let up = all.iter().filter(|f| !down(f));
            return up
                .filter_map(|f| Some(format!("{}:{}", f.get("ip")?, f.get("port")?)))
                .collect();
        }
    }
    Vec::new()
}

/// Has a copy that has lost its primary follow the one that continues the same history.
async fn redirect(seat: &Seat, copy: &str, primary: &str, history: &str) -> anyhow::Result<bool> {
    let mut conn = control::connect(&reach(seat, copy)?, &seat.login).await?;
    let whole = record::look(&mut conn).await?;
    if whole.replication.is_primary || whole.link_up || whole.history != history {
        return Ok(false);
    }
    record::follow(&mut conn, None, Some(primary)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chosen_copy_is_read() {
        let said = "slave 127.0.0.1:7002 127.0.0.1 7002 @ g1 127.0.0.1 7001";
        assert_eq!(chosen(said, "g1").as_deref(), Some("127.0.0.1:7002"));
        assert_eq!(chosen(said, "g2"), None);
        assert_eq!(
            chosen("slave x ::1 7002 @ g1 ::1 7001", "g1").as_deref(),
            Some("[::1]:7002")
        );
        for bad in ["", "g1", "slave @ g1", "slave a b @ "] {
            assert_eq!(chosen(bad, "g1"), None, "{bad}");
        }
    }
}
