//! The site's certificate authority: makes the CA and issues the certificates of servers, agents, API clients and operators.
//!
//! P-256 keys, X.509 with the role as a URI (see [`crate::tls`]) and only the key usages the role needs. Files have the contract's
//! names, keys are mode 0600, directories 0700; everything is written to the side and put in place in one step. Nothing that exists
//! is overwritten unless the caller asks for it by name. All calls are blocking and take milliseconds.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber,
};

use crate::tls::{IdentityError, Role};

/// File names of the contract, in one place.
pub mod names {
    use crate::tls::Role;

    /// The authority's certificate.
    pub const CA_CERT: &str = "gseca.crt";
    /// The authority's private key.
    pub const CA_KEY: &str = "gseca.key";

    /// Certificate and key file of a role.
    pub const fn pair(role: Role) -> (&'static str, &'static str) {
        match role {
            Role::Agent => ("gse_agent.crt", "gse_agent.key"),
            Role::Server => ("gse_server.crt", "gse_server.key"),
            Role::ApiClient => ("gse_api_client.crt", "gse_api_client.key"),
            Role::Operator => ("gse_operator.crt", "gse_operator.key"),
        }
    }
}

/// Days an issued certificate is valid when nobody says otherwise.
pub const LEAF_DAYS: u32 = 825;
/// Days the authority itself is valid.
pub const CA_DAYS: u32 = 3650;

const DAY: Duration = Duration::from_secs(24 * 3600);
/// Certificates start a little in the past, because clocks differ.
const BACKDATE: Duration = Duration::from_secs(3600);

/// Why a certificate could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    /// Something is there already and overwriting was not asked for.
    #[error("{path} exists already and is not overwritten; ask for a replacement if that is meant", path = .0.display())]
    Exists(PathBuf),
    /// The authority is not there, or only half of it.
    #[error("no certificate authority in {dir}: {missing} is missing (gse certs init makes one)", dir = .dir.display())]
    Missing {
        /// The directory looked into.
        dir: PathBuf,
        /// The file that is not there.
        missing: &'static str,
    },
    /// A file operation failed.
    #[error("cannot {doing} {path}: {source}", path = .path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The authority's files are not usable.
    #[error("certificate authority in {dir} is unusable: {reason}", dir = .dir.display())]
    Unusable {
        /// The directory.
        dir: PathBuf,
        /// Why, without key material.
        reason: String,
    },
    /// The id cannot stand in a certificate.
    #[error("id cannot stand in a certificate: {0}")]
    Id(#[from] IdentityError),
    /// A host name or address cannot stand in a certificate.
    #[error("{0:?} is neither a host name nor an IP address")]
    Name(String),
    /// The validity makes no sense.
    #[error("validity has to be between 1 and {CA_DAYS} days, got {0}")]
    Days(u32),
    /// The certificate library refused.
    #[error("cannot make the certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// What an issued certificate says.
#[derive(Debug, Clone)]
pub struct Leaf<'a> {
    /// The role of its holder.
    pub role: Role,
    /// The agent's id, or a name of an API client or operator.
    pub id: Option<&'a str>,
    /// Host names and addresses, for HTTPS listeners.
    pub names: &'a [String],
    /// Start of the validity.
    pub not_before: SystemTime,
    /// End of the validity.
    pub not_after: SystemTime,
}

/// An issued certificate with its key, as PEM. Not printable, so that the key does not get into a log.
pub struct Pair {
    /// The certificate.
    pub cert_pem: String,
    /// The private key (PKCS#8).
    pub key_pem: String,
}

