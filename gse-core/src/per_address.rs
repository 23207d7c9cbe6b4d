//! So many at once from one address: a cap for what costs us something before we know who it is.
//!
//! What is counted, and what happens to one too many, is up to the listener.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;

/// Places by address. Cheap to clone; every clone counts the same. Memory is taken for addresses that hold a place, so it is bounded
/// by what bounds the places altogether.
#[derive(Debug, Clone)]
pub struct PerAddress {
    limit: usize,
    held: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// A place that is held; given back when dropped.
#[derive(Debug)]
pub struct Place {
    of: Option<(PerAddress, IpAddr)>,
}

impl PerAddress {
    /// `limit` places for each address; 0: any number.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        PerAddress {
            limit,
            held: Arc::default(),
        }
    }

    /// Takes a place; none when the address holds as many as it may.
    #[must_use]
    pub fn take(&self, address: IpAddr) -> Option<Place> {
        if self.limit == 0 {
            return Some(Place { of: None });
        }
        let address = network(address);
        let mut held = self.held.lock();
        let count = held.entry(address).or_default();
        if *count >= self.limit {
            return None;
        }
        *count += 1;
        Some(Place {
            of: Some((self.clone(), address)),
        })
    }

    /// Addresses that hold a place.
    #[must_use]
    pub fn addresses(&self) -> usize {
        self.held.lock().len()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some((places, address)) = self.of.take() else {
            return;
        };
        let mut held = places.held.lock();
        if let Some(count) = held.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                held.remove(&address);
            }
        }
    }
}

/// One host has a whole /64 of IPv6 to itself, so that is what counts as one address there.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_address_has_its_places_and_gets_them_back() {
        let places = PerAddress::new(2);
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let first = places.take(ip("10.0.0.1")).unwrap();
        let _second = places.take(ip("::ffff:10.0.0.1")).unwrap();
        assert!(places.take(ip("10.0.0.1")).is_none());
        let other = places.take(ip("10.0.0.2")).unwrap();
        drop(first);
        assert!(places.take(ip("10.0.0.1")).is_some());
        drop(other);
        assert_eq!(places.addresses(), 1);
        let _a = places.take(ip("2001:db8::1")).unwrap();
        let _b = places.take(ip("2001:db8::2")).unwrap();
        assert!(places.take(ip("2001:db8::3")).is_none());
        assert!(places.take(ip("2001:db8:0:1::1")).is_some());
        assert!((0..100).all(|_| PerAddress::new(0).take(ip("10.0.0.1")).is_some()));
    }
}
