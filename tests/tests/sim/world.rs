//! A site on a simulated network: the store, one gse_task node, agents on hosts of their own. A test steps it, breaks it between steps,
//! and makes calls as a platform would.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use gse_core::audit::Audit;
use gse_core::authz::{AppEntry, Authenticator, AuthzConfig, Caller, Via};
use gse_core::clock::{Clock, Skew};
use gse_core::http::{ContractRequest, Front, HttpMetrics, Reply, Service};
use gse_core::lifecycle::Lifecycle;
use gse_core::net::{BoxDuplex, Dialer};
use gse_core::random::{Random, fix_order_on_this_thread};
use gse_core::store::{Store, StoreConfig};
use gse_core::tls::{PeerIdentity, Role};
use gse_proto::http::{Route, ScriptRow};
use gse_proto::ids::AgentId;
use gse_proto::session::Hello;
use gse_task::http::ScriptService;
use gse_task::metrics::Metrics;
use gse_task::peers::Peers;
use gse_task::{Node, Parts};
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::host::{Disk, SharedDisk, SimWork};
use super::log::Log;
use super::script::Script;

/// When simulations begin, Unix milliseconds. Later than any test is run, so that nothing has expired.
pub(crate) const EPOCH_MS: u64 = 2_000_000_000_000;
/// Where agents connect.
pub(crate) const SERVER: &str = "server:7000";
const STORE_PORT: u16 = 6379;
/// Least time a message takes.
const LATENCY: Duration = Duration::from_millis(1);
/// How long a node may take to be put together, in simulated time.
const START: Duration = Duration::from_secs(60);

/// Simulated milliseconds, the same on every host.
pub(crate) fn now_ms() -> u64 {
    turmoil::sim_elapsed().map_or(0, |elapsed| elapsed.as_millis() as u64)
}

/// TCP of the simulation.
pub(crate) fn dialer() -> Dialer {
    Dialer::new(|address| async move {
        let stream = turmoil::net::TcpStream::connect(address.as_str()).await?;
        Ok(Box::new(stream) as BoxDuplex)
    })
}

/// What a run is made of.
#[derive(Clone)]
pub(crate) struct Setup {
    /// Everything that happens follows from it.
    pub(crate) seed: u64,
    /// Hosts with one agent each.
    pub(crate) agents: usize,
    /// Where they connect.
    pub(crate) connect_to: String,
    /// How time passes; what happens within a tick is as if at once.
    pub(crate) tick: Duration,
    /// Most time a message takes.
    pub(crate) latency: Duration,
    /// Segments that a stream holds when its reader does not read.
    pub(crate) segments: usize,
    /// The node's settings.
    pub(crate) server: gse_task::Config,
    /// The agents' settings.
    pub(crate) agent: gse_agent::Config,
}

impl Setup {
    /// A small site.
    pub(crate) fn new(seed: u64, agents: usize) -> Self {
        let mut server = gse_task::Config {
            node_id: "sim".into(),
            store: StoreConfig {
                url: format!("redis://:secret@store:{STORE_PORT}/0"),
                ..gse_task::Config::default().store
            },
            ..gse_task::Config::default()
        };
        server.agents.advertise = vec![SERVER.into()];
        server.agents.allow_shared_certificate = true;
        // That cache goes by real time, which no seed repeats.
        server.task.cache_idle_ms = 3_600_000;
        Self {
            seed,
            agents,
            connect_to: SERVER.into(),
            tick: Duration::from_millis(20),
            latency: Duration::from_millis(40),
            segments: 1024,
            server,
            agent: gse_agent::Config::default(),
        }
    }
}

/// A call on its way.
struct Call {
    route: Route,
    body: Value,
    reply: Slot,
}

/// What became of a call.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    /// When it came.
    pub(crate) at_ms: u64,
    /// `data`, or code and message.
    pub(crate) outcome: Result<Value, (i64, String)>,
}

/// Where the answer of a call appears; nothing ever does when the server dies.
pub(crate) type Slot = Arc<Mutex<Option<Answer>>>;

/// The server as tests see it.
#[derive(Default)]
struct ServerSide {
    node: Mutex<Option<Arc<Node>>>,
    calls: Mutex<Option<mpsc::Sender<Call>>>,
    skew: Skew,
    store_skew: Skew,
    lives: Mutex<u64>,
}

