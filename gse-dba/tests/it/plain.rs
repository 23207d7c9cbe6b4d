//! Groups that are plain lists of addresses, without Sentinel: how they are put together, what is never thrown away, and how an operator changes the primary.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gse_dba::config::Config;

use crate::rig::{Ours, Raw, Redis, Value, pause, wait_for};
use crate::sharded::Ledger;
use crate::site::{SAFE, Site, sharded, sharded_list};

fn json(v: &Value) -> serde_json::Value {
    match v {
        Value::Bulk(b) => serde_json::from_slice(b).unwrap(),
        other => panic!("no answer: {other:?}"),
    }
}

fn status(c: &mut Raw) -> serde_json::Value {
    json(&c.say("DBA STATUS"))
}

fn role(s: &Redis) -> String {
    s.client().say("ROLE").items()[0].text()
}

fn primary_of(c: &mut Raw) -> Option<String> {
    status(c)["groups"][0]["primary"].as_str().map(str::to_owned)
}

/// Waits until the group takes writes with all its copies.
fn wait_whole(c: &mut Raw, copies: u64) {
    wait_for("the group to be whole", || {
        let g = status(c)["groups"][0].clone();
        g["state"] == "ok" && g["copies"] == copies
    });
}

/// Waits until all servers have the same.
fn wait_level(site: &Site) {
    wait_for("all servers to have the same", || {
        let mut all: Vec<String> = site.groups[0]
            .servers
            .iter()
            .map(|s| {
                let info = s.client().say("INFO replication").text();
                let key = if info.contains("role:master") {
                    "master_repl_offset:"
                } else if info.contains("master_link_status:up") {
                    "slave_repl_offset:"
                } else {
                    return "down".to_owned();
                };
                info.lines()
                    .find_map(|l| l.strip_prefix(key))
                    .unwrap_or_default()
                    .to_owned()
            })
            .collect();
        all.dedup();
        all.len() == 1 && all[0] != "down"
    });
}

/// Writers that go on until they are told to stop, and the longest that any of them had to wait.
struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<(Ledger, Duration)>>,
}

impl Writers {
    fn start(all: &[&Ours], each: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for (o, ours) in all.iter().enumerate() {
            for t in 0..each {
                let (mut c, stop) = (ours.client(), stop.clone());
                threads.push(std::thread::spawn(move || {
                    let (mut ledger, mut n, mut longest) = (Ledger::new(), 0, Duration::ZERO);
                    while !stop.load(Ordering::Relaxed) {
                        n += 1;
                        for k in 0..10 {
                            let began = Instant::now();
                            ledger.write(&mut c, &format!("w{o}:{t}:{k}"), n);
                            longest = longest.max(began.elapsed());
                        }
                    }
                    (ledger, longest)
                }));
            }
        }
        Self { stop, threads }
    }

    /// Ends them; what went wrong, the longest wait, and how much was acknowledged. Everything acknowledged is there.
    fn end(self, c: &mut Raw) -> (Vec<String>, Duration, usize) {
        self.stop.store(true, Ordering::Relaxed);
        let (mut errors, mut longest, mut count) = (Vec::new(), Duration::ZERO, 0);
        for t in self.threads {
            let (mut ledger, wait) = t.join().unwrap();
            ledger.check(c);
            errors.append(&mut ledger.errors);
            longest = longest.max(wait);
            count += ledger.acknowledged.values().sum::<u64>() as usize;
        }
        (errors, longest, count)
    }
}

fn quick(site: &Site) -> Config {
    let mut config = sharded_list(site);
    config.sharded.hold_ms = 800;
    config
}

