//! What written streams, routes and filters mean, and what is wrong with those that mean nothing.
//!
//! Pure functions from kept JSON ([`super::raw`]) to the types that records are routed by ([`super::table`]). Errors name the key and
//! say what it should be; they never repeat a password.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

use super::raw::RawObject;
use super::table::{
    Endpoint, FileSpec, Filter, KafkaSpec, Place, PulsarSpec, RedisSpec, Rule, Secret, SinkSpec, StreamTo, Wanted,
};

/// Longest name of a stream, a route or a filter, bytes.
const MAX_NAME: usize = 255;
/// Longest topic, channel or user.
const MAX_TEXT: usize = 512;
/// Most addresses of a stream.
const MAX_ADDRESSES: usize = 256;

/// A whole number, also when it was written as text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Number(pub i64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Int(i64),
            Text(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Int(number) => Ok(Self(number)),
            Either::Text(text) => text
                .trim()
                .parse()
                .map(Self)
                .map_err(|_| serde::de::Error::custom("expected a whole number")),
        }
    }
}

fn text(object: &RawObject, key: &str, at: &str) -> Result<String, String> {
    let Some(value) = object.get(key) else {
        return Ok(String::new());
    };
    let text: String = serde_json::from_str(value.get()).map_err(|_| format!("{at}.{key} has to be a text"))?;
    if text.len() > MAX_TEXT {
        return Err(format!("{at}.{key} has {} bytes, {MAX_TEXT} are allowed", text.len()));
    }
    if text.chars().any(char::is_control) {
        return Err(format!("{at}.{key} holds control characters"));
    }
    Ok(text)
}

/// A token may be long.
fn secret(object: &RawObject, key: &str, at: &str) -> Result<Secret, String> {
    let Some(value) = object.get(key) else {
        return Ok(Secret::default());
    };
    let text: String = serde_json::from_str(value.get()).map_err(|_| format!("{at}.{key} has to be a text"))?;
    if text.len() > 16 * 1024 {
        return Err(format!("{at}.{key} is longer than 16 KiB"));
    }
    Ok(Secret::new(text))
}

/// Name of a stream, a route or a filter.
///
/// # Errors
/// It is missing, too long, or has control characters.
pub fn name(object: &RawObject, at: &str) -> Result<String, String> {
    let name = text(object, "name", at)?;
    if name.is_empty() || name.len() > MAX_NAME {
        return Err(format!("{at}.name has to have 1 to {MAX_NAME} bytes"));
    }
    Ok(name)
}

fn addresses(object: &RawObject, at: &str) -> Result<Vec<Endpoint>, String> {
    let list: Vec<RawObject> = object
        .read("storage_address")
        .ok_or_else(|| format!("{at}.storage_address has to be a list of {{\"ip\", \"port\"}}"))?;
    if list.is_empty() || list.len() > MAX_ADDRESSES {
        return Err(format!("{at}.storage_address has to have 1 to {MAX_ADDRESSES} entries"));
    }
    let mut found = Vec::with_capacity(list.len());
    for (n, one) in list.iter().enumerate() {
        let at = format!("{at}.storage_address[{n}]");
        let host = text(one, "ip", &at)?;
        if host.is_empty() || host.len() > 253 || host.contains([' ', '/', ',']) {
            return Err(format!("{at}.ip has to be an address or a host name"));
        }
        let port = one.read::<Number>("port").and_then(|port| u16::try_from(port.0).ok());
        let port = port
            .filter(|port| *port > 0)
            .ok_or_else(|| format!("{at}.port has to be a number from 1 to 65535"))?;
        found.push(Endpoint { host, port });
    }
    Ok(found)
}

/// The object of a stream's mode, such as `kafka`, if it has one.
#[must_use]
pub fn mode_of(stream_to: &RawObject) -> Option<(&'static str, RawObject)> {
    let mode: String = stream_to.read("report_mode")?;
    let key = ["kafka", "redis", "pulsar", "file"]
        .into_iter()
        .find(|key| *key == mode)?;
    Some((key, stream_to.read(key)?))
}

