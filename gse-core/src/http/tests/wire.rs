//! Keep-alive, HTTP/2, and our own client.

use std::collections::HashSet;

use http_body_util::BodyExt;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::net::TcpListener;

use super::*;

fn authorized() -> http::HeaderMap {
    let mut headers = http::HeaderMap::new();
    let value = credentials("bk_job")
        .trim()
        .split_once(": ")
        .unwrap()
        .1
        .parse()
        .unwrap();
    headers.insert("x-bkapi-authorization", value);
    headers
}

fn request(url: &str, body: impl Into<Bytes>) -> http::Request<RawBody> {
    let mut request = http::Request::post(url).body(full(body)).unwrap();
    *request.headers_mut() = authorized();
    request
}

#[tokio::test]
async fn one_connection_serves_many_requests_and_errors_do_not_end_it() {
    let site = Site::start(quick()).await;
    let mut stream = site.connect().await;
    for (path, body, code) in [
        (STATE, "{}", Code::Ok),
        (STATE, "nonsense", Code::Arguments),
        ("/nowhere", "{\"some\":\"body\"}", Code::NoSuchCall),
        (EXECUTE, "{\"do\":\"panic\"}", Code::System),
        (STATE, "{}", Code::Ok),
    ] {
        stream.write_all(&post(path, body)).await.unwrap();
        let answer = read_answer(&mut stream).await;
        assert_eq!(answer.json()["code"], code.code(), "{path} {body}");
        assert!(!answer.headers.contains_key("connection"), "{answer:?}");
    }
    // Pipelined.
    stream
        .write_all(&[post(STATE, "{}"), post(EXECUTE, "{}")].concat())
        .await
        .unwrap();
    read_answer(&mut stream).await.envelope(Code::Ok, json!([]));
    assert_eq!(
        read_answer(&mut stream).await.json()["data"]["result"]["task_id"],
        "t-1"
    );
}

#[tokio::test]
async fn http_2_with_many_calls_at_once() {
    let site = Site::start(quick()).await;
    let client: Client<_, RawBody> = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let url = |path: &str| format!("http://{}{path}", site.address);
    let calls: Vec<_> = (0..100)
        .map(|number| {
            let (client, url) = (client.clone(), url(if number % 2 == 0 { STATE } else { EXECUTE }));
            tokio::spawn(async move {
                let response = client
                    .request(request(&url, "{\"do\":\"sleep\",\"n\":50}"))
                    .await
                    .unwrap();
                assert_eq!(
                    (response.status().as_u16(), response.version()),
                    (200, http::Version::HTTP_2)
                );
                let id = response.headers()["x-bkapi-request-id"].to_str().unwrap().to_owned();
                let body = response.into_body().collect().await.unwrap().to_bytes();
                let value: Value = serde_json::from_slice(&body).unwrap();
                assert_eq!(value["code"], 0);
                id
            })
        })
        .collect();
    let mut ids = HashSet::new();
    for call in calls {
        ids.insert(call.await.unwrap());
    }
    assert_eq!(ids.len(), 100, "every request has an id of its own");
    // Failures come as envelopes here, too.
    let large = client
        .request(request(&url(RESULT), "x".repeat(MIB + 1)))
        .await
        .unwrap();
    let body = large.into_body().collect().await.unwrap().to_bytes();
    let value: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(
        (value["code"].as_i64(), &value["data"]),
        (Some(Code::BodyTooLarge.code()), &json!({"result": []}))
    );
    // A drain ends the connection once its calls are done.
    let last = tokio::spawn(client.request(request(&url(EXECUTE), "{\"do\":\"sleep\",\"n\":300}")));
    tokio::time::sleep(Duration::from_millis(100)).await;
    site.life.drain();
    let body = last
        .await
        .unwrap()
        .unwrap()
        .into_body()
        .collect()
        .await
        .unwrap()
        .to_bytes();
    assert_eq!(serde_json::from_slice::<Value>(&body).unwrap()["code"], 0);
    assert!(
        site.life.finished(Duration::from_secs(5)).await,
        "{:?}",
        site.life.running()
    );
}

