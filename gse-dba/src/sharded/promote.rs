//! Another primary for a plain list that has lost its own (`PROMOTE`). Before anything is chosen it is made sure that nothing can be acknowledged any more: then enough
//! of the copies have, among them, everything that ever was.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::change::{Cast, FOLLOW, PAUSE_MS, TICK, seen, turn, write_down};
use super::decide::{self, View};
use super::plain::{List, Met};
use super::record;
use super::seat::Seat;

/// Makes a copy the primary of a group that has lost its own.
pub(crate) async fn promote(seat: &Seat, to: Option<&str>, force: bool) -> anyhow::Result<Value> {
    let group = seat.group();
    ensure!(
        group.sentinels.is_empty(),
        "group '{}' is under Sentinel, which promotes by itself; DBA FAILOVER {} changes the primary as planned",
        seat.name,
        seat.name
    );
    let _turn = turn(seat).await?;
    let list = List::of(&group)?;
    let wanted = match to {
        Some(address) => Some(
            list.find(address)
                .await
                .with_context(|| format!("{address} is no server of group '{}'", seat.name))?,
        ),
        None => None,
    };
    let mut met = list.meet(seat).await;
    let enough = list.names.len() + 1 - seat.config.acknowledged.min(list.names.len());
    let views: Vec<Option<View>> = met.iter().map(|m| m.as_ref().map(|m| m.view.clone())).collect();
    let before = decide::decide(&list.rules(seat, 0), &views);
    if let Some(i) = before.head.filter(|i| views[*i].as_ref().is_some_and(View::is_primary)) {
        if wanted == Some(i) {
            return Ok(json!({"group": seat.name, "primary": list.names[i], "changed": false}));
        }
        ensure!(
            force,
            "its primary {} answers: DBA FAILOVER {} changes it without loss (FORCE takes it from it)",
            list.names[i],
            seat.name
        );
    }
    let target = choose(seat, &list, &met, wanted, force, enough)?;
    // No server that could confirm a write to the old primary follows it any more after this: what is on a majority now is all there will be.
    for (i, m) in met.iter_mut().enumerate() {
        let Some(m) = m else { continue };
        if m.view.is_primary() {
            let _: Result<(), _> = redis::cmd("CLIENT")
                .arg("PAUSE")
                .arg(PAUSE_MS)
                .arg("WRITE")
                .query_async(&mut m.conn)
                .await;
        } else {
            let own = list.names[i].clone();
            record::introduce(&mut m.conn, &seat.login.user, seat.login.password.as_deref()).await?;
            record::follow(&mut m.conn, m.view.text.clone().as_deref(), Some(&own)).await?;
        }
    }
    let again = list.meet(seat).await;
    ensure!(
        force || again.iter().flatten().count() >= met.iter().flatten().count(),
        "a server was lost meanwhile: try again"
    );
    met = again;
    let target = choose(seat, &list, &met, wanted.or(Some(target)), force, enough)?;
    let mut cast = Cast {
        list,
        met,
        head: target,
    };
    let text = cast.met(target)?.view.text.clone();
    ensure!(
        record::follow(&mut cast.met(target)?.conn, text.as_deref(), None).await?,
        "the record of who is primary has changed meanwhile: try again"
    );
    let new = cast.name(target).to_owned();
    // A primary is taken over only at an operator's word, and one without our record not even then.
    let own = |v: &View| !v.is_primary() || v.record.is_some() || v.whole.empty;
    let mut notes = cast.follow_all(target, own).await;
    for (i, v) in seen(&cast.met).iter().filter(|(i, v)| *i != target && !own(v)) {
        notes.push(format!(
            "{} has data of its own and was left alone ({} in its history): empty it with FLUSHALL, and it becomes a copy",
            cast.name(*i),
            v.whole.offset
        ));
    }
    let until = Instant::now() + FOLLOW;
    while record::look(&mut cast.met(target)?.conn)
        .await?
        .replication
        .copies
        .len()
        < seat.need
    {
        if Instant::now() >= until {
            notes.push(format!("writes wait until {} other copies follow", seat.need));
            break;
        }
        tokio::time::sleep(TICK).await;
    }
    let epoch = write_down(seat, &mut cast, target).await?;
    cast.remember_all().await;
    seat.set_copies(
        record::look(&mut cast.met(target)?.conn)
            .await?
            .replication
            .copies
            .len(),
    );
    if seat.set_head(Some(cast.list.members[target].place.clone())) {
        seat.metrics.switched();
    }
    seat.gate.open();
    seat.news.notify_one();
    tracing::warn!(group = %seat.name, primary = %new, epoch, force, "promoted as asked for");
    Ok(json!({"group": seat.name, "primary": new, "changed": true, "epoch": epoch, "notes": notes}))
}

/// Which server it is to be; an error when that could lose what was acknowledged.
fn choose(
    seat: &Seat,
    list: &List,
    met: &[Option<Met>],
    wanted: Option<usize>,
    force: bool,
    enough: usize,
) -> anyhow::Result<usize> {
    let seen = seen(met);
    let views: Vec<(usize, &View)> = seen.iter().map(|(i, v)| (*i, v)).collect();
    if let Some(i) = wanted.filter(|_| force) {
        ensure!(views.iter().any(|(s, _)| *s == i), "{} does not answer", list.names[i]);
        return Ok(i);
    }
    ensure!(
        force || seen.len() >= enough,
        "{} of its {} servers answer; one of the others may alone have what was acknowledged, so {enough} must answer (DBA PROMOTE {} <address> FORCE does without)",
        seen.len(),
        list.names.len(),
        seat.name
    );
    let rules = list.rules(seat, 0);
    let best = decide::furthest(&rules, &views).map_err(anyhow::Error::msg)?;
    let Some(i) = wanted else { return Ok(best) };
    let rank = |of: usize| views.iter().find(|(s, _)| *s == of).map(|(_, v)| v.rank());
    ensure!(rank(i).is_some(), "{} does not answer", list.names[i]);
    ensure!(
        rank(i) >= rank(best),
        "{} is not the furthest ahead: {} has more (promote that one, or say FORCE and lose what only it has)",
        list.names[i],
        list.names[best]
    );
    Ok(i)
}
