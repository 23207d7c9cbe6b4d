//! `gse proc ls`: what the servers last heard of processes, page by page; no host is asked.

use anyhow::bail;
use comfy_table::{Cell, CellAlignment};
use gse_proto::http::Route;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::args::{ListFormat, ProcListArgs};
use crate::client::{Api, Settings};
use crate::route::new_table;
use crate::targets::Targets;
use crate::text::one_line;
use crate::{agents, ids, out, when};

/// Processes asked for at a time.
const PAGE: usize = 1000;
/// More pages than any fleet has.
const MAX_PAGES: usize = 10_000;

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Meta {
    namespace: String,
    name: String,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Host {
    ip: String,
    bk_cloud_id: i64,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct Info {
    meta: Meta,
    host: Host,
    bk_agent_id: String,
    status: i64,
    isauto: bool,
    pid: i64,
    version: String,
    cpu_usage: f64,
    mem_usage: f64,
    register_time: u64,
    last_start_time: u64,
    report_time: u64,
}

impl Info {
    /// The agent's id, or where it is.
    fn agent(&self) -> String {
        if self.bk_agent_id.is_empty() {
            format!("{}:{}", self.host.bk_cloud_id, self.host.ip)
        } else {
            self.bk_agent_id.clone()
        }
    }

    fn is_on(&self, targets: &Targets) -> bool {
        let address = format!("{}:{}", self.host.bk_cloud_id, self.host.ip);
        targets.all || targets.ids.iter().any(|id| *id == self.bk_agent_id || *id == address)
    }

    fn state(&self) -> &'static str {
        match self.status {
            0 => "unregistered",
            1 => "running",
            2 => "stopped",
            _ => "unknown",
        }
    }
}

#[derive(Deserialize)]
struct Namespaces {
    namespaces: Vec<String>,
}

#[derive(Deserialize)]
struct Page {
    count: usize,
    proc_infos: Vec<Info>,
}

/// Prints the list.
///
/// # Errors
/// The servers cannot be asked.
pub(super) async fn run(args: &ProcListArgs) -> anyhow::Result<u8> {
    let targets = Targets::parse(&args.targets)?;
    let api = Api::new(&Settings::load(&args.server)?)?;
    let namespaces = match &args.namespace {
        Some(namespace) => vec![namespace.clone()],
        None => {
            let known: Namespaces = api.call(Route::ProcNamespaces, &json!({})).await?;
            known.namespaces
        }
    };
    let mut infos = Vec::new();
    for namespace in &namespaces {
        infos.extend(all(&api, namespace).await?);
    }
    infos.retain(|info| info.is_on(&targets));
    infos.sort_by(|a, b| {
        ids::natural(&a.agent(), &b.agent())
            .then_with(|| a.meta.namespace.cmp(&b.meta.namespace))
            .then_with(|| ids::natural(&a.meta.name, &b.meta.name))
    });
    if args.output == ListFormat::Json {
        out::print_json(&infos)?;
        return Ok(0);
    }
    if infos.is_empty() {
        out::note("gse: no process is known here; gse proc register makes one known");
        return Ok(0);
    }
    let now = when::now_ms();
    let mut table = new_table([
        "AGENT",
        "NAMESPACE",
        "NAME",
        "STATE",
        "KEPT",
        "PID",
        "CPU%",
        "MEM%",
        "VERSION",
        "STARTED",
        "HEARD",
    ]);
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    for info in &infos {
        let runs = info.status == 1;
        let if_runs = |text: String| if runs { text } else { String::new() };
        table.add_row([
            Cell::new(one_line(&info.agent())),
            Cell::new(one_line(&info.meta.namespace)),
            Cell::new(one_line(&info.meta.name)),
            Cell::new(info.state()),
            Cell::new(if info.isauto { "yes" } else { "no" }),
            right(if_runs(info.pid.to_string())),
            right(if_runs(format!("{:.1}", info.cpu_usage))),
            right(if_runs(format!("{:.1}", info.mem_usage))),
            Cell::new(one_line(&info.version)),
            Cell::new(when::ago(info.last_start_time.saturating_mul(1000), now)),
            Cell::new(when::ago(info.report_time.saturating_mul(1000), now)),
        ]);
    }
    out::print(&agents::trimmed(&table))?;
    Ok(0)
}

async fn all(api: &Api, namespace: &str) -> anyhow::Result<Vec<Info>> {
    let mut infos = Vec::new();
    for page in 0..MAX_PAGES {
        let start = page * PAGE;
        let body = json!({
            "meta": { "namespace": namespace },
            "page": { "start": start, "limit": PAGE },
        });
        let page: Page = api.call(Route::SyncProcStatus, &body).await?;
        let empty = page.proc_infos.is_empty();
        infos.extend(page.proc_infos);
        if empty || start + PAGE >= page.count {
            return Ok(infos);
        }
    }
    bail!("the list of processes does not end; {} came so far", infos.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_either_form_of_its_host() {
        let info: Info = serde_json::from_value(json!({
            "meta": {"namespace": "n", "name": "x", "labels": {}}, "bk_agent_id": "a1", "status": 1,
            "host": {"ip": "10.0.0.1", "bk_cloud_id": 3}
        }))
        .unwrap();
        let on = |id: &str| info.is_on(&Targets::parse(&[id.to_owned()]).unwrap());
        assert!(on("a1") && on("3:10.0.0.1") && on("all"));
        assert!(!on("a2") && !on("0:10.0.0.1"));
        assert_eq!((info.agent().as_str(), info.state()), ("a1", "running"));
    }
}
