//! A fresh install lets nobody in: no rights by default, nothing shared between two installs, no listener that strangers reach.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use gse_tests::api::EXT;
use gse_tests::process::binary;
use gse_tests::{Api, Child, Site, StoreKind, Wire, eventually, script_body};
use tempfile::TempDir;

/// `gse up` of an account with this home.
async fn up(home: &Path) -> Child {
    let mut command = Command::new(binary("gse").unwrap());
    command
        .args(["up", "--any-port"])
        .env_clear()
        .env("HOME", home)
        .env("PATH", "/usr/bin:/bin");
    let child = Child::spawn("gse up", command, &home.join("out.log")).unwrap();
    let cli = home.join(".local/share/gse/cli.toml");
    eventually("gse up is ready", Duration::from_secs(40), || async {
        let text = std::fs::read_to_string(&cli).ok()?;
        let address = text.lines().find_map(|line| line.strip_prefix("api = "))?;
        address.contains("http").then_some(())
    })
    .await;
    child
}

fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let kind = std::fs::symlink_metadata(&path).unwrap().file_type();
        if kind.is_dir() {
            found.extend(files(&path));
        } else if kind.is_file() {
            found.insert(path.clone(), std::fs::read(&path).unwrap_or_default());
        }
    }
    found
}

fn value(file: &Path, key: &str) -> String {
    let table: toml::Table = std::fs::read_to_string(file).unwrap().parse().unwrap();
    table[key].as_str().unwrap().to_owned()
}

/// Addresses on which a process listens, as the kernel has them: hex of address and port.
fn listening(pid: i32) -> Vec<String> {
    let mut sockets = BTreeSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        if let Ok(target) = std::fs::read_link(entry.unwrap().path()) {
            let target = target.to_string_lossy().into_owned();
            sockets.extend(
                target
                    .strip_prefix("socket:[")
                    .map(|rest| rest.trim_end_matches(']').to_owned()),
            );
        }
    }
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        let text = std::fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap();
        for line in text.lines().skip(1) {
            let columns: Vec<&str> = line.split_whitespace().collect();
            if columns[3] == "0A" && sockets.contains(columns[9]) {
                found.push(format!("{table} {}", columns[1]));
            }
        }
    }
    found
}

// contract: reliability#S11
#[tokio::test]
async fn two_installs_share_nothing_and_let_nobody_in() {
    let (one, two) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (first, second) = tokio::join!(up(one.path()), up(two.path()));
    let data = |home: &TempDir| home.path().join(".local/share/gse");

    // Every secret and every certificate differs, and none is for others to read.
    let mut seen: BTreeMap<Vec<u8>, PathBuf> = BTreeMap::new();
    for home in [&one, &two] {
        assert_eq!(
            std::fs::metadata(data(home)).unwrap().permissions().mode() & 0o777,
            0o700
        );
        let mut secrets = 0;
        for (path, content) in files(&data(home)) {
            let mode = std::fs::metadata(&path).map_or(0o600, |meta| meta.permissions().mode() & 0o777);
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let secret = name.ends_with(".key")
                || ["cli.toml", "apps.toml", "up.toml", "store.password"].contains(&name.as_str());
            if secret {
                assert_eq!(mode & 0o077, 0, "{}: {mode:o}", path.display());
                secrets += 1;
            }
            if secret || name.ends_with(".crt") {
                // The same file twice within one install is a copy for its agent.
                let other = seen.insert(content, path.clone());
                assert!(
                    other.as_ref().is_none_or(|other| other.starts_with(data(home))),
                    "{} is the same as {other:?}",
                    path.display()
                );
            }
        }
        assert!(secrets >= 8, "{secrets}");
    }
    for key in ["secret", "app"] {
        let (a, b) = (
            value(&data(&one).join("cli.toml"), key),
            value(&data(&two).join("cli.toml"), key),
        );
        assert_eq!(a == b, key == "app", "{key}");
    }

    // Nothing listens beyond loopback.
    for child in [&first, &second] {
        let listeners = listening(child.pid());
        assert!(listeners.len() >= 4, "{listeners:?}");
        for listener in listeners {
            assert!(listener.starts_with("tcp 0100007F:"), "{listener} is not loopback");
        }
    }

    // Nobody runs anything: without credentials, with those of the other install, with a certificate of the other install.
    let api = value(&data(&one).join("cli.toml"), "api").replace("http://", "");
    let submit = format!("{EXT}/async_execute_script");
    let target = value(&data(&one).join("up.toml"), "agent_id");
    let body = script_body(&[&target], "root", "#!/bin/sh\nid\n", 10);
    let theirs = Api::new(&api, "gse-local", &value(&data(&two).join("cli.toml"), "secret"));
    let default = Api::new(&api, "gse-local", "gse-local");
    for caller in [theirs.clone().without("x-bkapi-authorization"), theirs, default] {
        assert_eq!(caller.post(&submit, &body).await["code"], 1_000_901);
    }
    let agents = eventually("the agents listener is known", Duration::from_secs(5), || async {
        let text = std::fs::read_to_string(data(&one).join("agent/agent.toml")).ok()?;
        let table: toml::Table = text.parse().ok()?;
        table["servers"].as_array()?.first()?.as_str().map(str::to_owned)
    })
    .await;
    let tls = data(&two).join("tls");
    let stranger = Wire::connect(
        &agents,
        &data(&one).join("tls/gseca.crt"),
        &tls.join("gse_agent.crt"),
        &tls.join("gse_agent.key"),
    )
    .await;
    if let Ok(mut wire) = stranger {
        assert!(wire.greet(gse_tests::wire::hello(&target)).await.is_err());
    }
    // Its own application may: that is what starting it has set up, for the account that did.
    let own = Api::new(&api, "gse-local", &value(&data(&one).join("cli.toml"), "secret"));
    assert_eq!(own.post(&submit, &body).await["code"], 0);
}

