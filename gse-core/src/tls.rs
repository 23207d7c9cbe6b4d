//! TLS on our own links, and on the listeners that platforms call.
//!
//! Every link between our own processes is TLS 1.3 with a certificate on both sides, issued by the site's one authority (see
//! [`crate::certs`]). A certificate says what its holder *is* by one URI among its subject alternative names: `gse://server`,
//! `gse://api-client`, `gse://operator`, `gse://agent` (the fleet's shared certificate) or `gse://agent/<percent-encoded agent id>`.
//! Host names are not checked on these links: agents are given addresses, and addresses move; the role is what is checked instead,
//! on both sides, inside the handshake, so that a stolen agent key opens neither a listener nor an internal call.
//!
//! What an identity is *allowed* to do is left to [`crate::authz`] and to the session layer.

mod files;
mod identity;
mod tickets;
mod verify;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustls::crypto::CryptoProvider;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, CommonState, RootCertStore, ServerConfig};
use serde::{Deserialize, Serialize};

pub(crate) use identity::check_id;
pub use identity::{IdentityError, PeerIdentity, Role, decode_id, encode_id, fingerprint};

/// How many client sessions one client configuration remembers.
const CLIENT_SESSIONS: usize = 256;

/// The files a process proves itself with, all PEM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// Certificates of the authority; more than one while it is being replaced.
    pub ca: PathBuf,
    /// Own certificate, leaf first.
    pub cert: PathBuf,
    /// Own private key; should be readable by its owner only.
    pub key: PathBuf,
}

impl TlsFiles {
    /// What the own certificate says its holder is. Reads the file.
    pub fn identity(&self) -> Result<PeerIdentity, TlsError> {
        identity_of_file(&self.cert)
    }
}

