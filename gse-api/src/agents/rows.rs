//! Rows of the contract from what the store knows. No I/O: time comes in as a number.

use std::time::Duration;

use gse_proto::http::{AgentDetail, AgentInfo, AgentState, HostRef, V1AgentInfo, V1AgentStatus};
use gse_proto::ids::split_cloud_ip;

use super::Known;

const RUNNING: i32 = 2;
const STOPPED: i32 = 6;
const LOST: i32 = -1;
const NOT_FOUND: i32 = -2;

/// Intervals without a heartbeat after which an agent counts as lost, and what is added for the way to the store.
const MISSED: u32 = 3;
const WRITE_DELAY: Duration = Duration::from_secs(2);
/// A clone is mentioned for so long.
const CLONE_NEWS_MS: u64 = 24 * 3600 * 1000;

/// When a row is made, and what counts as a sign of life.
#[derive(Debug, Clone, Copy)]
pub struct Liveness {
    /// Unix milliseconds.
    pub now_ms: u64,
    /// The agents' heartbeat interval.
    pub heartbeat: Duration,
}

impl Liveness {
    fn status(&self, known: &Known) -> i32 {
        let record = &known.record;
        if record.disconnected_at_ms != 0 {
            return if record.stopped { STOPPED } else { LOST };
        }
        if known.node_gone {
            return LOST;
        }
        let patience = self.heartbeat * MISSED + WRITE_DELAY;
        let patience = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        if self.now_ms.saturating_sub(seen_ms(known)) <= patience {
            RUNNING
        } else {
            LOST
        }
    }

    /// Whether the agent is connected and answers.
    #[must_use]
    pub fn is_running(&self, known: &Known) -> bool {
        self.status(known) == RUNNING
    }
}

/// A session that has just begun is a sign of life too, before the first one is noted.
fn seen_ms(known: &Known) -> u64 {
    known.seen_ms.unwrap_or(0).max(known.record.connected_at_ms)
}

fn word(status: i32) -> &'static str {
    match status {
        RUNNING => "running",
        STOPPED => "stopped",
        LOST => "lost",
        _ => "not_found",
    }
}

/// Clients match versions against `^[a-zA-Z0-9.-]+$`.
fn version(known: &Known) -> String {
    let version = &known.record.version;
    version
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-'))
        .collect()
}

/// The cloud area that an id of the form `cloud:ip` names; 0 for others.
fn cloud_of(id: &str) -> i32 {
    split_cloud_ip(id).map_or(0, |(cloud, _)| cloud.0)
}

fn run_mode(known: &Known) -> i32 {
    i32::from(known.record.run_mode != 0)
}

/// A row of `list_agent_state` for the id asked for.
#[must_use]
pub fn state(asked: &str, known: Option<&Known>, live: Liveness) -> AgentState {
    match known {
        None => AgentState {
            bk_agent_id: asked.to_owned(),
            bk_cloud_id: cloud_of(asked),
            run_mode: 1,
            status_code: NOT_FOUND,
            ..AgentState::default()
        },
        Some(known) => AgentState {
            bk_agent_id: asked.to_owned(),
            bk_cloud_id: known.record.cloud_id,
            version: version(known),
            run_mode: run_mode(known),
            status_code: live.status(known),
            report_time: seen_ms(known),
        },
    }
}

