//! gse_btsvr as a member of swarms: content of calls that it offers itself, and content that it has kept.
#![allow(clippy::unwrap_used)] // a test ends by panicking

use std::path::Path;
use std::time::Duration;

use gse_tests::files::{codes, path_text, push_body, random_bytes, transfer_body, transfer_task};
use gse_tests::{Child, Site, eventually};

const LIMIT: Duration = Duration::from_secs(40);

/// A site with so many agents whose gse_btsvr keeps content in a directory; more settings of it.
async fn site(agents: usize, dir: &Path, sets: &[&str]) -> (Site, Vec<Child>, Vec<String>) {
    let cache = format!("cache.dir={}", path_text(dir));
    let mut all = vec![cache.as_str(), "peer.listen=127.0.0.1:0"];
    all.extend(sets);
    Site::with_file_agents(agents, &all, &[]).await.unwrap()
}

/// Entries of a cache that have all their content.
fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[tokio::test]
async fn a_large_push_goes_through_a_swarm_of_which_the_server_is_the_source() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    // A slow server, so that few targets are many.
    let slow = ["path.server_rate=200000", "path.swarm_start_ms=1"];
    let (site, _agents, ids) = site(4, &cache, &slow).await;
    let api = site.api();
    let content = "0123456789abcdef".repeat(6_000);
    let targets: Vec<&str> = ids.iter().map(String::as_str).collect();
    // All of them are on this host, so each call has a directory of its own.
    for (round, targets) in targets.chunks(2).enumerate() {
        let to = dir.path().join(format!("t{round}"));
        let body = push_body(targets, &path_text(&to), "pushed", &content);
        let id = api.submit_files("async_push_file", &body).await;
        let rows = api.files_over(&id, LIMIT).await;
        assert_eq!(codes(&rows), [0, 0], "{rows:#?}");
        assert_eq!(std::fs::read_to_string(to.join("pushed")).unwrap(), content);
        // Kept once, for both calls.
        assert_eq!(entries(&cache), 1);
    }
}

#[tokio::test]
async fn content_that_was_kept_is_there_after_a_kill_and_when_the_source_is_slow() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let (mut site, _agents, mut ids) = site(3, &cache, &["cache.take=always"]).await;
    // 16 MiB take it 16 s.
    let slow = ["files.upload_bytes_per_s=1000000"];
    let _slow = site.file_agent("02000000slow", "10.2.0.9", &slow).await.unwrap();
    ids.push("02000000slow".into());
    let content = random_bytes(16 << 20);
    let from = dir.path().join("from");
    std::fs::create_dir(&from).unwrap();
    std::fs::write(from.join("large"), &content).unwrap();
    let task = |source: usize, target: usize, n: u32| {
        let to = path_text(&dir.path().join(format!("t{n}"))) + "/";
        let one = transfer_task(&ids[source], &path_text(&from), "large", &[&ids[target]], &to);
        transfer_body(&[one], 90)
    };
    let id = site.api().submit_files("async_transfer_file", &task(0, 1, 1)).await;
    let rows = site.api().files_over(&id, LIMIT).await;
    assert_eq!(codes(&rows), [0, 0], "{rows:#?}");
    let api = site.api();
    // Once more if the transfer was over before the copy was.
    eventually("a whole copy", LIMIT, || async {
        let id = api.submit_files("async_transfer_file", &task(0, 1, 2)).await;
        api.files_over(&id, LIMIT).await;
        let map = std::fs::read_dir(&cache).ok()?.next()?.ok()?.path().join("map");
        // 256 pieces: the last bytes of the set of pieces are all ones.
        let bytes = std::fs::read(map).ok()?;
        bytes.windows(32).any(|part| part == [0xff; 32]).then_some(())
    })
    .await;
    site.btsvr.get_mut(&1).unwrap().kill_9();
    site.start_btsvr(1).await.unwrap();
    // The same content from a source that would take 16 s, to a host that has nothing of it: most of it comes from the server.
    let begun = std::time::Instant::now();
    let id = site.api().submit_files("async_transfer_file", &task(3, 2, 3)).await;
    let rows = site.api().files_over(&id, LIMIT).await;
    assert_eq!(codes(&rows), [0, 0], "{rows:#?}");
    assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
    assert!(std::fs::read(dir.path().join("t3/large")).unwrap() == content);
}
