//! Who gets into a swarm and who does not, what bad pieces lead to, and what is told to strangers: nothing.

#![allow(clippy::unwrap_used)] // what fails here fails the test

mod support;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use gse_bt::manifest::swarm_id;
use gse_bt::wire::{EXT_HANDSHAKE, ExtHandshake, Handshake, Message};
use gse_bt::{Engine, EngineConfig, Metrics, SwarmSpec, ticket};
use gse_core::tls::server_name;
use support::{Content, Site, foreign, noise, spec, storage, wait_for};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

/// A foreign peer that has everything, and sends the first `wrong` pieces that it is asked for wrongly.
async fn liar(
    content: Arc<Vec<u8>>,
    piece_length: usize,
    swarm: [u8; 20],
    wrong: usize,
) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&connections);
    tokio::spawn(async move {
        let mut lied: BTreeMap<u32, bool> = BTreeMap::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            seen.fetch_add(1, Ordering::Relaxed);
            let mut buffer = BytesMut::new();
            let mut out = BytesMut::new();
            while !matches!(Handshake::decode(&mut buffer), Ok(Some(_))) {
                if stream.read_buf(&mut buffer).await.unwrap_or(0) == 0 {
                    break;
                }
            }
            Handshake::new(swarm, *b"-LI0000-000000000000").encode(&mut out);
            Message::HaveAll.encode(&mut out);
            Message::Unchoke.encode(&mut out);
            loop {
                if stream.write_all(&out).await.is_err() {
                    break;
                }
                out.clear();
                while let Ok(Some(message)) = Message::decode(&mut buffer) {
                    let Message::Request(block) = message else { continue };
                    let lies = lied.len() < wrong;
                    let lie = *lied.entry(block.piece).or_insert(lies);
                    let at = block.piece as usize * piece_length + block.begin as usize;
                    let mut data = content[at..at + block.len as usize].to_vec();
                    data[0] ^= u8::from(lie);
                    let (piece, begin) = (block.piece, block.begin);
                    Message::Piece {
                        piece,
                        begin,
                        data: data.into(),
                    }
                    .encode(&mut out);
                }
                if out.is_empty() && stream.read_buf(&mut buffer).await.unwrap_or(0) == 0 {
                    break;
                }
            }
        }
    });
    (address, connections)
}

