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
use tokio::time::Instant;

/// Looks are at least this far apart, however often a look is asked for.
const BREATH: Duration = Duration::from_millis(50);
/// Set-ups are looked at again this often while they are wrong.
const CHECK_AGAIN: u32 = 20;

/// A fail-over that a Sentinel has begun and of which nothing more is heard is over by then.
const FORGOTTEN: Duration = Duration::from_secs(10);

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
    /// For how long the word of the Sentinels holds: they are asked several times as often.
    span: Duration,
    /// When the Sentinel that changes that configuration was heard last, and to which primary it changes it.
    promoted: Option<(Instant, String)>,
    /// When most Sentinels were asked, and whether they have nothing against the primary.
    verdict: Option<(Instant, bool)>,
    /// When a Sentinel was heard to doubt the primary.
    doubted: Option<Instant>,
    said: String,
}

/// Starts following a group.
pub(crate) fn start(seat: &Arc<Seat>, group: &Group, life: &Lifecycle) {
    let login = seat.sentinel_login();
    // The configuration was looked at before: what can't be read is not there.
    let list = group.sentinels.is_empty().then(|| List::of(group).ok()).flatten();
    let sockets: Vec<Member> = group.sockets.iter().filter_map(|s| Member::read(s).ok()).collect();
    seat.set_group(group.clone());
    if !group.sentinels.is_empty() {
        seat.trust.begin();
    }
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
        span: Duration::MAX,
        promoted: None,
        verdict: None,
        doubted: None,
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
                    // A look takes its time, and is begun again with every announcement: what can wait is not waited for here.
                    if control::ALARMS.contains(&message.get_channel_name())
                        && let Ok(payload) = message.get_payload::<String>()
                    {
                        seat.alarm(&payload);
                    }
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
                Duration::from_millis(self.seat.config.poll_ms).min(self.span / 4)
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
                let head = self.seat.head().place;
                // It was followed already to the one that a Sentinel has chosen: the doubts are of the one before.
                let gone_over = head != Some(place.clone())
                    && head.is_some_and(|h| self.seat.chosen(early::FRESH).is_some_and(|c| c == h.to_string()));
                if let Some((asked, fine)) = self.verdict
                    && !gone_over
                {
                    let same = self.seat.head().place.as_ref() == Some(&place);
                    if !fine || same {
                        self.seat.heard(asked, fine, self.span);
                    }
                }
                if self.epoch > before {
                    // They agree: what one of them had chosen is in it.
                    self.seat.set_chosen(None);
                }
                let early = match self.seat.chosen(early::FRESH) {
                    Some(copy) => early::promoted(&self.seat, &copy).await,
                    None => None,
                };
                match early {
                    Some(found) => {
                        // It is what the Sentinels are coming to, and its copies follow it.
                        if let Some((_, fine)) = &mut self.verdict {
                            *fine = true;
                        }
                        found
                    }
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
        let now = control::identity(&mut conn).await?;
        if self.seat.need > 0
            && let Err(why) = self.seat.returned.see(&place, now)
        {
            self.seat.set_copies(0);
            anyhow::bail!(why);
        }
        let copies = self.count(&told);
        self.seat.set_copies(copies);
        self.seat.set_lags(told.lags.clone());
        self.seat.metrics.group_copies(&self.seat.name, copies);
        self.looks = self.looks.wrapping_add(1);
        if self.fine.contains(&place.to_string()) {
            // What it was when it was a copy it still is: clients do not wait while everything is looked at again.
            self.switch(Some(place.clone()));
            if let Some((asked, true)) = self.verdict {
                self.seat.heard(asked, true, self.span);
            }
        }
        if self.list.is_none() && (self.looks == 1 || self.looks.is_multiple_of(CHECK_AGAIN)) {
            strangers = checks::strangers(&self.seat, &tell::known(&self.seat, &place)).await;
            self.seat.set_troubles(strangers.clone());
        }
        // They keep it from starting; later it is a fail-over, which takes its time.
        strangers.retain(|_| self.looks == 1);
        self.check(&mut conn, &place, &told, strangers).await;
        self.switch(Some(place));
        if let Some((asked, true)) = self.verdict {
            self.seat.heard(asked, true, self.span);
        }
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
        self.verdict = None;
        let (login, name, began) = (&self.sentinel_login, &self.group.name, Instant::now());
        let asked = futures::future::join_all(self.group.sentinels.iter().map(|address| async move {
            let place = control::place(address)?;
            tokio::time::timeout(login.timeout, control::hear_sentinel(&place, login, name))
                .await
                .map_err(|_| anyhow::anyhow!("the Sentinel {address} does not answer"))?
        }))
        .await;
        let (mut told, mut trouble) = (Vec::new(), Vec::new());
        for answer in asked {
            match answer {
                Ok(heard) => told.push(heard),
                Err(e) => trouble.push(format!("{e:#}")),
            }
        }
        let promoted = self.promoted.as_ref().filter(|(at, _)| at.elapsed() < FORGOTTEN);
        // The newest configuration, and of one that is being changed what it is changed to; nothing older than what was seen. It is numbered as the new one
        // while it is being changed, and keeps that number afterwards.
        let best = told
            .iter()
            .filter(|t| t.epoch >= self.epoch)
            .filter(|t| t.epoch > self.epoch || t.promoted || promoted.is_none_or(|(_, address)| *address == t.address))
            .max_by_key(|t| (t.epoch, t.promoted))
            .ok_or_else(|| anyhow::anyhow!("no Sentinel knows its primary ({})", trouble.join("; ")))?;
        if (best.epoch, best.promoted) > (self.epoch, promoted.is_some()) {
            self.doubted = None;
        }
        self.epoch = best.epoch;
        self.promoted = best.promoted.then(|| (began, best.address.clone()));
        // Who has begun to replace a primary is one Sentinel, and the others forget their doubts when the primary is back: so may we, but not before all have.
        let doubts = told.iter().any(|t| {
            t.doubts && t.address == best.address
                || !best.promoted && t.epoch >= best.epoch && t.address != best.address
        });
        if self.seat.take_alarm() || doubts {
            self.doubted = Some(began);
        } else if trouble.is_empty() || self.doubted.is_some_and(|d| d.elapsed() > FORGOTTEN) {
            self.doubted = None;
        }
        self.verdict = None;
        if told.len() > self.group.sentinels.len() / 2 {
            self.span = told.iter().map(|t| t.patience).min().unwrap_or(Duration::MAX);
            self.verdict = Some((began, self.doubted.is_none()));
        }
        let addr = best.address.clone();
        let beside = self.sockets.iter().find(|m| m.known == addr).map(|m| m.place.clone());
        beside.map_or_else(|| control::place(&addr), Ok)
    }
}
