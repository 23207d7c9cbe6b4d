//! What callers read: the rows of a task, all of them or those of some endpoints.

use std::collections::{BTreeMap, HashSet};

use gse_proto::codes::Inner;
use gse_proto::http::{TaskStateResult, TransferResultQuery};
use gse_proto::xfer::Endpoint;
use serde::Serialize;

use super::layout::{Place, subject};
use super::run::View;
use super::store::Known;

/// Which rows are wanted.
#[derive(Debug, Default)]
pub struct Filter {
    endpoints: HashSet<(String, String)>,
    ids: HashSet<String>,
}

impl Filter {
    /// What a query asks for; nothing named: everything.
    #[must_use]
    pub fn of(query: &TransferResultQuery) -> Self {
        Self {
            endpoints: query
                .agents
                .iter()
                .map(|agent| {
                    let container = agent.container().unwrap_or_default();
                    (agent.bk_agent_id.clone(), container.to_owned())
                })
                .collect(),
            ids: query.agent_id_list.iter().cloned().collect(),
        }
    }

    fn has(&self, endpoint: &Endpoint) -> bool {
        (self.endpoints.is_empty() && self.ids.is_empty())
            || self.ids.contains(&endpoint.agent_id)
            || self
                .endpoints
                .contains(&(endpoint.agent_id.clone(), endpoint.container_id.clone()))
    }
}

/// [`gse_proto::http::TransferRow`] without copies.
#[derive(Serialize)]
struct Row<'a> {
    error_code: i32,
    error_msg: String,
    content: Content<'a>,
}

#[derive(Serialize)]
struct Content<'a> {
    mode: u8,
    #[serde(rename = "type")]
    kind: &'static str,
    source_agent_id: &'a str,
    source_container_id: &'a str,
    source_file_dir: &'a str,
    source_file_name: &'a str,
    dest_agent_id: &'a str,
    dest_container_id: &'a str,
    dest_file_dir: &'a str,
    dest_file_name: &'a str,
    progress: u32,
    size: u64,
    speed: u64,
    status: i32,
    status_info: &'static str,
    start_time: u64,
    end_time: u64,
    protover: u32,
}

#[derive(Serialize)]
struct Rows<'a> {
    version: &'static str,
    result: Vec<Row<'a>>,
}

fn word(view: &View) -> &'static str {
    match (view.status, view.code) {
        (500, _) => "transferring",
        (508, _) => "verifying",
        (_, 0) => "finished",
        (_, 126) => "terminated",
        (_, 120) => "time-out",
        _ => "failed",
    }
}

/// `data` of a result query.
///
/// # Errors
/// When it can't be written as JSON.
pub fn json(known: &Known, filter: &Filter, view: impl Fn(u32) -> View) -> serde_json::Result<Vec<u8>> {
    let nobody = Endpoint::default();
    let mut rows = Vec::new();
    for row in 0..known.layout.rows() {
        let Some(subject) = subject(&known.header, &known.layout, row) else {
            continue;
        };
        if !filter.has(subject.endpoint) {
            continue;
        }
        let view = view(row);
        let source = subject
            .upload
            .and_then(|upload| upload.source.as_ref())
            .unwrap_or(&nobody);
        let (source_dir, source_name) = subject
            .upload
            .map_or(("", ""), |upload| (upload.dir.as_str(), upload.name.as_str()));
        let target = subject.group.map_or(&nobody, |_| subject.endpoint);
        let is_upload = matches!(known.layout.place(row), Some(Place::Upload(_)));
        let status_info = word(&view);
        rows.push(Row {
            error_code: view.code,
            error_msg: view.message,
            content: Content {
                mode: u8::from(!is_upload),
                kind: if is_upload { "upload" } else { "download" },
                source_agent_id: &source.agent_id,
                source_container_id: &source.container_id,
                source_file_dir: source_dir,
                source_file_name: source_name,
                dest_agent_id: &target.agent_id,
                dest_container_id: &target.container_id,
                dest_file_dir: subject.group.map_or("", |group| group.dir.as_str()),
                dest_file_name: subject.group.map_or("", |group| {
                    if group.name.is_empty() {
                        source_name
                    } else {
                        &group.name
                    }
                }),
                progress: view.progress,
                size: view.size,
                speed: view.rate / 1024,
                status: view.status,
                status_info,
                start_time: view.start_ms,
                end_time: view.end_ms,
                protover: 2,
            },
        });
    }
    serde_json::to_vec(&Rows {
        version: "v2",
        result: rows,
    })
}

