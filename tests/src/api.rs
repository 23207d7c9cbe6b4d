//! The HTTP API as a platform's client uses it.

use std::time::{Duration, Instant};

use bytes::Bytes;
use gse_core::http::{ClientConfig, HttpClient};
use http::{HeaderMap, HeaderValue};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Path family that current platforms use.
pub const EXT: &str = "/api/v2/task/extensions";

/// A client of one front door.
#[derive(Clone)]
pub struct Api {
    /// `host:port`.
    pub address: String,
    headers: HeaderMap,
    client: HttpClient,
}

/// Checks the end that a row tells of.
///
/// # Panics
/// When it tells of another one.
pub fn expect(row: &Value, error_code: i64, status: i64) {
    assert_eq!(
        (row["error_code"].as_i64(), row["status"].as_i64()),
        (Some(error_code), Some(status)),
        "{row}"
    );
}

/// Body of a submit with one script, the way bk-job makes it.
#[must_use]
pub fn script_body(agents: &[&str], user: &str, content: &str, timeout_s: i64) -> Value {
    let name = format!("bk_gse_script_{:016x}.sh", rand::random::<u64>());
    let dir = format!("/tmp/bkgse-tests/{user}");
    json!({
        "agents": agents.iter().map(|id| json!({"bk_agent_id": id, "user": user})).collect::<Vec<_>>(),
        "scripts": [{"script_name": name, "script_store_dir": dir, "script_content": content}],
        "atomicTaskNum": 0,
        "atomic_tasks": [{"atomic_task_id": 0, "command": format!("{dir}/{name}"), "timeout_seconds": timeout_s}],
    })
}

impl Api {
    /// A client that authenticates as an application the way bk-job does.
    ///
    /// # Panics
    /// When the client can't be made.
    #[must_use]
    pub fn new(address: &str, app: &str, secret: &str) -> Self {
        let mut headers = HeaderMap::new();
        let credentials = json!({"bk_app_code": app, "bk_app_secret": secret}).to_string();
        headers.insert(
            "x-bkapi-authorization",
            HeaderValue::from_str(&credentials).expect("plain text"),
        );
        headers.insert("x-bk-tenant-id", HeaderValue::from_static("default"));
        headers.insert("blueking-language", HeaderValue::from_static("en"));
        Self {
            address: address.into(),
            headers,
            client: HttpClient::new(&ClientConfig::default()).expect("a plain HTTP client"),
        }
    }

    /// The same without one header.
    #[must_use]
    pub fn without(mut self, header: &str) -> Self {
        self.headers.remove(header);
        self
    }

    /// The same with a header.
    ///
    /// # Panics
    /// When the value is not one.
    #[must_use]
    pub fn with(mut self, header: &'static str, value: &str) -> Self {
        self.headers
            .insert(header, HeaderValue::from_str(value).expect("a header value"));
        self
    }

    /// The same caller with connections of its own.
    ///
    /// # Panics
    /// When the client can't be made.
    #[must_use]
    pub fn anew(mut self) -> Self {
        self.client = HttpClient::new(&ClientConfig::default()).expect("a plain HTTP client");
        self
    }

    /// The same caller at another front door.
    #[must_use]
    pub fn at(mut self, address: &str) -> Self {
        self.address = address.into();
        self
    }

    /// Posts JSON; the answer is the whole envelope, which is checked for what always holds.
    ///
    /// # Panics
    /// When there is no answer or it is not an envelope.
    pub async fn post(&self, path: &str, body: &Value) -> Value {
        self.post_text(path, &body.to_string()).await
    }

    /// Posts any text.
    ///
    /// # Panics
    /// When there is no answer or it is not an envelope.
    pub async fn post_text(&self, path: &str, body: &str) -> Value {
        let url = format!("http://{}{path}", self.address);
        let reply = self
            .client
            .post_json(
                &url,
                self.headers.clone(),
                Bytes::copy_from_slice(body.as_bytes()),
                Duration::from_secs(60),
            )
            .await
            .unwrap_or_else(|error| panic!("{path}: {error}"));
        assert_eq!(reply.status, 200, "{path}");
        envelope(path, &reply.body)
    }

