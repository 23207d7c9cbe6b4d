//! `gse_agent.conf`: the JSON that node management renders for agents, in its newer and its older layout (contract data-plane, 2;
//! procmgr-agent-lifecycle, 3.6 and 3.8). What is known is put under this agent's own keys; `--check` says what became of each key. What
//! nobody here needs is left out, as is what is unknown.

use gse_core::config::Adopted;
use serde_json::{Map, Value};
use toml::Table;

/// Reads a JSON configuration; `None` when the text is none.
pub(crate) fn adopt(text: &str) -> Option<Result<Adopted, String>> {
    if !text.trim_start().starts_with('{') {
        return None;
    }
    let parsed: Result<Map<String, Value>, _> = serde_json::from_str(text);
    Some(match parsed {
        Ok(object) => Reader::default().read(&object),
        Err(error) => Err(format!(
            "not valid JSON (line {}, column {}): {error}",
            error.line(),
            error.column()
        )),
    })
}

/// Keys of both layouts that this agent knows and has no use for, and why.
const NOT_NEEDED: &[(&str, &str)] = &[
    ("access.file_endpoints", "agents are told where file servers are"),
    ("base.tls_passwd_file", "keys are read unencrypted"),
    ("base.processor_num", "see runtime.worker_threads"),
    ("base.processor_size", "queues are bounded in bytes"),
    (
        "data.ipc_thread_num",
        "sockets are served by the threads there are; see runtime.worker_threads",
    ),
    ("zone_id", "servers tell agents of each other"),
    ("city_id", "servers tell agents of each other"),
    ("zkhost", "servers are named, not discovered"),
    ("zkauth", "servers are named, not discovered"),
    ("recvthread", "sockets are served by the threads there are"),
    ("dbgipc", "records of operations take the same way as others"),
];

#[derive(Default)]
struct Reader {
    adopted: Adopted,
    problems: Vec<String>,
}

impl Reader {
    fn read(mut self, object: &Map<String, Value>) -> Result<Adopted, String> {
        let port = |key: &str| object.get(key).and_then(text_of);
        let (io_port, data_port) = (port("ioport"), port("dataport"));
        let mut flat = Vec::new();
        flatten("", object, &mut flat);
        for (key, value) in flat {
            match key.as_str() {
                "run_mode" => self.text(&key, value, "run_mode"),
                "runmode" => {
                    let mode = if text_of(value).as_deref() == Some("0") {
                        "proxy"
                    } else {
                        "agent"
                    };
                    self.set(&key, "run_mode", mode);
                }
                "cloud_id" | "cloudid" => self.number(&key, value, "cloud_id"),
                "bizid" => self.number(&key, value, "data.socket.bizid"),
                "access.cluster_endpoints" => self.endpoints(&key, value, "servers"),
                "access.data_endpoints" => self.endpoints(&key, value, "data.servers"),
                "taskserver" => self.servers(&key, value, io_port.as_deref(), "servers"),
                "dataserver" => self.servers(&key, value, data_port.as_deref(), "data.servers"),
                "ioport" | "dataport" => self.note(&key, "the port of the servers that name none"),
                "base.tls_ca_file" => self.text(&key, value, "tls.ca"),
                "base.tls_cert_file" => self.text(&key, value, "tls.cert"),
                "base.tls_key_file" => self.text(&key, value, "tls.key"),
                "cert" => self.certificates(&key, value),
                "data.ipc" | "dataipc" => self.data_socket(&key, value),
                "pluginipc" => self.list(&key, value, "messages.paths"),
                "data.enable_compression" => self.flag(&key, value, "data.enable_compression"),
                "task.proc_event_data_id" | "processeventdataid" => self.number(&key, value, "proc.event_data_id"),
                "proccfg" => self.text(&key, value, "proc.info_path"),
                "identityip" => self.list(&key, value, "addresses"),
                _ => {
                    let why = NOT_NEEDED.iter().find(|(known, _)| *known == key);
                    self.note(
                        &key,
                        &why.map_or("not used".to_owned(), |(_, why)| format!("not used: {why}")),
                    );
                }
            }
        }
        match self.problems.is_empty() {
            true => Ok(self.adopted),
            false => Err(self.problems.join("; ")),
        }
    }

