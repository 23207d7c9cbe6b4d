//! Names of the keys that more than one service touches. Everything of one agent shard, or of one bucket of a task, carries one
//! hash tag and so falls on one slot of a cluster.
//!
//! | key | type | what |
//! | --- | --- | --- |
//! | `gse:agents:{N}:info` | hash id -> AgentRecord | who the agents of shard N are |
//! | `gse:agents:{N}:seen` | zset id by unix ms | last sign of life |
//! | `gse:agents:{N}:load` | hash id -> AgentLoad | last load figures |
//! | `gse:agents:{N}:alias` | hash `cloud:ip` -> id | the other name of an agent |
//! | `{task:b}:t` | string TargetBucket | targets of bucket b |
//! | `{task:b}:r` | hash | rows: `r<i>.<a>` running, `t<i>.<a>` terminal, `x<i>` termination asked |
//! | `{task:b}:o` | zset | output: score says target, atomic task and offset; see [`output_score`] |
//! | `{task:h}:h` | string TaskHeader | written last; commits the task |
//! | `{task:h}:end` | string unix ms | set when every row is terminal |
//! | `gse:node:{id}:tasks` | set | unfinished tasks of a node |
//! | `gse:node:{id}:lease` | string | which life of the node is alive; expires with it |
//! | `gse:node:{id}:info` | string | where the node is reached ([`crate::state::NodeInfo`]); expires with the lease |
//! | `gse:node:{id}:claim` | string | which other node is taking its tasks over |
//! | `gse:{output}:{n}` | string | compressed bytes of output written in stretch n of ten minutes |
//! | `gse:nodes` | sorted set | nodes of gse_task; score: when last renewed (unix ms) |
//! | `{xfer:task:h}:h` | string XferHeader | a file task; commits it |
//! | `{xfer:task:h}:x` | set | endpoints (`agent/container`, `*`: all) whose part of it is to end |
//! | `{xfer:task:b}:r` | hash row number -> StoredEnd | its rows that are over, [`XFER_BUCKET_ROWS`] a bucket; the others follow from the header |
//! | `gse:file:{id}:tasks` | set | unfinished tasks of an instance of gse_btsvr |
//! | `gse:file:{id}:info` | string NodeInfo | where the instance is reached; expires when it is not renewed |
//! | `gse:file:{id}:opened` | hash task -> Opened | tasks of the instance that are open to foreign clients |
//! | `gse:file:{id}:claim` | string | which other instance is taking its tasks over |
//! | `gse:file:nodes` | sorted set | instances of gse_btsvr, as `gse:nodes` |
//! | `gse:data:{routes}:version` | counter | grows with every change of routes or streams |
//! | `gse:data:{routes}:versions` | hash data id -> counter | which data ids have changed; the list of all there ever were |
//! | `gse:data:{routes}:streams` | hash number -> JSON | streams, as they were written |
//! | `gse:data:{routes}:c:<data id>` | hash | a data id: `m` who made it, `r.<life>.<name>` routes, `f.<life>.<name>` filters |
//! | `gse:data:{routes}:ids:<plat>` | counter | last data id given to a platform |
//! | `gse:data:{routes}:stream_ids` | counter | last number given to a stream |
//! | `gse:data:{routes}:seeded` | string | set when the routes of a site's file have been put in |
//! | `gse:file:{manifest}:secret` | string | 32 random bytes that the keys of a swarm's members are made from, the same for all instances that move this content at the time |
//! | `{proc:task:h}:h` | string ProcHeader | a process task; commits it |
//! | `{proc:task:b}:r` | hash row number -> StoredResult | its rows that are over, [`PROC_BUCKET_ROWS`] a bucket |
//! | `gse:proc:{id}:tasks` | set | unfinished tasks of an instance of gse_procmgr |
//! | `gse:proc:{id}:info` | string NodeInfo | where the instance is reached; expires when it is not renewed |
//! | `gse:proc:{id}:claim` | string | which other instance is taking its tasks over |
//! | `gse:proc:nodes` | sorted set | instances of gse_procmgr, as `gse:nodes` |
//! | `gse:proc:{N}:a:<agent>` | hash | processes of an agent of shard N: `s<namespace>\0<name>` StoredProcess, `r<namespace>\0<name>` Registration, `S` last whole snapshot |
//! | `gse:proc:{<namespace>}:i` | sorted set `agent\0name` by unix ms | processes of a namespace, in the order in which they were first seen |
//! | `gse:proc:{<namespace>}:gone` | sorted set, as above | those that are gone, by when; they leave the index later |
//! | `gse:proc:namespaces` | set | all namespaces |
//! | `gse:proc:check` | set | agents whose registrations are to be compared |
//! | `gse:proc:{N}:g:<agent>` | hash namespace -> JSON | what was said of groups of processes |
//! | `gse:alarm:{alarm}:lease` | string | which instance of gse_alarm is active; expires |
//! | `gse:alarm:{alarm}:lost` | hash agent id -> LostHost | hosts about which alarms are sent |
//! | `gse:alarm:{alarm}:state` | string WatchState | where the active instance is |
//! | `gse:sync:{N}:hosts` | hash host key -> HostState | what is to be on each host of shard N, and what was put there |
//! | `gse:sync:{N}:content` | hash host key -> content | the content of its identity, compressed |
//! | `gse:sync:{N}:names` | hash name -> host key | hosts whose agent has several names, by those that are not the key |
//! | `gse:sync:source` | hash | where the source is: `scope`, `cursor`, `full_ms` |
//! | `gse:sync:inbox` | list of InboxItem | what waits for the active instance of gse_syncdata |
//! | `gse:sync:lease` | string | which instance of gse_syncdata is the active one |

