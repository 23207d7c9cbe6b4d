//! The supervisor of a real agent, asked by way of a real gse_task as gse_procmgr asks: operations once each whatever becomes of the agent,
//! registrations on disk and put back, and what it costs.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use gse_core::fleet::{Fleet, FleetConfig, Question};
use gse_core::rpc::{Dialler, RpcConfig};
use gse_core::store::{Store, StoreConfig};
use gse_core::tls::TlsFiles;
use gse_proto::ids::AgentId;
use gse_proto::proc::{
    self as p, Key, Operate, Operation, Outcome, ProcAnswer, ProcCall, Process, Read, Reconcile, Registration, Spec,
    code, proc_answer, proc_call,
};
use gse_proto::prost::Message;
use gse_tests::plugins::{Plugin, daemon, op};
use gse_tests::{AgentOptions, Child, Site, StoreKind, eventually};
use tokio::sync::mpsc;

const AGENT: &str = "020000000242010a00002f17521298676581";
const LIMIT: Duration = Duration::from_secs(30);

/// A host, and somebody who asks it.
struct Host {
    site: Site,
    agent: Child,
    fleet: Fleet,
}

fn options() -> AgentOptions {
    let mut options = AgentOptions::new(AGENT, "10.11.12.14");
    options.sets = vec!["proc.check_interval_ms=200".into(), "proc.report_changes_ms=200".into()];
    options
}

impl Host {
    async fn start() -> Self {
        let site = Site::start(StoreKind::Embedded).await.unwrap();
        let agent = site.spawn_agent(&options(), "").unwrap();
        site.wait_state(AGENT, 2).await;
        let dir = site.path().join("certs");
        let files = TlsFiles {
            ca: dir.join("gseca.crt"),
            cert: dir.join("gse_server.crt"),
            key: dir.join("gse_server.key"),
        };
        let store = StoreConfig {
            url: site.server_store_url(),
            ..StoreConfig::default()
        };
        let dialler = Dialler::new(&RpcConfig::default(), &files).unwrap();
        let config = FleetConfig {
            heartbeat_interval_ms: 1_000,
            ..FleetConfig::default()
        };
        let fleet = Fleet::new(Store::connect(&store).await.unwrap(), dialler, config);
        Self { site, agent, fleet }
    }

    /// One question, asked again until there is an answer.
    async fn ask(&self, call: proc_call::Call) -> proc_answer::Answer {
        let payload = Bytes::from(ProcCall { call: Some(call) }.encode_to_vec());
        let began = Instant::now();
        loop {
            let limit = Duration::from_secs(10);
            let question = Question {
                service: "proc",
                caller: "a test".into(),
                shared: payload.clone(),
                agents: vec![(AgentId::parse(AGENT).unwrap(), Bytes::new())],
                patience: limit,
                deadline: tokio::time::Instant::now() + limit,
            };
            let (sender, mut answers) = mpsc::channel(1);
            self.fleet.ask(question, &sender).await;
            drop(sender);
            let (_, answer) = answers.recv().await.unwrap();
            match answer {
                Ok(answer) => return ProcAnswer::decode(answer).unwrap().answer.unwrap(),
                Err(silence) => assert!(began.elapsed() < LIMIT, "{silence:?}"),
            }
        }
    }

    async fn operate(&self, operations: Vec<Operation>) -> Vec<Outcome> {
        let began = Instant::now();
        loop {
            let call = Operate {
                operations: operations.clone(),
                wait_ms: 2_000,
            };
            let proc_answer::Answer::Operated(operated) = self.ask(proc_call::Call::Operate(call)).await else {
                panic!("another answer")
            };
            assert_eq!(operated.outcomes.len(), operations.len());
            if operated.outcomes.iter().all(|outcome| !outcome.running) {
                return operated.outcomes;
            }
            assert!(began.elapsed() < LIMIT, "{operated:?}");
        }
    }

    async fn one(&self, operation: Operation) -> Outcome {
        self.operate(vec![operation]).await.remove(0)
    }

