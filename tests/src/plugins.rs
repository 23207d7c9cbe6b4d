//! Processes as platforms operate them: the calls, and plugins on disk with scripts in the shape of real ones' (start.sh, stop.sh,
//! restart.sh, reload.sh), whose daemon can be made to behave in any way.
//!
//! A daemon is a copy of the shell under the plugin's name, so that its executable has that name, and notes down each of its starts.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::api::Api;

/// Path family of the calls about processes.
pub const PROC: &str = "/api/v2/proc";

/// Contract numbers of operations.
pub mod op {
    /// Start and host.
    pub const START: i64 = 0;
    /// Stop and host no longer.
    pub const STOP: i64 = 1;
    /// Look.
    pub const STATUS: i64 = 2;
    /// Host.
    pub const REGISTER: i64 = 3;
    /// Host no longer.
    pub const UNREGISTER: i64 = 4;
    /// Run the restart command.
    pub const RESTART: i64 = 7;
    /// Run the reload command.
    pub const RELOAD: i64 = 8;
    /// Run the kill command and host no longer.
    pub const KILL: i64 = 9;
}

/// Submits operations and gives the task id.
///
/// # Panics
/// When the submit is refused.
pub async fn submit(api: &Api, elements: &[Value]) -> String {
    let reply = api
        .post(
            &format!("{PROC}/operate_proc_multi"),
            &json!({ "proc_operate_req": elements }),
        )
        .await;
    assert_eq!(reply["code"], 0, "{reply}");
    let id = reply["data"]["task_id"].as_str().unwrap_or_default().to_owned();
    assert!(!id.is_empty(), "{reply}");
    id
}

