//! The agent's part of a transfer, with a server of this test at the other end of its link: manifests in parts, swarms, reports that are
//! repeated, what a kill leaves.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use gse_core::fleet::{Fleet, FleetConfig, Question};
use gse_core::rpc::{Dialler, RpcConfig};
use gse_core::store::{Store, StoreConfig};
use gse_core::tls::{self, Role, TlsFiles};
use gse_proto::file::order::What;
use gse_proto::file::{
    Cancel, LinkWelcome, ManifestPart, Order, PeerAddress, Phase, Placing, Report, ReportStored, Source, SwarmOver,
    SwarmPeers, Target,
};
use gse_proto::ids::AgentId;
use gse_proto::link::{LinkFrame, MAX_MESSAGE, PROTOCOL};
use gse_proto::prost::Message;
use gse_proto::session::Pong;
use gse_tests::{AgentOptions, Child, Site, StoreKind, eventually};
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

const ONE: &str = "020000000242010a00002f17521298676571";
const TWO: &str = "020000000242010a00002f17521298676572";
const LIMIT: Duration = Duration::from_secs(20);
const TASK: &str = "GSETASK:F:20261123:1";

/// What the server knows.
#[derive(Default)]
struct Known {
    links: HashMap<String, mpsc::Sender<LinkFrame>>,
    addresses: HashMap<String, Vec<String>>,
    /// Every report, in the order in which they came, with the agent.
    reports: Vec<(String, Report)>,
    manifests: HashMap<Bytes, BytesMut>,
    /// Told to each agent that links, and when asked.
    swarm: Option<SwarmPeers>,
    /// Final reports are acknowledged.
    acknowledges: bool,
    opened: usize,
}

/// A server of links.
struct Server {
    address: String,
    known: Arc<Mutex<Known>>,
    _accepting: tokio::task::JoinHandle<()>,
}

fn certs(site: &Site) -> TlsFiles {
    let dir = site.path().join("certs");
    TlsFiles {
        ca: dir.join("gseca.crt"),
        cert: dir.join("gse_server.crt"),
        key: dir.join("gse_server.key"),
    }
}

impl Server {
    async fn start(site: &Site) -> Self {
        let config = tls::server_config(&certs(site), &[Role::Agent], &[]).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let known = Arc::new(Mutex::new(Known {
            acknowledges: true,
            ..Known::default()
        }));
        let accepting = {
            let known = Arc::clone(&known);
            tokio::spawn(async move {
                loop {
                    let (tcp, _) = listener.accept().await.unwrap();
                    let (known, config) = (Arc::clone(&known), Arc::clone(&config));
                    tokio::spawn(async move {
                        if let Ok(stream) = tokio_rustls::TlsAcceptor::from(config).accept(tcp).await {
                            serve(known, stream).await;
                        }
                    });
                }
            })
        };
        Self {
            address,
            known,
            _accepting: accepting,
        }
    }

    async fn tell(&self, agent: &str, frame: impl Into<LinkFrame>) {
        let link = eventually("the agent links", LIMIT, || async {
            self.known.lock().links.get(agent).cloned()
        })
        .await;
        link.send(frame.into()).await.unwrap();
    }

    async fn report(&self, what: &str, wanted: impl Fn(&str, &Report) -> bool) -> Report {
        eventually(what, LIMIT, || async {
            let known = self.known.lock();
            known
                .reports
                .iter()
                .find(|(agent, report)| wanted(agent, report))
                .map(|(_, report)| report.clone())
        })
        .await
    }
}

