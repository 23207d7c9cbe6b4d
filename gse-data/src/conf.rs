//! `gse_data_proxy.conf`: the JSON that node management renders for the gse_data of a proxy, in its newer and its older layout (contract
//! data-plane, 2). What is known is put under this program's own keys; `--check` says what became of each key. What nobody here needs is
//! left out, as is what is unknown.

use gse_core::config::Adopted;
use gse_proto::datalink::{MAX_BODY, MAX_PAYLOAD};
use serde_json::{Map, Value};
use toml::Table;

/// Type of an exporter that passes records on to another gse_data.
const TO_SERVER: i64 = 9;

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

#[derive(Default)]
struct Reader {
    adopted: Adopted,
    problems: Vec<String>,
}

impl Reader {
    fn read(mut self, object: &Map<String, Value>) -> Result<Adopted, String> {
        match object.get("run_mode").map(Value::as_str) {
            None | Some(Some("proxy")) => self.set("the file", "run_mode", "proxy"),
            Some(_) => self.wrong("run_mode", "must be \"proxy\": this layout is read for proxies alone"),
        }
        for (key, value) in object {
            match (key.as_str(), value) {
                ("run_mode", _) => {}
                ("dataflow", Value::Object(flow)) => self.flow(flow),
                ("metric", Value::Object(metric)) => {
                    self.listen(
                        "metric",
                        metric,
                        ["exporter_bind_ip", "exporter_bind_port"],
                        "ops.listen",
                    );
                    self.others("metric", metric, &["exporter_bind_ip", "exporter_bind_port"]);
                }
                ("dataflow" | "metric", _) => self.wrong(key, "must be an object"),
                ("logger", _) => self.note(key, "not used: see log.*"),
                _ => self.note(key, "not used"),
            }
        }
        if !object.contains_key("dataflow") {
            self.wrong(
                "dataflow",
                "is missing; it says where records come from and where they go",
            );
        }
        match self.problems.is_empty() {
            true => Ok(self.adopted),
            false => Err(self.problems.join("; ")),
        }
    }

    fn flow(&mut self, flow: &Map<String, Value>) {
        let receivers = self.objects(flow, "receiver");
        for (number, one) in receivers.iter().enumerate() {
            let key = format!("dataflow.receiver[{number}]");
            self.receiver(&key, number, one);
        }
        let channels = self.objects(flow, "channel");
        let named: Vec<&str> = channels
            .iter()
            .filter_map(|one| one.get("exporter")?.as_array())
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let mut servers = Vec::new();
        for (number, one) in self.objects(flow, "exporter").iter().enumerate() {
            let key = format!("dataflow.exporter[{number}]");
            let name = one.get("name").and_then(Value::as_str).unwrap_or_default();
            let kind = one.get("type").and_then(number_of);
            if !named.is_empty() && !named.contains(&name) {
                self.note(&key, "not used: no channel leads there");
            } else if kind.is_some_and(|kind| kind != TO_SERVER) {
                self.note(&key, "not used: a proxy passes records on to gse_data alone (type 9)");
            } else {
                self.exporter(&key, one, &mut servers);
            }
        }
        if !servers.is_empty() {
            self.set("dataflow.exporter", "upstream.servers", servers);
        }
        for number in 0..channels.len() {
            let key = format!("dataflow.channel[{number}]");
            self.note(&key, "every record goes to the servers of dataflow.exporter");
        }
        self.others("dataflow", flow, &["receiver", "exporter", "channel"]);
    }

    fn receiver(&mut self, key: &str, number: usize, one: &Map<String, Value>) {
        let to = match number {
            0 => "link.listen",
            1 => "link.listen_v1",
            _ => return self.note(key, "not used: there are two listeners at most"),
        };
        let names = if one.contains_key("bind_port") {
            ["bind_ip", "bind_port"]
        } else {
            ["bind", "port"]
        };
        self.listen(key, one, names, to);
        if number == 0 {
            self.certificates(key, one, "link.tls");
            if let Some(value) = one.get("backlog") {
                match number_of(value) {
                    Some(backlog) => self.set(&format!("{key}.backlog"), "link.backlog", backlog),
                    None => self.wrong(&format!("{key}.backlog"), "must be a number"),
                }
            }
        } else {
            self.note(key, "certificates are those of the first receiver");
        }
        if one.contains_key("max_message_size") {
            let what = format!("not used: records up to {MAX_PAYLOAD} bytes pass, in batches up to {MAX_BODY}");
            self.note(&format!("{key}.max_message_size"), &what);
        }
        let mut known = vec!["name", "max_message_size", "backlog"];
        known.extend(names);
        known.extend(CERTIFICATES);
        self.others(key, one, &known);
    }

