//! What is secret stays so: canaries are planted wherever a secret goes in, and looked for wherever anything comes out.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use gse_tests::api::EXT;
use gse_tests::metrics::Figures;
use gse_tests::process::binary;
use gse_tests::{Api, Child, Site, StoreKind, script_body};
use serde_json::json;
use sha2::Digest;

const AGENT: &str = "020000000242010a00002f17521298676501";
const APP_SECRET: &str = "canary-app-secret-9b1f";
const STORE_PASSWORD: &str = "canary-store-password-77aa";
const PWD: &str = "canary-pwd-51d0";
const PARAMETER: &str = "canary-parameter-e4c2";
const CONTENT: &str = "canary-content-8d3e";
const TOKEN: &str = "canary-token-06fb";
const CANARIES: [&str; 6] = [APP_SECRET, STORE_PASSWORD, PWD, PARAMETER, CONTENT, TOKEN];

/// Fails when one of the canaries, or the middle of a private key, is in `bytes`.
fn clean(what: &str, bytes: &[u8], keys: &[String]) {
    for canary in CANARIES.iter().copied().chain(keys.iter().map(String::as_str)) {
        let at = bytes
            .windows(canary.len())
            .position(|window| window == canary.as_bytes());
        if let Some(at) = at {
            let from = at.saturating_sub(300);
            let context = String::from_utf8_lossy(&bytes[from..at + canary.len()]);
            panic!("{canary} is in {what}: {context}");
        }
    }
}

/// Lines of the private keys of a directory: long enough to be unique, wherever they are printed.
fn key_lines(dir: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            lines.extend(key_lines(&path));
        } else if path.extension().is_some_and(|ending| ending == "key") {
            let text = std::fs::read_to_string(&path).unwrap();
            lines.extend(
                text.lines()
                    .filter(|line| !line.starts_with("---"))
                    .take(1)
                    .map(str::to_owned),
            );
        }
    }
    assert!(!lines.is_empty());
    lines
}

async fn started(site: &Site, name: &str, text: &str) -> Child {
    let (file, addresses) = (
        site.path().join(format!("{name}.toml")),
        site.path().join(format!("{name}.at")),
    );
    let text = format!(
        "{text}\n[runtime]\naddresses_file = {:?}\n[log]\nlevel = \"trace\"\n[ops]\nlisten = \"127.0.0.1:0\"\n",
        addresses.display().to_string()
    );
    std::fs::write(&file, text).unwrap();
    let mut command = Command::new(binary(name).unwrap());
    command.arg("-f").arg(&file);
    let mut child = Child::spawn(name, command, &site.path().join(format!("{name}.log"))).unwrap();
    child.ready(&addresses).await.unwrap();
    child
}

