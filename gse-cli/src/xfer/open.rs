//! `gse xfer open|close|torrent`: content of file tasks for foreign BitTorrent clients.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use comfy_table::{Cell, ContentArrangement, Table, presets};
use gse_proto::http::{Route, XferOpenRequest, XferOpened, XferPart, XferTaskRequest, XferTorrentRequest};
use tokio::time::Instant;

use super::board::bytes;
use super::task_id;
use crate::args::{Format, XferCloseArgs, XferOpenArgs, XferTorrentArgs};
use crate::client::{Api, Settings};
use crate::text::one_line;
use crate::{agents, out, when};

/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_millis(500);

/// Opens a task and waits until it is open; gives the exit status.
pub(super) async fn open(args: &XferOpenArgs) -> anyhow::Result<u8> {
    let task_id = task_id(&args.id)?;
    let api = Api::new(&Settings::load(&args.server)?)?;
    let request = XferOpenRequest {
        task_id: task_id.clone(),
        expire_seconds: args.lasts.into(),
    };
    let mut opened: XferOpened = api.call(Route::XferOpen, &request).await?;
    let deadline = Instant::now() + Duration::from_secs(args.wait.into());
    while opened.parts.iter().any(is_waiting) && Instant::now() < deadline {
        tokio::time::sleep(LOOK).await;
        let query = XferTorrentRequest {
            task_id: task_id.clone(),
            content: false,
        };
        opened = api.call(Route::XferTorrent, &query).await?;
    }
    if args.output == Format::Json {
        out::print_json(&opened)?;
    } else {
        out::print(&text(&opened))?;
    }
    Ok(u8::from(opened.parts.iter().any(|part| part.state != "open")))
}

fn is_waiting(part: &XferPart) -> bool {
    part.state == "waiting"
}

fn text(opened: &XferOpened) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .force_no_tty()
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(["PART", "CONTENT", "STATE", "SIZE", "TORRENT"]);
    for part in &opened.parts {
        let last = if part.url.is_empty() { &part.message } else { &part.url };
        table.add_row([
            Cell::new(part.part),
            Cell::new(one_line(&part.name)),
            Cell::new(one_line(&part.state)),
            Cell::new(if part.size == 0 {
                String::new()
            } else {
                bytes(part.size)
            }),
            Cell::new(one_line(last)),
        ]);
    }
    let left_s = opened.expires_at.saturating_sub(when::now_ms()) / 1000;
    format!("open for {left_s} s more\n\n{}", agents::trimmed(&table))
}

/// Closes a task.
pub(super) async fn close(args: &XferCloseArgs) -> anyhow::Result<u8> {
    let task_id = task_id(&args.id)?;
    let api = Api::new(&Settings::load(&args.server)?)?;
    let request = XferTaskRequest {
        task_id: task_id.clone(),
    };
    let _: XferOpened = api.call(Route::XferClose, &request).await?;
    out::print(&format!("{task_id}: foreign clients are let in no more\n"))?;
    Ok(0)
}

/// Writes a `.torrent` file to standard output.
pub(super) async fn torrent(args: &XferTorrentArgs) -> anyhow::Result<u8> {
    let task_id = task_id(&args.id)?;
    let api = Api::new(&Settings::load(&args.server)?)?;
    let query = XferTorrentRequest { task_id, content: true };
    let opened: XferOpened = api.call(Route::XferTorrent, &query).await?;
    let part = choose(&opened, args.part)?;
    let torrent = STANDARD
        .decode(&part.torrent)
        .context("the server sent no .torrent file")?;
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(&torrent).context("writing to standard output")?;
    stdout.flush().context("writing to standard output")?;
    Ok(0)
}

/// The part that is meant, if it is open.
fn choose(opened: &XferOpened, asked: Option<u32>) -> anyhow::Result<&XferPart> {
    let id = &opened.task_id;
    let part = match (opened.parts.as_slice(), asked) {
        ([], _) => bail!("{id} is not open to foreign clients: gse xfer open {id}"),
        ([only], None) => only,
        (parts, None) => bail!(
            "{id} has {} parts; say which: --part 0 to {}",
            parts.len(),
            parts.len() - 1
        ),
        (parts, Some(number)) => match parts.iter().find(|part| part.part == number) {
            Some(part) => part,
            None => bail!("{id} has no part {number}"),
        },
    };
    if part.state != "open" {
        bail!(
            "part {} of {id} is not open ({}): {}",
            part.part,
            part.state,
            part.message
        );
    }
    Ok(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_chosen_only_if_it_is_clear_and_open() {
        let part = |number, state: &str| XferPart {
            part: number,
            state: state.into(),
            message: "why".into(),
            ..XferPart::default()
        };
        let opened = |parts| XferOpened {
            task_id: "T".into(),
            parts,
            ..XferOpened::default()
        };
        let one = opened(vec![part(0, "open")]);
        assert_eq!(choose(&one, None).unwrap().part, 0);
        let two = opened(vec![part(0, "waiting"), part(1, "open")]);
        assert_eq!(choose(&two, Some(1)).unwrap().part, 1);
        for (opened, asked, word) in [
            (&two, None, "--part"),
            (&two, Some(0), "why"),
            (&two, Some(7), "no part 7"),
        ] {
            assert!(choose(opened, asked).unwrap_err().to_string().contains(word), "{word}");
        }
        assert!(
            choose(&opened(vec![]), None)
                .unwrap_err()
                .to_string()
                .contains("gse xfer open T")
        );
    }
}
