//! Our tracker, asked by other people's clients.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_bt::manifest::{ManifestBuilder, swarm_id, torrent_file};
use gse_bt::tracker::{
    Access, Announce, Event, FrontConfig, Listening, Peers, Tracker, TrackerConfig, TrackerMetrics, serve,
};
use gse_core::lifecycle::Lifecycle;
use gse_core::random::Random;
use tokio::process::Command;

/// A program's standard output; it must do well, and soon.
async fn output(command: &mut Command) -> String {
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    let done = tokio::time::timeout(Duration::from_secs(180), command.kill_on_drop(true).output()).await;
    let done = done.unwrap_or_else(|_| panic!("{program} does not end"));
    let done = done.unwrap_or_else(|error| panic!("{program}: {error}; scripts/test full installs it"));
    let (out, err) = (
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr),
    );
    assert!(done.status.success(), "{program}: {out}\n{err}");
    out.into_owned()
}

async fn start(swarm: [u8; 20]) -> (Arc<Tracker>, Listening, Lifecycle) {
    let config = TrackerConfig::default();
    let tracker = Tracker::new(config, Access::Listed, TrackerMetrics::default(), Random::system());
    assert!(tracker.allow(swarm));
    let tracker = Arc::new(tracker);
    let life = Lifecycle::new("tracker");
    let config = FrontConfig {
        http_listen: "127.0.0.1:0".to_owned(),
        udp_listen: "127.0.0.1:0".to_owned(),
        ..FrontConfig::default()
    };
    let listening = serve(&config, tracker.clone(), &[5; 32], &life)
        .await
        .expect("free ports");
    (tracker, listening, life)
}

fn urls(listening: &Listening) -> [String; 2] {
    let (http, udp) = (listening.http.expect("asked for"), listening.udp.expect("asked for"));
    [format!("http://{http}/announce"), format!("udp://{udp}/announce")]
}

fn add_peer(tracker: &Tracker, swarm: [u8; 20], ip: IpAddr, n: u8) {
    let announce = Announce {
        swarm,
        peer_id: [n; 20],
        port: 7000 + u16::from(n),
        left: u64::from(n % 2),
        event: Event::Started,
        wanted: None,
    };
    tracker
        .announce(ip, &announce, 0, &mut Peers::default())
        .expect("allowed");
}

const CLIENT: &str = r#"
const Client = require('bittorrent-tracker')
const [infoHash, announce, numwant] = process.argv.slice(2)
const client = new Client({ infoHash, peerId: Buffer.from('-AA0001-123456789012'), announce: [announce], port: 6881 })
const out = { peers: [] }
const fail = error => { console.log(JSON.stringify({ error: error.message })); process.exit(0) }
client.on('error', fail)
client.on('warning', fail)
client.on('peer', peer => out.peers.push(peer))
client.once('update', update => {
  out.complete = update.complete
  out.incomplete = update.incomplete
  setTimeout(() => client.scrape(), 200)
})
client.on('scrape', scrape => {
  out.scrape = [scrape.complete, scrape.incomplete, scrape.downloaded]
  console.log(JSON.stringify(out))
  process.exit(0)
})
client.start({ uploaded: 0, downloaded: 0, left: 100, numwant: Number(numwant) })
setTimeout(() => process.exit(2), 20000)
"#;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "full tier: needs node and the npm registry"]
async fn a_javascript_client_announces_and_scrapes() {
    // contract: p2p#9, contract: p2p#10
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("client.cjs"), CLIENT).expect("written");
    let mut npm = Command::new("npm");
    npm.args([
        "install",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "--silent",
        "bittorrent-tracker@9",
    ]);
    output(npm.current_dir(dir.path())).await;

    let swarm = [0xab; 20];
    let (tracker, listening, life) = start(swarm).await;
    for n in 1..=9 {
        add_peer(&tracker, swarm, Ipv4Addr::new(10, 0, 0, n).into(), n);
    }
    for (at, url) in urls(&listening).iter().enumerate() {
        let told = ask(dir.path(), &hex::encode(swarm), url, 50).await;
        // The client, nine others; it is known from the first of both ways already.
        assert_eq!(
            (&told["complete"], &told["incomplete"]),
            (&4.into(), &6.into()),
            "{url}"
        );
        let peers = told["peers"].as_array().expect("a list");
        assert_eq!(peers.len(), 9, "{url}: {told}");
        assert!(!peers.contains(&"127.0.0.1:6881".into()), "{url}: never itself");
        assert_eq!(told["scrape"], serde_json::json!([4, 6, 0]), "{url}");
        let told = ask(dir.path(), &hex::encode(swarm), url, 3).await;
        assert_eq!(
            told["peers"].as_array().map(Vec::len),
            Some(3),
            "{url}: as many as it wants"
        );
        let refused = ask(dir.path(), &"cd".repeat(20), url, 50).await;
        let reason = refused["error"].as_str().unwrap_or_default();
        assert!(reason.contains("unknown swarm"), "{url}: {refused}");
        assert_eq!(tracker.peers(), 10, "round {at}");
    }
    life.drain();
    assert!(life.finished(Duration::from_secs(5)).await);
}

