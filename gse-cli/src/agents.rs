//! `gse agents`: who is connected, and one agent in detail.

use anyhow::bail;
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use gse_proto::http::{AgentDetail, AgentIdList, AgentInfo, AgentListReply, AgentListRequest, Route, WatchReport};
use gse_proto::ids::split_cloud_ip;

use crate::args::{AgentsArgs, ListFormat};
use crate::client::{Api, Settings};
use crate::text::one_line;
use crate::{ids, out, when};

/// Agents asked for at a time.
const PAGE: u32 = 1000;
/// More pages than any fleet has: a cursor that never ends is a fault of the servers and must not become one of ours.
const MAX_PAGES: usize = 10_000;
const STATUS_NOT_FOUND: i32 = -2;
/// A gse_alarm that has looked since then is there.
const LOOKED_LATELY_S: u64 = 30;

/// Prints the list or one agent.
///
/// # Errors
/// The servers cannot be asked, or do not know the agent.
pub async fn run(args: &AgentsArgs) -> anyhow::Result<()> {
    let api = Api::new(&Settings::load(&args.server)?)?;
    match &args.id {
        Some(id) => one(&api, id, args.output).await,
        None => list(&api, args).await,
    }
}

/// Every agent, page by page.
///
/// # Errors
/// The servers cannot be asked.
pub async fn all(api: &Api, online: bool) -> anyhow::Result<Vec<AgentDetail>> {
    let wanted = AgentListRequest {
        online,
        ..AgentListRequest::default()
    };
    pages(api, wanted).await.map(|(agents, _)| agents)
}

/// Every agent that is wanted, and where gse_alarm is if it was asked.
async fn pages(api: &Api, wanted: AgentListRequest) -> anyhow::Result<(Vec<AgentDetail>, Option<WatchReport>)> {
    let mut agents = Vec::new();
    let mut cursor = String::new();
    for _ in 0..MAX_PAGES {
        let request = AgentListRequest {
            cursor: cursor.clone(),
            limit: PAGE,
            ..wanted.clone()
        };
        let page: AgentListReply = api.call(Route::AgentList, &request).await?;
        agents.extend(page.agents);
        if page.next.is_empty() {
            return Ok((agents, page.watch));
        }
        if page.next == cursor {
            break;
        }
        cursor = page.next;
    }
    bail!("the list of agents does not end; {} came so far", agents.len())
}

