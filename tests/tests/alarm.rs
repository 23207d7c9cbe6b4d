//! Lost agents, from the heartbeat that is missing to the record in gse_data's file: real agents, gse_task, Redis, gse_alarm, gse_data.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::Duration;

use gse_proto::alarm::LostHost;
use gse_proto::keys;
use gse_proto::prost::Message;
use gse_proto::state::AgentRecord;
use gse_tests::metrics::Figures;
use gse_tests::process::binary;
use gse_tests::{Child, Site, StoreKind, eventually};
use serde_json::{Value, json};

const NEW: &str = "02000000005254005ae3091720612442569e";
const OLD: &str = "0:10.9.0.2";
const STOPPED: &str = "02000000005254005ae309172061244257aa";
const REMOVED: &str = "02000000005254005ae309172061244258bb";
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two alarms about a host.
const REPEAT: u64 = 2;

/// Times short enough for a test; six missed heartbeats of a second, because the machine may be busy.
fn short() -> Vec<String> {
    let sets = [
        "heartbeat_interval_ms=1000",
        "missed_heartbeats=6",
        "look_ms=200",
        "lease_ms=2000",
        "stop_grace_s=12",
        "hold.stall_ms=2500",
        "hold.most_ms=40000",
    ];
    let mut sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    sets.push(format!("repeat_ms={}", REPEAT * 1000));
    sets
}

/// A site with agents, and a gse_data that writes everything to files.
struct World {
    site: Site,
    data: Child,
    agents: BTreeMap<String, Child>,
}

impl World {
    async fn start(agents: &[(&str, &str)]) -> Self {
        let mut site = Site::with_store(StoreKind::Redis).await.unwrap();
        site.task_sets.push("peers.lease_ms=1000".into());
        site.task_sets.push("session.presence_flush_ms=100".into());
        site.start_task().await.unwrap();
        site.start_api().await.unwrap();
        let sets = [
            "rpc.listen=127.0.0.1:0".to_owned(),
            format!("default_sink=file:{}", site.path().join("records").display()),
        ];
        let data = site.data("one", &sets).await.unwrap();
        let mut running = BTreeMap::new();
        for (id, address) in agents {
            running.insert((*id).to_owned(), site.agent(id, address).await.unwrap());
        }
        Self {
            site,
            data,
            agents: running,
        }
    }

    async fn alarm(&self, name: &str) -> Child {
        self.site.alarm(name, &[&self.data], &short()).await.unwrap()
    }

    /// Every alarm so far, as it stands in the file of data id 1000.
    fn records(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(self.site.path().join("records/1000.log")).unwrap_or_default();
        let whole = text.rsplit_once('\n').map(|(whole, _)| whole).unwrap_or_default();
        whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The times of the alarms about a host, seconds.
    fn about(&self, id: &str) -> Vec<i64> {
        let all = self.records();
        let about = all.iter().filter(|record| hosts(record).contains(id));
        about
            .map(|record| seconds(record["utctime2"].as_str().unwrap()))
            .collect()
    }

    async fn until_about(&self, id: &str, count: usize) -> Vec<i64> {
        eventually("alarms", PATIENCE, || async {
            Some(self.about(id)).filter(|times| times.len() >= count)
        })
        .await
    }
}

/// The hosts that a record names.
fn hosts(record: &Value) -> BTreeSet<String> {
    let hosts = record["value"][0]["extra"]["host"].as_array().unwrap();
    hosts
        .iter()
        .map(|host| host["agent_id"].as_str().unwrap().to_owned())
        .collect()
}

/// `YYYY-MM-DD hh:mm:ss` of UTC as Unix seconds; panics on any other form.
fn seconds(text: &str) -> i64 {
    let digits = |from: usize, to: usize| text[from..to].parse::<i64>().unwrap();
    assert_eq!(text.len(), 19, "{text}");
    assert!(
        [(4, '-'), (7, '-'), (10, ' '), (13, ':'), (16, ':')]
            .iter()
            .all(|(at, sign)| text[*at..].starts_with(*sign)),
        "{text}"
    );
    // Days by the civil calendar.
    let (year, month, day) = (digits(0, 4), digits(5, 7), digits(8, 10));
    let (year, month) = if month <= 2 {
        (year - 1, month + 9)
    } else {
        (year, month - 3)
    };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1 - 719_468;
    days * 86_400 + digits(11, 13) * 3_600 + digits(14, 16) * 60 + digits(17, 19)
}

fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    i64::try_from(since.unwrap().as_secs()).unwrap()
}

