//! Bodies of the file calls. Unknown fields are ignored everywhere; optional ones may be `null`.

use serde::{Deserialize, Serialize};

use super::null_default;
use super::script::AgentEndpoint;

/// Body of `async_transfer_file`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TransferFile {
    /// 0 or less: the configured maximum.
    #[serde(default, deserialize_with = "null_default")]
    pub timeout_seconds: i64,
    /// Make target directories that are missing.
    #[serde(default, deserialize_with = "null_default")]
    pub auto_mkdir: bool,
    /// MB/s of each source; 0: no limit.
    #[serde(default, deserialize_with = "null_default")]
    pub upload_speed: i64,
    /// MB/s of each target; 0: no limit.
    #[serde(default, deserialize_with = "null_default")]
    pub download_speed: i64,
    /// What goes where.
    #[serde(default, deserialize_with = "null_default")]
    pub tasks: Vec<TransferTask>,
}

/// One source and its targets.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TransferTask {
    /// What is sent.
    pub source: FileSource,
    /// Where it goes.
    pub target: FileTarget,
}

/// What is sent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FileSource {
    /// File name, wildcards, regular expression; empty: the directory itself.
    #[serde(default, deserialize_with = "null_default")]
    pub file_name: String,
    /// Its directory.
    #[serde(default, deserialize_with = "null_default")]
    pub store_dir: String,
    /// Where it is.
    pub agent: AgentEndpoint,
}

/// Where it goes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FileTarget {
    /// New name; empty: the source's.
    #[serde(default, deserialize_with = "null_default")]
    pub file_name: String,
    /// Directory.
    #[serde(default, deserialize_with = "null_default")]
    pub store_dir: String,
    /// Owner, if another than the account that writes.
    #[serde(default, deserialize_with = "null_default")]
    pub owner: String,
    /// Mode; its decimal digits are the octal ones. 0: the source's.
    #[serde(default, deserialize_with = "null_default")]
    pub permission: i64,
    /// Hosts.
    #[serde(default, deserialize_with = "null_default")]
    pub agents: Vec<AgentEndpoint>,
}

/// Body of `async_push_file`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PushFile {
    /// 0 or less: the configured maximum.
    #[serde(default, deserialize_with = "null_default")]
    pub timeout_seconds: i64,
    /// Make target directories that are missing.
    #[serde(default, deserialize_with = "null_default")]
    pub auto_mkdir: bool,
    /// Contents.
    #[serde(default, deserialize_with = "null_default")]
    pub tasks: Vec<PushTask>,
}

/// One content and its targets.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PushTask {
    /// Plain file name.
    #[serde(default, deserialize_with = "null_default")]
    pub file_name: String,
    /// Directory.
    #[serde(default, deserialize_with = "null_default")]
    pub store_dir: String,
    /// Text.
    #[serde(default, deserialize_with = "null_default")]
    pub file_content: String,
    /// Account that it belongs to.
    #[serde(default, deserialize_with = "null_default")]
    pub owner: String,
    /// Mode; its decimal digits are the octal ones. 0: 644.
    #[serde(default, deserialize_with = "null_default")]
    pub right: i64,
    /// Hosts, by id alone.
    #[serde(default, deserialize_with = "null_default")]
    pub agent_id_list: Vec<String>,
    /// Hosts.
    #[serde(default, deserialize_with = "null_default")]
    pub agents: Vec<AgentEndpoint>,
}

/// Body of `get_transfer_file_result`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TransferResultQuery {
    /// The task.
    #[serde(default, deserialize_with = "null_default")]
    pub task_id: String,
    /// Rows of these endpoints alone: sources of uploads, targets of downloads. None here and in `agent_id_list`: all.
    #[serde(default, deserialize_with = "null_default")]
    pub agents: Vec<AgentEndpoint>,
    /// The same by id alone.
    #[serde(default, deserialize_with = "null_default")]
    pub agent_id_list: Vec<String>,
}

/// One row of a file result, as a client reads it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TransferRow {
    /// See [`crate::codes::Inner`].
    pub error_code: i32,
    /// For people.
    pub error_msg: String,
    /// The rest.
    pub content: TransferContent,
}

/// Inner part of a [`TransferRow`]. All fields are always there.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TransferContent {
    /// 0 upload, 1 download.
    pub mode: u8,
    /// `upload` or `download`.
    #[serde(rename = "type")]
    pub kind: String,
    /// As asked.
    pub source_agent_id: String,
    /// As asked; empty for hosts.
    pub source_container_id: String,
    /// As asked.
    pub source_file_dir: String,
    /// As asked, patterns included.
    pub source_file_name: String,
    /// As asked; empty for uploads, as the next three.
    pub dest_agent_id: String,
    /// As asked.
    pub dest_container_id: String,
    /// As asked.
    pub dest_file_dir: String,
    /// The name at the target.
    pub dest_file_name: String,
    /// 0 to 100.
    pub progress: u32,
    /// Bytes.
    pub size: u64,
    /// KB/s.
    pub speed: u64,
    /// 500 under way, 508 verifying, 590 upload over, 592 download over.
    pub status: i32,
    /// The status in a word.
    pub status_info: String,
    /// Unix milliseconds; 0 while there is none.
    pub start_time: u64,
    /// Unix milliseconds; 0 while there is none.
    pub end_time: u64,
    /// Always 2.
    pub protover: u32,
}

