//! How many connections there may be, altogether and of one account, so that one account's plugins never keep another's out.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::Peer;

/// Counts connections. Cheap to clone; every clone counts the same.
#[derive(Debug, Clone)]
pub struct Gate {
    limit: usize,
    per_account: usize,
    inside: Arc<Mutex<Inside>>,
}

#[derive(Debug, Default)]
struct Inside {
    all: usize,
    by_account: HashMap<Option<u32>, usize>,
}

/// The right to a connection; given back when dropped.
#[derive(Debug)]
pub struct Pass {
    gate: Gate,
    account: Option<u32>,
}

impl Gate {
    /// `limit` connections, and of each account but root `per_account` of them.
    #[must_use]
    pub fn new(limit: usize, per_account: usize) -> Self {
        Self {
            limit,
            per_account,
            inside: Arc::default(),
        }
    }

    /// Lets one more in; `None` when there are as many as may be.
    #[must_use]
    pub fn enter(&self, peer: Peer) -> Option<Pass> {
        let mut inside = self.inside.lock();
        let same = inside.by_account.get(&peer.uid).copied().unwrap_or(0);
        if inside.all >= self.limit || (peer.uid != Some(0) && same >= self.per_account) {
            return None;
        }
        inside.all += 1;
        inside.by_account.insert(peer.uid, same + 1);
        Some(Pass {
            gate: self.clone(),
            account: peer.uid,
        })
    }

    /// How many there are.
    #[must_use]
    pub fn inside(&self) -> usize {
        self.inside.lock().all
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut inside = self.gate.inside.lock();
        inside.all = inside.all.saturating_sub(1);
        if let Some(same) = inside.by_account.get_mut(&self.account) {
            *same = same.saturating_sub(1);
            if *same == 0 {
                inside.by_account.remove(&self.account);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_account_leaves_room_for_others() {
        let gate = Gate::new(4, 2);
        let peer = |uid| Peer {
            uid: Some(uid),
            pid: None,
        };
        let first = gate.enter(peer(1000)).unwrap();
        let second = gate.enter(peer(1000)).unwrap();
        assert!(gate.enter(peer(1000)).is_none(), "as many as it may");
        let roots: Vec<_> = (0..2).map(|_| gate.enter(peer(0)).unwrap()).collect();
        assert!(gate.enter(peer(0)).is_none(), "as many as there may be");
        drop((first, second));
        assert!(gate.enter(peer(1000)).is_some());
        drop(roots);
        assert_eq!(gate.inside(), 0);
        assert!(
            gate.inside.lock().by_account.is_empty(),
            "nothing is kept for those who left"
        );
    }
}
