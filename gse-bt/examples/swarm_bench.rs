//! Measures swarms of real processes on shaped links: a network namespace for each host, joined by a bridge, `tbf` on the way out of
//! each. Needs root, `ip` and `tc`:
//!
//! `cargo run --release -p gse-bt --example swarm_bench -- [-n 8] [--kib 262144] [--rate 200mbit] [--slow 3:20mbit] [--libtorrent]`
//!
//! Time runs from just before the processes are started until the last target has everything verified; what the source has sent is
//! counted at its interface. With `--libtorrent`, the targets are stock libtorrent clients that find each other by our tracker.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use gse_bt::manifest::{ManifestBuilder, swarm_id, torrent_file};
use gse_bt::tracker::{Access, Announce, Event, FrontConfig, Peers, Tracker, TrackerConfig, TrackerMetrics, serve};
use gse_bt::{ALPN, Engine, EngineConfig, Metrics, PeerTls, Storage, SwarmSpec};
use gse_core::certs::{Authority, LEAF_DAYS};
use gse_core::lifecycle::Lifecycle;
use gse_core::random::Random;
use gse_core::tls::{Role, TlsFiles, peer_configs};
use gse_proto::file::{Manifest, PeerAddress};
use gse_proto::prost::Message as _;

const PREFIX: &str = "gsebt";
const PORT: u16 = 60020;
const PLAIN: u16 = 6881;
/// Of a frame of 1514 bytes, what is content.
const GOODPUT: f64 = 0.9564;

const LIBTORRENT: &str = r"
import sys, time, libtorrent as lt
torrent, out, listen, done = sys.argv[1:5]
session = lt.session({'listen_interfaces': listen, 'enable_dht': False, 'enable_lsd': False, 'enable_upnp': False,
    'enable_natpmp': False, 'enable_outgoing_utp': False, 'enable_incoming_utp': False, 'connection_speed': 200,
    'min_announce_interval': 5, 'torrent_connect_boost': 60, 'smooth_connects': False})
params = lt.add_torrent_params()
params.ti = lt.torrent_info(torrent)
params.save_path = out
params.flags &= ~lt.torrent_flags.auto_managed
params.flags &= ~lt.torrent_flags.paused
handle = session.add_torrent(params)
told = False
while True:
    if handle.status().is_seeding and not told:
        open(done, 'w').write('%.6f' % time.time())
        told = True
    time.sleep(0.02)
";

struct Args {
    targets: usize,
    kib: u64,
    rate: String,
    slow: Option<(usize, String)>,
    libtorrent: bool,
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let text: Vec<&str> = args.iter().map(String::as_str).collect();
    if let ["node", dir, index, targets, foreign] = text.as_slice() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        return runtime.block_on(node(
            Path::new(dir),
            index.parse()?,
            targets.parse()?,
            *foreign == "foreign",
        ));
    }
    if let ["tracker", dir, targets] = text.as_slice() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        return runtime.block_on(tracker(Path::new(dir), targets.parse()?));
    }
    let mut parsed = Args {
        targets: 8,
        kib: 256 << 10,
        rate: "200mbit".to_owned(),
        slow: None,
        libtorrent: false,
    };
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let mut value = || rest.next().cloned().with_context(|| format!("{arg} wants a value"));
        match arg.as_str() {
            "-n" => parsed.targets = value()?.parse()?,
            "--kib" => parsed.kib = value()?.parse()?,
            "--rate" => parsed.rate = value()?,
            "--slow" => {
                let text = value()?;
                let (which, rate) = text.split_once(':').context("--slow wants target:rate")?;
                parsed.slow = Some((which.parse()?, rate.to_owned()));
            }
            "--libtorrent" => parsed.libtorrent = true,
            other => bail!("{other} is not known"),
        }
    }
    ensure!(parsed.targets > 0 && parsed.targets < 200, "-n is from 1 to 199");
    measure(&parsed)
}