/// What the server does about a frame, and answers.
fn answer(
    known: &Mutex<Known>,
    own: &mut String,
    frames: &mpsc::Sender<LinkFrame>,
    frame: LinkFrame,
) -> Vec<LinkFrame> {
    let mut answers: Vec<LinkFrame> = Vec::new();
    let mut known = known.lock();
    match frame {
        LinkFrame::Hello(hello) => {
            assert_eq!(hello.protocol, PROTOCOL);
            own.clone_from(&hello.agent_id);
            known.links.insert(own.clone(), frames.clone());
            known.addresses.insert(own.clone(), hello.peer_addresses);
            known.opened += 1;
            answers.push(
                LinkWelcome {
                    protocol: PROTOCOL,
                    ..LinkWelcome::default()
                }
                .into(),
            );
            answers.extend(known.swarm.clone().map(LinkFrame::from));
        }
        LinkFrame::Ping(ping) => answers.push(Pong { nonce: ping.nonce }.into()),
        LinkFrame::Report(report) => {
            let over = matches!(report.phase(), Phase::Done | Phase::Failed);
            if over && known.acknowledges {
                answers.push(
                    ReportStored {
                        task_id: report.task_id.clone(),
                        order: report.order,
                    }
                    .into(),
                );
            }
            known.reports.push((own.clone(), report));
        }
        LinkFrame::ManifestPart(part) => {
            let data = known.manifests.entry(part.manifest_id).or_default();
            assert_eq!(data.len() as u64, part.offset);
            data.extend_from_slice(&part.data);
        }
        LinkFrame::ManifestWanted(wanted) => {
            let whole = known.manifests[&wanted.manifest_id].clone().freeze();
            for at in (0..whole.len()).step_by(1000) {
                answers.push(
                    ManifestPart {
                        manifest_id: wanted.manifest_id.clone(),
                        offset: at as u64,
                        total: whole.len() as u64,
                        data: whole.slice(at..whole.len().min(at + 1000)),
                    }
                    .into(),
                );
            }
        }
        LinkFrame::Goodbye(_) => {}
        other => panic!("{other:?}"),
    }
    answers
}

async fn serve(known: Arc<Mutex<Known>>, stream: tokio_rustls::server::TlsStream<tokio::net::TcpStream>) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (frames, mut out) = mpsc::channel::<LinkFrame>(64);
    let writing = tokio::spawn(async move {
        while let Some(frame) = out.recv().await {
            if writer.write_all(&frame.to_bytes()).await.is_err() || writer.flush().await.is_err() {
                return;
            }
        }
    });
    let mut buffer = BytesMut::new();
    let mut own = String::new();
    loop {
        while let Some(frame) = LinkFrame::take(&mut buffer, MAX_MESSAGE).unwrap() {
            let answers = answer(&known, &mut own, &frames, frame);
            for answer in answers {
                frames.send(answer).await.unwrap();
            }
        }
        match reader.read_buf(&mut buffer).await {
            Ok(n) if n > 0 => {}
            _ => break,
        }
    }
    let mut known = known.lock();
    if known.links.get(&own).is_some_and(|link| link.same_channel(&frames)) {
        known.links.remove(&own);
    }
    drop(known);
    writing.abort();
}

async fn fleet(site: &Site) -> Fleet {
    let store = StoreConfig {
        url: site.server_store_url(),
        ..StoreConfig::default()
    };
    let dialler = Dialler::new(&RpcConfig::default(), &certs(site)).unwrap();
    Fleet::new(Store::connect(&store).await.unwrap(), dialler, FleetConfig::default())
}

async fn give(fleet: &Fleet, agent: &str, order: &Order) -> Report {
    let question = Question {
        service: "file",
        caller: "a test".into(),
        shared: order.encode_to_vec().into(),
        agents: vec![(AgentId::parse(agent).unwrap(), Bytes::new())],
        patience: LIMIT,
        deadline: tokio::time::Instant::now() + LIMIT,
    };
    let (sender, mut answers) = mpsc::channel(1);
    fleet.ask(question, &sender).await;
    Report::decode(answers.recv().await.unwrap().1.unwrap()).unwrap()
}

fn order(server: &Server, number: u32, what: What) -> Order {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    Order {
        task_id: TASK.into(),
        order: number,
        servers: vec![server.address.clone()],
        not_after_ms: now.as_millis() as u64 + 60_000,
        what: Some(what),
    }
}

fn source(dir: &Path, name: &str) -> What {
    What::Source(Source {
        dir: dir.to_str().unwrap().into(),
        name: name.into(),
        user: "root".into(),
        upload_limit: 0,
        inline_limit: 1000,
    })
}

fn target(dir: &Path, offered: &Report, limit: u64) -> Target {
    Target {
        placing: Some(Placing {
            dir: dir.to_str().unwrap().into(),
            user: "root".into(),
            ..Placing::default()
        }),
        manifest_id: offered.manifest_id.clone(),
        inline_manifest: offered.inline_manifest.clone(),
        download_limit: limit,
        ..Target::default()
    }
}