/// A stream.
///
/// # Errors
/// What is wrong with it, for people.
pub fn stream(id: u64, stream_to: &RawObject) -> Result<StreamTo, String> {
    let at = "stream_to";
    let name = name(stream_to, at)?;
    let mode = text(stream_to, "report_mode", at)?;
    let part = |key: &str| {
        stream_to
            .read::<RawObject>(key)
            .ok_or_else(|| format!("{at}.{key} is missing: report_mode is {key}"))
    };
    let sink = match mode.as_str() {
        "kafka" => SinkSpec::Kafka(kafka(&part("kafka")?)?),
        "redis" => {
            let (part, at) = (part("redis")?, "stream_to.redis");
            let mode = text(&part, "mode", at)?;
            let master_name = text(&part, "master_name", at)?;
            if !["", "single", "sentinel"].contains(&mode.as_str()) {
                return Err(format!(
                    "{at}.mode is {mode:?}; it has to be \"single\" or \"sentinel\""
                ));
            }
            if mode == "sentinel" && master_name.is_empty() {
                return Err(format!("{at}.master_name is missing: mode is sentinel"));
            }
            SinkSpec::Redis(RedisSpec {
                addresses: addresses(&part, at)?,
                password: secret(&part, "passwd", at)?,
                master_name: if mode == "single" { String::new() } else { master_name },
                sentinel_password: secret(&part, "sentinel_passwd", at)?,
            })
        }
        "pulsar" => {
            let (part, at) = (part("pulsar")?, "stream_to.pulsar");
            SinkSpec::Pulsar(PulsarSpec {
                addresses: addresses(&part, at)?,
                token: secret(&part, "token", at)?,
            })
        }
        "file" => SinkSpec::File(FileSpec {
            directory: text(stream_to, "data_log_path", at)?,
        }),
        _ => {
            return Err(format!(
                "{at}.report_mode is {mode:?}; it has to be \"kafka\", \"redis\", \"pulsar\" or \"file\""
            ));
        }
    };
    Ok(StreamTo { id, name, sink })
}

fn kafka(part: &RawObject) -> Result<KafkaSpec, String> {
    let at = "stream_to.kafka";
    let spelled = text(part, "sasl_username", at)?;
    let username = if spelled.is_empty() {
        text(part, "sasl_usename", at)?
    } else {
        spelled
    };
    let mechanism = text(part, "sasl_mechanisms", at)?;
    if !["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"].contains(&mechanism.as_str()) {
        return Err(format!(
            "{at}.sasl_mechanisms is {mechanism:?}; it has to be PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512"
        ));
    }
    let protocol = text(part, "security_protocol", at)?;
    if !["", "PLAINTEXT", "SASL_PLAINTEXT", "SSL", "SASL_SSL"].contains(&protocol.as_str()) {
        return Err(format!(
            "{at}.security_protocol is {protocol:?}; it has to be PLAINTEXT, SASL_PLAINTEXT, SSL or SASL_SSL"
        ));
    }
    Ok(KafkaSpec {
        brokers: addresses(part, at)?,
        username,
        password: secret(part, "sasl_passwd", at)?,
        mechanism,
        protocol,
    })
}

