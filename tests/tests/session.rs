//! The session as a hostile or broken peer would use it: gse_task stays up, says why, and lets nobody touch what is not his.

use std::time::Duration;

use bytes::BytesMut;
use gse_proto::frame::{Frame, put_header};
use gse_proto::session as s;
use gse_tests::wire::hello;
use gse_tests::{Site, StoreKind, Wire, eventually, script_body};
use serde_json::json;

const ONE: &str = "020000000242010a00002f17521298676501";

async fn connect(site: &Site, id: &str) -> Wire {
    let (cert, key) = site.agent_certificate(id).expect("a certificate");
    let address = site.task.as_ref().expect("gse_task runs").address("agents");
    Wire::connect(address, &site.path().join("certs/gseca.crt"), &cert, &key)
        .await
        .expect("a connection")
}

#[tokio::test]
async fn strange_frames() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let mut wire = connect(&site, ONE).await;
    let welcome = wire.greet(hello(ONE)).await.unwrap();
    assert_eq!(welcome.protocol, 1);
    assert_eq!(welcome.heartbeat_interval_ms, 1000);
    assert!(!welcome.servers.is_empty() && welcome.server_time_ms > 0);
    // An unknown kind is refused politely, and the session goes on.
    let mut unknown = BytesMut::new();
    put_header(&mut unknown, 4242, 0, 3);
    unknown.extend_from_slice(b"abc");
    wire.send_raw(&unknown).await.unwrap();
    assert_eq!(
        wire.recv().await.unwrap(),
        Some(Frame::Unsupported(s::Unsupported { kind: 4242 }))
    );
    wire.send(s::Ping { nonce: 7 }).await.unwrap();
    assert_eq!(wire.recv().await.unwrap(), Some(Frame::Pong(s::Pong { nonce: 7 })));
    // What is not a frame ends the connection, and nothing else.
    wire.send_raw(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    assert_eq!(wire.recv().await.unwrap(), None);
    site.wait_state(ONE, -1).await;

    // Before the hello: garbage, the wrong first frame, a hello of the future, another agent's name.
    for bytes in [
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff".to_vec(),
        Frame::from(s::Ping { nonce: 1 }).to_bytes().to_vec(),
    ] {
        let mut wire = connect(&site, ONE).await;
        wire.send_raw(&bytes).await.unwrap();
        assert_eq!(wire.recv().await.unwrap(), None);
    }
    let future = s::Hello {
        protocol: 99,
        protocol_min: 98,
        ..hello(ONE)
    };
    for (hello, code) in [
        (future, s::RefuseCode::Protocol),
        (hello("another"), s::RefuseCode::Identity),
    ] {
        let mut wire = connect(&site, ONE).await;
        wire.send(hello).await.unwrap();
        let Some(Frame::Refuse(refuse)) = wire.recv().await.unwrap() else {
            panic!("not refused")
        };
        assert_eq!(refuse.code(), code);
        assert!(!refuse.reason.is_empty() && refuse.retry_after_ms > 0);
    }
}

#[tokio::test]
async fn an_agent_that_does_not_read_is_let_go_with_a_reason() {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    site.task_sets.push("session.write_stall_ms=1000".into());
    site.task_sets.push("session.missed_heartbeats=60".into());
    site.start_task().await.unwrap();
    site.start_api().await.unwrap();
    let mut wire = connect(&site, ONE).await;
    wire.greet(hello(ONE)).await.unwrap();
    // Far more than the sockets' buffers hold, never read.
    let api = site.api();
    let big = format!("#!/bin/sh\n# {}\n", "x".repeat(8 << 20));
    for _ in 0..3 {
        api.submit(&script_body(&[ONE], "root", &big, 60)).await;
    }
    let why = eventually("the session ends", Duration::from_secs(20), || async {
        let reply = api.post("/gse/v1/agents/list", &json!({})).await;
        let agent = &reply["data"]["agents"][0];
        let why = agent["disconnect_reason"].as_str().unwrap_or_default().to_owned();
        (!why.is_empty()).then_some(why)
    })
    .await;
    assert!(why.contains("does not read"), "{why}");
}