    /// Posts JSON; `None` when there is no answer, as of a server that is gone.
    ///
    /// # Panics
    /// When an answer is not an envelope.
    pub async fn try_post(&self, path: &str, body: &Value) -> Option<Value> {
        let url = format!("http://{}{path}", self.address);
        let body = Bytes::from(body.to_string());
        let call = self
            .client
            .post_json(&url, self.headers.clone(), body, Duration::from_secs(60));
        let reply = call.await.ok()?;
        Some(envelope(path, &reply.body))
    }

    /// Submits; the task id, or the code of the refusal. `None` when there is no answer.
    pub async fn try_submit(&self, body: &Value) -> Option<Result<String, i64>> {
        let reply = self.try_post(&format!("{EXT}/async_execute_script"), body).await?;
        match reply["code"].as_i64() {
            Some(0) => Some(Ok(reply["data"]["result"]["task_id"]
                .as_str()
                .unwrap_or_default()
                .to_owned())),
            code => Some(Err(code.unwrap_or(-1))),
        }
    }

    /// Submits and gives the task id.
    ///
    /// # Panics
    /// When the submit is refused.
    pub async fn submit(&self, body: &Value) -> String {
        let reply = self.post(&format!("{EXT}/async_execute_script"), body).await;
        assert_eq!(reply["code"], 0, "{reply}");
        let id = reply["data"]["result"]["task_id"]
            .as_str()
            .expect("a task id")
            .to_owned();
        assert!(!id.is_empty() && id.len() <= 64, "{id:?}");
        id
    }

    /// Rows of atomic task 0 from offset 0.
    pub async fn rows(&self, task: &str, agents: &[&str]) -> Vec<Value> {
        let queries: Vec<Value> = agents
            .iter()
            .map(|id| json!({"bk_agent_id": id, "atomic_tasks": [{"atomic_task_id": 0, "offset": 0}]}))
            .collect();
        self.query(task, &queries).await
    }

    /// Rows for any queries.
    ///
    /// # Panics
    /// When the query is refused or a row breaks what holds for all rows.
    pub async fn query(&self, task: &str, agent_tasks: &[Value]) -> Vec<Value> {
        let body = json!({"task_id": task, "agent_tasks": agent_tasks});
        let reply = self.post(&format!("{EXT}/get_execute_script_result"), &body).await;
        assert_eq!(reply["code"], 0, "{reply}");
        let rows = reply["data"]["result"].as_array().expect("rows").clone();
        for row in &rows {
            check_row(row);
        }
        rows
    }

    /// Rows as [`Api::rows`]; `None` while that is refused or there is no answer.
    pub async fn try_rows(&self, task: &str, agents: &[&str]) -> Option<Vec<Value>> {
        let queries: Vec<Value> = agents
            .iter()
            .map(|id| json!({"bk_agent_id": id, "atomic_tasks": [{"atomic_task_id": 0, "offset": 0}]}))
            .collect();
        let body = json!({"task_id": task, "agent_tasks": queries});
        let reply = self
            .try_post(&format!("{EXT}/get_execute_script_result"), &body)
            .await?;
        if reply["code"] != 0 {
            return None;
        }
        let rows = reply["data"]["result"].as_array()?.clone();
        rows.iter().for_each(check_row);
        Some(rows)
    }

