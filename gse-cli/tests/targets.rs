//! A command line that names no target by mistake reaches nobody.

use std::process::Command;

#[test]
fn an_empty_target_is_an_error_before_anybody_is_asked() {
    let data = tempfile::tempdir().unwrap();
    let task = "GSETASK:S:20250101000000:1000000";
    let file = data.path().join("file");
    std::fs::write(&file, "content").unwrap();
    let file = file.to_str().unwrap();
    for target in ["", ",", "0:10.0.0.1,"] {
        let place = format!("{target}:/tmp");
        for words in [
            &["run", "-t", target, "true"][..],
            &["stop", "-t", target, task],
            &["cp", file, &place],
            &["xfer", "stop", "-t", target, task],
        ] {
            let done = Command::new(env!("CARGO_BIN_EXE_gse"))
                .args(words)
                .env("GSE_DATA", data.path())
                // Nobody listens there.
                .env("GSE_API", "http://127.0.0.1:1")
                .output()
                .unwrap();
            let said = String::from_utf8(done.stderr).unwrap();
            assert_eq!(done.status.code(), Some(2), "{words:?}: {said}");
            assert!(
                said.contains("empty target") && said.lines().count() == 1,
                "{words:?}: {said}"
            );
        }
    }
}
