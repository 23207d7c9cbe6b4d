//! Whatever is wrong with a request, the answer is an envelope in the shape of its call.

use super::*;

#[tokio::test]
async fn a_good_call_under_every_spelling_and_both_schemes() {
    // contract: v2-http-task#2, v2-http-task#6, v2-http-task#7, v2-http-task#56
    let site = Site::start(quick()).await;
    let plain = format!("X-Bkapi-App-Code: bk_job\r\nX-Bkapi-App-Secret: {SECRET}\r\nX-Bkapi-User-Name: admin\r\n");
    for path in [
        EXECUTE,
        "//api/v2//task/extensions/async_execute_script/",
        "/api/v2/task/async_execute_script",
        "/api/bk-gse/prod/api/v2/task/async_execute_script/?x=1",
    ] {
        for scheme in [credentials("bk_job"), plain.clone()] {
            for tenant in [
                "X-Bk-Tenant-Id: default\r\n",
                "X-Bk-Tenant-Id: system\r\n",
                "X-Bk-Tenant-Id:\r\n",
                "",
            ] {
                let body = "{\"agents\":[],\"atomicTaskNum\":0,\"no_request\":true,\"bk_username\":\"admin\"}";
                let more = format!(
                    "{scheme}{tenant}blueking-language: zh-cn\r\nContent-Length: {}\r\n",
                    body.len()
                );
                let answer = site
                    .send(format!("{}{body}", head("POST", path, &more)).as_bytes())
                    .await;
                let data = answer.json()["data"].clone();
                answer.envelope(Code::Ok, data.clone());
                assert_eq!(data["result"]["task_id"], "t-1");
                assert_eq!(data["app"], "bk_job");
                assert_eq!(data["leaked"], false, "the service sees credentials");
                assert_eq!(
                    data["tenant"].as_str().unwrap(),
                    tenant.trim().split(':').nth(1).unwrap_or("").trim()
                );
            }
        }
    }
    let text = site.metrics_text();
    assert!(text.contains("gse_http_requests_total{listener=\"http\",route=\"/api/v2/task/extensions/async_execute_script\",class=\"ok\"} 32"), "{text}");
}

#[tokio::test]
async fn request_ids_are_echoed_when_sane() {
    let site = Site::start(quick()).await;
    for (sent, echoed) in [
        ("X-Bkapi-Request-Id: abc-1.2_3:4\r\n", true),
        ("X-Request-Id: abc-1.2_3:4\r\n", true),
        ("X-Bkapi-Request-Id: \"><script>\r\nX-Request-Id: abc-1.2_3:4\r\n", true),
        ("X-Request-Id: a b\r\n", false),
        ("X-Request-Id: \r\n", false),
        ("", false),
    ] {
        let more = format!("{}{sent}Content-Length: 2\r\n", credentials("bk_job"));
        let answer = site
            .send(format!("{}{{}}", head("POST", STATE, &more)).as_bytes())
            .await;
        answer.envelope(Code::Ok, json!([]));
        assert_eq!(answer.headers["x-bkapi-request-id"] == "abc-1.2_3:4", echoed, "{sent}");
    }
    let long = format!(
        "{}X-Request-Id: {}\r\nContent-Length: 2\r\n",
        credentials("bk_job"),
        "x".repeat(65)
    );
    let answer = site
        .send(format!("{}{{}}", head("POST", STATE, &long)).as_bytes())
        .await;
    assert_eq!(answer.headers["x-bkapi-request-id"].len(), 32);
}

#[tokio::test]
async fn unknown_paths_and_wrong_methods() {
    let site = Site::start(quick()).await;
    for path in [
        "/",
        "/api/v2/task/async_execute_scripts",
        "/api/v2/task/extensions/async_push_file",
        "/%00%0a",
        "/../etc/passwd",
    ] {
        let shape = if path.ends_with("push_file") {
            json!({"result": {}})
        } else {
            json!({})
        };
        site.post(path, "{}").await.envelope(Code::NoSuchCall, shape);
    }
    for method in ["GET", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"] {
        let answer = site.send(head(method, STATE, &credentials("bk_job")).as_bytes()).await;
        answer.envelope(Code::Method, json!([]));
    }
    // An answer to HEAD has no body by definition; the rest is the same.
    let mut stream = site.connect().await;
    stream
        .write_all(head("HEAD", STATE, "Connection: close\r\n").as_bytes())
        .await
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(
        text.starts_with("HTTP/1.1 200") && text.contains("application/json") && text.ends_with("\r\n\r\n"),
        "{text}"
    );
    // Old names take GET with a body.
    let body = "{\"hosts\":[]}";
    let more = format!("{}Content-Length: {}\r\n", credentials("bk_job"), body.len());
    let answer = site
        .send(format!("{}{body}", head("GET", V1_STATUS, &more)).as_bytes())
        .await;
    assert_eq!(answer.json()["code"], 0);
    site.send(head("GET", V1_STATUS, &credentials("bk_job")).as_bytes())
        .await
        .json()["data"]["result"]
        .as_object()
        .unwrap();
}