// contract: reliability#S11
#[tokio::test]
async fn without_a_policy_nothing_is_run() {
    // As an operator starts it who has set nothing but what has no default.
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    std::fs::write(site.path().join("apps.toml"), "").unwrap();
    site.start_task().await.unwrap();
    site.start_api().await.unwrap();
    for api in [site.api(), site.task_api()] {
        let reply = api
            .post(
                &format!("{EXT}/async_execute_script"),
                &script_body(&["x"], "root", "", 10),
            )
            .await;
        assert_eq!(reply["code"], 1_000_901, "{reply}");
    }
    // A new application may do nothing that its entry does not say.
    let hash = "5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8";
    std::fs::write(
        site.path().join("apps.toml"),
        format!("[[app]]\ncode = \"new\"\nsecret_sha256 = \"{hash}\"\n"),
    )
    .unwrap();
    site.task.as_ref().unwrap().signal(nix::sys::signal::Signal::SIGHUP);
    let new = Api::new(&site.task_api().address, "new", "password");
    eventually("the table is read again", Duration::from_secs(10), || async {
        let reply = new
            .post(
                &format!("{EXT}/async_execute_script"),
                &script_body(&["x"], "root", "", 10),
            )
            .await;
        (reply["code"] == 1_000_903).then_some(())
    })
    .await;
}

// contract: reliability#S11
#[test]
fn defaults_listen_on_loopback_and_no_key_is_built_in() {
    for name in ["gse_api", "gse_task", "gse_dba"] {
        // What has no default, and is not about listeners.
        let mut needed = vec![];
        if name == "gse_dba" {
            needed.push("password=of-the-operator".to_owned());
        } else {
            needed.push("audit.required=false".to_owned());
            for section in if name == "gse_api" {
                &["tls"][..]
            } else {
                &["agents.tls", "internal.tls"]
            } {
                needed.extend(["ca", "cert", "key"].map(|file| format!("{section}.{file}=/nowhere")));
            }
        }
        let done = Command::new(binary(name).unwrap())
            .arg("--print-config")
            .args(needed.iter().flat_map(|set| ["--set", set]))
            .env_clear()
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&done.stdout).into_owned();
        let mut listeners = 0;
        for line in text.lines().filter(|line| line.contains("listen =")) {
            let address = line.split('"').nth(1).unwrap_or_default();
            listeners += 1;
            assert!(
                address.is_empty() || address.starts_with("127.0.0.1:"),
                "{name}: {line}"
            );
        }
        assert!(listeners > 0, "{name}: {text}{}", String::from_utf8_lossy(&done.stderr));
    }
    for name in ["gse_api", "gse_task", "gse_dba", "gse_agent", "gse"] {
        let found = Command::new("grep")
            .args(["-aqP", "PRIVATE KEY-----\\r?\\n[A-Za-z0-9+/]{40}"])
            .arg(binary(name).unwrap())
            .status()
            .unwrap();
        assert_eq!(found.code(), Some(1), "a private key is built into {name}");
    }
}