/// Number of agent shards. Part of the stored layout: changing it orphans every record.
pub const AGENT_SHARDS: u16 = 64;

/// Targets in a bucket, about.
pub const BUCKET_TARGETS: u32 = 512;

/// Most targets in one bucket, whatever the hash does.
pub const MAX_BUCKET_TARGETS: u32 = 1 << 14;

/// Most atomic tasks of one task.
pub const MAX_ATOMICS: u32 = 1 << 8;

/// Bits of an output offset in a score; output of one atomic task stays below 2^24 bytes.
const OFFSET_BITS: u32 = 24;

/// Shard of an agent id or alias.
#[must_use]
pub fn agent_shard(id: &str) -> u16 {
    crc16::State::<crc16::XMODEM>::calculate(id.as_bytes()) % AGENT_SHARDS
}

/// Hash id -> AgentRecord.
#[must_use]
pub fn agent_info(shard: u16) -> String {
    format!("gse:agents:{{{shard}}}:info")
}

/// Sorted set of ids by last sign of life (unix ms).
#[must_use]
pub fn agent_seen(shard: u16) -> String {
    format!("gse:agents:{{{shard}}}:seen")
}

/// Hash id -> AgentLoad.
#[must_use]
pub fn agent_load(shard: u16) -> String {
    format!("gse:agents:{{{shard}}}:load")
}

/// Hash `cloud:ip` -> id.
#[must_use]
pub fn agent_alias(shard: u16) -> String {
    format!("gse:agents:{{{shard}}}:alias")
}

/// Bucket of a target in a task of `buckets` buckets, by the id that the caller used.
#[must_use]
pub fn bucket_of(asked_id: &str, buckets: u32) -> u32 {
    if buckets <= 1 {
        return 0;
    }
    // FNV-1a: the value is stored by implication, so it must never change with a library's version.
    let hash = asked_id.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    // The low bits of FNV are weak for short inputs; fold the high ones in.
    (hash ^ (hash >> 15)) % buckets
}

/// How many buckets a task of so many targets has.
#[must_use]
pub fn buckets_for(targets: usize) -> u32 {
    u32::try_from(targets)
        .unwrap_or(u32::MAX)
        .div_ceil(BUCKET_TARGETS)
        .max(1)
}

/// String: [`crate::state::TargetBucket`].
#[must_use]
pub fn task_targets(task: &str, bucket: u32) -> String {
    format!("{{{task}:{bucket}}}:t")
}

/// Hash of rows.
#[must_use]
pub fn task_rows(task: &str, bucket: u32) -> String {
    format!("{{{task}:{bucket}}}:r")
}

/// Sorted set of output chunks.
#[must_use]
pub fn task_output(task: &str, bucket: u32) -> String {
    format!("{{{task}:{bucket}}}:o")
}

/// String: [`crate::state::TaskHeader`].
#[must_use]
pub fn task_header(task: &str) -> String {
    format!("{{{task}:h}}:h")
}