/// A host with an agent.
pub(crate) struct Host {
    /// Its name on the network.
    pub(crate) name: String,
    /// Its agent's id.
    pub(crate) agent: AgentId,
    /// Its disk.
    pub(crate) disk: SharedDisk,
}

/// A simulated site.
pub(crate) struct World {
    /// The network.
    pub(crate) net: turmoil::Sim<'static>,
    /// What has happened.
    pub(crate) log: Log,
    /// Decides what a test does next.
    pub(crate) random: Random,
    /// The hosts.
    pub(crate) hosts: Vec<Host>,
    server: Arc<ServerSide>,
    latency: Duration,
    _dir: tempfile::TempDir,
}

impl World {
    /// Puts a site together. Nothing has run yet.
    pub(crate) fn new(setup: &Setup) -> Self {
        fix_order_on_this_thread(Some(setup.seed));
        let mut builder = turmoil::Builder::new();
        builder
            .epoch(UNIX_EPOCH + Duration::from_millis(EPOCH_MS))
            .simulation_duration(Duration::from_secs(1 << 32))
            .tick_duration(setup.tick)
            .min_message_latency(LATENCY)
            .max_message_latency(setup.latency)
            .tcp_capacity(setup.segments)
            .rng_seed(setup.seed);
        let mut net = builder.build();
        let log = Log::default();
        let dir = tempfile::tempdir().expect("a directory for the store");
        let path = dir.path().to_owned();
        let server = Arc::new(ServerSide::default());
        let store_clock = server.store_skew.clone();
        net.host("store", move || store(path.clone(), store_clock.clone()));
        let (side, config, random_seed) = (Arc::clone(&server), setup.server.clone(), setup.seed);
        let server_log = log.clone();
        net.host("server", move || {
            serve(Arc::clone(&side), config.clone(), random_seed, server_log.clone())
        });
        let hosts = (0..setup.agents)
            .map(|n| {
                let name = format!("host-{n}");
                let agent = AgentId::parse(&format!("agent-{n}")).expect("an id");
                let disk = SharedDisk::new(Mutex::new(Disk::default()));
                let lives = Arc::new(Mutex::new(0_u64));
                let mut config = setup.agent.clone();
                config.agent_id = agent.to_string();
                config.servers = vec![setup.connect_to.clone()];
                let (agent_disk, agent_log, seed) = (Arc::clone(&disk), log.clone(), setup.seed);
                net.host(name.as_str(), move || {
                    *lives.lock() += 1;
                    let random = Random::seeded(seed ^ ((n as u64 + 2) << 32) ^ *lives.lock());
                    agent_life(config.clone(), n, Arc::clone(&agent_disk), agent_log.clone(), random)
                });
                Host { name, agent, disk }
            })
            .collect();
        Self {
            net,
            log,
            random: Random::seeded(setup.seed ^ 0x5eed),
            hosts,
            server,
            latency: setup.latency,
            _dir: dir,
        }
    }

    /// Seconds since the beginning.
    pub(crate) fn now(&self) -> Duration {
        self.net.elapsed()
    }

    /// The same in milliseconds.
    pub(crate) fn ms(&self) -> u64 {
        self.net.elapsed().as_millis() as u64
    }

    /// Goes on for so long.
    pub(crate) fn run(&mut self, time: Duration) {
        let until = self.now() + time;
        while self.now() < until {
            self.step();
        }
    }

    /// One tick.
    pub(crate) fn step(&mut self) {
        if std::env::var_os("SIM_NET").is_some() {
            self.note_network();
        }
        if let Err(error) = self.net.step() {
            panic!("a host has failed: {error}");
        }
    }

    /// Adds what is on its way to the log: where two runs part that should be the same.
    fn note_network(&self) {
        let mut lines = Vec::new();
        self.net.links(|links| {
            for message in links.flatten() {
                let (from, to) = message.pair();
                let text = message.protocol().to_string();
                let hash = hex::encode(&Sha256::digest(&text)[..4]);
                lines.push(format!(
                    "on its way {from} {to} {} {hash} {}",
                    text.len(),
                    &text[..text.len().min(240)]
                ));
            }
        });
        for line in lines {
            self.note(&line);
        }
    }