fn ip(index: usize) -> String {
    format!("10.77.0.{}", index + 1)
}

fn run(command: &str) -> Result<()> {
    let mut words = command.split(' ');
    let program = words.next().unwrap_or_default();
    let out = Command::new(program)
        .args(words)
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    ensure!(
        out.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(())
}

/// The namespaces; they are taken down with this.
struct Net {
    targets: usize,
}

impl Net {
    fn up(args: &Args) -> Result<Self> {
        let net = Net { targets: args.targets };
        net.down();
        let hub = format!("{PREFIX}-hub");
        run(&format!("ip netns add {hub}"))?;
        run(&format!("ip netns exec {hub} ip link set lo up"))?;
        run(&format!("ip netns exec {hub} ip link add br0 type bridge"))?;
        run(&format!("ip netns exec {hub} ip addr add 10.77.0.254/24 dev br0"))?;
        run(&format!("ip netns exec {hub} ip link set br0 up"))?;
        for index in 0..=args.targets {
            let ns = format!("{PREFIX}-{index}");
            run(&format!("ip netns add {ns}"))?;
            run(&format!(
                "ip link add v{index} netns {hub} type veth peer name eth0 netns {ns}"
            ))?;
            run(&format!("ip netns exec {hub} ip link set v{index} master br0 up"))?;
            run(&format!("ip netns exec {ns} ip link set lo up"))?;
            run(&format!("ip netns exec {ns} ip addr add {}/24 dev eth0", ip(index)))?;
            run(&format!("ip netns exec {ns} ip link set eth0 up"))?;
            let slow = args.slow.as_ref().filter(|(which, _)| *which == index);
            let rate = slow.map_or(&args.rate, |(_, rate)| rate);
            if rate != "none" {
                run(&format!(
                    "ip netns exec {ns} tc qdisc add dev eth0 root tbf rate {rate} burst 128kb latency 40ms"
                ))?;
            }
        }
        Ok(net)
    }

    fn down(&self) {
        for ns in (0..=self.targets.max(64))
            .map(|index| format!("{PREFIX}-{index}"))
            .chain([format!("{PREFIX}-hub")])
        {
            // Most of them are not there.
            let _gone = Command::new("ip")
                .args(["netns", "del", &ns])
                .stderr(Stdio::null())
                .status();
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.down();
    }
}

struct Started(Vec<Child>);

impl Drop for Started {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _gone = child.kill();
            let _ended = child.wait();
        }
    }
}

fn in_namespace(ns: &str, program: &str, args: &[&str]) -> Result<Child> {
    Command::new("ip")
        .args(["netns", "exec", ns, program])
        .args(args)
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {program} in {ns}"))
}

fn prepare(dir: &Path, args: &Args) -> Result<Manifest> {
    let total = args.kib << 10;
    let mut content = Vec::with_capacity(total as usize);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    while (content.len() as u64) < total {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        content.extend_from_slice(&state.to_le_bytes());
    }
    let mut builder = ManifestBuilder::new("content.bin", total)?;
    builder.begin_file(vec![Bytes::from("content.bin")], total, 0o644, 0)?;
    builder.data(&content)?;
    builder.end_file()?;
    let manifest = builder.finish()?;
    fs::write(dir.join("manifest"), manifest.encode_to_vec())?;
    fs::write(dir.join("0"), &content)?;
    let trackers = [vec!["http://10.77.0.254:6969/announce".to_owned()]];
    fs::write(dir.join("torrent"), torrent_file(&manifest, &trackers))?;
    let authority = Authority::create(dir.join("ca"))?;
    for index in 0..=args.targets {
        let files = tls_files(dir, index);
        authority.issue(
            Role::Agent,
            Some(&format!("agent-{index}")),
            &[],
            &files.cert,
            &files.key,
            LEAF_DAYS,
        )?;
    }
    Ok(manifest)
}

