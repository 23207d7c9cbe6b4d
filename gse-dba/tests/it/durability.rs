//! What is acknowledged is there afterwards: after SIGKILL, after a torn tail, after a full disk, after compaction. What is damaged is never passed over in silence.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use gse_dba::config::{Durability, OnCorruption};

use crate::rig::{Ours, Process, Raw, Value, embedded, pause, wait_for};

fn files(dir: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut all: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.file_name().unwrap().to_str().unwrap().starts_with(prefix))
        .collect();
    all.sort();
    all
}

/// One value of every kind, and one key with an expiry.
fn furnish(c: &mut Raw) {
    for line in [
        "SET s one",
        "HSET h f v g w",
        "RPUSH l a b c",
        "SADD m x y",
        "ZADD z 1.5 p 2 q",
        "SET e later EX 1000",
        "INCRBYFLOAT n 0.1",
        "SPOP m",
        "LMOVE l l LEFT RIGHT",
    ] {
        assert!(!matches!(c.say(line), Value::Error(_)), "{line}");
    }
}

fn picture(c: &mut Raw) -> Vec<Value> {
    let mut all: Vec<Value> = [
        "GET s",
        "HGET h f",
        "HGET h g",
        "LRANGE l 0 -1",
        "SMEMBERS m",
        "ZRANGE z 0 -1 WITHSCORES",
        "GET e",
        "GET n",
        "DBSIZE",
        "PEXPIRETIME e",
    ]
    .iter()
    .map(|l| c.say(l))
    .collect();
    if let Value::Array(v) = &mut all[4] {
        v.sort_by(|a, b| a.partial_cmp(b).unwrap());
    }
    all
}

// contract: redis-proxy#22
#[test]
fn acknowledged_writes_survive_sigkill() {
    for durability in ["write", "always"] {
        let dir = tempfile::tempdir().unwrap();
        let acknowledged = Arc::new(Mutex::new(Vec::new()));
        let process = Process::start(
            dir.path(),
            &[
                &format!("embedded.durability={durability}"),
                "embedded.compact_min_kb=64",
            ],
        );
        let addr = process.addr;
        let stop = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..4)
            .map(|w| {
                let (acknowledged, stop) = (Arc::clone(&acknowledged), Arc::clone(&stop));
                std::thread::spawn(move || {
                    use std::io::Write as _;
                    let mut c = Raw::login(addr);
                    c.stream.set_read_timeout(None).unwrap();
                    for i in 0.. {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        let batch: Vec<String> = (0..8).map(|j| format!("w{w}:{i}:{j}")).collect();
                        let bytes: Vec<u8> = batch
                            .iter()
                            .flat_map(|k| {
                                crate::rig::encode(&["SET", k, "a value that takes a little room in the log"])
                            })
                            .collect();
                        if c.stream.write_all(&bytes).is_err() {
                            return;
                        }
                        for key in batch {
                            match c.try_reply() {
                                Some(reply) => assert_eq!(reply, Value::ok()),
                                None => return,
                            }
                            acknowledged.lock().unwrap().push(key);
                        }
                    }
                })
            })
            .collect();
        wait_for("some writes", || acknowledged.lock().unwrap().len() > 4000);
        process.kill();
        stop.store(true, Ordering::Relaxed);
        writers.into_iter().for_each(|w| w.join().unwrap());
        let acknowledged = acknowledged.lock().unwrap();
        let process = Process::start(dir.path(), &[]);
        let mut c = Raw::login(process.addr);
        for keys in acknowledged.chunks(500) {
            let there = c.call(
                &std::iter::once("EXISTS")
                    .chain(keys.iter().map(String::as_str))
                    .collect::<Vec<_>>(),
            );
            assert_eq!(
                there,
                Value::Int(keys.len() as i64),
                "an acknowledged write is gone ({durability})"
            );
        }
    }
}

#[test]
fn everything_comes_back_after_a_start_and_after_compaction() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Ours::embedded(dir.path());
    furnish(&mut ours.client());
    let before = picture(&mut ours.client());
    ours.stop();
    let mut config = embedded(dir.path());
    config.embedded.compact_min_kb = 1;
    config.embedded.durability = Durability::Always;
    let ours = Ours::start(config);
    let mut c = ours.client();
    assert_eq!(picture(&mut c), before);
    // Enough to be compacted more than once, all of it on one key.
    for i in 0..3000 {
        c.call(&["SET", "s", &format!("{i} {}", "x".repeat(50))]);
    }
    c.say("SET s one");
    wait_for("compaction", || {
        !files(dir.path(), "snapshot-").is_empty() && files(dir.path(), "log-").len() == 1
    });
    let size: u64 = fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().metadata().unwrap().len())
        .sum();
    assert!(size < 150_000, "the log was not replaced: {size} bytes");
    assert_eq!(picture(&mut c), before);
    ours.stop();
    let ours = Ours::embedded(dir.path());
    assert_eq!(picture(&mut ours.client()), before);
}

