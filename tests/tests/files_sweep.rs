//! What a killed agent left of an order that was over before it came back: its part files and resume maps go, and nothing else does.
#![allow(clippy::unwrap_used)] // a test ends by panicking

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use gse_tests::files::{codes, part_files, path_text, random_bytes, transfer_body, transfer_task};
use gse_tests::{Api, Site, eventually};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(30);
const OPEN: i64 = 115;
const TERMINATED: i64 = 126;
/// Has the form of another order's part file.
const OTHER: &str = ".large.gse.0123456789ab-1.part";

/// A large file and a directory of three, each to a directory of its own.
struct Ground(tempfile::TempDir);

impl Ground {
    fn new() -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        std::fs::write(this.path("large"), random_bytes(12 << 20)).unwrap();
        std::fs::create_dir(this.path("tree")).unwrap();
        for n in 0..3 {
            std::fs::write(this.path("tree").join(format!("f{n}")), random_bytes((4 << 20) + n)).unwrap();
        }
        for n in 0..2 {
            std::fs::create_dir(this.at(n)).unwrap();
        }
        std::fs::write(this.at(0).join(OTHER), "of somebody else").unwrap();
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn at(&self, n: usize) -> PathBuf {
        self.path(&format!("to{n}"))
    }

    /// What is unfinished at the targets.
    fn left(&self) -> Vec<PathBuf> {
        let mut all = [part_files(&self.at(0)), part_files(&self.at(1))].concat();
        all.retain(|path| !path.ends_with(OTHER));
        all
    }

    async fn submit(&self, api: &Api, ids: &[String], timeout_s: i64) -> String {
        let tasks = [
            transfer_task(
                &ids[0],
                &path_text(self.0.path()),
                "large",
                &[&ids[1]],
                &path_text(&self.at(0)),
            ),
            transfer_task(
                &ids[0],
                &path_text(&self.path("tree")),
                "",
                &[&ids[1]],
                &path_text(&self.at(1)),
            ),
        ];
        let mut body = transfer_body(&tasks, timeout_s);
        body["download_speed"] = json!(1);
        api.submit_files("async_transfer_file", &body).await
    }

    /// Part files of both are there, and pieces of them.
    async fn until_half(&self, api: &Api, task: &str) {
        eventually("some of both", LIMIT, || async {
            let rows = api.file_rows(task).await;
            let mut downloads = rows.iter().filter(|row| row["content"]["mode"] == 1);
            let some =
                downloads.all(|row| row["content"]["progress"].as_u64() >= Some(10) && row["error_code"] == OPEN);
            some.then_some(())
        })
        .await;
        assert!(self.left().len() >= 2, "{:?}", self.left());
    }

    async fn until_swept(&self, site: &Site) {
        eventually("nothing of it is left", Duration::from_secs(15), || async {
            (self.left().is_empty() && resume_maps(site.path()).is_empty()).then_some(())
        })
        .await;
        assert_eq!(std::fs::read(self.at(0).join(OTHER)).unwrap(), b"of somebody else");
        let names = |n| {
            let names = std::fs::read_dir(self.at(n)).unwrap();
            names.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>()
        };
        assert_eq!((names(0), names(1)), (vec![OTHER.into()], vec![]));
    }
}

/// Resume maps of all agents of a site.
fn resume_maps(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return vec![];
    };
    let all = entries.flatten().map(|entry| entry.path());
    all.flat_map(|path| match path.is_dir() {
        true => resume_maps(&path),
        false => Some(path)
            .filter(|path| path.extension().is_some_and(|is| is == "resume"))
            .into_iter()
            .collect(),
    })
    .collect()
}

#[tokio::test]
async fn an_order_whose_time_is_up_before_its_agent_is_back_leaves_nothing() {
    let (site, mut agents, ids) = Site::with_file_agents(2, &[], &[]).await.unwrap();
    let (api, ground) = (site.api(), Ground::new());
    let begun = Instant::now();
    let id = ground.submit(&api, &ids, 6).await;
    ground.until_half(&api, &id).await;
    agents[1].kill_9();
    assert!(!ground.left().is_empty() && resume_maps(site.path()).len() == 2);
    tokio::time::sleep_until((begun + Duration::from_secs(7)).into()).await;
    agents[1] = site.spawn_file_agent(&ids[1], "10.2.0.2", &[]).unwrap();
    ground.until_swept(&site).await;
    let rows = api.files_over(&id, LIMIT).await;
    assert!(codes(&rows)[2..].iter().all(|code| *code != 0), "{rows:#?}");
}

#[tokio::test]
async fn an_order_that_was_cancelled_before_its_agent_is_back_leaves_nothing() {
    let (site, mut agents, ids) = Site::with_file_agents(2, &[], &[]).await.unwrap();
    let (api, ground) = (site.api(), Ground::new());
    let id = ground.submit(&api, &ids, 60).await;
    ground.until_half(&api, &id).await;
    agents[1].kill_9();
    api.terminate_files(&id, &json!([])).await;
    let rows = api.files_over(&id, LIMIT).await;
    assert_eq!(codes(&rows), [TERMINATED; 4], "{rows:#?}");
    assert!(!ground.left().is_empty() && resume_maps(site.path()).len() == 2);
    // contract: v2-http-task#40
    agents[1] = site.spawn_file_agent(&ids[1], "10.2.0.2", &[]).unwrap();
    ground.until_swept(&site).await;
    assert_eq!(api.file_rows(&id).await, rows);
}
