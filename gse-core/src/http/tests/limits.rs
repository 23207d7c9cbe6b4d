//! Limits of size, time and number, and the drain.

use super::*;

#[tokio::test]
async fn bodies_that_are_too_large() {
    let site = Site::start(quick()).await;
    let large = "x".repeat(MIB + 1);
    // Announced: refused by its length, and the answer is readable although all of the body is sent first.
    site.post(EXECUTE, &large)
        .await
        .envelope(Code::BodyTooLarge, json!({"result": {}}));
    // Not announced: refused when it has become too large.
    let mut stream = site.connect().await;
    let more = format!("{}Transfer-Encoding: chunked\r\n", credentials("bk_job"));
    stream.write_all(head("POST", RESULT, &more).as_bytes()).await.unwrap();
    for _ in 0..40 {
        stream
            .write_all(format!("{:x}\r\n{}\r\n", 65_536, "y".repeat(65_536)).as_bytes())
            .await
            .unwrap();
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    let answer = read_answer(&mut stream).await;
    answer.envelope(Code::BodyTooLarge, json!({"result": []}));
    assert_eq!(answer.headers["connection"], "close");
    // A length nobody has; the first is not even a length to the HTTP library.
    let more = format!(
        "{}Content-Length: 18446744073709551615\r\nExpect: 100-continue\r\n",
        credentials("bk_job")
    );
    assert_eq!(site.send(head("POST", STATE, &more).as_bytes()).await.status, 431);
    let more = format!(
        "{}Content-Length: 1000000000000000\r\nExpect: 100-continue\r\n",
        credentials("bk_job")
    );
    site.send(head("POST", STATE, &more).as_bytes())
        .await
        .envelope(Code::BodyTooLarge, json!([]));
    // A caller that asks first is told before it sends anything.
    let more = format!(
        "{}Content-Length: {}\r\nExpect: 100-continue\r\n",
        credentials("bk_job"),
        large.len()
    );
    site.send(head("POST", STATE, &more).as_bytes())
        .await
        .envelope(Code::BodyTooLarge, json!([]));
    assert!(
        site.metrics_text()
            .contains("gse_http_bodies_refused_total{listener=\"http\",reason=\"too_large\"}")
    );
    // One that just fits.
    let fits = format!("{{\"x\":\"{}\"}}", "z".repeat(MIB - 8));
    assert_eq!(fits.len(), MIB);
    site.post(STATE, &fits).await.envelope(Code::Ok, json!([]));
}

#[tokio::test]
async fn bodies_that_stop_half_way() {
    let site = Site::start(quick()).await;
    let more = format!("{}Content-Length: 1000\r\n", credentials("bk_job"));
    // Cut off: the caller has closed its side and still reads.
    let mut stream = site.connect().await;
    stream
        .write_all(format!("{}{{\"do\":", head("POST", EXECUTE, &more)).as_bytes())
        .await
        .unwrap();
    stream.shutdown().await.unwrap();
    read_answer(&mut stream)
        .await
        .envelope(Code::Arguments, json!({"result": {}}));
    // Slow: a byte now and then.
    let mut stream = site.connect().await;
    stream.write_all(head("POST", EXECUTE, &more).as_bytes()).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    let drip = tokio::spawn(async move {
        while write.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let message = read_answer(&mut read)
        .await
        .envelope(Code::Timeout, json!({"result": {}}));
    assert!(message.contains("1s"), "{message}");
    drop(read);
    drip.abort();
}

#[tokio::test]
async fn connections_that_get_nowhere_are_dropped() {
    let site = Site::start(quick()).await;
    for start in [
        "",
        "P",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "POST /api HTTP/1.1\r\nHost: x\r\n",
    ] {
        let mut stream = site.connect().await;
        stream.write_all(start.as_bytes()).await.unwrap();
        let started = std::time::Instant::now();
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "{start:?} holds its connection");
        assert!(
            started.elapsed() < Duration::from_secs(4),
            "{start:?}: {:?}",
            started.elapsed()
        );
    }
    // A head that arrives a byte at a time.
    let mut stream = site.connect().await;
    let started = std::time::Instant::now();
    for byte in head("POST", STATE, &"X-A: b\r\n".repeat(1_000)).bytes() {
        if stream.write_all(&[byte]).await.is_err() {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(5), "slow heads are not cut off");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Idle after a request: kept for a while, then closed.
    let mut stream = site.connect().await;
    for _ in 0..3 {
        stream.write_all(&post(STATE, "{}")).await.unwrap();
        read_answer(&mut stream).await.envelope(Code::Ok, json!([]));
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    let idle = closed_after(&mut stream).await;
    assert!(
        idle > Duration::from_millis(500) && idle < Duration::from_secs(6),
        "{idle:?}"
    );
}

#[tokio::test]
async fn a_caller_that_does_not_read_its_answer_is_dropped() {
    let site = Site::start(quick()).await;
    let mut stream = site.connect().await;
    stream
        .write_all(&post(EXECUTE, "{\"do\":\"large\",\"n\":67108864}"))
        .await
        .unwrap();
    for _ in 0..150 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        if site
            .metrics_text()
            .contains("gse_http_connections{listener=\"http\"} 0")
        {
            return;
        }
    }
    panic!("the connection is still there");
}

#[tokio::test]
async fn data_of_an_answer_is_held_until_it_has_gone_out_or_its_caller_has_gone() {
    let site = Site::start(quick()).await;
    let owed = async |expected: usize| {
        for _ in 0..100 {
            if site.service.owed.load(Ordering::SeqCst) == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("{} are held", site.service.owed.load(Ordering::SeqCst));
    };
    let request = post(EXECUTE, "{\"do\":\"large\",\"n\":33554432}");
    let (mut reads, mut goes) = (site.connect().await, site.connect().await);
    for stream in [&mut reads, &mut goes] {
        stream.write_all(&request).await.unwrap();
        // The head of the answer is there, so the call itself has ended.
        stream.readable().await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    owed(2).await;
    drop(goes);
    owed(1).await;
    let answer = read_answer(&mut reads).await;
    assert_eq!(answer.json()["data"].as_array().unwrap().len(), 33_554_432 / 2 + 1);
    owed(0).await;
}

#[tokio::test]
async fn too_many_requests_and_too_many_bytes() {
    let site = Site::start(HttpConfig {
        max_inflight_requests: 2,
        max_inflight_body_bytes: MIB,
        ..quick()
    })
    .await;
    let mut busy = Vec::new();
    for _ in 0..2 {
        let mut stream = site.connect().await;
        stream
            .write_all(&post(EXECUTE, "{\"do\":\"sleep\",\"n\":500}"))
            .await
            .unwrap();
        busy.push(stream);
    }
    tokio::time::sleep(Duration::from_millis(150)).await;
    site.post(RESULT, "{}")
        .await
        .envelope(Code::Limit, json!({"result": []}));
    for stream in &mut busy {
        assert_eq!(read_answer(stream).await.json()["code"], 0);
    }
    site.post(STATE, "{}").await.envelope(Code::Ok, json!([]));

    // A body of 700 KiB is being held by its call, so another does not fit.
    let large = format!("{{\"do\":\"sleep\",\"n\":500,\"x\":\"{}\"}}", "z".repeat(700 * 1024));
    let mut first = site.connect().await;
    first.write_all(&post(EXECUTE, &large)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let message = site
        .post(EXECUTE, &large)
        .await
        .envelope(Code::Limit, json!({"result": {}}));
    assert!(message.contains("large bodies"), "{message}");
    site.post(STATE, "{}").await.envelope(Code::Ok, json!([]));
    assert_eq!(read_answer(&mut first).await.json()["code"], 0);
    assert_eq!(
        site.post(EXECUTE, &large).await.json()["code"],
        0,
        "the budget comes back"
    );
}

#[tokio::test]
async fn too_many_connections_are_told_so() {
    let site = Site::start(HttpConfig {
        max_connections: 2,
        header_timeout_ms: 4_000,
        idle_timeout_ms: 5_000,
        ..quick()
    })
    .await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = site.connect().await;
        stream.write_all(&post(STATE, "{}")).await.unwrap();
        read_answer(&mut stream).await.envelope(Code::Ok, json!([]));
        held.push(stream);
    }
    let answer = site.post(EXECUTE, "{}").await;
    answer.envelope(Code::Limit, json!({"result": {}}));
    assert_eq!(answer.headers["connection"], "close");
    // Beyond the few more that get an answer, connections are closed.
    let mut more = Vec::new();
    for _ in 0..20 {
        more.push(site.connect().await);
    }
    let mut last = more.pop().unwrap();
    assert!(closed_after(&mut last).await < Duration::from_millis(1_000));
    drop((held, more));
    tokio::time::sleep(Duration::from_millis(200)).await;
    site.post(STATE, "{}").await.envelope(Code::Ok, json!([]));
}

// contract: reliability#S9
#[tokio::test]
async fn idle_strangers_keep_nobody_out() {
    let site = Site::start(HttpConfig {
        max_connections: 8,
        max_strangers_per_address: 6,
        header_timeout_ms: 8_000,
        idle_timeout_ms: 9_000,
        ..quick()
    })
    .await;
    let from = async |last: u8| {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 7, last], 0).into()).unwrap();
        socket.connect(site.address).await.unwrap()
    };
    let call = async |mut stream: TcpStream| {
        stream.write_all(&post(STATE, "{}")).await.unwrap();
        let answer = read_answer(&mut stream).await;
        (stream, answer)
    };
    // One address has its places, and no more.
    let mut idle = Vec::new();
    for _ in 0..6 {
        idle.push(from(1).await);
    }
    call(from(1).await).await.1.envelope(Code::Limit, json!([]));
    // Another is served, and so it stays: it is no stranger any more.
    let (friend, answer) = call(from(2).await).await;
    answer.envelope(Code::Ok, json!([]));
    idle.push(from(3).await);
    // Everything is taken, but those that do nothing make room once they had their time.
    call(from(4).await).await.1.envelope(Code::Limit, json!([]));
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    let mut friends = vec![friend];
    for _ in 0..3 {
        let (stream, answer) = call(from(4).await).await;
        answer.envelope(Code::Ok, json!([]));
        friends.push(stream);
    }
    for stream in &mut idle[..3] {
        assert!(closed_after(stream).await < Duration::from_millis(500));
    }
    for stream in friends {
        call(stream).await.1.envelope(Code::Ok, json!([]));
    }
}

#[tokio::test]
async fn a_drain_finishes_what_is_under_way_and_takes_nothing_new() {
    let site = Site::start(quick()).await;
    let mut idle = site.connect().await;
    idle.write_all(&post(STATE, "{}")).await.unwrap();
    read_answer(&mut idle).await.envelope(Code::Ok, json!([]));
    let mut busy = site.connect().await;
    busy.write_all(&post(EXECUTE, "{\"do\":\"sleep\",\"n\":400}"))
        .await
        .unwrap();
    // Its head is not complete when the drain begins.
    let mut late = site.connect().await;
    let request = post(EXECUTE, "{}");
    late.write_all(&request[..40]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(150)).await;

    site.life.drain();
    assert!(
        closed_after(&mut idle).await < Duration::from_millis(1_000),
        "idle connections are closed at once"
    );
    late.write_all(&request[40..]).await.unwrap();
    read_answer(&mut late)
        .await
        .envelope(Code::Draining, json!({"result": {}}));
    let answer = read_answer(&mut busy).await;
    assert_eq!(answer.json()["code"], 0, "what was under way is answered");
    closed_after(&mut busy).await;
    assert!(TcpStream::connect(site.address).await.is_err(), "the port is closed");
    assert!(
        site.life.finished(Duration::from_secs(5)).await,
        "{:?}",
        site.life.running()
    );
}

#[tokio::test]
async fn streamed_bodies_have_limits_too() {
    let site = Site::start(quick()).await;
    let body = "x".repeat(900 * 1024);
    let answer = site.post(TRANSFER, &body).await;
    assert_eq!(answer.json()["streamed"], body.len());
    assert!(answer.headers.contains_key("x-bkapi-request-id"));
    site.post(TRANSFER, &"x".repeat(MIB + 1))
        .await
        .envelope(Code::BodyTooLarge, json!({"result": {}}));
    let mut stream = site.connect().await;
    let more = format!("{}Content-Length: 1000\r\n", credentials("bk_job"));
    stream
        .write_all(head("POST", TRANSFER, &more).as_bytes())
        .await
        .unwrap();
    let message = read_answer(&mut stream)
        .await
        .envelope(Code::Arguments, json!({"result": {}}));
    assert!(message.contains("did not arrive"), "{message}");
}
