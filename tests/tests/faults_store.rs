//! The store refuses, hangs or is slow for a while: callers are told at once, agents stay, results wait, everything heals by itself.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use gse_tests::metrics::Figures;
use gse_tests::script::{counting, runs_by_target};
use gse_tests::{Child, Fault, Site, StoreKind, eventually, script_body};

const AGENTS: [&str; 2] = [
    "020000000242010a00002f17521298676521",
    "020000000242010a00002f17521298676522",
];
/// How long a caller may have to wait for a clear answer: two seconds, and what a busy machine takes to notice.
const ANSWER: Duration = Duration::from_millis(2_500);
/// How much memory may grow.
const GROWTH: u64 = 64 << 20;
/// What callers may be told while the store is away: both mean "try again later".
const RETRYABLE: [i64; 2] = [1_000_190, 1_000_120];

/// How the store is away.
#[derive(Debug, Clone, Copy)]
enum Away {
    /// As seen through a network that does this.
    Network(Fault),
    /// Its process is stopped, as by a host that has no time for it.
    Frozen,
}

struct Outage {
    site: Site,
    agents: Vec<Child>,
    sessions_closed: f64,
    memory: Vec<u64>,
}

impl Outage {
    async fn prepare(kind: StoreKind) -> Self {
        let site = Site::start_behind_a_proxy(kind).await.unwrap();
        let mut agents = Vec::new();
        for (n, id) in AGENTS.iter().enumerate() {
            agents.push(site.agent(id, &format!("10.2.1.{n}")).await.unwrap());
        }
        // What it takes to serve anything at all is taken before.
        for _ in 0..20 {
            site.api().run(AGENTS[0], "root", "#!/bin/sh\ntrue\n", 60).await;
        }
        let mut outage = Self {
            site,
            agents,
            sessions_closed: 0.0,
            memory: vec![],
        };
        outage.sessions_closed = outage.closed_sessions().await;
        outage.memory = outage.memory_now();
        outage
    }

    async fn closed_sessions(&self) -> f64 {
        let figures = Figures::of(self.site.task.as_ref().unwrap()).await.unwrap();
        assert!(figures.sum("gse_task_sessions") >= 0.0);
        figures.sum("gse_task_sessions_closed_total")
    }

    fn memory_now(&self) -> Vec<u64> {
        let servers = [&self.site.task, &self.site.api];
        servers.iter().map(|server| server.as_ref().unwrap().memory()).collect()
    }

    fn go_away(&self, away: Away) {
        match away {
            Away::Network(fault) => self.site.store_proxy.as_ref().unwrap().set(fault),
            Away::Frozen => self.site.store.last().unwrap().freeze(),
        }
    }

    fn come_back(&self, away: Away) {
        match away {
            Away::Network(_) => self.site.store_proxy.as_ref().unwrap().set(Fault::None),
            Away::Frozen => self.site.store.last().unwrap().go_on(),
        }
    }
}

