//! Follows one group: who its primary is by Sentinel's word (or, for a plain list, by what the servers say of themselves), how many copies follow
//! that primary, and whether they are set up as the promise needs it. It looks every `poll_ms`, when a Sentinel announces a switch, and when a
//! connection was lost.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use gse_core::lifecycle::Lifecycle;

use super::checks;
use super::control::{self, Login, Replication};
use super::seat::Seat;
use crate::config::sharded::{Checks, Group};
use crate::single::dial::Place;

/// Looks are at least this far apart, however often a look is asked for.
const BREATH: Duration = Duration::from_millis(50);
/// Set-ups are looked at again this often while they are wrong.
const CHECK_AGAIN: u32 = 20;

struct Follower {
    seat: Arc<Seat>,
    group: Group,
    sentinel_login: Login,
    /// The newest configuration of Sentinel's that was seen; an older one is not gone back to.
    epoch: u64,
    /// The generation whose set-up was checked.
    checked: Option<(u64, usize)>,
    looks: u32,
    said: String,
}

/// Starts following a group.
pub(crate) fn start(seat: &Arc<Seat>, group: &Group, life: &Lifecycle) {
    let login = Login {
        user: "default".into(),
        password: seat.config.sentinel_password.clone(),
        timeout: seat.login.timeout,
    };
    for address in &group.sentinels {
        let (seat, login, address, closing) = (Arc::clone(seat), login.clone(), address.clone(), life.clone());
        life.spawn_until_closed("dba-sentinel-news", async move {
            tokio::select! {
                () = listen(&seat, &login, &address) => {}
                () = closing.closing() => {}
            }
        });
    }
    let mut follower = Follower {
        seat: Arc::clone(seat),
        group: group.clone(),
        sentinel_login: login,
        epoch: 0,
        checked: None,
        looks: 0,
        said: String::new(),
    };
    let closing = life.clone();
    life.spawn_until_closed("dba-follower", async move {
        tokio::select! {
            () = follower.run() => {}
            () = closing.closing() => {}
        }
    });
}

/// Nudges the follower whenever a Sentinel announces a switch. A Sentinel that is not there is tried again for ever: the others and the regular looks stand in for it.
async fn listen(seat: &Seat, login: &Login, address: &str) {
    let Ok(place) = control::place(address) else { return };
    loop {
        match control::news(&place, login).await {
            Ok(mut news) => {
                let mut messages = news.on_message();
                while messages.next().await.is_some() {
                    seat.news.notify_one();
                }
            }
            Err(e) => {
                tracing::debug!(group = %seat.name, sentinel = address, error = %format!("{e:#}"), "no news from this Sentinel")
            }
        }
        seat.nudge();
        tokio::time::sleep(Duration::from_millis(seat.config.poll_ms)).await;
    }
}

impl Follower {
    async fn run(&mut self) {
        loop {
            let seat = Arc::clone(&self.seat);
            let looked = tokio::select! {
                looked = self.look() => looked,
                // It may be waiting for the old primary, which does not answer any more.
                () = seat.news.notified() => continue,
            };
            if let Err(e) = looked {
                self.say(format!("{e:#}"));
            }
            self.seat.set_looked();
            let poll = Duration::from_millis(self.seat.config.poll_ms);
            tokio::time::sleep(BREATH).await;
            tokio::select! {
                () = tokio::time::sleep(poll.saturating_sub(BREATH)) => {}
                () = self.seat.nudge.notified() => {}
                () = self.seat.news.notified() => {}
            }
        }
    }

    /// Logs a trouble once, not at every look.
    fn say(&mut self, trouble: String) {
        if trouble != self.said {
            tracing::warn!(group = %self.seat.name, trouble, "the group could not be looked at");
            self.said = trouble;
        }
    }

    async fn look(&mut self) -> anyhow::Result<()> {
        let place = if self.group.sentinels.is_empty() {
            self.by_list().await?
        } else {
            self.by_sentinel().await?
        };
        let mut conn = match control::connect(&place, &self.seat.login).await {
            Ok(conn) => conn,
            Err(e) => {
                // Not reachable does not make it another: connections that stand go on, and writes are refused once it is known that nobody confirms them.
                if self.seat.head().place.as_ref() != Some(&place) {
                    self.switch(None);
                }
                self.seat.set_copies(0);
                return Err(e);
            }
        };
        let told = control::replication(&mut conn).await?;
        if !told.is_primary {
            self.seat.set_copies(0);
            self.switch(None);
            anyhow::bail!("{place} should be the primary and is a copy: waiting for the switch to end");
        }
        let copies = self.count(&told);
        self.seat.set_copies(copies);
        self.seat.metrics.group_copies(&self.seat.name, copies);
        self.looks = self.looks.wrapping_add(1);
        self.check(&mut conn, &place, &told).await;
        self.switch(Some(place));
        self.said.clear();
        Ok(())
    }

