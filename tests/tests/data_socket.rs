//! The agent's data socket as plugins meet it: answers, frames, nonsense, many connections, restarts, accounts.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use gse_tests::metrics::Figures;
use gse_tests::plugin::{Plugin, dynamic, kind, plain};
use gse_tests::process::binary;
use gse_tests::{AgentOptions, Child, Site, StoreKind, eventually};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

const AGENT: &str = "0100005254008ed86116666614661851";

/// A site with an agent whose figures can be read.
struct Host {
    site: Site,
    agent: Child,
    socket: PathBuf,
    options: AgentOptions,
}

impl Host {
    async fn start(sets: &[String]) -> Self {
        let site = Site::start(StoreKind::Embedded).await.unwrap();
        let ops = free_port();
        let mut options = AgentOptions::new(AGENT, "10.1.2.3");
        options.sets = vec![format!("ops.listen=127.0.0.1:{ops}"), "cloud_id=0".into()];
        options.sets.extend(sets.iter().cloned());
        let mut agent = site.spawn_agent(&options, "").unwrap();
        agent.addresses.insert("ops".into(), format!("127.0.0.1:{ops}"));
        let socket = site.data_socket(AGENT);
        Self {
            site,
            agent,
            socket,
            options,
        }
    }

    fn start_again(&mut self) {
        let ops = self.agent.address("ops").to_owned();
        self.agent = self.site.spawn_agent(&self.options, "").unwrap();
        self.agent.addresses.insert("ops".into(), ops);
    }

    async fn plugin(&self) -> Plugin {
        Plugin::connect(&self.socket).await
    }

