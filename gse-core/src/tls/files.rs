//! Reading certificates and keys from PEM files, with errors that name the file and never its content.

use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::TlsError;

/// No file of ours comes near this; a larger one is a mistake in the configuration.
const MAX_FILE: u64 = 1024 * 1024;

/// The certificates of the authority as a root store.
pub(super) fn roots(path: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    super::root_store(authorities(path)?, path).map(Arc::new)
}

/// The certificates of the authority.
pub(super) fn authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    certificates("authority certificate", path)
}

/// A certificate chain, leaf first.
pub(super) fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    certificates("certificate", path)
}

/// A private key (PKCS#8, PKCS#1 or SEC1). A key that others can read is used, but said so.
pub(super) fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    const WHAT: &str = "private key";
    let pem = read(WHAT, path)?;
    warn_if_readable_by_others(path);
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| TlsError::Content {
        what: WHAT,
        path: path.to_path_buf(),
        reason: reason(&error),
    })
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let content = |reason: String| TlsError::Content {
        what,
        path: path.to_path_buf(),
        reason,
    };
    let pem = read(what, path)?;
    let certs = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| content(reason(&error)))?;
    if certs.is_empty() {
        return Err(content("no CERTIFICATE section".to_owned()));
    }
    Ok(certs)
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let fail = |source| TlsError::Read {
        what,
        path: path.to_path_buf(),
        source,
    };
    let size = std::fs::metadata(path).map_err(fail)?.len();
    if size > MAX_FILE {
        return Err(TlsError::Content {
            what,
            path: path.to_path_buf(),
            reason: format!("{size} bytes is too large for it"),
        });
    }
    std::fs::read(path).map_err(fail)
}

/// The PEM library's errors can quote the section's bytes; these do not.
fn reason(error: &rustls::pki_types::pem::Error) -> String {
    use rustls::pki_types::pem::Error;
    match error {
        Error::NoItemsFound => "no section of the right kind",
        Error::MissingSectionEnd { .. } => "a section has no END line",
        Error::IllegalSectionStart { .. } => "a section's BEGIN line is malformed",
        Error::Base64Decode(_) => "a section is not valid base64",
        _ => "it is malformed",
    }
    .to_owned()
}

fn warn_if_readable_by_others(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    if let Ok(meta) = std::fs::metadata(path)
        && meta.permissions().mode() & 0o077 != 0
    {
        tracing::warn!(path = %path.display(), mode = format!("{:03o}", meta.permissions().mode() & 0o777), "private key is accessible to other accounts; chmod 600 it");
    }
}
