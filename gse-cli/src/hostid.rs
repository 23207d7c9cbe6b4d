//! `gse hostid`: what the source of identities says of a host, what was put there, and whether the two agree.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use gse_proto::http::{HostIdOne, HostIdPush, HostIdPut, HostIdShow, HostIdTaken, HostIdView, Route};

use crate::args::{HostIdArgs, ListFormat};
use crate::client::{Api, Settings};
use crate::text::one_line;
use crate::{out, when};

/// Longest content that is read, bytes; servers take less.
const MAX_CONTENT: u64 = 8 << 20;
/// Digits of a digest that are shown.
const SHORT: usize = 16;

/// Shows a host's identity, says what it is, or has it pushed again.
///
/// # Errors
/// The servers cannot be asked, refuse, or do not know the host.
pub async fn run(args: &HostIdArgs) -> anyhow::Result<()> {
    let api = Api::new(&Settings::load(&args.server)?)?;
    if let Some(file) = &args.set {
        let content = read(file)?;
        let one = HostIdOne {
            bk_agent_id: args.host.clone(),
            content,
        };
        let _: HostIdTaken = api.call(Route::HostIdPut, &HostIdPut { hosts: vec![one] }).await?;
        out::note("gse: taken; it is pushed as soon as the agent is connected");
        return Ok(());
    }
    if args.push {
        let hosts = vec![args.host.clone()];
        let reply: HostIdTaken = api.call(Route::HostIdPush, &HostIdPush { hosts }).await?;
        if reply.taken == 0 {
            return unknown(&args.host);
        }
        out::note("gse: taken; it is pushed as soon as the agent is connected");
        return Ok(());
    }
    let host = args.host.clone();
    let view: HostIdView = api.call(Route::HostIdShow, &HostIdShow { host }).await?;
    if args.output == ListFormat::Json {
        return out::print_json(&view);
    }
    if !view.known {
        out::note(&format!("gse: identities come from {}", one_line(&view.source)));
        return unknown(&args.host);
    }
    out::print(&detail(&view, when::now_ms()))?;
    Ok(())
}

fn unknown(host: &str) -> anyhow::Result<()> {
    bail!("no identity of {} is known", one_line(host))
}

fn read(file: &Path) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    let what = || format!("reading {}", file.display());
    if file.as_os_str() == "-" {
        std::io::stdin()
            .lock()
            .take(MAX_CONTENT + 1)
            .read_to_end(&mut bytes)
            .context("standard input")?;
    } else {
        let opened = std::fs::File::open(file).with_context(what)?;
        opened
            .take(MAX_CONTENT + 1)
            .read_to_end(&mut bytes)
            .with_context(what)?;
    }
    if bytes.len() as u64 > MAX_CONTENT {
        bail!("an identity has at most {MAX_CONTENT} bytes");
    }
    String::from_utf8(bytes).context("an identity has to be text")
}

fn detail(view: &HostIdView, now: u64) -> String {
    let time = |ms: u64| format!("{} ({})", when::utc(ms), when::ago(ms, now));
    let short = |digest: &str| digest.chars().take(SHORT).collect::<String>();
    let state = match (view.agree, view.connected, &view.failure) {
        (true, ..) => "in step: the host has what the source says".to_owned(),
        (false, false, _) => "waits for its agent, which is not connected".to_owned(),
        (false, true, Some(failure)) => format!("not in step: {}", failure.message),
        (false, true, None) => "not in step: it is being pushed".to_owned(),
    };
    let wanted = &view.wanted;
    let mut rows = vec![
        ("host", view.host.clone()),
        ("state", state),
        ("source", view.source.clone()),
        ("agent", view.agents.join(", ")),
    ];
    if view.bk_host_id != 0 {
        rows.push(("bk_host_id", view.bk_host_id.to_string()));
    }
    rows.push((
        "source says",
        format!(
            "{}, {} bytes, since {}",
            short(&wanted.digest),
            wanted.bytes,
            time(wanted.since)
        ),
    ));
    match &view.pushed {
        Some(pushed) => {
            rows.push((
                "host has",
                format!("{}, since {}", short(&pushed.digest), time(pushed.at)),
            ));
            rows.push(("file", format!("{} by {}", pushed.path, pushed.agent)));
        }
        None => rows.push(("host has", "nothing that was pushed from here".to_owned())),
    }
    if let Some(failure) = view.failure.as_ref().filter(|_| !view.agree) {
        rows.push((
            "last try",
            format!("{}, code {}, {} failed", time(failure.at), failure.code, failure.tries),
        ));
    }
    let mut text: String = rows
        .into_iter()
        .map(|(name, value)| format!("{name:<13}{}\n", one_line(&value)))
        .collect();
    if let Some(content) = &wanted.content {
        text.push('\n');
        // As it is, line by line, but it does not speak to the terminal.
        for line in content.lines() {
            text.push_str(&one_line(line));
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::http::{HostIdContent, HostIdFailure, HostIdPushed};

    #[test]
    fn what_is_shown_says_whether_they_agree() {
        let mut view = HostIdView {
            known: true,
            host: "0:10.0.0.1".into(),
            agents: vec!["0:10.0.0.1".into(), "0:10.0.1.1".into()],
            source: "CMDB at http://cmdb".into(),
            connected: true,
            wanted: HostIdContent {
                digest: "0123456789abcdef0123".into(),
                bytes: 7,
                since: 1_700_000_000_000,
                content: Some("{\"a\":\n\"\x1b[2J\"}".into()),
            },
            ..HostIdView::default()
        };
        let now = 1_700_000_060_000;
        let text = detail(&view, now);
        assert!(
            text.contains("host has     nothing that was pushed from here"),
            "{text}"
        );
        assert!(
            text.contains("0123456789abcdef, 7 bytes") && !text.contains('\x1b'),
            "{text}"
        );
        view.failure = Some(HostIdFailure {
            at: now,
            code: 5,
            message: "no room".into(),
            tries: 3,
        });
        assert!(detail(&view, now).contains("state        not in step: no room"));
        view.connected = false;
        assert!(detail(&view, now).contains("waits for its agent"));
        view.agree = true;
        view.pushed = Some(HostIdPushed {
            digest: "0123456789abcdef0123".into(),
            at: now,
            agent: "a".into(),
            path: "/var/lib/gse/host/hostid".into(),
        });
        let text = detail(&view, now);
        assert!(
            text.contains("in step") && text.contains("file         /var/lib/gse/host/hostid by a"),
            "{text}"
        );
        assert!(!text.contains("last try"), "{text}");
    }
}
