//! Whether the servers of a group are set up as the promise needs it: what is acknowledged must outlive a restart, must not be evicted, and whoever
//! becomes primary must have it.

use std::collections::{BTreeSet, HashMap};

use redis::aio::MultiplexedConnection;

use super::control::{self, Replication};
use super::seat::Seat;
use crate::single::dial::Place;

const NAMES: [&str; 7] = [
    "appendonly",
    "appendfsync",
    "maxmemory",
    "maxmemory-policy",
    "replica-priority",
    "min-replicas-to-write",
    "min-replicas-max-lag",
];

/// Everything that is wrong, in words that say what to do. What can't be asked is wrong too.
pub(crate) async fn of(
    seat: &Seat,
    conn: &mut MultiplexedConnection,
    place: &Place,
    told: &Replication,
) -> Vec<String> {
    let mut servers: Vec<(String, HashMap<String, String>)> = Vec::new();
    let mut problems = Vec::new();
    match control::settings(conn, &NAMES).await {
        Ok(s) => servers.push((place.to_string(), s)),
        Err(e) => problems.push(format!("the settings of {place} can't be read: {e:#}")),
    }
    for (address, _) in &told.copies {
        let read = async {
            let mut conn = control::connect(&control::place(address)?, &seat.login).await?;
            control::settings(&mut conn, &NAMES).await
        };
        match read.await {
            Ok(s) => servers.push((address.clone(), s)),
            // A copy that can't be reached from here counts for WAIT all the same; it is not trusted to be set up well.
            Err(e) => problems.push(format!("the settings of the copy {address} can't be read: {e:#}")),
        }
    }
    let hosts: BTreeSet<&str> = servers
        .iter()
        .filter_map(|(a, _)| a.rsplit_once(':').map(|(h, _)| h))
        .collect();
    if servers.len() > 1 && hosts.len() < servers.len() && !seat.config.one_host {
        problems.push(
            "several of its servers are on one host, and all are lost with it: spread them, or set sharded.one_host"
                .into(),
        );
    }
    problems.extend(judge(&servers, seat.need));
    problems
}

fn judge(servers: &[(String, HashMap<String, String>)], need: usize) -> Vec<String> {
    let mut problems = Vec::new();
    for (at, s) in servers {
        let is = |name: &str| s.get(name).map_or("", String::as_str);
        if is("appendonly") != "yes" {
            problems.push(format!(
                "{at} has appendonly {:?}: a restart loses acknowledged writes; set it to yes",
                is("appendonly")
            ));
        } else if is("appendfsync") != "always" {
            problems.push(format!(
                "{at} has appendfsync {:?}: a power cut loses acknowledged writes, and a primary that is back before Sentinel notices takes them from its copies; set it to always",
                is("appendfsync")
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

    fn server(over: &[(&str, &str)]) -> (String, HashMap<String, String>) {
        let good = [
            ("appendonly", "yes"),
            ("appendfsync", "always"),
            ("maxmemory", "0"),
            ("maxmemory-policy", "allkeys-lru"),
            ("replica-priority", "100"),
            ("min-replicas-to-write", "1"),
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
        assert_eq!(judge(&[server(&[]), server(&[])], 1), Vec::<String>::new());
        for (bad, word) in [
            (vec![("appendonly", "no")], "appendonly"),
            (vec![("appendfsync", "everysec")], "appendfsync"),
            (vec![("maxmemory", "1000")], "maxmemory-policy"),
            (vec![("min-replicas-to-write", "0")], "min-replicas-to-write"),
            (vec![("replica-priority", "50")], "replica-priority"),
        ] {
            let found = judge(&[server(&[]), server(&bad)], 1);
            assert!(found.len() == 1 && found[0].contains(word), "{bad:?}: {found:?}");
        }
        assert_eq!(
            judge(&[server(&[("min-replicas-to-write", "0")])], 0),
            Vec::<String>::new()
        );
    }
}
