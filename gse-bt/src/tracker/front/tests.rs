use std::net::Ipv4Addr;

use gse_core::random::Random;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::super::{Access, Announce, Event, TrackerConfig, TrackerMetrics};
use super::*;

const SWARM: [u8; 20] = [7; 20];
const KEY: [u8; 32] = [3; 32];

fn tracker() -> Arc<Tracker> {
    let config = TrackerConfig::default();
    let tracker = Tracker::new(config, Access::Listed, TrackerMetrics::default(), Random::system());
    assert!(tracker.allow(SWARM));
    Arc::new(tracker)
}

async fn start(tracker: &Arc<Tracker>, ip: &str) -> (Listening, Lifecycle) {
    let life = Lifecycle::new("tracker");
    let config = FrontConfig {
        http_listen: format!("{ip}:0"),
        udp_listen: format!("{ip}:0"),
        request_timeout_ms: 500,
        ..FrontConfig::default()
    };
    let listening = serve(&config, tracker.clone(), &KEY, &life).await.expect("free ports");
    (listening, life)
}

fn announce(id: u8, port: u16) -> Announce {
    Announce {
        swarm: SWARM,
        peer_id: [id; 20],
        port,
        left: 5,
        event: Event::Started,
        wanted: None,
    }
}

/// Sends a head and reads to the end of the connection.
async fn get(address: SocketAddr, target: &str) -> (String, Vec<u8>) {
    let mut stream = TcpStream::connect(address).await.expect("listening");
    let head = format!("GET {target} HTTP/1.1\r\nHost: tracker\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("open");
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.expect("an answer");
    let end = all.windows(4).position(|four| four == b"\r\n\r\n").expect("a head") + 4;
    let head = String::from_utf8_lossy(&all[..end]).into_owned();
    (head, all.split_off(end))
}

/// Sends a datagram; the answer, if one comes soon.
async fn ask(socket: &UdpSocket, datagram: &[u8]) -> Option<Vec<u8>> {
    socket.send(datagram).await.expect("sent");
    let mut answer = vec![0; 4096];
    let len = tokio::time::timeout(Duration::from_secs(1), socket.recv(&mut answer))
        .await
        .ok()?;
    answer.truncate(len.expect("received"));
    Some(answer)
}

async fn udp_client(address: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(SocketAddr::new(address.ip(), 0))
        .await
        .expect("a free port");
    socket.connect(address).await.expect("reachable");
    socket
}

#[tokio::test]
async fn peers_find_each_other_over_both_ways() {
    // contract: p2p#9
    let tracker = tracker();
    let (listening, life) = start(&tracker, "127.0.0.1").await;
    let http = listening.http.expect("asked for");
    let (_, body) = get(http, &http::Request::Announce(announce(1, 1001)).encode()).await;
    let Ok(http::Response::Announce(first)) = http::Response::parse(&body) else {
        panic!("{}", body.escape_ascii());
    };
    assert_eq!((first.leechers, first.v4.len()), (1, 0));

    let udp = udp_client(listening.udp.expect("asked for")).await;
    let answer = ask(&udp, &udp::Request::Connect { transaction: 1 }.encode())
        .await
        .expect("answered");
    let Ok(udp::Response::Connect {
        transaction: 1,
        connection,
    }) = udp::Response::parse(&answer, false)
    else {
        panic!("{}", answer.escape_ascii());
    };
    let request = udp::Request::Announce {
        connection,
        transaction: 2,
        announce: announce(2, 1002),
    };
    let answer = ask(&udp, &request.encode()).await.expect("answered");
    let Ok(udp::Response::Announce { transaction: 2, peers }) = udp::Response::parse(&answer, false) else {
        panic!("{}", answer.escape_ascii());
    };
    assert_eq!(peers.v4, ["127.0.0.1:1001".parse().expect("an address")]);
    let request = udp::Request::Scrape {
        connection,
        transaction: 3,
        swarms: vec![[9; 20], SWARM],
    };
    let answer = ask(&udp, &request.encode()).await.expect("answered");
    let Ok(udp::Response::Scrape { swarms, .. }) = udp::Response::parse(&answer, false) else {
        panic!("{}", answer.escape_ascii());
    };
    assert_eq!(swarms.iter().map(|swarm| swarm.leechers).collect::<Vec<_>>(), [0, 2]);

    let (_, body) = get(http, &http::Request::Scrape(vec![[9; 20], SWARM]).encode()).await;
    let Ok(http::Response::Scrape(figures)) = http::Response::parse(&body) else {
        panic!("{}", body.escape_ascii());
    };
    assert_eq!(figures.len(), 1);
    assert_eq!(figures[0].1.leechers, 2);

    // What is refused is refused in words.
    let unknown = Announce {
        swarm: [9; 20],
        ..announce(1, 1001)
    };
    let (head, body) = get(http, &http::Request::Announce(unknown).encode()).await;
    assert!(
        head.starts_with("HTTP/1.1 200") && head.contains("text/plain"),
        "{head}"
    );
    assert_eq!(
        http::Response::parse(&body),
        Ok(http::Response::Failure("unknown swarm".to_owned()))
    );
    let request = udp::Request::Announce {
        connection,
        transaction: 4,
        announce: unknown,
    };
    let answer = ask(&udp, &request.encode()).await.expect("answered");
    let refused = udp::Response::Error {
        transaction: 4,
        message: "unknown swarm".to_owned(),
    };
    assert_eq!(udp::Response::parse(&answer, false), Ok(refused));
    assert!(get(http, "/").await.0.starts_with("HTTP/1.1 404"));
    assert!(get(http, "/announce").await.1.ends_with(b"what it must bee"));

    life.drain();
    assert!(life.finished(Duration::from_secs(5)).await);
    assert!(TcpStream::connect(http).await.is_err());
}

#[tokio::test]
async fn over_ipv6_peers_are_of_ipv6() {
    // contract: p2p#10
    let tracker = tracker();
    let (listening, life) = start(&tracker, "[::1]").await;
    let mut out = Peers::default();
    tracker
        .announce(Ipv4Addr::LOCALHOST.into(), &announce(3, 1003), 0, &mut out)
        .expect("allowed");
    let (_, body) = get(
        listening.http.expect("asked for"),
        &http::Request::Announce(announce(1, 1001)).encode(),
    )
    .await;
    let Ok(http::Response::Announce(first)) = http::Response::parse(&body) else {
        panic!("{}", body.escape_ascii());
    };
    assert_eq!((first.v4.len(), first.v6.len()), (1, 0), "over HTTP both are told");

    let udp = udp_client(listening.udp.expect("asked for")).await;
    let answer = ask(&udp, &udp::Request::Connect { transaction: 1 }.encode())
        .await
        .expect("answered");
    let Ok(udp::Response::Connect { connection, .. }) = udp::Response::parse(&answer, true) else {
        panic!("{}", answer.escape_ascii());
    };
    let request = udp::Request::Announce {
        connection,
        transaction: 2,
        announce: announce(2, 1002),
    };
    let answer = ask(&udp, &request.encode()).await.expect("answered");
    let Ok(udp::Response::Announce { peers, .. }) = udp::Response::parse(&answer, true) else {
        panic!("{}", answer.escape_ascii());
    };
    assert_eq!(peers.v6, ["[::1]:1001".parse().expect("an address")]);
    life.drain();
    assert!(life.finished(Duration::from_secs(5)).await);
}

#[test]
fn an_address_that_is_not_proven_gets_no_more_than_it_sends() {
    // contract: p2p#11
    let front = Front {
        tracker: tracker(),
        ids: ConnectionIds::new(&KEY),
        started: Instant::now(),
        torrents: None,
    };
    let from: IpAddr = [10, 0, 0, 1].into();
    for n in 0..200_u32 {
        let ip = Ipv4Addr::from(0x0a01_0000 + n);
        let told = &mut Peers::default();
        front
            .tracker
            .announce(ip.into(), &announce(n as u8, 1000), 0, told)
            .expect("allowed");
    }
    let mut answerer = Answerer::new(&front);
    let other: IpAddr = [10, 0, 0, 2].into();
    let good = front.ids.make(from, 0);
    let announce_with = |connection| udp::Request::Announce {
        connection,
        transaction: 7,
        announce: announce(1, 1001),
    };
    let scrape_with = |connection| udp::Request::Scrape {
        connection,
        transaction: 7,
        swarms: vec![SWARM],
    };
    for connection in [0, u64::MAX, udp::MAGIC, good ^ 1, front.ids.make(other, 0)] {
        for request in [announce_with(connection), scrape_with(connection)] {
            let datagram = request.encode();
            let answer = answerer.answer(&datagram, from).expect("told why").to_vec();
            assert!(answer.len() <= datagram.len());
            assert!(matches!(
                udp::Response::parse(&answer, false),
                Ok(udp::Response::Error { transaction: 7, .. })
            ));
        }
    }
    assert_eq!(front.tracker.peers(), 200, "nothing of it counts");
    let datagram = udp::Request::Connect { transaction: 1 }.encode();
    assert_eq!(answerer.answer(&datagram, from).map(<[u8]>::len), Some(datagram.len()));
    // What can't be read is not answered at all.
    for cut in 0..udp::ANNOUNCE_LEN {
        let datagram = &announce_with(good).encode()[..cut];
        assert_eq!(answerer.answer(datagram, from), None);
    }
    // The right id is good for some minutes, not for ever.
    let datagram = announce_with(good).encode();
    assert!(
        answerer
            .answer(&datagram, from)
            .is_some_and(|answer| answer.len() == 20 + 40 * 6)
    );
    let mut refused_at = |now| {
        answerer.now = now;
        let answer = answerer.answer(&datagram, from).expect("told why");
        matches!(udp::Response::parse(answer, false), Ok(udp::Response::Error { .. }))
    };
    assert!(!refused_at(179));
    assert!(refused_at(180));
}

#[tokio::test]
async fn a_client_that_is_slow_is_not_waited_for() {
    let (listening, life) = start(&tracker(), "127.0.0.1").await;
    let mut stream = TcpStream::connect(listening.http.expect("asked for"))
        .await
        .expect("listening");
    stream.write_all(b"GET /announce HTTP/1.1\r\n").await.expect("open");
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "the connection is closed");
    // A head beyond its bound ends the connection, with or without an answer getting through, and nothing else.
    let http = listening.http.expect("asked for");
    let mut stream = TcpStream::connect(http).await.expect("listening");
    let long = format!("GET /announce?x={} HTTP/1.1\r\n\r\n", "a".repeat(64 * HEAD));
    let sent = stream.write_all(long.as_bytes()).await;
    let mut rest = Vec::new();
    let read = stream.read_to_end(&mut rest).await;
    assert!(
        sent.is_err() || read.is_err() || rest.starts_with(b"HTTP/1.1 4"),
        "{}",
        rest.escape_ascii()
    );
    assert!(get(http, "/").await.0.starts_with("HTTP/1.1 404"));
    life.drain();
    assert!(life.finished(Duration::from_secs(5)).await);
}
