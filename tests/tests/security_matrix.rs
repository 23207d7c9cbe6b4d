//! Who gets through where: every listener and every call, by every kind of credential, against `security_matrix.txt`.
//!
//! A listener, a call or a method without a line there fails, and so does one whose answer is another. After a change that is meant,
//! `GSE_MATRIX_WRITE=1` writes the file anew; read the difference line by line before it is committed.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use gse_core::certs::Authority;
use gse_core::rpc::{Dialler, RpcConfig};
use gse_core::tls::{self, Role, TlsFiles};
use gse_proto::data::DataHello;
use gse_proto::datalink::{self, DataFrame};
use gse_proto::file::{LinkHello, RelayHello};
use gse_proto::http::{Owner, Route};
use gse_proto::link::{LinkFrame, PROTOCOL};
use gse_proto::prost::Message;
use gse_tests::files::{push_body, transfer_body, transfer_task};
use gse_tests::site::{APP, SECRET};
use gse_tests::{Child, Site, StoreKind, Wire, eventually, script_body};
use serde_json::{Value, json};
use sha2::Digest;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

const AGENT: &str = "020000000242010a00002f17521298676501";
const FILE: &str = "tests/security_matrix.txt";
const PATIENCE: Duration = Duration::from_secs(15);
/// Token of the one slot for messages.
const MESSAGE_TOKEN: &str = "a-token-for-messages";

/// How a caller shows itself on a listener that anybody may reach.
fn shown() -> Vec<(&'static str, String)> {
    let app = |code: &str, secret: &str| {
        let value = json!({"bk_app_code": code, "bk_app_secret": secret});
        format!("X-Bkapi-Authorization: {value}\r\n")
    };
    vec![
        ("none", String::new()),
        ("malformed", "X-Bkapi-Authorization: [\"bk_job\"]\r\n".into()),
        ("wrong-secret", app(APP, "not it")),
        ("no-secret", app(APP, "")),
        ("unknown-app", app("stranger", SECRET)),
        ("disabled-app", app("retired", SECRET)),
        (
            "forged-assertion",
            format!("X-Gse-App: {APP}\r\nX-Gse-Via: operator\r\n"),
        ),
        ("app-without-rights", app("idle", SECRET)),
        ("app-with-rights", app(APP, SECRET)),
    ]
}

/// What a peer shows on a listener of our own: its certificate, and headers.
struct Peer {
    name: &'static str,
    /// None: no certificate.
    files: Option<TlsFiles>,
    headers: String,
}

/// Certificates of every kind, each by its name.
struct Certs {
    dir: PathBuf,
    ours: Authority,
    theirs: Authority,
}

impl Certs {
    fn new(site: &Site) -> Self {
        let theirs = site.path().join("other-ca");
        Certs {
            dir: site.path().join("matrix"),
            ours: Authority::open(site.path().join("certs")).unwrap(),
            theirs: Authority::create(theirs).unwrap(),
        }
    }

    fn make(&self, name: &str, role: Role, id: Option<&str>) -> TlsFiles {
        let by = if name.starts_with("foreign") {
            &self.theirs
        } else {
            &self.ours
        };
        std::fs::create_dir_all(&self.dir).unwrap();
        let (cert, key) = (
            self.dir.join(format!("{name}.crt")),
            self.dir.join(format!("{name}.key")),
        );
        by.reissue(role, id, &["localhost".into()], &cert, &key, 30).unwrap();
        // It trusts the real authority in any case: what matters is whether it is trusted.
        TlsFiles {
            ca: self.ours.ca_path(),
            cert,
            key,
        }
    }

