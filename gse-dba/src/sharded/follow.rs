//! Follows one group: who its primary is by Sentinel's word (or, for a plain list, by what the servers say of themselves), how many copies follow
//! that primary, and whether they are set up as the promise needs it. It looks every `poll_ms`, when a Sentinel announces a switch, when a
//! connection was lost, and all the time while writes are held back.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use gse_core::lifecycle::Lifecycle;

use super::checks;
use super::control::{self, Login, Replication};
use super::early;
use super::plain::{self, List};
use super::seat::Seat;
use super::tell;
use crate::config::sharded::{Checks, Group, Member};
use crate::single::dial::Place;

/// Looks are at least this far apart, however often a look is asked for.
const BREATH: Duration = Duration::from_millis(50);
/// Set-ups are looked at again this often while they are wrong.
const CHECK_AGAIN: u32 = 20;

struct Follower {
    seat: Arc<Seat>,
    group: Group,
    sentinel_login: Login,
    /// When no Sentinel watches it.
    list: Option<List>,
    /// Servers beside us that are spoken to over their sockets.
    sockets: Vec<Member>,
    /// The newest configuration that was seen, of Sentinel's or by the record; an older one is not gone back to.
    epoch: u64,
    /// Servers that were set up well when they were looked at.
    fine: HashSet<String>,
    /// The generation whose set-up was checked.
    checked: Option<(u64, usize)>,
    looks: u32,
    said: String,
}

/// Starts following a group.
pub(crate) fn start(seat: &Arc<Seat>, group: &Group, life: &Lifecycle) {
    let login = seat.sentinel_login();
    // The configuration was looked at before: what can't be read is not there.
    let list = group.sentinels.is_empty().then(|| List::of(group).ok()).flatten();
    let sockets: Vec<Member> = group.sockets.iter().filter_map(|s| Member::read(s).ok()).collect();
    seat.set_group(group.clone());
    let (told, closing) = (Arc::clone(seat), life.clone());
    life.spawn_until_closed("dba-told", async move {
        tokio::select! {
            () = tell::listen(&told) => {}
            () = closing.closing() => {}
        }
    });
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
        list,
        sockets,
        epoch: 0,
        fine: HashSet::new(),
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
        match control::news(&place, login, &control::NEWS).await {
            Ok(mut news) => {
                let mut messages = news.on_message();
                while let Some(message) = messages.next().await {
                    if message.get_channel_name() == early::CHOSEN
                        && let Ok(payload) = message.get_payload::<String>()
                        && let Some(copy) = early::chosen(&payload, &seat.name)
                    {
                        seat.set_chosen(Some(copy));
                    }
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
                looked = self.take_turn() => looked,
                // It may be waiting for the old primary, which does not answer any more.
                () = seat.news.notified() => continue,
            };
            if let Err(e) = looked {
                self.say(format!("{e:#}"));
            }
            self.seat.set_looked();
            let poll = if self.seat.is_patient() {
                // Clients wait for what this finds.
                BREATH
            } else {
                Duration::from_millis(self.seat.config.poll_ms)
            };
            tokio::time::sleep(BREATH).await;
            tokio::select! {
                () = tokio::time::sleep(poll.saturating_sub(BREATH)) => {}
                () = self.seat.nudge.notified() => {}
                () = self.seat.news.notified() => {}
            }
        }
    }

    /// Looks, unless an operator's command is changing the primary just now: then after it.
    async fn take_turn(&mut self) -> anyhow::Result<()> {
        let seat = Arc::clone(&self.seat);
        let _turn = seat.turn.acquire().await?;
        self.look().await
    }

    /// Logs a trouble once, not at every look.
    fn say(&mut self, trouble: String) {
        if trouble != self.said {
            tracing::warn!(group = %self.seat.name, trouble, "the group could not be looked at");
            self.said = trouble;
        }
    }

    async fn look(&mut self) -> anyhow::Result<()> {
        let mut strangers = Vec::new();
        let (place, mut conn) = match &self.list {
            Some(list) => match plain::look(list, &self.seat, self.epoch).await {
                Ok(looked) => {
                    self.epoch = self.epoch.max(looked.epoch);
                    self.seat
                        .set_troubles([looked.problems, looked.strangers.clone()].concat());
                    strangers = looked.strangers;
                    (looked.place, looked.conn)
                }
                Err((why, keep)) => {
                    if !keep {
                        self.switch(None);
                    }
                    self.seat.set_copies(0);
                    let text = why.join("; ");
                    self.seat.set_troubles(why);
                    anyhow::bail!(text);
                }
            },
            None => {
                let before = self.epoch;
                let place = self.by_sentinel().await?;
                if self.epoch > before {
                    // They agree: what one of them had chosen is in it.
                    self.seat.set_chosen(None);
                }
                let early = match self.seat.chosen(early::FRESH) {
                    Some(copy) => early::promoted(&self.seat, &copy).await,
                    None => None,
                };
                match early {
                    Some(found) => found,
                    None => match control::connect(&place, &self.seat.login).await {
                        Ok(conn) => (place, conn),
                        Err(e) => {
                            // Not reachable does not make it another: connections that stand go on, and writes are refused once it is known that nobody confirms them.
                            if self.seat.head().place.as_ref() != Some(&place) {
                                self.switch(None);
                            }
                            self.seat.set_copies(0);
                            return Err(e);
                        }
                    },
                }
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
        self.seat.set_lags(told.lags.clone());
        self.seat.metrics.group_copies(&self.seat.name, copies);
        self.looks = self.looks.wrapping_add(1);
        if self.fine.contains(&place.to_string()) {
            // What it was when it was a copy it still is: clients do not wait while everything is looked at again.
            self.switch(Some(place.clone()));
        }
        if self.list.is_none() && (self.looks == 1 || self.looks.is_multiple_of(CHECK_AGAIN)) {
            strangers = checks::strangers(&self.seat, &tell::known(&self.seat, &place)).await;
            self.seat.set_troubles(strangers.clone());
        }
        // They keep it from starting; later it is a fail-over, which takes its time.
        strangers.retain(|_| self.looks == 1);
        self.check(&mut conn, &place, &told, strangers).await;
        self.switch(Some(place));
        if self.seat.troubles().is_empty() {
            self.said.clear();
        } else {
            self.say(self.seat.troubles().join("; "));
        }
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

    async fn check(
        &mut self,
        conn: &mut redis::aio::MultiplexedConnection,
        place: &Place,
        told: &Replication,
        strangers: Vec<String>,
    ) {
        let state = (self.seat.head().generation, told.copies.len());
        let again = !self.seat.problems().is_empty() && self.looks.is_multiple_of(CHECK_AGAIN);
        let new = self.seat.head().place.as_ref() != Some(place);
        if !new && !again && self.checked == Some(state) {
            return;
        }
        let mut problems = checks::of(&self.seat, conn, place, told).await;
        problems.extend(strangers);
        if problems != self.seat.problems() {
            for p in &problems {
                tracing::warn!(group = %self.seat.name, problem = p, "a Redis is set up in a way that breaks the promise");
            }
        }
        self.seat
            .set_problems(problems, self.seat.config.checks == Checks::Refuse);
        if self.seat.problems().is_empty() {
            self.fine = told.copies.iter().map(|(a, _)| a.clone()).collect();
            self.fine.insert(place.to_string());
        } else {
            self.fine.clear();
        }
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
        let beside = self.sockets.iter().find(|m| m.known == addr).map(|m| m.place.clone());
        beside.map_or_else(|| control::place(&addr), Ok)
    }
}