fn members(server: &Server, offered: &Report) -> SwarmPeers {
    let known = server.known.lock();
    SwarmPeers {
        manifest_id: offered.manifest_id.clone(),
        key: vec![7; 32].into(),
        peers: known
            .addresses
            .iter()
            .flat_map(|(agent, addresses)| {
                addresses.iter().map(move |address| PeerAddress {
                    address: address.clone(),
                    agent_id: agent.clone(),
                    seed: agent == ONE,
                    ..PeerAddress::default()
                })
            })
            .collect(),
        ..SwarmPeers::default()
    }
}

fn options(id: &str) -> AgentOptions {
    AgentOptions {
        sets: vec![
            "files.report_ms=100".into(),
            "files.resend_ms=300".into(),
            "files.link_idle_ms=300".into(),
            "files.answer_ms=200".into(),
        ],
        ..AgentOptions::new(id, if id == ONE { "10.6.1.1" } else { "10.6.1.2" })
    }
}

struct Setting {
    site: Site,
    server: Server,
    fleet: Fleet,
    one: Child,
    two: Child,
}

async fn setting() -> Setting {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let server = Server::start(&site).await;
    let (one, two) = (
        site.spawn_agent(&options(ONE), "").unwrap(),
        site.spawn_agent(&options(TWO), "").unwrap(),
    );
    for id in [ONE, TWO] {
        site.wait_state(id, 2).await;
    }
    let fleet = fleet(&site).await;
    std::fs::create_dir(site.path().join("out")).unwrap();
    Setting {
        site,
        server,
        fleet,
        one,
        two,
    }
}

/// Bytes that no compression and no sparse file helps with.
fn noise(len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 32);
    let mut last = Sha256::digest(b"noise");
    while bytes.len() < len {
        bytes.extend_from_slice(&last);
        last = Sha256::digest(last);
    }
    bytes.truncate(len);
    bytes
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect()
}

// contract: p2p#25
// contract: p2p#30
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_swarm_moves_a_directory_and_ends_when_it_is_over() {
    let s = setting().await;
    let top = s.site.path().join("source/top");
    std::fs::create_dir_all(top.join("many")).unwrap();
    // A manifest that is too long for a report.
    for n in 0..3_000 {
        std::fs::write(top.join(format!("many/{n:0100}")), n.to_string()).unwrap();
    }
    let content = noise(3 << 20);
    std::fs::write(top.join("large"), &content).unwrap();
    let ready = give(&s.fleet, ONE, &order(&s.server, 1, source(&top, ""))).await;
    assert_eq!(ready.phase(), Phase::Moving, "{ready:?}");
    let ready = s
        .server
        .report("the source is ready", |agent, report| {
            agent == ONE && !report.manifest_id.is_empty()
        })
        .await;
    assert!(ready.inline_manifest.is_empty());
    assert_eq!(
        Sha256::digest(&s.server.known.lock().manifests[&ready.manifest_id])[..],
        ready.manifest_id[..]
    );
    let told = members(&s.server, &ready);
    s.server.known.lock().swarm = Some(told.clone());
    s.server.tell(ONE, told).await;

    let out = s.site.path().join("out");
    s.server.known.lock().acknowledges = false;
    let taken = give(
        &s.fleet,
        TWO,
        &order(&s.server, 2, What::Target(target(&out, &ready, 0))),
    )
    .await;
    assert_eq!(taken.code, 0, "{taken:?}");
    let done = s
        .server
        .report("the target is done", |agent, report| {
            agent == TWO && report.phase() == Phase::Done
        })
        .await;
    assert_eq!((done.size, done.moved), (ready.size, ready.size));
    assert_eq!(std::fs::read(out.join("top/large")).unwrap(), content);
    assert_eq!(names(&out.join("top/many")).len(), 3_000);
    assert_eq!(names(&out), ["top"], "nothing is left beside it");
    // Until it is acknowledged it is said again.
    eventually("the report is repeated", LIMIT, || async {
        let known = s.server.known.lock();
        let said = known
            .reports
            .iter()
            .filter(|(agent, report)| agent == TWO && report.phase() == Phase::Done);
        (said.count() >= 3).then_some(())
    })
    .await;
    s.server.known.lock().acknowledges = true;
    // Its progress never went back.
    let mut moved = 0;
    for (_, report) in s.server.known.lock().reports.iter().filter(|(agent, _)| agent == TWO) {
        assert!(report.moved >= moved && report.moved <= report.size, "{report:?}");
        moved = report.moved;
    }
    // It goes on offering until the server ends that.
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    assert!(s.server.known.lock().links.contains_key(TWO), "it still seeds");
    for agent in [ONE, TWO] {
        let manifest_id = ready.manifest_id.clone();
        s.server.tell(agent, SwarmOver { manifest_id }).await;
    }
    let over = s
        .server
        .report("the source is done", |agent, report| {
            agent == ONE && report.phase() == Phase::Done
        })
        .await;
    assert_eq!(over.code, 0);
    eventually("the links are not needed any more", LIMIT, || async {
        s.server.known.lock().links.is_empty().then_some(())
    })
    .await;
    let again = give(
        &s.fleet,
        TWO,
        &order(&s.server, 2, What::Target(target(&out, &ready, 0))),
    )
    .await;
    assert_eq!((again.phase(), again.code), (Phase::Done, 0));
    drop((s.one, s.two));
}