    fn peers(&self) -> Vec<Peer> {
        let peer = |name, files, headers: &str| Peer {
            name,
            files,
            headers: headers.to_owned(),
        };
        let cert = |name, role, id| Some(self.make(name, role, id));
        let asserted = format!("X-Gse-App: {APP}\r\n");
        vec![
            peer("no-certificate", None, ""),
            peer("foreign-server", cert("foreign-server", Role::Server, None), &asserted),
            peer(
                "foreign-operator",
                cert("foreign-operator", Role::Operator, Some("eve")),
                "",
            ),
            peer("foreign-agent", cert("foreign-agent", Role::Agent, Some(AGENT)), ""),
            peer("agent", cert("agent", Role::Agent, Some(AGENT)), &asserted),
            peer(
                "client-unknown",
                cert("client-unknown", Role::ApiClient, Some("stranger")),
                &asserted,
            ),
            peer(
                "client-without-rights",
                cert("client-idle", Role::ApiClient, Some("idle")),
                &asserted,
            ),
            peer("client-with-rights", cert("client", Role::ApiClient, Some(APP)), ""),
            peer("operator", cert("operator", Role::Operator, Some("alice")), ""),
            peer("server-for-nobody", cert("server", Role::Server, None), ""),
            peer(
                "server-for-unknown",
                cert("server", Role::Server, None),
                "X-Gse-App: stranger\r\n",
            ),
            peer(
                "server-for-app-without-rights",
                cert("server", Role::Server, None),
                "X-Gse-App: idle\r\n",
            ),
            peer("server-for-app", cert("server", Role::Server, None), &asserted),
        ]
    }
}

/// A body that the call does something with.
fn body(route: Route, task: &str) -> Value {
    match route {
        Route::ExecuteScript => script_body(&["away"], "root", "#!/bin/sh\n", 60),
        Route::ScriptResult => json!({"task_id": task, "agent_tasks": [
            {"bk_agent_id": "away", "atomic_tasks": [{"atomic_task_id": 0, "offset": 0}]}]}),
        Route::TerminateScript => json!({"task_id": task, "agents": [{"bk_agent_id": "away"}]}),
        Route::TaskState => json!({"task_id": task, "agent_id_list": ["away"]}),
        Route::TaskDescribe => json!({"task_id": task, "start": 0, "limit": 10}),
        Route::ListAgentState | Route::ListAgentInfo => json!({"agent_id_list": [AGENT]}),
        Route::V1AgentStatus | Route::V1AgentInfo => json!({"hosts": [{"ip": "10.0.0.1", "bk_cloud_id": 0}]}),
        Route::AgentList => json!({"cursor": "", "limit": 10, "online": false}),
        Route::TransferFile => transfer_body(&[transfer_task("away", "/tmp", "x", &["away-2"], "/tmp/y")], 60),
        Route::PushFile => push_body(&["away"], "/tmp/y", "x", "content"),
        Route::TransferResult | Route::XferOpen | Route::XferClose | Route::XferTorrent => json!({"task_id": task}),
        Route::TerminateTransfer => json!({"task_id": task, "agents": [{"bk_agent_id": "away"}]}),
        Route::DispatchMessage => json!({"slot_id": 1, "token": MESSAGE_TOKEN, "message_id": "m", "content": "x",
            "agent_id_list": ["away"]}),
        Route::DispatchMultiMessage => json!({"slot_id": 1, "token": MESSAGE_TOKEN, "message_id": "m",
            "agent_message_list": [{"bk_agent_id": "away", "content": "x"}]}),
        Route::HostIdShow => json!({"host": AGENT}),
        Route::HostIdPut => json!({"hosts": [{"bk_agent_id": "away", "content": "{}"}]}),
        Route::HostIdPush => json!({"hosts": ["away"]}),
        other if other.owner() == Owner::Data => data_body(other.path()),
        other if other.owner() == Owner::Proc => process_body(other, task),
        _ => json!({}),
    }
}

/// Number of the one stream.
const STREAM: u64 = 700;
/// The one data id that is routed.
const ROUTED: u32 = 1_500_031;

/// The same for calls about data. What is to be removed is not there, so that it is the same for everybody who may.
fn data_body(path: &str) -> Value {
    let (stream, channel) = match path.contains("delete") {
        true => (STREAM + 1, ROUTED + 1),
        false => (STREAM, ROUTED),
    };
    let stream_to = json!({"name": "files", "report_mode": "file", "data_log_path": "matrix"});
    let route = json!([{"name": "r", "stream_to": {"stream_to_id": STREAM}}]);
    let mut body = match path.rsplit('/').next().unwrap_or_default() {
        "add_streamto" => json!({"metadata": {"plat_name": "bkmonitor"}, "stream_to": stream_to}),
        "add_route" => json!({"metadata": {"plat_name": "bkmonitor"}, "route": route}),
        "update_streamto" => json!({"condition": {"stream_to_id": stream}, "specification": {"stream_to": stream_to}}),
        "update_route" => json!({"condition": {"channel_id": channel}, "specification": {"route": route}}),
        other if other.ends_with("streamto") => json!({"condition": {"stream_to_id": stream}}),
        other if other.ends_with("route") => json!({"condition": {"channel_id": channel}}),
        _ => json!({"data_id": ROUTED}),
    };
    if body.get("condition").is_some() {
        body["condition"]["plat_name"] = json!("bkmonitor");
    }
    body["operation"] = json!({"operator_name": "admin", "method": "all"});
    body
}

