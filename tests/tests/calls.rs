//! Calls of other services to agents: found through the store, passed on by gse_task, answered or not; and file orders that come that way.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use gse_core::fleet::{Fleet, FleetConfig, Question, Silence};
use gse_core::rpc::{Dialler, RpcConfig};
use gse_core::store::{Store, StoreConfig};
use gse_core::tls::TlsFiles;
use gse_proto::calls as c;
use gse_proto::calls::agent_calls_client::AgentCallsClient;
use gse_proto::file::order::What;
use gse_proto::file::{Cancel, EntryKind, Manifest, Order, Phase, Placing, Push, Report, Source, Target};
use gse_proto::frame::Frame;
use gse_proto::ids::AgentId;
use gse_proto::prost::Message;
use gse_proto::session as s;
use gse_tests::{AgentOptions, Site, StoreKind, Wire};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

const AGENT: &str = "020000000242010a00002f17521298676561";
const SILENT: &str = "020000000242010a00002f17521298676562";

fn certs(site: &Site) -> TlsFiles {
    let dir = site.path().join("certs");
    TlsFiles {
        ca: dir.join("gseca.crt"),
        cert: dir.join("gse_server.crt"),
        key: dir.join("gse_server.key"),
    }
}

async fn fleet(site: &Site) -> Fleet {
    let store = StoreConfig {
        url: site.server_store_url(),
        ..StoreConfig::default()
    };
    let dialler = Dialler::new(&RpcConfig::default(), &certs(site)).unwrap();
    let config = FleetConfig {
        heartbeat_interval_ms: 1_000,
        ..FleetConfig::default()
    };
    Fleet::new(Store::connect(&store).await.unwrap(), dialler, config)
}

/// Asks some agents the same.
async fn ask(
    fleet: &Fleet,
    service: &'static str,
    agents: &[&str],
    payload: &[u8],
    limit: Duration,
) -> Vec<Result<Bytes, Silence>> {
    let question = Question {
        service,
        caller: "a test".into(),
        shared: Bytes::copy_from_slice(payload),
        agents: agents
            .iter()
            .map(|id| (AgentId::parse(id).unwrap(), Bytes::new()))
            .collect(),
        patience: limit,
        deadline: tokio::time::Instant::now() + limit,
    };
    let (sender, mut answers) = mpsc::channel(agents.len());
    fleet.ask(question, &sender).await;
    drop(sender);
    let mut all: Vec<Option<Result<Bytes, Silence>>> = agents.iter().map(|_| None).collect();
    while let Some((n, answer)) = answers.recv().await {
        assert!(all[n].replace(answer).is_none(), "one answer for each agent");
    }
    all.into_iter().map(|answer| answer.expect("an answer")).collect()
}

fn now_ms() -> u64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    now.as_millis() as u64
}

fn order(task: &str, number: u32, what: What) -> Order {
    Order {
        task_id: task.into(),
        order: number,
        servers: vec![],
        not_after_ms: now_ms() + 30_000,
        what: Some(what),
    }
}

async fn give(fleet: &Fleet, order: &Order) -> Report {
    let answers = ask(fleet, "file", &[AGENT], &order.encode_to_vec(), Duration::from_secs(10)).await;
    let answer = answers.into_iter().next().unwrap();
    Report::decode(answer.expect("an answer of the agent")).unwrap()
}

fn push(placing: Placing, content: &[u8]) -> What {
    What::Push(Push {
        placing: Some(placing),
        content: Bytes::copy_from_slice(content),
        sha256: Sha256::digest(content).to_vec().into(),
    })
}

