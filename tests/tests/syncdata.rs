//! Host identities from a CMDB over real HTTP to files on hosts: real gse_syncdata, gse_task, agents and Redis. Each host sees a `/var/lib`
//! of its own, so that the usual path is the one that is looked at.
#![allow(clippy::unwrap_used)] // a test ends by panicking

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gse_tests::cmdb::{Cmdb, CmdbFault, SEARCH, WATCH, identity};
use gse_tests::files::push_body;
use gse_tests::metrics::Figures;
use gse_tests::process::binary;
use gse_tests::site::{APP, SECRET, SMALL_APP};
use gse_tests::{Api, Child, Site, StoreKind, eventually};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(20);
const SHOW: &str = "/gse/v1/hostid/show";
const PUT: &str = "/gse/v1/hostid/put";
const PUSH: &str = "/gse/v1/hostid/push";
/// An agent with an id of its own, and one of the older kind, which CMDB knows by its address.
const NEW: &str = "020000000242010a00002f17521298676503";
const OLD: &str = "02000000oldagent00000000000000000002";
const OLD_ADDRESS: &str = "10.7.0.2";

async fn site() -> Site {
    let mut site = Site::with_store(StoreKind::Redis).await.unwrap();
    site.task_sets.push("rpc.listen=127.0.0.1:0".into());
    site.start_task().await.unwrap();
    site
}

