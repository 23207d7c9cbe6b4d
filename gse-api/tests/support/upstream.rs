//! Servers behind the front door: ones that say what they were asked, and ones that break off.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use gse_core::audit::Audit;
use gse_core::authz::{AppEntry, Authenticator, AuthzConfig};
use gse_core::certs::Authority;
use gse_core::http::{self, ApiError, ContractRequest, Front, HttpConfig, HttpMetrics, InternalTls, Reply, Service};
use gse_core::lifecycle::Lifecycle;
use gse_core::tls::{Role, TlsFiles};
use gse_proto::http::{Owner, Route};
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

pub struct Pki {
    dir: tempfile::TempDir,
    authority: Authority,
}

impl Pki {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(dir.path()).unwrap();
        Self { dir, authority }
    }

    pub fn issue(&self, name: &str, role: Role) -> TlsFiles {
        // A server that is started again gets a pair of its own.
        let number: u64 = rand::random();
        let file = |suffix: &str| -> PathBuf { self.dir.path().join(format!("{name}-{number:x}.{suffix}")) };
        let (cert, key) = (file("crt"), file("key"));
        self.authority.issue(role, None, &[], &cert, &key, 30).unwrap();
        TlsFiles {
            ca: self.authority.ca_path(),
            cert,
            key,
        }
    }
}

/// A service that answers with what it was asked, by whom.
pub struct Echo {
    pub name: &'static str,
    pub calls: AtomicUsize,
}

impl Service for Echo {
    fn serves(&self, route: Route) -> bool {
        route.owner() == Owner::Task
    }

    async fn call(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let body: Value = request.decode().await?;
        if let Some(ms) = body["sleep_ms"].as_u64() {
            tokio::time::sleep(Duration::from_millis(ms)).await;
        }
        if body["fail"] == true {
            return Err(ApiError::arguments("as asked"));
        }
        let filler = "x".repeat(body["filler"].as_u64().unwrap_or(0) as usize);
        Reply::json(&json!({"result": {
            "server": self.name, "app": request.caller.app, "user": request.caller.username, "via": request.caller.via.to_string(),
            "tenant": request.tenant, "request_id": request.request_id, "bytes": request.body.len(), "path": request.path, "filler": filler,
        }}))
    }
}

pub struct Task {
    pub life: Lifecycle,
    pub address: String,
    pub echo: Arc<Echo>,
}

pub async fn task(pki: &Pki, name: &'static str) -> Task {
    task_at(pki, name, "127.0.0.1:0").await
}

pub async fn task_at(pki: &Pki, name: &'static str, listen: &str) -> Task {
    task_with(pki, name, listen, |_| {}).await
}

pub async fn task_with(pki: &Pki, name: &'static str, listen: &str, change: impl FnOnce(&mut HttpConfig)) -> Task {
    let files = pki.issue(name, Role::Server);
    let life = Lifecycle::new("gse_task");
    let authz = AuthzConfig {
        apps: vec![AppEntry {
            code: "bk_job".into(),
            operations: vec!["*".into()],
            ..AppEntry::default()
        }],
        ..AuthzConfig::default()
    };
    let front = Front {
        authenticator: Authenticator::new(&authz).unwrap(),
        audit: Audit::disabled(),
        metrics: HttpMetrics::new(&mut Registry::default()),
    };
    let echo = Arc::new(Echo {
        name,
        calls: AtomicUsize::new(0),
    });
    let internal = InternalTls {
        files,
        accept: vec![Role::Server],
    };
    let mut config = HttpConfig {
        listen: listen.into(),
        ..HttpConfig::default()
    };
    change(&mut config);
    let address = http::serve(&config, "internal", Some(internal), echo.clone(), &front, &life)
        .await
        .unwrap();
    Task {
        life,
        address: address.to_string(),
        echo,
    }
}

pub fn closed_port() -> String {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string()
}

/// A server that finishes the TLS handshake, reads something, and then does as it is told.
pub async fn accomplice(pki: &Pki, hangs: bool) -> (String, Arc<AtomicUsize>) {
    let files = pki.issue(if hangs { "hangs" } else { "dies" }, Role::Server);
    let config = gse_core::tls::server_config(&files, &[Role::Server], &[b"http/1.1"]).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let visits = Arc::new(AtomicUsize::new(0));
    let counter = visits.clone();
    tokio::spawn(async move {
        let acceptor = tokio_rustls::TlsAcceptor::from(config);
        while let Ok((socket, _)) = listener.accept().await {
            let (acceptor, counter) = (acceptor.clone(), counter.clone());
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(socket).await else {
                    return;
                };
                let mut bytes = [0; 512];
                if stream.read(&mut bytes).await.is_ok_and(|n| n > 0) {
                    counter.fetch_add(1, Ordering::SeqCst);
                }
                if hangs {
                    tokio::time::sleep(Duration::from_secs(600)).await;
                }
                let _ = stream.shutdown().await;
            });
        }
    });
    (address, visits)
}
