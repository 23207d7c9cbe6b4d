use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use gse_core::random::Random;
use proptest::prelude::*;

use super::*;

const SWARM: [u8; 20] = [7; 20];

fn tracker(config: TrackerConfig) -> Tracker {
    let tracker = Tracker::new(config, Access::Listed, TrackerMetrics::default(), Random::seeded(1));
    assert!(tracker.allow(SWARM));
    tracker
}

/// Address and id of peer number `n`.
fn peer(n: u32) -> (IpAddr, [u8; 20]) {
    let mut id = *b"-XX0001-000000000000";
    id[12..16].copy_from_slice(&n.to_be_bytes());
    (Ipv4Addr::from(0x0a00_0000 + n).into(), id)
}

fn said(n: u32, left: u64) -> Announce {
    Announce {
        swarm: SWARM,
        peer_id: peer(n).1,
        port: 6881,
        left,
        event: Event::None,
        wanted: None,
    }
}

fn announce(tracker: &Tracker, n: u32, left: u64, now: u32) -> Peers {
    let mut out = Peers::default();
    tracker
        .announce(peer(n).0, &said(n, left), now, &mut out)
        .expect("allowed");
    out
}

#[test]
fn swarms_that_are_not_allowed_are_refused() {
    // contract: p2p#9
    let tracker = tracker(TrackerConfig::default());
    let mut out = Peers::default();
    let other = Announce {
        swarm: [8; 20],
        ..said(1, 1)
    };
    let asked = |announce: &Announce, out: &mut Peers| tracker.announce(peer(1).0, announce, 0, out);
    assert_eq!(asked(&other, &mut out), Err(Refusal::UnknownSwarm));
    assert_eq!(tracker.scrape(&other.swarm), None);
    assert_eq!(asked(&Announce { port: 0, ..said(1, 1) }, &mut out), Err(Refusal::Port));
    assert_eq!(asked(&said(1, 1), &mut out), Ok(()));
    assert_eq!((tracker.swarms(), tracker.peers()), (1, 1));
    tracker.withdraw(&SWARM);
    assert_eq!(asked(&said(1, 1), &mut out), Err(Refusal::UnknownSwarm));
    assert_eq!((tracker.swarms(), tracker.peers()), (0, 0));
}

#[test]
fn nobody_is_told_of_itself() {
    // contract: p2p#10
    let tracker = tracker(TrackerConfig::default());
    for n in 0..5 {
        announce(&tracker, n, 1, 0);
    }
    for n in 0..5 {
        let told = announce(&tracker, n, 1, 0);
        let own: Vec<IpAddr> = told.v4.iter().map(|peer| IpAddr::V4(*peer.ip())).collect();
        assert_eq!(own.len(), 4);
        assert!(!own.contains(&peer(n).0));
    }
    // The same peer over IPv6 is told neither address of its own.
    let v6: IpAddr = Ipv6Addr::LOCALHOST.into();
    let mut out = Peers::default();
    tracker.announce(v6, &said(3, 1), 0, &mut out).expect("allowed");
    assert_eq!((out.v4.len(), out.v6.len()), (4, 0));
    let told = announce(&tracker, 1, 1, 0);
    assert_eq!((told.v4.len(), told.v6.len()), (4, 1));
    // One behind the same address with another port is another peer.
    let beside = Announce {
        port: 6882,
        ..said(100, 1)
    };
    tracker.announce(peer(1).0, &beside, 0, &mut out).expect("allowed");
    assert!(
        out.v4
            .iter()
            .any(|told| IpAddr::V4(*told.ip()) == peer(1).0 && told.port() == 6881)
    );
    // An address of the old family written as one of the new is the old one.
    let mapped = match peer(1).0 {
        IpAddr::V4(ip) => IpAddr::V6(ip.to_ipv6_mapped()),
        ip => ip,
    };
    let before = tracker.peers();
    tracker.announce(mapped, &said(1, 1), 0, &mut out).expect("allowed");
    assert_eq!(tracker.peers(), before);
}

