//! Which call a path means, who owns it, and what its `data` looks like when there is nothing in it.

use std::borrow::Cow;

/// The service behind a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Owner {
    /// gse_api itself.
    Api,
    /// gse_task.
    Task,
    /// gse_btsvr.
    File,
    /// gse_procmgr.
    Proc,
    /// gse_data.
    Data,
    /// gse_syncdata.
    Sync,
}

/// Shape of `data`, on errors too: some clients crash on anything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shape {
    /// `{"result":{}}`: submits and terminations.
    Task,
    /// `{"result":[]}`: result queries.
    Rows,
    /// `[]`: lists.
    List,
    /// `{}`: everything else.
    Object,
}

impl Shape {
    /// The empty value as JSON.
    #[must_use]
    pub const fn empty(self) -> &'static [u8] {
        match self {
            Shape::Task => b"{\"result\":{}}",
            Shape::Rows => b"{\"result\":[]}",
            Shape::List => b"[]",
            Shape::Object => b"{}",
        }
    }
}

macro_rules! routes {
    ($($(#[$doc:meta])* $name:ident, $owner:ident, $shape:ident, $operation:literal, [$($path:literal),+];)*) => {
        /// A call of the contract.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Route { $($(#[$doc])* $name,)* }

        impl Route {
            /// All calls.
            pub const ALL: &'static [Route] = &[$(Route::$name,)*];

            /// Every path it is served under, normalised; the first is the one to use.
            #[must_use]
            pub const fn paths(self) -> &'static [&'static str] {
                match self { $(Route::$name => &[$($path),+],)* }
            }

            /// The service that answers it.
            #[must_use]
            pub const fn owner(self) -> Owner {
                match self { $(Route::$name => Owner::$owner,)* }
            }

            /// What its `data` looks like when empty.
            #[must_use]
            pub const fn shape(self) -> Shape {
                match self { $(Route::$name => Shape::$shape,)* }
            }

            /// What an application must be allowed to do.
            #[must_use]
            pub const fn operation_name(self) -> &'static str {
                match self { $(Route::$name => $operation,)* }
            }

            /// Finds the call of a normalised path (see [`normalise`]).
            #[must_use]
            pub fn lookup(path: &str) -> Option<Route> {
                match path { $($($path)|+ => Some(Route::$name),)* _ => None }
            }
        }
    };
}