/// What monitoring and its transfer read: they index these keys without asking.
fn check_form(record: &Value) {
    for key in ["server", "time", "utctime", "utctime2"] {
        assert!(record[key].is_string(), "{key}: {record}");
    }
    assert!(record["timezone"].is_i64() && record["isdst"].is_i64(), "{record}");
    let values = record["value"].as_array().unwrap();
    assert_eq!(values.len(), 1, "{record}");
    let event = &values[0];
    assert_eq!(event["event_title"], "", "{record}");
    assert_eq!(event["event_type"], "gse_basic_alarm_type", "{record}");
    assert!(event["event_raw_id"].is_u64(), "{record}");
    assert_eq!(event["event_time"], record["time"], "{record}");
    assert_eq!(record["time"], record["utctime"], "{record}");
    let extra = &event["extra"];
    assert_eq!(extra["type"].as_i64(), Some(2), "{record}");
    let hosts = extra["host"].as_array().unwrap();
    assert_eq!(extra["count"].as_u64(), Some(hosts.len() as u64), "{record}");
    assert!(!hosts.is_empty(), "{record}");
    for host in hosts {
        assert!(host["bizid"].is_i64() && host["cloudid"].is_i64(), "{record}");
        match host["agent_id"].as_str().unwrap() {
            // An id of the first generation names the area and the address.
            id if id.contains(':') => {
                assert_eq!(
                    id,
                    format!("{}:{}", host["cloudid"], host["ip"].as_str().unwrap()),
                    "{record}"
                );
            }
            id => assert!(!id.is_empty() && host.get("ip").is_none(), "{record}"),
        }
    }
    // Local and UTC are the same instant.
    let offset = seconds(record["time"].as_str().unwrap()) - seconds(record["utctime2"].as_str().unwrap());
    let zone = (record["timezone"].as_i64().unwrap() + record["isdst"].as_i64().unwrap()) * 3_600;
    assert!((offset - zone).abs() < 3_600, "{record}");
}

/// What the operators' list says is lost.
async fn lost(site: &Site) -> BTreeSet<String> {
    let listed = site.api().post("/gse/v1/agents/list", &json!({"lost": true})).await;
    assert_eq!(listed["code"], 0, "{listed}");
    assert!(
        listed["data"]["watch"]["looked_ago_s"].as_u64().unwrap() < 30,
        "{listed}"
    );
    let rows = listed["data"]["agents"].as_array().unwrap();
    assert!(rows.iter().all(|row| row["alarms"].as_u64().unwrap() > 0), "{listed}");
    rows.iter()
        .map(|row| row["bk_agent_id"].as_str().unwrap().to_owned())
        .collect()
}

