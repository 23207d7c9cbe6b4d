//! Which application makes a request: by secret, gateway token, address or certificate.

use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use http::{HeaderMap, HeaderName};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::table::{App, Table};
use super::{AuthzConfig, AuthzError, Caller, HEADER_APP, HEADER_USER, HEADER_VIA, OPERATOR_APP, Policy, Via};
use crate::lifecycle::Lifecycle;
use crate::tls::{PeerIdentity, Role};

const AUTHORIZATION: HeaderName = HeaderName::from_static("x-bkapi-authorization");
const JWT: HeaderName = HeaderName::from_static("x-bkapi-jwt");
const APP_CODE: HeaderName = HeaderName::from_static("x-bkapi-app-code");
const APP_SECRET: HeaderName = HeaderName::from_static("x-bkapi-app-secret");
const USER_NAME: HeaderName = HeaderName::from_static("x-bkapi-user-name");

const MAX_USER: usize = 128;

/// Why a request has no caller. `Display` is what the caller is told, and does not say whether an application exists.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// Nothing was shown.
    #[error("no credentials: send X-Bkapi-Authorization or come through the API gateway")]
    Missing,
    /// A header is not what it should be.
    #[error("{header}: {problem}")]
    Malformed {
        /// Which header.
        header: &'static str,
        /// What is wrong with it; never its content.
        problem: &'static str,
    },
    /// The credentials are not good.
    #[error("the application is unknown or disabled, or its credentials are wrong")]
    Refused {
        /// The application claimed, if one was, cut to a sane length.
        app: Option<String>,
        /// The real reason, for the log and the audit line; never a secret.
        reason: String,
    },
}

impl AuthError {
    /// The reason for the log and the audit line.
    pub fn detail(&self) -> String {
        match self {
            AuthError::Refused { reason, .. } => reason.clone(),
            other => other.to_string(),
        }
    }

    /// The application that was claimed, if one was.
    pub fn claimed_app(&self) -> Option<&str> {
        match self {
            AuthError::Refused { app, .. } => app.as_deref(),
            AuthError::Missing | AuthError::Malformed { .. } => None,
        }
    }

    fn refused(app: Option<&str>, reason: impl Into<String>) -> Self {
        AuthError::Refused {
            app: app.map(|app| app.chars().take(64).collect()),
            reason: reason.into(),
        }
    }
}

/// Finds out who makes a request. Cheap to clone.
#[derive(Clone)]
pub struct Authenticator {
    config: Arc<AuthzConfig>,
    table: Arc<ArcSwap<Table>>,
}

impl std::fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authenticator")
            .field("applications", &self.table.load().len())
            .finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Authorization {
    #[serde(default)]
    bk_app_code: Option<String>,
    #[serde(default)]
    bk_app_secret: Option<String>,
    #[serde(default)]
    bk_username: Option<String>,
}

struct Shown {
    app: String,
    secret: Option<String>,
    username: Option<String>,
}

impl Authenticator {
    /// Builds the table. Reads the applications file and the gateways' keys (blocking, small); any problem is an error.
    pub fn new(config: &AuthzConfig) -> Result<Self, AuthzError> {
        let table = Table::build(config)?;
        if table.len() == 0 {
            tracing::warn!("the application table is empty: every call but those of operators will be refused");
        }
        Ok(Authenticator {
            config: Arc::new(config.clone()),
            table: Arc::new(ArcSwap::from_pointee(table)),
        })
    }

    /// What callers may do, by the same table.
    pub fn policy(&self) -> Policy {
        Policy::new(Arc::clone(&self.table))
    }

    /// Reads the files again (blocking). On a problem the table in force stays.
    pub fn reload(&self) -> Result<(), AuthzError> {
        let table = Table::build(&self.config)?;
        tracing::info!(applications = table.len(), "application table read again");
        self.table.store(Arc::new(table));
        Ok(())
    }

