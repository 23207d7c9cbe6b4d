//! `gse data` and `gse route` beside a real `gse up`: a record travels from this machine's agent to a file.

#![allow(clippy::unwrap_used)]
// Shared with tests that use more of it.
#![allow(dead_code)]

mod common;

use std::process::Stdio;

use common::{Up, eventually, finish, gse, soon};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr};

#[tokio::test(flavor = "multi_thread")]
async fn a_record_travels_to_a_file_and_a_route_is_made_shown_and_removed() {
    let temp = tempfile::tempdir().unwrap();
    let up = Up::start(&temp.path().join("data")).await;
    assert!(up.text.contains("gse_data HTTP"), "{}", up.text);
    let sent = up.gse(&["data", "send", "1430", "hello"]).await;
    assert_eq!(sent.code, Some(0), "{sent:?}");
    let file = up.data.join("data/files/1430.log");
    let content = eventually("the record is in its file", || async { std::fs::read(&file).ok() }).await;
    assert_eq!(content, b"hello\n");
    let figures = up.gse(&["data", "ls"]).await;
    assert!(
        figures.out.contains("1430") && figures.out.contains("no route"),
        "{figures:?}"
    );
    assert!(figures.err.contains("gse route add"), "{figures:?}");

    let stream = up
        .gse(&["route", "stream", r#"{"name":"here","report_mode":"file"}"#])
        .await;
    let stream = stream.out.trim().to_owned();
    let added = up.gse(&["route", "add", "1001", "--stream", &stream]).await;
    assert_eq!((added.code, added.out.as_str()), (Some(0), "1001\n"), "{added:?}");
    let minted = up.gse(&["route", "add", "--stream", &stream, "--name", "x"]).await;
    assert_eq!(minted.out.trim(), "1500000", "{minted:?}");
    let list = up.gse(&["route", "ls"]).await;
    assert!(
        list.out.contains("(here, file)") && list.out.contains("1500000"),
        "{list:?}"
    );
    let shown = up.gse(&["route", "show", "1001"]).await;
    assert!(shown.out.contains("\"channel_id\": 1001"), "{shown:?}");
    assert_eq!(up.gse(&["route", "rm", "1001"]).await.code, Some(0));
    let gone = up.gse(&["route", "show", "1001"]).await;
    assert_eq!(gone.code, Some(2), "{gone:?}");
    assert!(gone.err.contains("not found"), "{gone:?}");

    let wrong = up
        .gse(&["data", "send", "--socket", "/nowhere/x", "1430", "hello"])
        .await;
    assert_eq!((wrong.code, wrong.err.lines().count()), (Some(2), 1), "{wrong:?}");
    let kafka = r#"{"name":"k","report_mode":"kafka","kafka":{"storage_address":[]}}"#;
    let refused = up.gse(&["route", "stream", kafka]).await;
    assert_eq!(refused.code, Some(2));
    assert!(refused.err.contains("storage_address"), "{refused:?}");
    up.stop().await;
}

/// A tail that is in place.
struct Tail {
    child: Child,
    notes: Lines<BufReader<ChildStderr>>,
}

impl Tail {
    async fn start(up: &Up, args: &[&str]) -> Self {
        let mut child = gse(&up.data)
            .args(["data", "tail"])
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut notes = BufReader::new(child.stderr.take().unwrap()).lines();
        let first = soon(notes.next_line()).await.unwrap().unwrap_or_default();
        assert!(first.contains("waiting for records"), "{first}");
        Self { child, notes }
    }

    /// The next lines it prints.
    async fn lines(&mut self, count: usize) -> String {
        let mut out = BufReader::new(self.child.stdout.as_mut().unwrap()).lines();
        let mut text = String::new();
        while text.lines().count() < count {
            text += &soon(out.next_line()).await.unwrap().expect("the tail goes on");
            text.push('\n');
        }
        text
    }

    /// What it still prints until its end, and how that is.
    async fn ended(mut self) -> (Option<i32>, String) {
        let mut text = String::new();
        let out = self.child.stdout.as_mut().unwrap();
        soon(out.read_to_string(&mut text)).await.unwrap();
        (soon(self.child.wait()).await.unwrap().code(), text)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tail_shows_records_as_they_come() {
    let temp = tempfile::tempdir().unwrap();
    let up = Up::start(&temp.path().join("data")).await;
    let missed = up.gse(&["data", "send", "1430", "before"]).await;
    assert_eq!(missed.code, Some(0), "{missed:?}");
    let file = up.data.join("data/files/1430.log");
    eventually("the first record is there", || async { std::fs::read(&file).ok() }).await;

    let mut tail = Tail::start(&up, &["1430"]).await;
    let two = Tail::start(&up, &["-n", "2", "-o", "json", "1430"]).await;
    for (id, text) in [("1431", "other"), ("1430", "hello"), ("1430", r#"{"b":[1.50],"a":{}}"#)] {
        let sent = up.gse(&["data", "send", id, text]).await;
        assert_eq!(sent.code, Some(0), "{sent:?}");
    }
    let shown = tail.lines(7).await;
    assert_eq!(shown, "hello\n{\n  \"b\": [\n    1.50\n  ],\n  \"a\": {}\n}\n");
    let (code, text) = two.ended().await;
    assert_eq!(code, Some(0), "{text}");
    let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert_eq!(
        (&lines[0]["data_id"], &lines[0]["text"]),
        (&1430.into(), &"hello".into())
    );
    assert!(lines[0]["utctime"].as_u64().unwrap() > 1_600_000_000, "{text}");

    kill(
        Pid::from_raw(tail.child.id().unwrap().try_into().unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    assert_eq!(tail.ended().await, (Some(0), String::new()));

    let audit = up.gse(&["audit", "-o", "json", "--last", "0"]).await;
    let looks = audit
        .out
        .lines()
        .filter(|line| line.contains("data.read") && line.contains("1430"))
        .count();
    assert_eq!(looks, 2, "{audit:?}");
    let zero = up.gse(&["data", "tail", "0"]).await;
    assert_eq!(zero.code, Some(2), "{zero:?}");
    let mut stranger = gse(&up.data);
    stranger.env("GSE_APP_SECRET", "wrong");
    let refused = finish(stranger.args(["data", "tail", "--app", "gse-local", "1430"])).await;
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(
        refused.err.contains("GSE_APP_SECRET") && refused.out.is_empty(),
        "{refused:?}"
    );

    // A tail holds nothing up.
    let mut last = Tail::start(&up, &["1430"]).await;
    let begun = tokio::time::Instant::now();
    assert!(up.stop().await.success());
    assert!(begun.elapsed().as_secs() < 8, "stopping took {:?}", begun.elapsed());
    let note = soon(last.notes.next_line()).await.unwrap().unwrap_or_default();
    assert!(note.contains("interrupted"), "{note}");
    kill(
        Pid::from_raw(last.child.id().unwrap().try_into().unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    assert_eq!(last.ended().await.0, Some(0));
}