fn tls_files(dir: &Path, index: usize) -> TlsFiles {
    TlsFiles {
        ca: dir.join("ca/gseca.crt"),
        cert: dir.join(format!("{index}.crt")),
        key: dir.join(format!("{index}.key")),
    }
}

fn sent(index: usize) -> Result<u64> {
    let path = "/sys/class/net/eth0/statistics/tx_bytes";
    let out = Command::new("ip")
        .args(["netns", "exec", &format!("{PREFIX}-{index}"), "cat", path])
        .output()?;
    Ok(String::from_utf8_lossy(&out.stdout).trim().parse()?)
}

/// Most memory that was resident, KiB, and processor seconds of a process.
fn used(pid: u32) -> Option<(u64, f64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let ticks: Vec<f64> = stat
        .rsplit(')')
        .next()?
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|text| text.parse().ok())
        .collect();
    Some((
        peak.trim().trim_end_matches(" kB").parse().ok()?,
        ticks.iter().sum::<f64>() / 100.0,
    ))
}

fn unix() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |passed| passed.as_secs_f64())
}

fn measure(args: &Args) -> Result<()> {
    let base = if Path::new("/dev/shm").is_dir() {
        PathBuf::from("/dev/shm")
    } else {
        std::env::temp_dir()
    };
    let dir = tempfile::tempdir_in(base)?;
    let manifest = prepare(dir.path(), args)?;
    let _net = Net::up(args)?;
    let me = std::env::current_exe()?;
    let (me, at) = (
        me.to_string_lossy().into_owned(),
        dir.path().to_string_lossy().into_owned(),
    );
    let count = args.targets.to_string();
    let foreign = if args.libtorrent { "foreign" } else { "own" };
    let mut started = Started(Vec::new());
    if args.libtorrent {
        started
            .0
            .push(in_namespace(&format!("{PREFIX}-hub"), &me, &["tracker", &at, &count])?);
        std::thread::sleep(Duration::from_millis(500));
    }
    let before = sent(0)?;
    let began = unix();
    for index in 0..=args.targets {
        let ns = format!("{PREFIX}-{index}");
        let number = index.to_string();
        let child = if args.libtorrent && index > 0 {
            let out = dir.path().join(format!("out{index}"));
            fs::create_dir_all(&out)?;
            let (torrent, done) = (format!("{at}/torrent"), format!("{at}/{index}.done"));
            let listen = format!("{}:{PLAIN}", ip(index));
            in_namespace(
                &ns,
                "/usr/bin/python3",
                &["-c", LIBTORRENT, &torrent, &out.to_string_lossy(), &listen, &done],
            )?
        } else {
            in_namespace(&ns, &me, &["node", &at, &number, &count, foreign])?
        };
        started.0.push(child);
    }
    let until = Instant::now() + Duration::from_secs(300);
    let mut done: Vec<f64> = Vec::new();
    for index in 1..=args.targets {
        let path = dir.path().join(format!("{index}.done"));
        loop {
            let said = fs::read_to_string(&path)
                .ok()
                .and_then(|text| text.trim().parse::<f64>().ok());
            if let Some(at) = said {
                done.push(at - began);
                break;
            }
            ensure!(Instant::now() < until, "target {index} is not done");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let copies = (sent(0)? - before) as f64 / manifest.total as f64 * GOODPUT;
    let mut peak = 0;
    let mut processor = 0.0;
    for child in &started.0 {
        if let Some((memory, seconds)) = used(child.id()) {
            peak = peak.max(memory);
            processor += seconds;
        }
    }
    let whole = fs::read(dir.path().join("0"))?;
    for index in 1..=args.targets {
        let own = dir.path().join(index.to_string());
        let got = fs::read(if args.libtorrent {
            dir.path().join(format!("out{index}/content.bin"))
        } else {
            own
        })?;
        ensure!(got == whole, "target {index} has something else");
    }
    done.sort_by(f64::total_cmp);
    let (median, last) = (done[done.len() / 2], done[done.len() - 1]);
    let mbit: f64 = args.rate.trim_end_matches("mbit").parse().unwrap_or(f64::INFINITY);
    let bound = manifest.total as f64 * 8.0 / (mbit * 1e6 * GOODPUT);
    println!(
        "{} x {} KiB at {}{}{}: median {median:.2} s, last {last:.2} s = {:.2} x bound ({bound:.2} s); source sent {copies:.2} copies; \
         at most {:.1} MiB resident, {processor:.1} s of processor in all",
        args.targets,
        args.kib,
        args.rate,
        args.slow
            .as_ref()
            .map(|(which, rate)| format!(", target {which} at {rate}"))
            .unwrap_or_default(),
        if args.libtorrent { ", libtorrent targets" } else { "" },
        last / bound,
        peak as f64 / 1024.0,
    );
    Ok(())
}

async fn node(dir: &Path, index: usize, targets: usize, foreign: bool) -> Result<()> {
    let manifest = Arc::new(Manifest::decode(fs::read(dir.join("manifest"))?.as_slice())?);
    let (server, client) = peer_configs(&tls_files(dir, index), &[Role::Agent, Role::Server], &[ALPN])?;
    let config = EngineConfig {
        listen: vec![SocketAddr::new(ip(index).parse()?, PORT)],
        plain_listen: if foreign {
            Some(SocketAddr::new(ip(index).parse()?, PLAIN))
        } else {
            None
        },
        tls: Some(PeerTls { server, client }),
        ..EngineConfig::default()
    };
    let engine = Engine::start(config, Metrics::default()).await?;
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(dir.join(index.to_string()))?;
    let storage = Storage::new(Arc::clone(&manifest), vec![Some(file)])?;
    let spec = SwarmSpec {
        manifest,
        swarm_key: [42; 32],
        own_id: format!("agent-{index}"),
        foreign,
    };
    let swarm = if index == 0 {
        engine.seed(spec, storage)?
    } else {
        engine.fetch(spec, storage, None)?
    };
    let peers: Vec<PeerAddress> = (0..=targets)
        .map(|other| PeerAddress {
            address: format!("{}:{PORT}", ip(other)),
            agent_id: format!("agent-{other}"),
            seed: other == 0,
            ..PeerAddress::default()
        })
        .collect();
    if index > 0 {
        swarm.add_peers(&peers);
        swarm.progress().wait_for(|progress| progress.complete).await?;
        let text = format!("{:.6}", unix());
        let (part, done) = (dir.join(format!("{index}.part")), dir.join(format!("{index}.done")));
        fs::write(&part, text)?;
        fs::rename(part, done)?;
    }
    std::future::pending().await
}

async fn tracker(dir: &Path, targets: usize) -> Result<()> {
    let manifest = Manifest::decode(fs::read(dir.join("manifest"))?.as_slice())?;
    let tracker = Tracker::new(
        TrackerConfig::default(),
        Access::Listed,
        TrackerMetrics::default(),
        Random::system(),
    );
    let tracker = Arc::new(tracker);
    ensure!(tracker.allow(swarm_id(&manifest)), "the tracker takes no swarm");
    let life = Lifecycle::new("bench");
    let front = FrontConfig {
        http_listen: "10.77.0.254:6969".to_owned(),
        ..FrontConfig::default()
    };
    serve(&front, Arc::clone(&tracker), &[5; 32], &life).await?;
    let announce = Announce {
        swarm: swarm_id(&manifest),
        peer_id: *b"-GS0100-bench-source",
        port: PLAIN,
        left: 0,
        event: Event::Started,
        wanted: Some(0),
    };
    tracker.announce(ip(0).parse()?, &announce, 0, &mut Peers::default())?;
    eprintln!("tracker of {targets} targets is ready");
    std::future::pending().await
}