// contract: data-plane#31, data-plane#32, data-plane#33, data-plane#34, data-plane#35, procmgr-agent-lifecycle#52
#[tokio::test(flavor = "multi_thread")]
async fn alarms_while_an_agent_is_down_and_none_before_or_after() {
    let mut world = World::start(&[
        (NEW, "10.9.0.1"),
        (OLD, "10.9.0.2"),
        (STOPPED, "10.9.0.3"),
        (REMOVED, "10.9.0.4"),
    ])
    .await;
    let alarm = world.alarm("one").await;

    // One dies, one of the old kind dies, one is stopped, one is removed.
    let leaving = world
        .site
        .path()
        .join(format!("agent-{}/leaving", hex::encode(REMOVED)));
    std::fs::write(leaving, "uninstall\n").unwrap();
    let began = now();
    for id in [NEW, OLD] {
        world.agents.get_mut(id).unwrap().kill_9();
    }
    for id in [STOPPED, REMOVED] {
        let stopped = world.agents.get_mut(id).unwrap().terminate(PATIENCE).await;
        assert!(stopped.unwrap().success());
    }
    let stopped_at = now();
    world.until_about(NEW, 4).await;
    world.until_about(OLD, 4).await;
    for record in world.records() {
        check_form(&record);
    }
    let times = world.about(NEW);
    assert!(times[0] - began >= 5, "before it was overdue: {began} {times:?}");
    assert!((times[0] - now()).abs() < 120, "not the time of sending: {times:?}");
    for two in times.windows(2) {
        let gap = two[1] - two[0];
        assert!((REPEAT as i64 - 1..REPEAT as i64 + 15).contains(&gap), "{times:?}");
    }
    // Overdue, but stopped on purpose: not for a while.
    let first = world.until_about(STOPPED, 2).await[0];
    assert!(
        first - stopped_at >= 10,
        "within the time it has to come back: {first} {stopped_at}"
    );
    let listed = lost(&world.site).await;
    assert_eq!(listed, BTreeSet::from([NEW, OLD, STOPPED].map(str::to_owned)));
    let figures = Figures::of(&alarm).await.unwrap();
    assert_eq!(figures.sum("gse_alarm_overdue"), 3.0);
    assert!(figures.sum("gse_alarm_alarms_sent_total") >= 10.0);

    // It returns: silence about it, while those about the other go on.
    let back = world.site.agent(NEW, "10.9.0.1").await.unwrap();
    eventually("the return is seen", PATIENCE, || async {
        let figures = Figures::of(&alarm).await.unwrap();
        (figures.sum("gse_alarm_returned_total") >= 1.0).then_some(())
    })
    .await;
    let (about_it, others) = (world.about(NEW).len(), world.about(OLD).len());
    world.until_about(OLD, others + 3).await;
    assert_eq!(world.about(NEW).len(), about_it, "an alarm after it was back");
    assert!(world.about(REMOVED).is_empty(), "it was uninstalled");
    assert!(!lost(&world.site).await.contains(NEW));
    drop(back);
}