// contract: redis-proxy#22
#[test]
fn a_torn_tail_is_cut_and_nothing_before_it_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Ours::embedded(dir.path());
    let mut c = ours.client();
    for i in 0..50 {
        c.say(&format!("SET k{i} v"));
    }
    ours.stop();
    let log = files(dir.path(), "log-").pop().unwrap();
    let whole = fs::read(&log).unwrap();
    let record = (whole.len() - 28) / 50;
    for cut in [1, 3, record / 2, record - 1] {
        fs::write(&log, &whole[..whole.len() - cut]).unwrap();
        let ours = Ours::embedded(dir.path());
        let mut c = ours.client();
        assert_eq!(c.say("DBSIZE"), Value::Int(49), "cut by {cut}");
        assert_eq!(c.say("SET after v"), Value::ok());
        ours.stop();
        let ours = Ours::embedded(dir.path());
        assert_eq!(ours.client().say("EXISTS k48 k49 after"), Value::Int(2));
        ours.stop();
        fs::write(&log, &whole).unwrap();
    }
    // Zeros and noise at the end are no records either.
    let mut padded = whole.clone();
    padded.extend_from_slice(&[0; 4096]);
    fs::write(&log, &padded).unwrap();
    let ours = Ours::embedded(dir.path());
    assert_eq!(ours.client().say("DBSIZE"), Value::Int(50));
}

// contract: redis-proxy#22
#[test]
fn a_flipped_bit_in_the_middle_is_never_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Ours::embedded(dir.path());
    let mut c = ours.client();
    for i in 0..20 {
        c.say(&format!("SET k{i:02} v"));
    }
    ours.stop();
    let log = files(dir.path(), "log-").pop().unwrap();
    let whole = fs::read(&log).unwrap();
    let record = (whole.len() - 28) / 20;
    for at in [
        28 + 10 * record + record - 1,
        28 + 10 * record,
        28 + 10 * record + 5,
        28 + 10 * record + 14,
    ] {
        let mut broken = whole.clone();
        broken[at] ^= 0x10;
        fs::write(&log, &broken).unwrap();
        let error = Ours::try_start(embedded(dir.path()))
            .err()
            .expect("a damaged log was taken")
            .to_string();
        assert!(
            error.contains("damaged at byte") && error.contains("salvage"),
            "{error}"
        );
        assert_eq!(fs::read(&log).unwrap(), broken, "a refused start must change nothing");
    }
    let mut config = embedded(dir.path());
    config.embedded.on_corruption = OnCorruption::Salvage;
    let ours = Ours::start(config);
    assert_eq!(ours.client().say("DBSIZE"), Value::Int(10));
    assert_eq!(ours.client().say("SET new v"), Value::ok());
    ours.stop();
    assert!(
        fs::read_dir(dir.path())
            .unwrap()
            .any(|e| e.unwrap().file_name().to_str().unwrap().contains(".corrupt-")),
        "the damaged file is gone"
    );
    // The damage is dealt with once.
    let ours = Ours::embedded(dir.path());
    assert_eq!(ours.client().say("DBSIZE"), Value::Int(11));
}

#[test]
fn a_damaged_snapshot_refuses_to_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = embedded(dir.path());
    config.embedded.compact_min_kb = 1;
    let ours = Ours::start(config);
    let mut c = ours.client();
    for i in 0..200 {
        c.say(&format!("SET k{i} some-value-of-a-certain-length"));
    }
    wait_for("a snapshot", || {
        !files(dir.path(), "snapshot-").is_empty() && files(dir.path(), "log-").len() == 1
    });
    ours.stop();
    let snapshot = files(dir.path(), "snapshot-").pop().unwrap();
    let mut bytes = fs::read(&snapshot).unwrap();
    let n = bytes.len();
    bytes[n / 2] ^= 1;
    fs::write(&snapshot, &bytes).unwrap();
    let error = Ours::try_start(embedded(dir.path()))
        .err()
        .expect("a damaged snapshot was taken")
        .to_string();
    assert!(error.contains("damaged"), "{error}");
    // A snapshot that was cut has lost its end mark.
    bytes[n / 2] ^= 1;
    fs::write(&snapshot, &bytes[..n - 40]).unwrap();
    assert!(Ours::try_start(embedded(dir.path())).is_err());
    fs::write(&snapshot, &bytes).unwrap();
    assert_eq!(Ours::embedded(dir.path()).client().say("DBSIZE"), Value::Int(200));
}

// contract: redis-proxy#22
#[test]
fn a_full_disk_refuses_writes_undoes_them_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = embedded(dir.path());
    config.embedded.max_disk_mb = 1;
    let ours = Ours::start(config);
    let mut c = ours.client();
    let value = "v".repeat(20_000);
    let mut stored = 0;
    let refusal = loop {
        match c.call(&["SET", &format!("k{stored}"), &value]) {
            Value::Error(e) => break e,
            _ => stored += 1,
        }
        assert!(stored < 200, "the bound was not kept");
    };
    assert!(refusal.starts_with("MISCONF"), "{refusal}");
    // Refused is not applied, and reads go on.
    assert_eq!(c.say(&format!("EXISTS k{stored}")), Value::Int(0));
    assert_eq!(c.say("DBSIZE"), Value::Int(stored));
    assert_eq!(c.say("STRLEN k0"), Value::Int(20_000));
    assert!(matches!(c.say("INCR counter"), Value::Error(e) if e.starts_with("MISCONF")));
    c.say("MULTI");
    assert!(matches!(c.say("SET a b"), Value::Error(e) if e.starts_with("MISCONF")));
    assert!(matches!(c.say("EXEC"), Value::Error(e) if e.starts_with("EXECABORT")));
    ours.stop();
    // With room again writes are taken again, and what was acknowledged is there.
    let ours = Ours::embedded(dir.path());
    let mut c = ours.client();
    assert_eq!(c.say("DBSIZE"), Value::Int(stored));
    assert_eq!(c.say("SET a b"), Value::ok());
}