    /// Kills the agent, and starts it again at once.
    async fn kill_agent(&mut self) {
        self.agent.kill_9();
        self.agent = self.site.spawn_agent(&options(), "").unwrap();
    }

    fn data(&self) -> PathBuf {
        self.site.path().join(format!("agent-{}/proc", hex::encode(AGENT)))
    }

    fn info(&self) -> String {
        std::fs::read_to_string(self.data().join("procinfo.json")).unwrap_or_default()
    }
}

fn key(plugin: &Plugin) -> Key {
    Key {
        namespace: "nodeman".into(),
        name: plugin.name.clone(),
    }
}

fn spec(plugin: &Plugin) -> Spec {
    let value = plugin.spec(&serde_json::json!({}));
    let text = |part: &str, name: &str| value[part][name].as_str().unwrap().to_owned();
    Spec {
        proc_name: text("identity", "proc_name"),
        setup_path: text("identity", "setup_path"),
        pid_path: text("identity", "pid_path"),
        user: text("identity", "user"),
        start_cmd: text("control", "start_cmd"),
        stop_cmd: text("control", "stop_cmd"),
        restart_cmd: text("control", "restart_cmd"),
        version_cmd: text("control", "version_cmd"),
        start_check_secs: Some(1),
        stop_check_secs: Some(2),
        start_retries: Some(3),
        start_interval: Some(1),
        op_timeout: Some(10),
        ..Spec::default()
    }
}

fn order(plugin: &Plugin, op_type: i64, number: u8, revision: u64) -> Operation {
    Operation {
        op_id: vec![number; p::OP_ID].into(),
        op_type: i32::try_from(op_type).unwrap(),
        key: Some(key(plugin)),
        spec: Some(spec(plugin)),
        revision,
        ..Operation::default()
    }
}

fn expect(outcome: &Outcome, code: i32) {
    assert_eq!(outcome.code, code, "{outcome:?}");
    assert!(!outcome.running && !outcome.unknown, "{outcome:?}");
}

fn process(outcome: &Outcome) -> &Process {
    outcome.process.as_ref().expect("the process after it")
}

#[tokio::test]
async fn every_operation_is_carried_out_once() {
    let mut host = Host::start().await;
    let plugin = Plugin::install(host.site.path(), "once", "gseonce", daemon::PLAIN);
    let start = order(&plugin, op::START, 1, 10);
    // Asked several times at once.
    let (one, two, three) = tokio::join!(
        host.one(start.clone()),
        host.one(start.clone()),
        host.one(start.clone())
    );
    expect(&one, code::OK);
    assert_eq!((&one, &one), (&two, &three));
    assert!(process(&one).hosted && process(&one).pid > 1, "{one:?}");
    assert_eq!(plugin.commands(), ["start"]);

    // contract: procmgr-agent-lifecycle#14
    expect(&host.one(order(&plugin, op::START, 2, 11)).await, code::ALREADY_RUNNING);
    // contract: procmgr-agent-lifecycle#7
    for (number, unknown) in [(30, 5), (31, 6), (32, -1), (33, 99)] {
        expect(&host.one(order(&plugin, unknown, number, 11)).await, code::ILLEGAL_OP);
    }
    // An earlier answer is the same after a restart, and nothing was done for it.
    host.kill_agent().await;
    assert_eq!(host.one(start.clone()).await.code, code::OK);
    assert_eq!(plugin.commands(), ["start"]);
    let only_ask = |number| Operation {
        only_ask: true,
        ..order(&plugin, op::STOP, number, 0)
    };
    assert!(host.one(only_ask(77)).await.unknown);
    assert!(!host.one(only_ask(1)).await.unknown);

    // In one call, in their order, one after the other; and a look that waits for none of them.
    let row = vec![
        order(&plugin, op::STOP, 40, 20),
        order(&plugin, op::REGISTER, 41, 21),
        order(&plugin, op::START, 42, 22),
        order(&plugin, op::STATUS, 43, 22),
    ];
    let outcomes = host.operate(row).await;
    // contract: procmgr-agent-lifecycle#20
    for outcome in &outcomes {
        expect(outcome, code::OK);
    }
    assert_eq!(plugin.commands(), ["start", "stop", "start"]);
    let status = host.one(order(&plugin, op::STATUS, 44, 22)).await;
    let told = status.status.as_ref().unwrap();
    assert_eq!(told.pid, plugin.alive()[0], "{status:?}");
    assert_eq!(told.version, "1.2.3");
    assert!(
        told.mem_bytes > 0 && told.threads == 1 && !told.start_time.is_empty(),
        "{told:?}"
    );
}

