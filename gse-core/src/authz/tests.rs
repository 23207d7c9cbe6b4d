use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::OnceLock;

use http::HeaderMap;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use proptest::prelude::*;
use rsa::pkcs8::{EncodePrivateKey, EncodePublicKey, LineEnding};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use super::*;
use crate::tls::{PeerIdentity, Role};

const SOMEWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7));

pub(crate) fn app(code: &str, secret: &str) -> AppEntry {
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

// ---- gateway tokens ----

struct RsaKey {
    private: String,
    public: String,
}

/// One RSA key for all tests: making one takes a moment.
fn rsa_key() -> &'static RsaKey {
    static KEY: OnceLock<RsaKey> = OnceLock::new();
    KEY.get_or_init(|| {
        let key = rsa::RsaPrivateKey::new(&mut rsa::rand_core::OsRng, 2048).unwrap();
        RsaKey {
            private: key.to_pkcs8_pem(LineEnding::LF).unwrap().to_string(),
            public: key.to_public_key().to_public_key_pem(LineEnding::LF).unwrap(),
        }
    })
}

fn now() -> u64 {
    jsonwebtoken::get_current_timestamp()
}

fn claims() -> Value {
    json!({
        "iss": "APIGW", "iat": now(), "nbf": now() - 5, "exp": now() + 900,
        "app": {"app_code": "bk_job", "verified": true, "version": 1},
        "user": {"username": "admin", "verified": false},
    })
}

fn token(algorithm: Algorithm, kid: Option<&str>, claims: &Value, key: &EncodingKey) -> HeaderMap {
    let mut header = Header::new(algorithm);
    header.kid = kid.map(str::to_owned);
    headers(&[("X-Bkapi-JWT", &jsonwebtoken::encode(&header, claims, key).unwrap())])
}

fn gateway(dir: &Path, public: &str, issuer: Option<&str>) -> Authenticator {
    let file = dir.join("gateway.pem");
    std::fs::write(&file, public).unwrap();
    let key = GatewayKey {
        name: "bk-gse".into(),
        public_key_file: file,
        issuer: issuer.map(str::to_owned),
    };
    let apps = vec![
        app("bk_job", "s3cret"),
        AppEntry {
            disabled: true,
            ..app("old", "x")
        },
    ];
    Authenticator::new(&AuthzConfig {
        apps,
        gateway_keys: vec![key],
        ..AuthzConfig::default()
    })
    .unwrap()
}

#[test]
fn a_token_of_the_gateway_names_the_application() {
    let dir = TempDir::new().unwrap();
    let key = EncodingKey::from_rsa_pem(rsa_key().private.as_bytes()).unwrap();
    let auth = gateway(dir.path(), &rsa_key().public, Some("APIGW"));
    for algorithm in [Algorithm::RS256, Algorithm::RS512] {
        for kid in [Some("bk-gse"), None] {
            let caller = auth
                .authenticate(&token(algorithm, kid, &claims(), &key), SOMEWHERE, None)
                .unwrap();
            assert_eq!(
                (caller.app.as_str(), caller.username.as_deref()),
                ("bk_job", Some("admin"))
            );
            assert_eq!(caller.via, Via::Gateway("bk-gse".into()));
        }
    }
    let ec = rcgen::KeyPair::generate().unwrap();
    let auth = gateway(dir.path(), &ec.public_key_pem(), None);
    let key = EncodingKey::from_ec_pem(ec.serialize_pem().as_bytes()).unwrap();
    let mut newer = claims();
    newer["app"] = json!({"bk_app_code": "bk_job", "verified": true});
    let caller = auth
        .authenticate(&token(Algorithm::ES256, Some("bk-gse"), &newer, &key), SOMEWHERE, None)
        .unwrap();
    assert_eq!(caller.app, "bk_job");
}