/// Why a TLS configuration cannot be made or a peer not be named. Never contains key material.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file cannot be read.
    #[error("cannot read {what} {path}: {source}", path = .path.display())]
    Read {
        /// What the file is to us.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is there but holds nothing usable.
    #[error("{what} {path} holds no usable PEM: {reason}", path = .path.display())]
    Content {
        /// What the file is to us.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why, without the content.
        reason: String,
    },
    /// Certificate and key do not belong together.
    #[error("certificate {cert} and private key {key} do not belong together; issue the pair anew (gse certs)", cert = .cert.display(), key = .key.display())]
    Mismatch {
        /// The certificate file.
        cert: PathBuf,
        /// The key file.
        key: PathBuf,
    },
    /// A server configuration that would accept nobody.
    #[error("no role is accepted: the listener would refuse every peer")]
    NoRoles,
    /// The certificate says nothing or the wrong thing about its holder.
    #[error("certificate of the peer: {0}")]
    Identity(#[from] IdentityError),
    /// The TLS library refuses the configuration.
    #[error("TLS configuration: {0}")]
    Rustls(#[from] rustls::Error),
    /// No certificate verifier can be built from the authority's certificates.
    #[error("TLS verifier: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// The one cryptography provider of the project.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    Arc::clone(PROVIDER.get_or_init(|| Arc::new(rustls::crypto::ring::default_provider())))
}

/// A listener of our own links: TLS 1.3 only, a certificate of one of the roles `accept` required, session tickets on.
///
/// Reads the files (blocking, small); build it again to take new files into use.
pub fn server_config(files: &TlsFiles, accept: &[Role], alpn: &[&[u8]]) -> Result<Arc<ServerConfig>, TlsError> {
    if accept.is_empty() {
        return Err(TlsError::NoRoles);
    }
    let verifier = verify::PeerOfServer::new(files::roots(&files.ca)?, accept)?;
    warn_of_own(files, Some(Role::Server))?;
    let key = files::key(&files.key)?;
    let tickets = tickets::Tickets::new(key.secret_der(), &files::authorities(&files.ca)?, accept);
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(files::chain(&files.cert)?, key)
        .map_err(|error| pair_error(error, &files.cert, &files.key))?;
    // The ticket carries the client's certificate, so a resumed session still knows its peer.
    config.ticketer = tickets;
    // Our clients keep one.
    config.send_tls13_tickets = 1;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(Arc::new(config))
}

/// A dialler of our own links: TLS 1.3 only, own certificate shown, the server's chain and role checked (not its name), resumption on.
pub fn client_config(files: &TlsFiles, expect: Role, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, TlsError> {
    let verifier = verify::PeerOfClient::new(files::roots(&files.ca)?, expect);
    warn_of_own(files, None)?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous() // the rustls name for "own verifier": ours checks chain, validity, key usage and role
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(files::chain(&files.cert)?, files::key(&files.key)?)
        .map_err(|error| pair_error(error, &files.cert, &files.key))?;
    config.resumption = rustls::client::Resumption::in_memory_sessions(CLIENT_SESSIONS);
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(Arc::new(config))
}

/// The two ends of a link between equals (file peers): TLS 1.3 only, certificates on both sides, of one of the roles `accept`. No
/// session is resumed: each link is bound to its own handshake.
pub fn peer_configs(
    files: &TlsFiles,
    accept: &[Role],
    alpn: &[&[u8]],
) -> Result<(Arc<ServerConfig>, Arc<ClientConfig>), TlsError> {
    if accept.is_empty() {
        return Err(TlsError::NoRoles);
    }
    warn_of_own(files, None)?;
    let roots = files::roots(&files.ca)?;
    let mut server = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verify::PeerOfServer::new(Arc::clone(&roots), accept)?))
        .with_single_cert(files::chain(&files.cert)?, files::key(&files.key)?)
        .map_err(|error| pair_error(error, &files.cert, &files.key))?;
    server.send_tls13_tickets = 0;
    server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    server.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let mut client = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous() // the rustls name for "own verifier": ours checks chain, validity, key usage and role
        .with_custom_certificate_verifier(Arc::new(verify::PeerOfPeer::new(roots, accept)?))
        .with_client_auth_cert(files::chain(&files.cert)?, files::key(&files.key)?)
        .map_err(|error| pair_error(error, &files.cert, &files.key))?;
    client.resumption = rustls::client::Resumption::disabled();
    client.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok((Arc::new(server), Arc::new(client)))
}

/// A northbound HTTPS listener: TLS 1.2 and 1.3, no client certificate, HTTP/2 and HTTP/1.1.
pub fn http_server_config(cert: &Path, key: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_no_client_auth()
        .with_single_cert(files::chain(cert)?, files::key(key)?)
        .map_err(|error| pair_error(error, cert, key))?;
    config.ticketer = rustls::crypto::ring::Ticketer::new()?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// A client of somebody else's HTTPS server: the roots are those of the file and no others, names are checked as usual.
/// Application protocols are left to the HTTP client.
pub fn https_client_config(ca: &Path) -> Result<ClientConfig, TlsError> {
    Ok(ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_root_certificates(files::roots(ca)?)
        .with_no_client_auth())
}

/// The constant name our own links are dialled with; it is not checked.
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from("server.gse.internal").expect("a constant and well-formed DNS name")
}

/// Who the peer of a finished handshake is, a resumed one included. The validity of its certificate is looked at again here, because
/// a ticket may outlive it.
pub fn identity_of(conn: &CommonState) -> Result<PeerIdentity, TlsError> {
    let chain = conn.peer_certificates().ok_or(IdentityError::NoCertificate)?;
    let leaf = chain.first().ok_or(IdentityError::NoCertificate)?;
    Ok(PeerIdentity::of_valid_certificate(leaf, std::time::SystemTime::now())?)
}

/// What the certificate in a PEM file says its holder is, expired or not.
pub fn identity_of_file(cert: &Path) -> Result<PeerIdentity, TlsError> {
    let chain = files::chain(cert)?;
    let leaf = chain.first().ok_or(IdentityError::NoCertificate)?;
    Ok(PeerIdentity::of_certificate(leaf)?)
}

/// Says early what would otherwise be found out from refused handshakes: an own certificate that ends soon or is of the wrong kind.
fn warn_of_own(files: &TlsFiles, role: Option<Role>) -> Result<(), TlsError> {
    const SOON_DAYS: i64 = 30;
    let chain = files::chain(&files.cert)?;
    let leaf = chain.first().ok_or(IdentityError::NoCertificate)?;
    let path = files.cert.display();
    match PeerIdentity::of_certificate(leaf) {
        Ok(own) if role.is_some_and(|role| role != own.role) => {
            tracing::warn!(%path, role = %own.role, "this listener's certificate is not a server's; our clients will refuse it");
        }
        Ok(_) => {}
        Err(error) => tracing::warn!(%path, %error, "our peers will refuse this certificate"),
    }
    let left = identity::seconds_left(leaf, std::time::SystemTime::now())?;
    if left < 0 {
        tracing::error!(%path, "this certificate has expired; every peer will refuse it; issue a new one (gse certs)");
    } else if left < SOON_DAYS * 86_400 {
        tracing::warn!(%path, days = left / 86_400, "this certificate ends soon; issue a new one (gse certs) and reload");
    }
    Ok(())
}

fn pair_error(error: rustls::Error, cert: &Path, key: &Path) -> TlsError {
    match error {
        rustls::Error::InconsistentKeys(_) => TlsError::Mismatch {
            cert: cert.to_path_buf(),
            key: key.to_path_buf(),
        },
        other => TlsError::Rustls(other),
    }
}

fn root_store(certs: Vec<rustls::pki_types::CertificateDer<'static>>, path: &Path) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for cert in certs {
        store.add(cert).map_err(|error| TlsError::Content {
            what: "authority certificate",
            path: path.to_path_buf(),
            reason: error.to_string(),
        })?;
    }
    Ok(store)
}

#[cfg(test)]
mod tests;
