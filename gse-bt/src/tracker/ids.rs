//! Connection ids of BEP 15. A client gets one at the address it says it has and shows it from then on; that it got there proves that
//! the address is its own. The id holds the time and a keyed hash of address and time, so nothing is kept per client.

use std::net::IpAddr;

use ring::hmac;
use subtle::ConstantTimeEq as _;

/// Seconds of one window. An id holds in the window it is made in and in the two after it: two minutes at least, as BEP 15 asks for,
/// and three at most.
const WINDOW_S: u64 = 60;
const WINDOWS: u16 = 2;

/// Makes and checks connection ids.
pub struct ConnectionIds {
    key: hmac::Key,
}

impl ConnectionIds {
    /// With a secret key; ids made with another don't count.
    #[must_use]
    pub fn new(key: &[u8; 32]) -> Self {
        Self {
            key: hmac::Key::new(hmac::HMAC_SHA256, key),
        }
    }

    /// An id for `address` at `now_s` seconds of any clock that does not go back.
    #[must_use]
    pub fn make(&self, address: IpAddr, now_s: u64) -> u64 {
        self.of(address, now_s / WINDOW_S)
    }

    /// Whether `id` was made for `address` not long ago.
    #[must_use]
    pub fn check(&self, id: u64, address: IpAddr, now_s: u64) -> bool {
        let now = now_s / WINDOW_S;
        let age = (now as u16).wrapping_sub((id >> 48) as u16);
        let Some(made) = now.checked_sub(u64::from(age)).filter(|_| age <= WINDOWS) else {
            return false;
        };
        self.of(address, made).to_be_bytes().ct_eq(&id.to_be_bytes()).into()
    }

    /// The low 16 bits of the window, then 48 bits of the hash.
    fn of(&self, address: IpAddr, window: u64) -> u64 {
        let mut text = [0; 25];
        text[..8].copy_from_slice(&window.to_be_bytes());
        match address {
            IpAddr::V4(address) => {
                text[8] = 4;
                text[9..13].copy_from_slice(&address.octets());
            }
            IpAddr::V6(address) => {
                text[8] = 6;
                text[9..].copy_from_slice(&address.octets());
            }
        }
        let hash = hmac::sign(&self.key, &text);
        let mut id = [0; 8];
        id[..2].copy_from_slice(&(window as u16).to_be_bytes());
        id[2..].copy_from_slice(&hash.as_ref()[..6]);
        u64::from_be_bytes(id)
    }
}

impl std::fmt::Debug for ConnectionIds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConnectionIds")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_for_one_address_and_some_minutes() {
        // contract: p2p#11
        let ids = ConnectionIds::new(&[1; 32]);
        let (here, there): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        for made in [0, 59, 60, 65_535 * 60, 65_536 * 60, 1 << 40] {
            let id = ids.make(here, made);
            assert!(ids.check(id, here, made) && ids.check(id, here, made + 120));
            assert!(!ids.check(id, here, made + 180), "expired");
            assert!(!ids.check(id, there, made), "of another address");
            assert!(!ConnectionIds::new(&[2; 32]).check(id, here, made), "of another key");
            assert!((0..64).all(|bit| !ids.check(id ^ (1 << bit), here, made)));
            assert!(made < 60 || !ids.check(id, here, made - 60), "from the future");
            // The time in it can't be moved on.
            assert!(!ids.check(id.wrapping_add(2 << 48), here, made + 180));
        }
        let mapped: IpAddr = std::net::Ipv6Addr::from([10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).into();
        assert_ne!(ids.make(here, 0), ids.make(mapped, 0));
    }
}