#[test]
fn bad_tokens_are_refused_whatever_is_bad_about_them() {
    let dir = TempDir::new().unwrap();
    let key = EncodingKey::from_rsa_pem(rsa_key().private.as_bytes()).unwrap();
    let auth = gateway(dir.path(), &rsa_key().public, Some("APIGW"));
    let with = |change: &dyn Fn(&mut Value)| {
        let mut claims = claims();
        change(&mut claims);
        token(Algorithm::RS512, Some("bk-gse"), &claims, &key)
    };
    let stranger = rcgen::KeyPair::generate().unwrap();
    let stranger = EncodingKey::from_ec_pem(stranger.serialize_pem().as_bytes()).unwrap();
    let public_as_secret = EncodingKey::from_secret(rsa_key().public.as_bytes());
    let unsigned =
        "eyJhbGciOiJub25lIn0.eyJhcHAiOnsiYXBwX2NvZGUiOiJia19qb2IiLCJ2ZXJpZmllZCI6dHJ1ZX0sImV4cCI6OTk5OTk5OTk5OX0.";
    let cases = [
        ("expired", with(&|claims| claims["exp"] = json!(now() - 120))),
        (
            "without end",
            with(&|claims| drop(claims.as_object_mut().unwrap().remove("exp"))),
        ),
        ("not yet valid", with(&|claims| claims["nbf"] = json!(now() + 600))),
        ("other issuer", with(&|claims| claims["iss"] = json!("somebody"))),
        (
            "no issuer",
            with(&|claims| drop(claims.as_object_mut().unwrap().remove("iss"))),
        ),
        ("not verified", with(&|claims| claims["app"]["verified"] = json!(false))),
        (
            "no word of verification",
            with(&|claims| claims["app"] = json!({"app_code": "bk_job"})),
        ),
        (
            "no application",
            with(&|claims| claims["app"] = json!({"verified": true})),
        ),
        (
            "two applications",
            with(&|claims| claims["app"]["bk_app_code"] = json!("other")),
        ),
        (
            "unknown application",
            with(&|claims| claims["app"]["app_code"] = json!("nobody")),
        ),
        (
            "disabled application",
            with(&|claims| claims["app"]["app_code"] = json!("old")),
        ),
        ("other gateway", token(Algorithm::RS512, Some("other"), &claims(), &key)),
        (
            "other key",
            token(Algorithm::ES256, Some("bk-gse"), &claims(), &stranger),
        ),
        (
            "public key as secret",
            token(Algorithm::HS256, Some("bk-gse"), &claims(), &public_as_secret),
        ),
        (
            "weaker algorithm",
            token(Algorithm::PS256, Some("bk-gse"), &claims(), &key),
        ),
        ("unsigned", headers(&[("X-Bkapi-JWT", unsigned)])),
        ("nonsense", headers(&[("X-Bkapi-JWT", "a.b.c")])),
        ("long", headers(&[("X-Bkapi-JWT", &"a".repeat(100_000))])),
    ];
    for (name, headers) in cases {
        let refused = auth.authenticate(&headers, SOMEWHERE, None);
        assert!(matches!(refused, Err(AuthError::Refused { .. })), "{name}: {refused:?}");
    }
    // A bad token is not made good by a good secret beside it.
    let mut both = authorization("bk_job", "s3cret");
    both.insert("x-bkapi-jwt", HeaderValue::from_static("a.b.c"));
    assert!(auth.authenticate(&both, SOMEWHERE, None).is_err());
    // One changed byte of the signature.
    let good = token(Algorithm::RS512, Some("bk-gse"), &claims(), &key);
    let mut text = good["x-bkapi-jwt"].to_str().unwrap().to_owned().into_bytes();
    let place = text.len() - 10;
    text[place] = if text[place] == b'A' { b'B' } else { b'A' };
    assert!(auth.authenticate(&good, SOMEWHERE, None).is_ok());
    let changed = headers(&[("X-Bkapi-JWT", std::str::from_utf8(&text).unwrap())]);
    assert!(auth.authenticate(&changed, SOMEWHERE, None).is_err());
}

#[test]
fn a_remembered_token_ends_with_its_time() {
    let dir = TempDir::new().unwrap();
    let key = EncodingKey::from_rsa_pem(rsa_key().private.as_bytes()).unwrap();
    let auth = gateway(dir.path(), &rsa_key().public, None);
    let mut short = claims();
    // Within the leeway for clocks a token past its end is still taken, but it is not remembered.
    short["exp"] = json!(now() - 10);
    let table = auth.authenticate(&token(Algorithm::RS512, None, &short, &key), SOMEWHERE, None);
    assert!(table.is_ok());
}

#[test]
fn without_a_key_tokens_count_for_nothing() {
    let auth = two_apps();
    let key = EncodingKey::from_rsa_pem(rsa_key().private.as_bytes()).unwrap();
    let mut shown = token(Algorithm::RS512, None, &claims(), &key);
    assert!(matches!(
        auth.authenticate(&shown, SOMEWHERE, None),
        Err(AuthError::Refused { .. })
    ));
    shown.extend(authorization("bk_job", "s3cret"));
    assert_eq!(auth.authenticate(&shown, SOMEWHERE, None).unwrap().via, Via::Secret);
}

// ---- policy ----

fn caller(app: &str) -> Caller {
    Caller {
        app: app.into(),
        username: None,
        via: Via::Secret,
    }
}

