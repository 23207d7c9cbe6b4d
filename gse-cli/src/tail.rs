//! `gse data tail`: the records of a data id as they come in.

use std::borrow::Cow;
use std::time::Duration;

use anyhow::Context;
use gse_proto::http::{DataTailRequest, Route, TailLine, TailRecord};
use serde::de::IgnoredAny;
use tokio::time::Instant;

use crate::args::{DataTailArgs, TailFormat};
use crate::client::{Api, Settings};
use crate::out;
use crate::text::{Escape, escape, one_line};

/// The servers say every few seconds that they are there.
const SILENCE: Duration = Duration::from_secs(20);
/// A tail that was cut off is taken up again for so long ...
const LOST: Duration = Duration::from_secs(60);
/// ... with such pauses.
const PAUSE: Duration = Duration::from_secs(1);
/// JSON that is longer is shown as it is: deep nesting set out over lines takes a hundred times the room.
const MAX_PRETTY: usize = 256 << 10;

/// Shows records until there were enough, or Ctrl-C.
///
/// # Errors
/// The servers refuse, or cannot be asked (any more).
pub async fn run(args: &DataTailArgs) -> anyhow::Result<()> {
    let api = Api::new(&Settings::load(&args.server)?)?;
    tokio::select! {
        ended = follow(&api, args) => ended,
        pressed = tokio::signal::ctrl_c() => pressed.context("Ctrl-C cannot be waited for"),
    }
}

/// What one look has seen.
#[derive(Default)]
struct Seen {
    records: u64,
    /// When the servers were last there; none if they never were.
    alive: Option<Instant>,
}

async fn follow(api: &Api, args: &DataTailArgs) -> anyhow::Result<()> {
    let mut seen = Seen::default();
    let mut told = false;
    loop {
        let before = seen.alive;
        let ended = look(api, args, &mut seen).await;
        if args.count.is_some_and(|count| seen.records >= count) {
            return Ok(());
        }
        told &= seen.alive == before;
        let why = match ended {
            Ok(()) => "the server has ended it".to_owned(),
            Err(error) => {
                let lately = seen.alive.is_some_and(|alive| alive.elapsed() < LOST);
                if !lately || !Api::may_pass(&error) {
                    return Err(error);
                }
                format!("{error:#}")
            }
        };
        if !told {
            out::note(&format!(
                "gse: the tail is interrupted ({}); what comes until it goes on is not shown",
                one_line(&why)
            ));
            told = true;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Shows what one call gives, until its end.
async fn look(api: &Api, args: &DataTailArgs, seen: &mut Seen) -> anyhow::Result<()> {
    let asked = DataTailRequest { data_id: args.id };
    let mut lines = api.lines(Route::DataTail, &asked).await?;
    let how = out::stdout_escape(false);
    let mut begun = false;
    while let Some(line) = lines.next(SILENCE).await? {
        seen.alive = Some(Instant::now());
        if !std::mem::replace(&mut begun, true) {
            out::note(&format!("gse: waiting for records of {}; Ctrl-C ends it", args.id));
        }
        if line.is_empty() {
            continue;
        }
        let read: TailLine = serde_json::from_slice(&line).context("a line of the answer is no record")?;
        match (args.output, &read) {
            (TailFormat::Json, _) => out::print(&format!("{}\n", escape(&String::from_utf8_lossy(&line), how)))?,
            (TailFormat::Text, TailLine::Record(record)) => out::print(&format!("{}\n", shown(record, how)))?,
            (TailFormat::Text, TailLine::Lost { lost }) => out::note(&format!(
                "gse: {lost} records are not shown: they came faster than they were read"
            )),
        }
        seen.records += u64::from(matches!(read, TailLine::Record(_)));
        if args.count.is_some_and(|count| seen.records >= count) {
            return Ok(());
        }
    }
    Ok(())
}

/// A record's payload for people.
fn shown(record: &TailRecord, how: Escape) -> Cow<'_, str> {
    match (&record.text, &record.base64) {
        (Some(text), _) => match pretty(text) {
            Some(pretty) => Cow::Owned(escape(&pretty, how).into_owned()),
            None => escape(text, how),
        },
        (None, Some(base64)) => Cow::Owned(format!("base64: {}", escape(base64, how))),
        (None, None) => Cow::Borrowed(""),
    }
}

/// JSON objects and arrays over several lines; none for anything else. Only blanks change: the order of keys and the digits of numbers
/// stay as they were sent.
fn pretty(text: &str) -> Option<String> {
    let whole = text.trim_ascii();
    if whole.len() > MAX_PRETTY || !whole.starts_with(['{', '[']) || serde_json::from_str::<IgnoredAny>(whole).is_err()
    {
        return None;
    }
    let mut out = String::with_capacity(whole.len() * 2);
    let (mut depth, mut quoted, mut escaped) = (0_usize, false, false);
    let line = |out: &mut String, depth: usize| {
        out.push('\n');
        out.extend(std::iter::repeat_n("  ", depth));
    };
    let mut chars = whole.chars().peekable();
    while let Some(c) = chars.next() {
        if quoted {
            out.push(c);
            quoted = escaped || c != '"';
            escaped = !escaped && c == '\\';
            continue;
        }
        match c {
            '{' | '[' => {
                out.push(c);
                while chars.next_if(char::is_ascii_whitespace).is_some() {}
                match chars.next_if(|next| matches!(next, '}' | ']')) {
                    Some(end) => out.push(end),
                    None => {
                        depth += 1;
                        line(&mut out, depth);
                    }
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                line(&mut out, depth);
                out.push(c);
            }
            ',' => {
                out.push(c);
                line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            '"' => {
                quoted = true;
                out.push(c);
            }
            c if c.is_ascii_whitespace() => {}
            c => out.push(c),
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_set_out_and_nothing_but_blanks_changes() {
        let text = " {\"z\" :1e400,\"a\":[ 1, {}, [ ] ,\"x, \\\"{ y\\\\\"],\n\"é\":{\"b\":null}} ";
        let expected = "{\n  \"z\": 1e400,\n  \"a\": [\n    1,\n    {},\n    [],\n    \"x, \\\"{ y\\\\\"\n  ],\n  \"é\": {\n    \"b\": null\n  }\n}";
        assert_eq!(pretty(text).unwrap(), expected);
        for other in ["hello", "5", "\"x\"", "{", "{} {}", "", "[1,]", "{\"a\":1"] {
            assert_eq!(pretty(other), None, "{other}");
        }
        let deep = "[".repeat(100_000);
        assert_eq!(pretty(&deep), None);
    }

    #[test]
    fn what_a_terminal_would_obey_is_made_visible() {
        let record = |text: &str| TailRecord {
            text: Some(text.to_owned()),
            ..TailRecord::default()
        };
        assert_eq!(shown(&record("a\x1b[2Jb"), Escape::All), "a\\x1b[2Jb");
        assert_eq!(shown(&record("a\x1b[2Jb"), Escape::Nothing), "a\x1b[2Jb");
        assert_eq!(shown(&record("[\"\u{9b}31m\"]"), Escape::All), "[\n  \"\\u{9b}31m\"\n]");
        let bytes = TailRecord {
            base64: Some("/wA=".to_owned()),
            ..TailRecord::default()
        };
        assert_eq!(shown(&bytes, Escape::All), "base64: /wA=");
    }
}