fn placing(dir: &Path, name: &str) -> Placing {
    Placing {
        dir: dir.to_str().unwrap().into(),
        name: name.into(),
        user: "root".into(),
        ..Placing::default()
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

// contract: procmgr-agent-lifecycle#46
// contract: procmgr-agent-lifecycle#48
#[tokio::test]
async fn pushed_files_are_placed_once_with_owner_and_mode() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let _agent = site.agent(AGENT, "10.6.0.1").await.unwrap();
    let fleet = fleet(&site).await;
    let dir = site.path().join("target");
    std::fs::create_dir(&dir).unwrap();

    let content = vec![b'x'; 102_400];
    let first = order(
        "T",
        1,
        push(
            Placing {
                mode: 0o640,
                ..placing(&dir, "a b\n.txt")
            },
            &content,
        ),
    );
    let report = give(&fleet, &first).await;
    assert_eq!((report.phase(), report.code), (Phase::Done, 0), "{report:?}");
    assert_eq!((report.size, report.moved), (102_400, 102_400));
    assert!(report.started_ms > 0 && report.ended_ms >= report.started_ms);
    let file = dir.join("a b\n.txt");
    assert_eq!(std::fs::read(&file).unwrap(), content);
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o7777, 0o640);
    assert_eq!(names(&dir), ["a b\n.txt"], "nothing is left beside it");

    // The same order again is answered, not carried out.
    std::fs::write(&file, "changed since").unwrap();
    assert_eq!(give(&fleet, &first).await, report);
    assert_eq!(std::fs::read(&file).unwrap(), b"changed since");

    // Without a mode; over what is there; with directories that are missing; by another account.
    let report = give(&fleet, &order("T", 2, push(placing(&dir, "a b\n.txt"), b""))).await;
    assert_eq!(report.code, 0, "{report:?}");
    assert_eq!(file.metadata().unwrap().len(), 0);
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o7777, 0o644);
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    let own = site.path().join("own");
    std::fs::create_dir(&own).unwrap();
    std::os::unix::fs::chown(&own, Some(nobody.uid.as_raw()), Some(nobody.gid.as_raw())).unwrap();
    std::fs::set_permissions(site.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let deep = own.join("x/y");
    let place = Placing {
        make_dirs: true,
        user: "nobody".into(),
        ..placing(&deep, "f")
    };
    let report = give(&fleet, &order("T", 3, push(place, b"mine"))).await;
    assert_eq!(report.code, 0, "{report:?}");
    for path in [own.join("x"), deep.clone(), deep.join("f")] {
        assert_eq!(
            path.metadata().unwrap().uid(),
            nobody.uid.as_raw(),
            "{}",
            path.display()
        );
    }
    // By root, for somebody else.
    let place = Placing {
        owner: "nobody".into(),
        make_dirs: true,
        mode: 0o4755,
        ..placing(&dir.join("made"), "g")
    };
    let report = give(&fleet, &order("T", 4, push(place, b"given"))).await;
    assert_eq!(report.code, 0, "{report:?}");
    for path in [dir.join("made"), dir.join("made/g")] {
        assert_eq!(
            path.metadata().unwrap().uid(),
            nobody.uid.as_raw(),
            "{}",
            path.display()
        );
    }
    assert_eq!(
        dir.join("made/g").metadata().unwrap().permissions().mode() & 0o7777,
        0o4755
    );
    // Through a directory that is a link.
    std::os::unix::fs::symlink(&dir, site.path().join("link")).unwrap();
    let report = give(
        &fleet,
        &order("T", 5, push(placing(&site.path().join("link"), "l"), b"l")),
    )
    .await;
    assert_eq!(report.code, 0, "{report:?}");
    assert_eq!(std::fs::read(dir.join("l")).unwrap(), b"l");
}

