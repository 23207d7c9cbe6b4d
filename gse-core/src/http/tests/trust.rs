//! Who is let in, over plain HTTP and over mutual TLS.

use super::*;
use crate::authz::GatewayKey;
use crate::certs::{Authority, LEAF_DAYS};
use crate::tls;

fn with(credentials: &str, path: &str, body: &str) -> String {
    format!(
        "{}{body}",
        head(
            "POST",
            path,
            &format!("{credentials}Content-Length: {}\r\n", body.len())
        )
    )
}

#[tokio::test]
async fn strangers_are_refused_before_their_body_is_read() {
    let site = Site::start(quick()).await;
    for (header, reason) in [
        ("", "no credentials"),
        ("X-Bkapi-Authorization: nonsense\r\n", "not a JSON object"),
        (
            "X-Bkapi-Authorization: {\"bk_app_code\":\"bk_job\",\"bk_app_secret\":\"guess\"}\r\n",
            "credentials are wrong",
        ),
        (
            "X-Bkapi-App-Code: bk_job\r\nX-Bkapi-App-Secret: guess\r\n",
            "credentials are wrong",
        ),
        ("X-Bkapi-JWT: a.b.c\r\n", "credentials are wrong"),
        ("x-gse-app: bk_job\r\nx-gse-via: operator\r\n", "no credentials"),
    ] {
        // 500 KB are announced and none is sent: the answer does not wait for them.
        let answer = site
            .send(head("POST", EXECUTE, &format!("{header}Content-Length: 500000\r\n")).as_bytes())
            .await;
        let message = answer.envelope(Code::Unauthenticated, json!({"result": {}}));
        assert!(message.contains(reason), "{header}: {message}");
    }
    let text = site.audit_text();
    assert_eq!(text.lines().count(), 6, "{text}");
    assert!(
        text.contains("\"decision\":\"unauthenticated\"")
            && text.contains("wrong secret")
            && text.contains("script.execute")
    );
    assert_eq!(site.service.finished.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn an_application_does_only_what_its_table_entry_says() {
    let site = Site::start(quick()).await;
    let ask = async |path| site.send(with(&credentials("watcher"), path, "{}").as_bytes()).await;
    ask(STATE).await.envelope(Code::Ok, json!([]));
    let message = ask(EXECUTE).await.envelope(Code::Forbidden, json!({"result": {}}));
    assert!(
        message.contains("watcher") && message.contains("script.execute"),
        "{message}"
    );
    ask(RESULT).await.envelope(Code::Forbidden, json!({"result": []}));
    let text = site.audit_text();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    for line in lines {
        assert_eq!(
            (line["app"].as_str(), line["decision"].as_str(), line["via"].as_str()),
            (Some("watcher"), Some("refused"), Some("secret"))
        );
        assert_eq!(line["request_id"].as_str().unwrap().len(), 32);
    }
}

#[tokio::test]
async fn a_gateway_token_made_here_is_taken() {
    let keys = TempDir::new().unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let file = keys.path().join("gateway.pem");
    std::fs::write(&file, key.public_key_pem()).unwrap();
    let gateway_keys = vec![GatewayKey {
        name: "bk-gse".into(),
        public_key_file: file,
        issuer: Some("APIGW".into()),
    }];
    let site = Site::start_with(
        quick(),
        AuthzConfig {
            apps: apps(),
            gateway_keys,
            ..AuthzConfig::default()
        },
        None,
    )
    .await;
    let token = |exp: u64| {
        let claims = json!({"iss": "APIGW", "exp": exp, "app": {"app_code": "bk_job", "verified": true}, "user": {"username": "admin"}});
        let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
        header.kid = Some("bk-gse".into());
        let key = jsonwebtoken::EncodingKey::from_ec_pem(key.serialize_pem().as_bytes()).unwrap();
        format!(
            "X-Bkapi-JWT: {}\r\n",
            jsonwebtoken::encode(&header, &claims, &key).unwrap()
        )
    };
    let now = jsonwebtoken::get_current_timestamp();
    for _ in 0..2 {
        let answer = site.send(with(&token(now + 60), EXECUTE, "{}").as_bytes()).await;
        let data = answer.json()["data"].clone();
        assert_eq!(
            (data["app"].as_str(), data["via"].as_str()),
            (Some("bk_job"), Some("gateway bk-gse")),
            "{answer:?}"
        );
        assert_eq!(data["user"], "admin");
    }
    site.send(with(&token(now - 600), EXECUTE, "{}").as_bytes())
        .await
        .envelope(Code::Unauthenticated, json!({"result": {}}));
    assert!(site.audit_text().contains("it has expired"));
}

#[tokio::test]
async fn on_internal_listeners_a_server_speaks_for_callers_and_an_agent_for_nobody() {
    let pki = TempDir::new().unwrap();
    let ca = Authority::create(pki.path()).unwrap();
    let files = |role: Role, id: Option<&str>| {
        let files = TlsFiles {
            ca: ca.ca_path(),
            cert: pki.path().join(format!("{role}.crt")),
            key: pki.path().join(format!("{role}.key")),
        };
        if !files.cert.exists() {
            ca.issue(role, id, &[], &files.cert, &files.key, LEAF_DAYS).unwrap();
        }
        files
    };
    let internal = InternalTls {
        files: files(Role::Server, None),
        accept: vec![Role::Server, Role::Operator],
    };
    let authz = AuthzConfig {
        apps: apps(),
        ..AuthzConfig::default()
    };
    let site = Site::start_with(quick(), authz, Some(internal)).await;
    let url = format!("https://{}{EXECUTE}", site.address);
    let client = |role, id| {
        HttpClient::new(&ClientConfig {
            tls: Some(files(role, id)),
            ..ClientConfig::default()
        })
        .unwrap()
    };
    let wait = Duration::from_secs(5);

    let caller = Caller {
        app: "bk_job".into(),
        username: Some("admin".into()),
        via: crate::authz::Via::Secret,
    };
    let mut headers = http::HeaderMap::new();
    caller.assert_into(&mut headers);
    let server = client(Role::Server, None);
    let reply = server
        .post_json(&url, headers.clone(), "{}".into(), wait)
        .await
        .unwrap();
    let value: Value = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(
        (
            value["code"].as_i64(),
            value["data"]["app"].as_str(),
            value["data"]["via"].as_str()
        ),
        (Some(0), Some("bk_job"), Some("server"))
    );
    assert_eq!(value["data"]["user"], "admin");
    // Nobody's server is nobody's application.
    let reply = server
        .post_json(&url, http::HeaderMap::new(), "{}".into(), wait)
        .await
        .unwrap();
    assert_eq!(
        serde_json::from_slice::<Value>(&reply.body).unwrap()["code"],
        Code::Unauthenticated.code()
    );

    let operator = client(Role::Operator, Some("ada"));
    let reply = operator
        .post_json(&url, headers.clone(), "{}".into(), wait)
        .await
        .unwrap();
    let value: Value = serde_json::from_slice(&reply.body).unwrap();
    assert!(
        value["data"]["via"].as_str().unwrap().starts_with("operator "),
        "{value}"
    );
    assert_eq!(
        (value["data"]["app"].as_str(), value["data"]["user"].as_str()),
        (Some("operator"), Some("ada"))
    );

    let agent = client(Role::Agent, Some("a1"));
    assert!(agent.post_json(&url, headers.clone(), "{}".into(), wait).await.is_err());
    let plain = HttpClient::new(&ClientConfig::default()).unwrap();
    assert!(plain.post_json(&url, headers.clone(), "{}".into(), wait).await.is_err());
    assert!(
        plain
            .post_json(&url.replace("https", "http"), headers, "{}".into(), wait)
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_server_brings_as_many_calls_on_one_connection_as_the_listener_takes() {
    let pki = TempDir::new().unwrap();
    let ca = Authority::create(pki.path()).unwrap();
    let files = TlsFiles {
        ca: ca.ca_path(),
        cert: pki.path().join("s.crt"),
        key: pki.path().join("s.key"),
    };
    ca.issue(Role::Server, None, &[], &files.cert, &files.key, LEAF_DAYS)
        .unwrap();
    let internal = InternalTls {
        files: files.clone(),
        accept: vec![Role::Server],
    };
    let authz = AuthzConfig {
        apps: apps(),
        ..AuthzConfig::default()
    };
    let config = HttpConfig {
        request_timeout_ms: 60_000,
        ..quick()
    };
    let site = Site::start_with(config, authz, Some(internal)).await;
    let client = HttpClient::new(&ClientConfig {
        tls: Some(files),
        ..ClientConfig::default()
    })
    .unwrap();
    let url = format!("https://{}{EXECUTE}", site.address);
    let mut headers = http::HeaderMap::new();
    let caller = Caller {
        app: "bk_job".into(),
        username: None,
        via: crate::authz::Via::Secret,
    };
    caller.assert_into(&mut headers);
    let wait = Duration::from_secs(60);
    let first = client.post_json(&url, headers.clone(), "{}".into(), wait).await;
    assert_eq!(first.unwrap().status, 200);
    // More at once than one connection of somebody we do not know may have.
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..400 {
        let (client, url, headers) = (client.clone(), url.clone(), headers.clone());
        let body = "{\"do\":\"sleep\",\"n\":50000}";
        calls.spawn(async move { client.post_json(&url, headers, body.into(), wait).await });
    }
    let all = "gse_http_inflight{listener=\"http\"} 400";
    for _ in 0..200 {
        let text = site.metrics_text();
        if text.contains(all) {
            assert!(text.contains("gse_http_connections{listener=\"http\"} 1"), "{text}");
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{}", site.metrics_text());
}

#[tokio::test]
async fn https_for_platforms_takes_new_certificates_on_reload() {
    let pki = TempDir::new().unwrap();
    let ca = Authority::create(pki.path()).unwrap();
    let (cert, key) = (pki.path().join("s.crt"), pki.path().join("s.key"));
    let names = ["127.0.0.1".to_owned()];
    ca.issue(Role::Server, None, &names, &cert, &key, LEAF_DAYS).unwrap();
    let site = Site::start(HttpConfig {
        cert: Some(cert.clone()),
        key: Some(key.clone()),
        ..quick()
    })
    .await;
    let url = format!("https://{}{STATE}", site.address);
    let ask = async || {
        let client = HttpClient::new(&ClientConfig {
            ca: Some(ca.ca_path()),
            ..ClientConfig::default()
        })
        .unwrap();
        let mut headers = http::HeaderMap::new();
        let value = credentials("bk_job")
            .trim()
            .split_once(": ")
            .unwrap()
            .1
            .parse()
            .unwrap();
        headers.insert("x-bkapi-authorization", value);
        let reply = client
            .post_json(&url, headers, "{}".into(), Duration::from_secs(5))
            .await
            .unwrap();
        serde_json::from_slice::<Value>(&reply.body).unwrap()["code"]
            .as_i64()
            .unwrap()
    };
    assert_eq!(ask().await, 0);
    let shown = async || {
        let tcp = site.connect().await;
        let config = Arc::new(tls::https_client_config(&ca.ca_path()).unwrap());
        let name = rustls_pki_types::ServerName::try_from("127.0.0.1").unwrap();
        let stream = tokio_rustls::TlsConnector::from(config)
            .connect(name, tcp)
            .await
            .unwrap();
        tls::identity_of(stream.get_ref().1).unwrap().fingerprint
    };
    let first = shown().await;
    // A broken file changes nothing.
    let good = std::fs::read(&cert).unwrap();
    std::fs::write(&cert, "nonsense").unwrap();
    site.life.reload();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(shown().await, first);
    std::fs::write(&cert, good).unwrap();
    ca.reissue(Role::Server, None, &names, &cert, &key, LEAF_DAYS).unwrap();
    site.life.reload();
    for _ in 0..100 {
        if shown().await != first {
            assert_eq!(ask().await, 0);
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the new certificate is not used");
}