/// `through`: whether calls may get through all the same.
async fn outage(kind: StoreKind, away: Away, seconds: u64, through: bool) {
    let before = Outage::prepare(kind).await;
    let site = &before.site;
    let marks = site.path().join("runs");
    // Under way when the store goes: ends in the middle of it.
    let running = site
        .api()
        .submit(&script_body(&AGENTS, "root", &counting(&marks, 3.0, 7), 120))
        .await;
    eventually("it runs everywhere", Duration::from_secs(20), || async {
        (runs_by_target(&marks).len() == AGENTS.len()).then_some(())
    })
    .await;
    before.go_away(away);

    let late = site.path().join("late");
    let body = script_body(&AGENTS, "root", &counting(&late, 0.0, 0), 60);
    let (front, node) = (site.api(), site.task_api());
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut accepted = Vec::new();
    let mut codes: BTreeMap<i64, u32> = BTreeMap::new();
    let mut slowest = Duration::ZERO;
    while Instant::now() < end {
        let calls = (0..8).map(|n| {
            let (api, body) = (if n % 2 == 0 { &front } else { &node }, &body);
            async move {
                let started = Instant::now();
                let answer = api.try_submit(body).await;
                (answer.expect("an answer, whatever the store does"), started.elapsed())
            }
        });
        for (answer, took) in futures::future::join_all(calls).await {
            slowest = slowest.max(took);
            match answer {
                Ok(task) => accepted.push(task),
                Err(code) => *codes.entry(code).or_default() += 1,
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!(
        "{kind:?} {away:?}: {} accepted, refused {codes:?}, slowest answer {slowest:?}",
        accepted.len()
    );
    assert!(slowest <= ANSWER, "an answer took {slowest:?}");
    assert!(codes.keys().all(|code| RETRYABLE.contains(code)), "{codes:?}");
    assert!(through || !codes.is_empty());
    // A poll is answered as well: with what is known, if slowly, or it is refused in time.
    let started = Instant::now();
    let known = front.try_rows(&running, &AGENTS).await;
    let took = started.elapsed();
    assert!(known.is_some() || took <= ANSWER, "a poll took {took:?}");

    before.come_back(away);
    // Everything heals by itself; what ended meanwhile had waited on its host.
    let healed = Instant::now();
    let rows = site
        .api()
        .finished_at_last(&running, &AGENTS, Duration::from_secs(60))
        .await;
    for row in &rows {
        assert_eq!(
            (row["script_exit_code"].as_i64(), row["screen"].as_str()),
            (Some(7), Some("begun\nend\n")),
            "{row}"
        );
    }
    // What was accepted is there and ends; what was refused is not run twice, and nothing is.
    for task in &accepted {
        site.api()
            .finished_at_last(task, &AGENTS, Duration::from_secs(90))
            .await;
    }
    let row = site.api().run(AGENTS[1], "root", "#!/bin/sh\necho after\n", 60).await;
    assert_eq!(row["screen"], "after\n");
    println!("{kind:?} {away:?}: healed after {:?}", healed.elapsed());
    for runs in [runs_by_target(&marks), runs_by_target(&late)] {
        assert!(runs.values().all(|n| *n == 1), "run twice: {runs:?}");
    }
    let started_late = runs_by_target(&late).len();
    assert!(
        started_late >= accepted.len() * AGENTS.len(),
        "{started_late} runs of {} accepted",
        accepted.len()
    );
    assert_eq!(before.closed_sessions().await, before.sessions_closed, "agents stay");
    for id in AGENTS {
        site.wait_state(id, 2).await;
    }
    let grown: Vec<u64> = before
        .memory_now()
        .iter()
        .zip(&before.memory)
        .map(|(now, then)| now.saturating_sub(*then))
        .collect();
    println!("{kind:?} {away:?}: memory grew by {grown:?} bytes");
    assert!(grown.iter().all(|grown| *grown < GROWTH), "{grown:?}");
    drop(before.agents);
}

const REFUSE: Away = Away::Network(Fault::Refuse);
const HANG: Away = Away::Network(Fault::Hang);
const VERY_SLOW: Away = Away::Network(Fault::Slow(Duration::from_millis(1_500)));
/// One trip there and back is in time, the two that a submit takes are not.
const TWO_TRIPS: Away = Away::Network(Fault::Slow(Duration::from_millis(550)));
const SLOW: Away = Away::Network(Fault::Slow(Duration::from_millis(150)));

// contract: reliability#F6
#[tokio::test]
async fn refuses() {
    outage(StoreKind::Embedded, REFUSE, 12, false).await;
}

// contract: reliability#F6
#[tokio::test]
async fn hangs() {
    outage(StoreKind::Embedded, Away::Frozen, 12, false).await;
}

// contract: reliability#F6
#[tokio::test]
async fn hangs_redis() {
    outage(StoreKind::Redis, HANG, 12, false).await;
}

// contract: reliability#F6
#[tokio::test]
async fn is_too_slow() {
    outage(StoreKind::Redis, VERY_SLOW, 12, false).await;
}

// contract: reliability#F6
#[tokio::test]
async fn is_too_slow_for_a_submit() {
    outage(StoreKind::Redis, TWO_TRIPS, 8, false).await;
}

// contract: reliability#F6
#[tokio::test]
async fn is_slow() {
    outage(StoreKind::Embedded, SLOW, 6, true).await;
}

// contract: reliability#F6
#[tokio::test]
#[ignore = "full tier: half a minute of each fault on each store"]
async fn half_a_minute_of_each() {
    for kind in [StoreKind::Embedded, StoreKind::Redis] {
        for (away, through) in [
            (REFUSE, false),
            (HANG, false),
            (Away::Frozen, false),
            (VERY_SLOW, false),
            (SLOW, true),
        ] {
            outage(kind, away, 30, through).await;
        }
    }
}