#[test]
fn as_many_are_told_as_are_wanted() {
    // contract: p2p#10
    let config = TrackerConfig {
        peers_default: 30,
        peers_max: 100,
        ..TrackerConfig::default()
    };
    let tracker = tracker(config);
    for n in 0..1000 {
        announce(&tracker, n, u64::from(n % 10 != 0), 0);
    }
    let mut out = Peers::default();
    for (wanted, told) in [
        (None, 30),
        (Some(0), 0),
        (Some(1), 1),
        (Some(7), 7),
        (Some(100), 100),
        (Some(u32::MAX), 100),
    ] {
        let ask = Announce { wanted, ..said(5, 1) };
        tracker.announce(peer(5).0, &ask, 0, &mut out).expect("allowed");
        let distinct: HashSet<_> = out.v4.iter().collect();
        assert_eq!((out.v4.len(), distinct.len()), (told, told), "{wanted:?}");
        assert_eq!((out.seeds, out.leechers), (100, 900));
    }
    // Different ones each time, so that nobody is left out.
    let mut all = HashSet::new();
    for _ in 0..400 {
        all.extend(announce(&tracker, 5, 1, 0).v4);
    }
    assert!(all.len() > 950, "{}", all.len());
}

#[test]
fn seeds_and_leechers_are_told_what_is_of_use() {
    let tracker = tracker(TrackerConfig::default());
    let is_seed = |n: u32| n < 2;
    for n in 0..500 {
        announce(&tracker, n, u64::from(!is_seed(n)), 0);
    }
    let number = |told: &SocketAddrV4| told.ip().to_bits() - 0x0a00_0000;
    let told = announce(&tracker, 100, 1, 0);
    assert_eq!(
        told.v4.iter().filter(|told| is_seed(number(told))).count(),
        2,
        "the few seeds are always told"
    );
    let told = announce(&tracker, 0, 0, 0);
    assert_eq!(told.v4.len(), 40);
    assert!(told.v4.iter().all(|told| !is_seed(number(told))));
    // Once it has everything, a leecher counts as a seed, once.
    let done = Announce {
        event: Event::Completed,
        ..said(100, 0)
    };
    let mut out = Peers::default();
    tracker.announce(peer(100).0, &done, 0, &mut out).expect("allowed");
    let figures = tracker.scrape(&SWARM).expect("known");
    assert_eq!((figures.seeds, figures.leechers, figures.completed), (3, 497, 1));
    assert_eq!(tracker.peers(), 500);
}

#[test]
fn peers_that_leave_or_fall_silent_are_forgotten() {
    let config = TrackerConfig {
        interval_s: 60,
        peer_ttl_s: 100,
        ..TrackerConfig::default()
    };
    let tracker = tracker(config);
    for n in 0..10_000 {
        announce(&tracker, n, 1, if n < 5_000 { 10 } else { 50 });
    }
    let mut out = Peers::default();
    let leave = |n: u32, id: u32| Announce {
        event: Event::Stopped,
        peer_id: peer(id).1,
        ..said(n, 1)
    };
    tracker
        .announce(peer(1).0, &leave(1, 2), 50, &mut out)
        .expect("allowed");
    assert_eq!(tracker.peers(), 10_000, "another's id does not sign it off");
    tracker
        .announce(peer(1).0, &leave(1, 1), 50, &mut out)
        .expect("allowed");
    assert!(out.v4.is_empty());
    assert_eq!(tracker.peers(), 9_999);
    // Nobody is told of those that are silent, even before they are swept out.
    let told = announce(&tracker, 6_000, 1, 120);
    assert!(!told.v4.is_empty() && told.v4.iter().all(|told| told.ip().to_bits() - 0x0a00_0000 >= 5_000));
    tracker.expire(110);
    assert_eq!(tracker.peers(), 9_999);
    tracker.expire(111);
    assert_eq!(tracker.peers(), 5_000);
    tracker.expire(1_000);
    assert_eq!((tracker.peers(), tracker.swarms()), (0, 1), "what is listed stays");
}