// contract: redis-proxy#15
#[test]
fn empty_servers_become_a_group_and_all_agree_on_its_primary() {
    let site = Site::strangers(1, 3);
    let (one, mut two) = (sharded_list(&site), sharded_list(&site));
    two.sharded.groups[0].servers.reverse();
    let second = std::thread::spawn(move || Ours::start(two));
    let (a, b) = (Ours::start(one), second.join().unwrap());
    let (mut c, mut d) = (a.client(), b.client());
    wait_whole(&mut c, 2);
    wait_whole(&mut d, 2);
    assert_eq!(primary_of(&mut c), primary_of(&mut d));
    for i in 0..50 {
        assert_eq!(c.call(&["SET", &format!("k{i}"), "v"]), Value::ok());
    }
    assert_eq!(
        d.say("DBSIZE"),
        Value::Int(50),
        "what gse_dba remembers there is not among the keys"
    );
    let roles: Vec<String> = site.groups[0].servers.iter().map(role).collect();
    assert_eq!(roles.iter().filter(|r| *r == "master").count(), 1, "{roles:?}");
    for s in &site.groups[0].servers {
        wait_for("every copy", || s.client().say("DBSIZE") == Value::Int(50));
    }
    let told = status(&mut c)["groups"][0]["failover"].to_string();
    assert!(told.contains("by hand"), "{told}");
    // One copy dies: nothing is refused. It comes back as what the configuration says, a primary, and is made a copy again.
    let mut site = site;
    let at = roles.iter().position(|r| r != "master").unwrap();
    site.groups[0].servers[at].crash();
    for i in 0..50 {
        assert_eq!(c.call(&["SET", &format!("k{i}"), "w"]), Value::ok());
    }
    site.groups[0].servers[at].revive();
    wait_whole(&mut c, 2);
    let back = &site.groups[0].servers[at];
    wait_for("the copy to catch up", || {
        back.client().say("GET k49") == Value::bulk("w")
    });
    // What clients throw away is not what gse_dba remembers.
    assert_eq!(c.say("FLUSHALL"), Value::ok());
    wait_whole(&mut c, 2);
    assert_eq!(d.say("SET a 1"), Value::ok());
}

#[test]
fn data_is_never_thrown_away_unasked() {
    let site = Site::strangers(1, 3);
    for (i, s) in site.groups[0].servers.iter().enumerate().take(2) {
        s.client().say("CONFIG SET min-replicas-to-write 0");
        assert_eq!(s.client().say(&format!("SET from{i} data")), Value::ok());
        s.client().say("CONFIG SET min-replicas-to-write 1");
    }
    let ours = Ours::start(quick(&site));
    let mut c = ours.client();
    wait_for("the refusal", || {
        status(&mut c)["groups"][0]["waits_for_operator"]
            .to_string()
            .contains("thrown away")
    });
    let refused = c.say("SET a 1");
    assert!(
        matches!(&refused, Value::Error(e) if e.starts_with("UNAVAILABLE") || e.starts_with("NOREPLICAS")),
        "{refused:?}"
    );
    for (i, s) in site.groups[0].servers.iter().enumerate().take(2) {
        assert_eq!(s.client().say(&format!("GET from{i}")), Value::bulk("data"));
    }
    // The operator decides.
    let mut other = site.groups[0].servers[1].client();
    other.say("CONFIG SET min-replicas-to-write 0");
    assert_eq!(other.say("FLUSHALL"), Value::ok());
    other.say("CONFIG SET min-replicas-to-write 1");
    wait_whole(&mut c, 2);
    assert_eq!(c.say("GET from0"), Value::bulk("data"));
    assert_eq!(role(&site.groups[0].servers[0]), "master");
    assert_eq!(c.say("SET a 1"), Value::ok());
    // A stranger's group is not taken for one's own.
    let theirs = Site::strangers(1, 3);
    let second = Ours::start(quick(&theirs));
    let mut d = second.client();
    wait_whole(&mut d, 2);
    d.say("SET theirs 1");
    let mut mixed = quick(&site);
    mixed.sharded.groups[0].servers[2] = theirs.groups[0].servers[0].addr.to_string();
    match Ours::try_start(mixed) {
        Err(e) => assert!(format!("{e:#}").contains("copies from"), "{e:#}"),
        Ok(third) => {
            let mut e = third.client();
            wait_for("the refusal", || {
                status(&mut e)["groups"][0]["waits_for_operator"]
                    .to_string()
                    .contains("another group")
            });
        }
    }
    assert_eq!(d.say("GET theirs"), Value::bulk("1"));
    assert_eq!(c.say("GET from0"), Value::bulk("data"));
}

