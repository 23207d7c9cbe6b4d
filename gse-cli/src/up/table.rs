//! What `gse up` prints when everything is there.

use std::path::{Path, PathBuf};

use super::data::Data;

/// Where everything listens.
pub(super) struct Addresses {
    /// URL of the HTTP API.
    pub(super) api: String,
    /// gse_task's own HTTP port.
    pub(super) task_http: String,
    /// Agents.
    pub(super) agents: String,
    /// gse_btsvr's own HTTP port.
    pub(super) file_http: String,
    /// Agents that move files.
    pub(super) file_link: String,
    /// gse_data's own HTTP port.
    pub(super) data_http: String,
    /// Agents that deliver records.
    pub(super) data_link: String,
    /// gse_procmgr's own HTTP port.
    pub(super) proc_http: String,
    /// Between the servers.
    pub(super) internal: String,
    /// The store.
    pub(super) store: String,
    /// Metrics, by server.
    pub(super) ops: Vec<(&'static str, String)>,
}

/// The whole text. `connected` says how the local agent is, if there is one.
pub(super) fn text(data: &Data, addresses: &Addresses, connected: Option<bool>) -> String {
    let mut rows = vec![
        ("HTTP API", addresses.api.clone(), "every call of the platforms"),
        (
            "gse_task HTTP",
            format!("http://{}", addresses.task_http),
            "the script calls alone",
        ),
        (
            "gse_btsvr HTTP",
            format!("http://{}", addresses.file_http),
            "the file calls alone",
        ),
        (
            "gse_data HTTP",
            format!("http://{}", addresses.data_http),
            "the calls about data routes alone",
        ),
        (
            "gse_procmgr HTTP",
            format!("http://{}", addresses.proc_http),
            "the calls about processes alone",
        ),
        ("agents", addresses.agents.clone(), "TLS, agents' certificates"),
        ("files", addresses.file_link.clone(), "TLS, agents that move files"),
        ("data", addresses.data_link.clone(), "TLS, agents that deliver records"),
        ("internal", addresses.internal.clone(), "TLS, servers' certificates"),
        ("store", addresses.store.clone(), "RESP, with a password"),
    ];
    for (name, address) in &addresses.ops {
        let what = match *name {
            "gse_task" => "metrics (task)",
            "gse_btsvr" => "metrics (file)",
            "gse_data" => "metrics (data)",
            "gse_procmgr" => "metrics (proc)",
            "gse_syncdata" => "metrics (hosts)",
            "gse_alarm" => "metrics (alarm)",
            _ => "metrics (api)",
        };
        rows.push((
            what,
            format!("http://{address}/metrics"),
            "/healthz and /readyz beside it",
        ));
    }
    rows.push(match connected {
        Some(true) => ("local agent", data.identity.agent_id.clone(), "connected"),
        Some(false) => (
            "local agent",
            data.identity.agent_id.clone(),
            "not connected yet; see log/agent.log",
        ),
        None => ("local agent", "none".to_owned(), "--no-agent"),
    });
    rows.push(("application", data.cli.app.clone(), "its secret is in cli.toml"));
    let width = rows
        .iter()
        .map(|(_, value, _)| value.chars().count())
        .max()
        .unwrap_or_default();
    let mut out = format!(
        "gse {} is up. Everything it keeps is in {}\n\n",
        env!("CARGO_PKG_VERSION"),
        data.dir().display()
    );
    for (name, value, remark) in rows {
        out += &format!("  {name:<16} {value:<width$}  {remark}\n");
    }
    if data.fresh {
        out += &format!(
            "\nApplication {} was made. Its secret, shown this once:\n\n  {}\n",
            data.cli.app, data.cli.secret
        );
    }
    let program = program();
    let place = if is_default(data.dir()) {
        String::new()
    } else {
        format!(" --data {}", data.dir().display())
    };
    out += &format!(
        "\nTry, in another terminal:\n\n  {program} agents{place}\n  {program} run{place} 'uname -a'\n  {program} data send{place} 1430 hello\n  {program} data ls{place}\n\nCtrl-C stops it.\n"
    );
    out
}

fn is_default(dir: &Path) -> bool {
    crate::client::data_dir(&crate::args::DataDir { data: None })
        .ok()
        .and_then(|default| default.canonicalize().ok())
        .is_some_and(|default| default == dir)
}

/// How the user can call this program: by its name when the shell would find just it, else by its path.
fn program() -> String {
    let Ok(exe) = std::env::current_exe() else {
        return "gse".to_owned();
    };
    let found = std::env::var_os("PATH").and_then(|path| {
        std::env::split_paths(&path)
            .map(|dir| dir.join("gse"))
            .find(|file| file.is_file())
            .and_then(|file| file.canonicalize().ok())
    });
    if found.as_ref() == Some(&exe) {
        return "gse".to_owned();
    }
    let relative = std::env::current_dir()
        .ok()
        .and_then(|here| exe.strip_prefix(here).ok().map(PathBuf::from));
    match relative {
        // A name alone would be looked for in PATH.
        Some(name) if name.components().count() == 1 => format!("./{}", name.display()),
        Some(path) => path.display().to_string(),
        None => exe.display().to_string(),
    }
}
