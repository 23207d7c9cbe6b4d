//! Who a request comes from, by secret, address and certificate.

mod policy;
mod table;
mod tokens;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::HeaderMap;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::*;
use crate::tls::{PeerIdentity, Role};

const SOMEWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7));

fn app(code: &str, secret: &str) -> AppEntry {
    AppEntry {
        code: code.into(),
        secret_sha256: Some(hex::encode(Sha256::digest(secret))),
        operations: vec!["*".into()],
        accounts: vec!["*".into()],
        targets: vec!["*".into()],
        ..AppEntry::default()
    }
}

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    pairs
        .iter()
        .map(|(name, value)| {
            (
                name.parse::<HeaderName>().unwrap(),
                HeaderValue::from_bytes(value.as_bytes()).unwrap(),
            )
        })
        .fold(HeaderMap::new(), |mut map, (name, value)| {
            map.append(name, value);
            map
        })
}

fn authorization(code: &str, secret: &str) -> HeaderMap {
    headers(&[(
        "X-Bkapi-Authorization",
        &json!({"bk_app_code": code, "bk_app_secret": secret}).to_string(),
    )])
}

fn peer(role: Role, id: Option<&str>) -> PeerIdentity {
    PeerIdentity {
        role,
        id: id.map(str::to_owned),
        fingerprint: "ab".repeat(32),
    }
}

fn two_apps() -> Authenticator {
    let apps = vec![
        app("bk_job", "s3cret"),
        AppEntry {
            disabled: true,
            ..app("old", "s3cret")
        },
    ];
    Authenticator::new(&AuthzConfig {
        apps,
        ..AuthzConfig::default()
    })
    .unwrap()
}

#[test]
fn the_default_lets_nobody_in() {
    let auth = Authenticator::new(&AuthzConfig::default()).unwrap();
    assert_eq!(
        auth.authenticate(&HeaderMap::new(), SOMEWHERE, None),
        Err(AuthError::Missing)
    );
    assert!(auth.authenticate(&authorization("", ""), SOMEWHERE, None).is_err());
    assert!(
        auth.authenticate(&authorization("bk_job", "x"), SOMEWHERE, None)
            .is_err()
    );
    assert!(
        auth.authenticate(&HeaderMap::new(), IpAddr::V4(Ipv4Addr::LOCALHOST), None)
            .is_err()
    );
}

#[test]
fn a_secret_names_its_application_in_both_spellings() {
    // contract: v2-http-task#7
    let auth = two_apps();
    let caller = auth
        .authenticate(&authorization("bk_job", "s3cret"), SOMEWHERE, None)
        .unwrap();
    assert_eq!(
        (caller.app.as_str(), &caller.username, &caller.via),
        ("bk_job", &None, &Via::Secret)
    );
    let with_user =
        json!({"bk_app_code":"bk_job","bk_app_secret":"s3cret","bk_username":"admin","bk_ticket":"ignored"});
    let caller = auth
        .authenticate(
            &headers(&[("x-bkapi-authorization", &with_user.to_string())]),
            SOMEWHERE,
            None,
        )
        .unwrap();
    assert_eq!(caller.username.as_deref(), Some("admin"));
    let plain = headers(&[
        ("X-Bkapi-App-Code", "bk_job"),
        ("X-Bkapi-App-Secret", "s3cret"),
        ("X-Bkapi-User-Name", "系统"),
    ]);
    assert_eq!(
        auth.authenticate(&plain, SOMEWHERE, None).unwrap().username.as_deref(),
        Some("系统")
    );
}

#[test]
fn the_caller_is_not_told_which_part_was_wrong() {
    let auth = two_apps();
    let mut said = Vec::new();
    for (code, secret, reason) in [
        ("bk_job", "an0ther", "wrong secret"),
        ("nobody", "s3cret", "unknown application"),
        ("old", "s3cret", "the application is disabled"),
    ] {
        let error = auth
            .authenticate(&authorization(code, secret), SOMEWHERE, None)
            .unwrap_err();
        assert_eq!(error.detail(), reason);
        assert_eq!(error.claimed_app(), Some(code));
        assert!(!format!("{error} {error:?}").contains(secret));
        said.push(error.to_string());
    }
    assert!(said.windows(2).all(|pair| pair[0] == pair[1]), "{said:?}");
}