    /// Reads the files again whenever the process is told to reload.
    pub fn follow_reloads(&self, life: &Lifecycle) {
        let this = self.clone();
        let mut reloads = life.reloads();
        let drain = life.drain_token();
        life.spawn("authz-reload", async move {
            while let Some(Ok(())) = drain.run_until_cancelled(reloads.changed()).await {
                let that = this.clone();
                match tokio::task::spawn_blocking(move || that.reload()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::error!(%error, "the application table stays as it was"),
                    Err(error) => tracing::error!(%error, "reading the application table panicked; it stays as it was"),
                }
            }
        });
    }

    /// Who makes this request. `peer` is the certificate of a peer on a mutual TLS listener; assertions by header are believed only from
    /// one of our servers.
    pub fn authenticate(
        &self,
        headers: &HeaderMap,
        peer_addr: IpAddr,
        peer: Option<&PeerIdentity>,
    ) -> Result<Caller, AuthError> {
        let table = self.table.load();
        match peer {
            Some(peer) if peer.role == Role::Operator => {
                let username = peer
                    .id
                    .clone()
                    .or_else(|| Some(peer.fingerprint.chars().take(16).collect()));
                return Ok(Caller {
                    app: OPERATOR_APP.to_owned(),
                    username,
                    via: Via::Operator(peer.fingerprint.clone()),
                });
            }
            Some(peer) if peer.role == Role::Server && headers.contains_key(HEADER_APP) => {
                return asserted(&table, headers);
            }
            Some(peer) if peer.role == Role::ApiClient && peer.id.is_some() => {
                return by_certificate(&table, headers, peer);
            }
            Some(peer) if peer.role == Role::Agent => {
                return Err(AuthError::refused(None, "an agent's certificate makes no calls"));
            }
            _ => {}
        }
        if let Some(token) = one(headers, &JWT, "X-Bkapi-JWT")? {
            if !table.gateways.is_empty() {
                return by_token(&table, token);
            }
            if !headers.contains_key(AUTHORIZATION) && !headers.contains_key(APP_CODE) {
                return Err(AuthError::refused(
                    None,
                    "a gateway's token, but no gateway key is configured",
                ));
            }
        }
        let shown = shown(headers)?;
        if let Some(Shown {
            app,
            secret: Some(secret),
            username,
        }) = shown
        {
            let digest: [u8; 32] = Sha256::digest(secret.as_bytes()).into();
            let entry = table.app(&app);
            if !App::secret_matches(entry, &digest) {
                let reason = if entry.is_some() {
                    "wrong secret"
                } else {
                    "unknown application"
                };
                return Err(AuthError::refused(Some(&app), reason));
            }
            enabled(&table, &app)?;
            return Ok(Caller {
                app,
                username,
                via: Via::Secret,
            });
        }
        // Only a caller without a certificate is judged by its address: behind our own servers everybody has theirs.
        if peer.is_none()
            && let Some((network, app)) = table.network(peer_addr)
        {
            enabled(&table, app)?;
            let username = shown.and_then(|shown| shown.username);
            return Ok(Caller {
                app: app.to_owned(),
                username,
                via: Via::Network(network),
            });
        }
        match shown {
            Some(shown) => Err(AuthError::refused(Some(&shown.app), "no secret was sent")),
            None => Err(AuthError::Missing),
        }
    }
}

fn enabled(table: &Table, app: &str) -> Result<(), AuthError> {
    match table.app(app) {
        None => Err(AuthError::refused(Some(app), "unknown application")),
        Some(entry) if entry.disabled => Err(AuthError::refused(Some(app), "the application is disabled")),
        Some(_) => Ok(()),
    }
}

fn asserted(table: &Table, headers: &HeaderMap) -> Result<Caller, AuthError> {
    let app = one_text(headers, &HEADER_APP, "x-gse-app")?.unwrap_or_default();
    let username = one_text(headers, &HEADER_USER, "x-gse-user")?.and_then(sane_user);
    match one_text(headers, &HEADER_VIA, "x-gse-via")? {
        Some("operator") if app == OPERATOR_APP => Ok(Caller {
            app: app.to_owned(),
            username,
            via: Via::Operator("asserted".to_owned()),
        }),
        Some(_) => Err(AuthError::refused(Some(app), "an assertion of an unknown kind")),
        None => {
            enabled(table, app)?;
            Ok(Caller {
                app: app.to_owned(),
                username,
                via: Via::Server,
            })
        }
    }
}

