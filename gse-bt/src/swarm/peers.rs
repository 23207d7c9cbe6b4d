//! Who the peers of a swarm are, whether they are connected or not: whom to dial, when to try again, whom never again.

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use gse_proto::file::PeerAddress;

use super::Callee;
use tokio::time::Instant;

/// The most peers that are remembered; a swarm needs some tens.
const REMEMBERED: usize = 4096;
/// The wait after the first failure; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// The longest wait between two attempts.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// The side that is to wait for being dialled gives the other one this time.
const COURTESY: Duration = Duration::from_millis(500);

/// A peer that can be dialled.
#[derive(Debug)]
pub(crate) struct Contact {
    pub(crate) id: Option<String>,
    /// It has everything: of no use to somebody who has everything, too.
    pub(crate) seed: bool,
    ticket: Option<[u8; 32]>,
    /// Across the border: dialled by us alone, and of no use once we have everything.
    upstream: bool,
    due: Instant,
    failures: u32,
    dialling: bool,
}

/// The peers of a swarm.
#[derive(Debug)]
pub(crate) struct Book {
    own_id: String,
    /// By address.
    contacts: BTreeMap<String, Contact>,
    banned_ids: HashSet<String>,
    banned_addresses: HashSet<IpAddr>,
}

impl Book {
    pub(crate) fn new(own_id: String) -> Self {
        Self {
            own_id,
            contacts: BTreeMap::new(),
            banned_ids: HashSet::new(),
            banned_addresses: HashSet::new(),
        }
    }

    pub(crate) fn add(&mut self, now: Instant, peer: &PeerAddress) {
        let id = (!peer.agent_id.is_empty()).then(|| peer.agent_id.clone());
        if id.as_ref() == Some(&self.own_id) {
            return;
        }
        let ticket = <[u8; 32]>::try_from(&peer.ticket[..]).ok();
        if let Some(known) = self.contacts.get_mut(&peer.address) {
            known.seed |= peer.seed;
            known.upstream = peer.upstream;
            known.ticket = ticket.or(known.ticket);
            known.id = id.or(known.id.take());
            return;
        }
        if self.contacts.len() >= REMEMBERED {
            return;
        }
        // Of two that know of each other, the lesser id dials; the other one does when nothing has come of that.
        let waits = !peer.seed && !peer.upstream && id.as_ref().is_some_and(|id| *id < self.own_id);
        let due = if waits { now + COURTESY } else { now };
        let contact = Contact {
            id,
            seed: peer.seed,
            ticket,
            upstream: peer.upstream,
            due,
            failures: 0,
            dialling: false,
        };
        self.contacts.insert(peer.address.clone(), contact);
    }

    /// Members no longer: by id or address.
    pub(crate) fn drop(&mut self, gone: &[String]) {
        self.contacts.retain(|address, contact| {
            !gone
                .iter()
                .any(|gone| gone == address || contact.id.as_ref() == Some(gone))
        });
    }

    /// Never again.
    pub(crate) fn ban(&mut self, id: Option<&str>, address: IpAddr) {
        match id {
            Some(id) => self.banned_ids.insert(id.to_owned()),
            None => self.banned_addresses.insert(address),
        };
    }

    pub(crate) fn is_banned(&self, id: Option<&str>, address: IpAddr) -> bool {
        match id {
            Some(id) => self.banned_ids.contains(id),
            None => self.banned_addresses.contains(&address),
        }
    }

    /// A peer turned out to have everything.
    pub(crate) fn is_seed(&mut self, id: &str) {
        for contact in self
            .contacts
            .values_mut()
            .filter(|contact| contact.id.as_deref() == Some(id))
        {
            contact.seed = true;
        }
    }

    /// At most `most` addresses that are to be dialled now, with the id that is expected there. `complete`: we have everything.
    pub(crate) fn due(
        &mut self,
        now: Instant,
        most: usize,
        complete: bool,
        connected: impl Fn(&str, Option<&str>) -> bool,
    ) -> Vec<(String, Option<Callee>)> {
        let mut due = Vec::new();
        for (address, contact) in &mut self.contacts {
            if due.len() >= most {
                break;
            }
            let idle = !contact.dialling && contact.due <= now && !(complete && (contact.seed || contact.upstream));
            let banned = contact.id.as_ref().is_some_and(|id| self.banned_ids.contains(id));
            if idle && !banned && !connected(address, contact.id.as_deref()) {
                contact.dialling = true;
                let callee = contact.id.clone().map(|id| Callee {
                    id,
                    ticket: contact.ticket,
                    upstream: contact.upstream,
                });
                due.push((address.clone(), callee));
            }
        }
        due
    }

    /// An attempt to dial has ended.
    pub(crate) fn dialled(&mut self, now: Instant, address: &str, ok: bool) {
        let Some(contact) = self.contacts.get_mut(address) else {
            return;
        };
        contact.dialling = false;
        if ok {
            contact.failures = 0;
            // Should the connection be dropped at once (the other side knows a better one), there is no hurry.
            contact.due = now + FIRST_WAIT * 4;
        } else {
            contact.due = now + (FIRST_WAIT * 2u32.saturating_pow(contact.failures.min(16))).min(LONGEST_WAIT);
            contact.failures += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(address: &str, id: &str, seed: bool) -> PeerAddress {
        PeerAddress {
            address: address.to_owned(),
            agent_id: id.to_owned(),
            seed,
            ..PeerAddress::default()
        }
    }

    #[test]
    fn who_is_dialled_and_when() {
        let mut book = Book::new("m".to_owned());
        let now = Instant::now();
        for added in [
            peer("1:1", "a", false),
            peer("2:2", "z", false),
            peer("3:3", "m", false),
            peer("4:4", "b", true),
        ] {
            book.add(now, &added);
        }
        let due = |book: &mut Book, at, complete, connected: &str| -> Vec<String> {
            book.due(at, 9, complete, |_, id| id == Some(connected))
                .into_iter()
                .map(|(address, _)| address)
                .collect()
        };
        assert_eq!(due(&mut book, now, false, ""), ["2:2", "4:4"], "a dials us, m is us");
        assert!(due(&mut book, now, false, "").is_empty(), "under way");
        let later = now + COURTESY;
        assert!(due(&mut book, later, false, "a").is_empty());
        assert_eq!(due(&mut book, later, false, ""), ["1:1"]);
        book.dialled(later, "4:4", false);
        book.dialled(later, "2:2", false);
        assert!(due(&mut book, later, false, "").is_empty());
        assert_eq!(
            due(&mut book, later + FIRST_WAIT, true, ""),
            ["2:2"],
            "a seed is of no use to a seed"
        );
        book.ban(Some("b"), IpAddr::from([127, 0, 0, 1]));
        book.drop(&["z".to_owned()]);
        assert!(due(&mut book, later + LONGEST_WAIT, false, "").is_empty());
        assert!(book.is_banned(Some("b"), IpAddr::from([9, 9, 9, 9])));
        assert!(
            !book.is_banned(None, IpAddr::from([127, 0, 0, 1])),
            "others may live at that address"
        );
    }
}