// contract: p2p#27
#[tokio::test]
async fn what_can_not_be_placed_says_why() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let options = AgentOptions {
        sets: vec![
            format!("files.target_dirs=[\"{}\"]", site.path().join("target").display()),
            "files.allowed_accounts=[\"root\",\"nobody\",\"nosuchaccount\"]".into(),
            "files.max_inline_bytes=1000".into(),
        ],
        ..AgentOptions::new(AGENT, "10.6.0.1")
    };
    let _agent = site.spawn_agent(&options, "").unwrap();
    site.wait_state(AGENT, 2).await;
    let fleet = fleet(&site).await;
    let dir = site.path().join("target");
    std::fs::create_dir(&dir).unwrap();
    std::fs::set_permissions(site.path(), PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::create_dir(dir.join("there")).unwrap();
    std::fs::write(dir.join("plain"), "").unwrap();
    std::os::unix::fs::symlink(site.path(), dir.join("out")).unwrap();
    let user = |user: &str| Placing {
        user: user.into(),
        ..placing(&dir, "f")
    };
    let cases: Vec<(&str, What, i32)> = vec![
        ("no such account", push(user("nosuchaccount"), b""), 122),
        ("an account that is not allowed", push(user("daemon"), b""), 121),
        (
            "a directory that is missing",
            push(placing(&dir.join("missing"), "f"), b""),
            127,
        ),
        (
            "a file on the way",
            push(
                Placing {
                    make_dirs: true,
                    ..placing(&dir.join("plain/x"), "f")
                },
                b"",
            ),
            127,
        ),
        ("no right to write", push(user("nobody"), b""), 705),
        (
            "no right to make",
            push(
                Placing {
                    make_dirs: true,
                    user: "nobody".into(),
                    ..placing(&dir.join("x/y"), "f")
                },
                b"",
            ),
            705,
        ),
        ("a directory in its place", push(placing(&dir, "there"), b"x"), 705),
        ("elsewhere", push(placing(site.path(), "f"), b""), 121),
        (
            "elsewhere through a link",
            push(placing(&dir.join("out"), "f"), b""),
            121,
        ),
        (
            "elsewhere through a link, made",
            push(
                Placing {
                    make_dirs: true,
                    ..placing(&dir.join("out/new"), "f")
                },
                b"",
            ),
            121,
        ),
        (
            "no directory",
            push(
                Placing {
                    dir: String::new(),
                    ..placing(&dir, "f")
                },
                b"",
            ),
            106,
        ),
        (
            "a relative directory",
            push(
                Placing {
                    dir: "tmp".into(),
                    ..placing(&dir, "f")
                },
                b"",
            ),
            106,
        ),
        ("a way up", push(placing(&dir.join("../target"), "f"), b""), 106),
        ("a name with a slash", push(placing(&dir, "../f"), b""), 106),
        ("no name", push(placing(&dir, ""), b""), 106),
        ("too much", push(placing(&dir, "f"), &[0; 1001]), 119),
        (
            "damaged content",
            What::Push(Push {
                placing: Some(placing(&dir, "f")),
                content: Bytes::from_static(b"a"),
                sha256: Sha256::digest(b"b").to_vec().into(),
            }),
            702,
        ),
    ];
    let before = names(&dir);
    for (n, (what, asked, code)) in (0..).zip(cases) {
        let report = give(&fleet, &order("T", n, asked)).await;
        assert_eq!(
            (report.phase(), report.code),
            (Phase::Failed, code),
            "{what}: {report:?}"
        );
        assert!(!report.message.is_empty(), "{what}");
        assert_eq!(names(&dir), before, "{what}: nothing is left");
    }
    let late = Order {
        not_after_ms: now_ms() - 1,
        ..order("T", 900, push(placing(&dir, "f"), b""))
    };
    assert_eq!(give(&fleet, &late).await.code, 120);
    // A cancellation that overtakes its order.
    assert_eq!(give(&fleet, &order("T", 901, What::Cancel(Cancel {}))).await.code, 126);
    assert_eq!(
        give(&fleet, &order("T", 901, push(placing(&dir, "f"), b""))).await.code,
        126
    );
    assert_eq!(names(&dir), before);
}