#[tokio::test]
async fn nobody_writes_rows_of_others() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let _agent = site.agent(ONE, "10.1.1.1").await.unwrap();
    let api = site.api();
    let task = api
        .submit(&script_body(&[ONE], "root", "#!/bin/sh\nsleep 2\necho mine\n", 60))
        .await;
    let mut thief = connect(&site, "thief").await;
    thief.greet(hello("thief")).await.unwrap();
    let row = s::Row {
        target: Some(s::TargetRef {
            task_id: task.clone(),
            bucket: 0,
            index: 0,
        }),
        status: s::RowStatus::Succeeded.into(),
        tail: b"forged".as_slice().into(),
        output_len: 6,
        ..Default::default()
    };
    thief.send(row).await.unwrap();
    assert_eq!(thief.recv().await.unwrap(), None, "the forger is shown the door");
    let rows = api.finished(&task, &[ONE], Duration::from_secs(20)).await;
    assert_eq!(rows[0]["screen"], "mine\n");
}

#[tokio::test]
async fn rows_keep_to_the_contract_whatever_an_agent_sends() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let mut wire = connect(&site, ONE).await;
    wire.greet(hello(ONE)).await.unwrap();
    site.wait_state(ONE, 2).await;
    let api = site.api();
    let task = api.submit(&script_body(&[ONE], "root", "#!/bin/sh\ntrue\n", 60)).await;
    let Some(Frame::Dispatch(dispatch)) = wire.recv().await.unwrap() else {
        panic!("not a dispatch")
    };
    assert_eq!((dispatch.user.as_str(), dispatch.asked_id.as_str()), ("root", ONE));
    let target = dispatch.target.clone().unwrap();
    // Output out of step is not taken: the acknowledgement says where to go on.
    let piece = |offset, data: &'static [u8]| s::Output {
        target: Some(target.clone()),
        atomic: 0,
        offset,
        data: data.into(),
    };
    wire.send(piece(0, b"abc")).await.unwrap();
    wire.send(piece(10, b"too far")).await.unwrap();
    wire.send(piece(1, b"bcdef")).await.unwrap();
    let mut offsets = Vec::new();
    for _ in 0..3 {
        let Some(Frame::Stored(stored)) = wire.recv().await.unwrap() else {
            panic!("not acknowledged")
        };
        offsets.push(stored.offset);
    }
    assert_eq!(offsets, [3, 3, 6]);
    // contract: v2-http-task#12-14
    // Success with an exit code, and times that make no sense.
    let row = s::Row {
        target: Some(target.clone()),
        status: s::RowStatus::Succeeded.into(),
        exit_code: 3,
        start_ms: 9,
        end_ms: 1,
        output_len: 9,
        tail_offset: 6,
        tail: b"ghi".as_slice().into(),
        ..Default::default()
    };
    wire.send(row.clone()).await.unwrap();
    let Some(Frame::Stored(stored)) = wire.recv().await.unwrap() else {
        panic!("not acknowledged")
    };
    assert!(stored.terminal);
    let rows = api.finished(&task, &[ONE], Duration::from_secs(5)).await;
    assert_eq!(
        (
            rows[0]["status"].as_i64(),
            rows[0]["script_exit_code"].as_i64(),
            rows[0]["screen"].as_str()
        ),
        (Some(5), Some(3), Some("abcdefghi"))
    );
    // A second, different end changes nothing, and is acknowledged so that the agent may forget it.
    wire.send(s::Row { exit_code: 0, ..row }).await.unwrap();
    let Some(Frame::Stored(stored)) = wire.recv().await.unwrap() else {
        panic!("not acknowledged")
    };
    assert!(stored.terminal);
    assert_eq!(api.rows(&task, &[ONE]).await[0]["script_exit_code"], 3);
}

#[tokio::test]
async fn a_dispatch_that_was_lost_is_sent_again_only_to_the_same_journal() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let api = site.api();
    for (epoch, dispatched) in [(b"epoch", true), (b"other", false)] {
        let mut wire = connect(&site, ONE).await;
        wire.greet(hello(ONE)).await.unwrap();
        site.wait_state(ONE, 2).await;
        let task = api.submit(&script_body(&[ONE], "root", "#!/bin/sh\ntrue\n", 60)).await;
        assert!(matches!(wire.recv().await.unwrap(), Some(Frame::Dispatch(_))));
        // It goes away without a word and comes back without the target.
        drop(wire);
        let mut wire = connect(&site, ONE).await;
        let again = s::Hello {
            journal_epoch: epoch.as_slice().into(),
            ..hello(ONE)
        };
        wire.greet(again).await.unwrap();
        if dispatched {
            assert!(matches!(wire.recv().await.unwrap(), Some(Frame::Dispatch(_))));
            api.terminate(&task, &json!([])).await;
        } else {
            let rows = api.finished(&task, &[ONE], Duration::from_secs(5)).await;
            assert_eq!(
                (rows[0]["error_code"].as_i64(), rows[0]["status"].as_i64()),
                (Some(-1), Some(6))
            );
        }
    }
}
