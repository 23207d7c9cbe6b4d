//! Session tickets that outlive the process that gave them: after a restart the whole fleet comes back at once, and a resumed handshake
//! costs a fraction of a full one.
//!
//! The key of a ticket follows from what only this server and its equals have: its private key, the authorities it trusts and the roles
//! it lets in. So a restarted server, or another one with the same files, takes the tickets of the first; a listener with other roles
//! does not, and neither does anybody once the server's key or the authorities have changed. Every ticket has a key of its own, from a
//! salt in it, and the day is part of that key, so that a ticket is of no use to anybody after [`LIFETIME_S`] and the rest of a day.
//! What a resumed handshake exchanges anew keeps recorded traffic safe even from those who get hold of the private key.

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Prk, Salt};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::pki_types::CertificateDer;
use rustls::server::ProducesTickets;

use super::Role;

/// How long a ticket is good for.
const LIFETIME_S: u32 = 12 * 3600;
const DAY_S: u64 = 86_400;
const LABEL: &[u8] = b"gse session ticket 1";
const DAY_LEN: usize = 4;
const SALT_LEN: usize = 16;
const HEAD_LEN: usize = DAY_LEN + SALT_LEN;

/// Makes and reads tickets.
pub(super) struct Tickets {
    secret: Prk,
    random: SystemRandom,
    now_s: fn() -> u64,
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tickets")
    }
}

fn unix_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

impl Tickets {
    /// For a listener with this private key (DER) that trusts `authorities` and lets `accept` in.
    pub(super) fn new(key: &[u8], authorities: &[CertificateDer<'_>], accept: &[Role]) -> Arc<Self> {
        let mut parts: Vec<&[u8]> = authorities.iter().map(AsRef::as_ref).collect();
        parts.sort_unstable();
        let mut roles: Vec<&str> = accept.iter().map(|role| role.as_str()).collect();
        roles.sort_unstable();
        parts.extend(roles.iter().map(|role| role.as_bytes()));
        parts.push(key);
        let mut material = Vec::new();
        for part in parts {
            material.extend_from_slice(&(part.len() as u64).to_be_bytes());
            material.extend_from_slice(part);
        }
        Arc::new(Self {
            secret: Salt::new(HKDF_SHA256, LABEL).extract(&material),
            random: SystemRandom::new(),
            now_s: unix_s,
        })
    }

    fn today(&self) -> u32 {
        u32::try_from((self.now_s)() / DAY_S).unwrap_or(u32::MAX)
    }

    /// The key of the one ticket that begins with `head`; it is used for nothing else, so its nonce may be a constant.
    fn key(&self, head: &[u8]) -> Option<(LessSafeKey, Nonce)> {
        let key = UnboundKey::from(self.secret.expand(&[LABEL, head], &AES_256_GCM).ok()?);
        Some((LessSafeKey::new(key), Nonce::assume_unique_for_key([0; NONCE_LEN])))
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        LIFETIME_S
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let mut ticket = Vec::with_capacity(HEAD_LEN + plain.len() + AES_256_GCM.tag_len());
        ticket.extend_from_slice(&self.today().to_be_bytes());
        ticket.resize(HEAD_LEN, 0);
        self.random.fill(&mut ticket[DAY_LEN..]).ok()?;
        let (key, nonce) = self.key(&ticket)?;
        ticket.extend_from_slice(plain);
        let (_, text) = ticket.split_at_mut(HEAD_LEN);
        let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), text).ok()?;
        ticket.extend_from_slice(tag.as_ref());
        Some(ticket)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (head, text) = ticket.split_at_checked(HEAD_LEN)?;
        let day = u32::from_be_bytes(*head.first_chunk()?);
        let today = self.today();
        // One that was given yesterday may still be in time.
        if day > today || today - day > 1 {
            return None;
        }
        let (key, nonce) = self.key(head)?;
        let mut text = text.to_vec();
        let len = key.open_in_place(nonce, Aad::empty(), &mut text).ok()?.len();
        text.truncate(len);
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tickets(key: &[u8], authority: &[u8], accept: &[Role], now_s: fn() -> u64) -> Tickets {
        let authority = CertificateDer::from(authority);
        let made = Arc::into_inner(Tickets::new(key, &[authority], accept)).unwrap();
        Tickets { now_s, ..made }
    }

    #[test]
    fn equals_read_each_others_tickets_and_nobody_else_does() {
        let noon = || 100 * DAY_S + DAY_S / 2;
        let one = tickets(b"key", b"ca", &[Role::Agent, Role::Server], noon);
        let ticket = one.encrypt(b"session").unwrap();
        assert_ne!(ticket, one.encrypt(b"session").unwrap(), "no two alike");
        let equal = tickets(b"key", b"ca", &[Role::Server, Role::Agent], noon);
        assert_eq!(equal.decrypt(&ticket).as_deref(), Some(&b"session"[..]));
        for other in [
            tickets(b"another", b"ca", &[Role::Agent, Role::Server], noon),
            tickets(b"key", b"another", &[Role::Agent, Role::Server], noon),
            tickets(b"key", b"ca", &[Role::Agent], noon),
        ] {
            assert_eq!(other.decrypt(&ticket), None);
        }
        for n in 0..ticket.len() {
            let mut changed = ticket.clone();
            changed[n] ^= 1;
            assert_eq!(one.decrypt(&changed), None, "byte {n}");
            assert_eq!(one.decrypt(&ticket[..n]), None, "cut at {n}");
        }
    }

    #[test]
    fn tickets_age() {
        let all = &[Role::Agent];
        let old = tickets(b"key", b"ca", all, || 100 * DAY_S).encrypt(b"session").unwrap();
        assert!(tickets(b"key", b"ca", all, || 101 * DAY_S).decrypt(&old).is_some());
        assert_eq!(tickets(b"key", b"ca", all, || 102 * DAY_S).decrypt(&old), None);
        assert_eq!(
            tickets(b"key", b"ca", all, || 99 * DAY_S).decrypt(&old),
            None,
            "from a day to come"
        );
    }
}