    /// Goes on until `probe` gives something, at most for `limit`.
    ///
    /// # Errors
    /// When it did not.
    pub(crate) fn until<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut probe: impl FnMut(&Self) -> Option<T>,
    ) -> Result<T, String> {
        let end = self.now() + limit;
        loop {
            if let Some(found) = probe(self) {
                return Ok(found);
            }
            if self.now() >= end {
                return Err(format!("not within {limit:?}: {what}"));
            }
            self.step();
        }
    }

    /// The node, while it lives.
    pub(crate) fn node(&self) -> Option<Arc<Node>> {
        self.server.node.lock().clone()
    }

    /// The clock of the node's host.
    pub(crate) fn server_clock(&self) -> &Skew {
        &self.server.skew
    }

    /// The clock of the store's host.
    pub(crate) fn store_clock(&self) -> &Skew {
        &self.server.store_skew
    }

    /// Whether an agent has a session.
    pub(crate) fn online(&self, n: usize) -> bool {
        self.node()
            .is_some_and(|node| node.registry.get(&self.hosts[n].agent).is_some())
    }

    /// Goes on until everybody is connected.
    ///
    /// # Errors
    /// Who was not.
    pub(crate) fn all_online(&mut self, limit: Duration) -> Result<(), String> {
        self.until("all agents online", limit, |world| {
            (0..world.hosts.len()).all(|n| world.online(n)).then_some(())
        })
    }

    /// Ends what runs on a host. In which order its streams are closed is not ours to say, so all of that takes the same time.
    fn crash(&mut self, name: &str) {
        let hosts = self.hosts.iter().map(|host| host.name.clone());
        let all = hosts.chain(["store".to_owned(), "server".to_owned()]);
        let others: Vec<String> = all.filter(|other| other != name).collect();
        for other in &others {
            self.net.set_link_latency(name, other.as_str(), LATENCY);
        }
        self.net.crash(name);
        for other in &others {
            self.net
                .set_link_max_message_latency(name, other.as_str(), self.latency);
        }
    }

    /// Kills the server.
    pub(crate) fn kill_server(&mut self) {
        self.note("server dies");
        self.server.calls.lock().take();
        self.server.node.lock().take();
        self.crash("server");
    }

    /// Starts it again.
    pub(crate) fn start_server(&mut self) {
        self.note("server starts");
        self.net.bounce("server");
    }

    /// Kills an agent; its scripts go on.
    pub(crate) fn kill_agent(&mut self, n: usize) {
        self.note(&format!("agent {n} dies"));
        let name = self.hosts[n].name.clone();
        self.crash(&name);
    }

    /// Starts it again.
    pub(crate) fn start_agent(&mut self, n: usize) {
        self.note(&format!("agent {n} starts"));
        self.net.bounce(self.hosts[n].name.as_str());
    }

    /// Adds a line to the log.
    pub(crate) fn note(&self, text: &str) {
        self.log.add(self.ms(), text);
    }

    /// Makes a call. `None` when nobody listens.
    pub(crate) fn call(&self, route: Route, body: Value) -> Option<Slot> {
        let reply = Slot::default();
        let call = Call {
            route,
            body,
            reply: Arc::clone(&reply),
        };
        let calls = self.server.calls.lock().clone()?;
        calls.try_send(call).ok().map(|()| reply)
    }

    /// Makes a call and goes on until it is answered.
    ///
    /// # Errors
    /// When it is not, or with an error.
    pub(crate) fn ask(&mut self, route: Route, body: Value, limit: Duration) -> Result<Value, String> {
        let slot = self.call(route, body).ok_or("nobody listens")?;
        let answer = self.until("an answer", limit, |_| slot.lock().clone())?;
        answer.outcome.map_err(|(code, text)| format!("{code} {text}"))
    }

    /// Begins a submit.
    pub(crate) fn submit(&self, targets: &[usize], scripts: &[Script], timeout_s: u64) -> Option<Slot> {
        let agents: Vec<Value> = targets
            .iter()
            .map(|n| json!({"bk_agent_id": self.hosts[*n].agent.as_str(), "user": "root"}))
            .collect();
        let atomics: Vec<Value> = (0..)
            .zip(scripts)
            .map(|(id, script): (u32, _)| {
                json!({"atomic_task_id": id, "command": script.text(), "timeout_seconds": timeout_s})
            })
            .collect();
        self.call(Route::ExecuteScript, json!({"agents": agents, "atomic_tasks": atomics}))
    }

    /// Submits and goes on until that is answered; gives the task's id.
    ///
    /// # Errors
    /// When it was not taken.
    pub(crate) fn submitted(
        &mut self,
        targets: &[usize],
        scripts: &[Script],
        timeout_s: u64,
    ) -> Result<String, String> {
        let slot = self.submit(targets, scripts, timeout_s).ok_or("nobody listens")?;
        let answer = self.until("an answer", Duration::from_secs(30), |_| slot.lock().clone())?;
        task_id(&answer).map_err(|(code, text)| format!("{code} {text}"))
    }

    /// Reads rows of a task.
    ///
    /// # Errors
    /// When that fails.
    pub(crate) fn rows(&mut self, task: &str, targets: &[usize], atomics: usize) -> Result<Vec<ScriptRow>, String> {
        let wanted: Vec<Value> = (0..atomics).map(|id| json!({"atomic_task_id": id})).collect();
        let agents: Vec<Value> = targets
            .iter()
            .map(|n| json!({"bk_agent_id": self.hosts[*n].agent.as_str(), "atomic_tasks": wanted}))
            .collect();
        let body = json!({"task_id": task, "agent_tasks": agents});
        let mut reply = self.ask(Route::ScriptResult, body, Duration::from_secs(30))?;
        serde_json::from_value(reply["result"].take()).map_err(|error| error.to_string())
    }

    /// Goes on until every row is terminal.
    ///
    /// # Errors
    /// When that takes longer than `limit`.
    pub(crate) fn finished(
        &mut self,
        task: &str,
        targets: &[usize],
        atomics: usize,
        limit: Duration,
    ) -> Result<Vec<ScriptRow>, String> {
        let end = self.now() + limit;
        loop {
            let rows = self.rows(task, targets, atomics);
            if let Ok(rows) = &rows
                && rows.iter().all(|row| row.status > 1)
            {
                return Ok(rows.clone());
            }
            if self.now() >= end {
                return Err(format!("task {task} is not finished within {limit:?}: {rows:?}"));
            }
            self.run(Duration::from_secs(1));
        }
    }

    /// The run's hash, for comparisons.
    pub(crate) fn hash(&self) -> String {
        self.log.hash()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.server.node.lock().take();
        fix_order_on_this_thread(None);
        gse_task::clock::use_on_this_thread(None);
    }
}

