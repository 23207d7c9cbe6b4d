//! File tasks as a platform's client asks for them.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::api::{Api, EXT};

/// A host as job names it.
#[must_use]
pub fn host(id: &str) -> Value {
    json!({"bk_agent_id": id, "user": "root"})
}

/// One entry of `tasks` of a distribution.
#[must_use]
pub fn transfer_task(source: &str, dir: &str, name: &str, targets: &[&str], target_dir: &str) -> Value {
    json!({
        "source": {"file_name": name, "store_dir": dir, "agent": host(source)},
        "target": {"file_name": "", "store_dir": target_dir,
            "agents": targets.iter().map(|id| host(id)).collect::<Vec<_>>()},
    })
}

/// Body of a distribution.
#[must_use]
pub fn transfer_body(tasks: &[Value], timeout_s: i64) -> Value {
    json!({"timeout_seconds": timeout_s, "auto_mkdir": true, "upload_speed": 0, "download_speed": 0, "tasks": tasks})
}

/// Body of a push of one content, the way cmdb makes it.
#[must_use]
pub fn push_body(targets: &[&str], dir: &str, name: &str, content: &str) -> Value {
    json!({
        "timeout_seconds": 60,
        "auto_mkdir": true,
        "tasks": [{"file_name": name, "store_dir": dir, "file_content": content, "owner": "root", "right": 644,
            "agent_id_list": targets}],
    })
}

impl Api {
    /// Submits a distribution or a push and gives the task id; its rows are there when this returns.
    ///
    /// # Panics
    /// When the submit is refused or there are no rows.
    // contract: v2-http-task#1, v2-http-task#29
    pub async fn submit_files(&self, call: &str, body: &Value) -> String {
        let reply = self.post(&format!("{EXT}/{call}"), body).await;
        assert_eq!(reply["code"], 0, "{reply}");
        let id = reply["data"]["result"]["task_id"]
            .as_str()
            .expect("a task id")
            .to_owned();
        assert!(!id.is_empty() && id.len() <= 64, "{id:?}");
        assert!(!self.file_rows(&id).await.is_empty(), "a task without rows");
        id
    }

    /// All rows of a file task.
    ///
    /// # Panics
    /// When the query is refused or a row breaks what holds for all rows.
    pub async fn file_rows(&self, task: &str) -> Vec<Value> {
        self.file_rows_of(task, &json!({})).await
    }

    /// Rows of a file task, with more fields in the query.
    ///
    /// # Panics
    /// As [`Api::file_rows`].
    pub async fn file_rows_of(&self, task: &str, more: &Value) -> Vec<Value> {
        let mut body = json!({"task_id": task});
        if let (Some(body), Some(more)) = (body.as_object_mut(), more.as_object()) {
            body.extend(more.clone());
        }
        let reply = self.post(&format!("{EXT}/get_transfer_file_result"), &body).await;
        assert_eq!(reply["code"], 0, "{reply}");
        let rows = reply["data"]["result"].as_array().expect("rows").clone();
        rows.iter().for_each(check_file_row);
        rows
    }

    /// Rows as [`Api::file_rows`]; `None` while that is refused or there is no answer.
    pub async fn try_file_rows(&self, task: &str) -> Option<Vec<Value>> {
        let body = json!({"task_id": task});
        let reply = self.try_post(&format!("{EXT}/get_transfer_file_result"), &body).await?;
        if reply["code"] != 0 {
            return None;
        }
        let rows = reply["data"]["result"].as_array()?.clone();
        rows.iter().for_each(check_file_row);
        Some(rows)
    }

