//! Who may do what: the application table, the ways in which a caller proves which application it is, and the policy.
//!
//! Everything is denied until the table allows it. Names are compared whole: there are no prefixes, patterns or inherited rights; `*`
//! alone means "all". [`Authenticator`] turns the headers of a request into a [`Caller`], [`Policy`] says what that caller may do; both
//! look at the same table, which can be read again while the process runs. Writing down what was decided is left to [`crate::audit`].

mod authenticate;
mod jwt;
mod operation;
mod policy;
mod table;

use std::fmt;
use std::path::PathBuf;

use http::{HeaderMap, HeaderName, HeaderValue};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use authenticate::{AuthError, Authenticator};
pub use operation::{Operation, UnknownOperation};
pub use policy::{Denied, Policy};
pub use table::AuthzError;

/// Application code of a caller with an operator's certificate; no table entry may have it.
pub const OPERATOR_APP: &str = "operator";

/// On internal links only: the application a server vouches for.
pub const HEADER_APP: HeaderName = HeaderName::from_static("x-gse-app");
/// On internal links only: the user that application named.
pub const HEADER_USER: HeaderName = HeaderName::from_static("x-gse-user");
/// On internal links only: `operator` when the caller came with an operator's certificate.
pub const HEADER_VIA: HeaderName = HeaderName::from_static("x-gse-via");

/// Settings of authentication and policy. The default allows nothing to anybody.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthzConfig {
    /// TOML file with further applications (`[[app]]` tables); read again on reload.
    pub apps_file: Option<PathBuf>,
    /// Applications.
    pub apps: Vec<AppEntry>,
    /// API gateways whose tokens are believed.
    pub gateway_keys: Vec<GatewayKey>,
    /// Networks whose callers need no secret.
    pub trusted_networks: Vec<TrustedNetwork>,
}

/// One application and what it may do.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AppEntry {
    /// Its code, as it calls itself.
    pub code: String,
    /// SHA-256 of its secret, in hex. Without one it can only come through a gateway, a trusted network or a certificate.
    pub secret_sha256: Option<String>,
    /// Names of [`Operation`]s, or `*`.
    pub operations: Vec<String>,
    /// OS accounts it may run things as, or `*`.
    pub accounts: Vec<String>,
    /// Exact agent ids, `cloud:<n>`, or `*`.
    pub targets: Vec<String>,
    /// What it may do with tasks of other applications.
    pub others_tasks: OthersTasks,
    /// Tasks it may have under way at once, over all nodes; without it as many as the nodes take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_running_tasks: Option<u64>,
    /// Targets it may ask for in a minute, over all nodes; without it any number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_targets_per_minute: Option<u64>,
    /// Refuse it, whatever it shows.
    pub disabled: bool,
}

// The digest of a weak secret is worth guessing at, so it is not printed.
impl fmt::Debug for AppEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AppEntry")
            .field("code", &self.code)
            .field("secret_sha256", &self.secret_sha256.as_ref().map(|_| "***"))
            .field("operations", &self.operations)
            .field("accounts", &self.accounts)
            .field("targets", &self.targets)
            .field("others_tasks", &self.others_tasks)
            .field("max_running_tasks", &self.max_running_tasks)
            .field("max_targets_per_minute", &self.max_targets_per_minute)
            .field("disabled", &self.disabled)
            .finish()
    }
}

/// How much an application may ask for; what is not there is not limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Quota {
    /// Tasks under way at once.
    pub running_tasks: Option<u64>,
    /// Targets in a minute.
    pub targets_per_minute: Option<u64>,
}

/// What an application may do with tasks that others have started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OthersTasks {
    /// They do not exist for it.
    #[default]
    None,
    /// Read their results.
    Read,
    /// Read and stop them.
    All,
}

/// A gateway that puts a signed token (`X-Bkapi-JWT`) on the requests it passes on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewayKey {
    /// Name of the gateway; the token's `kid`.
    pub name: String,
    /// Its public key (RSA or P-256), PEM.
    pub public_key_file: PathBuf,
    /// The token's `iss` has to be this, if set.
    #[serde(default)]
    pub issuer: Option<String>,
}

/// A network from which every caller is the same application.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrustedNetwork {
    /// Addresses, as `10.1.0.0/16`.
    pub cidr: IpNet,
    /// Code of the application.
    pub app: String,
}

/// Who makes a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Code of the application; [`OPERATOR_APP`] for an operator.
    pub app: String,
    /// The user the application names; nothing vouches for it but the application.
    pub username: Option<String>,
    /// How it is known.
    pub via: Via,
}

/// How a caller is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Via {
    /// It showed the application's secret.
    Secret,
    /// A gateway's token; the gateway's name.
    Gateway(String),
    /// Its address; the network.
    Network(IpNet),
    /// One of our servers vouches for it.
    Server,
    /// The certificate of an API client; its fingerprint.
    Certificate(String),
    /// The certificate of an operator: everything is allowed. Its fingerprint, or `asserted` when one of our servers saw it.
    Operator(String),
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Via::Secret => f.write_str("secret"),
            Via::Gateway(name) => write!(f, "gateway {name}"),
            Via::Network(net) => write!(f, "network {net}"),
            Via::Server => f.write_str("server"),
            Via::Certificate(print) => write!(f, "certificate {print}"),
            Via::Operator(print) => write!(f, "operator {print}"),
        }
    }
}

impl Caller {
    /// Whether it came with an operator's certificate.
    pub fn is_operator(&self) -> bool {
        matches!(self.via, Via::Operator(_))
    }

    /// Vouches for this caller towards another of our servers: sets the assertion headers and takes away every other credential, so that
    /// nothing a caller sent can be mistaken for ours. For requests over mutual TLS only.
    pub fn assert_into(&self, headers: &mut HeaderMap) {
        for name in [
            "x-bkapi-authorization",
            "x-bkapi-jwt",
            "x-bkapi-app-code",
            "x-bkapi-app-secret",
            "authorization",
        ] {
            headers.remove(name);
        }
        for name in [HEADER_APP, HEADER_USER, HEADER_VIA] {
            headers.remove(name);
        }
        // A code or user that cannot stand in a header is left out; the other side then refuses the request.
        if let Ok(app) = HeaderValue::from_bytes(self.app.as_bytes()) {
            headers.insert(HEADER_APP, app);
        }
        if let Some(Ok(user)) = self
            .username
            .as_ref()
            .map(|user| HeaderValue::from_bytes(user.as_bytes()))
        {
            headers.insert(HEADER_USER, user);
        }
        if self.is_operator() {
            headers.insert(HEADER_VIA, HeaderValue::from_static("operator"));
        }
    }
}

#[cfg(test)]
mod tests;
