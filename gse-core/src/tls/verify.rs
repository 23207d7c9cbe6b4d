//! The two certificate verifiers of our own links: chain, validity and key usage by webpki, then the role.
//!
//! A refusal is logged with its reason and the fingerprint of what was shown; a peer only ever sees a TLS alert.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore, SignatureScheme,
};

use super::identity::{self, IdentityError, Side, fingerprint};
use super::{Role, TlsError, provider};

/// Verifies the peers that dial a listener.
#[derive(Debug)]
pub(super) struct PeerOfServer {
    webpki: Arc<dyn ClientCertVerifier>,
    accept: Vec<Role>,
}

impl PeerOfServer {
    pub(super) fn new(roots: Arc<RootCertStore>, accept: &[Role]) -> Result<Self, TlsError> {
        let webpki = WebPkiClientVerifier::builder_with_provider(roots, provider()).build()?;
        Ok(PeerOfServer {
            webpki,
            accept: accept.to_vec(),
        })
    }
}

impl ClientCertVerifier for PeerOfServer {
    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.webpki.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.webpki
            .verify_client_cert(end_entity, intermediates, now)
            .inspect_err(|error| refused("client", end_entity, error))?;
        identity::check(end_entity, Side::Client, &self.accept)
            .map_err(|error| role_error("client", end_entity, error))?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

/// Verifies the server a client has dialled: everything but its name.
#[derive(Debug)]
pub(super) struct PeerOfClient {
    roots: Arc<RootCertStore>,
    expect: Role,
}

impl PeerOfClient {
    pub(super) fn new(roots: Arc<RootCertStore>, expect: Role) -> Self {
        PeerOfClient { roots, expect }
    }
}

impl ServerCertVerifier for PeerOfClient {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let algorithms = provider().signature_verification_algorithms.all;
        ParsedCertificate::try_from(end_entity)
            .and_then(|cert| {
                verify_server_cert_signed_by_trust_anchor(&cert, &self.roots, intermediates, now, algorithms)
            })
            .inspect_err(|error| refused("server", end_entity, error))?;
        identity::check(end_entity, Side::Server, &[self.expect])
            .map_err(|error| role_error("server", end_entity, error))?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Verifies the peer that one of our file peers has dialled. Peers are equals: what counts at both ends is a certificate that may be
/// shown by a client, so that an agent's key opens nothing else by being one of a listener here.
#[derive(Debug)]
pub(super) struct PeerOfPeer(PeerOfServer);

impl PeerOfPeer {
    pub(super) fn new(roots: Arc<RootCertStore>, accept: &[Role]) -> Result<Self, TlsError> {
        PeerOfServer::new(roots, accept).map(Self)
    }
}

impl ServerCertVerifier for PeerOfPeer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.0.verify_client_cert(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

fn refused(side: &str, cert: &CertificateDer<'_>, error: &Error) {
    tracing::warn!(peer = side, fingerprint = %fingerprint(cert), reason = %error, "refused the certificate of a peer");
}

fn role_error(side: &str, cert: &CertificateDer<'_>, error: IdentityError) -> Error {
    tracing::warn!(peer = side, fingerprint = %fingerprint(cert), reason = %error, "refused the certificate of a peer");
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}