    /// Polls until every row is over, through times in which there is no answer. What progress shows never goes backwards.
    ///
    /// # Panics
    /// When they are not within `limit`.
    // contract: p2p#30
    pub async fn files_over(&self, task: &str, limit: Duration) -> Vec<Value> {
        let started = Instant::now();
        let mut shown: Vec<i64> = vec![];
        loop {
            if let Some(rows) = self.try_file_rows(task).await {
                let now: Vec<i64> = rows
                    .iter()
                    .map(|row| row["content"]["progress"].as_i64().unwrap_or(-1))
                    .collect();
                assert!(shown.iter().zip(&now).all(|(old, new)| new >= old), "{shown:?} {now:?}");
                shown = now;
                if rows.iter().all(|row| row["error_code"] != 115) {
                    return rows;
                }
                assert!(
                    started.elapsed() < limit,
                    "{task} is not over within {limit:?}: {rows:#?}"
                );
            }
            assert!(started.elapsed() < limit, "{task}: no rows within {limit:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Asks for the end of a file task.
    ///
    /// # Panics
    /// When that is refused.
    pub async fn terminate_files(&self, task: &str, agents: &Value) {
        let body = json!({"task_id": task, "agents": agents});
        let reply = self.post(&format!("{EXT}/async_terminate_transfer_file"), &body).await;
        assert_eq!(reply["code"], 0, "{reply}");
        assert_eq!(reply["data"]["result"]["task_id"], task, "{reply}");
    }
}

/// Codes of rows, uploads first.
#[must_use]
pub fn codes(rows: &[Value]) -> Vec<i64> {
    rows.iter()
        .map(|row| row["error_code"].as_i64().unwrap_or(-99))
        .collect()
}

/// What holds for every file row, over or not.
///
/// # Panics
/// When it does not.
// contract: v2-http-task#23, v2-http-task#30, v2-http-task#31, v2-http-task#35, v2-http-task#36, v2-http-task#37
pub fn check_file_row(row: &Value) {
    assert!(row["error_code"].is_i64() && row["error_msg"].is_string(), "{row}");
    let content = &row["content"];
    assert!(content.is_object(), "{row}");
    for field in ["progress", "size", "speed", "start_time", "end_time"] {
        assert!(content[field].is_u64(), "{field}: {row}");
    }
    assert!(content["progress"].as_u64() <= Some(100), "{row}");
    for field in [
        "source_agent_id",
        "source_container_id",
        "source_file_dir",
        "source_file_name",
        "dest_agent_id",
        "dest_container_id",
        "dest_file_dir",
        "dest_file_name",
        "status_info",
    ] {
        assert!(content[field].is_string(), "{field}: {row}");
    }
    let upload = content["mode"] == 0;
    assert_eq!(content["type"], if upload { "upload" } else { "download" }, "{row}");
    if row["error_code"] == 115 {
        assert!(content["status"] == 500 || content["status"] == 508, "{row}");
        return;
    }
    assert_eq!(content["status"], if upload { 590 } else { 592 }, "{row}");
    // Milliseconds, not seconds.
    let (start, end) = (content["start_time"].as_u64(), content["end_time"].as_u64());
    assert!(start > Some(1_000_000_000_000) && end >= start, "{row}");
    assert_eq!(row["error_code"] == 0, content["progress"] == 100, "{row}");
}

/// Bytes that do not compress and are the same each time.
#[must_use]
pub fn random_bytes(length: usize) -> Vec<u8> {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64 ^ length as u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        bytes.extend_from_slice(&seed.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A path as it goes into a request.
///
/// # Panics
/// When it is no text.
#[must_use]
pub fn path_text(path: &Path) -> String {
    path.to_str().expect("a path that is text").to_owned()
}

/// What is unfinished in a directory and below it.
#[must_use]
pub fn part_files(dir: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    let Ok(entries) = std::fs::read_dir(dir) else {
        return found;
    };
    for entry in entries.flatten() {
        if entry.file_name().as_bytes().ends_with(b".part") {
            found.push(entry.path());
        } else if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(part_files(&entry.path()));
        }
    }
    found
}

/// Bytes on the disk of what is unfinished in a directory.
#[must_use]
pub fn part_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = part_files(dir);
    let sizes = files
        .iter()
        .filter_map(|file| Some(file.metadata().ok()?.blocks() * 512));
    sizes.sum()
}

/// A small file system of its own, gone when this is dropped.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one of so many KiB at a directory; that takes root.
    ///
    /// # Panics
    /// When it can't be mounted.
    #[must_use]
    pub fn mount(dir: &Path, kib: u64) -> Self {
        let mut command = std::process::Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &format!("size={kib}k,mode=755"), "gse-tests"]);
        let done = command.arg(dir).status().expect("mount");
        assert!(done.success(), "mounting at {}: {done}", dir.display());
        Self(dir.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: who still writes there must not keep it.
        let done = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
        if !done.is_ok_and(|done| done.success()) {
            eprintln!("{} is still mounted", self.0.display());
        }
    }
}
