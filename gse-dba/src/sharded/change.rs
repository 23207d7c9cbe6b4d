//! Another primary for a group whose old one lives, as an operator wants it (`FAILOVER`): commands are held back everywhere, the new one gets all that the old one has,
//! and clients go on there. Nothing fails and nothing is in doubt. What to do when the old one is gone is `promote`'s.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::control;
use super::decide::{self, View};
use super::plain::{List, Met};
use super::record::{self, Record};
use super::seat::Seat;
use super::sentinels;
use super::tell;
use crate::config::sharded::Member;

/// For how long the old primary keeps writes to itself when it is not told anything else.
pub(super) const PAUSE_MS: u64 = 2000;
/// A copy may be so many bytes behind when clients begin to be held back.
const BEHIND: u64 = 64 << 10;
/// How long it may take to come that near.
const NEAR: Duration = Duration::from_secs(5);
/// How long it may take from there to have all.
const LEVEL: Duration = Duration::from_millis(300);
/// How long the other servers may take to follow a new primary before clients are let go on.
pub(super) const FOLLOW: Duration = Duration::from_secs(2);
/// Clients are held back so many times at most, with a rest between.
const TRIES: usize = 4;
const REST: Duration = Duration::from_millis(300);
pub(super) const TICK: Duration = Duration::from_millis(1);

/// What the time went into, for the operator.
struct Watch {
    last: Instant,
    steps: serde_json::Map<String, Value>,
}

impl Watch {
    fn start() -> Self {
        Self {
            last: Instant::now(),
            steps: serde_json::Map::new(),
        }
    }

    fn step(&mut self, name: &str) {
        let ms = self.last.elapsed().as_secs_f64() * 1000.0;
        self.last = Instant::now();
        self.steps.insert(name.to_owned(), json!((ms * 10.0).round() / 10.0));
    }
}

/// All servers of a group that answer, and which is the primary.
pub(super) struct Cast {
    pub(super) list: List,
    pub(super) met: Vec<Option<Met>>,
    pub(super) head: usize,
}

impl Cast {
    pub(super) fn name(&self, i: usize) -> &str {
        self.list.names.get(i).map_or("?", String::as_str)
    }

    pub(super) fn met(&mut self, i: usize) -> anyhow::Result<&mut Met> {
        let name = self.name(i).to_owned();
        self.met
            .get_mut(i)
            .and_then(Option::as_mut)
            .with_context(|| format!("{name} does not answer"))
    }

    /// The copies that follow the primary.
    fn copies(&self) -> Vec<usize> {
        let follows = |m: &Met| m.view.follows == decide::Follows::Listed(self.head) && m.view.whole.link_up;
        self.met
            .iter()
            .enumerate()
            .filter(|(_, m)| m.as_ref().is_some_and(follows))
            .map(|(i, _)| i)
            .collect()
    }

    async fn offset(&mut self, i: usize) -> anyhow::Result<u64> {
        Ok(record::look(&mut self.met(i)?.conn).await?.offset)
    }

    /// Makes all others copies of `target`, those that `may`; what went wrong.
    pub(super) async fn follow_all(&mut self, target: usize, may: impl Fn(&View) -> bool) -> Vec<String> {
        let (new, names) = (self.name(target).to_owned(), &self.list.names);
        let others = self.met.iter_mut().enumerate().filter(|(i, _)| *i != target);
        let all = others.filter_map(|(i, m)| m.as_mut().filter(|m| may(&m.view)).map(|m| (i, m)));
        let done = futures::future::join_all(all.map(|(i, m)| {
            let new = &new;
            async move {
                match record::follow(&mut m.conn, m.view.text.as_deref(), Some(new)).await {
                    Ok(true) => None,
                    Ok(false) => Some(format!("the record of {} has changed meanwhile", names[i])),
                    Err(e) => Some(format!("{} does not follow: {e:#}", names[i])),
                }
            }
        }));
        done.await.into_iter().flatten().collect()
    }

    /// All keep whom they follow now, where they can.
    pub(super) async fn remember_all(&mut self) {
        let all = self.met.iter_mut().flatten();
        futures::future::join_all(all.map(|m| record::remember(&mut m.conn))).await;
    }
}