// contract: p2p#19
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_agent_goes_on_where_it_was() {
    let mut s = setting().await;
    let content = noise(16 << 20);
    let dir = s.site.path().join("source");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("file"), &content).unwrap();
    give(&s.fleet, ONE, &order(&s.server, 1, source(&dir, "file"))).await;
    let ready = s
        .server
        .report("the source is ready", |agent, report| {
            agent == ONE && !report.inline_manifest.is_empty()
        })
        .await;
    eventually("the source links", LIMIT, || async {
        s.server.known.lock().links.get(ONE).map(|_| ())
    })
    .await;
    let told = members(&s.server, &ready);
    s.server.known.lock().swarm = Some(told.clone());
    s.server.tell(ONE, told).await;
    // By SIGKILL, and by a stop of the agent, which is no end of its orders.
    for (number, hard) in [(2, true), (3, false)] {
        let out = s.site.path().join(format!("out{number}"));
        std::fs::create_dir(&out).unwrap();
        s.server.known.lock().reports.clear();
        let asked = order(&s.server, number, What::Target(target(&out, &ready, 4 << 20)));
        give(&s.fleet, TWO, &asked).await;
        let told = members(&s.server, &ready);
        s.server.tell(TWO, told).await;
        let half = s
            .server
            .report("half of it is there", |agent, report| {
                agent == TWO && report.order == number && report.moved > report.size / 2
            })
            .await;
        assert_eq!(half.phase(), Phase::Moving);
        if hard {
            s.two.kill_9();
        } else {
            s.two.terminate(LIMIT).await.unwrap();
        }
        assert_ne!(names(&out), ["file"]);
        s.server.known.lock().reports.clear();
        s.two = s.site.spawn_agent(&options(TWO), "").unwrap();
        let first = s
            .server
            .report("it goes on", |agent, report| {
                agent == TWO && report.order == number && report.moved > 0
            })
            .await;
        assert!(
            first.moved >= half.moved - half.size / 50,
            "{} of {}",
            first.moved,
            half.moved
        );
        let done = s
            .server
            .report("it is done", |agent, report| {
                agent == TWO && report.order == number && report.phase() == Phase::Done
            })
            .await;
        assert_eq!(done.moved, content.len() as u64);
        assert_eq!(std::fs::read(out.join("file")).unwrap(), content);
        assert_eq!(names(&out), ["file"]);
        let manifest_id = ready.manifest_id.clone();
        s.server.tell(TWO, SwarmOver { manifest_id }).await;
        // It would not have to fetch what it still offers.
        eventually("it does not offer it any more", LIMIT, || async {
            (!s.server.known.lock().links.contains_key(TWO)).then_some(())
        })
        .await;
    }
}

