//! What a certificate says about its holder: the role, the agent's id, the fingerprint.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

const SCHEME: &str = "gse://";
/// Longest id in a certificate, in characters; the contract's agent ids have at most 64.
const MAX_ID: usize = 64;

/// What the holder of a certificate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// An agent on a managed host. Dials servers, is never dialled.
    Agent,
    /// One of our servers. Dials and is dialled.
    Server,
    /// A platform that calls the HTTP interface with a certificate.
    ApiClient,
    /// A person who runs the site.
    Operator,
}

impl Role {
    /// The role's name, as in the certificate.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Agent => "agent",
            Role::Server => "server",
            Role::ApiClient => "api-client",
            Role::Operator => "operator",
        }
    }

    /// The URI that states this role, and the id where there is one.
    pub fn uri(self, id: Option<&str>) -> String {
        match id {
            None => format!("{SCHEME}{self}"),
            Some(id) => format!("{SCHEME}{self}/{}", encode_id(id)),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = IdentityError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Role::Agent, Role::Server, Role::ApiClient, Role::Operator]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| IdentityError::UnknownRole(clip(text)))
    }
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// What it is.
    pub role: Role,
    /// For an agent with a certificate of its own, its id; for an API client or operator, a name if the certificate has one.
    pub id: Option<String>,
    /// SHA-256 of the certificate, lower-case hex.
    pub fingerprint: String,
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.id {
            Some(id) => write!(f, "{} {}", self.role, id.escape_debug()),
            None => write!(f, "{}", self.role),
        }
    }
}

/// Why a certificate does not name its holder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The peer showed none.
    #[error("no certificate was shown")]
    NoCertificate,
    /// Not X.509.
    #[error("it cannot be parsed")]
    Malformed,
    /// No URI of ours in it.
    #[error("it states no role (no gse:// URI among its alternative names)")]
    NoRole,
    /// More than one URI of ours.
    #[error("it states {0} roles (gse:// URIs), exactly one is allowed")]
    ManyRoles(usize),
    /// A role that does not exist.
    #[error("it states the unknown role {0:?}")]
    UnknownRole(String),
    /// The id is not what it should be.
    #[error("it states an unusable id: {0}")]
    BadId(&'static str),
    /// A good certificate of somebody else.
    #[error("its role is {got}, expected {expected}")]
    WrongRole {
        /// The role in the certificate.
        got: Role,
        /// The roles that would do.
        expected: String,
    },
    /// Extended key usage missing or not for this side.
    #[error("it may not be used as a {0} certificate (extended key usage)")]
    Usage(&'static str),
    /// Outside its validity.
    #[error("it is not valid at this time")]
    NotValidNow,
}

impl PeerIdentity {
    /// Reads role, id and fingerprint; the signature and validity are not looked at.
    pub(crate) fn of_certificate(der: &[u8]) -> Result<Self, IdentityError> {
        Self::parse(der).map(|(identity, _)| identity)
    }

    /// As [`Self::of_certificate`], for a certificate that has to be valid at `now`.
    pub(crate) fn of_valid_certificate(der: &[u8], now: SystemTime) -> Result<Self, IdentityError> {
        let (identity, cert) = Self::parse(der)?;
        let now = now
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_err(|_| IdentityError::NotValidNow)?;
        let now = i64::try_from(now.as_secs()).map_err(|_| IdentityError::NotValidNow)?;
        let validity = cert.validity();
        if now < validity.not_before.timestamp() || now > validity.not_after.timestamp() {
            return Err(IdentityError::NotValidNow);
        }
        Ok(identity)
    }

    fn parse(der: &[u8]) -> Result<(Self, X509Certificate<'_>), IdentityError> {
        let (_, cert) = x509_parser::parse_x509_certificate(der).map_err(|_| IdentityError::Malformed)?;
        let (role, id) = role_of(&cert)?;
        Ok((
            PeerIdentity {
                role,
                id,
                fingerprint: fingerprint(der),
            },
            cert,
        ))
    }
}

/// Seconds until a certificate ends; negative when it has.
pub(super) fn seconds_left(der: &[u8], now: SystemTime) -> Result<i64, IdentityError> {
    let (_, cert) = x509_parser::parse_x509_certificate(der).map_err(|_| IdentityError::Malformed)?;
    let now = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_err(|_| IdentityError::NotValidNow)?;
    let now = i64::try_from(now.as_secs()).map_err(|_| IdentityError::NotValidNow)?;
    Ok(cert.validity().not_after.timestamp().saturating_sub(now))
}

/// SHA-256 of a certificate in DER, lower-case hex.
pub fn fingerprint(der: &[u8]) -> String {
    hex::encode(Sha256::digest(der))
}

/// Which side of a connection a certificate is used on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Server,
}