fn printed(name: &str, file: &Path) -> String {
    let done = Command::new(binary(name).unwrap())
        .arg("-f")
        .arg(file)
        .arg("--print-config")
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

// contract: reliability#S10
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn canaries_are_nowhere_to_be_found() {
    let site = Site::with_store(StoreKind::Embedded).await.unwrap();
    let hash = hex::encode(sha2::Sha256::digest(APP_SECRET.as_bytes()));
    let table = format!(
        "[[app]]\ncode = \"bk_job\"\nsecret_sha256 = \"{hash}\"\noperations = [\"*\"]\naccounts = [\"*\"]\ntargets = [\"*\"]\n"
    );
    std::fs::write(site.path().join("apps.toml"), table).unwrap();
    let (dir, certs) = (
        site.path().display().to_string(),
        site.path().join("certs").display().to_string(),
    );
    let store = started(
        &site,
        "gse_dba",
        &format!("backend = \"embedded\"\nlisten = \"127.0.0.1:0\"\npassword = \"{STORE_PASSWORD}\"\n[embedded]\ndir = \"{dir}/canary-dba\"\n"),
    )
    .await;
    let tls = format!(
        "{{ ca = \"{certs}/gseca.crt\", cert = \"{certs}/gse_server.crt\", key = \"{certs}/gse_server.key\" }}"
    );
    let url = format!("redis://:{STORE_PASSWORD}@{}", store.address("resp"));
    let common = |name: &str| {
        format!(
            "[store]\nurl = \"{url}\"\n[authz]\napps_file = \"{dir}/apps.toml\"\n[audit]\nfile = \"{dir}/canary-{name}.jsonl\"\n\
             [http]\nlisten = \"127.0.0.1:0\"\n"
        )
    };
    let task_text = format!(
        "node_id = \"n1\"\n{}[agents]\nlisten = \"127.0.0.1:0\"\ntls = {tls}\n[internal]\nlisten = \"127.0.0.1:0\"\ntls = {tls}\n",
        common("task")
    );
    let task = started(&site, "gse_task", &task_text).await;
    let api_text = format!(
        "tls = {tls}\n{}[upstreams]\ntask = [\"{}\"]\n",
        common("api"),
        task.address("internal")
    );
    let api = started(&site, "gse_api", &api_text).await;
    let (cert, key) = site.agent_certificate(AGENT).unwrap();
    let mut command = Command::new(binary("gse_agent").unwrap());
    for set in [
        format!("agent_id=\"{AGENT}\""),
        "cloud_id=0".into(),
        "addresses=[\"10.1.1.1\"]".into(),
        format!("servers=[\"{}\"]", task.address("agents")),
        format!("data_dir={dir}/canary-agent"),
        format!("tls.ca={certs}/gseca.crt"),
        format!("tls.cert={}", cert.display()),
        format!("tls.key={}", key.display()),
        "log.level=trace".into(),
        "ops.listen=".into(),
    ] {
        command.args(["--set", &set]);
    }
    let agent = Child::spawn("gse_agent", command, &site.path().join("gse_agent.log")).unwrap();
    let front = api.address("http").to_owned();
    let client = Api::new(&front, "bk_job", APP_SECRET);
    gse_tests::eventually("the agent is there", Duration::from_secs(15), || async {
        (client.agent_state(AGENT).await["status_code"] == 2).then_some(())
    })
    .await;

    let mut answers = String::new();
    // One that works, with a secret in the script and another on its command line; the script does not print them.
    let mut body = script_body(
        &[AGENT],
        "root",
        &format!("#!/bin/sh\nX={CONTENT}\ntest -n \"$1\" && echo fine\n"),
        60,
    );
    let command = format!("{} {PARAMETER}", body["atomic_tasks"][0]["command"].as_str().unwrap());
    body["atomic_tasks"][0]["command"] = json!(command);
    let id = client.submit(&body).await;
    let rows = client.finished(&id, &[AGENT], Duration::from_secs(30)).await;
    assert_eq!(rows[0]["screen"], "fine\n");
    answers.push_str(&json!(rows).to_string());
    // One with a password, which is refused in its row; and others that go wrong in every way, by both doors and HTTP versions.
    let mut with_pwd = body.clone();
    with_pwd["agents"][0]["pwd"] = json!(PWD);
    let id = client.submit(&with_pwd).await;
    answers.push_str(&json!(client.finished(&id, &[AGENT], Duration::from_secs(30)).await).to_string());
    let submit = format!("{EXT}/async_execute_script");
    for address in [&front, &task.address("http").to_owned()] {
        for broken in [
            with_pwd.to_string().replace("\"agents\"", "\"agents\":5,\"x\""),
            with_pwd.to_string().replace("60", "\"x\""),
        ] {
            let reply = Api::new(address, "bk_job", APP_SECRET)
                .post_text(&submit, &broken)
                .await;
            answers.push_str(&reply.to_string());
        }
        let wrong = Api::new(address, "bk_job", &format!("{TOKEN}-wrong"));
        answers.push_str(&wrong.post(&submit, &with_pwd).await.to_string());
        let gateway = Api::new(address, "bk_job", APP_SECRET)
            .without("x-bkapi-authorization")
            .with("x-bkapi-jwt", &format!("eyJhbGciOiJIUzUxMiJ9.{TOKEN}.x"));
        answers.push_str(&gateway.post(&submit, &with_pwd).await.to_string());
        // HTTP/2 with prior knowledge, whose library logs frames at its lowest level.
        let credentials = json!({"bk_app_code": "bk_job", "bk_app_secret": APP_SECRET}).to_string();
        let curl = Command::new("curl")
            .args(["-sS", "--http2-prior-knowledge", "-X", "POST", "-H"])
            .arg(format!("X-Bkapi-Authorization: {credentials}"))
            .args(["-d", &with_pwd.to_string(), &format!("http://{address}{submit}")])
            .output();
        if let Ok(done) = curl {
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
            answers.push_str(&String::from_utf8_lossy(&done.stdout));
        }
    }

    let keys = key_lines(&site.path().join("certs"));
    clean("an answer", answers.as_bytes(), &keys);
    for child in [&store, &task, &api, &agent] {
        let log = child.log();
        assert!(!log.is_empty(), "{} logs", child.name);
        // The store's front has nothing to say at that level.
        assert!(
            child.name == "gse_dba" || log.contains("TRACE"),
            "{} logs at its lowest level",
            child.name
        );
        clean(&format!("the log of {}", child.name), log.as_bytes(), &keys);
        // What everybody on the host may read, and what only root may.
        for file in ["cmdline", "environ"] {
            let bytes = std::fs::read(format!("/proc/{}/{file}", child.pid())).unwrap();
            clean(&format!("{file} of {}", child.name), &bytes, &keys);
        }
    }
    for child in [&store, &task, &api] {
        let figures = format!("{:?}", Figures::of(child).await.unwrap());
        clean(&format!("the metrics of {}", child.name), figures.as_bytes(), &keys);
        let file = site.path().join(format!("{}.toml", child.name));
        let text = printed(&child.name, &file);
        clean(&format!("--print-config of {}", child.name), text.as_bytes(), &keys);
        assert!(text.contains("***"), "the masked form is shown: {text}");
    }
    for trail in ["canary-task.jsonl", "canary-api.jsonl"] {
        clean(trail, &std::fs::read(site.path().join(trail)).unwrap(), &keys);
    }
    // The store: every value there is, and its files after the scripts were done with.
    let store_url = url.clone();
    let values = tokio::task::spawn_blocking(move || {
        let mut link = redis::Client::open(store_url).unwrap().get_connection().unwrap();
        let names: Vec<Vec<u8>> = redis::cmd("KEYS").arg("*").query(&mut link).unwrap();
        let mut all = Vec::new();
        for name in names {
            all.extend_from_slice(&name);
            let kind: String = redis::cmd("TYPE").arg(&name).query(&mut link).unwrap();
            let values: Vec<Vec<u8>> = match kind.as_str() {
                "string" => vec![redis::cmd("GET").arg(&name).query(&mut link).unwrap()],
                "hash" => redis::cmd("HGETALL").arg(&name).query(&mut link).unwrap(),
                "set" => redis::cmd("SMEMBERS").arg(&name).query(&mut link).unwrap(),
                _ => redis::cmd("ZRANGE")
                    .arg(&name)
                    .arg("0")
                    .arg("-1")
                    .query(&mut link)
                    .unwrap(),
            };
            all.extend(values.into_iter().flatten());
        }
        all
    })
    .await
    .unwrap();
    assert!(values.len() > 500, "there is something in the store");
    clean("the store", &values, &keys);
}