/// A row of `list_agent_info` for the id asked for.
#[must_use]
pub fn info(asked: &str, known: Option<&Known>, live: Liveness) -> AgentInfo {
    let Some(known) = known else {
        return AgentInfo {
            bk_agent_id: asked.to_owned(),
            bk_cloud_id: cloud_of(asked),
            run_mode: 1,
            status_code: NOT_FOUND,
            status: word(NOT_FOUND).to_owned(),
            last_status_code: NOT_FOUND,
            last_status: word(NOT_FOUND).to_owned(),
            conn_cycle_time: "0".to_owned(),
            ..AgentInfo::default()
        };
    };
    let record = &known.record;
    let status = live.status(known);
    let before = if status == RUNNING { LOST } else { RUNNING };
    let session_end = if record.disconnected_at_ms == 0 {
        live.now_ms
    } else {
        record.disconnected_at_ms
    };
    AgentInfo {
        bk_agent_id: asked.to_owned(),
        bk_cloud_id: record.cloud_id,
        bk_host_ip: record.addresses.first().cloned().unwrap_or_default(),
        bk_os_type: record.os.clone(),
        bk_cpu_architecture: record.arch.clone(),
        parent_ip: parent(known).0,
        parent_port: parent(known).1,
        report_time: seen_ms(known),
        version: version(known),
        cpu_rate: f64::from(known.load.cpu_permille.min(1000)) / 10.0,
        mem_rate: f64::from(known.load.mem_permille.min(1000)) / 10.0,
        cpu_num: record.cpu_num,
        mem_size: record.mem_size_mb,
        start_time: record.started_at_ms / 1000,
        last_work_time: seen_ms(known) / 1000,
        conn_cycle_time: session_end.saturating_sub(record.connected_at_ms).to_string(),
        run_mode: run_mode(known),
        status_code: status,
        status: word(status).to_owned(),
        last_status_code: before,
        last_status: word(before).to_owned(),
        remark: remark(known, live.now_ms),
    }
}

