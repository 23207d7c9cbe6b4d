//! Tokens of gateways, with keys made here.

use std::path::Path;
use std::sync::OnceLock;

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rsa::pkcs8::{EncodePrivateKey, EncodePublicKey, LineEnding};
use serde_json::Value;
use tempfile::TempDir;

use super::*;

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
fn a_remembered_token_follows_the_table() {
    let dir = TempDir::new().unwrap();
    let (key_file, apps_file) = (dir.path().join("gateway.pem"), dir.path().join("apps.toml"));
    std::fs::write(&key_file, &rsa_key().public).unwrap();
    std::fs::write(&apps_file, "[[app]]\ncode = \"bk_job\"\n").unwrap();
    let key = GatewayKey {
        name: "bk-gse".into(),
        public_key_file: key_file,
        issuer: None,
    };
    let config = AuthzConfig {
        apps_file: Some(apps_file.clone()),
        gateway_keys: vec![key],
        ..AuthzConfig::default()
    };
    let auth = Authenticator::new(&config).unwrap();
    let signing = EncodingKey::from_rsa_pem(rsa_key().private.as_bytes()).unwrap();
    let shown = token(Algorithm::RS512, None, &claims(), &signing);
    for _ in 0..2 {
        assert_eq!(auth.authenticate(&shown, SOMEWHERE, None).unwrap().app, "bk_job");
    }
    std::fs::write(&apps_file, "[[app]]\ncode = \"bk_job\"\ndisabled = true\n").unwrap();
    auth.reload().unwrap();
    assert_eq!(
        auth.authenticate(&shown, SOMEWHERE, None).unwrap_err().detail(),
        "the application is disabled"
    );
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