/// Checks a filter and gives what it means.
///
/// # Errors
/// What is wrong with it, for people.
pub fn filter(filter: &RawObject, at: &str) -> Result<(String, Filter), String> {
    let name = name(filter, at)?;
    let index = filter.read::<Number>("field_index").map(|index| index.0);
    let index = index
        .and_then(|index| usize::try_from(index).ok())
        .filter(|index| *index <= 65_535)
        .ok_or_else(|| format!("{at}.field_index has to be a number from 0 to 65535"))?;
    let wanted = text(filter, "field_data_value", at)?;
    let value = match text(filter, "field_data_type", at)?.as_str() {
        "int" => Wanted::Int(
            wanted
                .trim()
                .parse()
                .map_err(|_| format!("{at}.field_data_value has to be a whole number: field_data_type is \"int\""))?,
        ),
        "string" => Wanted::Text(wanted),
        "bytes" => Wanted::Bytes(wanted.into_bytes()),
        other => {
            return Err(format!(
                "{at}.field_data_type is {other:?}; it has to be \"int\", \"string\" or \"bytes\""
            ));
        }
    };
    let place = match text(filter, "field_in", at)?.as_str() {
        "" | "protocol" => Place::Protocol,
        // A separator may well be a control character.
        "data" => Place::Data(
            filter
                .read::<String>("field_separator")
                .unwrap_or_default()
                .into_bytes(),
        ),
        other => {
            return Err(format!(
                "{at}.field_in is {other:?}; it has to be \"protocol\" or \"data\""
            ));
        }
    };
    Ok((name, Filter { place, index, value }))
}

/// What is known of a route without its stream.
#[derive(Debug)]
pub struct RouteSpec {
    /// Its name.
    pub name: String,
    /// Its stream.
    pub stream: u64,
    /// Names of filters that all must match.
    pub and: Vec<String>,
    /// Names of filters of which one must match.
    pub or: Vec<String>,
    stream_to: RawObject,
}

/// Checks a route.
///
/// # Errors
/// What is wrong with it, for people.
pub fn route(route: &RawObject, at: &str) -> Result<RouteSpec, String> {
    let name = name(route, at)?;
    let stream_to: RawObject = route
        .read("stream_to")
        .ok_or_else(|| format!("{at}.stream_to has to be an object"))?;
    let stream = stream_to
        .read::<Number>("stream_to_id")
        .and_then(|id| u64::try_from(id.0).ok())
        .filter(|id| *id > 0)
        .ok_or_else(|| format!("{at}.stream_to.stream_to_id has to be the number of a stream, above 0"))?;
    let names = |key: &str| match route.get(key) {
        None => Ok(Vec::new()),
        Some(_) => route
            .read::<Vec<String>>(key)
            .ok_or_else(|| format!("{at}.{key} has to be a list of names")),
    };
    let spec = RouteSpec {
        and: names("filter_name_and")?,
        or: names("filter_name_or")?,
        name,
        stream,
        stream_to,
    };
    for mode in ["kafka", "redis", "pulsar"] {
        if spec.stream_to.get(mode).is_some() {
            spec.target(mode, 0, at)?;
        }
    }
    Ok(spec)
}