routes! {
    /// Run scripts.
    ExecuteScript, Task, Task, "script.execute",
        ["/api/v2/task/extensions/async_execute_script", "/api/v2/task/async_execute_script"];
    /// Results of scripts.
    ScriptResult, Task, Rows, "script.read",
        ["/api/v2/task/extensions/get_execute_script_result", "/api/v2/task/get_execute_script_result"];
    /// End scripts.
    TerminateScript, Task, Task, "script.terminate",
        ["/api/v2/task/extensions/async_terminate_execute_script", "/api/v2/task/async_terminate_execute_script",
         "/api/v2/task/async/async_terminate_execute_script"];
    /// Overall state of a task.
    TaskState, Task, Task, "script.read",
        ["/api/v2/task/get_task_state", "/api/v2/task/extensions/get_task_state"];
    /// Ours: what a task is, for operators.
    TaskDescribe, Task, Object, "script.read", ["/gse/v1/task/describe"];

    /// Distribute files.
    TransferFile, File, Task, "file.transfer",
        ["/api/v2/task/extensions/async_transfer_file", "/api/v2/task/async_transfer_file"];
    /// Results of file distribution.
    TransferResult, File, Rows, "file.read",
        ["/api/v2/task/extensions/get_transfer_file_result", "/api/v2/task/get_transfer_file_result",
         "/api/v2/task/async/get_transfer_file_result"];
    /// End file distribution.
    TerminateTransfer, File, Task, "file.terminate",
        ["/api/v2/task/extensions/async_terminate_transfer_file", "/api/v2/task/async_terminate_transfer_file"];
    /// Write content to files.
    PushFile, File, Task, "file.push",
        ["/api/v2/task/extensions/async_push_file", "/api/v2/task/async_push_file"];
    /// Ours: file tasks that are under way, for operators.
    XferList, File, Object, "file.read", ["/gse/v1/xfer/list"];
    /// Ours: opens a file task's content to foreign BitTorrent clients, for a time.
    XferOpen, File, Object, "file.open", ["/gse/v1/xfer/open"];
    /// Ours: ends that.
    XferClose, File, Object, "file.open", ["/gse/v1/xfer/close"];
    /// Ours: the `.torrent` files of an opened file task.
    XferTorrent, File, Object, "file.read", ["/gse/v1/xfer/torrent"];

    /// State of agents.
    ListAgentState, Api, List, "agent.state", ["/api/v2/cluster/list_agent_state"];
    /// Details of agents.
    ListAgentInfo, Api, List, "agent.info", ["/api/v2/cluster/list_agent_info"];
    /// Old form of agent state.
    V1AgentStatus, Api, Object, "agent.state",
        ["/api/c/compapi/v2/gse/get_agent_status", "/api/c/compapi/gse/get_agent_status"];
    /// Old form of agent details.
    V1AgentInfo, Api, Object, "agent.info",
        ["/api/c/compapi/v2/gse/get_agent_info", "/api/c/compapi/gse/get_agent_info"];
    /// Ours: every agent, page by page, for operators.
    AgentList, Api, Object, "agent.list", ["/gse/v1/agents/list"];

    /// Restart agents.
    OperateAgent, Task, Object, "agent.operate", ["/api/v2/cluster/operate_agent"];
    /// Send a message to a plugin.
    DispatchMessage, Task, Object, "message.dispatch", ["/api/v2/cluster/dispatch_message"];
    /// Send each agent's plugin a message of its own.
    DispatchMultiMessage, Task, Object, "message.dispatch", ["/api/v2/cluster/dispatch_multi_message"];

    /// Operate processes, several specifications.
    OperateProcMulti, Proc, Object, "process.operate",
        ["/api/v2/proc/operate_proc_multi", "/api/c/compapi/v2/gse/operate_proc_multi", "/api/c/compapi/gse/operate_proc_multi"];
    /// Operate processes.
    OperateProc, Proc, Object, "process.operate",
        ["/api/v2/proc/operate_proc_v2", "/api/v2/proc/operate_proc", "/api/c/compapi/v2/gse/operate_proc_v2",
         "/api/c/compapi/v2/gse/operate_proc", "/api/c/compapi/gse/operate_proc_v2", "/api/c/compapi/gse/operate_proc"];
    /// Results of process operations.
    ProcResult, Proc, Object, "process.read",
        ["/api/v2/proc/get_proc_operate_result_v2", "/api/v2/proc/get_proc_operate_result",
         "/api/c/compapi/v2/gse/get_proc_operate_result_v2", "/api/c/compapi/gse/get_proc_operate_result_v2"];
    /// The same with keys of five parts.
    V1ProcResult, Proc, Object, "process.read",
        ["/api/c/compapi/v2/gse/get_proc_operate_result", "/api/c/compapi/gse/get_proc_operate_result"];
    /// State of processes.
    ProcStatus, Proc, Object, "process.read",
        ["/api/v2/proc/get_proc_status_v2", "/api/v2/proc/get_proc_status", "/api/c/compapi/v2/gse/get_proc_status_v2",
         "/api/c/compapi/v2/gse/get_proc_status", "/api/c/compapi/gse/get_proc_status_v2", "/api/c/compapi/gse/get_proc_status"];
    /// State of all processes of a namespace, page by page.
    SyncProcStatus, Proc, Object, "process.read",
        ["/api/v2/proc/sync_proc_status", "/api/v2/proc/sync_proc_status_v2", "/api/c/compapi/v2/gse/sync_proc_status",
         "/api/c/compapi/gse/sync_proc_status"];
    /// Ours: which namespaces there are, for operators.
    ProcNamespaces, Proc, Object, "process.read", ["/gse/v1/proc/namespaces"];
    /// Register or change a process.
    UpdateProcInfo, Proc, Object, "process.operate", ["/api/v2/proc/update_proc_info"];
    /// Register a process that is not registered yet.
    RegisterProcInfo, Proc, Object, "process.operate", ["/api/v2/proc/register_proc_info"];
    /// Forget a process.
    UnregisterProcInfo, Proc, Object, "process.operate", ["/api/v2/proc/unregister_proc_info"];
    /// Register or change a process; keys of five parts.
    V1UpdateProcInfo, Proc, Object, "process.operate",
        ["/api/c/compapi/v2/gse/update_proc_info", "/api/c/compapi/gse/update_proc_info"];
    /// Register a process that is not registered yet; keys of five parts.
    V1RegisterProcInfo, Proc, Object, "process.operate",
        ["/api/c/compapi/v2/gse/register_proc_info", "/api/c/compapi/gse/register_proc_info"];
    /// Forget a process; keys of five parts.
    V1UnregisterProcInfo, Proc, Object, "process.operate",
        ["/api/c/compapi/v2/gse/unregister_proc_info", "/api/c/compapi/gse/unregister_proc_info"];
    /// Move registrations to a new agent id.
    UpgradeToAgentId, Proc, Object, "process.operate",
        ["/api/v2/proc/upgrade_to_agent_id", "/api/c/compapi/v2/gse/upgrade_to_agent_id"];
    /// Note what is said of groups of processes.
    SetProcGroup, Proc, Object, "process.operate",
        ["/api/c/compapi/v2/gse/set_process_group_info", "/api/c/compapi/gse/set_process_group_info"];
    /// Show that.
    GetProcGroup, Proc, Object, "process.read",
        ["/api/c/compapi/v2/gse/get_process_group_info", "/api/c/compapi/gse/get_process_group_info"];

    /// Add a sink.
    AddStreamto, Data, Object, "data.write", ["/api/v2/data/add_streamto", "/api/c/compapi/v2/gse/config_add_streamto", "/config_add_streamto"];
    /// Change a sink.
    UpdateStreamto, Data, Object, "data.write",
        ["/api/v2/data/update_streamto", "/api/c/compapi/v2/gse/config_update_streamto", "/config_update_streamto"];
    /// Remove a sink.
    DeleteStreamto, Data, Object, "data.write",
        ["/api/v2/data/delete_streamto", "/api/c/compapi/v2/gse/config_delete_streamto", "/config_delete_streamto"];
    /// Show sinks.
    QueryStreamto, Data, List, "data.read", ["/api/v2/data/query_streamto", "/api/c/compapi/v2/gse/config_query_streamto", "/config_query_streamto"];
    /// Add a route.
    AddRoute, Data, Object, "data.write", ["/api/v2/data/add_route", "/api/c/compapi/v2/gse/config_add_route", "/config_add_route"];
    /// Change a route.
    UpdateRoute, Data, Object, "data.write", ["/api/v2/data/update_route", "/api/c/compapi/v2/gse/config_update_route", "/config_update_route"];
    /// Remove a route.
    DeleteRoute, Data, Object, "data.write", ["/api/v2/data/delete_route", "/api/c/compapi/v2/gse/config_delete_route", "/config_delete_route"];
    /// Show routes.
    QueryRoute, Data, List, "data.read", ["/api/v2/data/query_route", "/api/c/compapi/v2/gse/config_query_route", "/config_query_route"];
    /// Ours: all routes and streams, without passwords, for operators.
    DataRoutes, Data, Object, "data.read", ["/gse/v1/data/routes"];
    /// Ours: what became of how many records, by data id, at the instance that answers.
    DataFigures, Data, Object, "data.read", ["/gse/v1/data/figures"];
    /// Ours: the records of a data id as they come in at the instance that answers, one JSON object a line, without an end.
    DataTail, Data, Object, "data.read", ["/gse/v1/data/tail"];

    /// Ours: the identity of a host: what the source says, and what was put there.
    HostIdShow, Sync, Object, "hostid.read", ["/gse/v1/hostid/show"];
    /// Ours: identities of hosts, where calls are the source.
    HostIdPut, Sync, Object, "hostid.write", ["/gse/v1/hostid/put"];
    /// Ours: push what is known again.
    HostIdPush, Sync, Object, "hostid.write", ["/gse/v1/hostid/push"];
}