    fn note(&mut self, key: &str, what: &str) {
        self.adopted.notes.push(format!("{key}: {what}"));
    }

    fn wrong(&mut self, key: &str, what: &str) {
        self.problems.push(format!("{key} {what}"));
    }

    fn set(&mut self, from: &str, to: &str, value: impl Into<toml::Value>) {
        let value = value.into();
        self.note(from, &format!("{to} = {value}"));
        let mut table = &mut self.adopted.values;
        let mut rest = to;
        while let Some((first, more)) = rest.split_once('.') {
            let inner = table.entry(first).or_insert_with(|| Table::new().into());
            let toml::Value::Table(inner) = inner else { return };
            table = inner;
            rest = more;
        }
        table.insert(rest.to_owned(), value);
    }

    /// Empty texts mean that nothing was said.
    fn text(&mut self, key: &str, value: &Value, to: &str) {
        match value {
            Value::String(text) if text.is_empty() => self.note(key, "not used: empty"),
            Value::String(text) => self.set(key, to, text.clone()),
            _ => self.wrong(key, "must be a text"),
        }
    }

    fn number(&mut self, key: &str, value: &Value, to: &str) {
        match text_of(value).and_then(|text| text.parse::<i64>().ok()) {
            Some(number) => self.set(key, to, number),
            None => self.wrong(key, "must be a number"),
        }
    }

    fn flag(&mut self, key: &str, value: &Value, to: &str) {
        match value {
            Value::Bool(flag) => self.set(key, to, *flag),
            _ => self.wrong(key, "must be true or false"),
        }
    }

    fn list(&mut self, key: &str, value: &Value, to: &str) {
        match text_of(value) {
            Some(text) if text.is_empty() => self.note(key, "not used: empty"),
            Some(text) => self.set(key, to, vec![text]),
            None => self.wrong(key, "must be a text"),
        }
    }

    /// `host:port,host:port`
    fn endpoints(&mut self, key: &str, value: &Value, to: &str) {
        match value.as_str() {
            Some(text) => {
                let all = text.split(',').map(str::trim).filter(|one| !one.is_empty());
                let all: Vec<String> = all.map(str::to_owned).collect();
                self.set(key, to, all);
            }
            None => self.wrong(key, "must be a text such as \"10.0.0.1:28625,10.0.0.2:28625\""),
        }
    }

    /// `[{"ip": ..., "port": ...}]`
    fn servers(&mut self, key: &str, value: &Value, port: Option<&str>, to: &str) {
        let one = |server: &Value| {
            let ip = server.get("ip")?.as_str()?;
            let own = server.get("port").and_then(text_of);
            let port = own.as_deref().or(port)?;
            Some(if ip.contains(':') {
                format!("[{ip}]:{port}")
            } else {
                format!("{ip}:{port}")
            })
        };
        let all: Option<Vec<String>> = value.as_array().and_then(|servers| servers.iter().map(one).collect());
        match all {
            Some(all) => self.set(key, to, all),
            None => self.wrong(key, "must be a list of {\"ip\": ..., \"port\": ...}"),
        }
    }

    /// An agent that is configured like this is the one of its host, so plugins that know no configuration find it too.
    fn data_socket(&mut self, key: &str, value: &Value) {
        let before = self.problems.len();
        self.list(key, value, "data.socket.paths");
        if self.problems.len() == before {
            self.set(key, "data.socket.compiled_in", true);
        }
    }

    /// A directory with files of the usual names.
    fn certificates(&mut self, key: &str, value: &Value) {
        let Some(dir) = value.as_str().filter(|dir| !dir.is_empty()) else {
            return self.note(key, "not used: no directory");
        };
        let dir = dir.trim_end_matches('/');
        for (to, name) in [
            ("tls.ca", "gseca.crt"),
            ("tls.cert", "gse_agent.crt"),
            ("tls.key", "gse_agent.key"),
        ] {
            self.set(key, to, format!("{dir}/{name}"));
        }
    }
}

/// A text, or a number as one: templates render some numbers in quotes.
fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

