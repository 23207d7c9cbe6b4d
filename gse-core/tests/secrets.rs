//! Secrets planted in requests are looked for in everything that is written down. A test program of its own, because it listens to the
//! log of the whole process at every level.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gse_core::audit::{Audit, AuditConfig};
use gse_core::authz::{AppEntry, Authenticator, AuthzConfig};
use gse_core::http::{ApiError, ContractRequest, Front, HttpConfig, HttpMetrics, Reply, Service, serve};
use gse_core::lifecycle::Lifecycle;
use gse_proto::http::{ExecuteScript, Route};
use prometheus_client::registry::Registry;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tracing_subscriber::fmt::MakeWriter;

const SECRET: &str = "canary-7f3a9c-secret";
const PWD: &str = "canary-pwd-51d0";

#[derive(Clone, Default)]
struct Logged(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no writer panics").extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Logged {
    type Writer = Logged;
    fn make_writer(&'a self) -> Logged {
        self.clone()
    }
}

struct Careless;

impl Service for Careless {
    fn serves(&self, _: Route) -> bool {
        true
    }

    async fn call(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        let body: ExecuteScript = request.decode().await?;
        tracing::info!(?request, "a service that prints all it has been given");
        assert_ne!(body.agents.len(), 2, "a panic, too");
        Reply::json(&serde_json::json!({"result": {"task_id": "t"}}))
    }
}

async fn send(address: SocketAddr, credentials: &str, body: &str) -> String {
    let length = body.len();
    let request = format!(
        "POST /api/v2/task/async_execute_script HTTP/1.1\r\nHost: gse\r\nConnection: close\r\n{credentials}Content-Length: {length}\r\n\r\n{body}"
    );
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    stream.write_all(request.as_bytes()).await.expect("it is sent");
    let mut answer = String::new();
    tokio::time::timeout(Duration::from_secs(20), stream.read_to_string(&mut answer))
        .await
        .expect("in time")
        .expect("an answer");
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_reach_neither_log_nor_audit_nor_metrics() {
    let logged = Logged::default();
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(logged.clone())
        .init();
    let dir = tempfile::TempDir::new().unwrap();
    let audit_file = dir.path().join("audit.jsonl");
    let app = |code: &str, operation: &str| AppEntry {
        code: code.into(),
        secret_sha256: Some(hex::encode(Sha256::digest(SECRET))),
        operations: vec![operation.into()],
        ..AppEntry::default()
    };
    let authz = AuthzConfig {
        apps: vec![app("bk_job", "*"), app("watcher", "agent.state")],
        ..AuthzConfig::default()
    };
    let mut registry = Registry::default();
    let front = Front {
        authenticator: Authenticator::new(&authz).unwrap(),
        audit: Audit::open(&AuditConfig {
            file: Some(audit_file.clone()),
            ..AuditConfig::default()
        })
        .unwrap(),
        metrics: HttpMetrics::new(&mut registry),
    };
    tracing::info!(?authz, ?front, "settings, printed");
    let life = Lifecycle::new("test");
    let address = serve(&HttpConfig::default(), "http", None, Arc::new(Careless), &front, &life)
        .await
        .unwrap();

    let json = |code: &str, secret: &str| {
        format!("X-Bkapi-Authorization: {{\"bk_app_code\":\"{code}\",\"bk_app_secret\":{secret}}}\r\n")
    };
    let quoted = format!("\"{SECRET}\"");
    let agent = format!("{{\"bk_agent_id\":\"a\",\"user\":\"u\",\"pwd\":\"{PWD}\"}}");
    let mut answers = Vec::new();
    for credentials in [
        json("bk_job", &quoted),
        json("watcher", &quoted),
        json("nobody", &quoted),
        json("bk_job", &format!("[{quoted}]")),
        format!("X-Bkapi-App-Code: bk_job\r\nX-Bkapi-App-Secret: {SECRET}\r\n"),
        format!("X-Bkapi-App-Code: watcher\r\nX-Bkapi-App-Secret: {SECRET}{SECRET}\r\n"),
        format!("X-Bkapi-JWT: {SECRET}.{SECRET}.{SECRET}\r\n"),
        format!("Authorization: Bearer {SECRET}\r\n"),
    ] {
        for body in [
            format!("{{\"agents\":[{agent}]}}"),
            format!("{{\"agents\":[{agent},{agent}]}}"),
            format!("{{\"agents\":[{{\"bk_agent_id\":[\"{PWD}\"]}}]}}"),
            format!("{{\"agents\":[{agent}"),
        ] {
            let answer = send(address, &credentials, &body).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            assert!(!answer.contains(SECRET), "{answer}");
            answers.push(answer);
        }
    }
    for code in [
        "\"code\":0,",
        "\"code\":1000101,",
        "\"code\":1000106,",
        "\"code\":1000901,",
        "\"code\":1000903,",
    ] {
        assert!(
            answers.iter().any(|answer| answer.contains(code)),
            "no answer had {code}: {answers:?}"
        );
    }
    let mut metrics = String::new();
    prometheus_client::encoding::text::encode(&mut metrics, &registry).unwrap();
    let log = String::from_utf8(logged.0.lock().unwrap().clone()).unwrap();
    for expected in [
        "DEBUG",
        "settings, printed",
        "prints all it has been given",
        "refused an unauthenticated call",
        "a call panicked",
    ] {
        assert!(
            log.contains(expected),
            "{expected:?} was not logged, so nothing was shown"
        );
    }
    let audit = std::fs::read_to_string(&audit_file).unwrap();
    for (name, text) in [("log", log), ("audit", audit), ("metrics", metrics)] {
        assert!(!text.is_empty(), "{name}");
        for canary in [SECRET, PWD] {
            if let Some(at) = text.find(canary) {
                let from = text.floor_char_boundary(at.saturating_sub(300));
                panic!("{name} holds a secret: …{}", &text[from..at + canary.len()]);
            }
        }
    }
    life.drain();
    assert!(life.finished(Duration::from_secs(10)).await);
}
