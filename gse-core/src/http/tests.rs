//! The pipeline over real sockets, most of it by a client that writes bytes and looks at bytes.

mod failures;
mod limits;
mod trust;
mod wire;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hyper::body::Body;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;
use crate::audit::{AuditConfig, verify};
use crate::authz::{AppEntry, AuthzConfig};
use crate::lifecycle::Lifecycle;

const EXECUTE: &str = "/api/v2/task/extensions/async_execute_script";
const RESULT: &str = "/api/v2/task/extensions/get_execute_script_result";
const STATE: &str = "/api/v2/cluster/list_agent_state";
const TRANSFER: &str = "/api/v2/task/extensions/async_transfer_file";
const V1_STATUS: &str = "/api/c/compapi/v2/gse/get_agent_status";
const SECRET: &str = "canary-7f3a9c-secret";
const MIB: usize = 1024 * 1024;

/// Does what the body says.
#[derive(Default)]
struct Obedient {
    finished: AtomicUsize,
    /// Large answers that have not gone out.
    owed: Arc<AtomicUsize>,
}

/// Data of an answer that says when it is let go.
struct Owed {
    text: String,
    owed: Arc<AtomicUsize>,
}

impl Owed {
    fn bytes(text: String, owed: &Arc<AtomicUsize>) -> Bytes {
        owed.fetch_add(1, Ordering::SeqCst);
        Bytes::from_owner(Owed {
            text,
            owed: Arc::clone(owed),
        })
    }
}

impl AsRef<[u8]> for Owed {
    fn as_ref(&self) -> &[u8] {
        self.text.as_bytes()
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        self.owed.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(serde::Deserialize)]
struct Order {
    #[serde(default)]
    r#do: String,
    #[serde(default)]
    n: u64,
}

impl Service for Obedient {
    fn serves(&self, route: Route) -> bool {
        route != Route::PushFile
    }

    fn streams(&self, route: Route) -> bool {
        route == Route::TransferFile
    }

    async fn call(&self, mut request: ContractRequest) -> Result<Reply, ApiError> {
        if let Some(mut stream) = request.stream.take() {
            let mut bytes = 0;
            while let Some(frame) = http_body_util::BodyExt::frame(&mut stream).await {
                let frame = frame.map_err(|error| ApiError::arguments(error.to_string()))?;
                bytes += frame.data_ref().map_or(0, Bytes::len);
            }
            let mut response = http::Response::new(full(format!("{{\"code\":0,\"streamed\":{bytes}}}")));
            response
                .headers_mut()
                .insert("content-type", http::HeaderValue::from_static("application/json"));
            return Ok(Reply::Raw(response));
        }
        let order: Order = request.decode().await?;
        match order.r#do.as_str() {
            "panic" => panic!("as ordered"),
            "sleep" => tokio::time::sleep(Duration::from_millis(order.n)).await,
            "large" => {
                let text = format!("[{}0]", "0,".repeat(order.n as usize / 2));
                return Ok(Reply::Data(Owed::bytes(text, &self.owed)));
            }
            "fail" => {
                return Err(ApiError {
                    data: Some("{\"result\":{\"task_id\":\"t\"}}".into()),
                    ..Code::NoSuchTask.into()
                });
            }
            _ => {}
        }
        self.finished.fetch_add(1, Ordering::SeqCst);
        match request.route {
            Route::ListAgentState => Reply::json::<[u8; 0]>(&[]),
            _ => Reply::json(&json!({
                "result": {"task_id": "t-1"}, "bytes": request.body.len(), "app": request.caller.app, "via": request.caller.via.to_string(),
                "user": request.caller.username, "tenant": request.tenant,
                "leaked": request.headers.iter().any(|(_, value)| value.as_bytes().windows(SECRET.len()).any(|part| part == SECRET.as_bytes())),
            })),
        }
    }
}

struct Site {
    dir: TempDir,
    life: Lifecycle,
    address: SocketAddr,
    service: Arc<Obedient>,
    registry: Registry,
}

fn quick() -> HttpConfig {
    HttpConfig {
        max_body_bytes: MIB,
        max_inflight_body_bytes: 8 * MIB,
        header_timeout_ms: 600,
        body_timeout_ms: 1_000,
        request_timeout_ms: 2_000,
        idle_timeout_ms: 2_000,
        ..HttpConfig::default()
    }
}

fn apps() -> Vec<AppEntry> {
    let app = |code: &str, operations: &[&str]| AppEntry {
        code: code.into(),
        secret_sha256: Some(hex::encode(<sha2::Sha256 as sha2::Digest>::digest(SECRET))),
        operations: operations.iter().map(|name| (*name).to_owned()).collect(),
        ..AppEntry::default()
    };
    vec![app("bk_job", &["*"]), app("watcher", &["agent.state"])]
}

impl Site {
    async fn start(config: HttpConfig) -> Self {
        Self::start_with(
            config,
            AuthzConfig {
                apps: apps(),
                ..AuthzConfig::default()
            },
            None,
        )
        .await
    }

