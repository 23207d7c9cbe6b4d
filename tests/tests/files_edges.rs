//! File transfers where something is scarce or out of the ordinary: descriptors, rights, room for the journal; and what goes over the wire.
#![allow(clippy::unwrap_used)] // a test ends by panicking

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use gse_tests::files::{
    SmallDisk, codes, part_files, path_text, push_body, random_bytes, transfer_body, transfer_task,
};
use gse_tests::{Child, Site, eventually};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const RUNNING: i64 = 115;
const TERMINATED: i64 = 126;

/// A directory that every account may enter.
fn open_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    set_mode(dir.path(), 0o755);
    dir
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn id_of(account: &str) -> u32 {
    nix::unistd::User::from_name(account).unwrap().unwrap().uid.as_raw()
}

/// Makes a tree of so many files, 100 to a directory.
fn make_tree(at: &Path, files: usize, size: usize) {
    let content = random_bytes(size + files);
    for n in 0..files {
        let sub = at.join(format!("d{:03}", n / 100));
        if n % 100 == 0 {
            std::fs::create_dir_all(&sub).unwrap();
        }
        std::fs::write(sub.join(format!("f{:02}", n % 100)), &content[n..n + size]).unwrap();
    }
}

fn assert_tree(at: &Path, files: usize, size: usize) {
    let content = random_bytes(size + files);
    for n in 0..files {
        let file = at.join(format!("d{:03}/f{:02}", n / 100, n % 100));
        assert!(
            std::fs::read(&file).unwrap() == content[n..n + size],
            "{}",
            file.display()
        );
    }
    let dirs = std::fs::read_dir(at).unwrap().flatten();
    let found: usize = dirs.map(|dir| std::fs::read_dir(dir.path()).unwrap().count()).sum();
    assert_eq!(found, files);
}

/// Sets how many files a running process may have open, for good.
fn limit_open_files(child: &Child, most: usize) {
    let mut command = Command::new("prlimit");
    command.args(["--pid", &child.pid().to_string(), &format!("--nofile={most}:{most}")]);
    assert!(command.status().unwrap().success());
}

