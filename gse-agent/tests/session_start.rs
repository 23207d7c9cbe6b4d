//! How an agent comes to a session: what it says of itself, whom it trusts, whom it tries and when.
#![allow(clippy::unwrap_used)] // a test ends by panicking

mod session_support;

use std::time::{Duration, Instant};

use gse_core::tls::Role;
use gse_proto::frame::Frame;
use gse_proto::session::{PROTOCOL, PROTOCOL_MIN, RefuseCode, TargetRef};
use session_support::{Agent, Pki, Server, text_of};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hello_says_who_the_agent_is_and_what_it_holds() {
    let pki = Pki::new();
    let server = Server::start(&pki.issue("server", Role::Server, None)).await;
    let agent_tls = pki.issue("agent", Role::Agent, None);
    let mut agent = Agent::start(&agent_tls, &[&server.address], |_| {});
    let held = TargetRef {
        task_id: "T".into(),
        bucket: 2,
        index: 3,
    };
    agent.work.held.lock().push(held.clone());

    // The first hello may have been made before the test said what is held.
    let (peer, _) = server.hello().await;
    drop(peer);
    let (mut peer, hello) = server.hello().await;
    assert_eq!((hello.protocol, hello.protocol_min), (PROTOCOL, PROTOCOL_MIN));
    assert_eq!(hello.agent_id, "0:10.0.0.1");
    assert_eq!(&hello.journal_epoch[..], b"epoch-1");
    assert_eq!(hello.held, [held]);

    peer.welcome(30_000, &[]).await;
    let attached = agent.seen.attached.recv().await.unwrap();
    assert_eq!(attached, (1 << 20, 4 << 20, 1_700_000_000_000));
    // A heartbeat at once, with the executor's figures.
    let beat = peer
        .until(|frame| match frame {
            Frame::Heartbeat(beat) => Some(beat),
            _ => None,
        })
        .await;
    assert_eq!((beat.running, beat.queued), (3, 4));
    assert!(beat.cpu_permille <= 1000 && (1..=1000).contains(&beat.mem_permille));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_are_tried_in_turn_and_learned_ones_are_kept() {
    let pki = Pki::new();
    let files = pki.issue("server", Role::Server, None);
    let agent_tls = pki.issue("agent", Role::Agent, None);
    let first = Server::start(&files).await;
    let second = Server::start(&files).await;
    // Nobody listens at the first address, and the second does not speak TLS.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    let stranger = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stranger_address = stranger.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = stranger.accept().await {
            use tokio::io::AsyncWriteExt;
            let _ = socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let started = Instant::now();
    let agent = Agent::start(&agent_tls, &[&nobody, &stranger_address, &first.address], |config| {
        // A round that waited between its addresses would not come to the third one in time.
        config.reconnect.min_ms = 60_000;
        config.reconnect.max_ms = 60_000;
    });
    let (mut peer, _) = first.hello().await;
    assert!(started.elapsed() < Duration::from_secs(10));
    peer.welcome(30_000, &[&first.address, &second.address]).await;
    peer.recv().await.unwrap();
    agent.stop().await;
    assert!(text_of(agent.data.path(), "servers.json").contains(&second.address));

    // The next agent process finds the second server though its configuration does not name it.
    drop((peer, first));
    let agent = Agent::start_in(agent.data, &agent_tls, &[&nobody], |_| {});
    second.agent(30_000).await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_server_of_our_authority_is_spoken_to() {
    let pki = Pki::new();
    let other = Pki::new();
    let agent_tls = pki.issue("agent", Role::Agent, None);
    let foreign = Server::start(&other.issue("server", Role::Server, None)).await;
    let impostor = Server::start(&pki.issue("stolen", Role::Agent, Some("0:10.0.0.9"))).await;
    let good = Server::start(&pki.issue("server", Role::Server, None)).await;
    let agent = Agent::start(
        &agent_tls,
        &[&foreign.address, &impostor.address, &good.address],
        |_| {},
    );
    // The agent ends both handshakes; not a byte of the hello is sent.
    for server in [&foreign, &impostor] {
        let error = server
            .connection()
            .await
            .expect_err("the agent must not finish this handshake");
        assert!(
            error.to_string().contains("alert") || error.to_string().contains("eof"),
            "{error}"
        );
    }
    good.agent(30_000).await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_the_server_does_not_take_is_no_end() {
    let pki = Pki::new();
    let server = Server::start(&pki.issue("server", Role::Server, None)).await;
    let not_an_agent = pki.issue("api", Role::ApiClient, None);
    let agent = Agent::start(&not_an_agent, &[&server.address], |_| {});
    for _ in 0..3 {
        server
            .connection()
            .await
            .expect_err("the server must not let this certificate in");
    }
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_is_respected_as_long_as_it_says() {
    let pki = Pki::new();
    let server = Server::start(&pki.issue("server", Role::Server, None)).await;
    let agent = Agent::start(&pki.issue("agent", Role::Agent, None), &[&server.address], |_| {});
    for code in [RefuseCode::Busy, RefuseCode::Clone, RefuseCode::Identity] {
        let (mut peer, _) = server.hello().await;
        peer.refuse(code, Duration::from_millis(800)).await;
        let refused = Instant::now();
        let (mut peer, _) = server.hello().await;
        assert!(
            refused.elapsed() >= Duration::from_millis(790),
            "came back after {:?}",
            refused.elapsed()
        );
        assert!(refused.elapsed() < Duration::from_secs(5));
        // Without a time the agent's own waits hold, which are short here.
        peer.refuse(code, Duration::ZERO).await;
    }
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_closes_at_once_is_asked_ever_less_often() {
    let pki = Pki::new();
    let server = Server::start(&pki.issue("server", Role::Server, None)).await;
    let agent = Agent::start(&pki.issue("agent", Role::Agent, None), &[&server.address], |config| {
        config.reconnect.min_ms = 100;
        config.reconnect.max_ms = 100_000;
    });
    let started = Instant::now();
    let mut visits = 0;
    while started.elapsed() < Duration::from_secs(3) {
        if !server.anybody_within(Duration::from_secs(1)).await {
            continue;
        }
        visits += 1;
    }
    // Without growing waits there would be about sixty.
    assert!((2..=20).contains(&visits), "{visits} visits in 3 s");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_second_session_with_a_server_resumes_the_first() {
    let pki = Pki::new();
    let server = Server::start(&pki.issue("server", Role::Server, None)).await;
    let agent = Agent::start(&pki.issue("agent", Role::Agent, None), &[&server.address], |_| {});
    let peer = server.agent(30_000).await;
    assert_eq!(
        peer.stream.get_ref().1.handshake_kind(),
        Some(rustls::HandshakeKind::Full)
    );
    let mut peer = peer;
    peer.recv().await.unwrap();
    drop(peer);
    let peer = server.agent(30_000).await;
    assert_eq!(
        peer.stream.get_ref().1.handshake_kind(),
        Some(rustls::HandshakeKind::Resumed)
    );
    agent.stop().await;
}
