//! Proof that a peer belongs to a swarm, and is the member that it says it is. Every member was given a key of its own by the server,
//! and for each member that it may dial a ticket, made from that member's key and the dialler's id: so the one that is dialled can make
//! the ticket itself, and nobody else can. (Where all members have one key, each makes the tickets that it was not given.) A proof is
//! made with a ticket, for one side of one TLS connection, so that it is worth nothing on another connection, for the other side, or in
//! another swarm. Strangers who hold a certificate of the fleet but no key learn nothing, not even whether the swarm exists.

use ring::hmac;

/// Bytes of a proof.
pub(crate) const LEN: usize = 32;
/// Longest id of a member.
pub(crate) const MAX_ID: usize = 256;
/// Label under which the bytes that bind a proof to its connection are taken from TLS.
pub(crate) const EXPORTER: &[u8] = b"EXPORTER-gse-bt-member";

/// Who of the two a proof is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Dialler,
    Listener,
}

fn message(side: Side, swarm: &[u8; 20], binding: &[u8], id: &str) -> Vec<u8> {
    let mut message = Vec::with_capacity(64 + binding.len() + id.len());
    message.extend_from_slice(b"gse-bt");
    message.push(match side {
        Side::Dialler => 0,
        Side::Listener => 1,
    });
    message.extend_from_slice(swarm);
    message.push(u8::try_from(binding.len()).unwrap_or(u8::MAX));
    message.extend_from_slice(binding);
    message.extend_from_slice(id.as_bytes());
    message
}

/// What a member (`id`) is let in with by the member whose key this is.
#[must_use]
pub fn ticket(key: &[u8; 32], id: &str) -> [u8; 32] {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    let mut context = hmac::Context::with_key(&key);
    context.update(b"gse-bt ticket");
    context.update(id.as_bytes());
    let mut ticket = [0; 32];
    ticket.copy_from_slice(context.sign().as_ref());
    ticket
}

/// The proof of `side`, whose id is `id`.
pub(crate) fn make(key: &[u8; 32], side: Side, swarm: &[u8; 20], binding: &[u8], id: &str) -> [u8; LEN] {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    let tag = hmac::sign(&key, &message(side, swarm, binding, id));
    let mut proof = [0; LEN];
    proof.copy_from_slice(tag.as_ref());
    proof
}

/// Whether a proof holds. Takes as long for a wrong one.
pub(crate) fn holds(key: &[u8; 32], side: Side, swarm: &[u8; 20], binding: &[u8], id: &str, proof: &[u8]) -> bool {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    hmac::verify(&key, &message(side, swarm, binding, id), proof).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_one_member_on_one_side_of_one_connection() {
        // contract: p2p#16
        let (key, swarm) = ([1; 32], [2; 20]);
        let proof = make(&key, Side::Dialler, &swarm, &[3; 32], "0:10.0.0.1");
        let check = |key, side, swarm, binding: &[u8], id, proof: &[u8]| holds(key, side, swarm, binding, id, proof);
        assert!(check(&key, Side::Dialler, &swarm, &[3; 32], "0:10.0.0.1", &proof));
        assert!(!check(&[9; 32], Side::Dialler, &swarm, &[3; 32], "0:10.0.0.1", &proof));
        assert!(
            !check(&key, Side::Listener, &swarm, &[3; 32], "0:10.0.0.1", &proof),
            "sent back"
        );
        assert!(!check(&key, Side::Dialler, &[9; 20], &[3; 32], "0:10.0.0.1", &proof));
        assert!(
            !check(&key, Side::Dialler, &swarm, &[4; 32], "0:10.0.0.1", &proof),
            "passed on"
        );
        assert!(!check(&key, Side::Dialler, &swarm, &[3; 32], "0:10.0.0.2", &proof));
        assert!(!check(
            &key,
            Side::Dialler,
            &swarm,
            &[3; 32],
            "0:10.0.0.1",
            &proof[..31]
        ));
        assert!(!check(&key, Side::Dialler, &swarm, &[3; 32], "0:10.0.0.1", &[]));
    }
}
