//! Verbs that show what clients do: `DBA CLIENTS`, `DBA SLOWLOG`, `DBA HOTKEYS`.

use bytes::Bytes;
use serde_json::json;

use super::{Answered, Refused};
use crate::engine::numbers::parse_int;
use crate::server::Shared;

/// Told at most, whatever is asked for.
const MOST: usize = 10_000;

fn number(word: &[u8], what: &str) -> Result<usize, Refused> {
    parse_int(word)
        .and_then(|n| usize::try_from(n).ok())
        .map(|n| n.min(MOST))
        .ok_or_else(|| Refused::new(format!("ERR {what} takes a number from 0 on")))
}

/// `DBA CLIENTS [n]`: the busiest ones.
pub(super) fn clients(shared: &Shared, rest: &[Bytes]) -> Answered {
    let n = match rest {
        [] => 50,
        [n] => number(n, "DBA CLIENTS")?,
        _ => return Err(Refused::new("ERR say DBA CLIENTS [n]")),
    };
    Ok(crate::clients::json(shared, n))
}

/// `DBA SLOWLOG [GET [n]|LEN|RESET]`.
pub(super) fn slowlog(shared: &Shared, rest: &[Bytes]) -> Answered {
    let log = &shared.watch.slowlog;
    let word = rest.first().map(|w| w.to_ascii_uppercase()).unwrap_or_default();
    match (word.as_slice(), rest) {
        (b"" | b"GET", [] | [_]) => Ok(log.json(32)),
        (b"GET", [_, n]) => Ok(log.json(number(n, "DBA SLOWLOG GET")?)),
        (b"LEN", [_]) => Ok(json!({ "kept": log.len() })),
        (b"RESET", [_]) => {
            log.reset();
            Ok(json!({ "kept": 0 }))
        }
        _ => Err(Refused::new("ERR say DBA SLOWLOG GET [n], LEN or RESET")),
    }
}

/// `DBA HOTKEYS [n]`.
pub(super) fn hotkeys(shared: &Shared, rest: &[Bytes]) -> Answered {
    let n = match rest {
        [] => 10,
        [n] => number(n, "DBA HOTKEYS")?,
        _ => return Err(Refused::new("ERR say DBA HOTKEYS [n]")),
    };
    if shared.watch.hotkeys.one_in() == 0 {
        return Err(Refused::new(
            "ERR hot keys are not looked for: admin.hotkeys_sample is 0",
        ));
    }
    Ok(shared.watch.hotkeys.json(n))
}