    fn switch(&self, place: Option<Place>) {
        let before = self.seat.head().place;
        let name = place.as_ref().map(ToString::to_string);
        if self.seat.set_head(place) {
            if before.is_some() {
                self.seat.metrics.switched();
            }
            tracing::info!(group = %self.seat.name, primary = name.as_deref().unwrap_or("none"), "the group's primary");
        }
    }

    /// Copies that follow and were heard of lately.
    fn count(&self, told: &Replication) -> usize {
        told.copies
            .iter()
            .filter(|(_, lag)| *lag <= self.seat.config.max_lag_s)
            .count()
    }

    async fn check(&mut self, conn: &mut redis::aio::MultiplexedConnection, place: &Place, told: &Replication) {
        let state = (self.seat.head().generation, told.copies.len());
        let again = !self.seat.problems().is_empty() && self.looks.is_multiple_of(CHECK_AGAIN);
        let new = self.seat.head().place.as_ref() != Some(place);
        if !new && !again && self.checked == Some(state) {
            return;
        }
        let problems = checks::of(&self.seat, conn, place, told).await;
        if problems != self.seat.problems() {
            for p in &problems {
                tracing::warn!(group = %self.seat.name, problem = p, "a Redis is set up in a way that breaks the promise");
            }
        }
        self.seat
            .set_problems(problems, self.seat.config.checks == Checks::Refuse);
        self.checked = Some(state);
    }

    /// Asks all Sentinels; the newest configuration counts, and none older than one that was seen.
    async fn by_sentinel(&mut self) -> anyhow::Result<Place> {
        let (login, name) = (&self.sentinel_login, &self.group.name);
        let asked = futures::future::join_all(self.group.sentinels.iter().map(|address| async move {
            let place = control::place(address)?;
            tokio::time::timeout(login.timeout, control::ask_sentinel(&place, login, name))
                .await
                .map_err(|_| anyhow::anyhow!("the Sentinel {address} does not answer"))?
        }))
        .await;
        let (mut best, mut trouble) = (None::<(u64, String)>, Vec::new());
        for answer in asked {
            match answer {
                Ok((epoch, addr)) if epoch >= self.epoch && best.as_ref().is_none_or(|(e, _)| epoch > *e) => {
                    best = Some((epoch, addr));
                }
                Ok(_) => {}
                Err(e) => trouble.push(format!("{e:#}")),
            }
        }
        let (epoch, addr) =
            best.ok_or_else(|| anyhow::anyhow!("no Sentinel knows its primary ({})", trouble.join("; ")))?;
        self.epoch = epoch;
        control::place(&addr)
    }

    /// Asks all servers of a plain list. A server is taken as the primary when it is one and the rest copy from it, or when it stands alone.
    async fn by_list(&self) -> anyhow::Result<Place> {
        let login = &self.seat.login;
        let asked = futures::future::join_all(self.group.servers.iter().map(|address| async move {
            let place = control::place(address)?;
            let told = tokio::time::timeout(login.timeout, async {
                control::replication(&mut control::connect(&place, login).await?).await
            })
            .await
            .map_err(|_| anyhow::anyhow!("{place} does not answer"))??;
            anyhow::Ok((place, told))
        }))
        .await;
        let now = self.seat.head().place;
        let mut primaries: Vec<(Place, usize)> = Vec::new();
        for (place, told) in asked.into_iter().flatten() {
            if told.is_primary {
                primaries.push((place, told.copies.len()));
            }
        }
        let followed = primaries.iter().map(|(_, n)| *n).max().unwrap_or(0);
        let best: Vec<&(Place, usize)> = primaries.iter().filter(|(_, n)| *n == followed).collect();
        match best.as_slice() {
            [] => match now {
                Some(place) => Ok(place),
                None => anyhow::bail!("none of its servers is reachable as a primary"),
            },
            [(place, _)] if followed >= self.seat.need => Ok(place.clone()),
            [(place, _)] if primaries.len() == 1 => Ok(place.clone()),
            _ => anyhow::bail!(
                "several of its servers are primaries ({}): make all but one copies of it with REPLICAOF",
                primaries
                    .iter()
                    .map(|(p, _)| p.to_string())
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        }
    }
}