/// The same for calls about processes, of a host that nobody has heard of.
fn process_body(route: Route, task: &str) -> Value {
    let mut element = json!({
        "meta": {"namespace": "matrix", "name": "beat"}, "op_type": 2, "hosts": [{"ip": "10.0.0.9", "bk_cloud_id": 0}],
        "spec": {"identity": {"proc_name": "beat", "setup_path": "/opt/beat", "pid_path": "/run/beat.pid", "user": "root"}},
    });
    match route {
        Route::OperateProcMulti => json!({ "proc_operate_req": [element] }),
        Route::ProcResult | Route::V1ProcResult => json!({ "task_id": task }),
        Route::SyncProcStatus => json!({"meta": {"namespace": "matrix"}, "page": {"start": 0, "limit": 10}}),
        Route::UpgradeToAgentId => {
            json!({"hosts": [{"ip": "10.0.0.9", "bk_cloud_id": 0, "bk_agent_id": "away"}]})
        }
        _ => {
            element["page"] = json!({"start": 0, "limit": 10});
            element
        }
    }
}

/// A gse_data with one stream and one route.
async fn start_data(site: &Site) -> Child {
    let file = site.path().join("matrix-routes.json");
    let seed = json!({
        "streams": [{"stream_to_id": STREAM, "plat_name": "bkmonitor",
            "stream_to": {"name": "files", "report_mode": "file", "data_log_path": "matrix"}}],
        "routes": [{"channel_id": ROUTED, "plat_name": "bkmonitor",
            "route": [{"name": "r", "stream_to": {"stream_to_id": STREAM}}]}],
    });
    std::fs::write(&file, seed.to_string()).unwrap();
    let data = site
        .data(
            "matrix",
            &[
                format!("routes.seed={}", file.display()),
                "rpc.listen=127.0.0.1:0".into(),
            ],
        )
        .await;
    let data = data.unwrap();
    gse_tests::eventually("routes", PATIENCE, || async {
        data.log().contains("have been put in").then_some(())
    })
    .await;
    data
}

/// What an envelope means for who may do what.
fn meaning(reply: &Value) -> String {
    match reply["code"].as_i64() {
        Some(0) => "ok".into(),
        Some(1_000_901) => "unauthenticated".into(),
        Some(1_000_903) => "forbidden".into(),
        Some(1_000_904) => "no-such-call".into(),
        Some(1_000_915) => "not-installed".into(),
        Some(1_000_116) => "hidden".into(),
        Some(1_014_505) => "missing".into(),
        other => format!("code-{other:?}"),
    }
}

/// Whether the head of an answer is here and promises lines, as of a tail.
fn lines(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    text.split_once("\r\n\r\n")
        .is_some_and(|(head, _)| head.to_lowercase().contains("ndjson"))
}

async fn call<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, path: &str, headers: &str, body: &str) -> String {
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let talk = async {
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        // An answer that is a stream of lines has no end.
        while stream.read_buf(&mut answer).await? > 0 && !lines(&answer) {}
        std::io::Result::Ok(answer)
    };
    let answer = tokio::time::timeout(PATIENCE, talk).await.expect("an answer or an end");
    let text = String::from_utf8(answer.unwrap_or_default()).unwrap();
    match text.split_once("\r\n\r\n") {
        Some((head, _)) if head.starts_with("HTTP/1.1 200") && lines(text.as_bytes()) => "ok".into(),
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => {
            meaning(&serde_json::from_str(body).expect("an envelope"))
        }
        Some((head, _)) => head.lines().next().unwrap_or_default().replace(' ', "-"),
        None => "closed".into(),
    }
}