#[tokio::test]
async fn a_large_answer_arrives_whole() {
    let site = Site::start(quick()).await;
    let client = HttpClient::new(&ClientConfig::default()).unwrap();
    let url = format!("http://{}{EXECUTE}", site.address);
    let reply = client
        .post_json(
            &url,
            authorized(),
            "{\"do\":\"large\",\"n\":20971520}".into(),
            Duration::from_secs(20),
        )
        .await
        .unwrap();
    let value: Value = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(value["data"].as_array().unwrap().len(), 20_971_520 / 2 + 1);
}

#[tokio::test]
async fn the_client_says_whether_a_request_can_have_been_sent() {
    let client = HttpClient::new(&ClientConfig {
        max_response_bytes: 1_000,
        ..ClientConfig::default()
    })
    .unwrap();
    let wait = Duration::from_millis(400);
    let ask = async |url: &str| {
        client
            .post_json(url, http::HeaderMap::new(), "{}".into(), wait)
            .await
            .unwrap_err()
    };

    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let error = ask(&format!("http://{address}/secret-path?token=x")).await;
    assert!(
        error.not_sent() && matches!(error, ClientError::Connect { .. }),
        "{error}"
    );
    assert!(
        error.to_string().contains(&address.to_string()) && !error.to_string().contains("token"),
        "{error}"
    );
    assert!(ask("not a url").await.not_sent());

    let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let error = ask(&format!("http://{}/", mute.local_addr().unwrap())).await;
    assert!(
        !error.not_sent() && matches!(error, ClientError::Timeout { .. }),
        "{error}"
    );

    // It takes the connection and nothing else, not even its part of the TLS handshake: nothing of the request has gone out.
    let impatient = HttpClient::new(&ClientConfig {
        connect_timeout_ms: 200,
        ..ClientConfig::default()
    })
    .unwrap();
    let url = format!("https://{}/", mute.local_addr().unwrap());
    let error = impatient
        .post_json(&url, http::HeaderMap::new(), "{}".into(), Duration::from_secs(10))
        .await
        .unwrap_err();
    assert!(
        error.not_sent() && error.to_string().contains("no connection within 200ms"),
        "{error}"
    );

    let site = Site::start(quick()).await;
    let url = format!("http://{}{EXECUTE}", site.address);
    let error = client
        .post_json(&url, authorized(), "{\"do\":\"large\",\"n\":5000}".into(), wait)
        .await
        .unwrap_err();
    assert!(matches!(error, ClientError::TooLarge { .. }), "{error}");
}

/// Answers the first request of a connection and closes the connection on the second, as a server does that dies.
#[tokio::test]
async fn the_client_never_sends_a_request_twice() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&seen);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let counted = Arc::clone(&counted);
            tokio::spawn(async move {
                let mut buffer = vec![0; 4_096];
                for number in 0.. {
                    let Ok(1..) = stream.read(&mut buffer).await else {
                        return;
                    };
                    counted.fetch_add(1, Ordering::SeqCst);
                    if number > 0 {
                        return;
                    }
                    stream
                        .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                        .await
                        .unwrap();
                }
            });
        }
    });
    let client = HttpClient::new(&ClientConfig::default()).unwrap();
    let url = format!("http://{address}/");
    let send = async || {
        client
            .post_json(&url, http::HeaderMap::new(), "{}".into(), Duration::from_secs(5))
            .await
    };
    send().await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let error = send().await.unwrap_err();
    assert!(
        !error.not_sent() && matches!(error, ClientError::Failed { .. }),
        "{error}"
    );
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(seen.load(Ordering::SeqCst), 2, "the failed request was sent again");
    send().await.unwrap();
}

#[tokio::test]
async fn the_client_streams_both_ways() {
    let site = Site::start(quick()).await;
    let client = HttpClient::new(&ClientConfig::default()).unwrap();
    let url = format!("http://{}{TRANSFER}", site.address);
    let response = client
        .request(request(&url, "y".repeat(300_000)), Duration::from_secs(5))
        .await
        .unwrap();
    let body = forward(response.into_body()).collect().await.unwrap().to_bytes();
    assert_eq!(serde_json::from_slice::<Value>(&body).unwrap()["streamed"], 300_000);
}