/// Body of `/gse/v1/xfer/list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct XferListRequest {
    /// Most tasks; 0: 100.
    #[serde(default, deserialize_with = "null_default")]
    pub limit: u32,
}

/// Answer of `/gse/v1/xfer/list`: file tasks that are under way, the newest first.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct XferListReply {
    /// Those that the caller may read.
    pub tasks: Vec<TransferSummary>,
}

/// A file task in a few words.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferSummary {
    /// The task.
    pub task_id: String,
    /// Application that submitted it.
    pub app: String,
    /// Unix milliseconds.
    pub created_at: u64,
    /// Unix milliseconds by which every row is over.
    pub deadline: u64,
    /// Content came in the call.
    pub push: bool,
    /// The first thing that is sent, as its directory and name.
    pub first: String,
    /// Sources and files.
    pub uploads: u32,
    /// Files and targets.
    pub downloads: u32,
    /// Rows that are over.
    pub over: u32,
    /// Instance that controls it.
    pub instance: String,
}

/// Body of `/gse/v1/xfer/open`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct XferOpenRequest {
    /// The task.
    pub task_id: String,
    /// How long foreign clients are let in, seconds; 0: as long as the server has it in its configuration.
    #[serde(default, deserialize_with = "null_default")]
    pub expire_seconds: u64,
}

/// Body of `/gse/v1/xfer/close`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct XferTaskRequest {
    /// The task.
    pub task_id: String,
}

/// Body of `/gse/v1/xfer/torrent`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct XferTorrentRequest {
    /// The task.
    pub task_id: String,
    /// With what is in the `.torrent` files, and not only how each part stands.
    #[serde(default, deserialize_with = "null_default")]
    pub content: bool,
}

/// Answer of these three: how a file task is opened to foreign clients.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct XferOpened {
    /// The task.
    pub task_id: String,
    /// Unix milliseconds at which nobody is let in any more; 0: it is not open.
    pub expires_at: u64,
    /// What it moves, one swarm each.
    pub parts: Vec<XferPart>,
}

/// A swarm of an opened file task.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct XferPart {
    /// Number of the source, or of the pushed file.
    pub part: u32,
    /// What it is, as its directory and name.
    pub name: String,
    /// `waiting`, `open` or `failed`.
    pub state: String,
    /// What is waited for, or what went wrong.
    pub message: String,
    /// Bytes; 0 until it is open.
    pub size: u64,
    /// Info-hash, hex; empty until it is open.
    pub info_hash: String,
    /// Where its `.torrent` file is; empty until it is open.
    pub url: String,
    /// The `.torrent` file in base64, if it was asked for.
    pub torrent: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_as_clients_send_them() {
        // contract: v2-http-task#7, v2-http-task#43, v2-http-task#44
        let job = r#"{"timeout_seconds":7200,"auto_mkdir":true,"upload_speed":0,"download_speed":10,"tasks":[
            {"source":{"file_name":"a.tar","store_dir":"/data","agent":{"bk_agent_id":"0:10.0.0.1","user":"root"}},
             "target":{"file_name":"","store_dir":"/tmp/","agents":[{"bk_agent_id":"0:10.0.0.2","user":"root"}]}}]}"#;
        let body: TransferFile = serde_json::from_str(job).unwrap();
        assert_eq!((body.tasks.len(), body.download_speed), (1, 10));
        let nodemgr = r#"{"timeout_seconds":600,"auto_mkdir":true,"upload_speed":null,"keep_source_seeding":true,"tasks":[
            {"source":{"file_name":"x","store_dir":"/d/","md5":"","agent":{"bk_agent_id":"a","bk_container_id":null,"user":"root"}},
             "target":{"store_dir":"/t/","owner":"app","permission":755,"agents":[{"bk_agent_id":"b","user":"root"}]}}]}"#;
        let body: TransferFile = serde_json::from_str(nodemgr).unwrap();
        assert_eq!(body.tasks[0].target.permission, 755);
        let cmdb = r#"{"timeout_seconds":1000,"auto_mkdir":true,"tasks":[{"file_name":"hostid","store_dir":"/var/lib/gse/host",
            "file_content":"{}","owner":"root","right":644,"agent_id_list":["0:10.0.0.2"]}]}"#;
        let body: PushFile = serde_json::from_str(cmdb).unwrap();
        assert_eq!(body.tasks[0].agent_id_list, ["0:10.0.0.2"]);
        for wrong in [
            r#"{"tasks":[{}]}"#,
            r#"{"tasks":[{"source":{},"target":{}}]}"#,
            r#"{"tasks":1}"#,
        ] {
            assert!(serde_json::from_str::<TransferFile>(wrong).is_err(), "{wrong}");
        }
    }
}
