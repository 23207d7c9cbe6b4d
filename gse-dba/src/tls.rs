//! TLS of the RESP listener: a certificate for the server, and certificates of clients where an authority for them is configured. The password is asked for in any case.
//! And TLS to the servers behind: their certificates are verified, and ours is shown where one is configured.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::config::Tls;
use crate::config::sharded::BackTls;

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .with_context(|| format!("cannot read the certificates in {}", path.display()))?
        .collect();
    let all = all.with_context(|| format!("{} holds something that is no certificate", path.display()))?;
    anyhow::ensure!(!all.is_empty(), "{} holds no certificate", path.display());
    Ok(all)
}

/// Reads the files. Blocking.
pub(crate) fn server(files: &Tls) -> anyhow::Result<Arc<ServerConfig>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .with_context(|| format!("cannot read the private key in {}", files.key.display()))?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let builder = match &files.ca {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(ca)? {
                roots
                    .add(certificate)
                    .with_context(|| format!("{} holds a certificate that cannot be an authority", ca.display()))?;
            }
            builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?,
            )
        }
    };
    let config = builder
        .with_single_cert(certificates(&files.cert)?, key)
        .with_context(|| {
            format!(
                "{} and {} do not belong together",
                files.cert.display(),
                files.key.display()
            )
        })?;
    Ok(Arc::new(config))
}

/// How servers behind are spoken to over TLS.
pub(crate) struct Outward {
    connector: TlsConnector,
    /// The same for what is asked beside the data.
    pub(crate) pem: redis::TlsCertificates,
}

impl Outward {
    /// Reads the files. Blocking.
    pub(crate) fn read(files: &BackTls) -> anyhow::Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&files.ca)? {
            roots
                .add(certificate)
                .with_context(|| format!("{} holds a certificate that cannot be an authority", files.ca.display()))?;
        }
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let bytes = |path: &Path| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let (config, client_tls) = match (&files.cert, &files.key) {
            (Some(cert), Some(key)) => {
                let private = PrivateKeyDer::from_pem_file(key)
                    .with_context(|| format!("cannot read the private key in {}", key.display()))?;
                let config = builder
                    .with_client_auth_cert(certificates(cert)?, private)
                    .with_context(|| format!("{} and {} do not belong together", cert.display(), key.display()))?;
                let own = redis::ClientTlsConfig {
                    client_cert: bytes(cert)?,
                    client_key: bytes(key)?,
                };
                (config, Some(own))
            }
            (None, None) => (builder.with_no_client_auth(), None),
            _ => anyhow::bail!("of sharded.tls.cert and sharded.tls.key only one is set"),
        };
        Ok(Self {
            connector: TlsConnector::from(Arc::new(config)),
            pem: redis::TlsCertificates {
                client_tls,
                root_cert: Some(bytes(&files.ca)?),
            },
        })
    }

    /// Makes sure who is there.
    pub(crate) async fn shake(&self, host: &str, stream: TcpStream) -> anyhow::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(host.to_owned())
            .with_context(|| format!("{host:?} is no name that a certificate can have"))?;
        self.connector
            .connect(name, stream)
            .await
            .with_context(|| format!("the TLS handshake with {host} failed"))
    }
}