#[tokio::test]
async fn nobody_is_told_that_a_tunnel_is_open() {
    let site = Site::start(quick()).await;
    for target in ["example.com:443", STATE] {
        let mut stream = site.connect().await;
        stream
            .write_all(head("CONNECT", target, &credentials("bk_job")).as_bytes())
            .await
            .unwrap();
        let answer = read_answer(&mut stream).await;
        assert_eq!((answer.status, answer.headers["allow"].as_str()), (405, "POST"));
        let value = answer.json();
        assert_eq!(
            (&value["code"], &value["result"]),
            (&json!(Code::Method.code()), &json!(false))
        );
        assert!(!value["data"].is_null());
        closed_after(&mut stream).await;
    }
}

#[tokio::test]
async fn bodies_that_are_not_what_they_should_be() {
    let site = Site::start(quick()).await;
    let empty = || json!({"result": {}});
    for body in [
        "{",
        "nonsense",
        "[]",
        "null",
        "{\"do\":7}",
        "{} {}",
        "\u{0}",
        "{\"do\":\"\\ud800\"}",
    ] {
        site.post(EXECUTE, body).await.envelope(Code::Arguments, empty());
    }
    let message = site
        .post(EXECUTE, "{\"do\":\"sleep\",\"n\":-1}")
        .await
        .envelope(Code::Arguments, empty());
    assert!(
        message.contains("at n") && message.contains("expected u64"),
        "{message}"
    );
    let mut binary = post(EXECUTE, "xxxx");
    let end = binary.len();
    binary[end - 4..].copy_from_slice(&[0xff, 0xfe, 0x00, 0x80]);
    site.send(&binary).await.envelope(Code::Arguments, empty());
    for depth in [100, 100_000] {
        let nest = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        site.post(RESULT, &nest)
            .await
            .envelope(Code::Arguments, json!({"result": []}));
        site.post(EXECUTE, &format!("{{\"do\":{nest}}}"))
            .await
            .envelope(Code::Arguments, empty());
        site.post(EXECUTE, &format!("{}{{", "{\"do\":".repeat(depth)))
            .await
            .envelope(Code::Arguments, empty());
    }
    // The process is well after all that.
    site.post(STATE, "").await.envelope(Code::Ok, json!([]));
}

#[tokio::test]
async fn handlers_that_panic_fail_or_take_too_long() {
    let site = Site::start(quick()).await;
    site.post(EXECUTE, "{\"do\":\"panic\"}")
        .await
        .envelope(Code::System, json!({"result": {}}));
    site.post(STATE, "{\"do\":\"panic\"}")
        .await
        .envelope(Code::System, json!([]));
    let message = site
        .post(RESULT, "{\"do\":\"sleep\",\"n\":60000}")
        .await
        .envelope(Code::Timeout, json!({"result": []}));
    assert!(message.contains("2s"), "{message}");
    site.post(EXECUTE, "{\"do\":\"fail\"}")
        .await
        .envelope(Code::NoSuchTask, json!({"result": {"task_id": "t"}}));
    assert!(
        site.life.failure().is_none(),
        "a panic in a handler does not stop the server"
    );
    let text = site.metrics_text();
    assert!(
        text.contains("class=\"failed\"} 1") && text.contains("class=\"caller\"} 1"),
        "{text}"
    );
    assert!(text.contains("gse_http_inflight{listener=\"http\"} 0"), "{text}");
}

#[tokio::test]
async fn a_call_goes_on_when_its_caller_has_gone() {
    let site = Site::start(quick()).await;
    let mut stream = site.connect().await;
    stream
        .write_all(&post(EXECUTE, "{\"do\":\"sleep\",\"n\":300}"))
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(stream);
    for _ in 0..100 {
        if site.service.finished.load(Ordering::SeqCst) == 1 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the call was cancelled half-way");
}

#[tokio::test]
async fn what_is_not_http_is_not_answered_with_an_envelope_but_answered() {
    let site = Site::start(quick()).await;
    let mut stream = site.connect().await;
    stream.write_all(b"NONSENSE\r\n\r\n").await.unwrap();
    assert_eq!(read_answer(&mut stream).await.status, 400);
    for long in [
        head("POST", STATE, &format!("X-Long: {}\r\n", "x".repeat(100_000))),
        head("POST", &format!("{STATE}?{}", "x".repeat(100_000)), ""),
        head("POST", STATE, &"X-Many: x\r\n".repeat(101)),
    ] {
        let mut stream = site.connect().await;
        // The server stops reading and says so; the rest may not be taken any more.
        drop(stream.write_all(long.as_bytes()).await);
        assert_eq!(read_answer(&mut stream).await.status, 431);
    }
}
