//! Copies under way: who wants them, and what they are told.

use std::collections::BTreeMap;
use std::time::Duration;

use gse_proto::file::SwarmPeers;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{OWN, Peer};
use crate::swarm::ManifestId;

/// Words that wait for one copy.
const WORDS: usize = 64;

/// What is said to a copy.
#[derive(Debug)]
pub(crate) enum Word {
    /// Who takes part.
    Peers(SwarmPeers),
    /// What a relay is to carry, see [`gse_bt::Swarm::set_share`].
    Share(u32, u32),
}

/// A copy under way.
#[derive(Debug)]
pub(super) struct Copy {
    pub(super) words: mpsc::Sender<Word>,
    pub(super) over: CancellationToken,
    /// Instances that control transfers of it, by name, and when they said so last.
    pub(super) wanted: BTreeMap<String, Instant>,
    pub(super) joined: bool,
    pub(super) complete: bool,
}

impl Peer {
    /// Whether a copy is under way.
    #[must_use]
    pub fn has_copy(&self, id: &ManifestId) -> bool {
        self.copies.lock().contains_key(id)
    }

    /// A swarm of this instance's own is over.
    pub fn over(&self, id: &ManifestId) {
        self.release(id, OWN);
    }

    /// Somebody does not want a copy any more; it ends when nobody does.
    pub fn release(&self, id: &ManifestId, owner: &str) {
        let mut copies = self.copies.lock();
        if let Some(copy) = copies.get_mut(id) {
            copy.wanted.remove(owner);
            if copy.wanted.is_empty() {
                copy.over.cancel();
                copies.remove(id);
            }
        }
    }

    /// Copies that others have not said for so long that they want are not wanted any more.
    pub fn expire(&self, patience: Duration) {
        let mut copies = self.copies.lock();
        copies.retain(|_, copy| {
            copy.wanted
                .retain(|owner, said| owner == OWN || said.elapsed() < patience);
            if copy.wanted.is_empty() {
                copy.over.cancel();
            }
            !copy.wanted.is_empty()
        });
    }

    /// Somebody wants a copy that is under way, and says this to it; false if there is none.
    pub(crate) fn want(&self, id: &ManifestId, owner: &str, word: Option<Word>) -> bool {
        let mut copies = self.copies.lock();
        let Some(copy) = copies.get_mut(id) else { return false };
        copy.wanted.insert(owner.to_owned(), Instant::now());
        if let Some(word) = word
            && copy.words.try_send(word).is_err()
        {
            tracing::debug!("a copy is too busy to be told something; it is told again");
        }
        true
    }

    /// Whether somebody wants a copy that is under way.
    pub(super) fn is_wanted_by(&self, id: &ManifestId, owner: &str) -> bool {
        let copies = self.copies.lock();
        copies.get(id).is_some_and(|copy| copy.wanted.contains_key(owner))
    }

    /// Whether a copy takes part already, and whether it is whole.
    pub(crate) fn state(&self, id: &ManifestId) -> (bool, bool) {
        let copies = self.copies.lock();
        copies
            .get(id)
            .map_or((false, false), |copy| (copy.joined, copy.complete))
    }

    /// Notes how far a copy is; who wants it is returned.
    pub(super) fn note(&self, id: &ManifestId, complete: bool) -> Vec<String> {
        let mut copies = self.copies.lock();
        let Some(copy) = copies.get_mut(id) else { return vec![] };
        (copy.joined, copy.complete) = (true, complete);
        copy.wanted.keys().cloned().collect()
    }

    /// One more copy; `None` when it is under way already.
    pub(super) fn begin(&self, id: &ManifestId, owner: &str) -> Option<(mpsc::Receiver<Word>, CancellationToken)> {
        let mut copies = self.copies.lock();
        if let Some(copy) = copies.get_mut(id) {
            copy.wanted.insert(owner.to_owned(), Instant::now());
            return None;
        }
        let (words, inbox) = mpsc::channel(WORDS);
        let over = CancellationToken::new();
        let copy = Copy {
            words,
            over: over.clone(),
            wanted: BTreeMap::from([(owner.to_owned(), Instant::now())]),
            joined: false,
            complete: false,
        };
        copies.insert(*id, copy);
        Some((inbox, over))
    }
}
