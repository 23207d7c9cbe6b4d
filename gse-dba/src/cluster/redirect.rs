//! The replies by which a node of a cluster says that a command was not executed and where it belongs. Bytes in, values out.

use memchr::memmem;

use crate::sharded::Fate;
use crate::single::dial::Place;

/// Why a node did not execute a command, and where it is to be tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// The slot is served there from now on.
    Moved(u16, Place),
    /// This once it is served there: the slot is on its way and the key has gone already.
    Ask(Place),
    /// Some of its keys are on their way: in a moment, by whoever serves the slot then.
    Later(&'static str),
}

/// Whether there can be an error among these replies: the one look that every batch gets.
pub(crate) fn any_error(replies: &[u8]) -> bool {
    replies.first() == Some(&b'-') || memmem::find(replies, b"\n-").is_some()
}

/// What a reply says, when it says that nothing was executed here and now.
fn parse(reply: &[u8]) -> Option<Turn> {
    let line = reply.strip_prefix(b"-")?.trim_ascii_end();
    if memmem::find(line, b" script: ").is_some() {
        // What a script was told while it ran: it may have changed something before.
        return None;
    }
    let mut words = line.split(|b| *b == b' ');
    let told = |moved: bool, words: &mut dyn Iterator<Item = &[u8]>| {
        let slot = std::str::from_utf8(words.next()?).ok()?.parse().ok()?;
        let (host, port) = std::str::from_utf8(words.next()?).ok()?.rsplit_once(':')?;
        let place = Place::Tcp(
            host.trim_start_matches('[').trim_end_matches(']').to_owned(),
            port.parse().ok()?,
        );
        Some(if moved {
            Turn::Moved(slot, place)
        } else {
            Turn::Ask(place)
        })
    };
    match words.next()? {
        b"MOVED" => told(true, &mut words),
        b"ASK" => told(false, &mut words),
        b"TRYAGAIN" => Some(Turn::Later("the keys of this command are on their way to another node")),
        b"CLUSTERDOWN" => Some(Turn::Later("the cluster says that it is down")),
        b"LOADING" => Some(Turn::Later("the node is loading its data")),
        b"MASTERDOWN" => Some(Turn::Later("the node has lost its primary")),
        b"UNBLOCKED" | b"READONLY" => Some(Turn::Later("the node is no primary any more")),
        _ => None,
    }
}

/// Whether a command with this answer was certainly not executed (or only read) and is to be tried again, and where.
pub(crate) fn turn(reply: &[u8], fate: &Fate, writes: bool) -> Option<Turn> {
    match fate {
        Fate::Sealed | Fate::Short(_) => parse(reply),
        Fate::Demoted => parse(reply).or((!writes).then_some(Turn::Later("the shard is changing its primary"))),
        Fate::Lost { sent: true, .. } if !writes => Some(Turn::Later("the shard was lost before it answered")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(host: &str, port: u16) -> Place {
        Place::Tcp(host.into(), port)
    }

    #[test]
    fn redirections_are_understood_and_nothing_else_is_taken_for_one() {
        let read = |r: &str| turn(r.as_bytes(), &Fate::Sealed, true);
        assert_eq!(
            read("-MOVED 3999 127.0.0.1:6381\r\n"),
            Some(Turn::Moved(3999, at("127.0.0.1", 6381)))
        );
        assert_eq!(
            read("-ASK 3999 node-3.lan:6381\r\n"),
            Some(Turn::Ask(at("node-3.lan", 6381)))
        );
        assert_eq!(read("-MOVED 1 [::1]:7000\r\n"), Some(Turn::Moved(1, at("::1", 7000))));
        assert_eq!(read("-MOVED 1 ::1:7000\r\n"), Some(Turn::Moved(1, at("::1", 7000))));
        for later in [
            "-TRYAGAIN Multiple keys request\r\n",
            "-CLUSTERDOWN The cluster is down\r\n",
            "-LOADING x\r\n",
        ] {
            assert!(matches!(read(later), Some(Turn::Later(_))), "{later}");
        }
        for not in [
            "+MOVED 3999 127.0.0.1:6381\r\n",
            "$5\r\nMOVED\r\n",
            "-ERR MOVED\r\n",
            "-MOVEDX 1 h:1\r\n",
            "-MOVED\r\n",
            "-MOVED x h:1\r\n",
            "-MOVED 1 h:x\r\n",
            "-READONLY You can't write script: 3a, on @user_script:1.\r\n",
            "",
        ] {
            assert_eq!(read(not), None, "{not:?}");
        }
    }

    #[test]
    fn what_may_have_been_executed_is_not_tried_again() {
        let lost = Fate::Lost {
            sent: true,
            reason: "x".into(),
        };
        assert_eq!(turn(b"", &lost, true), None);
        assert!(turn(b"", &lost, false).is_some(), "a read changes nothing");
        assert_eq!(turn(b"+OK\r\n", &Fate::Demoted, true), None);
        assert!(
            turn(b"-MOVED 1 h:1\r\n", &Fate::Demoted, true).is_some(),
            "a replica executes no write"
        );
        assert!(turn(b"$1\r\nx\r\n", &Fate::Demoted, false).is_some());
        assert_eq!(turn(b"", &Fate::Refused("few".into()), true), None);
    }

    #[test]
    fn errors_are_found_among_replies() {
        assert!(any_error(b"-MOVED 1 h:1\r\n"));
        assert!(any_error(b"+OK\r\n-ASK 1 h:1\r\n+OK\r\n"));
        assert!(!any_error(b"+OK\r\n$-1\r\n:-5\r\n"));
    }
}