// contract: p2p#26
#[tokio::test]
async fn what_a_source_has_comes_out_at_a_target() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let _agent = site.agent(AGENT, "10.6.0.1").await.unwrap();
    let fleet = fleet(&site).await;
    let top = site.path().join("source/top");
    std::fs::create_dir_all(top.join("empty")).unwrap();
    std::fs::create_dir(top.join("closed")).unwrap();
    std::fs::write(top.join("plain"), "content").unwrap();
    std::fs::write(top.join("none"), "").unwrap();
    std::fs::write(top.join("closed/new\nline"), vec![7; 70_000]).unwrap();
    let odd: std::ffi::OsString = std::os::unix::ffi::OsStringExt::from_vec(b"not \xff utf-8".to_vec());
    std::fs::write(top.join(&odd), "odd").unwrap();
    std::os::unix::fs::symlink("../plain", top.join("closed/link")).unwrap();
    std::fs::set_permissions(top.join("plain"), PermissionsExt::from_mode(0o751)).unwrap();
    std::fs::set_permissions(top.join("closed"), PermissionsExt::from_mode(0o700)).unwrap();

    let source = |dir: &Path, name: &str| Source {
        dir: dir.to_str().unwrap().into(),
        name: name.into(),
        user: "root".into(),
        upload_limit: 0,
        inline_limit: 1 << 20,
    };
    let offered = give(&fleet, &order("S", 1, What::Source(source(&top, "")))).await;
    assert_eq!(offered.code, 0, "{offered:?}");
    assert_eq!(offered.size, 70_010);
    let manifest = Manifest::decode(offered.inline_manifest.clone()).unwrap();
    assert_eq!(manifest.entries.len(), 8);
    assert!(manifest.entries.iter().all(|entry| entry.path[0][..] == b"top"[..]));

    let out = site.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let target = |dir: &Path, offered: &Report| Target {
        placing: Some(placing(dir, "")),
        manifest_id: offered.manifest_id.clone(),
        inline_manifest: offered.inline_manifest.clone(),
        inline_content: offered.inline_content.clone(),
        ..Target::default()
    };
    let report = give(&fleet, &order("S", 2, What::Target(target(&out, &offered)))).await;
    assert_eq!(report.code, 0, "{report:?}");
    assert_eq!(names(&out), ["top"], "nothing is left beside it");
    let there = out.join("top");
    assert_eq!(std::fs::read(there.join("plain")).unwrap(), b"content");
    assert_eq!(std::fs::read(there.join("none")).unwrap(), b"");
    assert_eq!(std::fs::read(there.join(&odd)).unwrap(), b"odd");
    assert_eq!(std::fs::read(there.join("closed/new\nline")).unwrap(), vec![7; 70_000]);
    assert_eq!(
        std::fs::read_link(there.join("closed/link")).unwrap(),
        Path::new("../plain")
    );
    assert!(there.join("empty").is_dir());
    assert_eq!(
        there.join("plain").metadata().unwrap().permissions().mode() & 0o7777,
        0o751
    );
    assert_eq!(
        there.join("closed").metadata().unwrap().permissions().mode() & 0o7777,
        0o700
    );

    // Over what is there, but never through a link that somebody has put inside.
    std::fs::write(there.join("plain"), "older").unwrap();
    let report = give(&fleet, &order("S", 3, What::Target(target(&out, &offered)))).await;
    assert_eq!(report.code, 0, "{report:?}");
    assert_eq!(std::fs::read(there.join("plain")).unwrap(), b"content");
    std::fs::remove_dir_all(there.join("closed")).unwrap();
    std::fs::create_dir(site.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink(site.path().join("elsewhere"), there.join("closed")).unwrap();
    let report = give(&fleet, &order("S", 4, What::Target(target(&out, &offered)))).await;
    assert_eq!(report.code, 705, "{report:?}");
    assert!(names(&site.path().join("elsewhere")).is_empty());
    assert_eq!(names(&out), ["top"]);

    // Content that is not what the manifest says.
    let mut other = target(&out, &offered);
    let mut bytes = other.inline_content.to_vec();
    bytes[3] ^= 1;
    other.inline_content = bytes.into();
    assert_eq!(give(&fleet, &order("S", 5, What::Target(other))).await.code, 702);

    // On the host of the source: the same place is not touched, another one gets a copy.
    let on_host = |dir: &Path| Target {
        same_host: Some(source(&top, "")),
        inline_content: Bytes::new(),
        ..target(dir, &offered)
    };
    let inode = top.join("plain").metadata().unwrap().ino();
    let report = give(
        &fleet,
        &order("S", 6, What::Target(on_host(&site.path().join("source")))),
    )
    .await;
    assert_eq!(report.code, 0, "{report:?}");
    assert_eq!(top.join("plain").metadata().unwrap().ino(), inode);
    let copy = site.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    let report = give(&fleet, &order("S", 7, What::Target(on_host(&copy)))).await;
    assert_eq!(report.code, 0, "{report:?}");
    assert_eq!(std::fs::read(copy.join("top/plain")).unwrap(), b"content");

    // Patterns mean files; what is called like one is meant itself.
    let dir = site.path().join("patterns");
    std::fs::create_dir_all(dir.join("x.log.d")).unwrap();
    for name in ["a.log", "b.log", "c.txt", "[a].log", ".hidden.log"] {
        std::fs::write(dir.join(name), name).unwrap();
    }
    for (n, (pattern, expected)) in (20..).zip([
        ("*.log", vec!["[a].log", "a.log", "b.log"]),
        ("[a].log", vec!["[a].log"]),
        ("[ab].log", vec!["a.log", "b.log"]),
        (r"[a-c]\.(log|txt)", vec!["a.log", "b.log", "c.txt"]),
        ("REGEX:.*log", vec![".hidden.log", "[a].log", "a.log", "b.log"]),
    ]) {
        let offered = give(&fleet, &order("S", n, What::Source(source(&dir, pattern)))).await;
        assert_eq!(offered.code, 0, "{pattern}: {offered:?}");
        let manifest = Manifest::decode(offered.inline_manifest).unwrap();
        let found: Vec<_> = manifest
            .entries
            .iter()
            .map(|entry| String::from_utf8(entry.path[0].to_vec()).unwrap())
            .collect();
        assert_eq!(found, expected, "{pattern}");
        assert!(manifest.entries.iter().all(|entry| entry.kind() == EntryKind::File));
    }
    nix::unistd::mkfifo(&dir.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::os::unix::fs::symlink("../source", dir.join("x.log.d/leads out")).unwrap();
    let closed = dir.join("closed");
    std::fs::write(&closed, "secret").unwrap();
    std::fs::set_permissions(&closed, PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::set_permissions(site.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let nobody = Source {
        user: "nobody".into(),
        ..source(&dir, "closed")
    };
    for (n, (asked, code)) in (40..).zip([
        (source(&dir, "*.nothing"), 104),
        (source(&dir, "nothing"), 104),
        (source(&dir.join("nothing"), "x"), 104),
        (source(&dir, "pipe"), 706),
        (source(&dir.join("x.log.d"), ""), 706),
        (source(Path::new("/"), ""), 106),
        (source(Path::new(""), "x"), 106),
        (source(&dir, "../x"), 106),
        (nobody, 123),
    ]) {
        let report = give(&fleet, &order("S", n, What::Source(asked.clone()))).await;
        assert_eq!(report.code, code, "{asked:?}: {report:?}");
        assert!(!report.message.is_empty());
    }
}

/// A small file system, for as long as this lives.
struct Small(std::path::PathBuf);

impl Small {
    fn mount(dir: &Path) -> Self {
        std::fs::create_dir(dir).unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"])
            .arg(dir)
            .status();
        assert!(mounted.unwrap().success());
        Self(dir.to_owned())
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        std::process::Command::new("umount").arg(&self.0).status().ok();
    }
}

#[tokio::test]
async fn a_full_disk_costs_the_row_alone() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let options = AgentOptions {
        sets: vec!["files.min_free_disk_bytes=4096".into()],
        ..AgentOptions::new(AGENT, "10.6.0.1")
    };
    let _agent = site.spawn_agent(&options, "").unwrap();
    site.wait_state(AGENT, 2).await;
    let fleet = fleet(&site).await;
    let dir = site.path().join("small");
    let _small = Small::mount(&dir);
    let report = give(&fleet, &order("D", 1, push(placing(&dir, "large"), &[1; 300 << 10]))).await;
    assert_eq!(report.code, 708, "{report:?}");
    assert!(names(&dir).is_empty());
    let report = give(&fleet, &order("D", 2, push(placing(&dir, "fits"), &[1; 100 << 10]))).await;
    assert_eq!(report.code, 0, "{report:?}");
    // What is there already is kept when its successor finds no room.
    let report = give(&fleet, &order("D", 3, push(placing(&dir, "fits"), &[2; 200 << 10]))).await;
    assert_eq!(report.code, 708, "{report:?}");
    assert_eq!(std::fs::read(dir.join("fits")).unwrap(), [1; 100 << 10]);
    assert_eq!(names(&dir), ["fits"]);
}

/// What an agent that does nothing by itself is asked.
async fn next_call(wire: &mut Wire) -> s::Call {
    loop {
        match wire.recv().await.unwrap().expect("the session lasts") {
            Frame::Call(call) => return call,
            _ => continue,
        }
    }
}

async fn silent(site: &Site) -> Wire {
    let (cert, key) = site.agent_certificate(SILENT).unwrap();
    let address = &site.agents_addresses()[0];
    let mut wire = Wire::connect(address, &site.path().join("certs/gseca.crt"), &cert, &key)
        .await
        .unwrap();
    wire.greet(gse_tests::wire::hello(SILENT)).await.unwrap();
    wire
}

#[tokio::test]
async fn every_call_gets_one_answer() {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    site.task_sets.push("calls.max_reply_bytes=1024".into());
    site.start_task().await.unwrap();
    site.start_api().await.unwrap();
    let _agent = site.agent(AGENT, "10.6.0.1").await.unwrap();
    let mut wire = silent(&site).await;
    let address = site.place(0, "rpc");
    let channel = Dialler::new(&RpcConfig::default(), &certs(&site))
        .unwrap()
        .channel(&address)
        .unwrap();
    let call = |service: &str, agents: &[&str], timeout_ms| c::CallRequest {
        service: service.into(),
        caller: "a test".into(),
        shared: Bytes::from_static(b"shared"),
        calls: agents
            .iter()
            .map(|id| c::AgentCall {
                agent_id: (*id).into(),
                own: Bytes::from_static(b"own "),
            })
            .collect(),
        timeout_ms,
    };
    let talk = |request: c::CallRequest| {
        let mut client = AgentCallsClient::new(channel.clone());
        tokio::spawn(async move {
            let mut stream = client.call(request).await?.into_inner();
            let mut answers = Vec::new();
            while let Some(answer) = stream.message().await? {
                answers.push((answer.index, answer.failure(), answer.payload));
            }
            answers.sort_by_key(|answer| answer.0);
            Ok::<_, tonic::Status>(answers)
        })
    };

    // One who answers, one who does not know the service, one who is not there, one who is nobody.
    let asked = talk(call("strange", &[SILENT, AGENT, "gone", "not an id\0"], 10_000));
    let one = next_call(&mut wire).await;
    assert_eq!(
        (one.service.as_str(), &one.payload[..]),
        ("strange", b"own shared".as_slice())
    );
    let reply = |call: &s::Call, payload: Vec<u8>| s::CallReply {
        call_id: call.call_id,
        failure: 0,
        payload: payload.into(),
    };
    // An answer to nothing is no harm.
    wire.send(s::CallReply::default()).await.unwrap();
    wire.send(reply(&one, b"yes".to_vec())).await.unwrap();
    wire.send(reply(&one, b"twice".to_vec())).await.unwrap();
    let answers = asked.await.unwrap().unwrap();
    let outcomes: Vec<_> = answers.iter().map(|(_, failure, _)| *failure).collect();
    assert_eq!(
        outcomes,
        [
            c::Failure::None,
            c::Failure::Unsupported,
            c::Failure::NotHere,
            c::Failure::NotHere
        ]
    );
    assert_eq!(&answers[0].2[..], b"yes");

    // Too late, and then too long.
    let began = Instant::now();
    let asked = talk(call("strange", &[SILENT], 300));
    let late = next_call(&mut wire).await;
    assert_eq!(asked.await.unwrap().unwrap()[0].1, c::Failure::Timeout);
    assert!(began.elapsed() >= Duration::from_millis(290) && began.elapsed() < Duration::from_secs(5));
    wire.send(reply(&late, vec![])).await.unwrap();
    let asked = talk(call("strange", &[SILENT], 10_000));
    let one = next_call(&mut wire).await;
    wire.send(reply(&one, vec![0; 1025])).await.unwrap();
    assert_eq!(asked.await.unwrap().unwrap()[0].1, c::Failure::TooLong);

    // An agent that does not know calls at all.
    let asked = talk(call("strange", &[SILENT, SILENT], 10_000));
    next_call(&mut wire).await;
    next_call(&mut wire).await;
    wire.send(s::Unsupported {
        kind: u32::from(Frame::CALL),
    })
    .await
    .unwrap();
    let answers = asked.await.unwrap().unwrap();
    assert!(
        answers.iter().all(|answer| answer.1 == c::Failure::Unsupported),
        "{answers:?}"
    );

    // A session that ends.
    let asked = talk(call("strange", &[SILENT], 10_000));
    next_call(&mut wire).await;
    drop(wire);
    assert_eq!(asked.await.unwrap().unwrap()[0].1, c::Failure::Lost);

    // Nobody at all, nothing that makes sense.
    assert!(talk(call("strange", &[], 1)).await.unwrap().unwrap().is_empty());
    assert!(talk(call("", &[AGENT], 1)).await.unwrap().is_err());
    let figures = gse_tests::metrics::Figures::of(site.task.as_ref().unwrap())
        .await
        .unwrap();
    assert_eq!(figures.sum("gse_task_agent_calls_total"), 9.0);
}

// contract: v2-http-task#19
#[tokio::test]
async fn agents_are_found_wherever_they_are() {
    let mut site = Site::with_nodes(StoreKind::Embedded, 2).await.unwrap();
    let options = AgentOptions {
        nodes: Some(vec![2]),
        ..AgentOptions::new(AGENT, "10.6.0.1")
    };
    let mut agent = site.spawn_agent(&options, "").unwrap();
    site.wait_state(AGENT, 2).await;
    let fleet = fleet(&site).await;
    let began = Instant::now();
    let answers = ask(
        &fleet,
        "strange",
        &[AGENT, "0:10.6.0.1", "nobody-knows-it"],
        b"",
        Duration::from_secs(20),
    )
    .await;
    assert_eq!(answers[0], Err(Silence::Unsupported));
    assert_eq!(answers[1], Err(Silence::Unsupported), "by its address");
    assert!(matches!(answers[2], Err(Silence::Offline(_))), "{answers:?}");
    assert!(began.elapsed() < Duration::from_secs(2));

    // Its node dies: it is asked again where it comes back.
    site.kill_node(2);
    let answers = ask(&fleet, "strange", &[AGENT], b"", Duration::from_secs(30)).await;
    assert_eq!(answers[0], Err(Silence::Unsupported));

    // It is stopped: nobody waits for it.
    agent.terminate(Duration::from_secs(10)).await.unwrap();
    site.wait_state(AGENT, 6).await;
    let began = Instant::now();
    let answers = ask(&fleet, "strange", &[AGENT], b"", Duration::from_secs(20)).await;
    assert!(matches!(answers[0], Err(Silence::Offline(_))), "{answers:?}");
    assert!(began.elapsed() < Duration::from_secs(2));
}
