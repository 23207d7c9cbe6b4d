//! `gse data` and `gse route` beside a real `gse up`: a record travels from this machine's agent to a file.

#![allow(clippy::unwrap_used)]
// Shared with tests that use more of it.
#![allow(dead_code)]

mod common;

use common::{Up, eventually};

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