    fn exporter(&mut self, key: &str, one: &Map<String, Value>, servers: &mut Vec<String>) {
        if let Some(text) = one.get("endpoints") {
            match text.as_str() {
                Some(text) => {
                    let all = text.split(',').map(str::trim).filter(|one| !one.is_empty());
                    servers.extend(all.map(str::to_owned));
                }
                None => self.wrong(
                    &format!("{key}.endpoints"),
                    "must be a text such as \"10.0.0.1:28625,10.0.0.2:28625\"",
                ),
            }
        }
        if let Some(list) = one.get("addresses") {
            let all = list.as_array().and_then(|all| {
                all.iter()
                    .map(|one| address(one.get("ip")?, one.get("port")?))
                    .collect::<Option<Vec<_>>>()
            });
            match all {
                Some(all) => servers.extend(all),
                None => self.wrong(
                    &format!("{key}.addresses"),
                    "must be a list of {\"ip\": ..., \"port\": ...}",
                ),
            }
        }
        self.certificates(key, one, "upstream.tls");
        let mut known = vec!["name", "type", "endpoints", "addresses"];
        known.extend(CERTIFICATES);
        self.others(key, one, &known);
    }

    /// Files named one by one, or a directory with files of the usual names.
    fn certificates(&mut self, key: &str, one: &Map<String, Value>, to: &str) {
        if let Some(dir) = one.get("cert").and_then(Value::as_str).filter(|dir| !dir.is_empty()) {
            let dir = dir.trim_end_matches('/');
            for (part, name) in [
                ("ca", "gseca.crt"),
                ("cert", "gse_server.crt"),
                ("key", "gse_server.key"),
            ] {
                self.set(&format!("{key}.cert"), &format!("{to}.{part}"), format!("{dir}/{name}"));
            }
        }
        for (name, part) in [("ca_file", "ca"), ("cert_file", "cert"), ("key_file", "key")] {
            let from = format!("{key}.{name}");
            match one.get(name) {
                None => {}
                Some(Value::String(path)) if path.is_empty() => self.note(&from, "not used: empty"),
                Some(Value::String(path)) => self.set(&from, &format!("{to}.{part}"), path.clone()),
                Some(_) => self.wrong(&from, "must be a text"),
            }
        }
        if one.contains_key("passwd_file") {
            self.note(&format!("{key}.passwd_file"), "not used: keys are read unencrypted");
        }
    }

    fn listen(&mut self, key: &str, object: &Map<String, Value>, [ip, port]: [&str; 2], to: &str) {
        let nowhere = Value::String("0.0.0.0".into());
        let Some(value) = object.get(port) else {
            return self.note(&format!("{key}.{port}"), &format!("missing; {to} stays what it is"));
        };
        match address(object.get(ip).unwrap_or(&nowhere), value) {
            Some(listen) => self.set(&format!("{key}.{port}"), to, listen),
            None => self.wrong(
                &format!("{key}.{port}"),
                &format!("and {ip} must be a port and an address"),
            ),
        }
    }

