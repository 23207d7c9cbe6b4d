//! `gse cp` beside a real `gse up`: what does not fit into a call goes by the local agent.

#![allow(clippy::unwrap_used)]
// Shared with tests that use more of it.
#![allow(dead_code)]

mod common;

use common::{Up, gse};

#[tokio::test(flavor = "multi_thread")]
async fn a_large_file_of_this_machine_is_sent_by_its_agent() {
    let temp = tempfile::tempdir().unwrap();
    let up = Up::start(&temp.path().join("data")).await;
    let id = up.agent_id();
    assert!(up.text.contains("connected"), "{}", up.text);
    let content = vec![0xa5_u8; 300_000];
    let dir = temp.path().join("my files");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("large (1)"), &content).unwrap();
    std::fs::write(dir.join("small"), "small").unwrap();

    // Two tasks at once, named from where the user stands.
    let to = temp.path().join("to");
    let target = format!("{id}:{}", to.display());
    let mut command = gse(&up.data);
    let done = common::finish(command.current_dir(&dir).args(["cp", "large (1)", "small", &target])).await;
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(done.err.contains("2 of 2 copies made"), "{done:?}");
    assert!(std::fs::read(to.join("large (1)")).unwrap() == content);
    assert_eq!(std::fs::read_to_string(to.join("small")).unwrap(), "small");

    // A whole directory; and when the servers are others, the agent of this machine is not theirs.
    let done = up.gse(&["cp", dir.to_str().unwrap(), &target]).await;
    assert_eq!(done.code, Some(0), "{done:?}");
    assert!(std::fs::read(to.join("my files/large (1)")).unwrap() == content);
    let large = dir.join("large (1)");
    let done = up
        .gse(&["cp", "--api", "http://127.0.0.1:1", large.to_str().unwrap(), &target])
        .await;
    assert_eq!(done.code, Some(2), "{done:?}");
    assert!(done.err.contains("--from AGENT"), "{done:?}");
    up.stop().await;
}