// contract: redis-proxy#15
#[test]
fn a_promoted_copy_has_all_and_the_old_primary_comes_back_as_a_copy() {
    let mut site = Site::start(1, 2, false);
    let (ours, other) = (Ours::start(quick(&site)), Ours::start(quick(&site)));
    let (mut c, mut d) = (ours.client(), other.client());
    wait_whole(&mut c, 2);
    wait_whole(&mut d, 2);
    let mut ledger = Ledger::new();
    for k in 0..200 {
        ledger.write(&mut c, &format!("k{k}"), 1);
    }
    wait_level(&site);
    // One copy stands still and misses what comes then.
    let (last, first) = (
        site.groups[0].servers[2].addr.to_string(),
        site.groups[0].servers[1].addr.to_string(),
    );
    site.groups[0].servers[2].freeze();
    site.groups[0].servers[0].client().say("CLIENT KILL TYPE replica");
    wait_whole(&mut c, 1);
    for k in 0..200 {
        ledger.write(&mut c, &format!("k{k}"), 2);
    }
    assert_eq!(ledger.errors, Vec::<String>::new());
    let lives = c.call(&["DBA", "PROMOTE", "g0", &first]);
    assert!(
        matches!(&lives, Value::Error(e) if e.contains("DBA FAILOVER")),
        "{lives:?}"
    );
    site.groups[0].servers[0].crash();
    // The other copy may have what was acknowledged: alone it can't be judged.
    let blind = c.call(&["DBA", "PROMOTE", "g0", &first]);
    assert!(
        matches!(&blind, Value::Error(e) if e.contains("servers answer")),
        "{blind:?}"
    );
    site.groups[0].servers[2].thaw();
    wait_for("the copy to go on", || role(&site.groups[0].servers[2]) == "slave");
    let behind = c.call(&["DBA", "PROMOTE", "g0", &last]);
    assert!(
        matches!(&behind, Value::Error(e) if e.contains("not the furthest")),
        "{behind:?}"
    );
    let began = Instant::now();
    let done = json(&c.call(&["DBA", "PROMOTE", "g0"]));
    println!("promoted in {:?}: {done}", began.elapsed());
    assert_eq!(done["primary"], first.as_str());
    ledger.check(&mut c);
    for k in 0..200 {
        ledger.write(&mut c, &format!("k{k}"), 3);
    }
    assert_eq!(ledger.errors, Vec::<String>::new());
    // Whoever was not asked finds out.
    wait_for("the other gse_dba", || {
        primary_of(&mut d).as_deref() == Some(first.as_str())
    });
    ledger.check(&mut d);
    // It comes back as the primary that it was, with writes that nobody has confirmed.
    site.groups[0].servers[0].revive();
    wait_for("the old primary to become a copy", || {
        role(&site.groups[0].servers[0]) == "slave"
    });
    wait_whole(&mut c, 2);
    wait_whole(&mut d, 2);
    assert_eq!(primary_of(&mut d).as_deref(), Some(first.as_str()));
    ledger.check(&mut d);
    // And after a start from nothing, nobody takes it for the primary either.
    drop((ours, other));
    let ours = Ours::start(quick(&site));
    let mut c = ours.client();
    wait_whole(&mut c, 2);
    assert_eq!(primary_of(&mut c).as_deref(), Some(first.as_str()));
    ledger.check(&mut c);
}