#[test]
fn there_is_a_bound_for_peers_and_swarms() {
    let config = TrackerConfig {
        max_peers_per_swarm: 3,
        max_peers: 4,
        max_swarms: 2,
        ..TrackerConfig::default()
    };
    let tracker = tracker(config);
    for n in 0..10 {
        announce(&tracker, n, 1, 0);
    }
    assert_eq!(tracker.peers(), 3);
    assert_eq!(
        announce(&tracker, 9, 1, 0).v4.len(),
        3,
        "who finds no room is told of others"
    );
    assert_eq!(announce(&tracker, 0, 0, 0).seeds, 1, "who is known may change");
    assert!(tracker.allow([1; 20]) && tracker.allow(SWARM) && !tracker.allow([2; 20]));
    let mut out = Peers::default();
    for n in 0..3 {
        let other = Announce {
            swarm: [1; 20],
            ..said(n, 1)
        };
        tracker.announce(peer(n).0, &other, 0, &mut out).expect("allowed");
    }
    assert_eq!(tracker.peers(), 4);
}

#[test]
fn swarms_of_a_check_come_and_go_with_their_peers() {
    let check = Access::Check(Arc::new(|swarm: &[u8; 20]| swarm[0] == 7));
    let tracker = Tracker::new(
        TrackerConfig::default(),
        check,
        TrackerMetrics::default(),
        Random::system(),
    );
    assert_eq!(announce(&tracker, 1, 1, 0).leechers, 1);
    let mut out = Peers::default();
    let other = Announce {
        swarm: [8; 20],
        ..said(1, 1)
    };
    assert_eq!(
        tracker.announce(peer(1).0, &other, 0, &mut out),
        Err(Refusal::UnknownSwarm)
    );
    tracker.expire(10_000);
    assert_eq!((tracker.peers(), tracker.swarms()), (0, 0));
}

#[test]
fn queries_are_read_as_clients_write_them() {
    let query = "info_hash=%124Vx%9a%BC%de%f1%23Eg%89%ab%cd%ef%124Vx%9a&peer_id=-TR3000-abcdefghijkl&port=51413&uploaded=0\
                 &downloaded=0&left=1024&numwant=80&key=2af4d3c1&compact=1&supportcrypto=1&event=started&ip=8.8.8.8";
    let expected = Announce {
        swarm: *b"\x124Vx\x9a\xbc\xde\xf1\x23Eg\x89\xab\xcd\xef\x124Vx\x9a",
        peer_id: *b"-TR3000-abcdefghijkl",
        port: 51413,
        left: 1024,
        event: Event::Started,
        wanted: Some(80),
    };
    assert_eq!(
        http::Request::parse("/announce", query),
        Ok(http::Request::Announce(expected))
    );
    for (from, to, parameter) in [
        ("info_hash=%12", "info_hash=", "info_hash"),
        ("info_hash=%12", "info_hash=%1", "info_hash"),
        ("%9a&peer", "%9&peer", "info_hash"),
        ("%9a&peer", "%zz&peer", "info_hash"),
        ("info_hash", "x", "info_hash"),
        ("-TR3000-", "-TR3000-1", "peer_id"),
        ("51413", "99999", "port"),
        ("port=51413", "", "port"),
    ] {
        let changed = query.replacen(from, to, 1);
        assert_eq!(
            http::Request::parse("/announce", &changed),
            Err(http::BadRequest::Parameter(parameter)),
            "{changed}"
        );
    }
    assert_eq!(http::Request::parse("/", query), Err(http::BadRequest::Path));
    assert_eq!(http::Request::parse("/scrape", ""), Err(http::BadRequest::Scrape));
    let many = format!("info_hash={}&", "a".repeat(20)).repeat(http::MAX_SCRAPE + 1);
    assert_eq!(http::Request::parse("/scrape", &many), Err(http::BadRequest::Scrape));
}

