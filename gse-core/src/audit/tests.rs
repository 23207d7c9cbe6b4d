use std::fs;

use tempfile::TempDir;

use super::*;

fn entry(number: usize) -> Entry {
    Entry {
        request_id: format!("r{number}"),
        app: "job".into(),
        operation: "script.execute".into(),
        ..Entry::default()
    }
    .with_targets(["0:10.0.0.1", "0:10.0.0.2"].into_iter())
    .with_accounts(["root", "root", "nobody"].into_iter())
}

fn config(dir: &TempDir) -> AuditConfig {
    AuditConfig {
        file: Some(dir.path().join("audit.jsonl")),
        ..AuditConfig::default()
    }
}

/// The writer thread closes the file a moment after the last handle is gone.
async fn reopen(config: &AuditConfig) -> Audit {
    for _ in 0..200 {
        match Audit::open(config) {
            Err(AuditError::File { reason, .. }) if reason.contains("another writer") => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            other => return other.unwrap(),
        }
    }
    panic!("the file stays locked");
}

#[tokio::test]
async fn lines_are_chained_and_the_chain_goes_on_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let config = AuditConfig {
        sync: true,
        ..config(&dir)
    };
    let file = config.file.clone().unwrap();
    let audit = Audit::open(&config).unwrap();
    for number in 0..5 {
        audit.record(entry(number)).await.unwrap();
        assert_eq!(
            verify(&file).unwrap().lines,
            number as u64 + 1,
            "record returned before the line was written"
        );
    }
    drop(audit);
    let audit = reopen(&config).await;
    audit.record(entry(5).refused("not on this host")).await.unwrap();
    let report = verify(&file).unwrap();
    assert_eq!((report.lines, report.first_seq, report.last_seq), (6, 1, 6));
    let text = fs::read_to_string(&file).unwrap();
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["decision"], "refused");
    assert_eq!(last["reason"], "not on this host");
    assert_eq!(last["targets"], 2);
    assert_eq!(last["accounts"], serde_json::json!(["root", "nobody"]));
}

#[tokio::test]
async fn every_kind_of_tampering_is_seen() {
    let dir = TempDir::new().unwrap();
    let config = config(&dir);
    let file = config.file.clone().unwrap();
    let audit = Audit::open(&config).unwrap();
    for number in 0..6 {
        audit.record(entry(number)).await.unwrap();
    }
    let good = fs::read_to_string(&file).unwrap();
    let lines: Vec<&str> = good.lines().collect();
    let joined = |lines: &[&str]| format!("{}\n", lines.join("\n"));
    let changed = good.replacen("\"r3\"", "\"r4\"", 1);
    let missing = joined(&[&lines[..2], &lines[3..]].concat());
    let swapped = joined(&[lines[0], lines[2], lines[1], lines[3]]);
    let doubled = joined(&[lines[0], lines[1], lines[1]]);
    let cut = good[..good.len() - 3].to_owned();
    for (name, text) in [
        ("changed", changed),
        ("missing", missing),
        ("swapped", swapped),
        ("doubled", doubled),
        ("cut", cut),
    ] {
        let copy = dir.path().join(name);
        fs::write(&copy, text).unwrap();
        assert!(
            matches!(verify(&copy), Err(VerifyError::Broken { .. })),
            "{name} was not seen"
        );
    }
    assert_eq!(verify(&file).unwrap().lines, 6);
}

#[tokio::test]
async fn files_are_put_aside_by_size_and_the_chain_goes_through_them() {
    let dir = TempDir::new().unwrap();
    let config = AuditConfig {
        max_file_bytes: 1_000,
        keep_files: 3,
        ..config(&dir)
    };
    let file = config.file.clone().unwrap();
    let audit = Audit::open(&config).unwrap();
    for number in 0..30 {
        audit.record(entry(number)).await.unwrap();
    }
    let files = chain::aside(&file).unwrap();
    assert_eq!(files.len(), 3, "{files:?}");
    let report = verify_all(&file).unwrap();
    assert_eq!(report.last_seq, 30);
    assert!(report.first_seq > 1, "the oldest were removed");
    assert_eq!(report.lines, 30 - report.first_seq + 1);
    // A missing file in the middle is seen.
    fs::remove_file(&files[1].1).unwrap();
    assert!(matches!(verify_all(&file), Err(VerifyError::Broken { line: 1, .. })));
    drop(audit);
    // With the current file gone, the chain goes on from the newest one put aside.
    let newest = files[2].0;
    fs::remove_file(&file).unwrap();
    let audit = reopen(&config).await;
    audit.record(entry(99)).await.unwrap();
    assert_eq!(verify(&file).unwrap().first_seq, newest + 1);
}