/// The id in the answer of a submit.
///
/// # Errors
/// Code and message when it was not taken.
pub(crate) fn task_id(answer: &Answer) -> Result<String, (i64, String)> {
    let data = answer.outcome.clone()?;
    Ok(data["result"]["task_id"].as_str().unwrap_or_default().to_owned())
}

async fn store(dir: std::path::PathBuf, skew: Skew) -> turmoil::Result {
    let life = Lifecycle::new("store");
    let mut config = gse_dba::Config {
        password: Some("secret".into()),
        ..Default::default()
    };
    config.embedded.dir = dir;
    let clock = Clock::simulated(EPOCH_MS + now_ms(), &skew);
    let store = gse_dba::Embed::open(config, clock, &life)?;
    let listener = turmoil::net::TcpListener::bind(("0.0.0.0", STORE_PORT)).await?;
    loop {
        let (stream, peer) = listener.accept().await?;
        store.serve(stream, peer.to_string());
    }
}

async fn serve(side: Arc<ServerSide>, config: gse_task::Config, seed: u64, log: Log) -> turmoil::Result {
    let life = Lifecycle::new("server");
    let lives = {
        let mut lives = side.lives.lock();
        *lives += 1;
        *lives
    };
    let random = Random::seeded(seed ^ (1 << 32) ^ lives);
    let clock = Clock::simulated(EPOCH_MS + now_ms(), &side.skew);
    gse_task::clock::use_on_this_thread(Some(clock.clone()));
    let store = Store::connect_over(&config.store, dialer(), random.clone()).await?;
    let all = || vec!["*".to_owned()];
    let authz = AuthzConfig {
        apps: vec![AppEntry {
            code: "sim".into(),
            operations: all(),
            accounts: all(),
            targets: all(),
            ..AppEntry::default()
        }],
        ..AuthzConfig::default()
    };
    let front = Front {
        authenticator: Authenticator::new(&authz)?,
        audit: Audit::disabled(),
        metrics: HttpMetrics::new(&mut Registry::default()),
    };
    let policy = front.authenticator.policy();
    let node = Node::assemble(Parts {
        metrics: Metrics::new(&mut Registry::default()),
        config,
        life: life.clone(),
        clock,
        random,
        store,
        front,
        peers: Peers::new(None),
    });
    let service = Arc::new(ScriptService {
        node: Arc::clone(&node),
        policy,
    });
    let (calls, mut waiting) = mpsc::channel::<Call>(10_000);
    *side.calls.lock() = Some(calls);
    let call_life = life.clone();
    life.spawn("calls", async move {
        while let Some(call) = waiting.recv().await {
            let service = Arc::clone(&service);
            call_life.spawn_contained("call", answer(service, call));
        }
    });
    if tokio::time::timeout(START, node.take_up()).await != Ok(true) {
        log.add(now_ms(), "server can't take up its tasks yet");
        node.take_up().await;
    }
    *side.node.lock() = Some(Arc::clone(&node));
    let listener = turmoil::net::TcpListener::bind("0.0.0.0:7000").await?;
    loop {
        let (stream, peer) = listener.accept().await?;
        log.add(now_ms(), format!("server accepts {}", peer.ip()));
        life.spawn_contained("agent session", session(Arc::clone(&node), stream, peer));
    }
}

