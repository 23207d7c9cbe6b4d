//! Who may write which data ids: by the account that the kernel says is at the other end.
//!
//! Alarms and events of processes travel on ids of their own. If every account could write those, anybody on a host could raise an alarm
//! in another's name; so such ids are root's, the agent's own account's and those accounts' that a rule names.

use nix::unistd::{Uid, User};
use serde::{Deserialize, Serialize};

use crate::local::Peer;

/// Ids that only some may write.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IdRule {
    /// Ids and ranges of them: `1000`, `1100000-1100031`.
    pub ids: Vec<String>,
    /// Accounts, by name or number, that may write them beside root and the agent's own.
    pub accounts: Vec<String>,
}

/// From and to, both included.
type Range = (u32, u32);

/// All rules, with accounts as the kernel knows them.
#[derive(Debug, Default)]
pub(super) struct Rules {
    own: u32,
    rules: Vec<(Vec<Range>, Vec<u32>)>,
}

/// What one connection may not write. Cheap to ask for every record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Forbidden(Vec<Range>);

impl Forbidden {
    pub(super) fn covers(&self, id: u32) -> bool {
        self.0.iter().any(|(from, to)| (*from..=*to).contains(&id))
    }
}

impl Rules {
    /// Looks the accounts up. Those that this host does not have are left out, with a word. Blocking.
    pub(super) fn resolve(rules: &[IdRule]) -> Self {
        let resolved = rules.iter().map(|rule| {
            let ranges = Self::ranges(rule).unwrap_or_default();
            let accounts = rule.accounts.iter().filter_map(|account| uid_of(account)).collect();
            (ranges, accounts)
        });
        Self {
            own: Uid::effective().as_raw(),
            rules: resolved.collect(),
        }
    }

    /// The ids of a rule.
    pub(super) fn ranges(rule: &IdRule) -> Result<Vec<Range>, String> {
        let parse = |text: &str| {
            let (from, to) = text.split_once('-').unwrap_or((text, text));
            let range = (from.trim().parse::<u32>().ok()?, to.trim().parse::<u32>().ok()?);
            (range.0 <= range.1).then_some(range)
        };
        rule.ids
            .iter()
            .map(|text| parse(text).ok_or(format!("names the ids {text:?}; write 1000, or 1100000-1100031")))
            .collect()
    }

    /// What `peer` may not write.
    pub(super) fn forbidden(&self, peer: Peer) -> Forbidden {
        if peer.uid == Some(0) || peer.uid == Some(self.own) {
            return Forbidden(Vec::new());
        }
        // Two rules may name one id; then the accounts of either may write it.
        let all = self.rules.iter().flat_map(|(ranges, _)| ranges.iter().copied());
        let mut forbidden: Vec<Range> = all.collect();
        for (ranges, accounts) in &self.rules {
            if peer.uid.is_some_and(|uid| accounts.contains(&uid)) {
                for allowed in ranges {
                    forbidden = forbidden
                        .into_iter()
                        .flat_map(|range| without(range, *allowed))
                        .collect();
                }
            }
        }
        Forbidden(forbidden)
    }
}

/// A range without another.
fn without(range: Range, gone: Range) -> Vec<Range> {
    if gone.1 < range.0 || gone.0 > range.1 {
        return vec![range];
    }
    let mut rest = Vec::new();
    if gone.0 > range.0 {
        rest.push((range.0, gone.0 - 1));
    }
    if gone.1 < range.1 {
        rest.push((gone.1 + 1, range.1));
    }
    rest
}

fn uid_of(account: &str) -> Option<u32> {
    if let Ok(uid) = account.parse() {
        return Some(uid);
    }
    match User::from_name(account) {
        Ok(Some(user)) => Some(user.uid.as_raw()),
        Ok(None) => {
            tracing::warn!("data.socket.reserved names {account}, which is no account of this host");
            None
        }
        Err(error) => {
            tracing::warn!(%error, "account {account} of data.socket.reserved cannot be looked up; it may write no reserved id");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::socket::SocketConfig;

    fn by(uid: u32) -> Peer {
        Peer {
            uid: Some(uid),
            pid: None,
        }
    }

    #[test]
    fn reserved_ids_are_not_everybodys() {
        let mut rules = Rules::resolve(&SocketConfig::default().reserved);
        rules.own = 990;
        for uid in [0, 990] {
            assert!(!rules.forbidden(by(uid)).covers(1000));
        }
        for peer in [by(1234), Peer::default()] {
            let forbidden = rules.forbidden(peer);
            assert!(forbidden.covers(1000) && forbidden.covers(1_100_008));
            assert!(!forbidden.covers(1001) && !forbidden.covers(1_100_007) && !forbidden.covers(0));
        }
    }

    #[test]
    fn rules_add_up() {
        let rule = |ids: &str, accounts: &[&str]| IdRule {
            ids: vec![ids.to_owned()],
            accounts: accounts.iter().map(ToString::to_string).collect(),
        };
        let mut rules = Rules::resolve(&[rule("1000-1010", &[]), rule("1005", &["1234"]), rule("2000", &["root"])]);
        rules.own = 990;
        assert_eq!(
            rules.forbidden(by(1234)),
            Forbidden(vec![(1000, 1004), (1006, 1010), (2000, 2000)])
        );
        assert!(rules.forbidden(by(1)).covers(1005));
        assert_eq!(rules.rules[2].1, [0]);
    }
}
