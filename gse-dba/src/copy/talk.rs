//! Talking to an end: again until it answers, page by page through its keys, and emptying it.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::values::{self, cmd};
use super::{End, Filter, Pace, Reply, Trouble, Words};

/// Keys asked of one step of an iteration.
const SCAN: usize = 500;
/// An end that says nothing for this long, beyond the patience, is out of reach.
const SILENCE: Duration = Duration::from_secs(30);
const RETRY_FIRST: Duration = Duration::from_millis(20);
const RETRY_LAST: Duration = Duration::from_millis(500);

pub(super) fn scan(cursor: &Bytes) -> Words {
    cmd(&[b"SCAN", cursor, b"COUNT", SCAN.to_string().as_bytes()])
}

pub(super) fn scanned(got: &[Reply]) -> Result<(Bytes, Vec<Bytes>), Trouble> {
    let odd = || {
        let e = got.first().and_then(Reply::error).unwrap_or("it is no page of keys");
        Trouble::Unfit(format!("the answer to SCAN can't be used: {e}"))
    };
    let [next, keys] = got.first().and_then(Reply::list).ok_or_else(odd)? else {
        return Err(odd());
    };
    Ok((
        next.bytes().cloned().ok_or_else(odd)?,
        values::items(keys).ok_or_else(odd)?,
    ))
}

/// Sends commands again and again until they are answered.
pub(super) async fn insist(
    end: &dyn End,
    commands: &[Words],
    patience: Duration,
    deadline: Option<Instant>,
    stop: &CancellationToken,
) -> Result<Vec<Reply>, Trouble> {
    let until = Instant::now() + patience;
    let mut wait = RETRY_FIRST;
    loop {
        let last = deadline.unwrap_or(until + patience + SILENCE);
        let got = tokio::select! {
            got = timeout_at(last, end.call(commands)) => got.unwrap_or_else(|_| Err(match deadline {
                Some(_) => Trouble::Late,
                None => Trouble::Later(format!("{} does not answer", end.name())),
            })),
            () = stop.cancelled() => return Err(Trouble::Stopped),
        };
        match got {
            Err(Trouble::Later(why)) if deadline.is_some_and(|d| Instant::now() + wait >= d) => {
                tracing::debug!(end = %end.name(), why, "the last step of a copy ran out of time");
                return Err(Trouble::Late);
            }
            Err(Trouble::Later(why)) if Instant::now() >= until => {
                return Err(Trouble::Later(format!(
                    "{} is out of reach for {patience:?}: {why}",
                    end.name()
                )));
            }
            Err(Trouble::Later(why)) => {
                tracing::debug!(end = %end.name(), why, "a copy waits");
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = stop.cancelled() => return Err(Trouble::Stopped),
                }
                wait = (wait * 2).min(RETRY_LAST);
            }
            other => return other,
        }
    }
}

/// Deletes what an end has of the keys that are meant, what is left of an unfinished copy included. With every key meant, everything is deleted.
pub(crate) async fn purge(
    end: &dyn End,
    filter: &Filter,
    pace: &Pace,
    stop: &CancellationToken,
    patience: Duration,
) -> Result<(), Trouble> {
    if filter.is_all() {
        let got = insist(end, &[cmd(&[b"FLUSHDB"])], patience, None, stop).await?;
        return match got.first().and_then(Reply::error) {
            None => Ok(()),
            Some(e) => Err(Trouble::Unfit(format!("{} can't be emptied: {e}", end.name()))),
        };
    }
    let mut cursor = Bytes::from_static(b"0");
    loop {
        let got = insist(end, &[scan(&cursor)], patience, None, stop).await?;
        let (next, mut keys) = scanned(&got)?;
        keys.retain(|k| filter.covers(k));
        // One command each: they are not all of one slot.
        for part in keys.chunks(100) {
            let unlink: Vec<Words> = part.iter().map(|k| cmd(&[b"UNLINK", k])).collect();
            let got = insist(end, &unlink, patience, None, stop).await?;
            if let Some(e) = got.iter().find_map(Reply::error) {
                return Err(Trouble::Unfit(format!("{} does not delete: {e}", end.name())));
            }
            pace.spent(0, part.len() as u64, stop).await?;
        }
        cursor = next;
        if cursor == "0" {
            return Ok(());
        }
    }
}