/// gse_api, which knows this gse_syncdata.
async fn with_api(site: &mut Site, sync: &Child) -> Api {
    site.api_sets
        .push(format!("upstreams.sync=[\"{}\"]", sync.address("internal")));
    site.start_api().await.unwrap();
    site.api()
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

async fn has(site: &Site, id: &str, content: &str) {
    let path = site.hostid(id);
    eventually(&format!("{id} has its identity: {content:.60}"), SOON, || async {
        (read(&path).as_deref() == Some(content)).then_some(())
    })
    .await;
}

/// Looks at a file as a plugin does, only more often: every state of it that there was.
struct Watcher {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<Vec<(i64, i64, String)>>>,
}

impl Watcher {
    fn of(path: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut seen: Vec<(i64, i64, String)> = vec![];
            while !until.load(Ordering::Relaxed) {
                if let (Ok(meta), Some(text)) = (path.metadata(), read(&path)) {
                    let now = (meta.mtime(), meta.mtime_nsec(), text);
                    // Replaced between the two looks: look again.
                    let same = path.metadata().is_ok_and(|after| after.ino() == meta.ino());
                    if same && seen.last() != Some(&now) {
                        seen.push(now);
                    }
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            seen
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    fn end(mut self) -> Vec<(i64, i64, String)> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

async fn pushes(sync: &Child, kind: &str) -> f64 {
    let figures = Figures::of(sync).await.unwrap();
    let wanted = format!("kind=\"{kind}\"");
    figures
        .lines("gse_syncdata_pushes_total")
        .filter(|line| line.contains(&wanted))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

async fn figure(sync: &Child, name: &str) -> f64 {
    Figures::of(sync).await.unwrap().sum(name)
}

async fn show(api: &Api, host: &str) -> Value {
    let reply = api.post(SHOW, &json!({ "host": host })).await;
    assert_eq!(reply["code"], 0, "{reply}");
    reply["data"].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_follow_what_cmdb_says_each_change_once() {
    let mut site = site().await;
    let cmdb = Cmdb::start(Duration::from_secs(1)).await.unwrap();
    let (one, two) = (
        identity(1, NEW, "10.7.0.1", "a"),
        identity(2, "", &format!("10.9.9.9,{OLD_ADDRESS}"), "b"),
    );
    cmdb.set_silently(1, &one);
    cmdb.set_silently(2, &two);
    cmdb.set_silently(3, &identity(3, "02000000notthere", "10.7.0.3", "c"));
    // Nobody can know whose this is.
    cmdb.set_silently(
        4,
        r#"{"bk_host_id":4,"bk_host_innerip":"10.7.0.4","bk_addressing":"dynamic"}"#,
    );
    let first = site.spawn_host(NEW, "10.7.0.1").unwrap();
    let mut second = site.spawn_host(OLD, OLD_ADDRESS).unwrap();
    let sync = site.syncdata("s1", &Site::from_cmdb(&cmdb)).await.unwrap();
    let api = with_api(&mut site, &sync).await;
    // contract: procmgr-agent-lifecycle#46, procmgr-agent-lifecycle#49
    has(&site, NEW, &one).await;
    has(&site, OLD, &two).await;
    let meta = site.hostid(NEW).metadata().unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o644, 0, 0));
    for call in cmdb.calls(SEARCH).iter().chain(&cmdb.calls(WATCH)) {
        let credentials: Value = serde_json::from_str(&call.headers["x-bkapi-authorization"]).unwrap();
        assert_eq!(
            credentials,
            json!({"bk_app_code": "bk_gse", "bk_app_secret": "hush", "bk_username": "admin"})
        );
        assert_eq!(call.headers["x-bk-tenant-id"], "system");
    }
    assert!(!sync.log().contains("hush"));

    // A change is one change on the host; the same again, or spelt otherwise, is none.
    let watcher = Watcher::of(site.hostid(NEW));
    let placed = eventually("both are counted", SOON, || async {
        Some(pushes(&sync, "placed").await).filter(|placed| *placed == 2.0)
    })
    .await;
    let changed = identity(1, NEW, "10.7.0.1", "changed");
    cmdb.set(1, &changed);
    has(&site, NEW, &changed).await;
    cmdb.set(1, &changed.replace("  ", " "));
    cmdb.set(1, &changed);
    cmdb.event("update", "{\"no\": \"host\"}");
    let last = identity(2, "", &format!("10.9.9.9,{OLD_ADDRESS}"), "b2");
    cmdb.set(2, &last);
    has(&site, OLD, &last).await;
    let states: Vec<String> = watcher.end().into_iter().map(|(_, _, text)| text).collect();
    assert_eq!(states, [one.clone(), changed.clone()]);
    eventually("the two changes are counted", SOON, || async {
        (pushes(&sync, "placed").await == placed + 2.0).then_some(())
    })
    .await;

    let view = show(&api, NEW).await;
    assert_eq!(
        (&view["known"], &view["agree"], &view["connected"]),
        (&json!(true), &json!(true), &json!(true)),
        "{view}"
    );
    assert_eq!(view["wanted"]["content"], changed);
    assert_eq!(
        (&view["pushed"]["path"], &view["pushed"]["agent"]),
        (&json!("/var/lib/gse/host/hostid"), &json!(NEW))
    );
    assert_eq!(view["bk_host_id"], 1);
    // By any of its names.
    for name in [OLD, "0:10.7.0.2", "0:10.9.9.9"] {
        assert_eq!(show(&api, name).await["bk_host_id"], 2, "{name}");
    }

    // A host that is down is not tried again and again: it waits for its agent.
    second.terminate(SOON).await.unwrap();
    site.wait_state(OLD, 6).await;
    let away = pushes(&sync, "away").await;
    let newest = identity(2, "", OLD_ADDRESS, "while it was away");
    cmdb.set(2, &newest);
    eventually("it is known to be away", SOON, || async {
        (pushes(&sync, "away").await > away).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(pushes(&sync, "away").await, away + 1.0);
    assert_eq!(pushes(&sync, "placed").await, placed + 2.0, "nothing was pushed twice");
    assert_eq!(read(&site.hostid(OLD)), Some(last));
    let view = show(&api, "0:10.7.0.2").await;
    assert_eq!(
        (&view["agree"], &view["connected"]),
        (&json!(false), &json!(false)),
        "{view}"
    );
    let again = site.spawn_host(OLD, OLD_ADDRESS).unwrap();
    has(&site, OLD, &newest).await;
    // One that comes for the first time.
    let third = site.spawn_host("02000000notthere", "10.7.0.3").unwrap();
    has(
        &site,
        "02000000notthere",
        &identity(3, "02000000notthere", "10.7.0.3", "c"),
    )
    .await;
    assert_eq!(show(&api, "nobody").await["known"], false);
    drop((first, again, third));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cmdb_that_fails_in_every_way_costs_time_and_nothing_else() {
    let site = site().await;
    let cmdb = Cmdb::start(Duration::from_secs(1)).await.unwrap();
    // More than one page; most of the hosts have no agent.
    for n in 1..=25 {
        cmdb.set_silently(
            n,
            &identity(n, &format!("02000000host{n:02}"), &format!("10.8.0.{n}"), "x"),
        );
    }
    cmdb.set_silently(13, &identity(13, NEW, "10.7.0.1", "first"));
    let agent = site.spawn_host(NEW, "10.7.0.1").unwrap();
    cmdb.fail(
        WATCH,
        &[
            CmdbFault::Status(502),
            CmdbFault::Broken("{\"code\":0,"),
            CmdbFault::Close,
        ],
    );
    cmdb.fail(
        SEARCH,
        &[
            CmdbFault::Status(500),
            CmdbFault::Broken("<html>"),
            CmdbFault::Slow(Duration::from_millis(1_500)),
            CmdbFault::Refuse(1_199_999),
            CmdbFault::Close,
            // Longer than a page may take.
            CmdbFault::Slow(Duration::from_secs(5)),
            CmdbFault::Broken("{\"code\":0,\"data\":{\"count\":9,\"info\":{}}}"),
        ],
    );
    let mut sets = Site::from_cmdb(&cmdb);
    sets.extend(
        [
            "cmdb.page=10",
            "cmdb.page_timeout_ms=2000",
            "cmdb.pages_at_once=3",
            "cmdb.full_interval_s=2",
        ]
        .map(String::from),
    );
    let sync = site.syncdata("s1", &sets).await.unwrap();
    has(&site, NEW, &identity(13, NEW, "10.7.0.1", "first")).await;
    eventually("a whole pass", SOON, || async {
        (figure(&sync, "gse_syncdata_hosts").await == 25.0 && cmdb.has_failed()).then_some(())
    })
    .await;

    // Hosts that CMDB has no more are forgotten, and the files stay.
    cmdb.remove_silently(25);
    eventually("one host less", SOON, || async {
        (figure(&sync, "gse_syncdata_hosts").await == 24.0).then_some(())
    })
    .await;
    // A cursor that has expired: what it would have told of is found.
    let cursors = figure(&sync, "gse_syncdata_cursors_lost_total").await;
    let missed = identity(13, NEW, "10.7.0.1", "missed");
    cmdb.set_silently(13, &missed);
    cmdb.expire_cursors();
    has(&site, NEW, &missed).await;
    eventually("the loss of a cursor is counted", SOON, || async {
        (figure(&sync, "gse_syncdata_cursors_lost_total").await > cursors).then_some(())
    })
    .await;
    // And the watch goes on.
    let next = identity(13, NEW, "10.7.0.1", "next");
    cmdb.set(13, &next);
    has(&site, NEW, &next).await;
    // A watch that says the same wrong thing again and again begins anew.
    cmdb.fail(WATCH, &vec![CmdbFault::Refuse(1_199_999); 6]);
    let after = identity(13, NEW, "10.7.0.1", "after");
    cmdb.set(13, &after);
    has(&site, NEW, &after).await;
    drop(agent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cmdb_is_asked_no_more_often_than_it_allows_and_from_where_it_was() {
    let site = site().await;
    let cmdb = Cmdb::start(Duration::from_millis(200)).await.unwrap();
    for n in 1..=60 {
        cmdb.set_silently(
            n,
            &identity(n, &format!("02000000host{n:02}"), &format!("10.8.0.{n}"), "x"),
        );
    }
    let mut sets = Site::from_cmdb(&cmdb);
    sets.extend(
        [
            "cmdb.page=2",
            "cmdb.pages_at_once=8",
            "cmdb.calls_per_second=20",
            "cmdb.burst=5",
        ]
        .map(String::from),
    );
    let mut sync = site.syncdata("s1", &sets).await.unwrap();
    eventually("all hosts", SOON, || async {
        (figure(&sync, "gse_syncdata_hosts").await == 60.0).then_some(())
    })
    .await;
    let mut times: Vec<Instant> = cmdb
        .calls(SEARCH)
        .iter()
        .chain(&cmdb.calls(WATCH))
        .map(|call| call.at)
        .collect();
    times.sort();
    assert!(times.len() > 30, "{}", times.len());
    for (n, time) in times.iter().enumerate() {
        let within = times[n..]
            .iter()
            .filter(|other| **other - *time <= Duration::from_secs(1))
            .count();
        assert!(within <= 5 + 20 + 2, "{within} calls within a second");
    }
    let starts: Vec<u64> = cmdb
        .calls(SEARCH)
        .iter()
        .filter_map(|call| call.body["page"]["start"].as_u64())
        .collect();
    assert!(cmdb.calls(SEARCH).iter().all(|call| call.body["page"]["limit"] == 2));
    assert!((0..30).all(|n| starts.contains(&(n * 2))), "{starts:?}");

    // The next life goes on at the cursor, without a pass over everything.
    eventually("the pass is noted", SOON, || async {
        (figure(&sync, "gse_syncdata_full_passes_total").await >= 1.0).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    sync.terminate(SOON).await.unwrap();
    let (before, watched) = (cmdb.calls(SEARCH).len(), cmdb.calls(WATCH).len());
    cmdb.set(61, &identity(61, "02000000host61", "10.8.0.61", "while nobody looked"));
    let sync = site.syncdata("s1", &sets).await.unwrap();
    eventually("the missed host", SOON, || async {
        (figure(&sync, "gse_syncdata_hosts").await == 61.0).then_some(())
    })
    .await;
    assert_eq!(cmdb.calls(SEARCH).len(), before);
    let cursor = &cmdb.calls(WATCH)[watched].body["bk_cursor"];
    assert!(cursor.as_str().is_some_and(|cursor| !cursor.is_empty()), "{cursor}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_instance_is_active_and_another_takes_over() {
    let site = site().await;
    let cmdb = Cmdb::start(Duration::from_secs(1)).await.unwrap();
    let one = identity(1, NEW, "10.7.0.1", "a");
    cmdb.set_silently(1, &one);
    let agent = site.spawn_host(NEW, "10.7.0.1").unwrap();
    let mut sets = Site::from_cmdb(&cmdb);
    sets.push("lease_ms=3000".into());
    let mut first = site.syncdata("s1", &sets).await.unwrap();
    has(&site, NEW, &one).await;
    let second = site.syncdata("s2", &sets).await.unwrap();
    let written = site.hostid(NEW).metadata().unwrap();
    assert_eq!(figure(&first, "gse_syncdata_active").await, 1.0);
    assert_eq!(figure(&second, "gse_syncdata_active").await, 0.0);
    first.kill_9();
    let died = Instant::now();
    let changed = identity(1, NEW, "10.7.0.1", "changed");
    eventually("the other one is active", SOON, || async {
        (figure(&second, "gse_syncdata_active").await == 1.0).then_some(())
    })
    .await;
    assert!(died.elapsed() < Duration::from_secs(10), "{:?}", died.elapsed());
    // What was in step stays as it is.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let after = site.hostid(NEW).metadata().unwrap();
    assert_eq!((after.ino(), after.mtime_nsec()), (written.ino(), written.mtime_nsec()));
    cmdb.set(1, &changed);
    has(&site, NEW, &changed).await;
    // One that stops hands over at once.
    let third = site.syncdata("s3", &sets).await.unwrap();
    let mut second = second;
    second.terminate(SOON).await.unwrap();
    let stopped = Instant::now();
    eventually("the third one is active", SOON, || async {
        (figure(&third, "gse_syncdata_active").await == 1.0).then_some(())
    })
    .await;
    assert!(
        stopped.elapsed() < Duration::from_millis(2_900),
        "{:?}",
        stopped.elapsed()
    );
    drop(agent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_is_shown_and_tried_again_and_a_new_installation_gets_the_file() {
    let mut site = site().await;
    let cmdb = Cmdb::start(Duration::from_secs(1)).await.unwrap();
    let one = identity(1, NEW, "10.7.0.1", "a");
    cmdb.set_silently(1, &one);
    let own = site.var_lib(NEW);
    std::fs::create_dir_all(own.join("gse")).unwrap();
    // Where the directory should be is a file.
    std::fs::write(own.join("gse/host"), "in the way").unwrap();
    let mut agent = site.spawn_host(NEW, "10.7.0.1").unwrap();
    let sync = site.syncdata("s1", &Site::from_cmdb(&cmdb)).await.unwrap();
    let api = with_api(&mut site, &sync).await;
    let failure = eventually("the failure is shown", SOON, || async {
        let view = show(&api, NEW).await;
        (view["failure"]["tries"].as_u64() >= Some(2)).then_some(view)
    })
    .await;
    assert_eq!(
        (&failure["agree"], &failure["pushed"]),
        (&json!(false), &Value::Null),
        "{failure}"
    );
    assert!(failure["failure"]["code"].as_i64() > Some(0), "{failure}");
    assert_eq!(figure(&sync, "gse_syncdata_hosts_failed").await, 1.0);
    std::fs::remove_file(own.join("gse/host")).unwrap();
    has(&site, NEW, &one).await;
    eventually("all is well", SOON, || async {
        let view = show(&api, NEW).await;
        (view["agree"] == true && view["failure"].is_null()).then_some(())
    })
    .await;

    // Installed anew: nothing is left of what was there, and CMDB says nothing new.
    agent.terminate(SOON).await.unwrap();
    std::fs::remove_dir_all(&own).unwrap();
    std::fs::remove_dir_all(site.path().join(format!("agent-{}", hex::encode(NEW)))).unwrap();
    let mut agent = site.spawn_host(NEW, "10.7.0.1").unwrap();
    has(&site, NEW, &one).await;
    // Only the file is gone, which nobody can see from afar: by hand.
    std::fs::remove_file(site.hostid(NEW)).unwrap();
    let reply = api.post(PUSH, &json!({"hosts": ["0:10.7.0.1"]})).await;
    assert_eq!(
        (&reply["code"], &reply["data"]["taken"]),
        (&json!(0), &json!(1)),
        "{reply}"
    );
    has(&site, NEW, &one).await;
    // Where CMDB is the source, nobody else is.
    let put = json!({"hosts": [{"bk_agent_id": NEW, "content": "mine"}]});
    assert_eq!(api.post(PUT, &put).await["code"], 1_000_106);
    agent.kill_9();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sites_without_cmdb_use_calls_or_a_directory() {
    let mut site = site().await;
    let agent = site.spawn_host(NEW, "10.7.0.1").unwrap();
    let mut sync = site.syncdata("s1", &["source=push".into()]).await.unwrap();
    let api = with_api(&mut site, &sync).await;
    let put = |content: &str| json!({"hosts": [{"bk_agent_id": "0:10.7.0.1", "content": content}]});
    let text = "any bytes \u{0} é\r\n";
    let reply = api.post(PUT, &put(text)).await;
    assert_eq!(
        (&reply["code"], &reply["data"]["taken"]),
        (&json!(0), &json!(1)),
        "{reply}"
    );
    has(&site, NEW, text).await;
    assert_eq!(show(&api, NEW).await["wanted"]["content"], text);
    // contract: procmgr-agent-lifecycle#48
    let long = "x".repeat(102_400);
    api.post(PUT, &put(&long)).await;
    has(&site, NEW, &long).await;
    for (body, word) in [
        (put(&"x".repeat(102_401)), "102400"),
        (json!({"hosts": []}), "1 to 1000"),
        (
            json!({"hosts": [{"bk_agent_id": "a b", "content": ""}]}),
            "hosts[0].bk_agent_id",
        ),
        (json!({"hosts": 1}), "hosts"),
    ] {
        let reply = api.post(PUT, &body).await;
        assert_eq!(reply["code"], 1_000_106, "{reply}");
        assert!(reply["message"].as_str().unwrap().contains(word), "{reply}");
    }
    let small = Api::new(&api.address, SMALL_APP, SECRET);
    for (path, body) in [
        (PUT, put("x")),
        (PUSH, json!({"hosts": [NEW]})),
        (SHOW, json!({"host": NEW})),
    ] {
        assert_eq!(small.post(path, &body).await["code"], 1_000_903, "{path}");
    }
    assert_eq!(read(&site.hostid(NEW)), Some(long));

    sync.terminate(SOON).await.unwrap();
    let dir = site.path().join("identities");
    std::fs::create_dir(&dir).unwrap();
    let write = |name: &str, text: &str| {
        let staged = dir.join(".staged");
        std::fs::write(&staged, text).unwrap();
        std::fs::rename(&staged, dir.join(name)).unwrap();
    };
    write(&format!("{NEW}.json"), "from a file");
    let sets = [
        "source=directory".into(),
        format!("directory.path={}", dir.display()),
        "directory.look_ms=100".into(),
    ];
    let sync = site.syncdata("s1", &sets).await.unwrap();
    has(&site, NEW, "from a file").await;
    // What calls had said is forgotten with its source.
    eventually("one host", SOON, || async {
        (figure(&sync, "gse_syncdata_hosts").await == 1.0).then_some(())
    })
    .await;
    write(&format!("{NEW}.json"), "from another file");
    has(&site, NEW, "from another file").await;
    std::fs::remove_file(dir.join(format!("{NEW}.json"))).unwrap();
    eventually("no host", SOON, || async {
        (figure(&sync, "gse_syncdata_hosts").await == 0.0).then_some(())
    })
    .await;
    assert_eq!(read(&site.hostid(NEW)).as_deref(), Some("from another file"));
    drop(agent);
}

/// What `gse hostid` prints, and whether it says that all is well.
async fn gse_hostid(api: &Api, words: &[&str]) -> (bool, String) {
    let mut command = tokio::process::Command::new(binary("gse").unwrap());
    command
        .arg("hostid")
        .args(words)
        .env("GSE_DATA", "/nowhere")
        .env("GSE_API", format!("http://{}", api.address))
        .env("GSE_APP_CODE", APP)
        .env("GSE_APP_SECRET", SECRET)
        .env_remove("GSE_CA")
        .kill_on_drop(true);
    let done = tokio::time::timeout(SOON, command.output()).await.unwrap().unwrap();
    let text = [done.stdout, done.stderr].concat();
    (done.status.success(), String::from_utf8(text).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_sees_whether_a_host_is_in_step() {
    let mut site = site().await;
    let mut agent = site.spawn_host(NEW, "10.7.0.1").unwrap();
    let sync = site.syncdata("s1", &["source=push".into()]).await.unwrap();
    let api = with_api(&mut site, &sync).await;
    let (good, text) = gse_hostid(&api, &[NEW]).await;
    assert!(
        !good && text.contains("no identity of") && text.contains("calls"),
        "{text}"
    );
    let file = site.path().join("identity.json");
    std::fs::write(&file, "{\"bk_host_id\":9}\n").unwrap();
    let file = file.to_str().unwrap();
    let (good, text) = gse_hostid(&api, &[NEW, "--set", file]).await;
    assert!(good, "{text}");
    has(&site, NEW, "{\"bk_host_id\":9}\n").await;
    let text = eventually("it is in step", SOON, || async {
        let (good, text) = gse_hostid(&api, &[NEW]).await;
        (good && text.contains("in step: the host has")).then_some(text)
    })
    .await;
    assert!(
        text.contains("/var/lib/gse/host/hostid by") && text.contains("{\"bk_host_id\":9}"),
        "{text}"
    );
    std::fs::remove_file(site.hostid(NEW)).unwrap();
    assert!(gse_hostid(&api, &[NEW, "--push"]).await.0);
    has(&site, NEW, "{\"bk_host_id\":9}\n").await;
    agent.terminate(SOON).await.unwrap();
    site.wait_state(NEW, 6).await;
    std::fs::write(file, "{}").unwrap();
    assert!(gse_hostid(&api, &[NEW, "--set", file]).await.0);
    eventually("it waits", SOON, || async {
        let (_, text) = gse_hostid(&api, &[NEW]).await;
        (text.contains("waits for its agent") && text.ends_with("\n{}\n")).then_some(())
    })
    .await;
    let (good, json) = gse_hostid(&api, &[NEW, "-o", "json"]).await;
    let view: Value = serde_json::from_str(&json).unwrap();
    assert!(
        good && view["agree"] == false && view["wanted"]["content"] == "{}",
        "{json}"
    );
    assert!(!gse_hostid(&api, &["02000000nobody", "--push"]).await.0);
}

/// CMDB's event_server as it pushes by itself; no gse_syncdata is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cmdb_that_pushes_by_itself_works_unchanged() {
    let mut site = site().await;
    site.start_btsvr(1).await.unwrap();
    site.start_api().await.unwrap();
    let api = site.api();
    let agent = site.spawn_host(NEW, "10.7.0.1").unwrap();
    site.wait_state(NEW, 2).await;
    let ids = json!([NEW, "0:10.7.0.9"]);
    // contract: procmgr-agent-lifecycle#27, procmgr-agent-lifecycle#28, procmgr-agent-lifecycle#29
    let states = api
        .post("/api/v2/cluster/list_agent_state", &json!({"agent_id_list": ids}))
        .await;
    assert_eq!(states["code"], 0, "{states}");
    let on: Vec<&str> = states["data"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|state| state["status_code"] == 2)
        .map(|state| state["bk_agent_id"].as_str().unwrap())
        .collect();
    assert_eq!(on, [NEW]);
    let content = identity(1, NEW, "10.7.0.1", "pushed by CMDB");
    let mut body = push_body(&[NEW], "/var/lib/gse/host", "hostid", &content);
    body["timeout_seconds"] = json!(1000);
    assert_eq!(body["tasks"][0]["right"], 644);
    // contract: procmgr-agent-lifecycle#46, procmgr-agent-lifecycle#47, procmgr-agent-lifecycle#49, v2-http-task#44
    let pushed = api.post("/api/v2/task/async_push_file", &body).await;
    assert_eq!(pushed["code"], 0, "{pushed}");
    let task = pushed["data"]["result"]["task_id"].as_str().unwrap();
    let query = json!({"task_id": task, "agent_id_list": [NEW]});
    let rows = eventually("the row is over", SOON, || async {
        let reply = api.post("/api/v2/task/async/get_transfer_file_result", &query).await;
        assert_eq!(reply["code"], 0, "{reply}");
        let rows = reply["data"]["result"].as_array().unwrap().clone();
        assert_eq!(rows.len(), 1, "{rows:?}");
        assert_eq!(rows[0]["content"]["dest_agent_id"], NEW);
        (rows[0]["error_code"] != 115).then_some(rows)
    })
    .await;
    assert_eq!(rows[0]["error_code"], 0, "{rows:?}");
    let meta = site.hostid(NEW).metadata().unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o644, 0));
    assert_eq!(read(&site.hostid(NEW)), Some(content));
    drop(agent);
}