#[test]
fn malformed_and_doubled_headers_are_refused() {
    let auth = two_apps();
    let good = json!({"bk_app_code":"bk_job","bk_app_secret":"s3cret"}).to_string();
    for bad in [
        "",
        "nonsense",
        "[]",
        "{",
        r#"{"bk_app_code":1,"bk_app_secret":"s3cret"}"#,
    ] {
        let error = auth
            .authenticate(&headers(&[("x-bkapi-authorization", bad)]), SOMEWHERE, None)
            .unwrap_err();
        assert!(matches!(error, AuthError::Malformed { .. }), "{bad}: {error:?}");
    }
    let doubled = headers(&[("x-bkapi-authorization", &good), ("x-bkapi-authorization", &good)]);
    assert!(matches!(
        auth.authenticate(&doubled, SOMEWHERE, None),
        Err(AuthError::Malformed { .. })
    ));
    let empty_secret = headers(&[(
        "x-bkapi-authorization",
        r#"{"bk_app_code":"bk_job","bk_app_secret":""}"#,
    )]);
    assert_eq!(
        auth.authenticate(&empty_secret, SOMEWHERE, None).unwrap_err().detail(),
        "no secret was sent"
    );
}

#[test]
fn an_application_without_a_secret_cannot_come_by_secret() {
    let apps = vec![AppEntry {
        secret_sha256: None,
        ..app("bk_job", "")
    }];
    let auth = Authenticator::new(&AuthzConfig {
        apps,
        ..AuthzConfig::default()
    })
    .unwrap();
    for secret in ["", "x", "0"] {
        assert!(
            auth.authenticate(&authorization("bk_job", secret), SOMEWHERE, None)
                .is_err()
        );
    }
}