/// String: unix ms when every row was terminal.
#[must_use]
pub fn task_end(task: &str) -> String {
    format!("{{{task}:h}}:end")
}

/// String: bytes of output that a task has used.
#[must_use]
pub fn task_output_bytes(task: &str) -> String {
    format!("{{{task}:h}}:b")
}

/// Field of the rows' hash: where the output of an atomic task was cut, marker included.
#[must_use]
pub fn cut_field(index: u32, atomic: u32) -> String {
    format!("c{index}.{atomic}")
}

/// String: compressed bytes of output that all nodes have written in one stretch of time. One tag for all, so that they can be read together.
#[must_use]
pub fn output_slot(slot: u64) -> String {
    format!("gse:{{output}}:{slot}")
}

/// Set of the unfinished tasks of a node.
#[must_use]
pub fn node_tasks(node: &str) -> String {
    format!("gse:node:{{{node}}}:tasks")
}

/// String: a number drawn at each start of a node, renewed while it lives. What another life of it held is not held any more.
#[must_use]
pub fn node_lease(node: &str) -> String {
    format!("gse:node:{{{node}}}:lease")
}

/// Where a living node is reached; see [`crate::state::NodeInfo`].
#[must_use]
pub fn node_info(node: &str) -> String {
    format!("gse:node:{{{node}}}:info")
}

/// String: who sees to the tasks of a dead node at the moment; expires.
#[must_use]
pub fn node_claim(node: &str) -> String {
    format!("gse:node:{{{node}}}:claim")
}

/// All nodes of gse_task, living or lately gone; the score is when each last renewed its lease (unix ms).
#[must_use]
pub fn nodes() -> &'static str {
    "gse:nodes"
}

/// Rows of a file task in one bucket. Part of the stored layout.
pub const XFER_BUCKET_ROWS: u32 = 2048;

/// String: [`crate::xfer::XferHeader`].
#[must_use]
pub fn xfer_header(task: &str) -> String {
    format!("{{xfer:{task}:h}}:h")
}

/// Set of endpoints whose part of a file task is to end.
#[must_use]
pub fn xfer_stopped(task: &str) -> String {
    format!("{{xfer:{task}:h}}:x")
}

/// Hash of the rows of a file task that are over.
#[must_use]
pub fn xfer_rows(task: &str, bucket: u32) -> String {
    format!("{{xfer:{task}:{bucket}}}:r")
}

/// Set of the unfinished tasks of an instance of gse_btsvr.
#[must_use]
pub fn file_tasks(instance: &str) -> String {
    format!("gse:file:{{{instance}}}:tasks")
}

/// Hash task -> [`crate::xfer::Opened`]: tasks of an instance of gse_btsvr that are open to foreign clients.
#[must_use]
pub fn file_opened(instance: &str) -> String {
    format!("gse:file:{{{instance}}}:opened")
}

/// Which other instance of gse_btsvr is taking its tasks over.
#[must_use]
pub fn file_claim(instance: &str) -> String {
    format!("gse:file:{{{instance}}}:claim")
}

/// Where a living instance of gse_btsvr is reached; see [`crate::state::NodeInfo`].
#[must_use]
pub fn file_info(instance: &str) -> String {
    format!("gse:file:{{{instance}}}:info")
}

/// All instances of gse_btsvr, living or lately gone.
#[must_use]
pub fn file_nodes() -> &'static str {
    "gse:file:nodes"
}

/// String: what the keys of a swarm's members are made from, by the id of its manifest.
#[must_use]
pub fn file_secret(manifest_id: &[u8; 32]) -> String {
    let mut name = String::with_capacity(64);
    for byte in manifest_id {
        name.push_str(&format!("{byte:02x}"));
    }
    format!("gse:file:{{{name}}}:secret")
}

/// Counter: grows with every change of routes or streams. All keys of routes fall on one slot, so that what is written to them in one
/// batch is written in that order.
#[must_use]
pub fn route_version() -> &'static str {
    "gse:data:{routes}:version"
}

/// Hash data id -> how often its routes have changed.
#[must_use]
pub fn route_versions() -> &'static str {
    "gse:data:{routes}:versions"
}

/// Hash number -> stream.
#[must_use]
pub fn streams() -> &'static str {
    "gse:data:{routes}:streams"
}

/// Hash: routes of one data id.
#[must_use]
pub fn channel(data_id: u32) -> String {
    format!("gse:data:{{routes}}:c:{data_id}")
}