#[test]
fn answers_are_those_of_the_beps() {
    let peers = Peers {
        interval: 60,
        min_interval: 30,
        seeds: 1,
        leechers: 2,
        v4: vec![SocketAddrV4::new([1, 2, 3, 4].into(), 258)],
        v6: vec![SocketAddrV6::new(Ipv6Addr::LOCALHOST, 259, 0, 0)],
    };
    assert_eq!(
        http::Response::Announce(peers.clone()).encode(),
        b"d8:completei1e10:incompletei2e8:intervali60e12:min intervali30e5:peers6:\x01\x02\x03\x04\x01\x026:peers618:\
          \0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\x01\x03e"
    );
    assert_eq!(
        http::Response::Failure("unknown swarm".to_owned()).encode(),
        b"d14:failure reason13:unknown swarme"
    );
    assert_eq!(
        udp::Response::Announce {
            transaction: 5,
            peers: peers.clone()
        }
        .encode(false),
        b"\0\0\0\x01\0\0\0\x05\0\0\0\x3c\0\0\0\x02\0\0\0\x01\x01\x02\x03\x04\x01\x02"
    );
    let v6 = udp::Response::Announce { transaction: 5, peers }.encode(true);
    assert_eq!(v6.len(), 20 + 18);
    let connect = udp::Request::Connect { transaction: 9 }.encode();
    assert_eq!(connect, b"\0\0\x04\x17\x27\x10\x19\x80\0\0\0\0\0\0\0\x09");
}

fn any_announce() -> impl Strategy<Value = Announce> {
    let event = prop::sample::select(vec![Event::None, Event::Started, Event::Stopped, Event::Completed]);
    let wanted = prop::option::of(0..=i32::MAX as u32);
    (
        any::<[u8; 20]>(),
        any::<[u8; 20]>(),
        1_u16..,
        0..=i64::MAX as u64,
        event,
        wanted,
    )
        .prop_map(|(swarm, peer_id, port, left, event, wanted)| Announce {
            swarm,
            peer_id,
            port,
            left,
            event,
            wanted,
        })
}

fn any_peers() -> impl Strategy<Value = Peers> {
    (any::<[u16; 4]>(), prop::collection::vec(any::<SocketAddr>(), 0..20)).prop_map(|(numbers, addresses)| {
        let [interval, min_interval, seeds, leechers] = numbers.map(u32::from);
        let mut peers = Peers {
            interval,
            min_interval,
            seeds,
            leechers,
            ..Peers::default()
        };
        for address in addresses {
            match address {
                SocketAddr::V4(address) => peers.v4.push(address),
                SocketAddr::V6(address) => peers.v6.push(SocketAddrV6::new(*address.ip(), address.port(), 0, 0)),
            }
        }
        peers
    })
}

fn any_scrapes() -> impl Strategy<Value = Vec<Scrape>> {
    let one = (0..=i32::MAX as u32, 0..=i32::MAX as u32, 0..=i32::MAX as u32);
    prop::collection::vec(
        one.prop_map(|(seeds, completed, leechers)| Scrape {
            seeds,
            completed,
            leechers,
        }),
        0..10,
    )
}

/// What is left of an answer over UDP: one family, no least interval.
fn over_udp(peers: &Peers, v6: bool) -> Peers {
    Peers {
        min_interval: 0,
        v4: if v6 { Vec::new() } else { peers.v4.clone() },
        v6: if v6 { peers.v6.clone() } else { Vec::new() },
        ..peers.clone()
    }
}