async fn session(node: Arc<Node>, stream: turmoil::net::TcpStream, peer: SocketAddr) {
    let identity = PeerIdentity {
        role: Role::Agent,
        id: None,
        fingerprint: String::new(),
    };
    gse_task::session::serve(node, stream, peer, identity).await;
}

async fn answer(service: Arc<ScriptService>, call: Call) {
    let operation = match call.route.operation_name().parse() {
        Ok(operation) => operation,
        Err(error) => panic!("{error}"),
    };
    let request = ContractRequest {
        route: call.route,
        path: call.route.path().to_owned(),
        operation,
        caller: Caller {
            app: "sim".into(),
            username: None,
            via: Via::Server,
        },
        request_id: "sim".into(),
        tenant: String::new(),
        peer: SocketAddr::from(([127, 0, 0, 1], 1)),
        headers: http::HeaderMap::new(),
        body: Bytes::from(call.body.to_string()),
        stream: None,
    };
    let outcome = match service.call(request).await {
        Ok(Reply::Data(data)) => serde_json::from_slice(&data).map_err(|error| (-1, error.to_string())),
        Ok(Reply::Raw(_)) => Err((-1, "not an envelope".to_owned())),
        Err(error) => Err((error.code, error.message)),
    };
    *call.reply.lock() = Some(Answer {
        at_ms: now_ms(),
        outcome,
    });
}

/// One life of an agent.
async fn agent_life(
    config: gse_agent::Config,
    n: usize,
    disk: SharedDisk,
    log: Log,
    random: Random,
) -> turmoil::Result {
    let life = Lifecycle::new("agent");
    let hello = hello(&config.agent_id, n, &random);
    let work = SimWork::start(&format!("host-{n}"), disk, random.clone(), log, &life);
    gse_agent::session::Keeper::over(&config, hello, Arc::new(work), dialer(), random, &life)
        .run()
        .await;
    Ok(())
}

/// What an agent says of itself.
pub(crate) fn hello(agent: &str, n: usize, random: &Random) -> Hello {
    Hello {
        agent_id: agent.to_owned(),
        machine_id: format!("machine-{n}"),
        boot_id: format!("boot-{n}"),
        instance: Bytes::copy_from_slice(&random.u64().to_be_bytes()),
        addresses: vec![format!("10.{}.{}.1", n / 250, n % 250)],
        hostname: format!("host-{n}"),
        version: "0.0.1".into(),
        run_mode: gse_proto::session::RunMode::Agent.into(),
        started_at_ms: EPOCH_MS + now_ms(),
        ..Hello::default()
    }
}