#[test]
fn a_disk_full_of_old_log_heals_by_compaction_while_running() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = embedded(dir.path());
    config.embedded.max_disk_mb = 1;
    let ours = Ours::start(config);
    let mut c = ours.client();
    // Far more log than the bound, little data.
    let value = "v".repeat(20_000);
    let mut refused = 0;
    for i in 0..400 {
        while matches!(c.call(&["SET", "k", &format!("{i}{value}")]), Value::Error(_)) {
            refused += 1;
            assert!(refused < 2000, "it never healed");
            pause();
        }
    }
    assert_eq!(c.say("STRLEN k"), Value::Int(20_003));
    ours.stop();
    let ours = Ours::embedded(dir.path());
    assert_eq!(ours.client().say("STRLEN k"), Value::Int(20_003));
}

#[test]
fn past_the_memory_bound_growth_is_refused_and_deletion_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = embedded(dir.path());
    config.embedded.max_memory_mb = 1;
    let ours = Ours::start(config);
    let mut c = ours.client();
    let value = "v".repeat(100_000);
    let mut stored = 0;
    let refusal = loop {
        match c.call(&["SET", &format!("k{stored}"), &value]) {
            Value::Error(e) => break e,
            _ => stored += 1,
        }
        assert!(stored < 50);
    };
    assert_eq!(refusal, "OOM command not allowed when used memory > 'maxmemory'.");
    assert_eq!(c.say("STRLEN k0"), Value::Int(100_000));
    assert_eq!(c.say("DEL k0 k1"), Value::Int(2));
    assert_eq!(c.say("SET small v"), Value::ok());
    c.say("FLUSHALL");
    let info = c.say("INFO memory").text();
    assert!(info.contains("used_memory:0\r\n"), "memory is not given back: {info}");
}

#[test]
fn keys_expire_by_themselves_and_stay_gone() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Ours::embedded(dir.path());
    let mut c = ours.client();
    c.say("HSET h old 1");
    c.say("PEXPIRE h 60");
    c.say("SET lazy v PX 60");
    c.say("SET stays v");
    wait_for("expiry", || c.say("DBSIZE") == Value::Int(1));
    // A new value under an expired name has nothing of the old one, after a start too.
    c.say("HSET h new 2");
    ours.stop();
    let ours = Ours::embedded(dir.path());
    let mut c = ours.client();
    assert_eq!(
        c.say("HGETALL h"),
        Value::Array(vec![Value::bulk("new"), Value::bulk("2")])
    );
    assert_eq!(c.say("DBSIZE"), Value::Int(2));
    assert_eq!(c.say("TTL h"), Value::Int(-1));
}

#[test]
fn two_processes_never_share_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let _first = Ours::embedded(dir.path());
    let error = Ours::try_start(embedded(dir.path()))
        .err()
        .expect("a second process got the directory")
        .to_string();
    assert!(error.contains("in use by another process"), "{error}");
}

#[test]
fn a_store_of_a_later_version_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Ours::embedded(dir.path());
    ours.client().say("SET a b");
    ours.stop();
    let log = files(dir.path(), "log-").pop().unwrap();
    let mut bytes = fs::read(&log).unwrap();
    bytes[10] = 9;
    let crc = crc32c::crc32c(&bytes[..24]).to_le_bytes();
    bytes[24..28].copy_from_slice(&crc);
    fs::write(&log, &bytes).unwrap();
    let error = Ours::try_start(embedded(dir.path()))
        .err()
        .expect("a later schema was taken")
        .to_string();
    assert!(error.contains("later version"), "{error}");
    assert_eq!(fs::read(&log).unwrap(), bytes);
}

/// The bytes of format 1 and schema 1. A later version must read them; a change here needs a new version number.
#[test]
fn the_log_of_version_1_has_these_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Ours::embedded(dir.path());
    ours.client().say("SET k v");
    ours.stop();
    let bytes = fs::read(files(dir.path(), "log-").pop().unwrap()).unwrap();
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let header = "6773652d646261000100010001000000010000000000000";
    assert!(hex.starts_with(header), "{hex}");
    assert_eq!(&bytes[28..32], &[21, 0, 0, 0], "{hex}");
    assert_eq!(&bytes[36..48], &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(&bytes[48..], b"\x03\0\0\0\x03\0\0\0SET\x01\0\0\0k\x01\0\0\0v");
}