fn by_certificate(table: &Table, headers: &HeaderMap, peer: &PeerIdentity) -> Result<Caller, AuthError> {
    let app = peer.id.clone().unwrap_or_default();
    enabled(table, &app)?;
    let shown = shown(headers)?;
    if let Some(other) = shown.as_ref().filter(|shown| shown.app != app) {
        return Err(AuthError::refused(
            Some(&other.app),
            "the certificate belongs to another application",
        ));
    }
    let username = shown.and_then(|shown| shown.username);
    Ok(Caller {
        app,
        username,
        via: Via::Certificate(peer.fingerprint.clone()),
    })
}

fn by_token(table: &Table, token: &[u8]) -> Result<Caller, AuthError> {
    let verified = table
        .gateways
        .verify(token)
        .map_err(|reason| AuthError::refused(None, reason))?;
    enabled(table, &verified.app)?;
    let username = verified.username.as_deref().and_then(sane_user);
    Ok(Caller {
        app: verified.app,
        username,
        via: Via::Gateway(verified.gateway),
    })
}

/// What the request shows as code and secret, in either of the two ways; `X-Bkapi-Authorization` comes first.
fn shown(headers: &HeaderMap) -> Result<Option<Shown>, AuthError> {
    const NAME: &str = "X-Bkapi-Authorization";
    let malformed = |problem| AuthError::Malformed { header: NAME, problem };
    if let Some(value) = one(headers, &AUTHORIZATION, NAME)? {
        const EXPECTED: &str = "not a JSON object with bk_app_code and bk_app_secret as strings";
        // serde would take an array for the object, too.
        if !value.trim_ascii_start().starts_with(b"{") {
            return Err(malformed(EXPECTED));
        }
        let parsed: Authorization = serde_json::from_slice(value).map_err(|_| malformed(EXPECTED))?;
        // Without a code it can still name the user for a caller that is known otherwise.
        if let Some(app) = parsed.bk_app_code.filter(|app| !app.is_empty()) {
            let secret = parsed.bk_app_secret.filter(|secret| !secret.is_empty());
            return Ok(Some(Shown {
                app,
                secret,
                username: parsed.bk_username.as_deref().and_then(sane_user),
            }));
        }
    }
    let Some(app) = one_text(headers, &APP_CODE, "X-Bkapi-App-Code")?.filter(|app| !app.is_empty()) else {
        return Ok(None);
    };
    let secret = one_text(headers, &APP_SECRET, "X-Bkapi-App-Secret")?.filter(|secret| !secret.is_empty());
    let username = one_text(headers, &USER_NAME, "X-Bkapi-User-Name")?.and_then(sane_user);
    Ok(Some(Shown {
        app: app.to_owned(),
        secret: secret.map(str::to_owned),
        username,
    }))
}

/// The one value of a header. Two of a kind are refused: a proxy in front may have looked at the other one.
fn one<'h>(headers: &'h HeaderMap, name: &HeaderName, label: &'static str) -> Result<Option<&'h [u8]>, AuthError> {
    let mut values = headers.get_all(name).iter();
    let first = values.next();
    if values.next().is_some() {
        return Err(AuthError::Malformed {
            header: label,
            problem: "it is there more than once",
        });
    }
    Ok(first.map(|value| value.as_bytes()))
}

fn one_text<'h>(headers: &'h HeaderMap, name: &HeaderName, label: &'static str) -> Result<Option<&'h str>, AuthError> {
    one(headers, name, label)?
        .map(std::str::from_utf8)
        .transpose()
        .map_err(|_| AuthError::Malformed {
            header: label,
            problem: "it is not UTF-8",
        })
}

/// A user name fit for logs and audit lines; anything else is as good as none.
fn sane_user(name: &str) -> Option<String> {
    let sane = !name.is_empty() && name.chars().count() <= MAX_USER && !name.chars().any(char::is_control);
    sane.then(|| name.to_owned())
}