#[tokio::test]
async fn an_unfinished_last_line_is_removed_and_said_so() {
    let dir = TempDir::new().unwrap();
    let config = config(&dir);
    let file = config.file.clone().unwrap();
    let audit = Audit::open(&config).unwrap();
    audit.record(entry(0)).await.unwrap();
    drop(audit);
    drop(reopen(&config).await);
    let mut text = fs::read_to_string(&file).unwrap();
    text.push_str("{\"seq\":2,\"time\":\"20");
    fs::write(&file, &text).unwrap();
    let audit = reopen(&config).await;
    audit.record(entry(1)).await.unwrap();
    assert_eq!(verify(&file).unwrap().lines, 3);
    assert!(
        fs::read_to_string(&file)
            .unwrap()
            .contains("19 bytes of an unfinished line removed")
    );
}

#[tokio::test]
async fn a_broken_last_line_stops_the_start() {
    let dir = TempDir::new().unwrap();
    let config = config(&dir);
    fs::write(config.file.as_ref().unwrap(), "{\"seq\":1}\n").unwrap();
    let error = Audit::open(&config).expect_err("refused").to_string();
    assert!(error.contains("last line is broken"), "{error}");
}

#[tokio::test]
async fn two_writers_of_one_file_are_refused() {
    let dir = TempDir::new().unwrap();
    let first = Audit::open(&config(&dir)).unwrap();
    assert!(matches!(Audit::open(&config(&dir)), Err(AuditError::File { .. })));
    first.record(entry(0)).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_written_is_refused_unless_the_trail_is_optional() {
    // /dev/full takes the open and refuses every write, as a full disk does.
    for required in [true, false] {
        let config = AuditConfig {
            file: Some("/dev/full".into()),
            required,
            ..AuditConfig::default()
        };
        let audit = Audit::open(&config).unwrap();
        let outcome = audit.record(entry(0)).await;
        assert_eq!(outcome.is_err(), required, "{outcome:?}");
        assert_eq!(audit.failures(), 1);
    }
    assert!(matches!(
        Audit::open(&AuditConfig::default()),
        Err(AuditError::Config(_))
    ));
}

#[tokio::test]
async fn the_rest_of_a_failed_write_does_not_stay_in_the_chain() {
    let dir = TempDir::new().unwrap();
    let file = config(&dir).file.unwrap();
    let audit = Audit::open(&config(&dir)).unwrap();
    audit.record(entry(0)).await.unwrap();
    // What a write leaves that ends half-way on a full disk.
    let mut text = fs::read(&file).unwrap();
    text.extend_from_slice(b"{\"seq\":2,\"ti");
    fs::write(&file, &text).unwrap();
    audit.record(entry(1)).await.unwrap();
    assert_eq!(verify(&file).unwrap().lines, 2);
}

#[tokio::test]
async fn a_file_moved_away_is_followed_by_a_new_one() {
    let dir = TempDir::new().unwrap();
    let config = config(&dir);
    let file = config.file.clone().unwrap();
    let audit = Audit::open(&config).unwrap();
    audit.record(entry(0)).await.unwrap();
    let moved = dir.path().join("moved");
    fs::rename(&file, &moved).unwrap();
    audit.record(entry(1)).await.unwrap();
    let (old, new) = (verify(&moved).unwrap(), verify(&file).unwrap());
    assert_eq!((new.lines, new.first_seq), (1, 2));
    assert_eq!(new.prev, old.last_hash);
}

#[tokio::test]
async fn strangers_cannot_fill_the_trail() {
    let dir = TempDir::new().unwrap();
    let config = AuditConfig {
        unauthenticated_per_second: 5,
        ..config(&dir)
    };
    let file = config.file.clone().unwrap();
    let audit = Audit::open(&config).unwrap();
    let stranger = Entry {
        decision: Decision::Unauthenticated,
        reason: Some("wrong secret".into()),
        ..Entry::default()
    };
    for _ in 0..500 {
        audit.record(stranger.clone()).await.unwrap();
    }
    assert!(verify(&file).unwrap().lines < 100);
    audit.record(entry(0)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1_050)).await;
    audit.record(stranger).await.unwrap();
    assert!(
        fs::read_to_string(&file)
            .unwrap()
            .lines()
            .last()
            .unwrap()
            .contains("lines like this left out")
    );
}

#[tokio::test]
async fn long_texts_are_cut() {
    let dir = TempDir::new().unwrap();
    let file = config(&dir).file.unwrap();
    let audit = Audit::open(&config(&dir)).unwrap();
    audit
        .record(Entry {
            app: "界".repeat(100_000),
            reason: Some("x".repeat(1 << 20)),
            ..entry(0)
        })
        .await
        .unwrap();
    assert!(fs::metadata(&file).unwrap().len() < 4_096);
    assert_eq!(verify(&file).unwrap().lines, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_at_once_all_get_their_line() {
    let dir = TempDir::new().unwrap();
    let file = config(&dir).file.unwrap();
    let audit = Audit::open(&config(&dir)).unwrap();
    let tasks: Vec<_> = (0..500)
        .map(|number| {
            let audit = audit.clone();
            tokio::spawn(async move { audit.record(entry(number)).await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(verify(&file).unwrap().lines, 500);
}