/// Counter: last data id given to a platform.
#[must_use]
pub fn channel_ids(plat: &str) -> String {
    format!("gse:data:{{routes}}:ids:{plat}")
}

/// Counter: last number given to a stream.
#[must_use]
pub fn stream_ids() -> &'static str {
    "gse:data:{routes}:stream_ids"
}

/// String: set when a site's file of routes has been put in.
#[must_use]
pub fn routes_seeded() -> &'static str {
    "gse:data:{routes}:seeded"
}

/// Rows of a process task in one bucket. Part of the stored layout.
pub const PROC_BUCKET_ROWS: u32 = 1024;

/// String: [`crate::procstore::ProcHeader`].
#[must_use]
pub fn proc_header(task: &str) -> String {
    format!("{{proc:{task}:h}}:h")
}

/// Hash of the rows of a process task that are over.
#[must_use]
pub fn proc_rows(task: &str, bucket: u32) -> String {
    format!("{{proc:{task}:{bucket}}}:r")
}

/// Set of the unfinished tasks of an instance of gse_procmgr.
#[must_use]
pub fn proc_tasks(instance: &str) -> String {
    format!("gse:proc:{{{instance}}}:tasks")
}

/// Where a living instance of gse_procmgr is reached; see [`crate::state::NodeInfo`].
#[must_use]
pub fn proc_info(instance: &str) -> String {
    format!("gse:proc:{{{instance}}}:info")
}

/// String: who sees to the tasks of a dead instance at the moment; expires.
#[must_use]
pub fn proc_claim(instance: &str) -> String {
    format!("gse:proc:{{{instance}}}:claim")
}

/// All instances of gse_procmgr, living or lately gone.
#[must_use]
pub fn proc_nodes() -> &'static str {
    "gse:proc:nodes"
}

/// Hash: processes of one agent. By its shard, so that thousands of agents fall on few slots.
#[must_use]
pub fn proc_agent(agent: &str) -> String {
    format!("gse:proc:{{{}}}:a:{agent}", agent_shard(agent))
}

/// Field of [`proc_agent`]: last known state of a process.
#[must_use]
pub fn proc_state_field(namespace: &str, name: &str) -> String {
    format!("s{namespace}\0{name}")
}

/// Field of [`proc_agent`]: registration of a process.
#[must_use]
pub fn proc_registration_field(namespace: &str, name: &str) -> String {
    format!("r{namespace}\0{name}")
}

/// Field of [`proc_agent`]: number of the last snapshot of which every part is there.
pub const PROC_SNAPSHOT_FIELD: &str = "S";

/// A namespace as a hash tag: it may hold anything.
fn namespace_tag(namespace: &str) -> String {
    use std::fmt::Write as _;
    let mut tag = String::with_capacity(namespace.len() + 2);
    for byte in namespace.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.') {
            tag.push(char::from(byte));
        } else {
            // Writing into a String can't fail.
            let _ = write!(tag, "%{byte:02x}");
        }
    }
    tag
}

/// Sorted set `agent\0name` by when it was first seen: processes of a namespace.
#[must_use]
pub fn proc_index(namespace: &str) -> String {
    format!("gse:proc:{{n:{}}}:i", namespace_tag(namespace))
}

/// Sorted set `agent\0name` by when it was gone: to be taken off [`proc_index`].
#[must_use]
pub fn proc_gone(namespace: &str) -> String {
    format!("gse:proc:{{n:{}}}:gone", namespace_tag(namespace))
}

/// Member of [`proc_index`].
#[must_use]
pub fn proc_member(agent: &str, name: &str) -> String {
    format!("{agent}\0{name}")
}

/// Set: all namespaces of processes.
#[must_use]
pub fn proc_namespaces() -> &'static str {
    "gse:proc:namespaces"
}

/// Set: agents whose registrations are to be compared with those of the store.
#[must_use]
pub fn proc_check() -> &'static str {
    "gse:proc:check"
}

/// Hash namespace -> JSON: what was said of groups of processes of an agent.
#[must_use]
pub fn proc_groups(agent: &str) -> String {
    format!("gse:proc:{{{}}}:g:{agent}", agent_shard(agent))
}

/// String: which instance of gse_alarm is active. All keys of gse_alarm fall on one slot.
#[must_use]
pub fn alarm_lease() -> &'static str {
    "gse:alarm:{alarm}:lease"
}