#[test]
fn what_is_not_in_the_table_is_denied() {
    let apps = vec![
        AppEntry {
            code: "nothing".into(),
            ..AppEntry::default()
        },
        AppEntry {
            code: "some".into(),
            operations: vec!["script.execute".into(), "agent.state".into()],
            accounts: vec!["root".into()],
            targets: vec!["agent-1".into(), "cloud:3".into()],
            others_tasks: OthersTasks::Read,
            ..AppEntry::default()
        },
        AppEntry {
            disabled: true,
            others_tasks: OthersTasks::All,
            ..app("off", "x")
        },
    ];
    let auth = Authenticator::new(&AuthzConfig {
        apps,
        ..AuthzConfig::default()
    })
    .unwrap();
    let policy = auth.policy();
    let check = |app: &str, operation, account: &str, target: &str, cloud| {
        policy.check(
            &caller(app),
            operation,
            [account].into_iter(),
            [(target, cloud)].into_iter(),
        )
    };
    use Operation::{AgentInfo, AgentState, ScriptExecute};
    assert!(check("some", ScriptExecute, "root", "agent-1", None).is_ok());
    assert!(check("some", ScriptExecute, "root", "anything", Some(3)).is_ok());
    for operation in Operation::ALL {
        assert!(policy.check_operation(&caller("nothing"), *operation).is_err());
        assert!(policy.check_operation(&caller("off"), *operation).is_err());
        assert!(policy.check_operation(&caller("unheard of"), *operation).is_err());
    }
    assert!(matches!(
        check("some", AgentInfo, "root", "agent-1", None),
        Err(Denied::Operation { .. })
    ));
    for account in ["roo", "root2", "Root", "", "*"] {
        assert!(
            matches!(
                check("some", ScriptExecute, account, "agent-1", None),
                Err(Denied::Account { .. })
            ),
            "{account}"
        );
    }
    for (target, cloud) in [
        ("agent-", None),
        ("agent-10", None),
        ("AGENT-1", None),
        ("cloud:3", None),
        ("*", None),
        ("x", Some(33)),
    ] {
        assert!(
            matches!(
                check("some", AgentState, "root", target, cloud),
                Err(Denied::Target { .. })
            ),
            "{target}"
        );
    }
    // One bad target among good ones is enough.
    let many = [("agent-1", None), ("x", Some(3)), ("agent-2", Some(0))];
    let denied = policy
        .check(&caller("some"), ScriptExecute, ["root"].into_iter(), many.into_iter())
        .unwrap_err();
    assert!(denied.to_string().contains("agent-2"), "{denied}");

    assert!(policy.may_read(&caller("some"), "some") && policy.may_read(&caller("some"), "other"));
    assert!(policy.may_stop(&caller("some"), "some") && !policy.may_stop(&caller("some"), "other"));
    assert!(policy.may_read(&caller("nothing"), "nothing") && !policy.may_read(&caller("nothing"), "some"));
    assert!(!policy.may_read(&caller("off"), "off") && !policy.may_stop(&caller("off"), "some"));
    let operator = Caller {
        via: Via::Operator("x".into()),
        ..caller(OPERATOR_APP)
    };
    assert!(policy.may_stop(&operator, "some") && policy.check_operation(&operator, AgentInfo).is_ok());
}

proptest! {
    /// Against the rule written out plainly.
    #[test]
    fn the_policy_is_the_rule(
        operations in prop::collection::vec(prop::sample::select(vec!["script.execute", "script.read", "agent.state", "*"]), 0..3),
        accounts in prop::collection::vec(prop::sample::select(vec!["root", "roo", "nobody", "*"]), 0..3),
        targets in prop::collection::vec(prop::sample::select(vec!["a", "ab", "cloud:1", "cloud:11", "*"]), 0..3),
        disabled in any::<bool>(),
        account in prop::sample::select(vec!["root", "roo", "nobody", "r", ""]),
        target in prop::sample::select(vec!["a", "ab", "abc", "cloud:1", ""]),
        cloud in prop::option::of(prop::sample::select(vec![1, 11, 111, -1])),
    ) {
        let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let entry = AppEntry {
            code: "x".into(),
            operations: names(&operations),
            accounts: names(&accounts),
            targets: names(&targets),
            disabled,
            ..AppEntry::default()
        };
        let auth = Authenticator::new(&AuthzConfig { apps: vec![entry], ..AuthzConfig::default() }).unwrap();
        let expected = !disabled
            && operations.iter().any(|name| ["*", "script.execute"].contains(name))
            && accounts.iter().any(|name| *name == "*" || *name == account)
            && targets.iter().any(|name| {
                *name == "*" || (*name == target && !name.starts_with("cloud:")) || cloud.is_some_and(|cloud| *name == format!("cloud:{cloud}"))
            });
        let allowed =
            auth.policy().check(&caller("x"), Operation::ScriptExecute, [account].into_iter(), [(target, cloud)].into_iter()).is_ok();
        prop_assert_eq!(allowed, expected);
    }
}

