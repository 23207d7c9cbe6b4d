//! Tokens of API gateways: verification against the configured public keys, and a short memory of the ones verified.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use parking_lot::Mutex;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::GatewayKey;

/// A token is a few hundred bytes; a longer one is not worth a signature check.
const MAX_TOKEN: usize = 16 * 1024;
const CACHED: usize = 4096;
/// A verified token is believed this long without another check, and never beyond its own end.
const CACHE_FOR: Duration = Duration::from_secs(30);
/// How far a gateway's clock may be off.
const LEEWAY: Duration = Duration::from_secs(30);
const RSA: &[Algorithm] = &[Algorithm::RS256, Algorithm::RS512];
const EC: &[Algorithm] = &[Algorithm::ES256];

struct Gateway {
    name: String,
    key: DecodingKey,
    validation: Validation,
}

pub(super) struct Gateways {
    all: Vec<Gateway>,
    cache: Mutex<HashMap<[u8; 32], (Verified, Instant)>>,
}

/// What a good token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Verified {
    pub(super) gateway: String,
    pub(super) app: String,
    pub(super) username: Option<String>,
}

#[derive(Deserialize)]
struct Claims {
    exp: u64,
    app: AppClaim,
    user: Option<UserClaim>,
}

#[derive(Deserialize)]
struct AppClaim {
    // Older gateways call it app_code, newer ones bk_app_code; some send both.
    app_code: Option<String>,
    bk_app_code: Option<String>,
    #[serde(default)]
    verified: bool,
}

#[derive(Deserialize)]
struct UserClaim {
    username: Option<String>,
    bk_username: Option<String>,
}

impl Gateways {
    pub(super) fn load(keys: &[GatewayKey], problems: &mut Vec<String>) -> Self {
        let mut all: Vec<Gateway> = Vec::new();
        for entry in keys {
            if all.iter().any(|gateway| gateway.name == entry.name) {
                problems.push(format!("gateway_keys: {:?} is there twice", entry.name));
            }
            match load_key(entry) {
                Ok(gateway) => all.push(gateway),
                Err(reason) => problems.push(format!(
                    "gateway_keys: {:?}: {}: {reason}",
                    entry.name,
                    entry.public_key_file.display()
                )),
            }
        }
        Gateways {
            all,
            cache: Mutex::new(HashMap::new()),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Verifies a token. The error is for the log and the audit line; it holds nothing of the token but the key's name.
    pub(super) fn verify(&self, token: &[u8]) -> Result<Verified, String> {
        if token.len() > MAX_TOKEN {
            return Err("token too long".to_owned());
        }
        let digest: [u8; 32] = Sha256::digest(token).into();
        let now = Instant::now();
        if let Some((verified, until)) = self.cache.lock().get(&digest)
            && *until > now
        {
            return Ok(verified.clone());
        }
        let (verified, valid_for) = self.verify_anew(token)?;
        let mut cache = self.cache.lock();
        if cache.len() >= CACHED {
            cache.retain(|_, (_, until)| *until > now);
            if cache.len() >= CACHED {
                cache.clear();
            }
        }
        cache.insert(digest, (verified.clone(), now + valid_for.min(CACHE_FOR)));
        Ok(verified)
    }

    fn verify_anew(&self, token: &[u8]) -> Result<(Verified, Duration), String> {
        let header = jsonwebtoken::decode_header(token).map_err(|_| "not a token".to_owned())?;
        let gateway = match header.kid.as_deref() {
            Some(kid) => self.all.iter().find(|gateway| gateway.name == kid),
            None if self.all.len() == 1 => self.all.first(),
            None => None,
        };
        let gateway = gateway.ok_or_else(|| {
            let kid: String = header.kid.as_deref().unwrap_or("(none)").chars().take(64).collect();
            format!("signed by the gateway {kid:?}, for which there is no key")
        })?;
        let claims = jsonwebtoken::decode::<Claims>(token, &gateway.key, &gateway.validation)
            .map_err(|error| format!("token of gateway {:?}: {}", gateway.name, describe(&error)))?
            .claims;
        if !claims.app.verified {
            return Err(format!(
                "token of gateway {:?}: the gateway has not verified the application",
                gateway.name
            ));
        }
        let app = match (claims.app.bk_app_code, claims.app.app_code) {
            (Some(new), Some(old)) if new != old => {
                return Err(format!(
                    "token of gateway {:?}: it names two applications",
                    gateway.name
                ));
            }
            (Some(code), _) | (None, Some(code)) => code,
            (None, None) => return Err(format!("token of gateway {:?}: it names no application", gateway.name)),
        };
        let username = claims.user.and_then(|user| user.bk_username.or(user.username));
        let left = claims.exp.saturating_sub(jsonwebtoken::get_current_timestamp());
        Ok((
            Verified {
                gateway: gateway.name.clone(),
                app,
                username,
            },
            Duration::from_secs(left),
        ))
    }
}

fn load_key(entry: &GatewayKey) -> Result<Gateway, String> {
    if entry.name.is_empty() {
        return Err("the name is empty".to_owned());
    }
    let pem = std::fs::read(&entry.public_key_file).map_err(|error| error.to_string())?;
    if pem.windows(7).any(|window| window == b"PRIVATE") {
        return Err("this is a private key; the gateway's public key is needed here".to_owned());
    }
    let (key, algorithms) = DecodingKey::from_rsa_pem(&pem)
        .map(|key| (key, RSA))
        .or_else(|_| DecodingKey::from_ec_pem(&pem).map(|key| (key, EC)))
        .map_err(|_| "not an RSA or P-256 public key in PEM".to_owned())?;
    let first = algorithms.first().ok_or("no algorithm for this key")?;
    let mut validation = Validation::new(*first);
    validation.algorithms = algorithms.to_vec();
    validation.validate_nbf = true;
    validation.validate_aud = false; // gateways of this kind state none
    validation.leeway = LEEWAY.as_secs();
    if let Some(issuer) = &entry.issuer {
        validation.set_issuer(&[issuer]);
        validation.set_required_spec_claims(&["exp", "iss"]);
    }
    Ok(Gateway {
        name: entry.name.clone(),
        key,
        validation,
    })
}

fn describe(error: &jsonwebtoken::errors::Error) -> &'static str {
    use jsonwebtoken::errors::ErrorKind;
    match error.kind() {
        ErrorKind::InvalidSignature => "wrong signature",
        ErrorKind::ExpiredSignature => "it has expired",
        ErrorKind::ImmatureSignature => "it is not valid yet",
        ErrorKind::InvalidIssuer => "wrong issuer",
        ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName | ErrorKind::UnsupportedAlgorithm => {
            "its algorithm is not that of the key"
        }
        ErrorKind::MissingRequiredClaim(_) => "a claim is missing",
        ErrorKind::Json(_) | ErrorKind::InvalidClaimFormat(_) => "its claims are not what they should be",
        _ => "it is malformed",
    }
}
