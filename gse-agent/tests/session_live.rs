//! A session while it lasts: orders, results, pings under load, silence, moves and goodbyes.
#![allow(clippy::unwrap_used)] // a test ends by panicking

mod session_support;

use std::time::{Duration, Instant};

use gse_agent::session::Report;
use gse_core::tls::Role;
use gse_proto::frame::Frame;
use gse_proto::session::{Dispatch, Goodbye, Move, Output, Ping, Pong, Row, Stored, TargetRef, Terminate};
use session_support::{Agent, Order, Peer, Pki, Server};
use tokio::io::AsyncWriteExt;

async fn connected(heartbeat_ms: u32) -> (Pki, Server, Peer, Agent) {
    let pki = Pki::new();
    let server = Server::start(&pki.issue("server", Role::Server, None)).await;
    let agent = Agent::start(&pki.issue("agent", Role::Agent, None), &[&server.address], |_| {});
    let mut peer = server.agent(heartbeat_ms).await;
    // The first heartbeat: the session is under way.
    peer.until(|frame| matches!(frame, Frame::Heartbeat(_)).then_some(()))
        .await;
    (pki, server, peer, agent)
}

fn target(task: &str) -> Option<TargetRef> {
    Some(TargetRef {
        task_id: task.into(),
        bucket: 0,
        index: 0,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_reach_the_executor_in_their_order() {
    let (_pki, _server, mut peer, mut agent) = connected(30_000).await;
    peer.send(Dispatch {
        target: target("T"),
        asked_id: "one".into(),
        ..Default::default()
    })
    .await;
    peer.send(Terminate { target: target("T") }).await;
    peer.send(Terminate { target: None }).await;
    peer.send(Stored {
        offset: 42,
        ..Default::default()
    })
    .await;
    for n in 0..300 {
        peer.send(Dispatch {
            asked_id: n.to_string(),
            ..Default::default()
        })
        .await;
    }
    assert_eq!(agent.seen.orders.recv().await, Some(Order::Dispatch("one".into())));
    assert_eq!(agent.seen.orders.recv().await, Some(Order::Terminate("T".into())));
    assert_eq!(agent.seen.orders.recv().await, Some(Order::Stored(42)));
    for n in 0..300 {
        assert_eq!(agent.seen.orders.recv().await, Some(Order::Dispatch(n.to_string())));
    }
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_dispatch_arrives_whole() {
    let (_pki, _server, mut peer, mut agent) = connected(30_000).await;
    let content = vec![b'#'; 20 << 20];
    let script = gse_proto::session::Script {
        content: content.into(),
        ..Default::default()
    };
    peer.send(Dispatch {
        asked_id: "big".into(),
        scripts: vec![script],
        ..Default::default()
    })
    .await;
    peer.send(Ping { nonce: 5 }).await;
    assert_eq!(agent.seen.orders.recv().await, Some(Order::Dispatch("big".into())));
    let nonce = peer
        .until(|frame| {
            if let Frame::Pong(pong) = frame {
                Some(pong.nonce)
            } else {
                None
            }
        })
        .await;
    assert_eq!(nonce, 5);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_kinds_are_answered_and_nonsense_ends_the_session() {
    let (_pki, server, mut peer, agent) = connected(30_000).await;
    peer.send(Frame::Unknown {
        kind: 999,
        message: bytes::Bytes::from_static(b"future"),
    })
    .await;
    // Not for an agent, but no reason to leave.
    peer.send(Row::default()).await;
    peer.send(Ping { nonce: 1 }).await;
    let kind = peer
        .until(|frame| {
            if let Frame::Unsupported(answer) = frame {
                Some(answer.kind)
            } else {
                None
            }
        })
        .await;
    assert_eq!(kind, 999);
    peer.until(|frame| matches!(frame, Frame::Pong(Pong { nonce: 1 })).then_some(()))
        .await;

    peer.stream
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    peer.stream.flush().await.unwrap();
    while peer.recv().await.is_some() {}
    server.agent(30_000).await;
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ping_is_answered_while_output_floods() {
    let (_pki, _server, mut peer, agent) = connected(30_000).await;
    let reports = agent.work.reports();
    let flood = tokio::spawn(async move {
        for offset in 0..4_000u64 {
            let output = Output {
                offset,
                data: vec![b'x'; 60_000].into(),
                ..Default::default()
            };
            if reports.send(Report::Output(output)).await.is_err() {
                return;
            }
        }
    });
    // Nobody reads for a moment: every buffer on the way fills.
    tokio::time::sleep(Duration::from_millis(700)).await;
    peer.send(Ping { nonce: 77 }).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let (mut outputs, mut next) = (0, 0);
    loop {
        match peer.recv().await.unwrap() {
            Frame::Output(output) => {
                assert_eq!(output.offset, next, "output out of order");
                next += 1;
                outputs += 1;
            }
            Frame::Pong(pong) => {
                assert_eq!(pong.nonce, 77);
                break;
            }
            Frame::Heartbeat(_) => {}
            other => panic!("{other:?}"),
        }
    }
    // Only what the system's socket buffers held was in front of it: the lane of bulk alone holds 256, the flood 4,000.
    assert!(outputs < 250, "{outputs} pieces of output came first");
    assert!(!flood.is_finished());
    flood.abort();
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_has_gone_without_a_word_is_noticed() {
    let pki = Pki::new();
    let files = pki.issue("server", Role::Server, None);
    let (silent, alive) = (Server::start(&files).await, Server::start(&files).await);
    let agent = Agent::start(
        &pki.issue("agent", Role::Agent, None),
        &[&silent.address, &alive.address],
        |_| {},
    );
    let mut peer = silent.agent(200).await;
    let since = Instant::now();
    // Three intervals of silence and the agent asks; it is answered once.
    let nonce = peer
        .until(|frame| {
            if let Frame::Ping(ping) = frame {
                Some(ping.nonce)
            } else {
                None
            }
        })
        .await;
    assert!(
        since.elapsed() >= Duration::from_millis(590),
        "asked after {:?}",
        since.elapsed()
    );
    peer.send(Pong { nonce }).await;
    let answered = Instant::now();
    // From here on the server says nothing more, and the connection stays open.
    let (_peer, _) = alive.hello().await;
    let noticed = answered.elapsed();
    assert!(noticed >= Duration::from_millis(790), "given up after {noticed:?}");
    assert!(noticed < Duration::from_secs(5), "given up after {noticed:?}");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_with_pongs_lasts() {
    let (_pki, server, mut peer, agent) = connected(100).await;
    let started = Instant::now();
    let (mut beats, mut pings) = (0, 0);
    while started.elapsed() < Duration::from_secs(2) {
        match peer.recv().await.expect("the agent stays") {
            Frame::Ping(ping) => {
                pings += 1;
                peer.send(Pong { nonce: ping.nonce }).await;
            }
            Frame::Heartbeat(_) => beats += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!((12..=24).contains(&beats), "{beats} heartbeats in 2 s at 100 ms");
    assert!((3..=8).contains(&pings), "{pings} pings in 2 s");
    assert!(!server.anybody_within(Duration::from_millis(50)).await);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_agent_sends_what_it_has_and_says_goodbye() {
    let (_pki, _server, mut peer, agent) = connected(30_000).await;
    let reports = agent.work.reports();
    for n in 0..10 {
        reports
            .send(Report::Row(Row {
                atomic: n,
                ..Default::default()
            }))
            .await
            .unwrap();
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let stopping = agent.stop();
    let reading = async {
        let mut rows = 0;
        loop {
            match peer.recv().await.expect("a goodbye comes before the end") {
                Frame::Row(_) => rows += 1,
                Frame::Goodbye(goodbye) => {
                    assert!(goodbye.stopping && !goodbye.reason.is_empty());
                    break;
                }
                _ => {}
            }
        }
        assert_eq!(rows, 10);
        assert!(peer.recv().await.is_none(), "nothing comes after the goodbye");
    };
    let (took, ()) = tokio::join!(stopping, reading);
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopping_does_not_wait_for_a_server_that_does_not_read() {
    let (_pki, _server, peer, agent) = connected(30_000).await;
    let reports = agent.work.reports();
    let flood = tokio::spawn(async move {
        while reports
            .send(Report::Output(Output {
                data: vec![0; 60_000].into(),
                ..Default::default()
            }))
            .await
            .is_ok()
        {}
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    let took = agent.stop().await;
    assert!(took < Duration::from_secs(4), "{took:?}");
    flood.abort();
    drop(peer);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_server_is_left_for_another_at_once() {
    let pki = Pki::new();
    let files = pki.issue("server", Role::Server, None);
    let (leaving, staying) = (Server::start(&files).await, Server::start(&files).await);
    let agent = Agent::start(
        &pki.issue("agent", Role::Agent, None),
        &[&leaving.address, &staying.address],
        |config| {
            config.reconnect.min_ms = 60_000;
            config.reconnect.max_ms = 60_000;
        },
    );
    let mut peer = leaving.agent(30_000).await;
    let started = Instant::now();
    peer.send(Goodbye {
        reason: "stopping".into(),
        stopping: true,
        ..Goodbye::default()
    })
    .await;
    staying.agent(30_000).await;
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_connects_first_and_leaves_then() {
    let (pki, server, mut old, mut agent) = connected(30_000).await;
    let target_server = Server::start(&pki.issue("server2", Role::Server, None)).await;
    assert!(agent.seen.attached.recv().await.is_some());

    // A move to nowhere changes nothing.
    old.send(Move {
        servers: vec!["127.0.0.1:1".into(), "nonsense".into()],
        reason: "test".into(),
    })
    .await;
    old.send(Ping { nonce: 1 }).await;
    old.until(|frame| matches!(frame, Frame::Pong(_)).then_some(())).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    old.send(Dispatch {
        asked_id: "still here".into(),
        ..Default::default()
    })
    .await;
    assert_eq!(
        agent.seen.orders.recv().await,
        Some(Order::Dispatch("still here".into()))
    );

    old.send(Move {
        servers: vec![target_server.address.clone()],
        reason: "test".into(),
    })
    .await;
    let (mut new, _) = target_server.hello().await;
    // The old session is still there while the new one is not: it answers, but takes no order that the hello does not name.
    old.send(Dispatch {
        asked_id: "too late".into(),
        ..Default::default()
    })
    .await;
    old.send(Ping { nonce: 2 }).await;
    old.until(|frame| matches!(frame, Frame::Pong(Pong { nonce: 2 })).then_some(()))
        .await;
    new.welcome(30_000, &[]).await;
    let goodbye = old
        .until(|frame| {
            if let Frame::Goodbye(goodbye) = frame {
                Some(goodbye)
            } else {
                None
            }
        })
        .await;
    assert!(!goodbye.stopping);
    assert!(old.recv().await.is_none());

    // The executor reports to the new server and takes its orders.
    assert!(agent.seen.attached.recv().await.is_some());
    agent
        .work
        .reports()
        .send(Report::Row(Row {
            atomic: 9,
            ..Default::default()
        }))
        .await
        .unwrap();
    let atomic = new
        .until(|frame| {
            if let Frame::Row(row) = frame {
                Some(row.atomic)
            } else {
                None
            }
        })
        .await;
    assert_eq!(atomic, 9);
    new.send(Dispatch {
        asked_id: "new".into(),
        ..Default::default()
    })
    .await;
    assert_eq!(agent.seen.orders.recv().await, Some(Order::Dispatch("new".into())));
    assert!(!server.anybody_within(Duration::from_millis(300)).await);
    agent.stop().await;
}
