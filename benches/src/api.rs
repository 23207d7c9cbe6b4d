//! The HTTP API as bk-job uses it: one submit for all targets, then polls of at most 1,000 unfinished agents at a time.

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use clap::Args;
use gse_core::http::{ClientConfig, HttpClient};
use http::{HeaderMap, HeaderValue};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::agent::{agent_id, agent_index};
use crate::site::{APP, SECRET, Site};

/// Path family that current platforms use.
const EXT: &str = "/api/v2/task/extensions";
const STATE: &str = "/api/v2/cluster/list_agent_state";
/// Agents in one query, as bk-job has it.
const QUERY: usize = 1000;
/// For one call.
const CALL: Duration = Duration::from_secs(60);
/// Bytes of the script.
const SCRIPT: usize = 256;

/// How results are polled, and how long.
#[derive(Debug, Clone, Args)]
pub(crate) struct PollOptions {
    /// Pause between polls of what is unfinished.
    #[arg(long, default_value_t = 20, value_name = "MS")]
    pub(crate) poll_ms: u64,
    /// Poll at bk-job's pace in place of that: 1 s ten times, then 2 s, then 5 s.
    #[arg(long)]
    pub(crate) as_job: bool,
    /// A round that takes longer has failed.
    #[arg(long, default_value_t = 120, value_name = "S")]
    pub(crate) round_limit_s: u64,
}

impl PollOptions {
    fn pause(&self, poll: u32) -> Duration {
        match (self.as_job, poll) {
            (false, _) => Duration::from_millis(self.poll_ms),
            (true, 1..=10) => Duration::from_secs(1),
            (true, 11..=35) => Duration::from_secs(2),
            (true, _) => Duration::from_secs(5),
        }
    }
}

/// What one round was like. Times in milliseconds from before the submit was encoded.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Round {
    /// Until the submit was answered.
    pub(crate) submit_ms: f64,
    /// Until half, 99 % and all of the rows had been seen as finished.
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) all_ms: f64,
    /// Queries sent.
    pub(crate) queries: u32,
    /// Bytes of all bodies, from and to this client.
    pub(crate) http_bytes: u64,
    /// Rows that were not what they should be.
    pub(crate) wrong_rows: u32,
    /// One of them.
    pub(crate) wrong_example: String,
}

#[derive(Deserialize)]
struct Envelope<T> {
    code: i64,
    message: String,
    data: T,
}

#[derive(Deserialize)]
struct ResultOf<T> {
    result: T,
}

#[derive(Deserialize)]
struct Submitted {
    task_id: String,
}

#[derive(Deserialize)]
struct State<'a> {
    #[serde(borrow)]
    bk_agent_id: Cow<'a, str>,
    status_code: i64,
}

#[derive(Debug, Deserialize)]
struct Row<'a> {
    #[serde(borrow)]
    bk_agent_id: Cow<'a, str>,
    status: i64,
    error_code: i64,
    error_msg: Cow<'a, str>,
    script_exit_code: i64,
    screen: Cow<'a, str>,
}

/// A caller.
pub(crate) struct Api {
    base: String,
    headers: HeaderMap,
    client: HttpClient,
}

impl Api {
    pub(crate) fn new(site: &Site) -> Result<Self> {
        Self::at(site.api()?.address("http")?)
    }

    /// A caller of the server that listens there.
    pub(crate) fn at(address: &str) -> Result<Self> {
        let mut headers = HeaderMap::new();
        let credentials = json!({"bk_app_code": APP, "bk_app_secret": SECRET}).to_string();
        headers.insert("x-bkapi-authorization", HeaderValue::from_str(&credentials)?);
        headers.insert("x-bk-tenant-id", HeaderValue::from_static("default"));
        Ok(Self {
            base: format!("http://{address}"),
            headers,
            client: HttpClient::new(&ClientConfig::default())?,
        })
    }

    pub(crate) async fn post(&self, path: &str, body: Vec<u8>) -> Result<Bytes> {
        let url = format!("{}{path}", self.base);
        let reply = self
            .client
            .post_json(&url, self.headers.clone(), Bytes::from(body), CALL)
            .await
            .with_context(|| path.to_owned())?;
        ensure!(reply.status == 200, "{path}: status {}", reply.status);
        Ok(reply.body)
    }

