//! `gse cp` and `gse xfer` as an operator types them, against real servers and agents.
#![allow(clippy::unwrap_used)] // a test ends by panicking

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use gse_tests::process::binary;
use gse_tests::site::{APP, SECRET};
use gse_tests::{Child, Site, StoreKind, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

const LIMIT: Duration = Duration::from_secs(30);
const NOBODY: &str = "02000000nobody";

/// What a command printed and how it ended.
#[derive(Debug)]
struct Done {
    code: Option<i32>,
    out: String,
    err: String,
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

struct Cli {
    site: Site,
    agents: Vec<Child>,
    ids: Vec<String>,
}

impl Cli {
    async fn start(agents: usize) -> Self {
        let site = Site::with_files(StoreKind::Embedded).await.unwrap();
        let ids: Vec<String> = (0..agents).map(|n| format!("02000000cli{n}")).collect();
        let children = ids
            .iter()
            .enumerate()
            .map(|(n, id)| site.spawn_file_agent(id, &format!("10.3.0.{}", n + 1), &[]).unwrap())
            .collect();
        for id in &ids {
            site.wait_state(id, 2).await;
        }
        Self {
            site,
            agents: children,
            ids,
        }
    }

    /// The command as an application of this site; nothing of `gse up` is there.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary("gse").unwrap());
        command
            .args(args)
            .env("GSE_DATA", self.site.path().join("no-data"))
            .env("GSE_API", format!("http://{}", self.site.api().address))
            .env("GSE_APP_CODE", APP)
            .env("GSE_APP_SECRET", SECRET)
            .env_remove("GSE_CA")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    async fn gse(&self, args: &[&str]) -> Done {
        let output = self.command(args).output();
        tokio::time::timeout(LIMIT, output)
            .await
            .expect("the command ends")
            .unwrap()
            .into()
    }

    async fn json(&self, args: &[&str]) -> (Option<i32>, Value) {
        let mut words = args.to_vec();
        words.extend(["--output", "json"]);
        let done = self.gse(&words).await;
        let value = serde_json::from_str(&done.out).unwrap_or_else(|error| panic!("{error}: {done:?}"));
        (done.code, value)
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o7777
}

#[tokio::test]
async fn small_files_of_this_machine_go_to_all_that_are_named() {
    let cli = Cli::start(2).await;
    let dir = tempfile::tempdir().unwrap();
    for name in ["one", "two", "empty"] {
        std::fs::write(dir.path().join(name), name.trim_start_matches("empty")).unwrap();
    }
    let one = dir.path().join("one");
    std::fs::set_permissions(&one, PermissionsExt::from_mode(0o750)).unwrap();
    let (two, empty) = (dir.path().join("two"), dir.path().join("empty"));

    // One by its id, one by its place, to a directory that is made. Both are this host, so that they write the same files.
    let to = dir.path().join("made/for it");
    let target = format!("{},0:10.3.0.2:{}", cli.ids[0], text(&to));
    let done = cli.gse(&["cp", text(&one), text(&two), text(&empty), &target]).await;
    assert_eq!((done.code, done.out.as_str()), (Some(0), ""), "{done:?}");
    assert_eq!(done.err.trim_end(), "gse: 6 of 6 copies made", "{done:?}");
    for (name, content, bits) in [
        ("one", "one", 0o750),
        ("two", "two", mode(&two)),
        ("empty", "", mode(&empty)),
    ] {
        let file = to.join(name);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), content);
        assert_eq!(mode(&file), bits, "{name}");
    }

    // All that are connected; a mode of one's own.
    let to = dir.path().join("all");
    let (code, report) = cli
        .json(&["cp", "--mode", "0600", text(&one), &format!("all:{}", text(&to))])
        .await;
    assert_eq!((code, &report["exit_status"]), (Some(0), &Value::from(0)), "{report}");
    let mut targets: Vec<&str> = report["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["content"]["dest_agent_id"].as_str().unwrap())
        .collect();
    targets.sort_unstable();
    assert_eq!(targets, cli.ids);
    assert_eq!(mode(&to.join("one")), 0o600);

    // A directory that is not there, and a host that is not.
    let missing = dir.path().join("missing");
    let target = format!("{}:{}", cli.ids[0], text(&missing));
    let done = cli.gse(&["cp", "--no-mkdir", text(&one), &target]).await;
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(
        done.err.contains("0 of 1 copies made, 1 failed") && done.err.contains(&format!("{}: ", cli.ids[0])),
        "{done:?}"
    );
    assert!(!missing.exists());
    let target = format!("{},{NOBODY}:{}", cli.ids[0], text(&to));
    let done = cli.gse(&["cp", text(&two), &target]).await;
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(
        done.err.contains("1 of 2 copies made, 1 failed") && done.err.contains(&format!("{NOBODY}: ")),
        "{done:?}"
    );
    assert!(done.err.contains("error 117"), "{done:?}");
    assert_eq!(std::fs::read_to_string(to.join("two")).unwrap(), "two");
}

#[tokio::test]
async fn what_an_agent_has_goes_from_there() {
    let cli = Cli::start(3).await;
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("src");
    std::fs::create_dir_all(source.join("sub")).unwrap();
    let large = vec![0xa5_u8; 3 << 20];
    std::fs::write(source.join("large"), &large).unwrap();
    std::fs::write(source.join("sub/small"), "small").unwrap();
    let (from, rest) = (&cli.ids[0], cli.ids[1..].join(","));

    // A file, a directory and a pattern.
    let to = dir.path().join("t1");
    let (file, tree) = (
        format!("{from}:{}/large", text(&source)),
        format!("{from}:{}/", text(&source)),
    );
    let (code, report) = cli.json(&["cp", &file, &tree, &format!("{rest}:{}", text(&to))]).await;
    assert_eq!(code, Some(0), "{report:#}");
    // Two sources, each to two targets.
    assert_eq!(report["rows"].as_array().unwrap().len(), 6, "{report:#}");
    assert!(std::fs::read(to.join("large")).unwrap() == large);
    assert!(std::fs::read(to.join("src/large")).unwrap() == large);
    assert_eq!(std::fs::read_to_string(to.join("src/sub/small")).unwrap(), "small");
    let to = dir.path().join("t2");
    let pattern = format!("{from}:{}/lar*", text(&source));
    let done = cli.gse(&["cp", &pattern, &format!("{rest}:{}", text(&to))]).await;
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(std::fs::read(to.join("large")).unwrap() == large);

    // A target that is not there costs its own copy alone; a source that is not there, all of them.
    let to = dir.path().join("t4");
    let done = cli
        .gse(&["cp", &file, &format!("{},{NOBODY}:{}", cli.ids[1], text(&to))])
        .await;
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(
        done.err.contains("1 of 2 copies made, 1 failed") && done.err.contains(&format!("{NOBODY}: ")),
        "{done:?}"
    );
    assert!(std::fs::read(to.join("large")).unwrap() == large);
    let absent = format!("{from}:{}/absent", text(&source));
    let done = cli.gse(&["cp", &absent, &format!("{rest}:{}", text(&to))]).await;
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(
        done.err.contains("0 of 2 copies made") && done.err.contains("/absent"),
        "{done:?}"
    );

    // A file of this machine that is too large for the call: not without the agent of this machine.
    let local = source.join("large");
    let to = dir.path().join("t3");
    let target = format!("{}:{}", cli.ids[1], text(&to));
    let done = cli.gse(&["cp", text(&local), &target]).await;
    assert_eq!(done.code, Some(2), "{done:?}");
    assert!(
        done.err.contains("--from AGENT") && done.err.contains(&format!("AGENT:{}", text(&local))),
        "{done:?}"
    );
    let done = cli.gse(&["cp", "--from", from, text(&local), &target]).await;
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(std::fs::read(to.join("large")).unwrap() == large);

    // Wrong usage is no failed copy.
    for wrong in [
        &["cp", text(&local)][..],
        &["cp", text(&local), "nowhere"],
        &["cp", "/nonexistent/x", "a:/to"],
    ] {
        assert_eq!(cli.gse(wrong).await.code, Some(2), "{wrong:?}");
    }
}

#[tokio::test]
async fn a_copy_is_listed_shown_and_stopped() {
    let cli = Cli::start(3).await;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("large"), vec![0x5a_u8; 40 << 20]).unwrap();
    let file = format!("{}:{}", cli.ids[0], text(&dir.path().join("large")));
    let to = |n: usize| format!("{}:{}", cli.ids[n], text(&dir.path().join(format!("t{n}"))));
    let slow = ["cp", "--limit", "1"];

    assert!(cli.gse(&["xfer", "ls"]).await.err.contains("no files are on their way"));
    let done = cli.gse(&[&slow[..], &["--detach", &file, &to(1)]].concat()).await;
    assert_eq!(done.code, Some(0), "{done:?}");
    let task = done.out.trim_end().to_owned();
    let moving = async || {
        let (_, report) = cli.json(&["xfer", "show", &task]).await;
        (report["rows"][1]["content"]["progress"].as_u64()? > 0).then_some(report)
    };
    let report = eventually("it moves", LIMIT, moving).await;
    assert_eq!(report["rows"][1]["error_code"], 115, "{report:#}");
    let shown = cli.gse(&["xfer", "show", &task]).await;
    assert_eq!(shown.code, Some(0), "{shown:?}");
    let line = shown.out.lines().find(|line| line.contains(&cli.ids[1])).unwrap();
    assert!(
        line.starts_with("to ") && line.contains("t1/large") && line.contains("40.0 MiB") && line.contains('%'),
        "{shown:?}"
    );
    let list = cli.gse(&["xfer", "ls"]).await;
    assert!(list.out.contains(&task) && list.out.contains(APP), "{list:?}");
    let (_, list) = cli.json(&["xfer", "ls"]).await;
    assert_eq!(
        (&list[0]["task_id"], &list[0]["downloads"]),
        (&Value::from(task.as_str()), &Value::from(1))
    );

    let stopped = cli.gse(&["xfer", "stop", &task]).await;
    assert_eq!(stopped.code, Some(0), "{stopped:?}");
    let over = async || {
        let (_, report) = cli.json(&["xfer", "show", &task]).await;
        let rows = report["rows"].as_array()?.iter();
        rows.map(|row| &row["error_code"]).all(|code| code == 126).then_some(())
    };
    eventually("it is stopped", LIMIT, over).await;
    let shown = cli.gse(&["xfer", "show", &task]).await;
    assert!(shown.out.contains("error 126"), "{shown:?}");
    assert!(!dir.path().join("t1/large").exists());
    let unknown = cli.gse(&["xfer", "show", "GSETASK:F:20200101000000:1"]).await;
    assert_eq!(unknown.code, Some(2), "{unknown:?}");

    // Ctrl-C: the task is named and stopped, and the command says how it ended.
    let mut child = cli.command(&[&slow[..], &[&file, &to(2)]].concat()).spawn().unwrap();
    let started = async || {
        let (_, list) = cli.json(&["xfer", "ls"]).await;
        Some(list.as_array()?.first()?["task_id"].as_str()?.to_owned())
    };
    let task = eventually("it is under way", LIMIT, started).await;
    kill(Pid::from_raw(child.id().unwrap().try_into().unwrap()), Signal::SIGINT).unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let said = tokio::time::timeout(LIMIT, lines.next_line())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(said.contains(&task) && said.contains("Ctrl-C again"), "{said}");
    let status = tokio::time::timeout(LIMIT, child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(1));
    let said = lines.next_line().await.unwrap().unwrap();
    assert!(said.contains("0 of 1 copies made, 1 failed"), "{said}");
    assert_eq!(cli.agents.len(), 3);
}