// contract: redis-proxy#16
#[test]
fn two_copies_down_in_turn_and_then_a_third_server_lost() {
    let mut site = Site::strangers(1, 3);
    let ours = Ours::start(quick(&site));
    let mut c = ours.client();
    wait_whole(&mut c, 2);
    let place = primary_of(&mut c).unwrap();
    // The copies are the second and the third, whoever was made the primary.
    let first = site.groups[0]
        .servers
        .iter()
        .position(|s| s.addr.to_string() == place)
        .unwrap();
    site.groups[0].servers.swap(0, first);
    let mut n = 0;
    let mut write = |c: &mut Raw, count: usize| {
        for _ in 0..count {
            assert_eq!(
                c.call(&["SET", &format!("hh{n}"), &format!("v{n}")]),
                Value::ok(),
                "hh{n}"
            );
            n += 1;
        }
    };
    write(&mut c, 300);
    site.groups[0].servers[2].crash();
    write(&mut c, 700);
    site.groups[0].servers[2].revive();
    // As the script has it: fifty writes, and the next one goes down. It waits for the copy to be back, as an operator does.
    wait_whole(&mut c, 2);
    write(&mut c, 50);
    site.groups[0].servers[1].crash();
    write(&mut c, 700);
    site.groups[0].servers[1].revive();
    wait_whole(&mut c, 2);
    site.groups[0].servers[0].crash();
    let done = json(&c.say("DBA PROMOTE g0"));
    assert_eq!(done["changed"], true, "{done}");
    let mut read = 0;
    for i in 0..1750 {
        read += usize::from(c.call(&["GET", &format!("hh{i}")]) == Value::bulk(&format!("v{i}")));
    }
    println!("{read} of 1750 are read");
    assert_eq!(read, 1750);
}

fn planned(site: &Site, config: Config) -> (Ours, Ours, Duration) {
    let (ours, other) = (Ours::start(config.clone()), Ours::start(config));
    let (mut c, mut d) = (ours.client(), other.client());
    wait_whole(&mut c, 2);
    wait_whole(&mut d, 2);
    let writers = Writers::start(&[&ours, &other], 4);
    let mut held = Vec::new();
    let mut last = primary_of(&mut c);
    for round in 0..5 {
        for _ in 0..30 {
            pause();
        }
        wait_whole(&mut c, 2);
        let done = if round == 2 {
            let to = site.groups[0]
                .servers
                .iter()
                .map(|s| s.addr.to_string())
                .find(|a| Some(a) != last.as_ref())
                .unwrap();
            let done = json(&c.call(&["DBA", "FAILOVER", "g0", "TO", &to]));
            assert_eq!(done["primary"], to.as_str());
            done
        } else {
            json(&c.say("DBA FAILOVER g0"))
        };
        assert_eq!(done["changed"], true, "{done}");
        assert_eq!(done["notes"].as_array().map(Vec::len), Some(0), "{done}");
        held.push(done["held_ms"].as_f64().unwrap());
        println!("{}", done["steps_ms"]);
        let now = primary_of(&mut c);
        assert_ne!(now, last);
        wait_for("the other gse_dba to follow", || primary_of(&mut d) == now);
        last = now;
    }
    wait_whole(&mut c, 2);
    let (errors, longest, count) = writers.end(&mut c);
    println!("held for {held:.1?} ms; the longest any of 8 writers waited: {longest:?}; {count} acknowledged");
    assert_eq!(errors, Vec::<String>::new());
    assert!(count > 500, "they wrote next to nothing: {count}");
    (ours, other, longest)
}

#[test]
fn a_planned_fail_over_of_a_plain_list_is_a_short_wait_and_no_error() {
    let site = Site::start(1, 2, false);
    let (_ours, _other, longest) = planned(&site, sharded_list(&site));
    assert!(longest < Duration::from_secs(2), "{longest:?}");
}

#[test]
fn a_planned_fail_over_under_sentinel_is_a_short_wait_and_no_error() {
    let mut site = Site::start(1, 2, true);
    let mut config = sharded(&site);
    config.sharded.groups.truncate(1);
    let (ours, _other, longest) = planned(&site, config);
    assert!(longest < Duration::from_secs(2), "{longest:?}");
    // The Sentinels watch the new one: when it dies, they replace it.
    let mut c = ours.client();
    let mut ledger = Ledger::new();
    for k in 0..50 {
        ledger.write(&mut c, &format!("k{k}"), 1);
    }
    let now = primary_of(&mut c).unwrap();
    let at = site.groups[0]
        .servers
        .iter()
        .position(|s| s.addr.to_string() == now)
        .unwrap();
    site.groups[0].servers.remove(at).kill();
    wait_for("Sentinel's own fail-over", || {
        ledger.write(&mut c, "k0", 2);
        primary_of(&mut c).is_some_and(|p| p != now) && status(&mut c)["groups"][0]["state"] == "ok"
    });
    ledger.check(&mut c);
}

