//! A primary that was restarted before anybody noticed. What it has lost its copies lose too, within moments and by its own word: nothing here can prevent
//! that, but it must not pass for the truth. A primary is known by its run id and the length of its log; one that is back under another run id with a
//! shorter log (or none) lacks what was acknowledged, and its group is not served until Sentinel or an operator makes another the primary, or an operator
//! takes it as it is (`DBA ACCEPT`).

use parking_lot::Mutex;

use crate::single::dial::Place;

/// What a primary says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) run_id: String,
    /// Bytes of its append-only file; none when it keeps none.
    pub(crate) log: Option<u64>,
    pub(crate) loading: bool,
}

impl Identity {
    /// Reads it from the sections `server` and `persistence` of `INFO`.
    pub(crate) fn read(info: &str) -> Option<Self> {
        let field = |name: &str| info.lines().find_map(|l| l.strip_prefix(name)).map(str::trim_end);
        Some(Self {
            run_id: field("run_id:")?.to_owned(),
            log: field("aof_current_size:").and_then(|n| n.parse().ok()),
            loading: field("loading:") != Some("0") || field("async_loading:").is_some_and(|l| l != "0"),
        })
    }
}

#[derive(Default)]
struct State {
    known: Option<(Place, Identity)>,
    lost: Option<String>,
}

/// What is known of the primary of a group.
#[derive(Default)]
pub(crate) struct Returned(Mutex<State>);

impl Returned {
    /// Takes in what the primary says of itself. An error when it must not be served.
    pub(super) fn see(&self, place: &Place, now: Identity) -> Result<(), String> {
        if now.loading {
            return Err(format!("{place} is still loading what it has on its disk"));
        }
        let mut state = self.0.lock();
        let known = state
            .known
            .as_ref()
            .filter(|(at, _)| at == place)
            .map(|(_, known)| known);
        let Some(known) = known else {
            *state = State {
                known: Some((place.clone(), now)),
                lost: None,
            };
            return Ok(());
        };
        if let Some(why) = &state.lost {
            return Err(why.clone());
        }
        let complete = known.run_id == now.run_id
            || match (known.log, now.log) {
                (Some(before), Some(after)) => after >= before,
                _ => false,
            };
        if complete {
            state.known = Some((place.clone(), now));
            return Ok(());
        }
        let size = |log: Option<u64>| log.map_or("no log".to_owned(), |n| format!("a log of {n} bytes"));
        let why = format!(
            "{place} was restarted and lacks acknowledged writes: it had {} and came back with {}. Make a copy that still has them the primary, or take it as it is with DBA ACCEPT",
            size(known.log),
            size(now.log)
        );
        tracing::error!(why, "a primary has lost acknowledged writes: its group is not served");
        state.lost = Some(why.clone());
        Err(why)
    }

    /// Why the primary must not be served, if so.
    pub(crate) fn lost(&self) -> Option<String> {
        self.0.lock().lost.clone()
    }

    /// An operator takes the primary as it is. False when nothing was wrong with it.
    pub(crate) fn accept(&self) -> bool {
        let was = std::mem::take(&mut *self.0.lock());
        was.lost.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(run_id: &str, log: Option<u64>) -> Identity {
        Identity {
            run_id: run_id.into(),
            log,
            loading: false,
        }
    }

    #[test]
    fn what_is_read() {
        let info = "# Server\r\nrun_id:abc\r\n# Persistence\r\nloading:0\r\nasync_loading:0\r\naof_enabled:1\r\naof_current_size:17\r\n";
        assert_eq!(Identity::read(info), Some(identity("abc", Some(17))));
        assert!(Identity::read(&info.replace("loading:0", "loading:1")).unwrap().loading);
        assert_eq!(Identity::read("# Server\r\nloading:0\r\n"), None);
        assert_eq!(Identity::read("run_id:x\r\nloading:0\r\n"), Some(identity("x", None)));
    }

    #[test]
    fn a_primary_that_is_back_with_less_is_not_served_until_somebody_decides() {
        let (a, b) = (Place::Tcp("a".into(), 1), Place::Tcp("b".into(), 1));
        let r = Returned::default();
        assert!(r.see(&a, identity("1", Some(100))).is_ok());
        assert!(r.see(&a, identity("1", Some(50))).is_ok(), "a log that was rewritten");
        assert!(
            r.see(&a, identity("2", Some(50))).is_ok(),
            "restarted with all that it had"
        );
        assert!(r.see(&a, identity("3", Some(49))).is_err());
        assert!(r.see(&a, identity("3", Some(1000))).is_err(), "it stays so");
        assert!(r.see(&b, identity("9", Some(1))).is_ok(), "another primary");
        assert!(r.lost().is_none());
        assert!(r.see(&b, identity("8", None)).is_err());
        assert!(r.accept() && !r.accept());
        assert!(r.see(&b, identity("8", None)).is_ok());
        assert!(
            r.see(&b, identity("7", None)).is_err(),
            "no log that would show that nothing is missing"
        );
        let loading = Identity {
            loading: true,
            ..identity("6", Some(1))
        };
        r.accept();
        assert!(r.see(&b, identity("7", Some(5))).is_ok());
        assert!(r.see(&b, loading).is_err());
        assert!(r.see(&b, identity("6", Some(5))).is_ok(), "loading says nothing");
    }
}