#[tokio::test(flavor = "multi_thread")]
async fn our_own_faults_raise_no_alarms() {
    let places = ["10.9.1.1", "10.9.1.2", "10.9.1.3"];
    let ids: Vec<String> = (0..3)
        .map(|n| format!("02000000005254005ae30917206124426{n:03}"))
        .collect();
    let agents: Vec<(&str, &str)> = ids.iter().map(String::as_str).zip(places).collect();
    let mut world = World::start(&agents).await;
    let alarm = world.alarm("one").await;
    let held = async |why: &str| {
        let figures = Figures::of(&alarm).await.unwrap();
        let mine = |line: &&str| line.contains(&format!("why=\"{why}\""));
        let lines: Vec<String> = figures
            .lines("gse_alarm_held_back_total")
            .filter(mine)
            .map(str::to_owned)
            .collect();
        lines
            .iter()
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum::<f64>()
    };
    let looks = async || Figures::of(&alarm).await.unwrap().sum("gse_alarm_looks_total");
    let begun = looks().await;
    eventually("looks", PATIENCE, || async {
        (looks().await > begun + 30.0).then_some(())
    })
    .await;

    // gse_task stands still for longer than a host may be silent.
    world.site.the_task().unwrap().freeze();
    eventually("all are held back", PATIENCE, || async {
        (held("task").await + held("start").await + held("mass").await >= 3.0).then_some(())
    })
    .await;
    world.site.the_task().unwrap().go_on();
    eventually("nobody is held back any more", PATIENCE, || async {
        (Figures::of(&alarm).await.unwrap().sum("gse_alarm_overdue") == 0.0).then_some(())
    })
    .await;
    assert_eq!(world.records(), Vec::<Value>::new());
    let log = alarm.log();
    assert!(
        log.contains("alarms are held back") && log.contains("no longer held back"),
        "{log}"
    );

    // The store is killed, and is back after longer than that.
    let url = world.site.server_store_url();
    let (password, port) = url
        .strip_prefix("redis://:")
        .unwrap()
        .rsplit_once("@127.0.0.1:")
        .unwrap();
    world.site.store[0].kill_9();
    tokio::time::sleep(Duration::from_secs(8)).await;
    let mut command = Command::new("redis-server");
    command
        .args([
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "yes",
            "--port",
            port,
        ])
        .args(["--requirepass", password, "--dir"])
        .arg(world.site.path().join("redis"));
    let redis = Child::spawn("redis", command, &world.site.path().join("redis.log")).unwrap();
    world.site.store.push(redis);
    let failed = looks().await;
    eventually("it looks again", PATIENCE, || async {
        (looks().await > failed + 35.0).then_some(())
    })
    .await;
    assert!(alarm.log().contains("alarms wait for the store"), "{}", alarm.log());
    // gse_alarm itself stands still.
    alarm.freeze();
    tokio::time::sleep(Duration::from_secs(7)).await;
    alarm.go_on();
    let after = looks().await;
    eventually("it looks again", PATIENCE, || async {
        (looks().await > after + 35.0).then_some(())
    })
    .await;
    assert_eq!(world.records(), Vec::<Value>::new());

    // Who is really lost is still found.
    world.agents.values_mut().next().unwrap().kill_9();
    let id = world.agents.keys().next().unwrap().clone();
    world.until_about(&id, 2).await;
    assert!(
        world.records().iter().all(|record| hosts(record).len() == 1),
        "{:?}",
        world.records()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn another_instance_takes_over() {
    let mut world = World::start(&[(NEW, "10.9.2.1"), (STOPPED, "10.9.2.2")]).await;
    let mut first = world.alarm("one").await;
    eventually("one is active", PATIENCE, || async {
        (Figures::of(&first).await.unwrap().sum("gse_alarm_active") == 1.0).then_some(())
    })
    .await;
    let second = world.alarm("two").await;
    world.agents.get_mut(NEW).unwrap().kill_9();
    world.until_about(NEW, 3).await;
    assert_eq!(Figures::of(&second).await.unwrap().sum("gse_alarm_active"), 0.0);
    assert_eq!(
        Figures::of(&second).await.unwrap().sum("gse_alarm_alarms_sent_total"),
        0.0
    );

    first.kill_9();
    let killed = now();
    let before = world.about(NEW).len();
    let times = world.until_about(NEW, before + 3).await;
    assert_eq!(Figures::of(&second).await.unwrap().sum("gse_alarm_active"), 1.0);
    let next = times[before];
    assert!(next - killed <= 10, "took over after {} s", next - killed);
    let twice = times
        .windows(2)
        .filter(|two| two[1] - two[0] < REPEAT as i64 - 1)
        .count();
    assert!(twice <= 1, "{times:?}");

    // gse_data is away: alarms come when it is back, about the present.
    let place = world.data.address("rpc").to_owned();
    world.data.kill_9();
    eventually("nobody takes alarms", PATIENCE, || async {
        (Figures::of(&second).await.unwrap().sum("gse_alarm_send_failures_total") >= 1.0).then_some(())
    })
    .await;
    let before = world.about(NEW).len();
    let sets = [
        format!("rpc.listen={place}"),
        format!("default_sink=file:{}", world.site.path().join("records").display()),
    ];
    world.data = world.site.data("one", &sets).await.unwrap();
    let started = now();
    let times = world.until_about(NEW, before + 2).await;
    assert!(times[before] >= started - 15, "an old alarm: {times:?} {started}");
    assert!(world.about(STOPPED).is_empty());
}

#[test]
fn the_programs_say_what_they_need() {
    let output = Command::new(binary("gse_alarm").unwrap())
        .arg("--check")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success());
    assert!(text.contains("data.servers") && text.contains("data.tls"), "{text}");
}

/// What gse_task would write for a fleet: records once, signs of life again and again, the renewals of its lease.
struct Fleet {
    store: redis::aio::MultiplexedConnection,
    agents: usize,
    beat_ms: u64,
}

fn millis() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    u64::try_from(since.unwrap().as_millis()).unwrap()
}

impl Fleet {
    fn id(n: usize) -> String {
        format!("0200000000525400{n:020}")
    }