#[test]
fn servers_beside_gse_dba_are_spoken_to_over_their_sockets() {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<String> = (0..3)
        .map(|i| dir.path().join(format!("r{i}.sock")).display().to_string())
        .collect();
    let servers: Vec<Redis> = paths
        .iter()
        .map(|p| {
            let mut args = SAFE.to_vec();
            args.extend(["--unixsocket", p]);
            Redis::start_with(&args)
        })
        .collect();
    let site = Site::of(servers);
    let mut config = sharded_list(&site);
    config.sharded.groups[0].servers = paths
        .iter()
        .zip(&site.groups[0].servers)
        .map(|(p, s)| format!("{p}={}", s.addr))
        .collect();
    let ours = Ours::start(config);
    let mut c = ours.client();
    wait_whole(&mut c, 2);
    assert_eq!(c.say("SET a 1"), Value::ok());
    assert!(primary_of(&mut c).unwrap().ends_with(".sock"));
    let to = site.groups[0]
        .servers
        .iter()
        .find(|s| role(s) == "slave")
        .unwrap()
        .addr
        .to_string();
    let done = json(&c.call(&["DBA", "FAILOVER", "g0", "TO", &to]));
    assert_eq!(done["primary"], to.as_str());
    wait_whole(&mut c, 2);
    assert_eq!(c.say("GET a"), Value::bulk("1"));
    // Nothing of ours goes over TCP to it.
    let clients = site.groups[0].servers[0].client().say("CLIENT LIST TYPE normal").text();
    let over_tcp = clients
        .lines()
        .filter(|l| !l.contains(".sock:0") && !l.contains("cmd=client|list"))
        .count();
    assert_eq!(over_tcp, 0, "{clients}");
}

/// A primary that stands still: what was not sent waits for the next one and does not fail.
#[test]
fn commands_wait_for_the_next_primary_instead_of_failing() {
    let mut site = Site::start(1, 2, true);
    let mut config = sharded(&site);
    config.sharded.hold_ms = 15_000;
    let ours = Ours::start(config);
    let mut c = ours.client();
    wait_whole(&mut c, 2);
    let writers = Writers::start(&[&ours], 8);
    for _ in 0..30 {
        pause();
    }
    let old = site.groups[0].servers.remove(0);
    let began = Instant::now();
    old.freeze();
    wait_for("the next primary", || {
        primary_of(&mut c).is_some_and(|p| p != old.addr.to_string()) && status(&mut c)["groups"][0]["state"] == "ok"
    });
    let took = began.elapsed();
    for _ in 0..20 {
        pause();
    }
    let (errors, longest, count) = writers.end(&mut c);
    println!(
        "the next primary after {took:?}; {} errors, longest wait {longest:?}, {count} acknowledged",
        errors.len()
    );
    // Each writer has at most one command that the old one may have executed.
    assert!(errors.len() <= 8, "{errors:?}");
    assert!(errors.iter().all(|e| e.starts_with("UNCERTAIN")), "{errors:?}");
}

