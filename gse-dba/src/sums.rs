//! What several Redis servers say of themselves in `INFO`, added up.

/// Sections that make sense as sums.
const SUMMED: [&str; 6] = [
    "memory",
    "persistence",
    "stats",
    "keyspace",
    "commandstats",
    "errorstats",
];

/// Of the memory only what can be added.
const MEMORY: [&str; 4] = ["used_memory", "used_memory_rss", "used_memory_dataset", "maxmemory"];

fn add(sum: &str, more: &str) -> String {
    if let (Ok(a), Ok(b)) = (sum.parse::<i64>(), more.parse::<i64>()) {
        return a.saturating_add(b).to_string();
    }
    if let (Ok(a), Ok(b)) = (sum.parse::<f64>(), more.parse::<f64>()) {
        return format!("{:.2}", a + b);
    }
    sum.to_owned()
}

/// `calls=1,usec=5`: each field by itself.
fn add_fields(sum: &str, more: &str) -> String {
    let fields: Vec<(&str, &str)> = more.split(',').filter_map(|f| f.split_once('=')).collect();
    let mut out: Vec<(String, String)> = Vec::new();
    for f in sum.split(',') {
        let Some((k, v)) = f.split_once('=') else { continue };
        let other = fields.iter().find(|(o, _)| *o == k).map_or("0", |(_, v)| v);
        let value = if k == "avg_ttl" {
            let number = |t: &str| t.parse::<i64>().unwrap_or(0);
            number(v).max(number(other)).to_string()
        } else {
            add(v, other)
        };
        out.push((k.to_owned(), value));
    }
    let of = |name: &str| {
        out.iter()
            .find(|(k, _)| k == name)
            .and_then(|(_, v)| v.parse::<f64>().ok())
    };
    if let (Some(calls), Some(usec)) = (of("calls"), of("usec"))
        && calls > 0.0
        && let Some((_, v)) = out.iter_mut().find(|(k, _)| k == "usec_per_call")
    {
        *v = format!("{:.2}", usec / calls);
    }
    let all: Vec<String> = out.into_iter().map(|(k, v)| format!("{k}={v}")).collect();
    all.join(",")
}

/// The sections of all texts, by name in lower case, their numbers added up.
pub(crate) fn sections(texts: &[String]) -> Vec<(String, String)> {
    let mut out: Vec<(String, Vec<(String, String)>)> = Vec::new();
    for text in texts {
        let mut at = None;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix("# ") {
                let name = name.trim().to_ascii_lowercase();
                at = SUMMED
                    .contains(&name.as_str())
                    .then(|| match out.iter().position(|(n, _)| *n == name) {
                        Some(i) => i,
                        None => {
                            out.push((name, Vec::new()));
                            out.len() - 1
                        }
                    });
                continue;
            }
            let (Some(i), Some((key, value))) = (at, line.split_once(':')) else {
                continue;
            };
            let Some((name, lines)) = out.get_mut(i) else { continue };
            let left_out = match name.as_str() {
                "memory" => !MEMORY.contains(&key),
                "persistence" => key != "rdb_changes_since_last_save",
                _ => false,
            };
            if left_out {
                continue;
            }
            match lines.iter_mut().find(|(k, _)| k == key) {
                Some((_, sum)) if value.contains('=') => *sum = add_fields(sum, value),
                Some((_, sum)) => *sum = add(sum, value),
                None => lines.push((key.to_owned(), value.to_owned())),
            }
        }
    }
    out.into_iter()
        .map(|(name, lines)| {
            let mut title = name.clone();
            if let Some(first) = title.get_mut(..1) {
                first.make_ascii_uppercase();
            }
            let lines: String = lines.iter().map(|(k, v)| format!("{k}:{v}\r\n")).collect();
            (name, format!("# {title}\r\n{lines}"))
        })
        .collect()
}

/// The lines of `more` that `own` has not.
pub(crate) fn beside(own: &str, more: &str) -> String {
    let has = |key: &str| own.lines().any(|l| l.split(':').next() == Some(key));
    // Those are always zero here, and not there.
    more.lines()
        .filter(|l| !l.starts_with('#') && l.split_once(':').is_some_and(|(k, _)| !has(k)))
        .map(|l| format!("{l}\r\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_all_servers_are_added_up() {
        let a = "# Server\r\nredis_version:7\r\n# Stats\r\nexpired_keys:2\r\n# Keyspace\r\ndb0:keys=3,expires=1,avg_ttl=5\r\n# Commandstats\r\ncmdstat_get:calls=1,usec=3,usec_per_call=3.00\r\n";
        let b = "# Stats\r\nexpired_keys:5\r\n# Keyspace\r\ndb0:keys=4,expires=0,avg_ttl=9\r\n# Commandstats\r\ncmdstat_get:calls=3,usec=5,usec_per_call=1.67\r\ncmdstat_set:calls=1,usec=1,usec_per_call=1.00\r\n";
        let all: String = sections(&[a.into(), b.into()]).into_iter().map(|(_, t)| t).collect();
        for line in [
            "expired_keys:7",
            "db0:keys=7,expires=1,avg_ttl=9",
            "cmdstat_get:calls=4,usec=8,usec_per_call=2.00",
            "cmdstat_set:calls=1",
        ] {
            assert!(all.contains(line), "{all}");
        }
        assert!(!all.contains("redis_version"));
        assert_eq!(beside("a:1\r\n", "# X\r\na:2\r\nb:3\r\n"), "b:3\r\n");
    }
}