impl Route {
    /// The path to call it by.
    #[must_use]
    pub const fn path(self) -> &'static str {
        self.paths()[0]
    }

    /// Whether its answer has no end of its own, so that a server that is stopping does not wait for it.
    #[must_use]
    pub const fn is_endless(self) -> bool {
        matches!(self, Route::DataTail)
    }

    /// Old calls came as GET with a JSON body; all others are POST only.
    #[must_use]
    pub fn allows_get(self, path: &str) -> bool {
        path.starts_with("/api/c/compapi/")
            && matches!(
                self,
                Route::V1AgentStatus
                    | Route::V1AgentInfo
                    | Route::ProcResult
                    | Route::V1ProcResult
                    | Route::ProcStatus
                    | Route::SyncProcStatus
                    | Route::GetProcGroup
            )
    }
}

/// The path to look a call up by, for calls of the old process service, which told some apart by their method alone. `path` is
/// normalised. `None`: the path says it all.
#[must_use]
pub fn by_method(method: &str, path: &str) -> Option<&'static str> {
    let (version, rest) = path.strip_prefix("/procapi/")?.split_once("/proc/")?;
    let old = match version {
        "v1" => true,
        "v2" => false,
        _ => return None,
    };
    Some(match (method, rest, old) {
        ("POST", "multioperate", _) => "/api/c/compapi/v2/gse/operate_proc_multi",
        ("POST", "operate", false) => "/api/c/compapi/v2/gse/operate_proc_v2",
        ("POST", "operate", true) => "/api/c/compapi/v2/gse/operate_proc",
        ("GET", "operate", false) => "/api/c/compapi/v2/gse/get_proc_operate_result_v2",
        ("GET", "operate", true) => "/api/c/compapi/v2/gse/get_proc_operate_result",
        ("GET" | "POST", "status", false) => "/api/c/compapi/v2/gse/get_proc_status_v2",
        ("GET" | "POST", "status", true) => "/api/c/compapi/v2/gse/get_proc_status",
        ("GET" | "POST", "syncstatus", _) => "/api/c/compapi/v2/gse/sync_proc_status",
        ("POST", "procinfo", _) => "/api/c/compapi/v2/gse/register_proc_info",
        ("PUT", "procinfo", _) => "/api/c/compapi/v2/gse/update_proc_info",
        ("DELETE", "procinfo", _) => "/api/c/compapi/v2/gse/unregister_proc_info",
        ("POST", "groupinfo", _) => "/api/c/compapi/v2/gse/set_process_group_info",
        ("GET", "groupinfo", _) => "/api/c/compapi/v2/gse/get_process_group_info",
        _ => return None,
    })
}