#[tokio::test]
async fn killed_at_any_moment_nothing_is_started_twice() {
    let mut host = Host::start().await;
    for (number, after_ms) in [0u64, 30, 100, 300, 700, 1_200].into_iter().enumerate() {
        let name = format!("gsekill{number}");
        let plugin = Plugin::install(host.site.path(), &name, &name, daemon::PLAIN);
        let start = order(&plugin, op::START, 100 + number as u8, 10);
        let killed = {
            let asking = host.one(start.clone());
            tokio::select! {
                outcome = asking => Some(outcome),
                () = tokio::time::sleep(Duration::from_millis(after_ms)) => None,
            }
        };
        if killed.is_none() {
            host.kill_agent().await;
        }
        let outcome = host.one(start).await;
        expect(&outcome, code::OK);
        assert!(process(&outcome).hosted);
        assert_eq!(
            (plugin.starts(), plugin.alive().len()),
            (1, 1),
            "killed after {after_ms} ms"
        );
        // It is supervised from then on.
        let before = plugin.alive()[0];
        plugin.crash();
        eventually("it is started again", LIMIT, || async {
            let alive = plugin.alive();
            (alive.len() == 1 && alive[0] != before).then_some(())
        })
        .await;
    }
}

// contract: procmgr-agent-lifecycle#57
// contract: procmgr-agent-lifecycle#58
#[tokio::test]
async fn registrations_survive_and_come_back_when_they_were_lost() {
    let mut host = Host::start().await;
    let plugin = Plugin::install(host.site.path(), "kept", "gsekept", daemon::PLAIN);
    expect(&host.one(order(&plugin, op::START, 1, 10)).await, code::OK);
    let pid = plugin.alive()[0];
    assert!(host.info().contains("\"kept\""), "{}", host.info());
    let proc_answer::Answer::Registrations(told) = host.ask(proc_call::Call::Read(Read::default())).await else {
        panic!("another answer")
    };
    let registration = told.registrations[0].clone();
    assert!(registration.hosted && registration.was_running && registration.revision == 10);

    // The host has lost its file, or it is damaged: nobody is started, nobody is killed, and what comes back is adopted.
    host.agent.kill_9();
    let text = host.info();
    std::fs::write(host.data().join("procinfo.json"), &text[..text.len() / 2]).unwrap();
    host.agent = host.site.spawn_agent(&options(), "").unwrap();
    let status = host.one(order(&plugin, op::STATUS, 2, 0)).await;
    assert_eq!(
        (process(&status).known, process(&status).pid),
        (false, pid),
        "{status:?}"
    );
    assert!(std::fs::read_dir(host.data()).unwrap().any(|entry| {
        let name = entry.unwrap().file_name();
        name.to_string_lossy().starts_with("procinfo.json.damaged-")
    }));
    let put = |registration: &Registration| {
        proc_call::Call::Reconcile(Reconcile {
            put: vec![registration.clone()],
        })
    };
    let proc_answer::Answer::Reconciled(answer) = host.ask(put(&registration)).await else {
        panic!("another answer")
    };
    assert_eq!(
        (answer.processes[0].hosted, answer.processes[0].pid),
        (true, pid),
        "{answer:?}"
    );
    assert_eq!(plugin.starts(), 1);
    // An older one changes nothing.
    let older = Registration {
        revision: 9,
        hosted: false,
        ..registration.clone()
    };
    let proc_answer::Answer::Reconciled(answer) = host.ask(put(&older)).await else {
        panic!("another answer")
    };
    assert!(answer.processes[0].hosted, "{answer:?}");
    plugin.crash();
    eventually("it is started again", LIMIT, || async {
        (plugin.starts() == 2).then_some(())
    })
    .await;
    assert_eq!(plugin.alive().len(), 1);
}