impl RouteSpec {
    /// The name that records go under at a stream of this mode, and how many partitions were asked for.
    ///
    /// # Errors
    /// There is none, or it cannot be used.
    pub fn target(&self, mode: &str, data_id: u32, at: &str) -> Result<(String, Option<u32>), String> {
        if mode == "file" {
            return Ok((data_id.to_string(), None));
        }
        let at = format!("{at}.stream_to.{mode}");
        let part: RawObject = self
            .stream_to
            .read(mode)
            .ok_or_else(|| format!("{at} is missing: the stream is one of {mode}"))?;
        let partitions = match part.get("partition") {
            None => None,
            Some(_) => Some(
                part.read::<Number>("partition")
                    .and_then(|count| u32::try_from(count.0).ok())
                    .filter(|count| *count > 0)
                    .ok_or_else(|| format!("{at}.partition has to be a number of partitions, at least 1"))?,
            ),
        };
        let keys: &[&str] = match mode {
            "redis" => &["channel_name"],
            "pulsar" => &["name", "topic_name"],
            _ => &["topic_name"],
        };
        let mut target = String::new();
        for key in keys {
            if target.is_empty() {
                target = text(&part, key, &at)?;
            }
        }
        if target.is_empty() {
            // How topics were named before they had names of their own (contract data-plane, 3.4).
            let biz = match part.get("biz_id") {
                None => String::new(),
                Some(_) => part
                    .read::<Number>("biz_id")
                    .map(|biz| biz.0.to_string())
                    .unwrap_or_default(),
            };
            let set = text(&part, "data_set", &at)?;
            if !set.is_empty() {
                target = set + &biz;
            }
        }
        if target.is_empty() {
            return Err(format!("{at}.{} has to say where records go", keys[0]));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if mode == "kafka" && (target.len() > 249 || !target.chars().all(plain)) {
            return Err(format!(
                "{at}: {target:?} is no Kafka topic; it has to have at most 249 letters, digits, '.', '_' and '-'"
            ));
        }
        if mode == "pulsar" && !target.contains("://") {
            let or = |key: &str, default: &str| {
                text(&part, key, &at).map(|text| if text.is_empty() { default.to_owned() } else { text })
            };
            target = format!(
                "persistent://{}/{}/{target}",
                or("tenant", "public")?,
                or("namespace", "default")?
            );
        }
        Ok((target, partitions))
    }
}

/// The rules of one data id, from what is kept of it; what cannot be followed goes into `problems`.
#[must_use]
pub fn rules(
    data_id: u32,
    routes: &[RawObject],
    filters: &[RawObject],
    modes: &BTreeMap<u64, &'static str>,
    problems: &mut Vec<String>,
) -> Vec<Rule> {
    let mut known = BTreeMap::new();
    for one in filters {
        match filter(one, "filter") {
            Ok((name, filter)) => {
                known.insert(name, filter);
            }
            Err(error) => problems.push(format!("data id {data_id}: {error}")),
        }
    }
    let mut rules = Vec::new();
    for one in routes {
        let rule = route(one, "route").and_then(|spec| {
            let named = |names: &[String]| -> Result<Vec<Filter>, String> {
                names
                    .iter()
                    .map(|name| {
                        known
                            .get(name)
                            .cloned()
                            .ok_or_else(|| format!("route {:?} names filter {name:?}, which does not exist", spec.name))
                    })
                    .collect()
            };
            // A missing stream is found by the table, which knows them all.
            let mode = modes.get(&spec.stream).copied();
            let (target, partitions) = match mode {
                Some(mode) => spec.target(mode, data_id, "route")?,
                None => (String::new(), None),
            };
            Ok(Rule {
                all_of: named(&spec.and)?,
                any_of: named(&spec.or)?,
                name: spec.name,
                stream: spec.stream,
                target: target.into(),
                partitions,
            })
        });
        match rule {
            Ok(rule) => rules.push(rule),
            Err(error) => problems.push(format!("data id {data_id}: {error}")),
        }
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: serde_json::Value) -> RawObject {
        serde_json::from_str(&value.to_string()).unwrap()
    }

    #[test]
    fn both_spellings_of_the_user_are_read() {
        // contract: data-plane#26, data-plane#27
        for key in ["sasl_username", "sasl_usename"] {
            let mut stream_to = serde_json::json!({"name": "mq", "report_mode": "kafka", "kafka": {
                "storage_address": [{"ip": "kafka.service.consul", "port": 9092}], "sasl_passwd": "pw",
                "sasl_mechanisms": "SCRAM-SHA-512", "security_protocol": "SASL_PLAINTEXT"}});
            stream_to["kafka"][key] = "user".into();
            let stream = stream(500, &object(stream_to)).unwrap();
            let SinkSpec::Kafka(kafka) = stream.sink else { panic!() };
            assert_eq!((kafka.username.as_str(), kafka.password.reveal()), ("user", "pw"));
            assert_eq!(kafka.brokers[0].to_string(), "kafka.service.consul:9092");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let kafka = |part: serde_json::Value| serde_json::json!({"name": "n", "report_mode": "kafka", "kafka": part});
        let at = serde_json::json!([{"ip": "h", "port": 1}]);
        for (bad, word) in [
            (serde_json::json!({"report_mode": "file"}), "stream_to.name"),
            (serde_json::json!({"name": "n", "report_mode": "mqtt"}), "report_mode"),
            (
                serde_json::json!({"name": "n", "report_mode": "kafka"}),
                "stream_to.kafka",
            ),
            (kafka(serde_json::json!({"storage_address": []})), "1 to 256"),
            (
                kafka(serde_json::json!({"storage_address": [{"ip": "", "port": 1}]})),
                "[0].ip",
            ),
            (
                kafka(serde_json::json!({"storage_address": [{"ip": "h", "port": 0}]})),
                "[0].port",
            ),
            (
                kafka(serde_json::json!({"storage_address": [{"ip": "h", "port": 70000}]})),
                "[0].port",
            ),
            (
                kafka(serde_json::json!({"storage_address": at, "sasl_mechanisms": "x"})),
                "SCRAM-SHA-512",
            ),
            (
                kafka(serde_json::json!({"storage_address": at, "sasl_passwd": 7})),
                "sasl_passwd has to be a text",
            ),
        ] {
            let error = stream(1, &object(bad.clone())).unwrap_err();
            assert!(error.contains(word), "{bad}: {error}");
        }
        let with = |part: serde_json::Value| serde_json::json!({"name": "r", "stream_to": part});
        for (bad, word) in [
            (serde_json::json!({"name": "r"}), "stream_to"),
            (with(serde_json::json!({"stream_to_id": 0})), "stream_to_id"),
            (with(serde_json::json!({"stream_to_id": 1, "kafka": {}})), "topic_name"),
            (
                with(serde_json::json!({"stream_to_id": 1, "kafka": {"topic_name": "a b"}})),
                "no Kafka topic",
            ),
            (
                with(serde_json::json!({"stream_to_id": 1, "kafka": {"topic_name": "t", "partition": 0}})),
                "at least 1",
            ),
        ] {
            let error = route(&object(bad.clone()), "route[0]").unwrap_err();
            assert!(error.contains(word) && error.contains("route[0]"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_topic_has_a_name_or_is_put_together() {
        let of = |mode: &str, part: serde_json::Value| {
            let one = serde_json::json!({"name": "r", "stream_to": {"stream_to_id": 1, mode: part}});
            route(&object(one), "r").unwrap().target(mode, 1001, "r").unwrap().0
        };
        assert_eq!(
            of("kafka", serde_json::json!({"data_set": "0bkmonitor_1001", "biz_id": 0})),
            "0bkmonitor_10010"
        );
        assert_eq!(
            of(
                "kafka",
                serde_json::json!({"topic_name": "t", "data_set": "x", "biz_id": 2})
            ),
            "t"
        );
        assert_eq!(
            of("redis", serde_json::json!({"channel_name": "snapshot2"})),
            "snapshot2"
        );
        assert_eq!(
            of("pulsar", serde_json::json!({"name": "t", "tenant": "a"})),
            "persistent://a/default/t"
        );
    }

    #[test]
    fn a_missing_filter_stops_its_route_alone() {
        let routes = [
            object(
                serde_json::json!({"name": "a", "stream_to": {"stream_to_id": 1, "kafka": {"topic_name": "t"}},
                "filter_name_and": ["gone"]}),
            ),
            object(
                serde_json::json!({"name": "b", "stream_to": {"stream_to_id": 1, "kafka": {"topic_name": "t"}},
                "filter_name_or": ["f"], "filter_name_and": null}),
            ),
        ];
        let filters = [object(
            serde_json::json!({"name": "f", "field_index": 1, "field_data_type": "int",
            "field_data_value": "7", "field_in": "data", "field_separator": "|"}),
        )];
        let mut problems = vec![];
        let rules = rules(5, &routes, &filters, &BTreeMap::from([(1, "kafka")]), &mut problems);
        assert_eq!(rules.len(), 1);
        assert_eq!(rules[0].name, "b");
        assert!(problems[0].contains("\"gone\""), "{problems:?}");
    }
}