    /// Asks for something under [`EXT`]; what is in `data.result`.
    ///
    /// # Errors
    /// When it is refused.
    pub(crate) async fn ask(&self, call: &str, body: &serde_json::Value) -> Result<serde_json::Value> {
        let reply = self.post(&format!("{EXT}/{call}"), serde_json::to_vec(body)?).await?;
        let answer: Envelope<ResultOf<serde_json::Value>> =
            serde_json::from_slice(&reply).with_context(|| String::from_utf8_lossy(&reply).into_owned())?;
        ensure!(answer.code == 0, "{call}: {} {}", answer.code, answer.message);
        Ok(answer.data.result)
    }

    /// Runs one script on agents 0 to `agents` and polls until every row is there.
    ///
    /// # Errors
    /// When a call fails or not all rows are there in time. A row that is there but is no success is counted instead.
    pub(crate) async fn round(&self, agents: u32, output: u32, poll: &PollOptions) -> Result<Round> {
        let started = Instant::now();
        let mut round = Round::default();
        let body = submit_body(agents)?;
        round.http_bytes += body.len() as u64;
        let reply = self.post(&format!("{EXT}/async_execute_script"), body).await?;
        round.http_bytes += reply.len() as u64;
        let submitted: Envelope<ResultOf<Submitted>> =
            serde_json::from_slice(&reply).with_context(|| String::from_utf8_lossy(&reply).into_owned())?;
        ensure!(submitted.code == 0, "submit: {} {}", submitted.code, submitted.message);
        let task = submitted.data.result.task_id;
        round.submit_ms = ms(started);

        let mut seen = Vec::with_capacity(agents as usize);
        let mut unfinished: Vec<u32> = (0..agents).collect();
        for nth in 1.. {
            for chunk in unfinished.clone().chunks(QUERY) {
                self.query(&task, chunk, output, started, &mut round, &mut seen).await?;
            }
            let done: std::collections::HashSet<u32> = seen.iter().map(|(index, _)| *index).collect();
            unfinished.retain(|index| !done.contains(index));
            if unfinished.is_empty() {
                break;
            }
            if started.elapsed() > Duration::from_secs(poll.round_limit_s) {
                bail!(
                    "task {task}: {} of {agents} rows are not finished after {:?}, among them that of {}",
                    unfinished.len(),
                    started.elapsed(),
                    unfinished.first().map_or_else(String::new, |index| agent_id(*index))
                );
            }
            tokio::time::sleep(poll.pause(nth)).await;
        }
        let mut times: Vec<f64> = seen.iter().map(|(_, at)| *at).collect();
        times.sort_by(f64::total_cmp);
        round.p50_ms = percentile(&times, 50.0);
        round.p99_ms = percentile(&times, 99.0);
        round.all_ms = percentile(&times, 100.0);
        Ok(round)
    }

    /// `status_code` of agents in `list_agent_state`.
    ///
    /// # Errors
    /// When a call fails or an agent is not in the answer.
    pub(crate) async fn states(&self, agents: &[u32]) -> Result<Vec<(u32, i64)>> {
        let mut states = Vec::with_capacity(agents.len());
        for chunk in agents.chunks(QUERY) {
            let ids: Vec<String> = chunk.iter().map(|index| agent_id(*index)).collect();
            let body = serde_json::to_vec(&json!({ "agent_id_list": ids }))?;
            let reply = self.post(STATE, body).await?;
            let answer: Envelope<Vec<State<'_>>> =
                serde_json::from_slice(&reply).with_context(|| String::from_utf8_lossy(&reply).into_owned())?;
            ensure!(answer.code == 0, "{STATE}: {} {}", answer.code, answer.message);
            let found: HashMap<&str, i64> = answer
                .data
                .iter()
                .map(|state| (&*state.bk_agent_id, state.status_code))
                .collect();
            for (index, id) in chunk.iter().zip(&ids) {
                let status = found
                    .get(id.as_str())
                    .with_context(|| format!("{id} is not in the answer"))?;
                states.push((*index, *status));
            }
        }
        Ok(states)
    }