/// Whether a process with this command line runs.
fn runs(words: &str) -> bool {
    let pids = std::fs::read_dir("/proc").unwrap().flatten();
    pids.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .any(|line| String::from_utf8_lossy(&line).replace('\0', " ").trim() == words)
}

// contract: procmgr-agent-lifecycle#16
#[tokio::test]
async fn a_command_that_hangs_is_ended_and_the_daemon_it_has_left_is_not() {
    let host = Host::start().await;
    let plugin = Plugin::install(host.site.path(), "hangs", "gsehangs", daemon::PLAIN);
    let mut start = order(&plugin, op::START, 1, 10);
    let spec = start.spec.as_mut().unwrap();
    // A number of its own, so that it is told from other tests'.
    let sleep = format!("sleep {}", 100_000 + std::process::id());
    spec.start_cmd = format!("echo so far; {}; {sleep}", spec.start_cmd);
    spec.op_timeout = Some(2);
    let outcome = host.one(start).await;
    expect(&outcome, code::COMMAND_FAILED);
    assert!(outcome.message.starts_with("so far"), "{outcome:?}");
    eventually("the command is gone", LIMIT, || async { (!runs(&sleep)).then_some(()) }).await;
    // What it had started is there, and the host says so; nobody keeps it alive.
    let process = process(&outcome);
    assert_eq!(
        (vec![process.pid], process.hosted),
        (plugin.alive(), false),
        "{outcome:?}"
    );
    expect(&host.one(order(&plugin, op::STOP, 2, 11)).await, code::OK);
    assert!(plugin.alive().is_empty());
    expect(&host.one(order(&plugin, op::STOP, 3, 12)).await, code::NOT_RUNNING);
}

/// Processor time that a process has used, by itself and by the kernel for it.
fn cpu(pid: i32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

#[tokio::test]
#[ignore = "full tier: measures for a minute what supervising 50 processes costs"]
async fn what_fifty_processes_cost() {
    let mut host = Host::start().await;
    // As on a host: with the intervals that are the defaults.
    host.agent.kill_9();
    host.agent = host
        .site
        .spawn_agent(&AgentOptions::new(AGENT, "10.11.12.14"), "")
        .unwrap();
    host.site.wait_state(AGENT, 2).await;
    let minute = Duration::from_secs(60);
    tokio::time::sleep(Duration::from_secs(5)).await;
    let idle = cpu(host.agent.pid());
    tokio::time::sleep(minute).await;
    let idle = cpu(host.agent.pid()) - idle;
    let plugins: Vec<Plugin> = (0..50)
        .map(|n| {
            Plugin::install(
                host.site.path(),
                &format!("fifty{n}"),
                &format!("gsefifty{n}"),
                daemon::PLAIN,
            )
        })
        .collect();
    let starts = plugins
        .iter()
        .zip(1..)
        .map(|(plugin, n)| order(plugin, op::START, n, 10))
        .collect();
    for outcome in host.operate(starts).await {
        expect(&outcome, code::OK);
    }
    tokio::time::sleep(Duration::from_secs(15)).await;
    let busy = cpu(host.agent.pid());
    tokio::time::sleep(minute).await;
    let busy = cpu(host.agent.pid()) - busy;
    let share = busy.saturating_sub(idle).as_secs_f64() / minute.as_secs_f64() * 100.0;
    println!("idle {idle:?}, with 50 processes {busy:?} in a minute: {share:.3} % of a core");
    assert!(share < 0.2, "{share:.3} % of a core");
    assert!(plugins.iter().all(|plugin| plugin.starts() == 1));
}