/// Polls a task until no entry is under way, through times in which there is no answer.
///
/// # Panics
/// When that takes longer than `limit`.
pub async fn finished(api: &Api, task: &str, limit: Duration) -> BTreeMap<String, Value> {
    let started = Instant::now();
    loop {
        let body = json!({ "task_id": task });
        let reply = api.try_post(&format!("{PROC}/get_proc_operate_result_v2"), &body).await;
        if let Some(reply) = &reply
            && reply["code"] == 0
        {
            let rows = reply["data"].as_object().expect("a map of entries");
            if rows.values().all(|row| row["error_code"] != 115) {
                return rows.iter().map(|(key, row)| (key.clone(), row.clone())).collect();
            }
        }
        assert!(started.elapsed() < limit, "not over within {limit:?}: {reply:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What a plugin's daemon does: shell lines in which `$pidfile` is its pid file, `$program` its executable and `$again` is empty but where
/// the daemon itself has said otherwise. `begun` notes a start down, `stay` never ends.
pub mod daemon {
    /// Writes its pid file and stays; a reload is noted down.
    pub const PLAIN: &str = "begun; echo $BASHPID > $pidfile; stay";
    /// Goes through two forks before it is what it is to be; the processes before have ended then.
    pub const DOUBLE_FORK: &str = "
case $again in
'') setsid $program ../etc/daemon.sh $pidfile once & exit 0 ;;
once) setsid $program ../etc/daemon.sh $pidfile twice & exit 0 ;;
esac
begun; echo $BASHPID > $pidfile; stay";
    /// Writes its pid file three seconds after its start.
    pub const LATE: &str = "begun; sleep 3; echo $BASHPID > $pidfile; stay";
    /// Dies at once, with a pid file.
    pub const MAYFLY: &str = "begun; echo $BASHPID > $pidfile; exit 3";
    /// Does not mind SIGTERM.
    pub const DEAF: &str = "begun; trap '' TERM; echo $BASHPID > $pidfile; stay";
    /// Takes 150 MB and keeps them.
    pub const GREEDY: &str = "
begun; echo $BASHPID > $pidfile
printf -v much '%*s' 150000000 ''
stay";
    /// Takes a whole core.
    pub const BUSY: &str = "begun; echo $BASHPID > $pidfile; while :; do :; done";
}

/// A plugin on disk. What it has started is killed when dropped.
#[derive(Debug)]
pub struct Plugin {
    /// Its directory: `bin`, `etc`, `run`.
    pub dir: PathBuf,
    /// Name of its registration.
    pub name: String,
    /// Name of its executable.
    pub proc_name: String,
}

const BEGIN: &str = "#!/bin/sh
pidfile=$1
again=$2
begun() { echo $BASHPID >> ../run/starts; }
stay() { trap 'echo reload >> ../run/commands' USR1; while :; do sleep 1 & wait; done; }
";

const START: &str = "#!/bin/sh
# start.sh NAME: starts it in the background; good if it is alive a moment later
cd \"$(dirname \"$0\")\" || exit 1
echo start >> ../run/commands
setsid ./$1 ../etc/daemon.sh ../run/$1.pid </dev/null >/dev/null 2>&1 &
exit 0
";

const STOP: &str = "#!/bin/sh
# stop.sh NAME: ends it by its pid file
cd \"$(dirname \"$0\")\" || exit 1
echo stop >> ../run/commands
read pid < ../run/$1.pid || exit 0
kill -TERM $pid
for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  kill -0 $pid 2>/dev/null || { rm -f ../run/$1.pid; exit 0; }
  sleep 0.1
done
exit 0
";

const RESTART: &str = "#!/bin/sh
cd \"$(dirname \"$0\")\" || exit 1
./stop.sh $1
./start.sh $1
";

const RELOAD: &str = "#!/bin/sh
cd \"$(dirname \"$0\")\" || exit 1
read pid < ../run/$1.pid && kill -USR1 $pid
";

const KILL: &str = "#!/bin/sh
cd \"$(dirname \"$0\")\" || exit 1
echo kill >> ../run/commands
read pid < ../run/$1.pid && kill -KILL $pid
rm -f ../run/$1.pid
";

impl Plugin {
    /// Installs one called `name` in a directory of its own below `root`; its executable is called `proc_name`.
    ///
    /// # Panics
    /// When it can't be.
    #[must_use]
    pub fn install(root: &Path, name: &str, proc_name: &str, daemon: &str) -> Self {
        let dir = root.join(name);
        for sub in ["bin", "etc", "run"] {
            std::fs::create_dir_all(dir.join(sub)).expect("a directory");
        }
        let plugin = Self {
            dir,
            name: name.to_owned(),
            proc_name: proc_name.to_owned(),
        };
        std::fs::copy("/bin/bash", plugin.program()).expect("a shell to copy");
        for (script, text) in [
            ("start.sh", START),
            ("stop.sh", STOP),
            ("restart.sh", RESTART),
            ("reload.sh", RELOAD),
            ("kill.sh", KILL),
        ] {
            plugin.script(script, text);
        }
        plugin.daemon(daemon);
        plugin
    }

    /// Replaces one of its scripts.
    ///
    /// # Panics
    /// When it can't be written.
    pub fn script(&self, name: &str, text: &str) {
        let path = self.dir.join("bin").join(name);
        std::fs::write(&path, text).expect("a script");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("an executable");
    }

    /// Replaces what the daemon does.
    ///
    /// # Panics
    /// When it can't be written.
    pub fn daemon(&self, text: &str) {
        std::fs::write(
            self.dir.join("etc/daemon.sh"),
            format!("{BEGIN}program=./{}\n{text}\n", self.proc_name),
        )
        .expect("a script");
    }

    fn program(&self) -> PathBuf {
        self.dir.join("bin").join(&self.proc_name)
    }

    /// Its pid file.
    #[must_use]
    pub fn pid_file(&self) -> PathBuf {
        self.dir.join("run").join(format!("{}.pid", self.proc_name))
    }

    /// Its specification, with what is to be otherwise laid over it, part by part.
    ///
    /// # Panics
    /// When `other` is no object of objects.
    #[must_use]
    pub fn spec(&self, other: &Value) -> Value {
        let name = &self.proc_name;
        let user = nix::unistd::User::from_uid(nix::unistd::geteuid())
            .ok()
            .flatten()
            .map_or_else(|| "root".to_owned(), |user| user.name);
        let mut spec = json!({
            "identity": {
                "index_key": "", "proc_name": name, "setup_path": self.dir.join("bin"),
                "pid_path": self.pid_file(), "config_path": "", "log_path": "", "user": user,
            },
            "control": {
                "start_cmd": format!("./start.sh {name}"), "stop_cmd": format!("./stop.sh {name}"),
                "restart_cmd": format!("./restart.sh {name}"), "reload_cmd": format!("./reload.sh {name}"),
                "kill_cmd": format!("./kill.sh {name}"), "version_cmd": "echo 1.2.3", "health_cmd": "",
            },
            "alive_monitor_policy": {
                "auto_type": 1, "start_check_secs": 1, "stop_check_secs": 1, "start_retries": 3,
                "start_interval": 1, "op_timeout": 20,
            },
        });
        for (part, values) in other.as_object().expect("an object of objects") {
            for (key, value) in values.as_object().expect("an object") {
                spec[part][key] = value.clone();
            }
        }
        spec
    }

    /// An element of a call about it on one host.
    #[must_use]
    pub fn element(&self, agent: &str, operation: i64, other: &Value) -> Value {
        json!({
            "meta": {"namespace": "nodeman", "name": self.name},
            "op_type": operation, "agent_id_list": [agent], "spec": self.spec(other),
        })
    }

    /// One operation on one host to its end: the entry.
    ///
    /// # Panics
    /// When it is refused, or not over within a minute.
    pub async fn operate(&self, api: &Api, agent: &str, operation: i64) -> Value {
        self.operate_with(api, agent, operation, &json!({})).await
    }

    /// The same with another specification.
    ///
    /// # Panics
    /// When it is refused, or not over within a minute.
    pub async fn operate_with(&self, api: &Api, agent: &str, operation: i64, other: &Value) -> Value {
        let task = submit(api, &[self.element(agent, operation, other)]).await;
        let mut rows = finished(api, &task, Duration::from_secs(60)).await;
        assert_eq!(rows.len(), 1, "{rows:?}");
        rows.remove(&format!("{agent}:nodeman:{}", self.name))
            .unwrap_or_else(|| panic!("no entry under its key: {rows:?}"))
    }

    /// The instance that the host itself tells of.
    ///
    /// # Panics
    /// When the answer is not as the contract has it.
    // contract: procmgr-agent-lifecycle#10
    pub async fn status(&self, api: &Api, agent: &str) -> Value {
        let row = self.operate(api, agent, op::STATUS).await;
        let content: Value = serde_json::from_str(row["content"].as_str().unwrap_or_default())
            .unwrap_or_else(|error| panic!("{error}: {row}"));
        assert_eq!(row["error_code"], 0, "{row}");
        let processes = content["process"].as_array().expect("processes");
        assert_eq!(processes.len(), 1, "{content}");
        processes[0]["instance"][0].clone()
    }

    /// Process ids of its daemons, in any parent's care: those whose executable is its own, without what they have forked and is about to
    /// become another program.
    ///
    /// # Panics
    /// When processes can't be listed.
    #[must_use]
    pub fn alive(&self) -> Vec<i32> {
        let program = self.program();
        let mut found: Vec<(i32, i32)> = std::fs::read_dir("/proc")
            .expect("a list of processes")
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program))
            .filter_map(|pid| Some((pid, parent(pid)?)))
            .collect();
        let pids: Vec<i32> = found.iter().map(|(pid, _)| *pid).collect();
        found.retain(|(_, parent)| !pids.contains(parent));
        let mut pids: Vec<i32> = found.into_iter().map(|(pid, _)| pid).collect();
        pids.sort_unstable();
        pids
    }

    fn lines(&self, file: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.dir.join("run").join(file)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// How often a daemon has begun.
    #[must_use]
    pub fn starts(&self) -> usize {
        self.lines("starts").len()
    }

    /// The scripts that were run, in order.
    #[must_use]
    pub fn commands(&self) -> Vec<String> {
        self.lines("commands")
    }

    /// Kills what is alive of it, as a crash would.
    pub fn crash(&self) {
        for pid in self.alive() {
            // It may just have ended.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

fn parent(pid: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}

impl Drop for Plugin {
    fn drop(&mut self) {
        // Nothing starts it again from here on.
        let _ = std::fs::remove_file(self.dir.join("bin/start.sh"));
        self.crash();
    }
}