proptest! {
    #[test]
    fn http_round_trip(announce in any_announce(), peers in any_peers(), swarms in prop::collection::btree_map(any::<[u8; 20]>(), any_scrapes(), 1..5)) {
        let split = |text: String| {
            let (path, query) = text.split_once('?').expect("a query");
            http::Request::parse(path, query)
        };
        prop_assert_eq!(split(http::Request::Announce(announce).encode()), Ok(http::Request::Announce(announce)));
        let scrape = http::Request::Scrape(swarms.keys().copied().collect());
        prop_assert_eq!(split(scrape.encode()), Ok(scrape));
        let figures = swarms.into_iter().filter_map(|(swarm, figures)| Some((swarm, *figures.first()?))).collect();
        for response in [http::Response::Announce(peers), http::Response::Scrape(figures), http::Response::Failure("so".to_owned())] {
            prop_assert_eq!(http::Response::parse(&response.encode()), Ok(response));
        }
    }

    #[test]
    fn udp_round_trip(announce in any_announce(), peers in any_peers(), scrapes in any_scrapes(), numbers in any::<(u64, u32)>(), v6 in any::<bool>()) {
        let (connection, transaction) = numbers;
        let swarms = vec![announce.swarm, announce.peer_id];
        for request in [
            udp::Request::Connect { transaction },
            udp::Request::Announce { connection, transaction, announce },
            udp::Request::Scrape { connection, transaction, swarms },
        ] {
            prop_assert_eq!(udp::Request::parse(&request.encode()), Ok(request));
        }
        for response in [
            udp::Response::Connect { transaction, connection },
            udp::Response::Announce { transaction, peers: over_udp(&peers, v6) },
            udp::Response::Scrape { transaction, swarms: scrapes },
            udp::Response::Error { transaction, message: "no".to_owned() },
        ] {
            prop_assert_eq!(udp::Response::parse(&response.encode(v6), v6), Ok(response));
        }
    }

    #[test]
    fn random_requests_never_panic(raw in prop::collection::vec(any::<u8>(), 0..160), action in 0_u8..4, query in "[a-z_=&%+0-9]{0,120}") {
        let _ = udp::Request::parse(&raw);
        let _ = udp::Response::parse(&raw, action % 2 == 0);
        let mut raw = raw;
        if raw.len() > 12 {
            raw[8..12].copy_from_slice(&[0, 0, 0, action]);
            let _ = udp::Request::parse(&raw);
            raw[..4].copy_from_slice(&[0, 0, 0, action]);
            let _ = udp::Response::parse(&raw, action % 2 == 0);
        }
        let _ = http::Request::parse("/announce", &query);
        let _ = http::Request::parse("/scrape", &query);
        let _ = http::Response::parse(&raw);
    }

    /// Others read what we write, and write what we read.
    #[test]
    fn udp_is_the_same_as_aquatics(announce in any_announce(), peers in any_peers(), scrapes in any_scrapes(), numbers in any::<(u64, u32)>(), v6 in any::<bool>()) {
        use aquatic_udp_protocol as theirs;
        let (connection, transaction) = numbers;
        let rewritten = |bytes: &[u8]| {
            let mut out = Vec::new();
            theirs::Request::parse_bytes(bytes, 80).expect("a request").write_bytes(&mut out).expect("memory");
            out
        };
        for request in [
            udp::Request::Connect { transaction },
            udp::Request::Announce { connection, transaction, announce },
            udp::Request::Scrape { connection, transaction, swarms: vec![announce.swarm; 3] },
        ] {
            prop_assert_eq!(udp::Request::parse(&rewritten(&request.encode())), Ok(request));
        }
        for response in [
            udp::Response::Connect { transaction, connection },
            udp::Response::Announce { transaction, peers: over_udp(&peers, v6) },
            udp::Response::Scrape { transaction, swarms: scrapes },
            udp::Response::Error { transaction, message: "no".to_owned() },
        ] {
            let mut out = Vec::new();
            theirs::Response::parse_bytes(&response.encode(v6), !v6).expect("a response").write_bytes(&mut out).expect("memory");
            prop_assert_eq!(udp::Response::parse(&out, v6), Ok(response));
        }
    }
}