/// Collapses repeated slashes, drops a trailing one, and takes off a gateway prefix `/api/bk-gse/<stage>`
/// (contract v2-http-task#6).
#[must_use]
pub fn normalise(path: &str) -> Cow<'_, str> {
    let clean = !path.contains("//") && (path.len() == 1 || !path.ends_with('/'));
    let path = if clean {
        Cow::Borrowed(path)
    } else {
        let joined: String = path
            .split('/')
            .filter(|part| !part.is_empty())
            .flat_map(|part| ["/", part])
            .collect();
        Cow::Owned(if joined.is_empty() { "/".into() } else { joined })
    };
    let inner = path
        .strip_prefix("/api/bk-gse/")
        .and_then(|rest| rest.find('/').map(|at| path.len() - rest.len() + at));
    match (inner, path) {
        (Some(at), Cow::Borrowed(text)) => Cow::Borrowed(&text[at..]),
        (Some(at), Cow::Owned(text)) => Cow::Owned(text[at..].to_owned()),
        (None, path) => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_finds_its_call() {
        // contract: v2-http-task#4, v2-http-task#6
        for route in Route::ALL {
            for path in route.paths() {
                let doubled = path.replace('/', "//");
                for spelling in [
                    (*path).to_owned(),
                    format!("{path}/"),
                    format!("/{path}"),
                    doubled,
                    format!("/api/bk-gse/prod{path}"),
                ] {
                    assert_eq!(Route::lookup(&normalise(&spelling)), Some(*route), "{spelling}");
                }
            }
        }
        for verb in [
            "async_execute_script",
            "get_execute_script_result",
            "async_terminate_execute_script",
            "async_transfer_file",
            "get_transfer_file_result",
            "async_terminate_transfer_file",
        ] {
            let plain = Route::lookup(&format!("/api/v2/task/{verb}"));
            assert!(plain.is_some());
            assert_eq!(plain, Route::lookup(&format!("/api/v2/task/extensions/{verb}")));
        }
        for wrong in [
            "/",
            "//",
            "/api",
            "/api/v2/task/async_execute_scripts",
            "/api/bk-gse",
            "/api/bk-gse/prod",
        ] {
            assert_eq!(Route::lookup(&normalise(wrong)), None, "{wrong}");
        }
    }

    #[test]
    fn calls_that_only_their_method_tells_apart() {
        // contract: procmgr-agent-lifecycle#9
        for (method, path, route) in [
            ("POST", "/procapi/v2/proc/operate", Some(Route::OperateProc)),
            ("GET", "/procapi/v2/proc/operate", Some(Route::ProcResult)),
            ("GET", "/procapi/v1/proc/operate", Some(Route::V1ProcResult)),
            ("PUT", "/procapi/v1/proc/procinfo", Some(Route::V1UpdateProcInfo)),
            ("DELETE", "/procapi/v1/proc/procinfo", Some(Route::V1UnregisterProcInfo)),
            ("POST", "/procapi/v1/proc/groupinfo", Some(Route::SetProcGroup)),
            ("PATCH", "/procapi/v1/proc/procinfo", None),
            ("GET", "/procapi/v3/proc/operate", None),
            ("GET", "/procapi", None),
        ] {
            let found = by_method(method, path).and_then(Route::lookup);
            assert_eq!(found, route, "{method} {path}");
            assert!(by_method(method, path).is_none_or(|path| method == "PUT"
                || method == "DELETE"
                || method == "POST"
                || route.is_some_and(|route| route.allows_get(path))));
        }
    }

    #[test]
    fn empty_data_has_the_shape_of_the_call() {
        // contract: v2-http-task#2, v2-http-task#3
        assert_eq!(Route::ExecuteScript.shape().empty(), b"{\"result\":{}}");
        assert_eq!(Route::TerminateTransfer.shape().empty(), b"{\"result\":{}}");
        assert_eq!(Route::ScriptResult.shape().empty(), b"{\"result\":[]}");
        assert_eq!(Route::ListAgentState.shape().empty(), b"[]");
        for route in Route::ALL {
            let value: serde_json::Value = serde_json::from_slice(route.shape().empty()).unwrap();
            assert!(!value.is_null());
        }
    }
}
