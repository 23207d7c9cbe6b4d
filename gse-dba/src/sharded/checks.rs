//! Whether the servers of a group are set up as the promise needs it: what is acknowledged must outlive a restart, must not be evicted, and whoever
//! becomes primary must have it.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use redis::aio::MultiplexedConnection;

use super::control::{self, Replication};
use super::seat::Seat;
use super::tell;
use crate::single::dial::Place;

const NAMES: [&str; 9] = [
    "appendonly",
    "appendfsync",
    "maxmemory",
    "maxmemory-policy",
    "replica-priority",
    "replica-read-only",
    "min-replicas-to-write",
    "min-replicas-max-lag",
    "masterauth",
];

/// A server that stands still is not waited for longer than this.
const ASK: Duration = Duration::from_secs(1);

type Settings = HashMap<String, String>;

/// What the promise asks of the settings.
struct Wants {
    /// Copies besides the primary that a write needs.
    need: usize,
    /// Whether one must log in to copy.
    password: bool,
    sentinel: bool,
}

/// Everything that is wrong, in words that say what to do. What can't be asked is wrong too.
pub(crate) async fn of(
    seat: &Seat,
    conn: &mut MultiplexedConnection,
    place: &Place,
    told: &Replication,
) -> Vec<String> {
    // On a socket it has no host; the others know it by another name.
    let known = tell::known(seat, place);
    let mut servers: Vec<(String, Settings)> = Vec::new();
    let mut problems = Vec::new();
    match control::settings(conn, &NAMES).await {
        Ok(s) => servers.push((known, s)),
        Err(e) => problems.push(format!("the settings of {known} can't be read: {e:#}")),
    }
    let copies = futures::future::join_all(told.copies.iter().map(|(address, _)| async move {
        let read = async {
            let place = tell::beside(&seat.group().sockets, address).map_or_else(|| control::place(address), Ok)?;
            let mut conn = control::connect(&place, &seat.login).await?;
            control::settings(&mut conn, &NAMES).await
        };
        let limit = ASK.min(seat.login.timeout);
        let settings = tokio::time::timeout(limit, read).await;
        (
            address,
            settings.unwrap_or_else(|_| Err(anyhow::anyhow!("it does not answer"))),
        )
    }))
    .await;
    for (address, settings) in copies {
        match settings {
            Ok(s) => servers.push((address.clone(), s)),
            // A copy that can't be reached from here counts for WAIT all the same; it is not trusted to be set up well.
            Err(e) => problems.push(format!("the settings of the copy {address} can't be read: {e:#}")),
        }
    }
    if !seat.config.one_host && share_a_host(servers.iter().map(|(a, _)| a.as_str())) {
        problems.push(
            "several of its servers are on one host, and all are lost with it: spread them, or set sharded.one_host"
                .into(),
        );
    }
    let wants = Wants {
        need: seat.need,
        password: seat.login.password.is_some(),
        sentinel: !seat.group().sentinels.is_empty(),
    };
    problems.extend(judge(&servers, &wants));
    problems
}

fn share_a_host<'a>(addresses: impl Iterator<Item = &'a str>) -> bool {
    let mut hosts = BTreeSet::new();
    addresses
        .filter_map(|a| a.rsplit_once(':').map(|(host, _)| host))
        .any(|host| !hosts.insert(host))
}

/// Copies of a group under Sentinel that a Sentinel knows, and that follow somebody else.
pub(super) async fn strangers(seat: &Seat, primary: &str) -> Vec<String> {
    let (group, login) = (seat.group(), seat.sentinel_login());
    for address in &group.sentinels {
        let asked = async {
            let mut conn = control::connect(&control::place(address)?, &login).await?;
            let all: Vec<Settings> = redis::cmd("SENTINEL")
                .arg("REPLICAS")
                .arg(&group.name)
                .query_async(&mut conn)
                .await?;
            anyhow::Ok(all)
        };
        let Ok(Ok(all)) = tokio::time::timeout(ASK, asked).await else {
            continue;
        };
        let mut out = Vec::new();
        for copy in all {
            let get = |k: &str| copy.get(k).map(String::as_str).unwrap_or_default();
            let whom = format!("{}:{}", get("master-host"), get("master-port"));
            let down = get("flags").split(',').any(|f| f == "s_down" || f == "disconnected");
            if !down && get("master-port") != "0" && !super::plain::same(&whom, primary).await {
                out.push(format!(
                    "the copy {}:{} has another primary, {whom}: use REPLICAOF there, or SENTINEL RESET",
                    get("ip"),
                    get("port")
                ));
            }
        }
        return out;
    }
    Vec::new()
}