/// Checks role and extended key usage of a certificate whose chain has been verified.
pub(super) fn check(der: &[u8], side: Side, accept: &[Role]) -> Result<PeerIdentity, IdentityError> {
    let (identity, cert) = PeerIdentity::parse(der)?;
    // A certificate without the extension could be used for anything; ours always have it.
    let usage = cert.extended_key_usage().map_err(|_| IdentityError::Malformed)?;
    let (allowed, name) = match side {
        Side::Client => (usage.as_ref().is_some_and(|usage| usage.value.client_auth), "client"),
        Side::Server => (usage.as_ref().is_some_and(|usage| usage.value.server_auth), "server"),
    };
    if !allowed {
        return Err(IdentityError::Usage(name));
    }
    if !accept.contains(&identity.role) {
        let expected = accept.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(" or ");
        return Err(IdentityError::WrongRole {
            got: identity.role,
            expected,
        });
    }
    Ok(identity)
}

fn role_of(cert: &X509Certificate<'_>) -> Result<(Role, Option<String>), IdentityError> {
    let names = cert.subject_alternative_name().map_err(|_| IdentityError::Malformed)?;
    let mut ours = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            // The scheme is compared without case, as URIs have it, so that a second role cannot hide behind capitals.
            GeneralName::URI(uri) if uri.get(..4).is_some_and(|scheme| scheme.eq_ignore_ascii_case("gse:")) => {
                Some(*uri)
            }
            _ => None,
        });
    let first = ours.next().ok_or(IdentityError::NoRole)?;
    let more = ours.count();
    if more > 0 {
        return Err(IdentityError::ManyRoles(more + 1));
    }
    let rest = first
        .strip_prefix(SCHEME)
        .ok_or_else(|| IdentityError::UnknownRole(clip(first)))?;
    match rest.split_once('/') {
        None => Ok((rest.parse()?, None)),
        Some((role, id)) => Ok((role.parse()?, Some(decode_id(id)?))),
    }
}

/// Percent-encodes an id for a URI's path: everything but letters, digits and `-._~`.
pub fn encode_id(id: &str) -> String {
    use fmt::Write;
    let mut out = String::with_capacity(id.len());
    for byte in id.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _infallible = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// Decodes what [`encode_id`] made. Refuses empty and over-long ids, control characters, and anything not encoded properly.
pub fn decode_id(text: &str) -> Result<String, IdentityError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let digits = rest.next().and_then(hex_digit).zip(rest.next().and_then(hex_digit));
                let (high, low) = digits.ok_or(IdentityError::BadId("bad percent-encoding"))?;
                bytes.push(high << 4 | low);
            }
            b'/' | b'?' | b'#' => return Err(IdentityError::BadId("more than one path segment")),
            other => bytes.push(other),
        }
    }
    let id = String::from_utf8(bytes).map_err(|_| IdentityError::BadId("not UTF-8"))?;
    check_id(&id)?;
    Ok(id)
}

/// Whether a text can be an id in a certificate.
pub(crate) fn check_id(id: &str) -> Result<(), IdentityError> {
    if id.is_empty() {
        return Err(IdentityError::BadId("empty"));
    }
    if id.chars().count() > MAX_ID {
        return Err(IdentityError::BadId("longer than 64 characters"));
    }
    if id.chars().any(char::is_control) {
        return Err(IdentityError::BadId("contains control characters"));
    }
    Ok(())
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

fn clip(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ids_are_percent_encoded_in_the_uri() {
        assert_eq!(Role::Agent.uri(Some("0:10.0.0.1")), "gse://agent/0%3A10.0.0.1");
        assert_eq!(Role::Agent.uri(None), "gse://agent");
        assert_eq!(decode_id("0%3A10.0.0.1").unwrap(), "0:10.0.0.1");
        assert_eq!(decode_id("a%2fb").unwrap(), "a/b");
    }

    #[test]
    fn unusable_ids_are_refused() {
        for bad in [
            "",
            "%",
            "%4",
            "%zz",
            "%+1",
            "a/b",
            "a?b",
            "%00",
            "%0A",
            "%FF",
            &"x".repeat(65),
        ] {
            assert!(decode_id(bad).is_err(), "{bad:?} was taken");
        }
        assert!(decode_id(&"x".repeat(64)).is_ok());
    }

    proptest! {
        #[test]
        fn every_id_survives_the_uri(id in "[^\\p{Cc}]{1,64}") {
            prop_assert_eq!(decode_id(&encode_id(&id)).unwrap(), id);
        }
        #[test]
        fn decoding_never_panics(text in ".{0,80}") {
            if let Ok(id) = decode_id(&text) {
                prop_assert!(!id.is_empty());
            }
        }
    }
}
