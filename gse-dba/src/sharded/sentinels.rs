//! What is asked of the Sentinels of a group, and what they are told when the primary was changed as planned. They are told in their own way, by the message with
//! which Sentinels tell each other of a newer configuration: all of them then have the new primary at once, and watch it.

use std::collections::HashMap;

use anyhow::{Context as _, ensure};
use redis::aio::MultiplexedConnection;

use super::control::{self, Login};
use crate::config::sharded::Group;

type Fields = HashMap<String, String>;

/// Who is primary by the newest word of any Sentinel, and that word's number.
pub(super) async fn primary(group: &Group, login: &Login) -> anyhow::Result<(u64, String)> {
    let (name, mut trouble) = (&group.name, Vec::new());
    let asked = futures::future::join_all(group.sentinels.iter().map(|address| async move {
        let place = control::place(address)?;
        tokio::time::timeout(login.timeout, control::ask_sentinel(&place, login, name))
            .await
            .map_err(|_| anyhow::anyhow!("the Sentinel {address} does not answer"))?
    }))
    .await;
    let mut best: Option<(u64, String)> = None;
    for answer in asked {
        match answer {
            Ok((epoch, addr)) if best.as_ref().is_none_or(|(e, _)| epoch > *e) => best = Some((epoch, addr)),
            Ok(_) => {}
            Err(e) => trouble.push(format!("{e:#}")),
        }
    }
    best.with_context(|| format!("no Sentinel knows its primary ({})", trouble.join("; ")))
}

/// One Sentinel, and another one whose word it takes.
struct Seat {
    address: String,
    conn: MultiplexedConnection,
    /// Host, port and id of the other one.
    other: (String, String, String),
}

/// The Sentinels of a group, met before a change.
pub(super) struct Council {
    name: String,
    seats: Vec<Seat>,
    epoch: u64,
    all: usize,
}

impl Council {
    /// Asks all of them. An error when they are busy with the group themselves, or too few are there.
    pub(super) async fn meet(group: &Group, login: &Login) -> anyhow::Result<Self> {
        let (mut seats, mut epoch) = (Vec::new(), 0);
        for address in &group.sentinels {
            let asked = async {
                let mut conn = control::connect(&control::place(address)?, login).await?;
                let master: Fields = redis::cmd("SENTINEL")
                    .arg("MASTER")
                    .arg(&group.name)
                    .query_async(&mut conn)
                    .await?;
                let others: Vec<Fields> = redis::cmd("SENTINEL")
                    .arg("SENTINELS")
                    .arg(&group.name)
                    .query_async(&mut conn)
                    .await?;
                anyhow::Ok((conn, master, others))
            };
            let Ok((conn, master, others)) = asked.await else {
                continue;
            };
            let flags = master.get("flags").map(String::as_str).unwrap_or_default();
            let busy = ["s_down", "o_down", "failover_in_progress", "force_failover"];
            ensure!(
                !flags.split(',').any(|f| busy.contains(&f)),
                "the Sentinel {address} has group '{}' as {flags:?}: wait until it is sure of it",
                group.name
            );
            epoch = epoch.max(master.get("config-epoch").and_then(|e| e.parse().ok()).unwrap_or(0));
            let get = |f: &Fields, k: &str| f.get(k).cloned().unwrap_or_default();
            let other = others.iter().find(|f| get(f, "runid").len() == 40);
            if let Some(f) = other {
                seats.push(Seat {
                    address: address.clone(),
                    conn,
                    other: (get(f, "ip"), get(f, "port"), get(f, "runid")),
                });
            }
        }
        ensure!(
            2 * seats.len() > group.sentinels.len(),
            "{} of {} Sentinels answer and know another one: more than half must, to be told of the change",
            seats.len(),
            group.sentinels.len()
        );
        Ok(Self {
            name: group.name.clone(),
            seats,
            epoch,
            all: group.sentinels.len(),
        })
    }

    /// Tells them who is primary now; how many have it so, and what went wrong with the others.
    pub(super) async fn announce(&self, primary: &str) -> (usize, Option<String>) {
        let told = futures::future::join_all(self.seats.iter().map(|seat| async move {
            let (host, port) = super::record::split(primary)?;
            let (ip, own, id) = &seat.other;
            let epoch = self.epoch + 1;
            let mut conn = seat.conn.clone();
            let _: i64 = redis::cmd("PUBLISH")
                .arg("__sentinel__:hello")
                .arg(format!("{ip},{own},{id},{epoch},{},{host},{port},{epoch}", self.name))
                .query_async(&mut conn)
                .await?;
            let (now, at) = control::ask_sentinel_on(&mut conn, &self.name).await?;
            ensure!(
                now >= epoch && super::plain::same(&at, primary).await,
                "the Sentinel {} still has {at}",
                seat.address
            );
            Ok(())
        }))
        .await;
        let wrong: Vec<String> = told
            .iter()
            .filter_map(|t| t.as_ref().err().map(|e| format!("{e:#}")))
            .collect();
        let right = told.len() - wrong.len();
        let silent = self.all - self.seats.len();
        if wrong.is_empty() && silent == 0 {
            (right, None)
        } else {
            let mut words = wrong;
            if silent > 0 {
                words.push(format!("{silent} did not answer and hear it from the others"));
            }
            (right, Some(words.join("; ")))
        }
    }
}
