//! Foreign BitTorrent clients at gse_btsvr's front: what is opened they can have, and nothing else.
//!
//! Needs the Debian package aria2 (`scripts/test full` installs it), and for the full tier node with the npm registry; without them the
//! tests that want them say so and pass.
#![allow(clippy::unwrap_used)] // a test ends by panicking

use std::path::{Path, PathBuf};
use std::process::{Command as Blocking, Output, Stdio};
use std::time::{Duration, Instant};

use gse_tests::files::{codes, path_text, push_body, random_bytes, transfer_body, transfer_task};
use gse_tests::process::binary;
use gse_tests::site::{APP, SECRET, SMALL_APP};
use gse_tests::{Api, Child, Site, eventually};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;

const LIMIT: Duration = Duration::from_secs(60);

/// A site whose gse_btsvr has a front.
struct Front {
    site: Site,
    _agents: Vec<Child>,
    ids: Vec<String>,
    dir: tempfile::TempDir,
}

impl Front {
    async fn start(agents: usize, more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cache = format!("cache.dir={}", path_text(&dir.path().join("cache")));
        let mut sets = vec![
            cache.as_str(),
            "peer.listen=127.0.0.1:0",
            "front.enabled=true",
            "front.http_listen=127.0.0.1:0",
            "front.udp_listen=127.0.0.1:0",
            "front.peer_listen=127.0.0.1:0",
            "front.interval_s=5",
        ];
        sets.extend(more);
        let (site, _agents, ids) = Site::with_file_agents(agents, &sets, &[]).await.unwrap();
        Self {
            site,
            _agents,
            ids,
            dir,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Copies a new file from the first agent to the second, to the end; gives the task. Not faster than the server takes its copy: one
    /// that is not whole when the transfer is over is not kept.
    async fn copy(&self, name: &str, content: &[u8]) -> String {
        let from = self.at("from");
        std::fs::create_dir_all(&from).unwrap();
        std::fs::write(from.join(name), content).unwrap();
        let to = path_text(&self.at("to")) + "/";
        let task = transfer_task(&self.ids[0], &path_text(&from), name, &[&self.ids[1]], &to);
        let mut body = transfer_body(&[task], 90);
        body["download_speed"] = json!(2);
        let api = self.site.api();
        let id = api.submit_files("async_transfer_file", &body).await;
        let rows = api.files_over(&id, LIMIT).await;
        assert_eq!(codes(&rows), [0, 0], "{rows:#?}");
        id
    }

    /// How a task is open, once each part of it is or can't be.
    async fn settled(&self, task: &str) -> Value {
        eventually("each part is open or can't be", LIMIT, || async {
            let reply = self
                .site
                .api()
                .post("/gse/v1/xfer/torrent", &json!({"task_id": task}))
                .await;
            // The server may have been killed just now.
            let parts = reply["data"]["parts"].as_array()?.clone();
            let over = !parts.is_empty() && parts.iter().all(|part| part["state"] != "waiting");
            over.then(|| reply["data"].clone())
        })
        .await
    }

    fn address(&self, listener: &str) -> String {
        self.site.btsvr[&1].address(listener).to_owned()
    }

    /// `gse` as an application of this site.
    async fn gse(&self, args: &[&str]) -> Output {
        let mut command = Command::new(binary("gse").unwrap());
        command
            .args(args)
            .env("GSE_DATA", self.at("no-data"))
            .env("GSE_API", format!("http://{}", self.site.api().address))
            .env("GSE_APP_CODE", APP)
            .env("GSE_APP_SECRET", SECRET)
            .env_remove("GSE_CA")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        tokio::time::timeout(LIMIT, command.output()).await.unwrap().unwrap()
    }
}

/// Whether a program can be started; if not, says what is left out.
fn there_is(program: &str) -> bool {
    let found = Blocking::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if found.is_err() {
        eprintln!("skipped: {program} is not installed");
    }
    found.is_ok()
}

/// GET without anything else; the status and the body.
async fn get(address: &str, path: &str) -> (u16, Vec<u8>) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(LIMIT, stream.read_to_end(&mut answer))
        .await
        .unwrap()
        .unwrap();
    let head = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap();
    let status = std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap();
    (status, answer[head + 4..].to_vec())
}

/// Whether a plain peer that asks for a swarm is answered with a handshake.
async fn lets_in(address: &str, info_hash: &[u8]) -> bool {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let hello = [
        b"\x13BitTorrent protocol",
        &[0; 8][..],
        info_hash,
        b"-XX0000-123456789012",
    ]
    .concat();
    // It may be closed at any time; what comes back is what counts.
    stream.write_all(&hello).await.ok();
    let mut answer = [0; 48];
    tokio::time::timeout(LIMIT, stream.read_exact(&mut answer))
        .await
        .unwrap()
        .is_ok_and(|_| answer[28..] == *info_hash)
}

/// What a tracker answers to an announce.
async fn announce(tracker: &str, info_hash: &[u8]) -> String {
    let hash: String = info_hash.iter().map(|byte| format!("%{byte:02x}")).collect();
    let path = format!("/announce?info_hash={hash}&peer_id=-XX0000-123456789012&port=7001&left=1&compact=1");
    String::from_utf8_lossy(&get(tracker, &path).await.1).into_owned()
}

/// Asks the tracker over UDP (BEP 15) for peers.
async fn peers_by_udp(tracker: &str, info_hash: &[u8]) -> Vec<String> {
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(tracker).await.unwrap();
    let mut answer = [0; 512];
    let mut ask = async |request: &[u8]| {
        socket.send(request).await.unwrap();
        let read = tokio::time::timeout(LIMIT, socket.recv(&mut answer))
            .await
            .unwrap()
            .unwrap();
        answer[..read].to_vec()
    };
    let connected = ask(&[&0x0417_2710_1980_u64.to_be_bytes()[..], &[0; 4], b"abcd"].concat()).await;
    let asked = [
        &connected[8..16],
        &1_u32.to_be_bytes(),
        b"efgh",
        info_hash,
        b"-XX0000-123456789013",
        &0_u64.to_be_bytes(),
        // It lacks something: one that lacks nothing is told of nobody who does not.
        &1_u64.to_be_bytes(),
        &[0; 20],
        &(-1_i32).to_be_bytes(),
        &7002_u16.to_be_bytes(),
    ];
    let told = ask(&asked.concat()).await;
    assert_eq!(told[..8], *b"\0\0\0\x01efgh", "{told:?}");
    let peers = told[20..].chunks(6);
    peers
        .map(|peer| {
            format!(
                "{}.{}.{}.{}:{}",
                peer[0],
                peer[1],
                peer[2],
                peer[3],
                u16::from_be_bytes([peer[4], peer[5]])
            )
        })
        .filter(|peer| !peer.ends_with(":7001"))
        .collect()
}

/// Downloads with aria2, and gives what it has got.
async fn aria2(torrent: &Path, dir: &Path, name: &str) -> Vec<u8> {
    let mut command = Command::new("aria2c");
    command.args([
        "--no-conf",
        "--enable-dht=false",
        "--enable-dht6=false",
        "--bt-enable-lpd=false",
        "--enable-peer-exchange=false",
        "--seed-time=0",
        "--file-allocation=none",
        "--bt-stop-timeout=50",
        "--summary-interval=0",
        "--check-certificate=false",
        "--disable-ipv6=true",
        "--listen-port=20000-40000",
    ]);
    command.arg("--dir").arg(dir).arg(torrent).kill_on_drop(true);
    let done = tokio::time::timeout(LIMIT, command.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{said}");
    std::fs::read(dir.join(name)).unwrap()
}

#[tokio::test]
async fn aria2_gets_what_is_opened_and_nothing_else() {
    // contract: p2p#5, p2p#9, p2p#16
    if !there_is("aria2c") {
        return;
    }
    let front = Front::start(2, &["cache.take=always"]).await;
    let content = random_bytes(8 << 20);
    let id = front.copy("large", &content).await;
    let closed = front.copy("other", &random_bytes(3 << 20)).await;
    let (tracker, peer) = (front.address("tracker_http"), front.address("front_peer"));

    // Nothing is open yet, although its content is in the cache.
    let reply = front
        .site
        .api()
        .post("/gse/v1/xfer/torrent", &json!({"task_id": id}))
        .await;
    assert_eq!(
        (&reply["data"]["expires_at"], &reply["data"]["parts"]),
        (&json!(0), &json!([])),
        "{reply}"
    );
    assert_eq!(get(&tracker, &format!("/torrent/{id}/0.torrent")).await.0, 404);

    let opened = front.gse(&["xfer", "open", &id, "--for", "10m"]).await;
    let said = String::from_utf8_lossy(&opened.stdout).into_owned();
    assert!(
        opened.status.success() && said.contains("/torrent/"),
        "{said} {:?}",
        opened.stderr
    );
    let state = front.settled(&id).await;
    let part = &state["parts"][0];
    assert_eq!(
        (&part["state"], &part["size"]),
        (&json!("open"), &json!(8 << 20)),
        "{state}"
    );
    let info_hash = hex::decode(part["info_hash"].as_str().unwrap()).unwrap();
    // Both ways give the same file.
    let torrent = front.gse(&["xfer", "torrent", &id]).await;
    assert!(torrent.status.success(), "{torrent:?}");
    let path = part["url"].as_str().unwrap().split_once(&tracker).unwrap().1;
    let (status, served) = get(&tracker, path).await;
    assert!(status == 200 && served == torrent.stdout);
    let file = front.at("large.torrent");
    std::fs::write(&file, &served).unwrap();
    assert!(aria2(&file, &front.at("aria"), "large").await == content);
    // The tracker's other way tells of the same peer.
    assert_eq!(
        peers_by_udp(&front.address("tracker_udp"), &info_hash).await,
        std::slice::from_ref(&peer)
    );

    // Only that swarm: the other task's content is as unknown as content that never was.
    assert!(lets_in(&peer, &info_hash).await);
    assert!(announce(&tracker, &info_hash).await.contains("5:peers"));
    assert!(!lets_in(&peer, &[7; 20]).await);
    assert!(announce(&tracker, &[7; 20]).await.contains("unknown swarm"));
    assert_eq!(get(&tracker, &format!("/torrent/{closed}/0.torrent")).await.0, 404);
    // Nor is it at the listener of our own peers.
    assert!(!lets_in(&front.address("peer"), &info_hash).await);

    // Only for who may, and only of its own.
    let small = Api::new(&front.site.api().address, SMALL_APP, SECRET);
    for call in ["open", "close"] {
        let reply = small
            .post(&format!("/gse/v1/xfer/{call}"), &json!({"task_id": id}))
            .await;
        assert!(reply["code"] == 1_000_903 || reply["code"] == 1_000_116, "{reply}");
    }
    let audit = std::fs::read_to_string(front.site.path().join("gse_btsvr-1-audit.log")).unwrap();
    let line = audit.lines().find(|line| line.contains("file.open")).unwrap();
    assert!(line.contains(&id) && line.contains(&front.ids[0]), "{line}");

    // Closed again: everything of it is gone at once.
    let done = front.gse(&["xfer", "close", &id]).await;
    assert!(done.status.success(), "{done:?}");
    assert!(!lets_in(&peer, &info_hash).await);
    assert!(announce(&tracker, &info_hash).await.contains("unknown swarm"));
    assert_eq!(get(&tracker, path).await.0, 404);
    let refused = front.gse(&["xfer", "torrent", &id]).await;
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("gse xfer open"));

    // Opened for a short time, it closes by itself.
    let reply = front
        .site
        .api()
        .post("/gse/v1/xfer/open", &json!({"task_id": id, "expire_seconds": 3}))
        .await;
    assert_eq!(reply["code"], 0, "{reply}");
    front.settled(&id).await;
    let begun = Instant::now();
    while lets_in(&peer, &info_hash).await || get(&tracker, path).await.0 == 200 {
        assert!(begun.elapsed() < LIMIT, "it is still open");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[tokio::test]
async fn what_a_rule_opens_comes_by_every_way_and_stays_open_through_a_kill() {
    if !there_is("aria2c") {
        return;
    }
    // A rule opens everything of the application.
    let rule = format!("front.open_apps=[\"{APP}\"]");
    let mut front = Front::start(2, &[&rule]).await;
    let large = random_bytes(6 << 20);
    let id = front.copy("large", &large).await;
    // Content that went in messages, and content of a call.
    let small = random_bytes(70_000);
    let inline = front.copy("small", &small).await;
    let to = path_text(&front.at("pushed"));
    let body = push_body(&[&front.ids[1]], &to, "push", &"p".repeat(90_000));
    let pushed = front.site.api().submit_files("async_push_file", &body).await;
    for (task, name, content) in [
        (&id, "large", large.as_slice()),
        (&inline, "small", &small),
        (&pushed, "push", "p".repeat(90_000).as_bytes()),
    ] {
        let state = front.settled(task).await;
        assert_eq!(state["parts"][0]["state"], "open", "{state}");
        let file = front.at(&format!("{name}.torrent"));
        let path = format!("/torrent/{task}/0.torrent");
        std::fs::write(&file, get(&front.address("tracker_http"), &path).await.1).unwrap();
        assert!(aria2(&file, &front.at("aria"), name).await == content, "{name}");
    }
    let opened = front.settled(&id).await;
    front.site.btsvr.get_mut(&1).unwrap().kill_9();
    front.site.start_btsvr(1).await.unwrap();
    let again = front.settled(&id).await;
    assert_eq!(
        (&again["parts"][0]["state"], &again["expires_at"]),
        (&json!("open"), &opened["expires_at"]),
        "{again}"
    );
    let info_hash = hex::decode(again["parts"][0]["info_hash"].as_str().unwrap()).unwrap();
    assert!(lets_in(&front.address("front_peer"), &info_hash).await);
}

#[tokio::test]
async fn what_is_gone_can_not_be_opened_and_says_why() {
    let front = Front::start(2, &["cache.take=push"]).await;
    let id = front.copy("large", &random_bytes(6 << 20)).await;
    let reply = front
        .site
        .api()
        .post("/gse/v1/xfer/open", &json!({"task_id": id}))
        .await;
    assert_eq!(reply["code"], 0, "{reply}");
    let state = front.settled(&id).await;
    let part = &state["parts"][0];
    assert_eq!(part["state"], "failed", "{state}");
    assert!(part["message"].as_str().unwrap().contains("cache"), "{state}");
    // Without a front there is nothing to open, and the answer says what is missing.
    let (site, _agents, _) = Site::with_file_agents(0, &[], &[]).await.unwrap();
    let api = site.api();
    let id = api
        .submit_files("async_push_file", &push_body(&["nobody"], "/tmp/x", "f", "x"))
        .await;
    let reply = api.post("/gse/v1/xfer/open", &json!({"task_id": id})).await;
    assert!(
        reply["code"] != 0 && reply["message"].as_str().unwrap().contains("front.enabled"),
        "{reply}"
    );
}

const LIBTORRENT: &str = r#"
import sys, time, libtorrent as lt
torrent, out = sys.argv[1:]
session = lt.session({'listen_interfaces': '127.0.0.1:0', 'enable_dht': False, 'enable_lsd': False, 'enable_upnp': False,
    'enable_natpmp': False, 'enable_outgoing_utp': False, 'enable_incoming_utp': False, 'allow_multiple_connections_per_ip': True})
handle = session.add_torrent({'ti': lt.torrent_info(torrent), 'save_path': out})
while not handle.status().is_seeding:
    time.sleep(0.1)
"#;

#[tokio::test]
#[ignore = "full tier: needs libtorrent"]
async fn libtorrent_gets_a_directory_that_is_opened_while_it_is_under_way() {
    // contract: p2p#5
    let found = Blocking::new("/usr/bin/python3")
        .args(["-c", "import libtorrent"])
        .stderr(Stdio::null())
        .status();
    if !found.is_ok_and(|status| status.success()) {
        return eprintln!("skipped: python3-libtorrent is not installed");
    }
    let front = Front::start(2, &[]).await;
    let from = front.at("from/tree");
    std::fs::create_dir_all(from.join("sub")).unwrap();
    let (one, two) = (random_bytes(5 << 20), random_bytes(300_000));
    std::fs::write(from.join("one"), &one).unwrap();
    std::fs::write(from.join("sub/two"), &two).unwrap();
    let to = path_text(&front.at("to")) + "/";
    let task = transfer_task(&front.ids[0], &path_text(&from), "", &[&front.ids[1]], &to);
    let mut body = transfer_body(&[task], 90);
    body["download_speed"] = json!(1);
    let api = front.site.api();
    let id = api.submit_files("async_transfer_file", &body).await;
    let reply = api.post("/gse/v1/xfer/open", &json!({"task_id": id})).await;
    assert_eq!(reply["code"], 0, "{reply}");
    let state = front.settled(&id).await;
    assert_eq!(state["parts"][0]["state"], "open", "{state}");
    let file = front.at("tree.torrent");
    let path = format!("/torrent/{id}/0.torrent");
    std::fs::write(&file, get(&front.address("tracker_http"), &path).await.1).unwrap();
    let script = front.at("client.py");
    std::fs::write(&script, LIBTORRENT).unwrap();
    let out = front.at("libtorrent");
    let mut python = Command::new("/usr/bin/python3");
    python.arg(&script).arg(&file).arg(&out).kill_on_drop(true);
    let done = tokio::time::timeout(LIMIT, python.output()).await.unwrap().unwrap();
    assert!(done.status.success(), "{done:?}");
    // A torrent's files lie in a directory of its name; what was sent is a directory itself.
    assert!(std::fs::read(out.join("tree/tree/one")).unwrap() == one);
    assert!(std::fs::read(out.join("tree/tree/sub/two")).unwrap() == two);
    // The transfer itself comes to its end all the same.
    assert_eq!(codes(&api.files_over(&id, LIMIT).await), [0, 0]);
}

const CLIENT: &str = r#"
const Client = require('bittorrent-tracker')
const [infoHash, announce] = process.argv.slice(2)
const client = new Client({ infoHash, peerId: Buffer.from('-AA0001-123456789012'), announce: [announce], port: 6881 })
const fail = error => { console.log(JSON.stringify({ error: error.message })); process.exit(0) }
client.on('error', fail)
client.on('warning', fail)
client.on('peer', peer => { console.log(JSON.stringify({ peer })); process.exit(0) })
client.start({ uploaded: 0, downloaded: 0, left: 100 })
setTimeout(() => process.exit(2), 20000)
"#;

#[tokio::test]
#[ignore = "full tier: needs node and the npm registry"]
async fn a_javascript_client_is_told_of_the_front_and_of_nothing_else() {
    // contract: p2p#9
    if !there_is("npm") {
        return;
    }
    let front = Front::start(2, &["cache.take=always"]).await;
    let dir = front.at("js");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("client.cjs"), CLIENT).unwrap();
    let mut npm = Command::new("npm");
    npm.args([
        "install",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "--silent",
        "bittorrent-tracker@9",
    ]);
    let installed = tokio::time::timeout(Duration::from_secs(180), npm.current_dir(&dir).output()).await;
    if !installed.unwrap().unwrap().status.success() {
        return eprintln!("skipped: the npm registry is not to be had");
    }
    let id = front.copy("large", &random_bytes(4 << 20)).await;
    let reply = front
        .site
        .api()
        .post("/gse/v1/xfer/open", &json!({"task_id": id}))
        .await;
    assert_eq!(reply["code"], 0, "{reply}");
    let info_hash = front.settled(&id).await["parts"][0]["info_hash"]
        .as_str()
        .unwrap()
        .to_owned();
    for (scheme, listener) in [("http", "tracker_http"), ("udp", "tracker_udp")] {
        let url = format!("{scheme}://{}/announce", front.address(listener));
        let ask = async |hash: &str| {
            let mut node = Command::new("node");
            node.args(["client.cjs", hash, &url])
                .current_dir(&dir)
                .kill_on_drop(true);
            let said = tokio::time::timeout(LIMIT, node.output()).await.unwrap().unwrap();
            serde_json::from_slice::<Value>(&said.stdout).unwrap()
        };
        assert_eq!(ask(&info_hash).await["peer"], front.address("front_peer"), "{url}");
        let refused = ask(&"cd".repeat(20)).await;
        assert!(
            refused["error"].as_str().unwrap().contains("unknown swarm"),
            "{url}: {refused}"
        );
    }
}