fn flatten<'v>(prefix: &str, object: &'v Map<String, Value>, into: &mut Vec<(String, &'v Value)>) {
    for (key, value) in object {
        match value {
            // No key of these configurations lies deeper.
            Value::Object(inner) if prefix.is_empty() => flatten(&format!("{key}."), inner, into),
            value => into.push((format!("{prefix}{key}"), value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, RunMode};
    use std::io::Write;

    fn load(text: &str) -> Result<(Config, Vec<String>), String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let loaded = gse_core::config::load_with::<Config>("gse_agent", Some(file.path()), &[], []);
        let loaded = loaded.map_err(|error| error.to_string())?;
        let notes = loaded.notes().to_vec();
        Ok((loaded.config, notes))
    }

    #[test]
    fn as_node_management_renders_it() {
        // contract: data-plane#43
        let (config, notes) = load(
            r#"{"run_mode": "proxy", "cloud_id": 3, "zone_id": "default", "city_id": "default", "enable_static_access": false,
            "access": {"cluster_endpoints": "10.0.0.1:28668,10.0.0.2:28668", "data_endpoints": "10.0.0.1:28625, 10.0.0.2:28625",
                "file_endpoints": "10.0.0.1:28925"},
            "base": {"tls_ca_file": "/c/gseca.crt", "tls_cert_file": "/c/gse_agent.crt", "tls_key_file": "/c/gse_agent.key",
                "tls_passwd_file": "", "processor_num": 4, "processor_size": 4096},
            "proxy": {"bind_ip": "::", "bind_port": 28668, "thread_num": 4},
            "task": {"proc_event_data_id": 1100008, "script_file_clean_starup_clock_time": 0},
            "data": {"ipc": "/var/run/ipc.state.report", "ipc_thread_num": 4, "enable_compression": true},
            "logger": {"path": "/tmp", "level": "INFO"}, "extra_config_directory": ""}"#,
        )
        .unwrap();
        assert_eq!(config.servers, ["10.0.0.1:28668", "10.0.0.2:28668"]);
        assert_eq!(config.data.servers, ["10.0.0.1:28625", "10.0.0.2:28625"]);
        assert_eq!(config.data.socket.paths, ["/var/run/ipc.state.report"]);
        assert!(config.data.socket.compiled_in && config.data.enable_compression);
        assert_eq!((config.run_mode, config.cloud_id), (RunMode::Proxy, 3));
        assert_eq!(config.proc.event_data_id, 1_100_008);
        assert_eq!(config.tls.cert, std::path::Path::new("/c/gse_agent.crt"));
        assert!(
            notes
                .iter()
                .any(|note| note.starts_with("data.ipc_thread_num: not used")),
            "{notes:?}"
        );
        assert!(
            notes.iter().any(|note| note == "extra_config_directory: not used"),
            "{notes:?}"
        );
    }

    #[test]
    fn the_older_layout() {
        // contract: data-plane#43, data-plane#42
        let (config, _) = load(
            r#"{"dataipc": "47000", "dataport": 58625, "ioport": 48668, "cloudid": 0, "runmode": 1, "cert": "/c/",
            "taskserver": [{"ip": "10.0.0.1", "port": 48533}], "dataserver": [{"ip": "10.0.0.1"}, {"ip": "fd00::1", "port": 58626}],
            "identityip": "10.1.1.1", "pluginipc": "/var/run/ipc.plugin.manage", "alliothread": 8}"#,
        )
        .unwrap();
        assert_eq!(config.data.servers, ["10.0.0.1:58625", "[fd00::1]:58626"]);
        assert_eq!(config.servers, ["10.0.0.1:48533"]);
        assert_eq!(config.data.socket.paths, ["47000"]);
        assert_eq!(config.messages.paths, ["/var/run/ipc.plugin.manage"]);
        assert_eq!(config.tls.ca, std::path::Path::new("/c/gseca.crt"));
        assert_eq!(config.addresses.len(), 1);
    }

    #[test]
    fn what_cannot_be_meant_is_said_together() {
        let error = load(r#"{"cloud_id": "x", "data": {"ipc": [], "enable_compression": 1}}"#).unwrap_err();
        for word in [
            "cloud_id must be",
            "data.ipc must be",
            "data.enable_compression must be",
        ] {
            assert!(error.contains(word), "{error}");
        }
        let error = load("{ not json").unwrap_err();
        assert!(error.contains("line 1"), "{error}");
    }
}