async fn ask(dir: &Path, swarm: &str, url: &str, wanted: u32) -> serde_json::Value {
    let mut node = Command::new("node");
    node.args(["client.cjs", swarm, url, &wanted.to_string()])
        .current_dir(dir);
    let said = output(&mut node).await;
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"))
}

const LIBTORRENT: &str = r#"
import libtorrent, sys, time
torrent, where, tracker = sys.argv[1:]
session = libtorrent.session({'listen_interfaces': '127.0.0.1:0', 'enable_dht': False, 'enable_lsd': False, 'enable_upnp': False,
    'enable_natpmp': False, 'alert_mask': libtorrent.alert.category_t.tracker_notification | libtorrent.alert.category_t.error_notification})
params = {'ti': libtorrent.torrent_info(torrent), 'save_path': where, 'trackers': [tracker]}
session.add_torrent(params)
end = time.time() + 20
while time.time() < end:
    session.wait_for_alert(500)
    for alert in session.pop_alerts():
        if isinstance(alert, libtorrent.tracker_reply_alert):
            print(alert.num_peers)
            sys.exit(0)
        if isinstance(alert, libtorrent.tracker_error_alert):
            sys.exit(str(alert))
sys.exit('no answer')
"#;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "full tier: needs libtorrent"]
async fn libtorrent_reads_both_kinds_of_lists() {
    // contract: p2p#10
    let dir = tempfile::tempdir().expect("a directory");
    let mut builder = ManifestBuilder::new("x", 5).expect("possible");
    builder
        .begin_file(vec![Bytes::from_static(b"x")], 5, 0o644, 0)
        .expect("in order");
    builder.data(b"12345").expect("fits");
    builder.end_file().expect("whole");
    let manifest = builder.finish().expect("whole");
    let swarm = swarm_id(&manifest);
    let (tracker, listening, life) = start(swarm).await;
    for n in 1..=3 {
        add_peer(&tracker, swarm, Ipv4Addr::new(10, 0, 0, n).into(), n);
    }
    for n in 4..=5 {
        add_peer(
            &tracker,
            swarm,
            Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n.into()).into(),
            n,
        );
    }
    std::fs::write(dir.path().join("script.py"), LIBTORRENT).expect("written");
    let torrent = dir.path().join("x.torrent");
    std::fs::write(&torrent, torrent_file(&manifest, &[])).expect("written");
    // Over UDP there are only peers of the family that is asked over.
    for (url, peers) in urls(&listening).into_iter().zip(["5", "3"]) {
        let mut python = Command::new("/usr/bin/python3");
        python
            .arg(dir.path().join("script.py"))
            .arg(&torrent)
            .arg(dir.path())
            .arg(&url);
        assert_eq!(output(&mut python).await.trim(), peers, "{url}");
    }
    life.drain();
    assert!(life.finished(Duration::from_secs(5)).await);
}