#[test]
fn a_network_stands_for_its_application() {
    let network = |cidr: &str, app: &str| TrustedNetwork {
        cidr: cidr.parse().unwrap(),
        app: app.into(),
    };
    let config = AuthzConfig {
        apps: vec![app("wide", "a"), app("narrow", "b")],
        trusted_networks: vec![
            network("10.0.0.0/8", "wide"),
            network("10.1.2.0/24", "narrow"),
            network("fd00::/8", "wide"),
        ],
        ..AuthzConfig::default()
    };
    let auth = Authenticator::new(&config).unwrap();
    let ask = |address: &str, headers: &HeaderMap, peer: Option<&PeerIdentity>| {
        auth.authenticate(headers, address.parse().unwrap(), peer)
            .map(|caller| caller.app)
    };
    let none = HeaderMap::new();
    assert_eq!(ask("10.9.9.9", &none, None).unwrap(), "wide");
    assert_eq!(ask("10.1.2.3", &none, None).unwrap(), "narrow");
    assert_eq!(ask("::ffff:10.1.2.3", &none, None).unwrap(), "narrow");
    assert_eq!(ask("fd00::1", &none, None).unwrap(), "wide");
    assert!(ask("11.0.0.1", &none, None).is_err());
    assert!(ask(&Ipv6Addr::LOCALHOST.to_string(), &none, None).is_err());
    // Wrong credentials are not forgiven for the address, and behind one of our servers the address says nothing.
    assert!(ask("10.9.9.9", &authorization("wide", "wrong"), None).is_err());
    assert!(ask("10.9.9.9", &none, Some(&peer(Role::Server, None))).is_err());
    let user_only = headers(&[("x-bkapi-authorization", r#"{"bk_username":"admin"}"#)]);
    let caller = auth.authenticate(&user_only, "10.9.9.9".parse().unwrap(), None);
    assert_eq!(caller.unwrap().app, "wide");
}

#[test]
fn only_our_servers_may_vouch_for_a_caller() {
    let auth = two_apps();
    let mut vouched = authorization("evil", "x");
    let caller = Caller {
        app: "bk_job".into(),
        username: Some("管理员".into()),
        via: Via::Secret,
    };
    caller.assert_into(&mut vouched);
    assert!(
        !vouched.contains_key("x-bkapi-authorization"),
        "credentials are not passed on"
    );
    let seen = auth
        .authenticate(&vouched, SOMEWHERE, Some(&peer(Role::Server, None)))
        .unwrap();
    assert_eq!(
        (seen.app.as_str(), seen.username.as_deref(), &seen.via),
        ("bk_job", Some("管理员"), &Via::Server)
    );
    for other in [
        None,
        Some(peer(Role::ApiClient, None)),
        Some(peer(Role::Agent, Some("a"))),
    ] {
        assert!(
            auth.authenticate(&vouched, SOMEWHERE, other.as_ref()).is_err(),
            "{other:?}"
        );
    }
    // Here, too, the application has to exist and be enabled.
    for code in ["old", "nobody", OPERATOR_APP] {
        let mut vouched = HeaderMap::new();
        Caller {
            app: code.into(),
            username: None,
            via: Via::Secret,
        }
        .assert_into(&mut vouched);
        assert!(
            auth.authenticate(&vouched, SOMEWHERE, Some(&peer(Role::Server, None)))
                .is_err(),
            "{code}"
        );
    }
}

#[test]
fn certificates_of_people_and_platforms() {
    let auth = two_apps();
    let operator = auth
        .authenticate(&HeaderMap::new(), SOMEWHERE, Some(&peer(Role::Operator, Some("ada"))))
        .unwrap();
    assert!(operator.is_operator());
    assert_eq!(
        (operator.app.as_str(), operator.username.as_deref()),
        (OPERATOR_APP, Some("ada"))
    );
    // An operator stays one when a server passes the call on; an application cannot become one that way.
    let mut vouched = headers(&[("x-gse-via", "operator")]);
    Caller {
        app: "bk_job".into(),
        username: None,
        via: Via::Secret,
    }
    .assert_into(&mut vouched);
    assert!(
        !auth
            .authenticate(&vouched, SOMEWHERE, Some(&peer(Role::Server, None)))
            .unwrap()
            .is_operator()
    );
    operator.assert_into(&mut vouched);
    assert!(
        auth.authenticate(&vouched, SOMEWHERE, Some(&peer(Role::Server, None)))
            .unwrap()
            .is_operator()
    );

    let platform = peer(Role::ApiClient, Some("bk_job"));
    let caller = auth
        .authenticate(&HeaderMap::new(), SOMEWHERE, Some(&platform))
        .unwrap();
    assert_eq!(
        (caller.app.as_str(), caller.via),
        ("bk_job", Via::Certificate(platform.fingerprint.clone()))
    );
    assert!(
        auth.authenticate(&authorization("other", "x"), SOMEWHERE, Some(&platform))
            .is_err()
    );
    assert!(
        auth.authenticate(&HeaderMap::new(), SOMEWHERE, Some(&peer(Role::ApiClient, Some("old"))))
            .is_err()
    );
    let unnamed = peer(Role::ApiClient, None);
    assert!(auth.authenticate(&HeaderMap::new(), SOMEWHERE, Some(&unnamed)).is_err());
    assert!(
        auth.authenticate(&authorization("bk_job", "s3cret"), SOMEWHERE, Some(&unnamed))
            .is_ok()
    );
    assert!(
        auth.authenticate(
            &authorization("bk_job", "s3cret"),
            SOMEWHERE,
            Some(&peer(Role::Agent, None))
        )
        .is_err()
    );
}

fn caller(app: &str) -> Caller {
    Caller {
        app: app.into(),
        username: None,
        via: Via::Secret,
    }
}