/// The TLS side of a peer; handshakes that are refused show as an end when something is read.
async fn connect(
    address: &str,
    peer: &Peer,
    ca: &Path,
    alpn: &[&[u8]],
) -> Option<tokio_rustls::client::TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(address).await.unwrap();
    let (config, name) = match &peer.files {
        Some(files) => (
            tls::client_config(files, Role::Server, alpn).unwrap(),
            tls::server_name(),
        ),
        None => {
            let mut config = tls::https_client_config(ca).unwrap();
            config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
            (Arc::new(config), "localhost".try_into().unwrap())
        }
    };
    let handshake = tokio_rustls::TlsConnector::from(config).connect(name, tcp);
    tokio::time::timeout(PATIENCE, handshake).await.expect("an answer").ok()
}

/// The lines, in order of what they are about.
#[derive(Default)]
struct Matrix(BTreeMap<String, BTreeMap<String, String>>);

impl Matrix {
    fn note(&mut self, what: &str, who: &str, outcome: String) {
        let row = self.0.entry(what.to_owned()).or_default();
        if let Some(other) = row.insert(who.to_owned(), outcome.clone()) {
            assert_eq!(other, outcome, "{what} by {who} depends on the path");
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for (what, row) in &self.0 {
            for (who, outcome) in row {
                writeln!(text, "{what:<40} {who:<32} {outcome}").unwrap();
            }
        }
        text
    }
}

async fn public(matrix: &mut Matrix, listener: &str, address: &str, task: &str) {
    for route in Route::ALL {
        for (n, path) in route.paths().iter().enumerate() {
            for (who, headers) in shown() {
                // Aliases share everything behind the path; a few kinds will do.
                if n > 0 && !["none", "wrong-secret", "app-with-rights"].contains(&who) {
                    continue;
                }
                let stream = TcpStream::connect(address).await.unwrap();
                let outcome = call(stream, path, &headers, &body(*route, task).to_string()).await;
                matrix.note(&format!("{listener} {route:?}"), who, outcome);
            }
        }
    }
}

async fn internal(matrix: &mut Matrix, (listener, owner): (&str, Owner), address: &str, certs: &Certs, task: &str) {
    let peers = certs.peers();
    let ca = certs.ours.ca_path();
    for route in Route::ALL {
        for peer in &peers {
            let outcome = match connect(address, peer, &ca, &[b"http/1.1"]).await {
                Some(stream) => call(stream, route.path(), &peer.headers, &body(*route, task).to_string()).await,
                None => "closed".into(),
            };
            matrix.note(&format!("{listener} {route:?}"), peer.name, outcome);
        }
        if route.owner() == owner {
            let stream = TcpStream::connect(address).await.unwrap();
            let outcome = call(stream, route.path(), &format!("X-Gse-App: {APP}\r\n"), "{}").await;
            matrix.note(&format!("{listener} {route:?}"), "without-tls", outcome);
        }
    }
}

async fn agents(matrix: &mut Matrix, address: &str, certs: &Certs) {
    for peer in certs.peers().iter().filter(|peer| peer.files.is_some()) {
        let Some(files) = &peer.files else { continue };
        let outcome = match Wire::connect(address, &files.ca, &files.cert, &files.key).await {
            Ok(mut wire) => match wire.greet(gse_tests::wire::hello(AGENT)).await {
                Ok(_) => "welcome",
                Err(_) => "closed",
            },
            Err(_) => "closed",
        };
        matrix.note("gse_task.agents Session", peer.name, outcome.into());
    }
    let nobody = Peer {
        name: "no-certificate",
        files: None,
        headers: String::new(),
    };
    let outcome = match connect(address, &nobody, &certs.ours.ca_path(), &[]).await {
        Some(stream) => call(stream, "/", "", "").await,
        None => "closed".into(),
    };
    matrix.note("gse_task.agents Session", nobody.name, outcome);
    let plain = call(TcpStream::connect(address).await.unwrap(), "/", "", "").await;
    matrix.note("gse_task.agents Session", "without-tls", plain);
}

/// Where records come in.
async fn link(matrix: &mut Matrix, address: &str, certs: &Certs) {
    const WHAT: &str = "gse_data.link Records";
    let ca = certs.ours.ca_path();
    for peer in certs.peers() {
        let outcome = greet(connect(address, &peer, &ca, &[]).await, AGENT).await;
        matrix.note(WHAT, peer.name, outcome);
        if peer.name == "agent" {
            let outcome = greet(connect(address, &peer, &ca, &[]).await, "another-agent").await;
            matrix.note(WHAT, "agent-as-another", outcome);
        }
    }
    let plain = call(TcpStream::connect(address).await.unwrap(), "/", "", "").await;
    matrix.note(WHAT, "without-tls", plain);
}

/// Says a sender's hello, and whether that is welcome.
async fn greet(stream: Option<tokio_rustls::client::TlsStream<TcpStream>>, agent: &str) -> String {
    let Some(mut stream) = stream else {
        return "closed".into();
    };
    let hello = DataFrame::from(DataHello {
        protocol: datalink::PROTOCOL,
        agent_id: agent.into(),
        spool_id: vec![7; 16].into(),
        next_seq: 1,
        ..DataHello::default()
    });
    let mut read = BytesMut::new();
    let talk = async {
        stream.write_all(&hello.to_bytes()).await.ok()?;
        loop {
            if let Some(frame) = DataFrame::take(&mut read, datalink::MAX_MESSAGE).unwrap() {
                return Some(frame);
            }
            if stream.read_buf(&mut read).await.ok()? == 0 {
                return None;
            }
        }
    };
    match tokio::time::timeout(PATIENCE, talk).await.expect("an answer or an end") {
        Some(DataFrame::Welcome(_)) => "welcome".into(),
        Some(DataFrame::Goodbye(_)) => "forbidden".into(),
        None => "closed".into(),
        Some(other) => panic!("{other:?}"),
    }
}

/// Says something on a TLS connection and reads what comes first; `None` when nobody was let in.
async fn first_words(address: &str, peer: &Peer, ca: &Path, alpn: &[&[u8]], said: &[u8]) -> Option<BytesMut> {
    let mut stream = connect(address, peer, ca, alpn).await?;
    stream.write_all(said).await.ok()?;
    let mut heard = BytesMut::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_buf(&mut heard));
    match read.await.expect("an answer or an end") {
        // The certificate is looked at after the client's side of the handshake is done: the refusal is an alert.
        Err(error) if error.kind() == std::io::ErrorKind::InvalidData => None,
        _ => Some(heard),
    }
}