    async fn start_with(config: HttpConfig, authz: AuthzConfig, internal: Option<InternalTls>) -> Self {
        let dir = TempDir::new().unwrap();
        let life = Lifecycle::new("test");
        let audit = Audit::open(&AuditConfig {
            file: Some(dir.path().join("audit.jsonl")),
            ..AuditConfig::default()
        })
        .unwrap();
        let mut registry = Registry::default();
        let front = Front {
            authenticator: Authenticator::new(&authz).unwrap(),
            audit,
            metrics: HttpMetrics::new(&mut registry),
        };
        let service = Arc::new(Obedient::default());
        let address = serve(&config, "http", internal, Arc::clone(&service), &front, &life)
            .await
            .unwrap();
        life.ready();
        assert_eq!(life.wait_ready().await["http"], address.to_string());
        Site {
            dir,
            life,
            address,
            service,
            registry,
        }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// One request on a connection of its own.
    async fn send(&self, request: &[u8]) -> Answered {
        let mut stream = self.connect().await;
        stream.write_all(request).await.unwrap();
        read_answer(&mut stream).await
    }

    async fn post(&self, path: &str, body: &str) -> Answered {
        self.send(&post(path, body)).await
    }

    fn audit_text(&self) -> String {
        let file = self.dir.path().join("audit.jsonl");
        verify(&file).unwrap();
        std::fs::read_to_string(file).unwrap()
    }

    fn metrics_text(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }
}

#[derive(Debug)]
struct Answered {
    status: u16,
    headers: BTreeMap<String, String>,
    text: String,
}

impl Answered {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The envelope as every client of the contract needs it; returns its message.
    #[track_caller]
    fn envelope(&self, code: Code, data: Value) -> String {
        // contract: v2-http-task#2, v2-http-task#3, v2-http-task#53
        assert_eq!(self.status, 200, "{self:?}");
        assert_eq!(self.headers["content-type"], "application/json");
        let value = self.json();
        assert_eq!(value["code"].as_i64(), Some(code.code()), "{value}");
        assert_eq!(value["result"].as_bool(), Some(code == Code::Ok), "{value}");
        assert_eq!(value["data"], data, "{value}");
        assert_eq!(
            value["request_id"].as_str().unwrap(),
            self.headers["x-bkapi-request-id"]
        );
        value["message"].as_str().unwrap().to_owned()
    }
}

fn credentials(app: &str) -> String {
    format!("X-Bkapi-Authorization: {{\"bk_app_code\": \"{app}\", \"bk_app_secret\": \"{SECRET}\"}}\r\n")
}

fn head(method: &str, path: &str, more: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: gse\r\n{more}\r\n")
}

fn post(path: &str, body: &str) -> Vec<u8> {
    let more = format!(
        "{}Content-Type: application/json\r\nContent-Length: {}\r\n",
        credentials("bk_job"),
        body.len()
    );
    [head("POST", path, &more).as_bytes(), body.as_bytes()].concat()
}

async fn read_answer(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Answered {
    try_read_answer(stream).await.expect("an answer")
}

/// One answer with Content-Length; `None` if the connection ends without a byte.
async fn try_read_answer(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<Answered> {
    tokio::time::timeout(Duration::from_secs(15), async {
        let mut seen = Vec::new();
        let end = loop {
            if let Some(end) = seen.windows(4).position(|part| part == b"\r\n\r\n") {
                break end + 4;
            }
            let mut byte = [0; 1];
            match stream.read(&mut byte).await {
                Ok(1) => seen.push(byte[0]),
                Ok(_) | Err(_) if seen.is_empty() => return None,
                other => panic!(
                    "the head ends early: {other:?} after {:?}",
                    String::from_utf8_lossy(&seen)
                ),
            }
        };
        let head = String::from_utf8(seen[..end].to_vec()).unwrap();
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers: BTreeMap<String, String> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let mut body = vec![
            0;
            headers
                .get("content-length")
                .map_or(0, |length| length.parse().unwrap())
        ];
        stream.read_exact(&mut body).await.unwrap();
        Some(Answered {
            status,
            headers,
            text: String::from_utf8(body).unwrap(),
        })
    })
    .await
    .expect("an answer in time")
}

/// Whether the other end closes the connection, and how soon.
async fn closed_after(stream: &mut TcpStream) -> Duration {
    let started = std::time::Instant::now();
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(15), stream.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "the connection stays open");
    assert!(rest.is_empty(), "{:?}", String::from_utf8_lossy(&rest));
    started.elapsed()
}

#[test]
fn settings_that_cannot_work_are_named() {
    assert!(HttpConfig::default().problems().is_empty());
    let bad = HttpConfig {
        listen: String::new(),
        cert: Some("c".into()),
        header_timeout_ms: 0,
        max_inflight_body_bytes: 1,
        ..HttpConfig::default()
    };
    let text = bad.problems().join("\n");
    for part in ["cert and key", "listen", "header_timeout_ms", "max_inflight_body_bytes"] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn an_answer_knows_its_size() {
    let answer = body::Answer::whole("abc", connection::Clock::new().request());
    assert_eq!(answer.size_hint().exact(), Some(3));
    assert!(!answer.is_end_stream());
}

#[tokio::test]
async fn large_data_is_sent_as_it_is_and_let_go_with_its_last_piece() {
    let owed = Arc::new(AtomicUsize::new(0));
    let data = Owed::bytes("x".repeat(200_000), &owed);
    let memory = data.as_ptr_range();
    let activity = connection::Clock::new().request();
    let mut answer = body::Answer::around("<".into(), data, ">".into(), activity);
    assert_eq!(answer.size_hint().exact(), Some(200_002));
    let mut next = async || {
        let frame = http_body_util::BodyExt::frame(&mut answer).await?;
        Some(frame.unwrap().into_data().unwrap())
    };
    assert_eq!(next().await.unwrap(), "<");
    let mut seen = 0;
    while seen < 200_000 {
        assert_eq!(owed.load(Ordering::SeqCst), 1, "let go too early");
        let piece = next().await.unwrap();
        assert!(memory.contains(&piece.as_ptr()), "it was copied");
        seen += piece.len();
    }
    assert_eq!(
        owed.load(Ordering::SeqCst),
        0,
        "the answer holds on to what it has sent"
    );
    assert_eq!(next().await.unwrap(), ">");
    assert!(next().await.is_none() && answer.is_end_stream());
}
