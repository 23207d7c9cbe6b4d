//! The settings: what is wrong with them, and reading them again.

use tempfile::TempDir;

use super::*;
use crate::lifecycle::Lifecycle;

#[test]
fn every_problem_of_the_settings_is_reported_at_once() {
    let bad = AppEntry {
        code: "bad".into(),
        secret_sha256: Some("s3cret-in-the-clear".into()),
        operations: vec!["script.exec".into(), "script.*".into()],
        accounts: vec!["adm*".into()],
        targets: vec!["10.0.*".into(), "cloud:x".into()],
        ..AppEntry::default()
    };
    let config = AuthzConfig {
        apps: vec![
            bad,
            app("twice", "a"),
            app("twice", "b"),
            app(OPERATOR_APP, "c"),
            app("", "d"),
        ],
        trusted_networks: vec![TrustedNetwork {
            cidr: "10.0.0.0/8".parse().unwrap(),
            app: "nobody".into(),
        }],
        gateway_keys: vec![GatewayKey {
            name: "g".into(),
            public_key_file: "/nonexistent/key.pem".into(),
            issuer: None,
        }],
        apps_file: Some("/nonexistent/apps.toml".into()),
    };
    let text = Authenticator::new(&config).err().unwrap().to_string();
    for part in [
        "secret_sha256",
        "script.exec",
        "script.*",
        "adm*",
        "10.0.*",
        "cloud:x",
        "twice",
        "reserved",
        "nobody",
        "key.pem",
        "apps.toml",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(!text.contains("s3cret-in-the-clear"), "{text}");
}

#[test]
fn a_bad_file_keeps_the_old_table_on_reload_and_stops_the_start() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("apps.toml");
    let table = |code: &str| {
        format!(
            "[[app]]\ncode = \"{code}\"\nsecret_sha256 = \"{}\"\noperations = [\"*\"]\n",
            hex::encode(Sha256::digest("s"))
        )
    };
    std::fs::write(&file, table("first")).unwrap();
    let config = AuthzConfig {
        apps_file: Some(file.clone()),
        ..AuthzConfig::default()
    };
    let auth = Authenticator::new(&config).unwrap();
    let knows = |code: &str| auth.authenticate(&authorization(code, "s"), SOMEWHERE, None).is_ok();
    assert!(knows("first"));
    std::fs::write(&file, format!("{}oops = 1\n", table("second"))).unwrap();
    let error = auth.reload().unwrap_err().to_string();
    assert!(error.contains("apps.toml") && error.contains("line"), "{error}");
    assert!(Authenticator::new(&config).is_err());
    assert!(knows("first") && !knows("second"));
    std::fs::write(&file, table("second")).unwrap();
    auth.reload().unwrap();
    assert!(!knows("first") && knows("second"));
    assert!(
        auth.policy()
            .check_operation(&caller("second"), Operation::AgentList)
            .is_ok()
    );
}

#[tokio::test]
async fn the_table_follows_the_signal() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("apps.toml");
    std::fs::write(&file, "").unwrap();
    let auth = Authenticator::new(&AuthzConfig {
        apps_file: Some(file.clone()),
        ..AuthzConfig::default()
    })
    .unwrap();
    let life = Lifecycle::new("test");
    auth.follow_reloads(&life);
    std::fs::write(&file, "[[app]]\ncode = \"new\"\noperations = [\"*\"]\n").unwrap();
    life.reload();
    let policy = auth.policy();
    for _ in 0..500 {
        if policy.check_operation(&caller("new"), Operation::AgentList).is_ok() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("the table was not read again");
}

#[test]
fn settings_do_not_print_digests() {
    let entry = app("bk_job", "s3cret");
    let text = format!(
        "{:?}",
        AuthzConfig {
            apps: vec![entry.clone()],
            ..AuthzConfig::default()
        }
    );
    assert!(text.contains("bk_job") && !text.contains(entry.secret_sha256.as_deref().unwrap()));
}
