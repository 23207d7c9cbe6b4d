//! The words of `DBA MIGRATE`.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{Move, Office, Phase, Place};
use crate::admin::{Answered, Refused};
use crate::copy::{Pace, Progress};

const USAGE: &str = "ERR DBA MIGRATE TO <url> [REPLACE], DBA MIGRATE BACK, DBA MIGRATE STATUS, DBA MIGRATE ABORT, DBA MIGRATE RATE <bytes per second> <keys per second>";

/// Answers `DBA MIGRATE ...`; `rest` is what follows the verb.
pub(crate) fn migrate(office: &Arc<Office>, rest: &[Bytes]) -> Answered {
    let words: Vec<String> = rest.iter().map(|w| String::from_utf8_lossy(w).into_owned()).collect();
    let sub = words.first().map(|w| w.to_ascii_uppercase()).unwrap_or_default();
    match (sub.as_str(), words.len()) {
        ("TO", 2) => start(office, &words[1], false),
        ("TO", 3) if words[2].eq_ignore_ascii_case("REPLACE") => start(office, &words[1], true),
        ("BACK", 1) => back(office),
        ("STATUS", 1) => Ok(status(office)),
        ("ABORT", 1) => abort(office),
        ("RATE", 3) => rate(office, &words[1], &words[2]),
        _ => Err(Refused::new(USAGE)),
    }
}

fn start(office: &Arc<Office>, url: &str, replace: bool) -> Answered {
    let place = Place::parse(url).map_err(|e| Refused::new(format!("ERR this is nowhere data can move to: {e}")))?;
    begin(office, place, replace, false)
}

fn back(office: &Arc<Office>) -> Answered {
    let place = {
        let state = office.state.lock();
        state
            .before
            .as_ref()
            .map(|b| b.place.clone())
            .or_else(|| state.back.clone())
    };
    match place {
        Some(place) => begin(office, place, true, true),
        None => Err(Refused::new(
            "ERR there is no way back: no data was moved from another store",
        )),
    }
}

fn begin(office: &Arc<Office>, to: Place, replace: bool, back: bool) -> Answered {
    {
        let mut state = office.state.lock();
        if state.last.as_ref().is_some_and(|m| m.phase.is_running()) {
            return Err(Refused::new(
                "ERR data is being moved already: see DBA MIGRATE STATUS, or end it with DBA MIGRATE ABORT",
            ));
        }
        if state.current.place == to {
            return Err(Refused::new("ERR the data is there already"));
        }
        if office.life.is_draining() {
            return Err(Refused::new("ERR this server is stopping"));
        }
        let c = &office.base.migrate;
        state.last = Some(Move {
            phase: Phase::Checking,
            from: state.current.place.name(),
            to: to.name(),
            problem: None,
            stop: CancellationToken::new(),
            pace: Arc::new(Pace::new(c.bytes_per_s, c.keys_per_s)),
            progress: Arc::new(Progress::default()),
            held_ms: 0,
            attempts: 0,
            keys: None,
        });
    }
    let ours = Arc::clone(office);
    office.life.spawn_contained(
        "dba-migrate",
        async move { super::run::run(ours, to, replace, back).await },
    );
    Ok(status(office))
}

fn abort(office: &Arc<Office>) -> Answered {
    match &office.state.lock().last {
        Some(m) if m.phase.is_running() => m.stop.cancel(),
        _ => return Err(Refused::new("ERR no data is being moved")),
    }
    Ok(status(office))
}

fn rate(office: &Arc<Office>, bytes: &str, keys: &str) -> Answered {
    let (Ok(bytes), Ok(keys)) = (bytes.parse(), keys.parse()) else {
        return Err(Refused::new(USAGE));
    };
    match &office.state.lock().last {
        Some(m) if m.phase.is_running() => m.pace.set(bytes, keys),
        _ => return Err(Refused::new("ERR no data is being moved")),
    }
    Ok(status(office))
}

/// How it stands.
pub(super) fn status(office: &Office) -> Value {
    let view = office.views.now();
    let state = office.state.lock();
    let way_back = state.before.as_ref().map(|b| &b.place).or(state.back.as_ref());
    let mut out = json!({
        "phase": Phase::Idle.name(),
        "store": state.current.place.name(),
        "mode": view.backend.name(),
        "durability": view.durability,
        "back_to": way_back.map(Place::name),
    });
    if let (Some(m), Some(out)) = (&state.last, out.as_object_mut()) {
        let p = &m.progress;
        let (bytes, keys) = m.pace.get();
        out.insert("phase".into(), m.phase.name().into());
        out.insert("from".into(), m.from.clone().into());
        out.insert("to".into(), m.to.clone().into());
        out.insert("problem".into(), m.problem.clone().into());
        out.insert(
            "progress".into(),
            json!({
                "keys_expected": p.expected.load(Relaxed),
                "keys_scanned": p.scanned.load(Relaxed),
                "keys_copied": p.copied.load(Relaxed),
                "bytes_copied": p.bytes.load(Relaxed),
                "parts_copied": p.parts.load(Relaxed),
                "copied_again": p.again.load(Relaxed),
                "keys_compared": p.compared.load(Relaxed),
                "mismatches": p.mismatched.load(Relaxed),
                "restarts": p.restarts.load(Relaxed),
            }),
        );
        out.insert("rate".into(), json!({"bytes_per_s": bytes, "keys_per_s": keys}));
        out.insert("held_ms".into(), m.held_ms.into());
        out.insert("attempts".into(), m.attempts.into());
        if let Some((from, to)) = m.keys {
            out.insert("keys_at_switch".into(), json!({"from": from, "to": to}));
        }
    }
    out
}
