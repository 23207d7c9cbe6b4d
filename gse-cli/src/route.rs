//! `gse route`: which data id goes where, through the calls that platforms make.

use std::io::Read;

use anyhow::Context;
use comfy_table::{Cell, ContentArrangement, Table, presets};
use gse_proto::codes::Code;
use gse_proto::http::Route;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::args::{
    ListFormat, RouteAddArgs, RouteArgs, RouteCommand, RouteListArgs, RouteRemoveArgs, RouteShowArgs, RouteStreamArgs,
};
use crate::client::{Api, CallError, Settings};
use crate::text::one_line;
use crate::{agents, out};

/// Longest description of a stream that is read from standard input, bytes.
const MAX_STREAM: u64 = 1 << 20;

/// `gse route`.
///
/// # Errors
/// The servers cannot be asked, or refuse.
pub async fn run(args: &RouteArgs) -> anyhow::Result<()> {
    match &args.what {
        RouteCommand::Ls(args) => list(args).await,
        RouteCommand::Show(args) => show(args).await,
        RouteCommand::Add(args) => add(args).await,
        RouteCommand::Rm(args) => remove(args).await,
        RouteCommand::Stream(args) => stream(args).await,
    }
}

fn operation() -> Value {
    json!({ "operator_name": "gse" })
}

async fn list(args: &RouteListArgs) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    struct Reply {
        channels: Vec<Channel>,
        streams: Vec<Stream>,
        problems: Vec<String>,
    }
    #[derive(Deserialize)]
    struct Channel {
        channel_id: u32,
        plat_name: String,
        routes: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        name: String,
        stream_to_id: Option<u64>,
        target: Option<String>,
        filtered: bool,
    }
    #[derive(Deserialize)]
    struct Stream {
        stream_to_id: u64,
        name: String,
        report_mode: String,
    }
    let api = Api::new(&Settings::load(&args.server)?)?;
    let whole: Value = api.call(Route::DataRoutes, &json!({})).await?;
    if args.output == ListFormat::Json {
        return out::print_json(&whole);
    }
    let reply: Reply = serde_json::from_value(whole).context("the answer is not a list of routes")?;
    if reply.channels.is_empty() && reply.streams.is_empty() {
        out::note("gse: there are no routes; records go to the default sink of gse_data");
        return Ok(());
    }
    let mut table = new_table(["DATA ID", "PLATFORM", "ROUTE", "STREAM", "TO"]);
    for channel in &reply.channels {
        if channel.routes.is_empty() {
            table.add_row(
                [
                    &channel.channel_id.to_string(),
                    &one_line(&channel.plat_name),
                    "-",
                    "-",
                    "-",
                ]
                .map(Cell::new),
            );
        }
        for route in &channel.routes {
            let named = |id: u64| {
                let known = reply.streams.iter().find(|stream| stream.stream_to_id == id);
                known.map_or_else(
                    || id.to_string(),
                    |stream| format!("{id} ({}, {})", one_line(&stream.name), stream.report_mode),
                )
            };
            let mut to = route
                .target
                .as_deref()
                .map_or_else(|| "cannot be followed".to_owned(), one_line);
            if route.filtered {
                to += " (some records)";
            }
            table.add_row([
                Cell::new(channel.channel_id),
                Cell::new(one_line(&channel.plat_name)),
                Cell::new(one_line(&route.name)),
                Cell::new(route.stream_to_id.map_or_else(|| "-".to_owned(), named)),
                Cell::new(to),
            ]);
        }
    }
    let mut text = agents::trimmed(&table);
    let unused: Vec<&Stream> = reply
        .streams
        .iter()
        .filter(|stream| {
            let leads = |route: &One| route.stream_to_id == Some(stream.stream_to_id);
            !reply.channels.iter().any(|channel| channel.routes.iter().any(leads))
        })
        .collect();
    for stream in unused {
        text += &format!(
            "stream {} ({}, {}): no route leads there\n",
            stream.stream_to_id,
            one_line(&stream.name),
            one_line(&stream.report_mode)
        );
    }
    out::print(&text)?;
    for problem in &reply.problems {
        out::note(&format!("gse: {}", one_line(problem)));
    }
    Ok(())
}