    fn objects<'v>(&mut self, flow: &'v Map<String, Value>, key: &str) -> Vec<&'v Map<String, Value>> {
        let Some(value) = flow.get(key) else { return vec![] };
        let all: Option<Vec<_>> = value
            .as_array()
            .and_then(|all| all.iter().map(Value::as_object).collect());
        all.unwrap_or_else(|| {
            self.wrong(&format!("dataflow.{key}"), "must be a list of objects");
            vec![]
        })
    }

    fn others(&mut self, key: &str, object: &Map<String, Value>, known: &[&str]) {
        for name in object.keys().filter(|name| !known.contains(&name.as_str())) {
            self.note(&format!("{key}.{name}"), "not used");
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
}

const CERTIFICATES: [&str; 5] = ["cert", "ca_file", "cert_file", "key_file", "passwd_file"];

/// A number, or a text that is one: templates render some in quotes.
fn number_of(value: &Value) -> Option<i64> {
    match value {
        Value::String(text) => text.parse().ok(),
        value => value.as_i64(),
    }
}

fn address(ip: &Value, port: &Value) -> Option<String> {
    let port = u16::try_from(number_of(port)?).ok()?;
    let ip = ip.as_str().filter(|ip| !ip.is_empty())?;
    Some(if ip.contains(':') {
        format!("[{ip}]:{port}")
    } else {
        format!("{ip}:{port}")
    })
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, RunMode};
    use std::io::Write;
    use std::path::Path;

    fn load(text: &str) -> Result<(Config, Vec<String>), String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let loaded = gse_core::config::load_with::<Config>("gse_data", Some(file.path()), &[], []);
        let loaded = loaded.map_err(|error| error.to_string())?;
        let notes = loaded.notes().to_vec();
        Ok((loaded.config, notes))
    }

    // contract: data-plane#44
    #[test]
    fn as_node_management_renders_it() {
        let (config, notes) = load(
            r#"{"run_mode": "proxy", "dataflow": {
            "receiver": [{"name": "r", "protocol": 1, "bind_ip": "::", "bind_port": 28625, "ca_file": "/c/gseca.crt",
                "cert_file": "/c/gse_server.crt", "key_file": "/c/gse_server.key", "passwd_file": "/c/cert_encrypt.key", "thread_num": 4,
                "protostack": 4, "max_message_size": 10485760, "backlog": 4096}],
            "exporter": [{"name": "e", "type": 9, "protocol": "tcp", "ca_file": "/u/gseca.crt", "cert_file": "/u/gse_server.crt",
                "key_file": "/u/gse_server.key", "passwd_file": "", "endpoints": "10.0.0.1:28625,10.0.0.2:28625"},
                {"name": "other", "type": 9, "endpoints": "10.0.0.3:28625"}],
            "channel": [{"name": "c", "decode": 8, "receiver": "r", "thread_num": 4, "exporter": ["e"]}]},
            "metric": {"exporter_bind_ip": "127.0.0.1", "exporter_bind_port": "59402"},
            "logger": {"path": "/tmp", "level": "INFO"}, "balance": 1}"#,
        )
        .unwrap();
        assert_eq!(config.run_mode, RunMode::Proxy);
        assert_eq!(config.link.listen, "[::]:28625");
        assert_eq!(config.link.backlog, 4096);
        assert_eq!(config.link.tls.unwrap().cert, Path::new("/c/gse_server.crt"));
        assert_eq!(config.upstream.servers, ["10.0.0.1:28625", "10.0.0.2:28625"]);
        assert_eq!(config.upstream.tls.unwrap().key, Path::new("/u/gse_server.key"));
        assert_eq!(config.ops.listen, "127.0.0.1:59402");
        for start in [
            "balance: not used",
            "logger: not used",
            "dataflow.receiver[0].passwd_file: not used",
            "dataflow.receiver[0].thread_num: not used",
            "dataflow.exporter[1]: not used: no channel",
            "dataflow.receiver[0].max_message_size: not used: records up to 10485760",
        ] {
            assert!(notes.iter().any(|note| note.starts_with(start)), "{start} in {notes:?}");
        }
    }

    // contract: data-plane#44
    #[test]
    fn the_older_layout() {
        let (config, _) = load(
            r#"{"dataflow": {
            "receiver": [{"name": "r", "protocol": 1, "bind": "0.0.0.0", "port": 58625, "cert": "/c/", "protostack": 2}],
            "exporter": [{"name": "e", "type": 9, "cert": "/c", "proxyprotocol": "tcp", "connectionnum": 4, "proxyversion": "v1",
                "heartbeat": true, "addresses": [{"ip": "10.0.0.1", "port": 58625}, {"ip": "fd00::1", "port": 58626}]}],
            "filters": [], "channel": [{"name": "c", "decode": 5, "receiver": "r", "exporter": ["e"]}]}}"#,
        )
        .unwrap();
        assert_eq!(config.run_mode, RunMode::Proxy);
        assert_eq!(config.link.listen, "0.0.0.0:58625");
        assert_eq!(config.upstream.servers, ["10.0.0.1:58625", "[fd00::1]:58626"]);
        assert_eq!(config.upstream.tls.unwrap().ca, Path::new("/c/gseca.crt"));
    }

    #[test]
    fn what_cannot_be_meant_is_said_together() {
        let error = load(
            r#"{"run_mode": "agent", "dataflow": {"receiver": 1, "exporter": [{"endpoints": 5, "addresses": [{}], "ca_file": 1}]},
            "metric": {"exporter_bind_port": 700000}}"#,
        )
        .unwrap_err();
        for word in [
            "run_mode must",
            "receiver must",
            ".endpoints must",
            ".addresses must",
            ".ca_file must",
            "exporter_bind_port and",
        ] {
            assert!(error.contains(word), "{word} in {error}");
        }
        assert!(load("{}").unwrap_err().contains("dataflow is missing"));
        assert!(load("{ not json").unwrap_err().contains("line 1"));
        let empty = load(r#"{"dataflow": {}}"#).unwrap_err();
        assert!(empty.contains("upstream.servers"), "{empty}");
    }
}