fn judge(servers: &[(String, Settings)], wants: &Wants) -> Vec<String> {
    let need = wants.need;
    let mut problems = Vec::new();
    for (at, s) in servers {
        let is = |name: &str| s.get(name).map_or("", String::as_str);
        if is("appendonly") != "yes" {
            problems.push(format!(
                "{at} has appendonly {:?}: a restart loses acknowledged writes; set it to yes",
                is("appendonly")
            ));
        } else if is("appendfsync") == "everysec" {
            problems.push(format!(
                "{at} has appendfsync everysec: a power cut loses the last second of acknowledged writes, and a primary that is back before anybody notices takes them from its copies too; set it to always"
            ));
        } else if is("appendfsync") != "always" {
            problems.push(format!(
                "{at} has appendfsync {:?}: its log is written when the system likes, and a power cut loses half a minute of acknowledged writes and more; set it to always",
                is("appendfsync")
            ));
        }
        if is("replica-read-only") == "no" {
            problems.push(format!(
                "{at} has replica-read-only no: as a copy it takes writes that no other server has, and loses them; set it to yes"
            ));
        }
        if need > 0 && wants.password && is("masterauth").is_empty() {
            problems.push(format!(
                "{at} has no masterauth: it could not log in to copy from another primary; set it (and masteruser, when that is not default)"
            ));
        }
        if is("maxmemory") != "0" && is("maxmemory-policy") != "noeviction" {
            problems.push(format!(
                "{at} has maxmemory-policy {:?}: it may throw away acknowledged data; set it to noeviction",
                is("maxmemory-policy")
            ));
        }
        if need > 0 && is("min-replicas-to-write").parse::<usize>().unwrap_or(0) < need {
            problems.push(format!(
                "{at} has min-replicas-to-write {:?}: as a primary that is cut off it would go on executing writes; set it to {need}",
                is("min-replicas-to-write")
            ));
        }
    }
    if need > 0
        && wants.sentinel
        && !servers.is_empty()
        && servers
            .iter()
            .all(|(_, s)| s.get("replica-priority").is_some_and(|p| p == "0"))
    {
        problems.push("replica-priority is 0 everywhere: Sentinel promotes none of them; set it to 100".into());
    }
    let priorities: BTreeSet<&str> = servers
        .iter()
        .filter_map(|(_, s)| s.get("replica-priority").map(String::as_str))
        .collect();
    if need > 0 && priorities.len() > 1 {
        problems.push(format!(
            "replica-priority differs ({}): a fail-over may promote a copy that lacks what another has; make it the same everywhere",
            priorities.into_iter().collect::<Vec<_>>().join(", ")
        ));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTS: Wants = Wants {
        need: 1,
        password: false,
        sentinel: true,
    };

    fn server(over: &[(&str, &str)]) -> (String, Settings) {
        let good = [
            ("appendonly", "yes"),
            ("appendfsync", "always"),
            ("maxmemory", "0"),
            ("maxmemory-policy", "allkeys-lru"),
            ("replica-priority", "100"),
            ("replica-read-only", "yes"),
            ("min-replicas-to-write", "1"),
            ("masterauth", ""),
        ];
        let all = good
            .iter()
            .chain(over)
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        ("h:1".into(), all)
    }

    #[test]
    fn each_dangerous_setting_is_named() {
        assert_eq!(judge(&[server(&[]), server(&[])], &WANTS), Vec::<String>::new());
        for (bad, word) in [
            (vec![("appendonly", "no")], "appendonly"),
            (vec![("appendfsync", "everysec")], "last second"),
            (vec![("appendfsync", "no")], "half a minute"),
            (vec![("maxmemory", "1000")], "maxmemory-policy"),
            (vec![("min-replicas-to-write", "0")], "min-replicas-to-write"),
            (vec![("replica-priority", "50")], "replica-priority"),
            (vec![("replica-read-only", "no")], "replica-read-only"),
        ] {
            let found = judge(&[server(&[]), server(&bad)], &WANTS);
            assert!(found.len() == 1 && found[0].contains(word), "{bad:?}: {found:?}");
        }
        let alone = Wants { need: 0, ..WANTS };
        assert_eq!(
            judge(&[server(&[("min-replicas-to-write", "0")])], &alone),
            Vec::<String>::new()
        );
        let never = [
            server(&[("replica-priority", "0")]),
            server(&[("replica-priority", "0")]),
        ];
        assert!(judge(&never, &WANTS)[0].contains("promotes none"));
        let locked = Wants {
            password: true,
            ..WANTS
        };
        assert!(judge(&[server(&[])], &locked)[0].contains("masterauth"));
        assert_eq!(judge(&[server(&[("masterauth", "x")])], &locked), Vec::<String>::new());
    }

    #[test]
    fn servers_on_one_host_are_seen() {
        assert!(share_a_host(["a:1", "b:1", "a:2"].into_iter()));
        assert!(!share_a_host(["a:1", "b:1", "/run/redis.sock"].into_iter()));
    }
}