pub(super) fn seen(met: &[Option<Met>]) -> Vec<(usize, View)> {
    met.iter()
        .enumerate()
        .filter_map(|(i, m)| m.as_ref().map(|m| (i, m.view.clone())))
        .collect()
}

pub(super) async fn assemble(seat: &Seat) -> anyhow::Result<Cast> {
    let group = seat.group();
    if group.sentinels.is_empty() {
        let list = List::of(&group)?;
        let met = list.meet(seat).await;
        let views: Vec<Option<View>> = met.iter().map(|m| m.as_ref().map(|m| m.view.clone())).collect();
        let plan = decide::decide(&list.rules(seat, 0), &views);
        let head = plan
            .head
            .with_context(|| format!("it is not known who is primary: {}", plan.problems.join("; ")))?;
        return Ok(Cast { list, met, head });
    }
    let primary = sentinels::primary(&group, &seat.sentinel_login()).await?.1;
    let place = tell::beside(&group.sockets, &primary).map_or_else(|| control::place(&primary), Ok)?;
    let told = control::replication(&mut control::connect(&place, &seat.login).await?).await?;
    let mut members = vec![Member { place, known: primary }];
    for (copy, _) in &told.copies {
        members.push(Member {
            place: tell::beside(&group.sockets, copy).map_or_else(|| control::place(copy), Ok)?,
            known: copy.clone(),
        });
    }
    let list = List {
        names: members.iter().map(|m| m.known.clone()).collect(),
        members,
        db: 0,
    };
    let met = list.meet(seat).await;
    Ok(Cast { list, met, head: 0 })
}

/// Takes the turn from the follower, whatever it is waiting for.
pub(super) async fn turn(seat: &Seat) -> anyhow::Result<tokio::sync::SemaphorePermit<'_>> {
    let turn = seat.turn.acquire();
    tokio::pin!(turn);
    loop {
        // It may have come between two looks of the follower's.
        seat.news.notify_one();
        tokio::select! {
            turn = &mut turn => return Ok(turn?),
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
        }
    }
}

