//! What changes something: a plan, a question, the command, and waiting for its end.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use anyhow::bail;
use gse_core::config::mask_url;
use serde_json::Value;

use super::link::{Link, Trouble};
use super::{print, show};
use crate::args::{
    DbaAbortArgs, DbaAcceptArgs, DbaAddArgs, DbaChange, DbaFailoverArgs, DbaGroupArgs, DbaMigrateArgs, DbaMoveArgs,
    DbaPromoteArgs, DbaWork,
};
use crate::out;
use crate::outcome::{EXIT_OK, EXIT_SOME_FAILED};

/// How often work that goes on is looked at.
const LOOK: Duration = Duration::from_millis(300);
/// Looks that may fail in a row: gse_dba may be in the middle of a fail-over.
const PATIENCE: u32 = 100;
const SLOTS: u16 = 16_384;

/// Shows the plan, and asks unless told not to.
fn agree(change: &DbaChange, plan: &str) -> anyhow::Result<bool> {
    out::note(plan.trim_end());
    if change.yes {
        return Ok(true);
    }
    if !std::io::stdin().is_terminal() {
        bail!("nobody can be asked whether to go on: say --yes");
    }
    let mut err = std::io::stderr().lock();
    // Without a place to ask there is nobody who could answer, and the answer is no.
    let _ = write!(err, "Go on? [y/N] ").and_then(|()| err.flush());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    let yes = matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes");
    if !yes {
        out::note("gse: nothing was changed");
    }
    Ok(yes)
}

/// Slots as they are written, sorted out.
fn parse_slots(text: &str) -> anyhow::Result<Vec<u16>> {
    let mut all = Vec::new();
    for part in text.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let number = |n: &str| n.trim().parse::<u16>().ok().filter(|n| *n < SLOTS);
        match (number(from), number(to)) {
            (Some(from), Some(to)) if from <= to => all.extend(from..=to),
            _ => bail!("{part:?} is no slot or range of slots from 0 to 16383"),
        }
    }
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