async fn links(matrix: &mut Matrix, listener: &str, address: &str, certs: &Certs) {
    let agent = LinkHello {
        protocol: PROTOCOL,
        agent_id: AGENT.into(),
        ..LinkHello::default()
    };
    let relay = LinkHello {
        protocol: PROTOCOL,
        agent_id: "gse_btsvr another".into(),
        relay: Some(RelayHello::default()),
        ..LinkHello::default()
    };
    link_as(matrix, &format!("{listener} Link"), address, certs, agent).await;
    link_as(matrix, &format!("{listener} Relay"), address, certs, relay).await;
}

async fn link_as(matrix: &mut Matrix, call_name: &str, address: &str, certs: &Certs, hello: LinkHello) {
    let mut said = BytesMut::new();
    LinkFrame::from(hello).encode(0, &mut said);
    for peer in certs.peers() {
        let heard = first_words(address, &peer, &certs.ours.ca_path(), &[], &said).await;
        let frame = heard.and_then(|mut heard| LinkFrame::take(&mut heard, 1 << 16).expect("frames"));
        let outcome = match frame {
            Some(LinkFrame::Welcome(_)) => "welcome",
            Some(_) => "refused",
            None => "closed",
        };
        matrix.note(call_name, peer.name, outcome.into());
    }
    let plain = call(TcpStream::connect(address).await.unwrap(), "/", "", "").await;
    matrix.note(call_name, "without-tls", plain);
}

/// Whoever has a certificate of an agent or a server may speak, and has to prove that it is a member of a swarm.
async fn swarm_peers(matrix: &mut Matrix, listener: &str, address: &str, certs: &Certs) {
    let mut said = b"\x13BitTorrent protocol".to_vec();
    said.resize(68, 7);
    // Who it is, with a proof that is none.
    let claim = [&b"\x14\0d3:gsed2:id4:away5:proof32:"[..], &[7; 32], b"ee"].concat();
    said.extend((claim.len() as u32).to_be_bytes());
    said.extend(claim);
    for peer in certs.peers() {
        let outcome = match first_words(address, &peer, &certs.ours.ca_path(), &[b"gse-bt/1"], &said).await {
            Some(heard) if heard.is_empty() => "no-such-swarm",
            Some(_) => "ok",
            None => "closed",
        };
        matrix.note(&format!("{listener} Handshake"), peer.name, outcome.into());
    }
    let plain = call(TcpStream::connect(address).await.unwrap(), "/", "", "").await;
    matrix.note(&format!("{listener} Handshake"), "without-tls", plain);
}

