//! `gse certs` through the real binary.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use gse_core::tls::{Role, identity_of_file};

fn certs(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gse"))
        .args(["certs", "--dir"])
        .arg(dir)
        .args(args)
        .env_remove("GSE_DATA")
        .output()
        .unwrap()
}

fn written(dir: &Path, args: &[&str]) -> Vec<String> {
    let output = certs(dir, args);
    assert!(
        output.status.success(),
        "{args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let prefix = format!("{}/", dir.display());
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| line.strip_prefix(&prefix).unwrap().to_owned())
        .collect()
}

fn refused(dir: &Path, args: &[&str]) -> String {
    let output = certs(dir, args);
    assert_eq!(output.status.code(), Some(2), "{args:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.starts_with("gse: ") && text.lines().count() == 1, "{text}");
    text
}

#[test]
fn everything_has_the_contracts_names_and_the_right_role() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("tls");
    let missing = refused(&dir, &["server"]);
    assert!(missing.contains("gse certs init"), "{missing}");

    assert_eq!(written(&dir, &["init"]), ["gseca.crt", "gseca.key"]);
    assert_eq!(
        written(&dir, &["server", "--name", "gse1.example.com", "--name", "10.0.0.5"]),
        ["gse_server.crt", "gse_server.key"]
    );
    assert_eq!(
        written(&dir, &["api-client", "bk-job"]),
        ["gse_api_client.crt", "gse_api_client.key"]
    );
    assert_eq!(
        written(&dir, &["operator", "alice"]),
        ["gse_operator.crt", "gse_operator.key"]
    );
    assert_eq!(
        written(&dir, &["agent", "--shared"]),
        ["gse_agent.crt", "gse_agent.key"]
    );
    let own = "agents/0:10.0.0.1";
    assert_eq!(
        written(&dir, &["agent", "0:10.0.0.1"]),
        [
            format!("{own}/gseca.crt"),
            format!("{own}/gse_agent.crt"),
            format!("{own}/gse_agent.key")
        ]
    );
    for (file, role, id) in [
        ("gse_server.crt", Role::Server, None),
        ("gse_api_client.crt", Role::ApiClient, Some("bk-job")),
        ("gse_operator.crt", Role::Operator, Some("alice")),
        ("gse_agent.crt", Role::Agent, None),
        ("agents/0:10.0.0.1/gse_agent.crt", Role::Agent, Some("0:10.0.0.1")),
    ] {
        let identity = identity_of_file(&dir.join(file)).unwrap();
        assert_eq!((identity.role, identity.id.as_deref()), (role, id), "{file}");
    }
    for key in ["gseca.key", "gse_server.key", "agents/0:10.0.0.1/gse_agent.key"] {
        assert_eq!(
            std::fs::metadata(dir.join(key)).unwrap().permissions().mode() & 0o777,
            0o600,
            "{key}"
        );
    }
}

#[test]
fn nothing_is_overwritten_unless_that_is_said() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    written(dir, &["init"]);
    written(dir, &["server"]);
    let before = std::fs::read(dir.join("gse_server.crt")).unwrap();
    for again in ["init", "server"] {
        let text = refused(dir, &[again]);
        assert!(text.contains("--force") && text.contains("exists"), "{text}");
    }
    assert_eq!(std::fs::read(dir.join("gse_server.crt")).unwrap(), before);
    written(dir, &["server", "--force"]);
    assert_ne!(std::fs::read(dir.join("gse_server.crt")).unwrap(), before);
}

#[test]
fn ids_that_are_none_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    written(temp.path(), &["init"]);
    for bad in ["", "a b", "x{y"] {
        refused(temp.path(), &["agent", bad]);
    }
    assert!(!temp.path().join("agents").exists());
    written(temp.path(), &["agent", "../../outside"]);
    assert!(temp.path().join("agents/%2E.%2F..%2Foutside/gse_agent.crt").exists());
}
