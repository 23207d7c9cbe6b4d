//! `gse data`: what became of records, and a record by hand. Live records are [`tail`]'s.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, bail};
use comfy_table::{Cell, CellAlignment};
use gse_proto::datalink::MAX_PAYLOAD;
use gse_proto::http::Route;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;

use crate::args::{DataArgs, DataCommand, DataListArgs, DataSendArgs, ListFormat};
use crate::client::{Api, Settings, data_dir};
use crate::text::one_line;
use crate::{agents, out, route, tail};

/// `gse data`.
///
/// # Errors
/// The servers or the agent cannot be asked.
pub async fn run(args: &DataArgs) -> anyhow::Result<()> {
    match &args.what {
        DataCommand::Ls(args) => list(args).await,
        DataCommand::Tail(args) => tail::run(args).await,
        DataCommand::Send(args) => {
            let (id, text) = (args.id, record(args)?);
            let socket = socket(args)?;
            let sent = tokio::task::spawn_blocking(move || gse_agent::cmdline::send(&socket, id, &text)).await;
            sent.context("sending has crashed")?.map(|_| ())
        }
    }
}

#[derive(Deserialize)]
struct Row {
    data_id: u32,
    records: u64,
    bytes: u64,
    delivered: u64,
    lag: u64,
    unrouted: u64,
    routed: bool,
    dropped: BTreeMap<String, u64>,
}

async fn list(args: &DataListArgs) -> anyhow::Result<()> {
    let api = Api::new(&Settings::load(&args.server)?)?;
    let whole: Value = api.call(Route::DataFigures, &json!({})).await?;
    if args.output == ListFormat::Json {
        return out::print_json(&whole["ids"]);
    }
    let rows: Vec<Row> = serde_json::from_value(whole["ids"].clone()).context("the answer is not a list of figures")?;
    if rows.is_empty() {
        out::note("gse: no record has come since gse_data started; gse data send hands one over");
        return Ok(());
    }
    let mut table = route::new_table([
        "DATA ID",
        "RECORDS",
        "BYTES",
        "DELIVERED",
        "WAITING",
        "DROPPED",
        "REMARK",
    ]);
    for row in &rows {
        let number = |value: u64| Cell::new(value).set_alignment(CellAlignment::Right);
        let mut remarks: Vec<String> = row
            .dropped
            .iter()
            .map(|(reason, count)| format!("{count} dropped: {}", one_line(reason)))
            .collect();
        if !row.routed {
            remarks.insert(0, "no route".to_owned());
        }
        let id = match row.data_id {
            0 => "others".to_owned(),
            id => id.to_string(),
        };
        table.add_row([
            Cell::new(id),
            number(row.records),
            number(row.bytes),
            number(row.delivered),
            number(row.lag),
            number(row.dropped.values().sum()),
            Cell::new(remarks.join("; ")),
        ]);
    }
    out::print(&agents::trimmed(&table))?;
    let unrouted: u64 = rows.iter().map(|row| row.unrouted).sum();
    if unrouted > 0 {
        out::note(&format!(
            "gse: {unrouted} records had no route; gse route add leads them somewhere"
        ));
    }
    Ok(())
}

/// What is to be sent.
fn record(args: &DataSendArgs) -> anyhow::Result<Vec<u8>> {
    match args.text.as_deref() {
        Some(text) if text != "-" => Ok(text.as_bytes().to_vec()),
        _ => {
            let mut bytes = Vec::new();
            let limit = u64::try_from(MAX_PAYLOAD)?.saturating_add(1);
            let read = std::io::stdin().lock().take(limit).read_to_end(&mut bytes);
            read.context("standard input")?;
            if bytes.len() > MAX_PAYLOAD {
                bail!("a record has at most {MAX_PAYLOAD} bytes");
            }
            Ok(bytes)
        }
    }
}

fn socket(args: &DataSendArgs) -> anyhow::Result<PathBuf> {
    match &args.socket {
        Some(path) => Ok(path.clone()),
        None => Ok(data_dir(&args.data)?.join("agent/data/ipc.state.report")),
    }
}