/// The front for foreign clients, which anybody may reach, and where nothing is that was not opened.
async fn foreign(matrix: &mut Matrix, listener: &str, address: &str, closed: &str) {
    let hash: String = [7; 20].iter().map(|byte| format!("%{byte:02x}")).collect();
    match listener {
        "gse_btsvr.tracker_http" => {
            for (what, path) in [
                (
                    "announce",
                    format!("/announce?info_hash={hash}&peer_id=-XX0000-123456789012&port=7001&left=1"),
                ),
                ("scrape", format!("/scrape?info_hash={hash}")),
                ("torrent", format!("/torrent/{closed}/0.torrent")),
                ("other", "/".to_owned()),
            ] {
                let mut stream = TcpStream::connect(address).await.unwrap();
                let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
                stream.write_all(head.as_bytes()).await.unwrap();
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer).await.unwrap();
                let text = String::from_utf8_lossy(&answer);
                let outcome = match text.contains("unknown swarm") {
                    true => "unknown-swarm".to_owned(),
                    false => text.split(' ').nth(1).unwrap_or("closed").to_owned(),
                };
                matrix.note(&format!("{listener} {what}"), "none", outcome);
            }
        }
        "gse_btsvr.tracker_udp" => {
            let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
            // An announce under a connection id that nobody was given.
            let mut datagram = [0; 98];
            datagram[11] = 1;
            socket.send_to(&datagram, address).await.unwrap();
            let mut answer = [0; 256];
            let read = tokio::time::timeout(PATIENCE, socket.recv_from(&mut answer)).await;
            let (length, _) = read.expect("an answer").unwrap();
            let outcome = if length >= 4 && answer[..4] == [0, 0, 0, 3] {
                "refused"
            } else {
                "ok"
            };
            matrix.note(&format!("{listener} announce"), "none", outcome.into());
        }
        _ => {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let hello = [
                b"\x13BitTorrent protocol",
                &[0; 8][..],
                &[7; 20],
                b"-XX0000-123456789012",
            ]
            .concat();
            // It may be closed before that.
            stream.write_all(&hello).await.ok();
            let mut heard = Vec::new();
            let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut heard))
                .await
                .expect("an end");
            let outcome = if read.is_ok() && !heard.is_empty() {
                "ok"
            } else {
                "no-such-swarm"
            };
            matrix.note(&format!("{listener} Handshake"), "none", outcome.into());
        }
    }
}

/// Every gRPC method there is, from the descriptors of what is generated.
fn methods() -> Vec<String> {
    let set = prost_types::FileDescriptorSet::decode(gse_proto::DESCRIPTORS).unwrap();
    let mut methods = Vec::new();
    for file in set.file {
        for service in &file.service {
            for method in &service.method {
                methods.push(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
            }
        }
    }
    assert!(!methods.is_empty());
    methods
}

async fn rpc(matrix: &mut Matrix, listener: &str, address: &str, certs: &Certs) {
    for peer in certs.peers() {
        for method in methods() {
            let outcome = match &peer.files {
                Some(files) => grpc(address, files, &method).await,
                None => match connect(address, &peer, &certs.ours.ca_path(), &[b"h2"]).await {
                    Some(stream) => call(stream, &method, "", "").await,
                    None => "closed".into(),
                },
            };
            matrix.note(&format!("{listener} {method}"), peer.name, outcome);
        }
    }
}

async fn grpc(address: &str, files: &TlsFiles, method: &str) -> String {
    let channel = Dialler::new(&RpcConfig::default(), files)
        .unwrap()
        .channel(address)
        .unwrap();
    let mut client = tonic::client::Grpc::new(channel);
    let ask = async {
        client
            .ready()
            .await
            .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let codec = tonic_prost::ProstCodec::<(), ()>::default();
        client
            .unary(tonic::Request::new(()), method.parse().unwrap(), codec)
            .await
    };
    match tokio::time::timeout(PATIENCE, ask).await.expect("an answer") {
        Ok(_) => "ok".into(),
        // Nothing came back at all: the connection was not let in.
        Err(status) if std::error::Error::source(&status).is_some() => "closed".into(),
        Err(status) => match status.code() {
            tonic::Code::Unavailable => "closed".into(),
            tonic::Code::Unauthenticated => "unauthenticated".into(),
            tonic::Code::PermissionDenied => "forbidden".into(),
            tonic::Code::Unimplemented => "no-such-call".into(),
            // Past the door: the empty message is what is not liked.
            tonic::Code::InvalidArgument | tonic::Code::NotFound | tonic::Code::FailedPrecondition => "ok".into(),
            other => format!("{other:?}"),
        },
    }
}

async fn store(matrix: &mut Matrix, address: &str, password: &str) {
    let ask = async |lines: &[u8]| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(lines).await.unwrap();
        let mut answer = vec![0; 512];
        let n = tokio::time::timeout(PATIENCE, stream.read(&mut answer))
            .await
            .unwrap()
            .unwrap_or(0);
        let text = String::from_utf8_lossy(&answer[..n]).into_owned();
        let last = text.trim_end().lines().last().unwrap_or("closed").to_owned();
        last.split([' ', '$']).next().unwrap_or_default().to_owned()
    };
    for command in ["GET x", "SET x 1", "KEYS *", "CONFIG GET *", "FLUSHALL", "INFO"] {
        let outcome = ask(format!("{command}\r\n").as_bytes()).await;
        matrix.note(&format!("gse_dba.resp {}", command.replace(' ', "-")), "none", outcome);
        let wrong = ask(format!("AUTH wrong\r\n{command}\r\n").as_bytes()).await;
        matrix.note(
            &format!("gse_dba.resp {}", command.replace(' ', "-")),
            "wrong-password",
            wrong,
        );
    }
    let right = ask(format!("AUTH {password}\r\n").as_bytes()).await;
    matrix.note("gse_dba.resp AUTH", "right-password", right);
}