/// The most files that any of some processes has had open.
struct OpenFiles {
    most: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl OpenFiles {
    fn watch(children: &[Child]) -> Self {
        let dirs: Vec<PathBuf> = children
            .iter()
            .map(|child| format!("/proc/{}/fd", child.pid()).into())
            .collect();
        let (most, over) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let (seen, end) = (Arc::clone(&most), Arc::clone(&over));
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                for dir in &dirs {
                    let open = std::fs::read_dir(dir).map_or(0, Iterator::count);
                    seen.fetch_max(open, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        Self {
            most,
            over,
            thread: Some(thread),
        }
    }

    fn end(mut self) -> usize {
        self.over.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        self.most.load(Ordering::Relaxed)
    }
}

/// A tree to two targets, all agents with a hard limit of 1,024 open files.
async fn tree_with_few_descriptors(files: usize, size: usize) {
    let (site, agents, ids) = Site::with_file_agents(3, &[], &[]).await.unwrap();
    agents.iter().for_each(|agent| limit_open_files(agent, 1024));
    let api = site.api();
    let dir = open_dir();
    let source = dir.path().join("many");
    make_tree(&source, files, size);
    let at = |n: usize| dir.path().join(format!("t{n}"));
    let tasks: Vec<Value> = (1..3)
        .map(|n| transfer_task(&ids[0], &path_text(&source), "", &[&ids[n]], &path_text(&at(n))))
        .collect();
    let open = OpenFiles::watch(&agents);
    let begun = Instant::now();
    let id = api
        .submit_files("async_transfer_file", &transfer_body(&tasks, 120))
        .await;
    let rows = api.files_over(&id, LIMIT).await;
    let open = open.end();
    eprintln!(
        "{files} files to two targets: {:?}, at most {open} open",
        begun.elapsed()
    );
    assert_eq!(codes(&rows), [0; 3], "{rows:#?}");
    assert_eq!(rows[0]["content"]["size"], files * size);
    (1..3).for_each(|n| assert_tree(&at(n).join("many"), files, size));
    // files.open_files is 256; the rest is the agent's own.
    assert!((100..400).contains(&open), "{open} open files");
    assert_eq!(part_files(dir.path()), [] as [&Path; 0]);
}

// contract: p2p#25
#[tokio::test]
async fn three_thousand_files_need_few_descriptors() {
    // More than goes in messages.
    tree_with_few_descriptors(3_000, 3_500).await;
}

// contract: p2p#25
#[tokio::test]
#[ignore = "full tier: makes, compares and removes 30,000 files"]
async fn ten_thousand_files_need_few_descriptors() {
    tree_with_few_descriptors(10_000, 1_100).await;
}

#[tokio::test]
async fn files_are_opened_again_whoever_they_belong_to() {
    // One open file: nearly every read or write opens its file anew, before it is at its place and after.
    let sets = ["files.open_files=1"];
    let (site, _agents, ids) = Site::with_file_agents(4, &[], &sets).await.unwrap();
    let api = site.api();
    let dir = open_dir();
    let source = dir.path().join("tree");
    make_tree(&source, 120, 100_000);
    for (n, mode) in [(0, 0o400), (1, 0o000), (2, 0o200), (3, 0o644)] {
        set_mode(&source.join(format!("d000/f{n:02}")), mode);
    }
    std::fs::write(source.join("d000/f04"), b"").unwrap();
    std::fs::write(dir.path().join("large"), random_bytes(10 << 20)).unwrap();
    set_mode(&dir.path().join("large"), 0o400);
    let to = |n: usize| dir.path().join(format!("t{n}"));
    (1..4).for_each(|n| {
        std::fs::create_dir(to(n)).unwrap();
        set_mode(&to(n), 0o777);
    });
    let accounts = [("root", ""), ("nobody", ""), ("nobody", "daemon")];
    let task = |n: usize, tree: bool| {
        let (from, name) = if tree {
            (path_text(&source), "")
        } else {
            (path_text(dir.path()), "large")
        };
        let mut task = transfer_task(&ids[0], &from, name, &[&ids[n]], &path_text(&to(n)));
        let (user, owner) = accounts[n - 1];
        task["target"]["agents"][0]["user"] = json!(user);
        task["target"]["owner"] = json!(owner);
        task
    };
    let tasks: Vec<Value> = (1..4).flat_map(|n| [task(n, true), task(n, false)]).collect();
    let id = api
        .submit_files("async_transfer_file", &transfer_body(&tasks, 60))
        .await;
    let rows = api.files_over(&id, LIMIT).await;
    assert!(codes(&rows).iter().all(|code| *code == 0), "{rows:#?}");
    for (n, owner) in [(1, "root"), (2, "nobody"), (3, "daemon")] {
        let large = to(n).join("large");
        assert!(std::fs::read(&large).unwrap() == random_bytes(10 << 20), "{n}");
        for (name, mode) in [
            ("tree/d000/f00", 0o400),
            ("tree/d000/f01", 0),
            ("tree/d000/f02", 0o200),
            ("large", 0o400),
        ] {
            let meta = to(n).join(name).metadata().unwrap();
            assert_eq!((meta.mode() & 0o7777, meta.uid()), (mode, id_of(owner)), "{n} {name}");
        }
        for file in 0..120 {
            let name = format!("d{:03}/f{:02}", file / 100, file % 100);
            let (one, two) = (source.join(&name), to(n).join("tree").join(&name));
            assert!(std::fs::read(one).unwrap() == std::fs::read(two).unwrap(), "{n} {name}");
        }
    }
    assert_eq!(part_files(dir.path()), [] as [&Path; 0]);
}

#[tokio::test]
async fn the_end_asked_for_while_files_are_verified_and_placed() {
    let (site, _agents, ids) = Site::with_file_agents(2, &[], &[]).await.unwrap();
    let api = site.api();
    let dir = open_dir();
    let source = dir.path().join("tree");
    make_tree(&source, 1_500, 8_000);
    let mut in_time = 0;
    for attempt in 0..3 {
        let to = dir.path().join(format!("t{attempt}"));
        let task = transfer_task(&ids[0], &path_text(&source), "", &[&ids[1]], &path_text(&to));
        let id = api
            .submit_files("async_transfer_file", &transfer_body(&[task], 60))
            .await;
        eventually("it is verified", LIMIT, || async {
            let rows = api.file_rows(&id).await;
            let row = &rows[1];
            (row["content"]["status"] == 508 || row["error_code"] != RUNNING).then_some(())
        })
        .await;
        let asked = Instant::now();
        api.terminate_files(&id, &json!([])).await;
        let rows = api.files_over(&id, LIMIT).await;
        assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
        // Too late, and all of it is there; or in time, and nothing unfinished is left.
        // contract: v2-http-task#40
        match codes(&rows)[1] {
            0 => assert_tree(&to.join("tree"), 1_500, 8_000),
            code => {
                in_time += 1;
                assert_eq!(code, TERMINATED, "{rows:#?}");
            }
        }
        assert_eq!(part_files(&to), [] as [&Path; 0]);
    }
    eprintln!("{in_time} of 3 were ended in time");
}

// contract: procmgr-agent-lifecycle#47
#[tokio::test]
async fn a_push_is_under_way_until_its_host_has_it() {
    let (site, agents, ids) = Site::with_file_agents(2, &[], &[]).await.unwrap();
    let api = site.api();
    let dir = open_dir();
    agents[0].freeze();
    let targets = [ids[0].as_str(), ids[1].as_str()];
    let body = push_body(&targets, &path_text(&dir.path().join("to")), "hostid", "identity");
    let id = api.submit_files("async_push_file", &body).await;
    let ask = async |ids: &[&str]| {
        let body = json!({"task_id": id, "agent_id_list": ids});
        let reply = api.post("/api/v2/task/async/get_transfer_file_result", &body).await;
        assert_eq!(reply["code"], 0, "{reply}");
        let rows = reply["data"]["result"].as_array().unwrap().clone();
        let named = |row: &Value| {
            let agent = row["content"]["dest_agent_id"].as_str().unwrap().to_owned();
            (agent, row["error_code"].as_i64().unwrap())
        };
        rows.iter().map(named).collect::<Vec<_>>()
    };
    eventually("the other one has it", LIMIT, || async {
        let rows = ask(&targets).await;
        assert_eq!(rows[0], (ids[0].clone(), RUNNING));
        assert_eq!(rows[1].0, ids[1]);
        (rows[1].1 == 0).then_some(())
    })
    .await;
    assert_eq!(ask(&targets[..1]).await, [(ids[0].clone(), RUNNING)]);
    agents[0].go_on();
    eventually("both have it", LIMIT, || async {
        (ask(&targets).await == [(ids[0].clone(), 0), (ids[1].clone(), 0)]).then_some(())
    })
    .await;
}

// contract: reliability#F8
#[tokio::test]
async fn an_agent_without_room_for_its_journal_takes_no_orders_until_there_is_some() {
    let site = Site::with_files(gse_tests::StoreKind::Embedded).await.unwrap();
    let (api, dir) = (site.api(), open_dir());
    let id = "02000000full01";
    // Its own directory, and not those that it writes to.
    let data = site.path().join(format!("agent-{}", hex::encode(id)));
    std::fs::create_dir_all(&data).unwrap();
    let _disk = SmallDisk::mount(&data, 1 << 10);
    let _agent = site.file_agent(id, "10.2.0.1", &[]).await.unwrap();
    let push = async |name: &str| {
        let body = push_body(&[id], &path_text(&dir.path().join("to")), name, "content");
        let task = api.submit_files("async_push_file", &body).await;
        api.files_over(&task, LIMIT).await.remove(0)
    };
    let row = push("first").await;
    assert_eq!(row["error_code"], 0, "{row:#}");
    let filler = data.join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut file, &[7; 4096]).is_ok() {}
    let row = push("second").await;
    assert!(row["error_code"] != 0 && row["error_code"] != RUNNING, "{row:#}");
    assert!(!row["error_msg"].as_str().unwrap().is_empty(), "{row:#}");
    assert!(
        !dir.path().join("to/second").exists(),
        "nothing is begun that was not written down"
    );
    drop(file);
    std::fs::remove_file(&filler).unwrap();
    let row = push("third").await;
    assert_eq!(row["error_code"], 0, "{row:#}");
    assert!(dir.path().join("to/first").exists() && dir.path().join("to/third").exists());
}

/// Set where a test runs in a network of its own.
const OWN_NETWORK: &str = "GSE_TESTS_OWN_NETWORK";

/// What was on the wire.
#[derive(Debug, Default)]
struct Seen {
    /// Bytes of TCP between two addresses.
    tcp: std::collections::BTreeMap<(SocketAddr, SocketAddr), usize>,
    /// Where everything else went, by its protocol.
    other: std::collections::BTreeSet<(u8, IpAddr)>,
}

impl Seen {
    fn packet(&mut self, packet: &[u8]) {
        let octets = |from: usize| <[u8; 4]>::try_from(&packet[from..from + 4]).unwrap();
        let sixteen = |from: usize| <[u8; 16]>::try_from(&packet[from..from + 16]).unwrap();
        let (protocol, from, to, head): (u8, IpAddr, IpAddr, usize) = match packet.first().map(|byte| byte >> 4) {
            Some(4) => (
                packet[9],
                octets(12).into(),
                octets(16).into(),
                usize::from(packet[0] & 15) * 4,
            ),
            Some(6) => (packet[6], sixteen(8).into(), sixteen(24).into(), 40),
            // No IP at all.
            _ => (255, IpAddr::from([0; 4]), IpAddr::from([0; 4]), 0),
        };
        if protocol != 6 {
            self.other.insert((protocol, to));
            return;
        }
        let port = |at: usize| u16::from_be_bytes([packet[head + at], packet[head + at + 1]]);
        let key = (SocketAddr::new(from, port(0)), SocketAddr::new(to, port(2)));
        let length = match packet[0] >> 4 {
            4 => usize::from(u16::from_be_bytes([packet[2], packet[3]])),
            _ => usize::from(u16::from_be_bytes([packet[4], packet[5]])),
        };
        *self.tcp.entry(key).or_default() += length;
    }
}

/// Every packet of this network, until it is ended.
struct Capture {
    over: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Seen>,
}

impl Capture {
    fn start() -> Self {
        use socket2::{Domain, Protocol, Socket, Type};
        // Every protocol there is (ETH_P_ALL), without the heads of the link.
        let all = Protocol::from(i32::from(3_u16.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(all)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        socket.set_recv_buffer_size(64 << 20).unwrap();
        let over = Arc::<AtomicBool>::default();
        let end = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let (mut seen, mut packet) = (Seen::default(), [0; 256]);
            loop {
                match std::io::Read::read(&mut &socket, &mut packet) {
                    Ok(length) => seen.packet(&packet[..length]),
                    // All that was there has been read.
                    Err(_) if end.load(Ordering::Relaxed) => return seen,
                    Err(_) => {}
                }
            }
        });
        Self { over, thread }
    }

    fn end(self) -> Seen {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Ports of this network's sockets in one of the kernel's tables that are in a state (`0A`: listening).
fn sockets(table: &str, state: Option<&str>) -> Vec<u16> {
    let text = std::fs::read_to_string(format!("/proc/self/net/{table}")).unwrap_or_default();
    let lines = text
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    lines
        .filter(|fields| state.is_none_or(|state| fields[3] == state))
        .map(|fields| u16::from_str_radix(fields[1].rsplit(':').next().unwrap(), 16).unwrap())
        .collect()
}

/// Runs a test of this file once more, in a network that is its own and where everything, wherever it is sent, comes by.
fn in_its_own_network(test: &str) {
    let set_up = "ip link set lo up multicast on && ip addr add 10.9.9.1/24 dev lo && ip route add default dev lo \
        && ip route add 224.0.0.0/4 dev lo && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", set_up, "sh"]);
    command.arg(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(OWN_NETWORK, "1");
    assert!(command.status().unwrap().success(), "{test} in a network of its own");
}

// contract: p2p#15
#[tokio::test]
async fn only_what_was_configured_listens_and_is_on_the_wire() {
    if std::env::var_os(OWN_NETWORK).is_none() {
        return in_its_own_network("only_what_was_configured_listens_and_is_on_the_wire");
    }
    let capture = Capture::start();
    let site = Site::with_files(gse_tests::StoreKind::Embedded).await.unwrap();
    let ids: Vec<String> = (0..4).map(|n| format!("02000000wire{n:02}")).collect();
    let mut agents = vec![];
    for (n, id) in (1_u16..).zip(&ids) {
        let ports = [
            format!("files.peer_port_first={}", 21_000 + n),
            format!("files.peer_port_last={}", 21_000 + n),
        ];
        let sets: Vec<&str> = ports.iter().map(String::as_str).collect();
        agents.push(site.file_agent(id, &format!("10.2.0.{n}"), &sets).await.unwrap());
    }
    let api = site.api();
    let dir = open_dir();
    std::fs::write(dir.path().join("large"), random_bytes(20 << 20)).unwrap();
    let tasks: Vec<Value> = (1..4)
        .map(|n| {
            let to = path_text(&dir.path().join(format!("t{n}")));
            transfer_task(&ids[0], &path_text(dir.path()), "large", &[&ids[n]], &to)
        })
        .collect();
    let mut body = transfer_body(&tasks, 60);
    body["download_speed"] = json!(10);
    let id = api.submit_files("async_transfer_file", &body).await;
    let servers = [site.task.as_ref(), site.api.as_ref(), site.btsvr.get(&1)];
    let configured: std::collections::BTreeSet<u16> = servers
        .into_iter()
        .flatten()
        .chain(&site.store)
        .flat_map(|server| server.addresses.values())
        .filter_map(|place| place.rsplit(':').next()?.parse().ok())
        .chain(21_001..21_005)
        .collect();
    // All the time that it moves.
    let mut looks = 0;
    while codes(&api.file_rows(&id).await).contains(&RUNNING) {
        for table in ["tcp", "tcp6"] {
            let listening = sockets(table, Some("0A"));
            assert!(
                listening.iter().all(|port| configured.contains(port)),
                "{listening:?} of {configured:?}"
            );
        }
        for table in ["udp", "udp6", "udplite", "raw", "raw6"] {
            assert_eq!(sockets(table, None), [] as [u16; 0], "{table}");
        }
        looks += 1;
    }
    assert!(looks > 5, "{looks}");
    let rows = api.files_over(&id, LIMIT).await;
    assert_eq!(codes(&rows), [0; 4], "{rows:#?}");
    // What a DHT, a search for peers or for a router would send is seen where it is sent.
    let probe = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    let elsewhere: [IpAddr; 2] = [[239, 192, 152, 143].into(), [198, 51, 100, 7].into()];
    elsewhere
        .iter()
        .for_each(|to| assert!(probe.send_to(b"d1:ad2:id20:", (*to, 6771)).is_ok()));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let seen = capture.end();
    assert_eq!(
        seen.other,
        elsewhere.map(|to| (17, to)).into(),
        "only the two probes of this test are not TCP"
    );
    let strangers: Vec<_> = seen
        .tcp
        .keys()
        .filter(|(from, to)| !configured.contains(&from.port()) && !configured.contains(&to.port()))
        .collect();
    assert_eq!(strangers, [] as [&(SocketAddr, SocketAddr); 0]);
    let between_agents: usize = seen
        .tcp
        .iter()
        .filter(|((from, to), _)| [from, to].iter().any(|end| (21_001..21_005).contains(&end.port())))
        .map(|(_, bytes)| bytes)
        .sum();
    assert!(
        between_agents > 60 << 20,
        "{between_agents} bytes of three copies were seen"
    );
}