    async fn figures(&self) -> Figures {
        eventually("figures of the agent", Duration::from_secs(5), || async {
            Figures::of(&self.agent).await.ok()
        })
        .await
    }
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

// contract: data-plane#1, data-plane#2, data-plane#40
#[tokio::test]
async fn plugins_are_told_who_the_agent_is() {
    let host = Host::start(&["data.socket.bizid=1".into()]).await;
    let mut plugin = host.plugin().await;
    let expected = json!({"bizid": 1, "cloudid": 0, "cloud_id": 0, "ip": "10.1.2.3", "bk_agent_id": AGENT,
        "bk_biz_id": 0, "bk_tenant_id": "", "static_dataid": 0});
    assert_eq!(plugin.ask().await.unwrap(), expected);
    for _ in 0..200 {
        let asked = Instant::now();
        plugin.send(&plain(kind::GET_CONF, 0, b"")).await.unwrap();
        // As libgse reads: what is there when the first byte is there has to be all of it.
        plugin.stream.readable().await.unwrap();
        let mut buffer = vec![0; 64 << 10];
        let read = plugin.stream.read(&mut buffer).await.unwrap();
        let told = u32::from_be_bytes(buffer[4..8].try_into().unwrap()) as usize;
        assert_eq!(read, 8 + told, "an answer in two pieces");
        assert!(asked.elapsed() < Duration::from_millis(100), "{:?}", asked.elapsed());
    }
    // One byte at a time, and with records before and behind it.
    for byte in plain(kind::GET_CONF, 0, b"") {
        plugin.send(&[byte]).await.unwrap();
    }
    assert_eq!(plugin.answer().await.unwrap(), expected);
    let mut mixed = dynamic(1430, b"{}");
    mixed.extend(plain(kind::GET_CONF, 0, b""));
    mixed.extend(plain(kind::COMMON, 1430, b"{}"));
    plugin.send(&mixed).await.unwrap();
    assert_eq!(plugin.answer().await.unwrap(), expected);
    let figures = host.figures().await;
    assert_eq!(figures.sum("gse_agent_data_socket_questions_total"), 203.0);
    assert_eq!(figures.sum("gse_agent_data_socket_unanswered_total"), 0.0);
}

// contract: data-plane#7, data-plane#12
#[tokio::test]
async fn records_are_answered_by_nothing_and_unrouted_ones_do_no_harm() {
    let host = Host::start(&[]).await;
    let mut plugin = host.plugin().await;
    for _ in 0..1_000 {
        plugin.send(&dynamic(1430, b"{\"a\":1}")).await.unwrap();
        plugin.send(&plain(kind::OPS, 1430, b"ops")).await.unwrap();
    }
    let mut byte = [0_u8; 1];
    let silence = tokio::time::timeout(Duration::from_millis(500), plugin.stream.read(&mut byte)).await;
    assert!(silence.is_err(), "the agent said something: {silence:?}");
    assert_eq!(plugin.ask().await.unwrap()["cloudid"], 0);
}

// contract: data-plane#10
#[tokio::test]
async fn nonsense_ends_its_own_connection_only() {
    let host = Host::start(&[]).await;
    let mut good = host.plugin().await;
    good.ask().await.unwrap();
    let half = plain(kind::COMMON, 1430, b"half");
    good.send(&half[..20]).await.unwrap();
    let mut absurd = plain(kind::COMMON, 1430, b"");
    absurd[12..16].fill(0xff);
    let mut meta = dynamic(1430, b"x");
    meta[40..44].fill(0x7f);
    for nonsense in [&b"GET / HTTP/1.1\r\n\r\n"[..], &absurd, &meta, &[0xff; 100_000]] {
        let mut bad = host.plugin().await;
        bad.send(&plain(kind::COMMON, 1430, b"before it")).await.unwrap();
        // It may be closed before all of it was taken.
        bad.send(nonsense).await.ok();
        bad.closed().await.unwrap();
    }
    // Whoever leaves in the middle of a frame.
    let mut cut = host.plugin().await;
    cut.send(&half[..27]).await.unwrap();
    drop(cut);
    // A record beyond the bound, and one behind it.
    good.send(&half[20..]).await.unwrap();
    good.send(&plain(kind::COMMON, 1430, &vec![b'x'; 10_485_761]))
        .await
        .unwrap();
    good.send(&plain(kind::COMMON, 1430, b"behind it")).await.unwrap();
    assert_eq!(good.ask().await.unwrap()["cloud_id"], 0);
    let figures = eventually("the cut frame", Duration::from_secs(5), || async {
        let figures = Figures::of(&host.agent).await.ok()?;
        (figures.sum("gse_agent_data_socket_cut_total") >= 1.0).then_some(figures)
    })
    .await;
    let closed: Vec<&str> = figures.lines("gse_agent_data_socket_closed_total").collect();
    assert_eq!(figures.sum("gse_agent_data_socket_closed_total"), 4.0, "{closed:?}");
}

#[tokio::test]
async fn two_hundred_plugins_and_one_too_many() {
    let host = Host::start(&["data.socket.max_connections=210".into()]).await;
    let mut first = host.plugin().await;
    first.ask().await.unwrap();
    let before = host.agent.memory();
    let mut plugins = Vec::new();
    for _ in 0..209 {
        let mut plugin = host.plugin().await;
        // Half of a question: a connection in the middle of a frame.
        plugin.send(&plain(kind::GET_CONF, 0, b"")[..12]).await.unwrap();
        plugins.push(plugin);
    }
    for plugin in &mut plugins {
        plugin.send(&plain(kind::GET_CONF, 0, b"")[12..]).await.unwrap();
        plugin.answer().await.unwrap();
    }
    let grown = host.agent.memory().saturating_sub(before);
    assert!(grown < 8 << 20, "200 idle plugins cost {grown} bytes");
    let mut too_many = host.plugin().await;
    too_many.closed().await.unwrap();
    plugins.pop();
    eventually("room for another", Duration::from_secs(5), || async {
        host.plugin().await.ask().await.ok()
    })
    .await;
}

#[tokio::test]
async fn a_plugin_that_never_reads_is_read_all_the_same() {
    let host = Host::start(&[]).await;
    let mut deaf = host.plugin().await;
    let question = plain(kind::GET_CONF, 0, b"");
    let record = dynamic(1430, &[b'x'; 2_000]);
    // Far more answers than its socket has room for.
    for _ in 0..20_000 {
        deaf.send(&question).await.unwrap();
    }
    for _ in 0..5_000 {
        deaf.send(&record).await.unwrap();
    }
    let mut other = host.plugin().await;
    assert_eq!(other.ask().await.unwrap()["bizid"], 0);
    let figures = host.figures().await;
    assert!(figures.sum("gse_agent_data_socket_unanswered_total") > 0.0);
    // What it has got is whole answers.
    for _ in 0..100 {
        deaf.answer().await.unwrap();
    }
}

#[tokio::test]
async fn the_socket_outlives_the_agent_and_is_never_stolen() {
    let mut host = Host::start(&[
        "data.socket.file.retry_ms=100".into(),
        "data.socket.file.check_ms=100".into(),
    ])
    .await;
    host.plugin().await.ask().await.unwrap();
    assert_eq!(
        std::fs::metadata(&host.socket).unwrap().permissions().mode() & 0o777,
        0o666
    );
    // Another agent wants the same place.
    let mut other = AgentOptions::new("another-agent", "10.1.2.4");
    other.sets = vec![
        format!("data.socket.paths=[\"{}\"]", host.socket.display()),
        "data.socket.file.retry_ms=100".into(),
    ];
    let _other = host.site.spawn_agent(&other, "").unwrap();
    host.site.wait_state("another-agent", 2).await;
    for _ in 0..5 {
        assert_eq!(host.plugin().await.ask().await.unwrap()["bk_agent_id"], AGENT);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(_other.log().contains("left alone"), "it is said why");
    drop(_other);
    // The file is taken away: it is made anew.
    std::fs::remove_file(&host.socket).unwrap();
    host.plugin().await.ask().await.unwrap();
    // Killed and started again: what is left over is replaced; a connection of before ends.
    let mut before = host.plugin().await;
    before.ask().await.unwrap();
    host.agent.kill_9();
    before.closed().await.unwrap();
    assert!(host.socket.exists());
    host.start_again();
    host.plugin().await.ask().await.unwrap();
    // Stopped in order: the file stays, for plugins that give up where there is none.
    host.agent.terminate(Duration::from_secs(10)).await.unwrap();
    assert!(host.socket.exists());
    assert!(UnixStream::connect(&host.socket).await.is_err());
    // A directory in the way, as container runtimes make one.
    std::fs::remove_file(&host.socket).unwrap();
    std::fs::create_dir(&host.socket).unwrap();
    host.start_again();
    host.plugin().await.ask().await.unwrap();
}

/// The agent's program under the name that makes it `gsecmdline`, where every account can start it.
fn gsecmdline(dir: &Path) -> PathBuf {
    let path = dir.join("gsecmdline");
    std::fs::copy(binary("gse_agent").unwrap(), &path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

// contract: data-plane#12
#[tokio::test]
async fn scripts_look_at_the_exit_status_of_gsecmdline() {
    let host = Host::start(&[]).await;
    host.plugin().await.ask().await.unwrap();
    let program = gsecmdline(host.site.path());
    let run = |program: &Path, args: &[&str]| {
        let done = Command::new(program)
            .args(args)
            .arg("-S")
            .arg(&host.socket)
            .output()
            .unwrap();
        (
            done.status.code().unwrap(),
            String::from_utf8_lossy(&done.stderr).into_owned(),
        )
    };
    for args in [
        &["-d", "1430", "-s", "test"][..],
        &["-d", "1100000", "-l", "a line"],
        &["-d", "1430", "-J", "{\"a\":1}", "-D"],
    ] {
        let (status, words) = run(&program, args);
        assert_eq!(status, 0, "{args:?}: {words}");
    }
    let (status, words) = run(&binary("gse_agent").unwrap(), &["cmdline", "-d", "1430", "-s", "test"]);
    assert_eq!(status, 0, "{words}");
    assert_eq!(run(&program, &["-d", "1430", "-J", "[]"]).0, 1);
    assert_eq!(run(&program, &["-d", "nothing", "-s", "x"]).0, 64);
    let nobody = Command::new(&program)
        .args(["-d", "1430", "-s", "test", "-S"])
        .arg(host.site.path().join("nobody-listens"))
        .output()
        .unwrap();
    assert_eq!(nobody.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("nobody-listens"));
    let figures = host.figures().await;
    assert_eq!(figures.sum("gse_agent_data_socket_cut_total"), 0.0);
}

#[tokio::test]
async fn reserved_ids_are_not_everybodys() {
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("skipped: only root can be another account");
        return;
    }
    let open = tempfile::Builder::new()
        .permissions(std::fs::Permissions::from_mode(0o755))
        .tempdir()
        .unwrap();
    let socket = open.path().join("ipc");
    let rules = "data.socket.reserved=[{ids=[\"1000\",\"1100008\"]},{ids=[\"2000-2010\"],accounts=[\"65533\"]}]";
    let host = Host::start(&[format!("data.socket.paths=[\"{}\"]", socket.display()), rules.into()]).await;
    Plugin::connect(&socket).await.ask().await.unwrap();
    let program = gsecmdline(open.path());
    let refused = async || {
        let figures = host.figures().await;
        let lines = figures
            .lines("gse_agent_data_socket_refused_total")
            .filter(|line| line.contains("not_allowed"));
        let numbers = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        numbers.sum::<f64>()
    };
    let mut expected = 0.0;
    for (uid, id, allowed) in [
        (0, "1000", true),
        (65534, "1000", false),
        (65534, "1100008", false),
        (65534, "1001", true),
        (65534, "2005", false),
        (65533, "2005", true),
        (65533, "1000", false),
    ] {
        let done = Command::new(&program)
            .args(["-d", id, "-s", "test", "-S"])
            .arg(&socket)
            .uid(uid)
            .output()
            .unwrap();
        // The connection is none the worse for it: the question behind the record was answered.
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        expected += f64::from(u8::from(!allowed));
        assert_eq!(refused().await, expected, "id {id} by account {uid}");
    }
}