/// The certificate authority, with its private key in memory.
pub struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    cert_pem: String,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("dir", &self.dir)
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a new authority in `dir` (made if need be) and refuses if there is one.
    pub fn create(dir: impl AsRef<Path>) -> Result<Self, CertsError> {
        Self::locked(dir.as_ref(), |dir| Self::make(dir, Existing::Keep))
    }

    /// Makes a new authority in `dir` in place of the one there: every certificate issued so far becomes worthless.
    pub fn recreate(dir: impl AsRef<Path>) -> Result<Self, CertsError> {
        Self::locked(dir.as_ref(), |dir| Self::make(dir, Existing::Replace))
    }

    /// Opens the authority of `dir`.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, CertsError> {
        Self::read(dir.as_ref())
    }

    /// Opens the authority of `dir`, or makes it if there is none. Safe to be called by several processes at once.
    pub fn open_or_create(dir: impl AsRef<Path>) -> Result<Self, CertsError> {
        Self::locked(dir.as_ref(), |dir| {
            if dir.join(names::CA_CERT).exists() || dir.join(names::CA_KEY).exists() {
                Self::read(dir)
            } else {
                Self::make(dir, Existing::Keep)
            }
        })
    }

    /// Where the authority's certificate is; this file is what peers are given as `ca`.
    pub fn ca_path(&self) -> PathBuf {
        self.dir.join(names::CA_CERT)
    }

    /// The authority's certificate as PEM.
    pub fn ca_pem(&self) -> &str {
        &self.cert_pem
    }

    /// Issues a certificate valid for `days` and writes it with its key. Refuses if either file exists.
    pub fn issue(
        &self,
        role: Role,
        id: Option<&str>,
        names: &[String],
        cert_path: &Path,
        key_path: &Path,
        days: u32,
    ) -> Result<(), CertsError> {
        self.issue_files(role, id, names, (cert_path, key_path), days, Existing::Keep)
    }

    /// As [`Self::issue`], in place of what is there.
    pub fn reissue(
        &self,
        role: Role,
        id: Option<&str>,
        names: &[String],
        cert_path: &Path,
        key_path: &Path,
        days: u32,
    ) -> Result<(), CertsError> {
        self.issue_files(role, id, names, (cert_path, key_path), days, Existing::Replace)
    }

    /// Issues a certificate without writing anything.
    pub fn sign(&self, leaf: &Leaf<'_>) -> Result<Pair, CertsError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let cert = leaf_params(leaf)?.signed_by(&key, &self.issuer)?;
        Ok(Pair {
            cert_pem: cert.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    fn issue_files(
        &self,
        role: Role,
        id: Option<&str>,
        names: &[String],
        (cert_path, key_path): (&Path, &Path),
        days: u32,
        existing: Existing,
    ) -> Result<(), CertsError> {
        if days == 0 || days > CA_DAYS {
            return Err(CertsError::Days(days));
        }
        if existing == Existing::Keep {
            refuse_existing(&[cert_path, key_path])?;
        }
        let now = SystemTime::now();
        let leaf = Leaf {
            role,
            id,
            names,
            not_before: now - BACKDATE,
            not_after: now + DAY * days,
        };
        let pair = self.sign(&leaf)?;
        for path in [cert_path, key_path] {
            make_parent(path)?;
        }
        write_file(key_path, pair.key_pem.as_bytes(), 0o600, existing)?;
        write_file(cert_path, pair.cert_pem.as_bytes(), 0o644, existing)
    }

    fn make(dir: &Path, existing: Existing) -> Result<Self, CertsError> {
        let (cert_path, key_path) = (dir.join(names::CA_CERT), dir.join(names::CA_KEY));
        if existing == Existing::Keep {
            refuse_existing(&[&cert_path, &key_path])?;
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + DAY * CA_DAYS).into();
        params.serial_number = Some(serial());
        params.distinguished_name = name("GSE site authority", None);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let cert_pem = params.self_signed(&key)?.pem();
        write_file(&key_path, key.serialize_pem().as_bytes(), 0o600, existing)?;
        write_file(&cert_path, cert_pem.as_bytes(), 0o644, existing)?;
        Ok(Authority {
            dir: dir.to_path_buf(),
            issuer: Issuer::new(params, key),
            cert_pem,
        })
    }

    fn read(dir: &Path) -> Result<Self, CertsError> {
        let load = |file: &'static str| {
            let path = dir.join(file);
            fs::read_to_string(&path).map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => CertsError::Missing {
                    dir: dir.to_path_buf(),
                    missing: file,
                },
                _ => CertsError::Io {
                    doing: "read",
                    path,
                    source,
                },
            })
        };
        let unusable = |reason: String| CertsError::Unusable {
            dir: dir.to_path_buf(),
            reason,
        };
        let cert_pem = load(names::CA_CERT)?;
        let key = KeyPair::from_pem(&load(names::CA_KEY)?)
            .map_err(|_| unusable(format!("{} is not a private key in PEM", names::CA_KEY)))?;
        let public = rcgen::PublicKeyData::der_bytes(&key).to_vec();
        check_authority(&cert_pem, &public).map_err(|reason| unusable(reason.to_owned()))?;
        let issuer = Issuer::from_ca_cert_pem(&cert_pem, key)?;
        Ok(Authority {
            dir: dir.to_path_buf(),
            issuer,
            cert_pem,
        })
    }

    /// Runs `work` while holding the directory's lock, so that two processes do not make two authorities.
    fn locked<T>(dir: &Path, work: impl FnOnce(&Path) -> Result<T, CertsError>) -> Result<T, CertsError> {
        make_dir(dir)?;
        let path = dir.join(".gseca.lock");
        let fail = |source| CertsError::Io {
            doing: "lock",
            path: path.clone(),
            source,
        };
        let lock = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(fail)?;
        lock.lock().map_err(fail)?;
        work(dir) // the lock goes with the file
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Existing {
    Keep,
    Replace,
}

fn leaf_params(leaf: &Leaf<'_>) -> Result<CertificateParams, CertsError> {
    if let Some(id) = leaf.id {
        crate::tls::check_id(id)?;
    }
    let mut params = CertificateParams::default();
    params.not_before = leaf.not_before.into();
    params.not_after = leaf.not_after.into();
    params.serial_number = Some(serial());
    params.distinguished_name = name(&format!("gse {}", leaf.role), leaf.id);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params.extended_key_usages = match leaf.role {
        Role::Server => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        Role::Agent | Role::ApiClient | Role::Operator => vec![ExtendedKeyUsagePurpose::ClientAuth],
    };
    let text = |text: &str| text.try_into().map_err(|_| CertsError::Name(text.to_owned()));
    params
        .subject_alt_names
        .push(SanType::URI(text(&leaf.role.uri(leaf.id))?));
    for name in leaf.names {
        params.subject_alt_names.push(match name.parse() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) if is_host_name(name) => SanType::DnsName(text(name)?),
            Err(_) => return Err(CertsError::Name(name.clone())),
        });
    }
    Ok(params)
}