async fn ops(matrix: &mut Matrix, listener: &str, address: &str) {
    assert!(
        address.starts_with("127.0.0.1:"),
        "{listener} without credentials has to stay on loopback: {address}"
    );
    for path in [
        "/healthz",
        "/readyz",
        "/metrics",
        "/",
        "/debug/pprof",
        Route::ExecuteScript.path(),
    ] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let status = answer.split(' ').nth(1).unwrap_or("closed").to_owned();
        matrix.note(&format!("{listener} {path}"), "none", status);
    }
}

// contract: reliability#S1
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_gets_as_far_as_the_table_says() {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    let file = site.path().join("apps.toml");
    let hash = hex::encode(sha2::Sha256::digest(SECRET.as_bytes()));
    let mut table = std::fs::read_to_string(&file).unwrap();
    for (code, more) in [
        ("idle", "operations = []"),
        ("retired", "operations = [\"*\"]\ndisabled = true"),
    ] {
        table.push_str(&format!(
            "\n[[app]]\ncode = \"{code}\"\nsecret_sha256 = \"{hash}\"\n{more}\n"
        ));
    }
    std::fs::write(&file, table).unwrap();
    site.task_sets.push("rpc.listen=127.0.0.1:0".into());
    site.task_sets.push(format!(
        "messages.slots=[{{slot_id=1,token=\"{MESSAGE_TOKEN}\",plugin=\"beat\"}}]"
    ));
    let cache = format!("cache.dir={}", site.path().join("cache").display());
    site.btsvr_sets
        .extend([cache, "peer.listen=127.0.0.1:0".into(), "front.enabled=true".into()]);
    for listener in ["http", "udp", "peer"] {
        site.btsvr_sets.push(format!("front.{listener}_listen=127.0.0.1:0"));
    }
    site.start_task().await.unwrap();
    let data = start_data(&site).await;
    site.api_sets
        .push(format!("upstreams.data=[\"{}\"]", data.address("internal")));
    let sync = site.syncdata("matrix", &[]).await.unwrap();
    let alarm = site.alarm("matrix", &[&data], &[]).await.unwrap();
    site.api_sets
        .push(format!("upstreams.sync=[\"{}\"]", sync.address("internal")));
    site.start_btsvr(1).await.unwrap();
    site.start_procmgr(1).await.unwrap();
    site.start_api().await.unwrap();
    let task = site
        .api()
        .submit(&script_body(&["away"], "root", "#!/bin/sh\n", 60))
        .await;
    let files = eventually("gse_api knows gse_btsvr", PATIENCE, || async {
        let body = body(Route::PushFile, "");
        let reply = site.api().post(Route::PushFile.path(), &body).await;
        reply["data"]["result"]["task_id"].as_str().map(str::to_owned)
    })
    .await;
    let closed = site
        .api()
        .submit_files("async_push_file", &body(Route::PushFile, ""))
        .await;
    let certs = Certs::new(&site);

    let mut matrix = Matrix::default();
    let children = [
        site.task.as_ref(),
        site.api.as_ref(),
        Some(&data),
        Some(&sync),
        Some(&alarm),
    ]
    .into_iter()
    .flatten()
    .chain(site.btsvr.values())
    .chain(site.procmgr.values())
    .chain(&site.store);
    for child in children {
        for (listener, address) in &child.addresses {
            // Instances of one server have a name each.
            let server = child.name.split('-').next().unwrap();
            let name = format!("{server}.{listener}");
            match name.as_str() {
                "gse_api.http" | "gse_task.http" | "gse_data.http" | "gse_procmgr.http" | "gse_syncdata.http" => {
                    public(&mut matrix, &name, address, &task).await;
                }
                "gse_task.internal" => internal(&mut matrix, (&name, Owner::Task), address, &certs, &task).await,
                "gse_data.internal" => internal(&mut matrix, (&name, Owner::Data), address, &certs, &task).await,
                "gse_procmgr.internal" => internal(&mut matrix, (&name, Owner::Proc), address, &certs, &task).await,
                "gse_syncdata.internal" => internal(&mut matrix, (&name, Owner::Sync), address, &certs, &task).await,
                "gse_data.link" => link(&mut matrix, address, &certs).await,
                "gse_task.agents" => agents(&mut matrix, address, &certs).await,
                "gse_task.rpc" | "gse_data.rpc" => rpc(&mut matrix, &name, address, &certs).await,
                "gse_btsvr.http" => public(&mut matrix, &name, address, &files).await,
                "gse_btsvr.internal" => internal(&mut matrix, (&name, Owner::File), address, &certs, &files).await,
                "gse_btsvr.link" => links(&mut matrix, &name, address, &certs).await,
                "gse_btsvr.peer" => swarm_peers(&mut matrix, &name, address, &certs).await,
                "gse_btsvr.front_peer" | "gse_btsvr.tracker_http" | "gse_btsvr.tracker_udp" => {
                    foreign(&mut matrix, &name, address, &closed).await
                }
                "gse_dba.resp" => store(&mut matrix, address, "store-password-of-the-tests").await,
                "gse_api.ops" | "gse_btsvr.ops" | "gse_task.ops" | "gse_data.ops" | "gse_procmgr.ops"
                | "gse_syncdata.ops" | "gse_alarm.ops" | "gse_dba.ops" => ops(&mut matrix, &name, address).await,
                _ => panic!("nobody has said who may use the listener {name}: add it here and to {FILE}"),
            }
        }
    }

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(FILE);
    if std::env::var_os("GSE_MATRIX_WRITE").is_some() {
        std::fs::write(&path, matrix.text()).unwrap();
    }
    let known = std::fs::read_to_string(&path).unwrap();
    let (found, known): (Vec<_>, Vec<_>) = (
        matrix.text().lines().map(str::to_owned).collect(),
        known.lines().collect(),
    );
    let mut wrong = String::new();
    for line in found.iter().filter(|line| !known.contains(&line.as_str())) {
        writeln!(wrong, "+ {line}").unwrap();
    }
    for line in known.iter().filter(|line| !found.iter().any(|found| found == *line)) {
        writeln!(wrong, "- {line}").unwrap();
    }
    assert!(wrong.is_empty(), "what is (+) is not what {FILE} says (-):\n{wrong}");
    // The table itself keeps to these rules, whatever is written into it.
    for line in &found {
        let who = line.split_whitespace().nth(1).unwrap();
        let outcome = line.split_whitespace().last().unwrap();
        let stranger = [
            "none",
            "malformed",
            "wrong",
            "no-",
            "unknown",
            "disabled",
            "forged",
            "foreign",
            "without-tls",
        ];
        if stranger.iter().any(|part| who.starts_with(part)) && !line.contains(".ops ") {
            // What is "missing" was looked for.
            assert!(!["ok", "welcome", "missing"].contains(&outcome), "{line}");
        }
    }
    assert!(found.iter().any(|line| line.ends_with(" welcome")));
}
