//! What the server behind can do. There are many that speak like Redis, of many ages: what is behind is asked, not supposed.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use ahash::RandomState;
use anyhow::Context as _;
use redis::Value;
use serde_json::json;
use tokio::sync::Semaphore;

use super::dial::{Place, Private, Target};
use super::session::push_command;
use crate::cluster::topology;
use crate::sharded::merge;

/// A command as the server describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) writes: bool,
    pub(crate) blocks: bool,
}

/// What a server has said of itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct Capabilities {
    /// Which one it is, with its version.
    pub(crate) engine: String,
    /// Whether clients may speak RESP3.
    pub(crate) resp3: bool,
    /// Whether it can say how many copies have a write.
    pub(crate) wait: bool,
    /// Of a cluster of several nodes, or of one that serves nothing yet.
    pub(crate) cluster: bool,
    /// Whether it takes transactions, scripts and subscriptions.
    transactions: bool,
    scripts: bool,
    subscriptions: bool,
    /// By name in upper case; empty when it does not tell.
    commands: HashMap<Vec<u8>, Known, RandomState>,
}

impl Capabilities {
    /// What is known of a command by its name, in any case.
    pub(crate) fn known(&self, name: &[u8]) -> Option<Known> {
        if self.commands.is_empty() {
            return None;
        }
        self.commands.get(&name.to_ascii_uppercase()).copied()
    }

    /// For an operator.
    pub(crate) fn status(&self) -> serde_json::Value {
        json!({
            "engine": self.engine,
            "resp3": self.resp3,
            "wait": self.wait,
            "transactions": self.transactions,
            "scripts": self.scripts,
            "subscriptions": self.subscriptions,
            "commands": self.commands.len(),
            "cluster": self.cluster,
        })
    }

    /// For `INFO`.
    pub(crate) fn lines(&self) -> String {
        let yes = |b: bool| if b { "yes" } else { "no" };
        format!(
            "# Endpoint\r\nendpoint_engine:{}\r\nendpoint_resp3:{}\r\nendpoint_wait:{}\r\nendpoint_transactions:{}\r\nendpoint_scripts:{}\r\nendpoint_subscriptions:{}\r\nendpoint_commands:{}\r\n",
            self.engine,
            yes(self.resp3),
            yes(self.wait),
            yes(self.transactions),
            yes(self.scripts),
            yes(self.subscriptions),
            self.commands.len(),
        )
    }
}

/// Asks a server what it can do.
pub(super) async fn probe(target: &Target, limit: Duration, max_reply: usize) -> anyhow::Result<Capabilities> {
    let stream = target.connect(false).await?;
    let place = Arc::new(Semaphore::new(1)).try_acquire_owned()?;
    let mut private = Private::new(stream, false, place, limit, max_reply);
    let mut out = Vec::new();
    // The last one changes the protocol of all that follows.
    let asked: [&[&[u8]]; 4] = [&[b"INFO"], &[b"COMMAND"], &[b"CLUSTER", b"SLOTS"], &[b"HELLO", b"3"]];
    for words in asked {
        push_command(&mut out, words.iter().copied());
    }
    let passed = private.pass(out.into(), asked.len(), false).await;
    if let Some(lost) = passed.lost {
        anyhow::bail!("it did not say what it can do: {}", lost.reason);
    }
    let ends = merge::ends(&passed.replies, asked.len());
    let mut from = 0;
    let mut replies = Vec::new();
    for end in ends {
        let reply = passed.replies.get(from..end).context("its answers are cut")?;
        // An error is an answer too: it can't do that.
        replies.push(
            redis::parse_redis_value(reply)
                .ok()
                .filter(|v| !matches!(v, Value::ServerError(_))),
        );
        from = end;
    }
    let mut replies = replies.into_iter();
    let mut next = || replies.next().flatten();
    let (info, commands, slots, hello) = (next(), next(), next(), next());
    Ok(judge(info.as_ref(), commands.as_ref(), slots.as_ref(), hello.as_ref()))
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::BulkString(b) => Some(String::from_utf8_lossy(b).into_owned()),
        Value::SimpleString(s) => Some(s.clone()),
        Value::VerbatimString { text, .. } => Some(text.clone()),
        _ => None,
    }
}