    /// Polls until every row is terminal, through times in which there is no answer.
    ///
    /// # Panics
    /// When they are not within `limit`.
    pub async fn finished_at_last(&self, task: &str, agents: &[&str], limit: Duration) -> Vec<Value> {
        let started = Instant::now();
        loop {
            let rows = self.try_rows(task, agents).await;
            if let Some(rows) = &rows
                && rows.iter().all(|row| row["error_code"] != 115)
            {
                return rows.clone();
            }
            assert!(
                started.elapsed() < limit,
                "{task} is not finished within {limit:?}: {rows:?}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Polls until every row is terminal.
    ///
    /// # Panics
    /// When they are not within `limit`.
    pub async fn finished(&self, task: &str, agents: &[&str], limit: Duration) -> Vec<Value> {
        let started = Instant::now();
        loop {
            let rows = self.rows(task, agents).await;
            if rows.iter().all(|row| row["error_code"] != 115) {
                return rows;
            }
            assert!(started.elapsed() < limit, "not finished within {limit:?}: {rows:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Submits one script to one agent and waits for its row.
    ///
    /// # Panics
    /// When it does not end within a minute.
    pub async fn run(&self, agent: &str, user: &str, content: &str, timeout_s: i64) -> Value {
        let task = self.submit(&script_body(&[agent], user, content, timeout_s)).await;
        self.finished(&task, &[agent], Duration::from_secs(60)).await.remove(0)
    }

    /// Asks for the end of a task.
    ///
    /// # Panics
    /// When that is refused.
    pub async fn terminate(&self, task: &str, agents: &Value) {
        let body = json!({"task_id": task, "agents": agents});
        let reply = self.post(&format!("{EXT}/async_terminate_execute_script"), &body).await;
        assert_eq!(reply["code"], 0, "{reply}");
        assert!(reply["data"]["result"]["task_id"].is_string(), "{reply}");
    }

    /// The `list_agent_state` row of one agent.
    pub async fn agent_state(&self, id: &str) -> Value {
        let reply = self
            .post("/api/v2/cluster/list_agent_state", &json!({"agent_id_list": [id]}))
            .await;
        reply["data"][0].clone()
    }

    /// Sends raw bytes and reads until the other side is done or nothing comes for a second.
    ///
    /// # Panics
    /// When there is no connection.
    pub async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = tokio::net::TcpStream::connect(&self.address)
            .await
            .expect("a connection");
        // The other side may close before it has read everything; what it says is what counts.
        let _ = stream.write_all(bytes).await;
        let mut answer = Vec::new();
        let mut chunk = [0; 4096];
        while let Ok(Ok(n)) = tokio::time::timeout(Duration::from_secs(15), stream.read(&mut chunk)).await {
            if n == 0 {
                break;
            }
            answer.extend_from_slice(&chunk[..n]);
            if answer.ends_with(b"}") {
                break;
            }
        }
        String::from_utf8_lossy(&answer).into_owned()
    }
}

/// Reads an envelope and checks what holds for every one.
///
/// # Panics
/// When it does not.
// contract: v2-http-task#2, v2-http-task#3, v2-http-task#53
#[must_use]
pub fn envelope(path: &str, body: &[u8]) -> Value {
    let value: Value = serde_json::from_slice(body)
        .unwrap_or_else(|error| panic!("{path}: not JSON ({error}): {}", String::from_utf8_lossy(body)));
    assert!(value["code"].is_i64(), "{path}: {value}");
    assert!(value["message"].is_string(), "{path}: {value}");
    assert!(!value["data"].is_null(), "{path}: {value}");
    if let Some(result) = value.get("result") {
        assert_eq!(result.as_bool(), Some(value["code"] == 0), "{path}: {value}");
    }
    value
}

/// What holds for every script row, finished or not.
///
/// # Panics
/// When it does not.
// contract: v2-http-task#9, v2-http-task#11-13
pub fn check_row(row: &Value) {
    for field in [
        "atomic_task_id",
        "status",
        "error_code",
        "script_exit_code",
        "start_time",
        "end_time",
    ] {
        assert!(row[field].is_i64(), "{field}: {row}");
    }
    for field in ["bk_agent_id", "bk_container_id", "error_msg", "tag", "screen"] {
        assert!(row[field].is_string(), "{field}: {row}");
    }
    let (code, status) = (row["error_code"].as_i64(), row["status"].as_i64().unwrap_or(-1));
    assert!((0..=6).contains(&status), "{row}");
    assert!(!(code == Some(0) && status == 0), "{row}");
    assert_eq!(code == Some(115), status < 2, "{row}");
    if status >= 2 {
        assert!(row["end_time"].as_i64() > Some(0), "{row}");
        assert_eq!(
            status == 2,
            row["script_exit_code"] == 0,
            "only success has exit code 0: {row}"
        );
    }
}
