//! `gse proc` as an operator types it.

use std::process::{Output, Stdio};

use gse_tests::Site;
use gse_tests::plugins::{Plugin, daemon};
use gse_tests::process::binary;
use gse_tests::site::{APP, SECRET};
use serde_json::{Value, json};
use tokio::process::Command;

use super::{AGENT, PATIENCE, only, site};

async fn gse(site: &Site, args: &[&str]) -> Output {
    let mut command = Command::new(binary("gse").unwrap());
    command
        .arg("proc")
        .args(args)
        .env("GSE_DATA", site.path().join("no-data"))
        .env("GSE_API", format!("http://{}", site.api().address))
        .env("GSE_APP_CODE", APP)
        .env("GSE_APP_SECRET", SECRET)
        .env_remove("GSE_CA")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    tokio::time::timeout(PATIENCE * 2, command.output())
        .await
        .expect("it ends")
        .unwrap()
}

/// The exit status and what was printed.
async fn text(site: &Site, args: &[&str]) -> (Option<i32>, String) {
    let output = gse(site, args).await;
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    (output.status.code(), text)
}

async fn json(site: &Site, args: &[&str]) -> (Option<i32>, Value) {
    let output = gse(site, &[args, &["-o", "json"]].concat()).await;
    let value = serde_json::from_slice(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    (
        output.status.code(),
        value.unwrap_or_else(|why| panic!("{why}: {error}")),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_from_its_registration_to_its_end() {
    let (site, _agent) = site().await;
    let plugin = Plugin::install(site.path(), "web", "web", daemon::PLAIN);
    let file = site.path().join("web.json");
    std::fs::write(&file, plugin.spec(&json!({})).to_string()).unwrap();
    let file = file.to_str().unwrap();

    let (code, out) = text(&site, &["status", "web"]).await;
    assert!(code == Some(1) && out.contains("not running"), "{code:?} {out}");
    let (code, out) = text(&site, &["register", "web", "--spec", file, "-t", AGENT]).await;
    assert!(code == Some(0) && out.contains("registered"), "{code:?} {out}");
    assert!(plugin.alive().is_empty());
    // Everything else is known from then on.
    let (code, out) = text(&site, &["start", "web"]).await;
    assert!(code == Some(0) && out.contains("started"), "{code:?} {out}");
    let pid = only(&plugin);
    let (code, out) = text(&site, &["start", "web"]).await;
    assert!(code == Some(0) && out.contains("ran already"), "{code:?} {out}");
    let (code, report) = json(&site, &["status", "web"]).await;
    let row = &report["rows"][0];
    assert_eq!(
        (code, &row["process"]["pid"], &row["process"]["isAuto"]),
        (Some(0), &json!(pid), &json!(true)),
        "{report}"
    );
    assert_eq!(
        (&row["agent"], &row["namespace"], &row["name"]),
        (&json!(AGENT), &json!("gse"), &json!("web"))
    );

    let listed = gse_tests::eventually("it is listed as running", PATIENCE, || async {
        let (code, list) = json(&site, &["ls", "-t", AGENT]).await;
        assert_eq!(code, Some(0));
        let found = list
            .as_array()?
            .iter()
            .find(|info| info["meta"]["name"] == "web")?
            .clone();
        (found["status"] == 1 && found["version"] == "1.2.3").then_some(found)
    })
    .await;
    assert_eq!(
        (&listed["pid"], &listed["bk_agent_id"]),
        (&json!(pid), &json!(AGENT)),
        "{listed}"
    );
    let (_, out) = text(&site, &["ls", "-n", "gse"]).await;
    assert!(out.contains("web") && out.contains("running"), "{out}");
    let (_, out) = text(&site, &["ls", "-n", "another"]).await;
    assert!(out.contains("no process is known"), "{out}");

    for (words, said) in [
        ("restart", "restarted"),
        ("reload", "reloaded"),
        ("unregister", "unregistered"),
        ("kill", "killed"),
    ] {
        let (code, out) = text(&site, &[words, "web"]).await;
        assert!(code == Some(0) && out.contains(said), "{words}: {code:?} {out}");
    }
    assert!(plugin.alive().is_empty());
    let (code, out) = text(&site, &["stop", "web"]).await;
    assert!(code == Some(0) && out.contains("did not run"), "{code:?} {out}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_goes_wrong_is_said() {
    let (site, _agent) = site().await;
    let plugin = Plugin::install(site.path(), "broken", "broken", daemon::MAYFLY);
    plugin.script("start.sh", "#!/bin/sh\necho the disk is missing >&2\nexit 4\n");
    let dir = plugin.dir.join("bin");
    let (dir, pid_file) = (dir.to_str().unwrap(), plugin.pid_file());
    let options = [
        "--proc-name",
        "broken",
        "--setup-path",
        dir,
        "--pid-path",
        pid_file.to_str().unwrap(),
        "--start-cmd",
        "./start.sh",
    ];
    let nobody = "02000000nobody";
    let start = [&["start", "broken", "-t", AGENT, "-t", nobody][..], &options].concat();
    let (code, report) = json(&site, &start).await;
    assert_eq!((code, &report["exit_status"]), (Some(1), &json!(1)), "{report}");
    let rows = report["rows"].as_array().unwrap();
    let code_of = |agent: &str| {
        let row = rows
            .iter()
            .find(|row| row["agent"] == agent)
            .unwrap_or_else(|| panic!("{report}"));
        (
            row["error_code"].as_i64().unwrap(),
            row["error_msg"].as_str().unwrap().to_owned(),
        )
    };
    assert!(
        matches!(code_of(AGENT), (65535, text) if text.contains("the disk is missing")),
        "{report}"
    );
    assert_eq!(code_of(nobody).0, 117, "{report}");
    let (code, out) = text(&site, &start).await;
    assert!(
        code == Some(1) && out.contains("error 65535: ") && out.contains("the disk is missing"),
        "{out}"
    );
    // Without a specification, of what nobody has registered.
    let (code, out) = text(&site, &["start", "unheard-of", "-t", AGENT]).await;
    assert!(code == Some(1) && out.contains("failed"), "{code:?} {out}");
    for wrong in [
        &["start", "a", "--spec", "/no/such/file"][..],
        &["start", "a", "-t", "a b"],
        &["start", ""],
    ] {
        let (code, out) = text(&site, wrong).await;
        assert!(code == Some(2) && out.starts_with("gse: "), "{wrong:?}: {code:?} {out}");
    }
}