// ---- the table ----

#[test]
fn every_problem_of_the_settings_is_reported_at_once() {
    let bad = AppEntry {
        code: "bad".into(),
        secret_sha256: Some("s3cret-in-the-clear".into()),
        operations: vec!["script.exec".into(), "script.*".into()],
        accounts: vec!["adm*".into()],
        targets: vec!["10.0.*".into(), "cloud:x".into()],
        ..AppEntry::default()
    };
    let config = AuthzConfig {
        apps: vec![
            bad,
            app("twice", "a"),
            app("twice", "b"),
            app(OPERATOR_APP, "c"),
            app("", "d"),
        ],
        trusted_networks: vec![TrustedNetwork {
            cidr: "10.0.0.0/8".parse().unwrap(),
            app: "nobody".into(),
        }],
        gateway_keys: vec![GatewayKey {
            name: "g".into(),
            public_key_file: "/nonexistent/key.pem".into(),
            issuer: None,
        }],
        apps_file: Some("/nonexistent/apps.toml".into()),
    };
    let text = Authenticator::new(&config).err().unwrap().to_string();
    for part in [
        "secret_sha256",
        "script.exec",
        "script.*",
        "adm*",
        "10.0.*",
        "cloud:x",
        "twice",
        "reserved",
        "nobody",
        "key.pem",
        "apps.toml",
    ] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    assert!(!text.contains("s3cret-in-the-clear"), "{text}");
}

#[test]
fn a_bad_file_keeps_the_old_table_on_reload_and_stops_the_start() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("apps.toml");
    let table = |code: &str| {
        format!(
            "[[app]]\ncode = \"{code}\"\nsecret_sha256 = \"{}\"\noperations = [\"*\"]\n",
            hex::encode(Sha256::digest("s"))
        )
    };
    std::fs::write(&file, table("first")).unwrap();
    let config = AuthzConfig {
        apps_file: Some(file.clone()),
        ..AuthzConfig::default()
    };
    let auth = Authenticator::new(&config).unwrap();
    let knows = |code: &str| auth.authenticate(&authorization(code, "s"), SOMEWHERE, None).is_ok();
    assert!(knows("first"));
    std::fs::write(&file, format!("{}oops = 1\n", table("second"))).unwrap();
    let error = auth.reload().unwrap_err().to_string();
    assert!(error.contains("apps.toml") && error.contains("line"), "{error}");
    assert!(Authenticator::new(&config).is_err());
    assert!(knows("first") && !knows("second"));
    std::fs::write(&file, table("second")).unwrap();
    auth.reload().unwrap();
    assert!(!knows("first") && knows("second"));
    assert!(
        auth.policy()
            .check_operation(&caller("second"), Operation::AgentList)
            .is_ok()
    );
}

#[tokio::test]
async fn the_table_follows_the_signal() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("apps.toml");
    std::fs::write(&file, "").unwrap();
    let auth = Authenticator::new(&AuthzConfig {
        apps_file: Some(file.clone()),
        ..AuthzConfig::default()
    })
    .unwrap();
    let life = Lifecycle::new("test");
    auth.follow_reloads(&life);
    std::fs::write(&file, "[[app]]\ncode = \"new\"\noperations = [\"*\"]\n").unwrap();
    life.reload();
    let policy = auth.policy();
    for _ in 0..500 {
        if policy.check_operation(&caller("new"), Operation::AgentList).is_ok() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("the table was not read again");
}

use crate::lifecycle::Lifecycle;

#[test]
fn settings_do_not_print_digests() {
    let entry = app("bk_job", "s3cret");
    let text = format!(
        "{:?}",
        AuthzConfig {
            apps: vec![entry.clone()],
            ..AuthzConfig::default()
        }
    );
    assert!(text.contains("bk_job") && !text.contains(entry.secret_sha256.as_deref().unwrap()));
}

#[test]
fn a_private_key_is_not_taken_for_a_gateways_public_one() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("key.pem");
    std::fs::write(&file, &rsa_key().private).unwrap();
    let key = GatewayKey {
        name: "g".into(),
        public_key_file: file,
        issuer: None,
    };
    let error = Authenticator::new(&AuthzConfig {
        gateway_keys: vec![key],
        ..AuthzConfig::default()
    })
    .err()
    .unwrap();
    assert!(error.to_string().contains("private key"), "{error}");
}
