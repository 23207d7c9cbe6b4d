//! Commands that wait, begun again with what is left of their time.

use std::time::Duration;

use crate::args::Args;
use crate::resp::parse::{Limits, Parser, Requests};
use crate::single::session::push_command;

/// Where a command has its time, and how many of these are a second. None: it has none.
fn time_at(a: Args<'_>) -> Option<(usize, f64)> {
    let is = |names: &[&str]| names.iter().any(|n| a.is(0, n));
    if is(&["BLPOP", "BRPOP", "BLMOVE", "BRPOPLPUSH", "BZPOPMIN", "BZPOPMAX"]) {
        return Some((a.len().checked_sub(1)?, 1.0));
    }
    if is(&["BLMPOP", "BZMPOP"]) {
        return Some((1, 1.0));
    }
    if is(&["XREAD", "XREADGROUP"]) {
        let at = (1..a.len()).find(|i| a.is(*i, "BLOCK"))?;
        return Some((at + 1, 1000.0));
    }
    None
}

/// The same command, as one that has waited so long already.
pub(crate) fn shortened(a: Args<'_>, waited: Duration) -> Requests {
    let mut words: Vec<Vec<u8>> = a.iter().map(<[u8]>::to_vec).collect();
    if let Some((at, per_second)) = time_at(a)
        && let Some(word) = words.get_mut(at)
        && let Some(time) = crate::engine::numbers::parse_double(word)
        && time > 0.0
    {
        // At least a moment: none at all would be for ever.
        let left = (time - waited.as_secs_f64() * per_second).max(per_second / 1000.0);
        *word = if per_second > 1.0 {
            format!("{}", left.ceil()).into_bytes()
        } else {
            format!("{left:.3}").into_bytes()
        };
    }
    let mut bytes = Vec::new();
    push_command(&mut bytes, words.iter().map(Vec::as_slice));
    let mut parser = Parser::default();
    parser.buf.extend_from_slice(&bytes);
    let limits = Limits {
        max_args: words.len().max(1),
        max_bulk: bytes.len(),
        max_query: bytes.len().max(1024),
    };
    // It was a whole command before, so it is one now.
    if let Err(e) = parser.parse(&limits, 1) {
        tracing::warn!(error = e.0, "a command that waits could not be begun again");
    }
    parser.take()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(line: &str, waited: f64) -> String {
        let mut parser = Parser::default();
        parser.buf.extend_from_slice(format!("{line}\r\n").as_bytes());
        parser.parse(&crate::resp::parse::UNAUTHENTICATED, 1).unwrap();
        let r = shortened(parser.take().args(0), Duration::from_secs_f64(waited));
        assert_eq!(r.len(), 1);
        r.args(0)
            .iter()
            .map(String::from_utf8_lossy)
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn what_is_left_of_the_time_is_waited_and_for_ever_stays_for_ever() {
        assert_eq!(after("BLPOP a b 10", 4.0), "BLPOP a b 6.000");
        assert_eq!(after("BLPOP a 0", 4.0), "BLPOP a 0");
        assert_eq!(after("BLPOP a 2", 4.0), "BLPOP a 0.001");
        assert_eq!(after("BLMPOP 5 1 a LEFT", 1.0), "BLMPOP 4.000 1 a LEFT");
        assert_eq!(
            after("XREAD BLOCK 5000 STREAMS s $", 1.5),
            "XREAD BLOCK 3500 STREAMS s $"
        );
        assert_eq!(after("WAIT 1 0", 1.5), "WAIT 1 0");
    }
}