async fn show(args: &RouteShowArgs) -> anyhow::Result<()> {
    let api = Api::new(&Settings::load(&args.server)?)?;
    let body = json!({ "condition": { "channel_id": args.id }, "operation": operation() });
    let items: Vec<Value> = api.call(Route::QueryRoute, &body).await?;
    items.iter().try_for_each(out::print_json)
}

fn is(error: &anyhow::Error, wanted: Code) -> bool {
    matches!(error.downcast_ref::<CallError>(), Some(CallError::Refused { code, .. }) if *code == wanted.code())
}

async fn add(args: &RouteAddArgs) -> anyhow::Result<()> {
    let api = Api::new(&Settings::load(&args.server)?)?;
    let asked = json!({ "condition": { "stream_to_id": args.stream }, "operation": operation() });
    let items: Vec<Value> = api.call(Route::QueryStreamto, &asked).await?;
    let mode = items.first().and_then(|item| item["stream_to"]["report_mode"].as_str());
    let mut to = json!({ "stream_to_id": args.stream });
    match (mode, &args.target) {
        (Some("file"), _) => {}
        (Some(mode), Some(target)) => {
            let key = if mode == "redis" { "channel_name" } else { "topic_name" };
            to[mode] = json!({ key: target });
        }
        (Some(mode), None) => anyhow::bail!(
            "stream {} is one of {mode}: say --target with the topic or channel there",
            args.stream
        ),
        (None, _) => anyhow::bail!("the servers do not say what stream {} is", args.stream),
    }
    let routes = json!([{ "name": args.name, "stream_to": to }]);
    if let Some(id) = args.id {
        let body = json!({ "condition": { "channel_id": id, "plat_name": args.plat }, "operation": operation(),
            "specification": { "route": routes } });
        match api.call::<Value>(Route::UpdateRoute, &body).await {
            Ok(_) => return Ok(out::print(&format!("{id}\n"))?),
            // Then it is made.
            Err(error) if is(&error, Code::NoSuchRoute) => {}
            Err(error) => return Err(error),
        }
    }
    let mut body = json!({ "metadata": { "plat_name": args.plat }, "operation": operation(), "route": routes });
    if let Some(id) = args.id {
        body["metadata"]["channel_id"] = id.into();
    }
    let made: Value = api.call(Route::AddRoute, &body).await?;
    Ok(out::print(&format!("{}\n", made["channel_id"]))?)
}

async fn remove(args: &RouteRemoveArgs) -> anyhow::Result<()> {
    let api = Api::new(&Settings::load(&args.server)?)?;
    let method = if args.names.is_empty() { "all" } else { "specification" };
    let body = json!({ "condition": { "channel_id": args.id },
        "operation": { "operator_name": "gse", "method": method }, "specification": { "route": args.names } });
    let _: Value = api.call(Route::DeleteRoute, &body).await?;
    Ok(())
}

async fn stream(args: &RouteStreamArgs) -> anyhow::Result<()> {
    let text = if args.json == "-" {
        let mut text = String::new();
        let read = std::io::stdin().lock().take(MAX_STREAM).read_to_string(&mut text);
        read.context("standard input")?;
        text
    } else {
        args.json.clone()
    };
    let stream_to: Value = serde_json::from_str(&text).context("the stream is not JSON")?;
    let api = Api::new(&Settings::load(&args.server)?)?;
    let mut body = json!({ "metadata": { "plat_name": args.plat }, "operation": operation(), "stream_to": stream_to });
    if let Some(id) = args.id {
        body["metadata"]["stream_to_id"] = id.into();
    }
    let made: Value = api.call(Route::AddStreamto, &body).await?;
    Ok(out::print(&format!("{}\n", made["stream_to_id"]))?)
}

/// A table as all lists have it.
pub(crate) fn new_table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .force_no_tty()
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header);
    table
}
