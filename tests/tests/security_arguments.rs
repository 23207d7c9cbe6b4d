//! What a caller sends is data until a shell is asked for: arguments, contents and names arrive byte for byte and are never run.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::Duration;

use gse_tests::api::EXT;
use gse_tests::{Site, StoreKind, script_body};
use serde_json::json;

const AGENT: &str = "020000000242010a00002f17521298676501";

/// One word for a POSIX shell, whatever is in it.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

// contract: reliability#S6
#[tokio::test]
async fn arguments_and_contents_arrive_byte_for_byte() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let _agent = site.agent(AGENT, "10.1.1.1").await.unwrap();
    let api = site.api();
    let (got, mark) = (site.path().join("got"), site.path().join("mark"));
    let touch = format!("touch {}", mark.display());
    let arguments = [
        String::new(),
        " ".into(),
        "-rf".into(),
        "--".into(),
        "-".into(),
        format!("; {touch}"),
        format!("$({touch})"),
        format!("`{touch}`"),
        format!("| {touch} &"),
        format!("x\n{touch}\n"),
        "a\tb\r\nc".into(),
        "\"'\\\\'\"".into(),
        "*?[a-z]~{1..3}!$HOME${PATH}%s%n".into(),
        "\u{1}\u{7f}\u{1b}[31m".into(),
        "界🦀\u{202e}".into(),
        "<>()&&||#".into(),
        "long ".repeat(15_000),
    ];
    let mut body = script_body(
        &[AGENT],
        "root",
        &format!("#!/bin/sh\nprintf '%s\\0' \"$@\" > {}\n", got.display()),
        60,
    );
    let script = body["atomic_tasks"][0]["command"].as_str().unwrap().to_owned();
    let words: Vec<String> = arguments.iter().map(|text| quoted(text)).collect();
    body["atomic_tasks"][0]["command"] = json!(format!("{script} {}", words.join(" ")));
    let task = api.submit(&body).await;
    let rows = api.finished(&task, &[AGENT], Duration::from_secs(30)).await;
    assert_eq!(rows[0]["status"], 2, "{rows:?}");
    let expected: String = arguments.iter().flat_map(|text| [text.as_str(), "\0"]).collect();
    assert!(
        std::fs::read(&got).unwrap() == expected.as_bytes(),
        "arguments have changed on the way"
    );
    assert!(!mark.exists(), "an argument was run");
    // The file is the account's own, and what was sent is in it.
    let meta = std::fs::metadata(&script).unwrap();
    assert_eq!((meta.permissions().mode() & 0o7777, meta.uid()), (0o700, 0));
    assert_eq!(
        std::fs::read_to_string(&script).unwrap(),
        body["scripts"][0]["script_content"].as_str().unwrap()
    );

    // As long as a command can be, and longer.
    for (length, code) in [(128 * 1024 - 1, 0), (128 * 1024, 1_000_106)] {
        let mut long = body.clone();
        let padding = length - script.len() - 1;
        long["atomic_tasks"][0]["command"] = json!(format!("{script} {}", "y".repeat(padding)));
        let reply = api.post(&format!("{EXT}/async_execute_script"), &long).await;
        assert_eq!(reply["code"], code, "{length}");
        if code == 0 {
            let task = reply["data"]["result"]["task_id"].as_str().unwrap().to_owned();
            let rows = api.finished(&task, &[AGENT], Duration::from_secs(30)).await;
            assert_eq!(rows[0]["status"], 2, "{rows:?}");
            assert_eq!(std::fs::metadata(&got).unwrap().len() as usize, padding + 1);
        }
    }

    // Content of a script: no end of line, other ends of line, 128 KiB of anything that is text.
    let content = format!(
        "#!/bin/sh\r\n# \u{1}\u{7f}界\n: {}\nexit 0\n# {}",
        quoted("$(x)`\\"),
        "z".repeat(128 << 10)
    );
    let mut sent = script_body(&[AGENT], "root", &content, 60);
    let name = sent["atomic_tasks"][0]["command"].as_str().unwrap().to_owned();
    sent["atomic_tasks"][0]["command"] = json!(format!("sha256sum {name}"));
    let task = api.submit(&sent).await;
    let rows = api.finished(&task, &[AGENT], Duration::from_secs(30)).await;
    let sum = hex::encode(<sha2::Sha256 as sha2::Digest>::digest(content.as_bytes()));
    assert!(rows[0]["screen"].as_str().unwrap().starts_with(&sum), "{rows:?}");
    assert_eq!(std::fs::metadata(&name).unwrap().permissions().mode() & 0o7777, 0o700);

    // Names are no shell's business: accounts, files, directories.
    for (field, value) in [
        ("user", format!("root; {touch}")),
        ("user", format!("$({touch})")),
        ("script_name", format!("x;{touch};.sh")),
        ("script_name", "../../x.sh".into()),
        ("script_store_dir", format!("/tmp/bkgse-tests/$({touch})")),
        ("script_store_dir", "/tmp/bkgse-tests/../../etc/x".into()),
    ] {
        let mut odd = script_body(&[AGENT], "root", "#!/bin/sh\nexit 0\n", 60);
        match field {
            "user" => odd["agents"][0]["user"] = json!(value),
            _ => odd["scripts"][0][field] = json!(value),
        }
        let reply = api.post(&format!("{EXT}/async_execute_script"), &odd).await;
        if reply["code"] == 0 {
            let task = reply["data"]["result"]["task_id"].as_str().unwrap().to_owned();
            api.finished(&task, &[AGENT], Duration::from_secs(30)).await;
        }
        assert!(!mark.exists(), "{field} {value:?} was run");
        assert!(
            !std::path::Path::new("/etc/x").exists(),
            "{field} {value:?} left its directory"
        );
    }
}