/// Redis with a certificate, a user of our own and nobody else: both are needed, on the way of the data and beside it.
#[test]
fn servers_behind_may_ask_for_tls_and_a_user() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    // Two of one name would be one, signed by itself, to the servers that copy from each other.
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, "a test's authority");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let cert = params.self_signed(&key).unwrap();
    std::fs::write(file("ca.crt"), cert.pem()).unwrap();
    // What signs is no server: servers have their own.
    let issuer = rcgen::Issuer::new(params, key);
    let own = rcgen::KeyPair::generate().unwrap();
    let server = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()])
        .unwrap()
        .signed_by(&own, &issuer)
        .unwrap();
    std::fs::write(file("redis.crt"), server.pem()).unwrap();
    std::fs::write(file("redis.key"), own.serialize_pem()).unwrap();
    std::fs::write(file("password"), "fronts-own\n").unwrap();
    let ports: Vec<u16> = (0..3)
        .map(|_| {
            std::net::TcpListener::bind("127.0.0.1:0")
                .unwrap()
                .local_addr()
                .unwrap()
                .port()
        })
        .collect();
    let _servers: Vec<Redis> = ports
        .iter()
        .map(|port| {
            let port = port.to_string();
            let (crt, key, ca) = (file("redis.crt"), file("redis.key"), file("ca.crt"));
            let mut args = SAFE.to_vec();
            args.extend([
                "--tls-port",
                &port,
                "--tls-replication",
                "yes",
                "--tls-auth-clients",
                "optional",
            ]);
            args.extend([
                "--tls-cert-file",
                &crt,
                "--tls-key-file",
                &key,
                "--tls-ca-cert-file",
                &ca,
            ]);
            args.extend([
                "--user",
                "front",
                "on",
                ">fronts-own",
                "~*",
                "&*",
                "+@all",
                "--user",
                "default",
                "off",
            ]);
            Redis::start_with(&args)
        })
        .collect();
    let site = Site::of(_servers);
    let mut config = sharded_list(&site);
    config.sharded.groups[0].servers = ports.iter().map(|p| format!("127.0.0.1:{p}")).collect();
    config.sharded.user = "front".into();
    config.sharded.password_file = Some(file("password").into());
    config.sharded.tls = Some(gse_dba::config::sharded::BackTls {
        ca: file("ca.crt").into(),
        cert: None,
        key: None,
        sentinels: true,
    });
    let ours = Ours::start(config.clone());
    let mut c = ours.client();
    wait_whole(&mut c, 2);
    assert_eq!(c.say("SET a 1"), Value::ok());
    let done = json(&c.say("DBA FAILOVER g0"));
    assert_eq!(done["changed"], true, "{done}");
    assert_eq!(c.say("GET a"), Value::bulk("1"));
    // Who shows a certificate of another authority is not spoken to.
    let mut other = config;
    other.sharded.tls.as_mut().unwrap().ca = file("redis.crt").into();
    other.sharded.hold_ms = 300;
    let theirs = Ours::start(other);
    let refused = theirs.client().say("GET a");
    assert!(
        matches!(&refused, Value::Error(e) if e.starts_with("UNAVAILABLE")),
        "{refused:?}"
    );
}

/// From the kill of a primary to the next acknowledged write, and whose steps that was.
#[test]
fn what_a_killed_primary_costs_under_sentinel() {
    let mut site = Site::start(1, 2, true);
    let ours = Ours::start(sharded(&site));
    let mut c = ours.client();
    wait_whole(&mut c, 2);
    assert_eq!(c.say("SET a 0"), Value::ok());
    let mut events = Vec::new();
    for s in site.sentinels() {
        let mut s = Raw::connect(s);
        s.say("PSUBSCRIBE *");
        events.push(s);
    }
    let (noted, list) = std::sync::mpsc::channel();
    let killed = Instant::now();
    site.groups[0].servers.remove(0).kill();
    for (i, mut s) in events.into_iter().enumerate() {
        let noted = noted.clone();
        s.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        std::thread::spawn(move || {
            loop {
                let Some(event) = s.try_reply() else { return };
                let name = event.items()[2].text();
                if noted.send((killed.elapsed(), format!("Sentinel {i}: {name}"))).is_err() || name == "+switch-master"
                {
                    return;
                }
            }
        });
    }
    let mut tries = 0;
    while c.say("SET a 1") != Value::ok() {
        tries += 1;
        assert!(killed.elapsed() < Duration::from_secs(15));
    }
    let back = killed.elapsed();
    wait_for("all events", || {
        pause();
        killed.elapsed() > back + Duration::from_millis(500)
    });
    let mut all: Vec<(Duration, String)> = list.try_iter().collect();
    all.push((back, "the next acknowledged write".into()));
    all.sort();
    for (at, what) in &all {
        println!("{:6} ms {what}", at.as_millis());
    }
    let first = |name: &str| all.iter().find(|(_, n)| n.ends_with(name)).map(|(at, _)| *at);
    let detected = first("+odown").or(first("+sdown")).expect("Sentinel has noticed");
    println!(
        "{tries} refusals; {:?} after Sentinel had noticed",
        back.saturating_sub(detected)
    );
    // A second of its own is the aim; the machine may be busy.
    assert!(back < detected + Duration::from_secs(3), "{all:?}");
}