async fn with_liar(wrong: usize) -> (gse_bt::Progress, u64, usize) {
    let site = Site::plain();
    let content = Content::of_one(8 << 20);
    let piece = u64::from(content.manifest.piece_length);
    let bytes = Arc::new(content.files[0].clone());
    let (address, connections) = liar(bytes, piece as usize, swarm_id(&content.manifest), wrong).await;
    let config = site.config("t0");
    let target = site.target_with("t0", &content, config, true, None).await;
    target.swarm.add_peers(&[foreign(address.ip(), address.port())]);
    wait_for("the first bad piece", || {
        target.swarm.progress().borrow().bad_pieces > 0
    })
    .await;
    let seed = site.seed("seed", &content).await;
    target.swarm.add_peers(&[seed.address(true)]);
    target.finished(Duration::from_secs(10)).await;
    target.check(&content);
    let progress = target.swarm.progress().borrow().clone();
    (progress, piece, connections.load(Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_bad_piece_is_fetched_once_more() {
    // contract: p2p#17
    let (progress, piece, connections) = with_liar(1).await;
    assert_eq!(progress.bad_pieces, 1);
    assert_eq!(progress.downloaded, progress.total + piece);
    assert_eq!(connections, 1, "it was not left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_sends_two_bad_pieces_is_banned() {
    // contract: p2p#17
    let (progress, piece, connections) = with_liar(usize::MAX).await;
    // Those that were asked for before the second was known to be bad still come; of the rest none.
    let pieces = progress.total / piece;
    assert!(
        (2..pieces * 3 / 4).contains(&progress.bad_pieces),
        "{} bad pieces of {pieces} were taken",
        progress.bad_pieces
    );
    assert_eq!(connections, 1, "it is not dialled again");
}

/// Says who it is to a listener of ours, as a dialler would, and returns what comes back until the listener closes.
async fn introduce(site: &Site, to: SocketAddr, swarm: [u8; 20], claim: Option<&[u8]>) -> Vec<u8> {
    let tls = site.tls_of("stranger").unwrap();
    let tcp = TcpStream::connect(to).await.unwrap();
    let mut stream = TlsConnector::from(tls.client)
        .connect(server_name(), tcp)
        .await
        .unwrap();
    let mut out = BytesMut::new();
    Handshake::new(swarm, *b"-ST0000-000000000000").encode(&mut out);
    let shake = ExtHandshake {
        gse: claim.map(Bytes::copy_from_slice),
        ..ExtHandshake::default()
    };
    Message::Extended {
        id: EXT_HANDSHAKE,
        payload: shake.encode(),
    }
    .encode(&mut out);
    stream.write_all(&out).await.unwrap();
    let mut got = Vec::new();
    // However it is closed, what came before counts.
    let _closed = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut got))
        .await
        .expect("is closed");
    got
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_get_no_piece_and_no_hint() {
    // contract: p2p#16
    let site = Site::tls();
    let content = Content::of_one(200_000);
    let seed = site.seed("seed", &content).await;
    let at = seed.engine.listening()[0];
    let proof = [b"d2:id8:stranger5:proof32:".as_slice(), &noise(3, 32), b"e"].concat();
    for swarm in [swarm_id(&content.manifest), [9; 20]] {
        for claim in [None, Some(proof.as_slice()), Some(b"de".as_slice())] {
            assert_eq!(introduce(&site, at, swarm, claim).await, b"", "nothing is said");
        }
    }
    // No TLS, or a certificate of somebody else: not even that far.
    let mut plain = TcpStream::connect(at).await.unwrap();
    let mut out = BytesMut::new();
    Handshake::new(swarm_id(&content.manifest), [1; 20]).encode(&mut out);
    plain.write_all(&out).await.unwrap();
    let mut got = Vec::new();
    let _closed = tokio::time::timeout(Duration::from_secs(5), plain.read_to_end(&mut got))
        .await
        .expect("is closed");
    assert!(!got.windows(19).any(|bytes| bytes == b"BitTorrent protocol"));
    let other = Site::tls();
    let elsewhere = TlsConnector::from(other.tls_of("t0").unwrap().client);
    let tcp = TcpStream::connect(at).await.unwrap();
    assert!(elsewhere.connect(server_name(), tcp).await.is_err());
    assert_eq!(seed.swarm.progress().borrow().uploaded, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_key_or_somebody_elses_name_does_not_get_in() {
    // contract: p2p#16
    let site = Site::tls();
    let content = Content::of_one(200_000);
    let seed = site.seed("seed", &content).await;
    // The key is wrong; and: the key is right, but the certificate is of another agent.
    for (certificate, own_id, key) in [("t0", "t0", [1; 32]), ("t1", "t2", support::KEY)] {
        let metrics = Metrics::default();
        let config = EngineConfig {
            ..site.config(certificate)
        };
        let engine = Engine::start(config, metrics).await.unwrap();
        let paths = vec![site.dir.path().join(format!("of {own_id}"))];
        let spec = SwarmSpec {
            swarm_key: key,
            ..spec(own_id, &content, false)
        };
        let swarm = engine.fetch(spec, storage(&content, &paths), None).unwrap();
        swarm.add_peers(&[seed.address(true)]);
        tokio::time::sleep(Duration::from_secs(2)).await;
        let progress = swarm.progress().borrow().clone();
        assert_eq!((progress.peers, progress.downloaded), (0, 0), "as {own_id}");
    }
    let member = site.target("t3", &content).await;
    member.swarm.add_peers(&[seed.address(true)]);
    member.finished(Duration::from_secs(10)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_gets_in_with_its_ticket_and_under_no_other_name() {
    // contract: p2p#16
    // Certificates say nothing here, as where a fleet shares one.
    let site = Site::plain();
    let content = Content::of_one(200_000);
    let seed = site.seed("seed", &content).await;
    let given = ticket(&support::KEY, "member");
    // With the ticket of another one; with what follows from its own key alone; as it should be.
    for (own_id, shown, gets_in) in [
        ("somebody", Some(given), false),
        ("member", None, false),
        ("member", Some(given), true),
    ] {
        let engine = site.engine(own_id).await;
        let paths = vec![site.dir.path().join(format!("of {own_id}"))];
        let spec = SwarmSpec {
            swarm_key: [2; 32],
            ..spec(own_id, &content, false)
        };
        let swarm = engine.fetch(spec, storage(&content, &paths), None).unwrap();
        let mut peer = seed.address(true);
        peer.ticket = shown.map_or_else(Bytes::new, |ticket| Bytes::copy_from_slice(&ticket));
        swarm.add_peers(&[peer]);
        let mut progress = swarm.progress();
        let patience = Duration::from_secs(if gets_in { 10 } else { 2 });
        // What it returns holds the progress: not kept.
        let whole = tokio::time::timeout(patience, progress.wait_for(|progress| progress.complete))
            .await
            .is_ok();
        assert_eq!(whole, gets_in, "as {own_id}, with a ticket: {}", shown.is_some());
        engine.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_peers_get_in_only_where_a_swarm_is_open_to_them() {
    let site = Site::tls();
    let content = Content::of_one(200_000);
    for open in [false, true] {
        let config = EngineConfig {
            plain_listen: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
            ..site.config("seed")
        };
        let seed = site.seed_with("seed", &content, config, open).await;
        let mut stream = TcpStream::connect(seed.engine.plain_listening().unwrap())
            .await
            .unwrap();
        let mut out = BytesMut::new();
        Handshake::new(swarm_id(&content.manifest), [1; 20]).encode(&mut out);
        stream.write_all(&out).await.unwrap();
        let mut got = [0; 68];
        let answered = tokio::time::timeout(Duration::from_secs(5), stream.read_exact(&mut got))
            .await
            .expect("answered or closed");
        assert_eq!(answered.is_ok(), open);
        assert_eq!(
            seed.engine.plain_listening().unwrap().ip(),
            IpAddr::V4(Ipv4Addr::LOCALHOST)
        );
        seed.engine.stop().await;
    }
}