fn is_host_name(name: &str) -> bool {
    let name = name.strip_prefix("*.").unwrap_or(name);
    name.len() <= 253
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

fn name(common: &str, id: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "GSE");
    // X.520 allows 64 characters in a common name; the id proper is in the URI.
    let common = id.map_or_else(|| common.to_owned(), |id| format!("{common} {id}"));
    name.push(DnType::CommonName, common.chars().take(64).collect::<String>());
    name
}

/// 16 random bytes, positive and without a leading zero, as serial numbers have to be.
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn check_authority(cert_pem: &str, public_key: &[u8]) -> Result<(), &'static str> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(cert_pem.as_bytes()).map_err(|_| "its certificate is not PEM")?;
    let cert = pem.parse_x509().map_err(|_| "its certificate cannot be parsed")?;
    if !cert.is_ca() {
        return Err("its certificate is not that of an authority");
    }
    if !cert.validity().is_valid() {
        return Err("its certificate has expired or is not valid yet");
    }
    if &*cert.public_key().subject_public_key.data != public_key {
        return Err("its certificate and its key do not belong together");
    }
    Ok(())
}

fn refuse_existing(paths: &[&Path]) -> Result<(), CertsError> {
    match paths.iter().find(|path| path.symlink_metadata().is_ok()) {
        Some(path) => Err(CertsError::Exists(path.to_path_buf())),
        None => Ok(()),
    }
}

fn make_parent(path: &Path) -> Result<(), CertsError> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => make_dir(parent),
        _ => Ok(()),
    }
}

fn make_dir(dir: &Path) -> Result<(), CertsError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| CertsError::Io {
            doing: "create the directory",
            path: dir.to_path_buf(),
            source,
        })
}

/// Writes a file to the side, syncs it and puts it in place in one step: by link (which fails if the name is taken) or by rename.
fn write_file(path: &Path, content: &[u8], mode: u32, existing: Existing) -> Result<(), CertsError> {
    let fail = |doing| {
        move |source| CertsError::Io {
            doing,
            path: path.to_path_buf(),
            source,
        }
    };
    let mut side = path.as_os_str().to_owned();
    side.push(format!(".{:016x}.tmp", rand::random::<u64>()));
    let side = PathBuf::from(side);
    let place = || {
        let mut file = fs::OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(mode)
            .open(&side)?;
        file.write_all(content)?;
        file.sync_all()?;
        match existing {
            Existing::Replace => fs::rename(&side, path),
            Existing::Keep => fs::hard_link(&side, path),
        }
    };
    let placed: io::Result<()> = place();
    let removed = fs::remove_file(&side);
    match placed {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(CertsError::Exists(path.to_path_buf()));
        }
        Err(error) => return Err(fail("write")(error)),
    }
    if existing == Existing::Keep {
        removed.map_err(fail("finish"))?;
    }
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::File::open(parent)
        .and_then(|dir| dir.sync_all())
        .map_err(fail("sync the directory of"))
}

#[cfg(test)]
mod tests;