    /// Waits until agents 0 to `agents` are reported as running: a node tells the others of a new session within a second or so, and
    /// until then they do not know where to send a task.
    ///
    /// # Errors
    /// When that does not come about.
    pub(crate) async fn all_known(&self, agents: u32) -> Result<()> {
        let started = Instant::now();
        let mut missing: Vec<u32> = (0..agents).collect();
        loop {
            let states = self.states(&missing).await?;
            missing = states
                .into_iter()
                .filter(|(_, status)| *status != 2)
                .map(|(index, _)| index)
                .collect();
            if missing.is_empty() {
                return Ok(());
            }
            ensure!(
                started.elapsed() < CALL,
                "{} of {agents} connected agents are not reported as running",
                missing.len()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn query(
        &self,
        task: &str,
        agents: &[u32],
        output: u32,
        started: Instant,
        round: &mut Round,
        seen: &mut Vec<(u32, f64)>,
    ) -> Result<()> {
        let queries: Vec<_> = agents
            .iter()
            .map(|index| {
                json!({"bk_agent_id": agent_id(*index), "atomic_tasks": [{"atomic_task_id": 0, "offset": 0, "limit": 0}]})
            })
            .collect();
        let body = serde_json::to_vec(&json!({"task_id": task, "agent_tasks": queries}))?;
        round.queries += 1;
        round.http_bytes += body.len() as u64;
        let reply = self.post(&format!("{EXT}/get_execute_script_result"), body).await?;
        round.http_bytes += reply.len() as u64;
        let answer: Envelope<ResultOf<Vec<Row<'_>>>> =
            serde_json::from_slice(&reply).with_context(|| String::from_utf8_lossy(&reply).into_owned())?;
        ensure!(answer.code == 0, "query: {} {}", answer.code, answer.message);
        let rows = answer.data.result;
        ensure!(
            rows.len() == agents.len(),
            "{} rows for {} agents",
            rows.len(),
            agents.len()
        );
        let at = ms(started);
        for (row, index) in rows.iter().zip(agents) {
            ensure!(
                agent_index(&row.bk_agent_id) == Some(*index),
                "not the row asked for: {row:?}"
            );
            if row.error_code == 115 {
                continue;
            }
            seen.push((*index, at));
            let right = row.status == 2
                && row.error_code == 0
                && row.script_exit_code == 0
                && row.error_msg.is_empty()
                && row.screen.len() == output as usize;
            if !right {
                round.wrong_rows += 1;
                round.wrong_example = format!("{row:?}");
            }
        }
        Ok(())
    }
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// The smallest value that `percent` of the (sorted) values do not exceed; 0 when there are none.
pub(crate) fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let rank = (sorted.len() as f64 * percent / 100.0).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

fn submit_body(agents: u32) -> Result<Vec<u8>> {
    let name = format!("bk_gse_script_{:016x}.sh", rand::random::<u64>());
    let dir = "/tmp/bkjob/root";
    let mut script = String::from("#!/bin/sh\necho done\n");
    while script.len() < SCRIPT {
        script.push('#');
    }
    let targets: Vec<_> = (0..agents)
        .map(|index| json!({"bk_agent_id": agent_id(index), "user": "root"}))
        .collect();
    let body = json!({
        "agents": targets,
        "scripts": [{"script_name": name, "script_store_dir": dir, "script_content": script}],
        "atomicTaskNum": 0,
        "atomic_tasks": [{"atomic_task_id": 0, "command": format!("{dir}/{name}"), "timeout_seconds": 60}],
    });
    Ok(serde_json::to_vec(&body)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert!((percentile(&values, 50.0) - 100.0).abs() < f64::EPSILON);
        assert!((percentile(&values, 99.0) - 198.0).abs() < f64::EPSILON);
        assert!((percentile(&values, 100.0) - 200.0).abs() < f64::EPSILON);
        assert!((percentile(&[7.0], 1.0) - 7.0).abs() < f64::EPSILON);
        assert!(percentile(&[], 50.0).abs() < f64::EPSILON);
    }

    #[test]
    fn the_script_has_the_size_that_is_reported() {
        let body: serde_json::Value = serde_json::from_slice(&submit_body(3).unwrap()).unwrap();
        assert_eq!(body["scripts"][0]["script_content"].as_str().unwrap().len(), SCRIPT);
        assert_eq!(body["agents"].as_array().unwrap().len(), 3);
        let poll = PollOptions {
            poll_ms: 20,
            as_job: true,
            round_limit_s: 1,
        };
        assert_eq!(poll.pause(10), Duration::from_secs(1));
        assert_eq!(poll.pause(11), Duration::from_secs(2));
    }
}
