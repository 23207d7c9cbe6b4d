//! Lists of agent ids for people: sorted as numbers are counted, and `cloud:ip` ids of one network written as one
//! (`0:10.0.0.[1-3,7]`).

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use gse_proto::ids::split_cloud_ip;

/// Orders texts by their letters and the value of their numbers: `a2` before `a10`.
#[must_use]
pub fn natural(a: &str, b: &str) -> Ordering {
    let (mut left, mut right) = (a, b);
    loop {
        let (x, y) = match (part(left), part(right)) {
            (None, None) => return a.cmp(b),
            (None, Some(_)) => return Ordering::Less,
            (Some(_), None) => return Ordering::Greater,
            (Some(x), Some(y)) => (x, y),
        };
        let order = match (is_number(x), is_number(y)) {
            (true, true) => {
                let (m, n) = (x.trim_start_matches('0'), y.trim_start_matches('0'));
                m.len().cmp(&n.len()).then_with(|| m.cmp(n))
            }
            _ => x.cmp(y),
        };
        if order != Ordering::Equal {
            return order;
        }
        left = &left[x.len()..];
        right = &right[y.len()..];
    }
}

/// The digits or the non-digits that `text` begins with.
fn part(text: &str) -> Option<&str> {
    let first = text.chars().next()?;
    let digits = first.is_ascii_digit();
    let end = text.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(text.len());
    Some(&text[..end])
}

fn is_number(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_digit())
}

/// The ids in one short text.
#[must_use]
pub fn fold<'a>(ids: impl IntoIterator<Item = &'a str>) -> String {
    let mut networks: BTreeMap<(i32, [u8; 3]), Vec<u8>> = BTreeMap::new();
    let mut plain: Vec<&str> = Vec::new();
    for id in ids {
        match v4(id) {
            Some((cloud, ip)) => {
                let [a, b, c, d] = ip.octets();
                networks.entry((cloud, [a, b, c])).or_default().push(d);
            }
            None => plain.push(id),
        }
    }
    plain.sort_by(|a, b| natural(a, b));
    plain.dedup();
    let mut out: Vec<String> = Vec::new();
    for ((cloud, [a, b, c]), mut hosts) in networks {
        hosts.sort_unstable();
        hosts.dedup();
        match hosts.as_slice() {
            [one] => out.push(format!("{cloud}:{a}.{b}.{c}.{one}")),
            many => out.push(format!("{cloud}:{a}.{b}.{c}.[{}]", ranges(many))),
        }
    }
    out.extend(plain.into_iter().map(str::to_owned));
    out.join(",")
}

/// The id as a cloud and an IPv4 address, when it is spelt just so and can be spelt back.
fn v4(id: &str) -> Option<(i32, Ipv4Addr)> {
    let (cloud, ip) = split_cloud_ip(id)?;
    let std::net::IpAddr::V4(ip) = ip else { return None };
    (format!("{cloud}:{ip}") == id).then_some((cloud.0, ip))
}

/// Sorted numbers without repeats as `1-3,7`.
fn ranges(numbers: &[u8]) -> String {
    let mut out: Vec<String> = Vec::new();
    let mut rest = numbers;
    while let Some((&first, _)) = rest.split_first() {
        let run = rest
            .iter()
            .zip(first..=u8::MAX)
            .take_while(|(have, want)| **have == *want)
            .count();
        let last = rest[run - 1];
        out.push(if run == 1 {
            first.to_string()
        } else {
            format!("{first}-{last}")
        });
        rest = &rest[run..];
    }
    out.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_count() {
        let mut ids = vec!["0:10.0.0.10", "b", "0:10.0.0.9", "0:9.0.0.1", "a10", "a2", "a02", ""];
        ids.sort_by(|a, b| natural(a, b));
        assert_eq!(
            ids,
            ["", "0:9.0.0.1", "0:10.0.0.9", "0:10.0.0.10", "a02", "a2", "a10", "b"]
        );
    }

    #[test]
    fn networks_are_folded_and_everything_else_is_listed() {
        assert_eq!(
            fold([
                "0:10.0.0.3",
                "0:10.0.0.1",
                "0:10.0.0.2",
                "0:10.0.0.7",
                "1:10.0.0.1",
                "x10",
                "x9",
                "x9"
            ]),
            "0:10.0.0.[1-3,7],1:10.0.0.1,x9,x10"
        );
        assert_eq!(fold(["0:10.0.0.254", "0:10.0.0.255"]), "0:10.0.0.[254-255]");
        assert_eq!(fold(["0:fe80::1", "00:10.0.0.1"]), "00:10.0.0.1,0:fe80::1");
        assert_eq!(fold([]), "");
    }
}