/// Hash agent id -> [`crate::alarm::LostHost`].
#[must_use]
pub fn alarm_lost() -> &'static str {
    "gse:alarm:{alarm}:lost"
}

/// String: [`crate::alarm::WatchState`].
#[must_use]
pub fn alarm_state() -> &'static str {
    "gse:alarm:{alarm}:state"
}

/// Field of a running row.
#[must_use]
pub fn running_field(index: u32, atomic: u32) -> String {
    format!("r{index}.{atomic}")
}

/// Field of a terminal row.
#[must_use]
pub fn terminal_field(index: u32, atomic: u32) -> String {
    format!("t{index}.{atomic}")
}

/// Field that says that a target was asked to end.
#[must_use]
pub fn terminate_field(index: u32) -> String {
    format!("x{index}")
}

/// Score of an output chunk: exact in a double, ordered by target, atomic task and offset.
#[must_use]
pub fn output_score(index: u32, atomic: u32, offset: u64) -> u64 {
    debug_assert!(index < MAX_BUCKET_TARGETS && atomic < MAX_ATOMICS && offset < 1 << OFFSET_BITS);
    ((u64::from(index) << 8 | u64::from(atomic)) << OFFSET_BITS) | offset
}

/// Hash host key -> [`crate::sync::HostState`]; the shard is that of the key ([`agent_shard`]).
#[must_use]
pub fn sync_hosts(shard: u16) -> String {
    format!("gse:sync:{{{shard}}}:hosts")
}

/// Hash host key -> content of its identity.
#[must_use]
pub fn sync_content(shard: u16) -> String {
    format!("gse:sync:{{{shard}}}:content")
}

/// Hash name -> host key; the shard is that of the name.
#[must_use]
pub fn sync_names(shard: u16) -> String {
    format!("gse:sync:{{{shard}}}:names")
}

/// Hash: where the source of host identities is.
pub const SYNC_SOURCE: &str = "gse:sync:source";

/// List of [`crate::sync::InboxItem`].
pub const SYNC_INBOX: &str = "gse:sync:inbox";

/// String: which instance of gse_syncdata is the active one.
pub const SYNC_LEASE: &str = "gse:sync:lease";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_are_exact_in_a_double_and_ordered() {
        let top = output_score(MAX_BUCKET_TARGETS - 1, MAX_ATOMICS - 1, (1 << 24) - 1);
        assert_eq!(top as f64 as u64, top);
        assert!(top < 1 << 53);
        assert!(output_score(0, 1, 0) > output_score(0, 0, (1 << 24) - 1));
        assert!(output_score(1, 0, 0) > output_score(0, MAX_ATOMICS - 1, (1 << 24) - 1));
    }

    #[test]
    fn names_never_change() {
        assert_eq!(
            agent_shard("0:10.0.0.1"),
            crc16::State::<crc16::XMODEM>::calculate(b"0:10.0.0.1") % 64
        );
        assert_eq!((bucket_of("0:10.0.0.1", 100), bucket_of("a", 100)), (84, 68));
        assert_eq!(task_rows("T", 3), "{T:3}:r");
        assert_eq!(task_header("T"), "{T:h}:h");
        assert_eq!(agent_info(5), "gse:agents:{5}:info");
        assert_eq!(
            (xfer_header("T"), xfer_rows("T", 2)),
            ("{xfer:T:h}:h".to_owned(), "{xfer:T:2}:r".to_owned())
        );
        assert_eq!(
            (proc_header("T"), proc_rows("T", 2)),
            ("{proc:T:h}:h".to_owned(), "{proc:T:2}:r".to_owned())
        );
        assert_eq!(
            (proc_index("GSEKIT_BIZ_3"), proc_gone("a{}b")),
            (
                "gse:proc:{n:GSEKIT_BIZ_3}:i".to_owned(),
                "gse:proc:{n:a%7b%7db}:gone".to_owned()
            )
        );
    }

    #[test]
    fn buckets_fill_evenly() {
        let mut counts = [0u32; 98];
        for n in 0..50_000 {
            counts[bucket_of(&format!("0:10.{}.{}.{}", n / 65536, n / 256 % 256, n % 256), 98) as usize] += 1;
        }
        let most = counts.iter().max().unwrap();
        assert!(*most < 700, "{most}");
    }
}