fn judge(info: Option<&Value>, commands: Option<&Value>, slots: Option<&Value>, hello: Option<&Value>) -> Capabilities {
    let info = info.and_then(text).unwrap_or_default();
    let field = |name: &str| {
        let mut pairs = info.lines().filter_map(|l| l.trim_end().split_once(':'));
        pairs.find(|(k, _)| *k == name).map(|(_, v)| v.to_owned())
    };
    let named = ["valkey", "dragonfly", "kvrocks", "keydb"].into_iter().find_map(|n| {
        let version = field(&format!("{n}_version"))?;
        Some(format!("{n} {version}"))
    });
    let engine = named
        .or_else(|| field("redis_version").map(|v| format!("redis {v}")))
        .unwrap_or_else(|| "unknown".to_owned());
    let mut known: HashMap<Vec<u8>, Known, RandomState> = HashMap::default();
    if let Some(Value::Array(all)) = commands {
        for command in all {
            let Value::Array(parts) = command else { continue };
            let (Some(name), Some(Value::Array(flags) | Value::Set(flags))) =
                (parts.first().and_then(text), parts.get(2))
            else {
                continue;
            };
            let has = |flag: &str| flags.iter().filter_map(text).any(|f| f == flag);
            let what = Known {
                writes: has("write") || !has("readonly"),
                blocks: has("blocking"),
            };
            known.insert(name.to_ascii_uppercase().into_bytes(), what);
        }
    }
    // One that does not tell is taken to have what it is asked for: it says itself when it has not.
    let has = |name: &str| known.is_empty() || known.contains_key(name.as_bytes());
    let enabled = field("cluster_enabled").as_deref() == Some("1");
    let shards = slots.and_then(|s| topology::of_slots(s, &Place::Tcp("here".into(), 0)).ok());
    Capabilities {
        engine,
        resp3: hello.is_some(),
        wait: has("WAIT"),
        cluster: enabled && shards.is_none_or(|s| s.len() != 1),
        transactions: has("MULTI"),
        scripts: has("EVAL"),
        subscriptions: has("SUBSCRIBE"),
        commands: known,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    #[test]
    fn engines_are_told_apart_by_what_they_say() {
        let of = |info: &str| judge(Some(&bulk(info)), None, None, None);
        assert_eq!(of("redis_version:5.0.14\r\n").engine, "redis 5.0.14");
        assert_eq!(
            of("redis_version:7.2.4\r\nvalkey_version:8.0.1\r\n").engine,
            "valkey 8.0.1"
        );
        assert_eq!(
            of("redis_version:6.2.11\r\ndragonfly_version:df-v1.2\r\n").engine,
            "dragonfly df-v1.2"
        );
        assert_eq!(
            of("kvrocks_version:2.9\r\nredis_version:4.0.0\r\n").engine,
            "kvrocks 2.9"
        );
        assert_eq!(of("").engine, "unknown");
        assert!(!of("redis_version:5.0.14\r\n").resp3 && of("").wait);
    }

    #[test]
    fn a_node_of_a_cluster_is_known_and_a_server_that_serves_all_slots_is_not_one() {
        let at = |port: i64| Value::Array(vec![bulk("h"), Value::Int(port), bulk("id")]);
        let range = |from: i64, to: i64, port: i64| Value::Array(vec![Value::Int(from), Value::Int(to), at(port)]);
        let info = bulk("redis_version:7.0.15\r\ncluster_enabled:1\r\n");
        let of = |slots: Vec<Value>| judge(Some(&info), None, Some(&Value::Array(slots)), None).cluster;
        assert!(of(vec![]), "it serves nothing");
        assert!(!of(vec![range(0, 16383, 1)]));
    }

    #[test]
    fn what_a_command_does_is_taken_from_the_server() {
        let command = |name: &str, flags: &[&str]| {
            let flags = flags.iter().map(|f| Value::SimpleString((*f).into())).collect();
            Value::Array(vec![
                bulk(name),
                Value::Int(2),
                Value::Array(flags),
                Value::Int(1),
                Value::Int(1),
                Value::Int(1),
            ])
        };
        let table = Value::Array(vec![
            command("bthing", &["write", "blocking"]),
            command("look", &["readonly", "fast"]),
            command("get", &["readonly"]),
        ]);
        let c = judge(None, Some(&table), None, None);
        assert_eq!(
            c.known(b"BThing"),
            Some(Known {
                writes: true,
                blocks: true
            })
        );
        assert_eq!(
            c.known(b"look"),
            Some(Known {
                writes: false,
                blocks: false
            })
        );
        assert_eq!(c.known(b"nosuch"), None);
        assert!(!c.wait && !c.transactions);
    }
}