async fn list(api: &Api, args: &AgentsArgs) -> anyhow::Result<()> {
    let wanted = AgentListRequest {
        online: args.online,
        lost: args.lost,
        ..AgentListRequest::default()
    };
    let (mut agents, watch) = pages(api, wanted).await?;
    if args.lost {
        about_the_watch(watch.as_ref());
    }
    agents.sort_by(|a, b| ids::natural(&a.info.bk_agent_id, &b.info.bk_agent_id));
    if args.output == ListFormat::Json {
        return out::print_json(&agents);
    }
    if agents.is_empty() {
        out::note(if args.lost {
            "gse: no agent is lost"
        } else if args.online {
            "gse: no agent is connected"
        } else {
            "gse: no agent has ever connected"
        });
        return Ok(());
    }
    let now = when::now_ms();
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .force_no_tty()
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header([
            "ID",
            "STATE",
            "VERSION",
            "IP",
            "CLOUD",
            "OS/ARCH",
            "CPU%",
            "MEM%",
            "RUNNING",
            "LAST SEEN",
            "NODE",
            if args.lost { "ALARMS" } else { "REMARK" },
        ]);
    for agent in &agents {
        let info = &agent.info;
        let row = [
            info.bk_agent_id.clone(),
            info.status.clone(),
            info.version.clone(),
            info.bk_host_ip.clone(),
            info.bk_cloud_id.to_string(),
            format!("{}/{}", info.bk_os_type, info.bk_cpu_architecture),
            format!("{:.1}", info.cpu_rate),
            format!("{:.1}", info.mem_rate),
            agent.running.to_string(),
            when::ago(info.report_time, now),
            agent.node_id.clone(),
            if args.lost {
                agent.alarms.to_string()
            } else {
                info.remark.clone()
            },
        ];
        table.add_row(row.iter().map(|cell| one_line(cell)));
    }
    for numbers in [4, 6, 7, 8] {
        if let Some(column) = table.column_mut(numbers) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    out::print(&trimmed(&table))?;
    Ok(())
}

/// Says what a list of lost agents can't: that nobody looks, or that somebody is held back.
fn about_the_watch(watch: Option<&WatchReport>) {
    match watch {
        None => out::note("gse: no gse_alarm has ever looked for lost agents; start one"),
        Some(watch) if watch.looked_ago_s > LOOKED_LATELY_S => out::note(&format!(
            "gse: gse_alarm has not looked for {} s; {} was the last",
            watch.looked_ago_s,
            one_line(&watch.node_id)
        )),
        Some(watch) if watch.held > 0 => out::note(&format!(
            "gse: {} more are not heard; alarms about them are held back, because {}",
            watch.held,
            one_line(&watch.held_why)
        )),
        Some(_) => {}
    }
}

/// The table without the blanks around it.
pub(crate) fn trimmed(table: &Table) -> String {
    table
        .lines()
        .map(|line| line.strip_prefix(' ').unwrap_or(&line).trim_end().to_owned() + "\n")
        .collect()
}

async fn one(api: &Api, id: &str, output: ListFormat) -> anyhow::Result<()> {
    let infos: Vec<AgentInfo> = api
        .call(
            Route::ListAgentInfo,
            &AgentIdList {
                agent_id_list: vec![id.to_owned()],
            },
        )
        .await?;
    let Some(info) = infos.into_iter().find(|info| info.status_code != STATUS_NOT_FOUND) else {
        bail!("no agent {} is known; gse agents lists those that are", one_line(id));
    };
    let known = all(api, false).await?.into_iter().find(|agent| is_meant(agent, id));
    let agent = known.unwrap_or_else(|| AgentDetail {
        info: info.clone(),
        ..Default::default()
    });
    if output == ListFormat::Json {
        return out::print_json(&agent);
    }
    out::print(&detail(&agent, when::now_ms()))?;
    Ok(())
}

fn is_meant(agent: &AgentDetail, id: &str) -> bool {
    if agent.info.bk_agent_id == id {
        return true;
    }
    split_cloud_ip(id).is_some_and(|(cloud, ip)| {
        let ip = ip.to_string();
        agent.info.bk_cloud_id == cloud.0 && (agent.info.bk_host_ip == ip || agent.addresses.contains(&ip))
    })
}

fn detail(agent: &AgentDetail, now: u64) -> String {
    let info = &agent.info;
    let time = |ms: u64| {
        if ms == 0 {
            "never".to_owned()
        } else {
            format!("{} ({})", when::utc(ms), when::ago(ms, now))
        }
    };
    let mut rows: Vec<(&str, String)> = vec![
        ("id", info.bk_agent_id.clone()),
        ("state", info.status.clone()),
        ("host", agent.hostname.clone()),
        (
            "addresses",
            if agent.addresses.is_empty() {
                info.bk_host_ip.clone()
            } else {
                agent.addresses.join(", ")
            },
        ),
        ("cloud area", info.bk_cloud_id.to_string()),
        ("version", info.version.clone()),
        ("mode", if info.run_mode == 0 { "proxy" } else { "agent" }.to_owned()),
        ("system", format!("{} {}", info.bk_os_type, info.bk_cpu_architecture)),
        ("processors", format!("{}, {:.1} % used", info.cpu_num, info.cpu_rate)),
        ("memory", format!("{} MiB, {:.1} % used", info.mem_size, info.mem_rate)),
        (
            "scripts",
            format!("{} running, {} waiting", agent.running, agent.queued),
        ),
        ("started", time(info.start_time.saturating_mul(1000))),
        ("last seen", time(info.report_time)),
        ("connected", time(agent.connected_at)),
        ("node", agent.node_id.clone()),
    ];
    if agent.disconnected_at > 0 {
        rows.push(("disconnected", time(agent.disconnected_at)));
        rows.push(("because", agent.disconnect_reason.clone()));
    }
    if agent.clone_at > 0 {
        rows.push((
            "clone",
            format!("{} claimed this id at {}", agent.clone_of, time(agent.clone_at)),
        ));
    }
    if !info.remark.is_empty() {
        rows.push(("remark", info.remark.clone()));
    }
    rows.into_iter()
        .map(|(name, value)| format!("{name:<13}{}\n", one_line(&value)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent() -> AgentDetail {
        AgentDetail {
            info: AgentInfo {
                bk_agent_id: "a1".into(),
                bk_cloud_id: 3,
                bk_host_ip: "10.0.0.1".into(),
                status: "lost".into(),
                report_time: 1_700_000_000_000,
                ..Default::default()
            },
            hostname: "evil\x1b]0;x\x07".into(),
            addresses: vec!["10.0.0.1".into(), "10.0.1.1".into()],
            disconnected_at: 1_700_000_001_000,
            disconnect_reason: "no heartbeat".into(),
            ..Default::default()
        }
    }

    #[test]
    fn an_agent_is_found_by_either_form_of_its_id() {
        let agent = agent();
        for id in ["a1", "3:10.0.0.1", "3:10.0.1.1"] {
            assert!(is_meant(&agent, id), "{id}");
        }
        for id in ["a", "0:10.0.0.1", "3:10.0.0.2"] {
            assert!(!is_meant(&agent, id), "{id}");
        }
    }

    #[test]
    fn names_of_hosts_cannot_speak_to_the_terminal() {
        let text = detail(&agent(), 1_700_000_061_000);
        assert!(!text.contains('\x1b') && text.contains("evil\\x1b]0;x\\x07"), "{text}");
        assert!(text.contains("because      no heartbeat"), "{text}");
        assert!(text.contains("(1 min ago)"), "{text}");
    }
}
