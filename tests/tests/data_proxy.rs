//! A proxy: records from a plugin through the real agent, a gse_data that passes them on, and one that hands them to files.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use gse_tests::metrics::Figures;
use gse_tests::plugin::{Plugin, dynamic, plain};
use gse_tests::process::binary;
use gse_tests::{AgentOptions, Child, Site, StoreKind, eventually};
use serde_json::json;

const ID: u32 = 1_500_004;
const PATIENCE: Duration = Duration::from_secs(20);

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// The server at the end, always in the same place.
async fn central(site: &Site, port: u16) -> Child {
    let files = site.path().join("files").display().to_string();
    let sets = [
        format!("default_sink=file:{files}"),
        format!("link.listen=127.0.0.1:{port}"),
    ];
    site.data("central", &sets).await.unwrap()
}

/// `gse_data_proxy.conf` as node management renders it.
fn conf(site: &Site, port: u16, upstream: &str) -> std::path::PathBuf {
    let cert = |name: &str| site.path().join("certs").join(name).display().to_string();
    let (ca, crt, key) = (cert("gseca.crt"), cert("gse_server.crt"), cert("gse_server.key"));
    let conf = json!({
        "run_mode": "proxy",
        "dataflow": {
            "receiver": [{"name": "receiver_v2", "protocol": 1, "bind_ip": "127.0.0.1", "bind_port": port, "ca_file": ca, "cert_file": crt,
                "key_file": key, "passwd_file": "", "thread_num": 4, "protostack": 4, "max_message_size": 10_485_760, "backlog": 4096}],
            "exporter": [{"name": "exporter_v2", "type": 9, "protocol": "tcp", "ca_file": ca, "cert_file": crt, "key_file": key,
                "passwd_file": "", "endpoints": upstream}],
            "channel": [{"name": "channel_v2", "decode": 8, "receiver": "receiver_v2", "thread_num": 4, "exporter": ["exporter_v2"]}],
        },
        "metric": {"exporter_bind_ip": "127.0.0.1", "exporter_bind_port": free_port()},
        "logger": {"path": "/tmp", "level": "INFO"},
    });
    let path = site.path().join("gse_data_proxy.conf");
    std::fs::write(&path, conf.to_string()).unwrap();
    path
}

async fn proxy(site: &Site, conf: &Path) -> Child {
    let addresses = site.path().join("proxy.addresses");
    // Whoever was here before was killed.
    let _ = std::fs::remove_file(&addresses);
    let mut command = Command::new(binary("gse_data").unwrap());
    command.arg("-f").arg(conf);
    for set in [
        format!("data_dir={}", site.path().join("proxy").display()),
        "sinks.retry_max_ms=200".into(),
        "sinks.spool_after_ms=50".into(),
        "upstream.retry_max_ms=200".into(),
        format!("runtime.addresses_file={}", addresses.display()),
    ] {
        command.args(["--set", &set]);
    }
    let mut child = Child::spawn("proxy", command, &site.path().join("proxy.log")).unwrap();
    child.ready(&addresses).await.unwrap();
    child
}

/// The numbers that have arrived, in the order of the file.
fn arrived(site: &Site) -> Vec<u64> {
    let path = site.path().join("files").join(format!("{ID}.log"));
    let content = std::fs::read_to_string(path).unwrap_or_default();
    content.lines().filter_map(|line| line.parse().ok()).collect()
}

async fn send(plugin: &mut Plugin, numbers: std::ops::Range<u64>) {
    let mut frames = Vec::new();
    for number in numbers {
        frames.extend_from_slice(&dynamic(ID, format!("{number:012}").as_bytes()));
    }
    plugin.send(&frames).await.unwrap();
}

// contract: data-plane#44, data-plane#49, data-plane#38
#[tokio::test]
async fn a_proxy_passes_everything_on_in_order_also_after_either_side_was_killed() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let port = free_port();
    let mut server = central(&site, port).await;
    let listen = free_port();
    let conf = conf(&site, listen, &format!("127.0.0.1:{port}"));
    let checked = Command::new(binary("gse_data").unwrap())
        .arg("--check")
        .arg("-f")
        .arg(&conf)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&[checked.stdout, checked.stderr].concat()).into_owned();
    assert!(checked.status.success(), "{said}");
    for note in ["upstream.servers = ", "thread_num: not used", "logger: not used"] {
        assert!(said.contains(note), "{note} in {said}");
    }

    let mut middle = proxy(&site, &conf).await;
    eventually("the link before the first record", PATIENCE, || async {
        let up = Figures::of(&middle).await.ok()?.sum("gse_data_upstream_links");
        (up == 1.0).then_some(())
    })
    .await;
    // Node management looks whether the port is open, and says nothing.
    drop(tokio::net::TcpStream::connect(("127.0.0.1", listen)).await.unwrap());

    let mut options = AgentOptions::new("0100005254008ed86116666614661855", "10.1.2.7");
    let ops = format!("127.0.0.1:{}", free_port());
    options.sets = vec![
        format!("data.servers=[\"127.0.0.1:{listen}\"]"),
        "data.retry_min_ms=20".into(),
        "data.retry_max_ms=200".into(),
        format!("ops.listen={ops}"),
    ];
    let mut agent = site.spawn_agent(&options, "").unwrap();
    agent.addresses.insert("ops".into(), ops);
    let mut plugin = Plugin::connect(&site.data_socket(&options.id)).await;
    let acknowledged = async |count: u64| {
        eventually("acknowledged to the agent", PATIENCE, || async {
            let figures = Figures::of(&agent).await.ok()?;
            (figures.sum("gse_agent_data_acknowledged_total") as u64 >= count).then_some(())
        })
        .await;
    };
    let until = async |count: u64| {
        eventually("everything in the file", PATIENCE, || async {
            (arrived(&site).len() as u64 >= count).then_some(())
        })
        .await;
        assert_eq!(arrived(&site), (0..count).collect::<Vec<_>>());
    };
    send(&mut plugin, 0..1_000).await;
    until(1_000).await;

    // While the server is away the proxy takes records on its disk, and they are acknowledged.
    server.kill_9();
    for part in 10..20 {
        send(&mut plugin, part * 100..part * 100 + 100).await;
    }
    acknowledged(2_000).await;
    assert_eq!(arrived(&site).len(), 1_000);
    // Its disk outlives it.
    middle.kill_9();
    middle = proxy(&site, &conf).await;
    send(&mut plugin, 2_000..2_100).await;
    acknowledged(2_100).await;
    server = central(&site, port).await;
    until(2_100).await;

    // And afterwards everything goes straight through, the longest too.
    let long: Vec<u8> = (0..10_485_759u32).map(|n| b'a' + (n % 25) as u8).collect();
    plugin.send(&plain(0xC01, ID, &long)).await.unwrap();
    send(&mut plugin, 2_100..2_200).await;
    until(2_200).await;
    let figures = Figures::of(&middle).await.unwrap();
    assert_eq!(figures.sum("gse_data_dropped_total"), 0.0);
    assert_eq!(figures.sum("gse_data_upstream_links"), 1.0);
    assert!(Figures::of(&server).await.unwrap().sum("gse_data_records_total") >= 1_201.0);

    // A proxy that is stopped leaves nothing behind.
    send(&mut plugin, 2_200..2_300).await;
    acknowledged(2_301).await;
    middle.terminate(PATIENCE).await.unwrap();
    until(2_300).await;
}