/// State of a task as a whole, by the rows that `asked` endpoints own (none: all).
#[must_use]
pub fn state(known: &Known, asked: &[String], view: impl Fn(u32) -> View) -> TaskStateResult {
    let asked: HashSet<&str> = asked.iter().map(String::as_str).collect();
    // The worst of an agent's rows is what it is.
    let mut agents: BTreeMap<&str, (u8, i32)> = BTreeMap::new();
    for row in 0..known.layout.rows() {
        let Some(subject) = subject(&known.header, &known.layout, row) else {
            continue;
        };
        let id = subject.endpoint.agent_id.as_str();
        if !asked.is_empty() && !asked.contains(id) {
            continue;
        }
        let code = view(row).code;
        let rank = match code {
            0 => 0,
            code if code == Inner::Running.code() => 4,
            code if code == Inner::AgentOffline.code() => 1,
            code if code == Inner::Timeout.code() => 2,
            _ => 3,
        };
        let entry = agents.entry(id).or_insert((0, 0));
        if rank > entry.0 {
            *entry = (rank, code);
        }
    }
    let of = |rank: u8| -> Vec<String> {
        agents
            .iter()
            .filter(|(_, (own, _))| *own == rank)
            .map(|(id, _)| (*id).to_owned())
            .collect()
    };
    let has = |rank: u8| agents.values().any(|(own, _)| *own == rank);
    let word = match () {
        () if has(4) => "executing",
        () if has(3) || has(1) => "failed",
        () if has(2) => "timeout",
        () => "successed",
    };
    TaskStateResult {
        state: word.into(),
        successed_agents: of(0),
        timeout_agents: of(2),
        failed_agents: of(3),
        pending_agents: of(4),
        offline_agents: of(1),
        restarted_agents: vec![],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::layout::{Layout, tests::header};
    use gse_proto::http::{AgentEndpoint, RowsReply, TransferRow};
    use std::sync::Arc;

    fn known() -> Known {
        let mut header = header();
        header.uploads[0].name = "a*".into();
        header.groups[1].name = "new".into();
        Known {
            layout: Arc::new(Layout::new(&header)),
            header: Arc::new(header),
        }
    }

    fn rows(filter: &Filter) -> Vec<TransferRow> {
        let json = json(&known(), filter, |_| View::open()).unwrap();
        serde_json::from_slice::<RowsReply<TransferRow>>(&json).unwrap().result
    }

    #[test]
    fn rows_echo_what_was_asked() {
        // contract: v2-http-task#31, v2-http-task#32, v2-http-task#33
        let all = rows(&Filter::default());
        assert_eq!(all.len(), 8);
        let upload = &all[0].content;
        assert_eq!(
            (upload.mode, upload.kind.as_str(), upload.dest_agent_id.as_str()),
            (0, "upload", "")
        );
        for row in &all {
            assert_eq!(
                (row.content.mode == 0, row.error_code),
                (row.content.kind == "upload", 115)
            );
            assert_eq!(
                (
                    row.content.source_agent_id.as_str(),
                    row.content.source_file_dir.as_str()
                ),
                ("src", "/data")
            );
        }
        let download = &all[2].content;
        assert_eq!(
            (
                download.source_file_name.as_str(),
                download.dest_agent_id.as_str(),
                download.dest_file_dir.as_str(),
                download.dest_file_name.as_str()
            ),
            ("a*", "x", "/t/", "a*")
        );
        assert_eq!(all[5].content.dest_file_name, "new");
    }

    #[test]
    fn a_filter_means_the_endpoint_that_owns_the_row() {
        // contract: v2-http-task#41
        let agent = |id: &str, container: &str| AgentEndpoint {
            bk_agent_id: id.into(),
            bk_container_id: container.into(),
            ..AgentEndpoint::default()
        };
        let of = |agents: Vec<AgentEndpoint>, ids: &[&str]| {
            let query = TransferResultQuery {
                agents,
                agent_id_list: ids.iter().map(|id| (*id).to_owned()).collect(),
                ..TransferResultQuery::default()
            };
            rows(&Filter::of(&query)).len()
        };
        assert_eq!(of(vec![agent("src", "")], &[]), 2);
        assert_eq!(of(vec![agent("x", "0000")], &[]), 2);
        assert_eq!(of(vec![agent("x", "ab")], &[]), 0);
        assert_eq!(of(vec![], &["z", "nobody"]), 2);
        assert_eq!(of(vec![agent("src", ""), agent("y", "")], &["z"]), 6);
        assert_eq!(of(vec![], &[]), 8);
    }

    #[test]
    fn the_state_of_a_whole_task() {
        let known = known();
        let codes = [0, 0, 0, 117, 120, 0, 0, 0];
        let over = |row: u32| View {
            code: codes[row as usize],
            ..View::open()
        };
        let state = state(&known, &[], over);
        assert_eq!(
            (state.state.as_str(), state.offline_agents.as_slice()),
            ("failed", &["y".to_owned()][..])
        );
        assert_eq!(state.timeout_agents, ["z"]);
        assert_eq!(state.successed_agents, ["src", "x"]);
        let some = super::state(&known, &["x".to_owned()], over);
        assert_eq!(some.state, "successed");
    }
}