fn groups(slots: &Value) -> impl Iterator<Item = (&str, Vec<u16>)> {
    slots["groups"].as_array().into_iter().flatten().map(|g| {
        let ranges = g["ranges"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let all = ranges.filter_map(|r| parse_slots(r).ok()).flatten().collect();
        (g["name"].as_str().unwrap_or_default(), all)
    })
}

/// How many slots a group serves; none when there is no such group.
fn count(slots: &Value, group: &str) -> Option<usize> {
    groups(slots).find(|(name, _)| *name == group).map(|(_, all)| all.len())
}

/// Refuses a group that is not there, with the names of those that are.
fn known(slots: &Value, group: &str) -> Result<usize, Trouble> {
    count(slots, group).ok_or_else(|| {
        let names: Vec<&str> = groups(slots).map(|(name, _)| name).collect();
        Trouble::Refused(format!("there is no group {group}: there are {}", names.join(", ")))
    })
}

const GOES_ON: &str = "Clients go on meanwhile. gse dba moves shows how far it is, gse dba abort takes it back.\n";

/// `gse dba move`.
pub(super) async fn shift(a: &DbaMoveArgs) -> anyhow::Result<u8> {
    let wanted = parse_slots(&a.slots)?;
    let mut link = Link::open(&a.work.change.place).await?;
    let slots = link.ask(&["SLOTS"]).await?;
    known(&slots, &a.to)?;
    let mut plan = format!("Move {} slots ({}) to group {}:\n", wanted.len(), a.slots, a.to);
    for (name, all) in groups(&slots) {
        let n = all.iter().filter(|s| wanted.binary_search(s).is_ok()).count();
        if n > 0 && name == a.to {
            plan += &format!("  {n} are there already\n");
        } else if n > 0 {
            plan += &format!("  {n} from {name}\n");
        }
    }
    if !agree(&a.work.change, &(plan + GOES_ON))? {
        return Ok(EXIT_SOME_FAILED);
    }
    let answer = link.ask(&["MOVE", &a.slots, "TO", &a.to]).await?;
    let there = |slots: &Value| {
        groups(slots)
            .find(|(name, _)| *name == a.to)
            .is_some_and(|(_, all)| wanted.iter().all(|s| all.binary_search(s).is_ok()))
    };
    finish(&mut link, &a.work, &answer, there).await
}

/// `gse dba add`.
pub(super) async fn add(a: &DbaAddArgs) -> anyhow::Result<u8> {
    let mut link = Link::open(&a.work.change.place).await?;
    let slots = link.ask(&["SLOTS"]).await?;
    if count(&slots, &a.group).is_some() {
        return Err(Trouble::Refused(format!("there is a group {} already", a.group)).into());
    }
    let (kind, who) = if a.servers.is_empty() {
        ("SENTINELS", a.sentinels.join(","))
    } else {
        ("SERVERS", a.servers.join(","))
    };
    let mut plan = format!(
        "Add group {} ({} {who}). It must be empty.\n",
        a.group,
        kind.to_ascii_lowercase()
    );
    if a.share {
        let n = groups(&slots).count() + 1;
        plan += &format!(
            "Move about {} slots to it, from the groups that have most.\n{GOES_ON}",
            usize::from(SLOTS) / n
        );
    } else {
        plan += "It serves no slots until gse dba move gives it some.\n";
    }
    if !agree(&a.work.change, &plan)? {
        return Ok(EXIT_SOME_FAILED);
    }
    let mut words = vec!["ADD", &a.group, kind, &who];
    if a.share {
        words.push("SHARE");
    }
    let answer = link.ask(&words).await?;
    let there = |slots: &Value| count(slots, &a.group).is_some_and(|n| n > 0 || !a.share);
    finish(&mut link, &a.work, &answer, there).await
}

/// `gse dba drain`.
pub(super) async fn drain(a: &DbaGroupArgs) -> anyhow::Result<u8> {
    let mut link = Link::open(&a.work.change.place).await?;
    let slots = link.ask(&["SLOTS"]).await?;
    let n = known(&slots, &a.group)?;
    let others = groups(&slots).count() - 1;
    let plan = format!(
        "Move all {n} slots of group {} to the {others} other group{}. After that it serves nothing, and its servers can be taken away.\n{GOES_ON}",
        a.group,
        if others == 1 { "" } else { "s" }
    );
    if !agree(&a.work.change, &plan)? {
        return Ok(EXIT_SOME_FAILED);
    }
    let answer = link.ask(&["DRAIN", &a.group]).await?;
    finish(&mut link, &a.work, &answer, |slots| {
        count(slots, &a.group).unwrap_or(0) == 0
    })
    .await
}

/// Waits until a move is over, and looks whether it came to what was asked for.
async fn finish(link: &mut Link, work: &DbaWork, answer: &Value, there: impl Fn(&Value) -> bool) -> anyhow::Result<u8> {
    let place = &work.change.place;
    let job = answer["job"].as_u64();
    if work.no_wait || job.is_none() {
        print(place, answer, |v| match job {
            Some(job) => format!("job {job} has begun; gse dba moves shows how far it is\n"),
            None => format!("done; the topology is at epoch {}\n", show::word(&v["epoch"])),
        })?;
        return Ok(EXIT_OK);
    }
    let (mut said, mut failed) = (String::new(), 0);
    loop {
        let moves = match link.ask(&["MOVES"]).await {
            Ok(moves) => moves,
            Err(trouble) => {
                failed += 1;
                if failed > PATIENCE {
                    out::note("gse: the move goes on without this command; gse dba moves shows how far it is");
                    return Err(trouble.into());
                }
                if matches!(trouble, Trouble::Unreachable(_))
                    && let Ok(again) = Link::open(place).await
                {
                    *link = again;
                }
                tokio::time::sleep(LOOK).await;
                continue;
            }
        };
        failed = 0;
        let legs = moves["legs"].as_array().map(Vec::as_slice).unwrap_or_default();
        let Some(leg) = legs.iter().find(|leg| leg["job"].as_u64() == job) else {
            break;
        };
        let now = show::progress(leg);
        if now != said {
            out::note(&now);
            said = now;
        }
        tokio::time::sleep(LOOK).await;
    }
    let slots = link.ask(&["SLOTS"]).await?;
    if there(&slots) {
        print(place, &slots, show::slots)?;
        Ok(EXIT_OK)
    } else {
        Err(Trouble::Refused(
            "it was aborted before its end: the slots are not where they were to go; see gse dba slots".into(),
        )
        .into())
    }
}

/// `gse dba abort`.
pub(super) async fn abort(a: &DbaAbortArgs) -> anyhow::Result<u8> {
    let mut link = Link::open(&a.change.place).await?;
    let moves = link.ask(&["MOVES"]).await?;
    let what = show::moves(&moves);
    let plan = format!(
        "Take back {}:\n{what}",
        a.job.map_or("all moves".to_owned(), |job| format!("job {job}"))
    );
    if !agree(&a.change, &plan)? {
        return Ok(EXIT_SOME_FAILED);
    }
    let job = a.job.map(|job| job.to_string());
    let mut words = vec!["ABORT"];
    words.extend(job.as_deref());
    let answer = link.ask(&words).await?;
    print(&a.change.place, &answer, show::moves)?;
    Ok(EXIT_OK)
}

/// What `STATUS` says of a group.
async fn group(link: &mut Link, name: &str) -> anyhow::Result<Value> {
    let status = link.ask(&["STATUS"]).await?;
    let all = status["groups"].as_array().map(Vec::as_slice).unwrap_or_default();
    match all.iter().find(|g| g["name"] == name) {
        Some(group) => Ok(group.clone()),
        None if all.is_empty() => Err(Trouble::Refused(format!(
            "there are no groups: it is in {} mode",
            show::word(&status["mode"])
        ))
        .into()),
        None => {
            let names: Vec<String> = all.iter().map(|g| show::word(&g["name"])).collect();
            Err(Trouble::Refused(format!("there is no group {name}: there are {}", names.join(", "))).into())
        }
    }
}

fn copies(group: &Value) -> String {
    let all = group["followers"].as_array().map(Vec::as_slice).unwrap_or_default();
    if all.is_empty() {
        return "  no copies follow it\n".to_owned();
    }
    all.iter()
        .map(|f| {
            format!(
                "  copy {}: {} behind, heard of {} s ago\n",
                show::word(&f["address"]),
                show::bytes(f["behind_bytes"].as_u64().unwrap_or_default()),
                show::word(&f["lag_s"])
            )
        })
        .collect()
}

/// `gse dba promote`.
pub(super) async fn promote(a: &DbaPromoteArgs) -> anyhow::Result<u8> {
    let mut link = Link::open(&a.change.place).await?;
    let g = group(&mut link, &a.group).await?;
    let mut plan = format!(
        "Make {} the primary of group {}. Its primary now: {}\n{}",
        a.address.as_deref().unwrap_or("the copy that is furthest ahead"),
        a.group,
        show::word(&g["primary"]),
        copies(&g)
    );
    if a.force {
        plan += "--force: acknowledged writes that only other servers have will be lost.\n";
    }
    if !agree(&a.change, &plan)? {
        return Ok(EXIT_SOME_FAILED);
    }
    let mut words = vec!["PROMOTE", a.group.as_str()];
    words.extend(a.address.as_deref());
    if a.force {
        words.push("FORCE");
    }
    let answer = link.ask(&words).await?;
    print(&a.change.place, &answer, show::primary)?;
    Ok(EXIT_OK)
}

/// `gse dba accept`.
pub(super) async fn accept(a: &DbaAcceptArgs) -> anyhow::Result<u8> {
    let mut link = Link::open(&a.change.place).await?;
    let g = group(&mut link, &a.group).await?;
    let plan = format!(
        "Serve group {} with {} as it is now. Acknowledged writes that it lacks are lost for good; if a copy still has them, make that one the primary instead (gse dba promote).\n{}",
        a.group,
        show::word(&g["primary"]),
        copies(&g)
    );
    if !agree(&a.change, &plan)? {
        return Ok(EXIT_SOME_FAILED);
    }
    let answer = link.ask(&["ACCEPT", &a.group]).await?;
    if answer["accepted"].as_bool() == Some(false) {
        return Err(Trouble::Refused(format!("group {} lacks nothing that it is known to have had", a.group)).into());
    }
    print(&a.change.place, &answer, |_| {
        format!("group {} is served as it is\n", a.group)
    })?;
    Ok(EXIT_OK)
}

/// `gse dba failover`.
pub(super) async fn failover(a: &DbaFailoverArgs) -> anyhow::Result<u8> {
    let mut link = Link::open(&a.change.place).await?;
    let g = group(&mut link, &a.group).await?;
    let plan = format!(
        "Hand group {} over from {} to {}. Commands wait for a moment; nothing is lost.\n{}",
        a.group,
        show::word(&g["primary"]),
        a.to.as_deref().unwrap_or("one of its copies"),
        copies(&g)
    );
    if !agree(&a.change, &plan)? {
        return Ok(EXIT_SOME_FAILED);
    }
    let mut words = vec!["FAILOVER", a.group.as_str()];
    if let Some(to) = &a.to {
        words.extend(["TO", to]);
    }
    let answer = link.ask(&words).await?;
    print(&a.change.place, &answer, show::primary)?;
    Ok(EXIT_OK)
}

/// `gse dba migrate`.
pub(super) async fn migrate(a: &DbaMigrateArgs) -> anyhow::Result<u8> {
    let change = &a.work.change;
    let mut link = Link::open(&change.place).await?;
    if let [bytes, keys] = a.rate.as_slice() {
        link.ask(&["MIGRATE", "RATE", &bytes.to_string(), &keys.to_string()])
            .await?;
    }
    if a.status || !a.rate.is_empty() {
        let answer = link.ask(&["MIGRATE", "STATUS"]).await?;
        print(&change.place, &answer, show::migration)?;
        return Ok(outcome(&answer));
    }
    let status = link.ask(&["STATUS"]).await?;
    let now = format!(
        "Promise now: {} ({}).\n",
        show::word(&status["durability"]),
        show::word(&status["mode"])
    );
    let (plan, words): (String, Vec<&str>) = match &a.to {
        _ if a.abort => (
            format!("Stop copying to the other store; what is served from stays. {now}"),
            vec!["ABORT"],
        ),
        Some(url) => {
            let mut plan = format!(
                "Copy everything to {}, verify it, and serve from there. Clients go on meanwhile. {now}The store that is left keeps its data; gse dba migrate --back goes back.\n",
                mask_url(url)
            );
            let mut words = vec!["TO", url.as_str()];
            if a.replace {
                plan += "--replace: what is there already is deleted.\n";
                words.push("REPLACE");
            }
            (plan, words)
        }
        None => (
            format!("Bring the store that was left up to date, verify it, and serve from it again. {now}"),
            vec!["BACK"],
        ),
    };
    if !agree(change, &plan)? {
        return Ok(EXIT_SOME_FAILED);
    }
    let mut all = vec!["MIGRATE"];
    all.extend(words);
    let mut answer = link.ask(&all).await?;
    let (mut said, mut failed) = (String::new(), 0);
    while !a.work.no_wait && !a.abort && is_going_on(&answer) {
        tokio::time::sleep(LOOK).await;
        match link.ask(&["MIGRATE", "STATUS"]).await {
            Ok(next) => (answer, failed) = (next, 0),
            Err(trouble) => {
                failed += 1;
                if failed > PATIENCE {
                    out::note("gse: it goes on without this command; gse dba migrate --status shows how far it is");
                    return Err(trouble.into());
                }
                if let Ok(again) = Link::open(&change.place).await {
                    link = again;
                }
                continue;
            }
        }
        let line = show::migration_line(&answer);
        if line != said {
            out::note(&line);
            said = line;
        }
    }
    print(&change.place, &answer, show::migration)?;
    Ok(if a.abort { EXIT_OK } else { outcome(&answer) })
}

/// The exit status that a migration's phase means.
fn outcome(answer: &Value) -> u8 {
    match answer["phase"].as_str() {
        Some("failed" | "aborted") => EXIT_SOME_FAILED,
        _ => EXIT_OK,
    }
}

fn is_going_on(answer: &Value) -> bool {
    matches!(
        answer["phase"].as_str(),
        Some("checking" | "copying" | "verifying" | "switching")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn slots_are_read_and_nonsense_is_not() {
        assert_eq!(parse_slots("7,0-2,1").unwrap(), [0, 1, 2, 7]);
        for wrong in ["", "a", "5-3", "16384", "1,,2", "-1"] {
            assert!(parse_slots(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn groups_that_are_not_there_are_refused_with_those_that_are() {
        let slots = json!({ "groups": [{ "name": "g1", "ranges": ["0-9", "20"] }, { "name": "g2", "ranges": [] }] });
        assert_eq!(
            (count(&slots, "g1"), count(&slots, "g2"), count(&slots, "g3")),
            (Some(11), Some(0), None)
        );
        let refused = known(&slots, "g3").err().unwrap().to_string();
        assert!(refused.contains("g1, g2"), "{refused}");
    }
}