    async fn records(&mut self) {
        for first in (0..self.agents).step_by(5_000) {
            let mut pipe = redis::pipe();
            for n in first..(first + 5_000).min(self.agents) {
                let id = Self::id(n);
                let record = AgentRecord {
                    agent_id: id.clone(),
                    node_id: "fleet".into(),
                    addresses: vec![format!("10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255)],
                    ..AgentRecord::default()
                };
                let key = keys::agent_info(keys::agent_shard(&id));
                pipe.hset(key, id, record.encode_to_vec()).ignore();
            }
            pipe.exec_async(&mut self.store).await.unwrap();
        }
    }

    /// The agents whose turn it is in part `part` of `parts` of an interval, but for those below `dead`.
    async fn beat(&mut self, part: usize, parts: usize, dead: usize) {
        let now = millis();
        let mut shards: BTreeMap<u16, Vec<(u64, String)>> = BTreeMap::new();
        for n in (part..self.agents).step_by(parts).filter(|n| *n >= dead) {
            let id = Self::id(n);
            shards.entry(keys::agent_shard(&id)).or_default().push((now, id));
        }
        let mut pipe = redis::pipe();
        for (shard, members) in shards {
            pipe.zadd_multiple(keys::agent_seen(shard), &members).ignore();
        }
        pipe.zadd(keys::nodes(), "fleet", millis()).ignore();
        pipe.exec_async(&mut self.store).await.unwrap();
    }

    /// Beats for so long.
    async fn go_on(&mut self, time: Duration, dead: usize) {
        const PARTS: usize = 10;
        let began = std::time::Instant::now();
        let mut part = 0;
        while began.elapsed() < time {
            let started = std::time::Instant::now();
            self.beat(part % PARTS, PARTS, dead).await;
            part += 1;
            let rest = Duration::from_millis(self.beat_ms / PARTS as u64).saturating_sub(started.elapsed());
            tokio::time::sleep(rest).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "full tier: 100,000 agents, half a minute"]
async fn five_thousand_of_a_hundred_thousand_stop_together() {
    const AGENTS: usize = 100_000;
    const DEAD: usize = 5_000;
    const BEAT_MS: u64 = 5_000;
    let site = Site::with_store(StoreKind::Redis).await.unwrap();
    let sets = [
        "rpc.listen=127.0.0.1:0".to_owned(),
        format!("default_sink=file:{}", site.path().join("records").display()),
    ];
    let data = site.data("one", &sets).await.unwrap();
    let mut fleet = Fleet {
        store: site.store_client().await.unwrap(),
        agents: AGENTS,
        beat_ms: BEAT_MS,
    };
    fleet.store.set_response_timeout(PATIENCE);
    fleet.records().await;
    fleet.beat(0, 1, 0).await;
    let sets = [
        format!("heartbeat_interval_ms={BEAT_MS}"),
        "hold.stall_ms=9000".to_owned(),
    ];
    let alarm = site.alarm("one", &[&data], &sets).await.unwrap();
    // Until it has looked for long enough to believe what it sees.
    fleet.go_on(Duration::from_millis(4 * BEAT_MS), 0).await;
    let before = alarm.memory();
    assert_eq!(Figures::of(&alarm).await.unwrap().sum("gse_alarm_overdue"), 0.0);

    fleet.go_on(Duration::from_millis(5 * BEAT_MS), DEAD).await;
    let figures = Figures::of(&alarm).await.unwrap();
    assert_eq!(figures.sum("gse_alarm_overdue"), DEAD as f64);
    let kept: BTreeMap<String, Vec<u8>> = redis::cmd("HGETALL")
        .arg(keys::alarm_lost())
        .query_async(&mut fleet.store)
        .await
        .unwrap();
    assert_eq!(kept.len(), DEAD);
    let lags = kept.values().map(|value| {
        let host = LostHost::decode(&value[..]).unwrap();
        host.first_ms.saturating_sub(host.seen_ms + 3 * BEAT_MS)
    });
    let mut lags: Vec<u64> = lags.collect();
    lags.sort_unstable();
    let text = std::fs::read_to_string(site.path().join("records/1000.log")).unwrap();
    let named: BTreeSet<String> = text
        .lines()
        .flat_map(|line| hosts(&serde_json::from_str(line).unwrap()))
        .collect();
    assert_eq!(named.len(), DEAD, "each of them, and nobody else");
    println!(
        "found after they were overdue: half within {} ms, all within {} ms; memory {} MiB before, {} MiB after; {} records; a look takes {:.0} ms",
        lags[DEAD / 2],
        lags[DEAD - 1],
        before >> 20,
        alarm.memory() >> 20,
        text.lines().count(),
        figures.sum("gse_alarm_look_seconds") * 1000.0
    );
    assert!(lags[DEAD - 1] <= 2_000, "the last after {} ms", lags[DEAD - 1]);
    assert!(alarm.memory() < 100 << 20, "{} MiB", alarm.memory() >> 20);
}