/// Host and port of the node that takes the agent's session.
fn parent(known: &Known) -> (String, u32) {
    let Some((host, port)) = known.record.server.rsplit_once(':') else {
        return (String::new(), 0);
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    (host.to_owned(), port.parse::<u16>().map_or(0, u32::from))
}

fn remark(known: &Known, now_ms: u64) -> String {
    let record = &known.record;
    let age = now_ms.saturating_sub(record.clone_at_ms);
    if record.clone_of.is_empty() || record.clone_at_ms == 0 || age > CLONE_NEWS_MS {
        return String::new();
    }
    format!("id also claimed by {}, {} s ago", record.clone_of, age / 1000)
}

/// A row of the operators' list.
#[must_use]
pub fn detail(known: &Known, live: Liveness) -> AgentDetail {
    let record = &known.record;
    AgentDetail {
        info: info(&record.agent_id, Some(known), live),
        hostname: record.hostname.clone(),
        addresses: record.addresses.clone(),
        node_id: record.node_id.clone(),
        connected_at: record.connected_at_ms,
        disconnected_at: record.disconnected_at_ms,
        disconnect_reason: record.disconnect_reason.clone(),
        running: known.load.running,
        queued: known.load.queued,
        clone_of: record.clone_of.clone(),
        clone_at: record.clone_at_ms,
        alarms: 0,
    }
}

/// A value of the old `get_agent_status`.
#[must_use]
pub fn v1_status(host: &HostRef, known: Option<&Known>, live: Liveness) -> V1AgentStatus {
    V1AgentStatus {
        ip: host.ip.clone(),
        bk_cloud_id: host.bk_cloud_id,
        bk_agent_alive: known.is_some_and(|known| live.is_running(known)).into(),
    }
}

/// A value of the old `get_agent_info`.
#[must_use]
pub fn v1_info(host: &HostRef, known: Option<&Known>) -> V1AgentInfo {
    V1AgentInfo {
        ip: host.ip.clone(),
        version: known.map(version).unwrap_or_default(),
        bk_cloud_id: host.bk_cloud_id,
        parent_ip: known.map(|known| parent(known).0).unwrap_or_default(),
        parent_port: known.map_or(0, |known| parent(known).1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::state::{AgentLoad, AgentRecord};

    const NOW: u64 = 1_700_000_000_000;

    fn live() -> Liveness {
        Liveness {
            now_ms: NOW,
            heartbeat: Duration::from_secs(30),
        }
    }

    fn known() -> Known {
        Known {
            record: AgentRecord {
                agent_id: "a".into(),
                version: "0.1.0".into(),
                run_mode: 1,
                connected_at_ms: NOW - 200_000,
                started_at_ms: NOW - 300_999,
                node_id: "node-1".into(),
                server: "10.0.0.9:28668".into(),
                ..Default::default()
            },
            seen_ms: Some(NOW - 1_000),
            load: AgentLoad {
                cpu_permille: 125,
                mem_permille: 1000,
                ..Default::default()
            },
            node_gone: false,
        }
    }

    #[test]
    fn two_means_connected_and_heard_of_lately() {
        // contract: v2-http-task#46, procmgr-agent-lifecycle#28
        let status = |change: fn(&mut Known)| {
            let mut known = known();
            change(&mut known);
            (
                state("a", Some(&known), live()).status_code,
                info("a", Some(&known), live()).status,
            )
        };
        assert_eq!(status(|_| {}), (2, "running".into()));
        assert_eq!(status(|k| k.seen_ms = Some(NOW - 92_000)), (2, "running".into()));
        assert_eq!(status(|k| k.node_gone = true), (-1, "lost".into()));
        assert_eq!(status(|k| k.seen_ms = Some(NOW - 92_001)), (-1, "lost".into()));
        assert_eq!(status(|k| k.seen_ms = Some(NOW + 5_000)), (2, "running".into()));
        assert_eq!(status(|k| k.seen_ms = None), (-1, "lost".into()));
        assert_eq!(
            status(|k| {
                k.seen_ms = None;
                k.record.connected_at_ms = NOW - 10
            }),
            (2, "running".into())
        );
        assert_eq!(status(|k| k.record.disconnected_at_ms = NOW - 10), (-1, "lost".into()));
        assert_eq!(
            status(|k| {
                k.record.disconnected_at_ms = NOW - 10;
                k.record.stopped = true
            }),
            (6, "stopped".into())
        );
        assert_eq!(state("a", None, live()).status_code, -2);
    }

    #[test]
    fn units_and_words_of_the_information_row() {
        // contract: v2-http-task#50, procmgr-agent-lifecycle#30
        let row = info("0:10.0.0.1", Some(&known()), live());
        assert_eq!(row.bk_agent_id, "0:10.0.0.1");
        assert_eq!((row.report_time, row.start_time), (NOW - 1_000, (NOW - 300_999) / 1000));
        assert_eq!(
            (row.conn_cycle_time.as_str(), row.last_work_time),
            ("200000", (NOW - 1_000) / 1000)
        );
        assert_eq!((row.cpu_rate, row.mem_rate), (12.5, 100.0));
        assert_eq!((row.parent_ip.as_str(), row.parent_port), ("10.0.0.9", 28668));
        assert_eq!(info("7:10.0.0.1", None, live()).bk_cloud_id, 7);
    }

    #[test]
    fn versions_and_modes_are_what_clients_can_read() {
        // contract: v2-http-task#49
        let mut agent = known();
        agent.record.version = "v1.2_β 3-rc.1".into();
        let row = state("a", Some(&agent), live());
        assert_eq!((row.version.as_str(), row.run_mode), ("v1.23-rc.1", 1));
        agent.record.run_mode = 0;
        assert_eq!(state("a", Some(&agent), live()).run_mode, 0);
    }

    #[test]
    fn a_clone_is_news_for_a_day() {
        let mut agent = known();
        agent.record.clone_of = "10.0.0.66 abcdef".into();
        agent.record.clone_at_ms = NOW - 61_500;
        assert_eq!(
            info("a", Some(&agent), live()).remark,
            "id also claimed by 10.0.0.66 abcdef, 61 s ago"
        );
        agent.record.clone_at_ms = NOW - CLONE_NEWS_MS - 1;
        assert_eq!(info("a", Some(&agent), live()).remark, "");
    }
}