/// Makes another server the primary while the present one lives. Clients are held back meanwhile.
pub(crate) async fn failover(seat: &Seat, to: Option<&str>) -> anyhow::Result<Value> {
    let _turn = turn(seat).await?;
    let mut cast = assemble(seat).await?;
    let from = cast.head;
    let copies = cast.copies();
    ensure!(
        !copies.is_empty(),
        "no copy follows {}: there is nobody to take over",
        cast.name(from)
    );
    ensure!(
        copies.len() >= seat.need,
        "{} copies follow {}, and a new primary needs {} besides itself: wait for the others",
        copies.len(),
        cast.name(from),
        seat.need
    );
    let target = match to {
        Some(address) => {
            let i = cast
                .list
                .find(address)
                .await
                .with_context(|| format!("{address} is no server of group '{}'", seat.name))?;
            if i == from {
                return Ok(json!({"group": seat.name, "primary": address, "changed": false}));
            }
            ensure!(
                copies.contains(&i),
                "{address} does not follow the primary {} now",
                cast.name(from)
            );
            i
        }
        None => copies
            .iter()
            .copied()
            .max_by_key(|i| cast.met.get(*i).and_then(Option::as_ref).map(|m| m.view.whole.offset))
            .context("no copy answers")?,
    };
    // Sentinels that are just doing the same, or are not all there, would not agree to it.
    let council = match seat.group().sentinels.is_empty() {
        true => None,
        false => Some(sentinels::Council::meet(&seat.group(), &seat.sentinel_login()).await?),
    };
    let (user, password) = (seat.login.user.clone(), seat.login.password.clone());
    record::introduce(&mut cast.met(from)?.conn, &user, password.as_deref()).await?;
    let until = Instant::now() + NEAR;
    loop {
        let (has, wants) = (cast.offset(target).await?, cast.offset(from).await?);
        if wants.saturating_sub(has) <= BEHIND {
            break;
        }
        ensure!(
            Instant::now() < until,
            "{} is {} bytes behind and does not come nearer: clients would wait for too long",
            cast.name(target),
            wants.saturating_sub(has)
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let answers = tell::answers(seat);
    let mut tries = 0;
    let (held, switched) = loop {
        tries += 1;
        let heard = control::news(&cast.list.members[from].place, &seat.login, &[answers.as_str()]).await?;
        let held = Instant::now();
        let mut watch = Watch::start();
        seat.gate.shut(tell::SHUT);
        match switch(seat, &mut cast, target, heard, &mut watch).await {
            Ok(switched) => break (held, (switched, watch)),
            Err(e) => {
                go_on(seat, &mut cast).await;
                if tries == TRIES {
                    return Err(e.context("nothing was changed"));
                }
                tracing::info!(group = %seat.name, error = %format!("{e:#}"), "clients were held back in vain; once more");
                tokio::time::sleep(REST).await;
            }
        }
    };
    let (mut notes, mut watch) = switched;
    // Said before it is acted on: a Sentinel that did not know would undo it.
    if let Some(council) = &council {
        let (told, trouble) = council.announce(cast.name(target)).await;
        if let Some(trouble) = trouble {
            notes.push(format!("{told} of the Sentinels know the new primary: {trouble}"));
        }
    }
    watch.step("told");
    let place = cast.list.members[target].place.clone();
    let copies = record::look(&mut cast.met(target)?.conn).await;
    seat.set_copies(copies.map_or(seat.need, |w| w.replication.copies.len()));
    if seat.set_head(Some(place)) {
        seat.metrics.switched();
    }
    seat.gate.open();
    let held = held.elapsed();
    let (new, channel) = (cast.name(target).to_owned(), tell::channel(seat));
    if let Ok(m) = cast.met(from)
        && let Err(e) = tell::say(&mut m.conn, &channel, &format!("primary {new}")).await
    {
        notes.push(format!(
            "other gse_dba could not be told and find out by themselves: {e:#}"
        ));
    }
    cast.remember_all().await;
    tracing::warn!(group = %seat.name, from = cast.name(from), to = %new, held_ms = held.as_millis(), "the primary was changed as asked for");
    seat.news.notify_one();
    Ok(json!({
        "group": seat.name,
        "changed": true,
        "from": cast.name(from),
        "primary": new,
        "held_ms": (held.as_secs_f64() * 10_000.0).round() / 10.0,
        "steps_ms": watch.steps,
        "notes": notes,
    }))
}

async fn followers(cast: &mut Cast, i: usize) -> anyhow::Result<usize> {
    Ok(record::look(&mut cast.met(i)?.conn).await?.replication.copies.len())
}

/// Lets everybody go on as before.
async fn go_on(seat: &Seat, cast: &mut Cast) {
    let channel = tell::channel(seat);
    let from = cast.head;
    if let Ok(m) = cast.met(from) {
        let _: Result<(), _> = redis::cmd("CLIENT").arg("UNPAUSE").query_async(&mut m.conn).await;
        if let Err(e) = tell::say(&mut m.conn, &channel, "on").await {
            tracing::warn!(group = %seat.name, error = %format!("{e:#}"), "other gse_dba go on when their patience ends");
        }
    }
    seat.gate.open();
}

/// Everything up to the point at which the new primary has its copies. An error means that the old one still is the primary.
async fn switch(
    seat: &Seat,
    cast: &mut Cast,
    target: usize,
    heard: redis::aio::PubSub,
    watch: &mut Watch,
) -> anyhow::Result<Vec<String>> {
    let from = cast.head;
    hold_all(seat, cast, heard).await?;
    watch.step("quiet");
    let pause = {
        let conn = &mut cast.met(from)?.conn;
        let mut pause = redis::cmd("CLIENT");
        pause.arg("PAUSE").arg(PAUSE_MS).arg("WRITE");
        pause.query_async::<()>(conn).await
    };
    pause.with_context(|| format!("{} does not hold writes back (CLIENT PAUSE)", cast.name(from)))?;
    let until = Instant::now() + LEVEL;
    loop {
        let (wants, has) = (cast.offset(from).await?, cast.offset(target).await?);
        if has >= wants {
            break;
        }
        ensure!(
            Instant::now() < until,
            "{} did not get the last {} bytes in time",
            cast.name(target),
            wants - has
        );
        tokio::time::sleep(TICK).await;
    }
    watch.step("level");
    let text = cast.met(target)?.view.text.clone();
    ensure!(
        record::follow(&mut cast.met(target)?.conn, text.as_deref(), None).await?,
        "the record of who is primary has changed meanwhile"
    );
    // From here on there is no way back.
    let mut notes = cast.follow_all(target, |_| true).await;
    watch.step("changed");
    if let Ok(m) = cast.met(from) {
        let _: Result<(), _> = redis::cmd("CLIENT").arg("UNPAUSE").query_async(&mut m.conn).await;
    }
    let until = Instant::now() + FOLLOW;
    loop {
        match followers(cast, target).await {
            Ok(n) if n >= seat.need => break,
            Ok(_) if Instant::now() < until => tokio::time::sleep(TICK).await,
            Ok(_) => {
                notes.push("its copies take long to follow it; writes wait for them".into());
                break;
            }
            Err(e) => {
                notes.push(format!("it does not say who follows it: {e:#}"));
                break;
            }
        }
    }
    watch.step("followed");
    if seat.group().sentinels.is_empty()
        && let Err(e) = write_down(seat, cast, target).await
    {
        notes.push(format!("it is written down at the next look ({e:#})"));
    }
    watch.step("written");
    Ok(notes)
}

/// Has every gse_dba in front of the group hold its commands, and waits until none is under way.
async fn hold_all(seat: &Seat, cast: &mut Cast, mut heard: redis::aio::PubSub) -> anyhow::Result<()> {
    use futures::StreamExt as _;
    let from = cast.head;
    let channel = tell::channel(seat);
    let token = format!("{:016x}", rand::random::<u64>());
    let there = tell::say(&mut cast.met(from)?.conn, &channel, &format!("hold {token}")).await?;
    let held = async {
        let mut messages = heard.on_message();
        let mut held = 0;
        while held < there {
            match messages.next().await {
                Some(m) if m.get_payload::<String>().is_ok_and(|t| t == token) => held += 1,
                Some(_) => {}
                None => return,
            }
        }
    };
    if tokio::time::timeout(tell::QUIET, held).await.is_err() || !seat.gate.quiet(tell::QUIET).await {
        bail!("commands that are under way did not come to an end in time: try again when there is less to do");
    }
    Ok(())
}

/// Writes the record of a new primary.
pub(super) async fn write_down(seat: &Seat, cast: &mut Cast, target: usize) -> anyhow::Result<u64> {
    let newest = seen(&cast.met)
        .into_iter()
        .filter_map(|(_, v)| v.record)
        .max_by_key(|r| r.epoch);
    let name = cast.name(target).to_owned();
    let m = cast.met(target)?;
    let whole = record::look(&mut m.conn).await?;
    let new = match &newest {
        Some(r) => r.next(r.epoch, &name, &whole.history),
        None => Record::first(&seat.name, &name, &whole.history),
    };
    let copies = seat.need.min(whole.replication.copies.len());
    let text = m.view.text.clone();
    if copies < seat.need {
        // It takes no writes without its copies, and this one is not a client's.
        let least = control::settings(&mut m.conn, &["min-replicas-to-write"]).await?;
        let least = least.get("min-replicas-to-write").cloned().unwrap_or_default();
        set_least(m, "0").await?;
        let written = record::write(&mut m.conn, text.as_deref(), &new, copies).await;
        set_least(m, &least).await?;
        ensure!(written?, "the record has changed meanwhile");
    } else {
        ensure!(
            record::write(&mut m.conn, text.as_deref(), &new, copies).await?,
            "the record has changed meanwhile"
        );
    }
    Ok(new.epoch)
}

async fn set_least(m: &mut Met, n: &str) -> anyhow::Result<()> {
    Ok(redis::cmd("CONFIG")
        .arg("SET")
        .arg("min-replicas-to-write")
        .arg(n)
        .query_async(&mut m.conn)
        .await?)
}