// contract: v2-http-task#40
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_stopped_leaves_nothing() {
    let s = setting().await;
    let dir = s.site.path().join("source");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("file"), noise(8 << 20)).unwrap();
    give(&s.fleet, ONE, &order(&s.server, 1, source(&dir, "file"))).await;
    let ready = s
        .server
        .report("the source is ready", |agent, report| {
            agent == ONE && !report.inline_manifest.is_empty()
        })
        .await;
    eventually("the source links", LIMIT, || async {
        s.server.known.lock().links.get(ONE).map(|_| ())
    })
    .await;
    let out = s.site.path().join("out");
    // Without a word of its peers, and in the middle.
    for (number, moving) in [(2, false), (3, true)] {
        if moving {
            let told = members(&s.server, &ready);
            s.server.known.lock().swarm = Some(told.clone());
            s.server.tell(ONE, told).await;
        }
        give(
            &s.fleet,
            TWO,
            &order(&s.server, number, What::Target(target(&out, &ready, 1 << 20))),
        )
        .await;
        if moving {
            let told = members(&s.server, &ready);
            s.server.tell(TWO, told).await;
            s.server
                .report("it moves", |agent, report| {
                    agent == TWO && report.order == number && report.moved > 0
                })
                .await;
        }
        assert_eq!(names(&out).len(), 1, "the part file");
        let began = Instant::now();
        s.server
            .tell(TWO, order(&s.server, number, What::Cancel(Cancel {})))
            .await;
        let over = s
            .server
            .report("it is stopped", |agent, report| {
                agent == TWO && report.order == number && report.phase() == Phase::Failed
            })
            .await;
        assert_eq!(over.code, 126, "{over:?}");
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        assert!(names(&out).is_empty(), "{:?}", names(&out));
    }
    // The source, too.
    s.server.tell(ONE, order(&s.server, 1, What::Cancel(Cancel {}))).await;
    let over = s
        .server
        .report("the source is stopped", |agent, report| {
            agent == ONE && report.phase() == Phase::Failed
        })
        .await;
    assert_eq!(over.code, 126);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_for_the_same_content_share_its_swarm() {
    let s = setting().await;
    let dir = s.site.path().join("source");
    std::fs::create_dir(&dir).unwrap();
    let content = noise(5 << 20);
    std::fs::write(dir.join("file"), &content).unwrap();
    std::fs::write(dir.join("empty"), b"").unwrap();
    for number in [1, 2] {
        give(&s.fleet, ONE, &order(&s.server, number, source(&dir, "file"))).await;
    }
    let ready = s
        .server
        .report("both sources are ready", |agent, report| {
            agent == ONE && report.order == 2 && !report.inline_manifest.is_empty()
        })
        .await;
    let told = members(&s.server, &ready);
    s.server.known.lock().swarm = Some(told.clone());
    s.server.tell(ONE, told).await;
    let outs: Vec<_> = (3..6).map(|n| (n, s.site.path().join(format!("out{n}")))).collect();
    for (number, out) in &outs {
        std::fs::create_dir(out).unwrap();
        let asked = order(&s.server, *number, What::Target(target(out, &ready, 0)));
        let taken = give(&s.fleet, TWO, &asked).await;
        assert_ne!(taken.phase(), Phase::Failed, "{taken:?}");
    }
    for (number, out) in &outs {
        let done = s
            .server
            .report("each is done", |agent, report| {
                agent == TWO && report.order == *number && matches!(report.phase(), Phase::Done | Phase::Failed)
            })
            .await;
        assert_eq!(done.code, 0, "{done:?}");
        assert_eq!(std::fs::read(out.join("file")).unwrap(), content);
        assert_eq!(names(out), ["file"]);
    }
    let manifest_id = ready.manifest_id.clone();
    s.server.tell(ONE, SwarmOver { manifest_id }).await;
    for number in [1, 2] {
        let over = s
            .server
            .report("each source is done", |agent, report| {
                agent == ONE && report.order == number && report.phase() == Phase::Done
            })
            .await;
        assert_eq!(over.code, 0);
    }
}

// contract: v2-http-task#38
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_changes_under_way_is_found_out() {
    let s = setting().await;
    let dir = s.site.path().join("source");
    std::fs::create_dir(&dir).unwrap();
    let mut content = noise(12 << 20);
    std::fs::write(dir.join("file"), &content).unwrap();
    give(&s.fleet, ONE, &order(&s.server, 1, source(&dir, "file"))).await;
    let ready = s
        .server
        .report("the source is ready", |agent, report| {
            agent == ONE && !report.inline_manifest.is_empty()
        })
        .await;
    content.reverse();
    std::fs::write(dir.join("file"), &content).unwrap();
    let told = members(&s.server, &ready);
    s.server.known.lock().swarm = Some(told.clone());
    s.server.tell(ONE, told).await;
    let out = s.site.path().join("out");
    give(
        &s.fleet,
        TWO,
        &order(&s.server, 2, What::Target(target(&out, &ready, 0))),
    )
    .await;
    let over = s
        .server
        .report("the source has failed", |agent, report| {
            agent == ONE && report.phase() == Phase::Failed
        })
        .await;
    assert_eq!(over.code, 709, "{over:?}");
    assert!(!out.join("file").exists());
}
