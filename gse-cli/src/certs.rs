//! `gse certs`: the authority and its certificates, as files with the contract's names. What is in a certificate is gse-core's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use gse_core::certs::{Authority, CertsError, LEAF_DAYS, names};
use gse_core::tls::Role;
use gse_proto::ids::AgentId;

use crate::args::{CertsArgs, CertsCommand, DataDir};
use crate::client::data_dir;

/// Below the authority's directory: one directory for each agent.
const AGENTS: &str = "agents";

/// Makes what was asked for and says what was written.
///
/// # Errors
/// Something is there already, or cannot be written.
pub fn run(args: &CertsArgs) -> anyhow::Result<()> {
    let dir = match &args.dir {
        Some(dir) => dir.clone(),
        None => data_dir(&DataDir {
            data: std::env::var_os("GSE_DATA").map(PathBuf::from),
        })?
        .join("tls"),
    };
    for path in make(args, &dir).map_err(advise)? {
        crate::out::print(&format!("{}\n", path.display()))?;
    }
    Ok(())
}

/// Says how to go on, where the library cannot know it.
fn advise(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref::<CertsError>() {
        Some(CertsError::Exists(path)) => anyhow::anyhow!("{} exists already; --force replaces it", path.display()),
        _ => error,
    }
}

fn make(args: &CertsArgs, dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let days = args.days.unwrap_or(LEAF_DAYS);
    let leaf = |role, id: Option<&str>, names: &[String], into: &Path| -> anyhow::Result<Vec<PathBuf>> {
        let authority = Authority::open(dir)?;
        let (cert, key) = gse_core::certs::names::pair(role);
        let (cert, key) = (into.join(cert), into.join(key));
        if args.force {
            authority.reissue(role, id, names, &cert, &key, days)?;
        } else {
            authority.issue(role, id, names, &cert, &key, days)?;
        }
        Ok(vec![cert, key])
    };
    match &args.what {
        CertsCommand::Init => {
            if args.force {
                Authority::recreate(dir)?;
            } else {
                Authority::create(dir)?;
            }
            Ok(vec![dir.join(names::CA_CERT), dir.join(names::CA_KEY)])
        }
        CertsCommand::Agent { id: None, .. } => leaf(Role::Agent, None, &[], dir),
        CertsCommand::Agent { id: Some(id), .. } => {
            let id = AgentId::parse(id).with_context(|| format!("\"{}\" is no agent id", crate::text::one_line(id)))?;
            let into = dir.join(AGENTS).join(directory_of(id.as_str()));
            let mut written = leaf(Role::Agent, Some(id.as_str()), &[], &into)?;
            written.insert(0, copy_ca(dir, &into)?);
            Ok(written)
        }
        CertsCommand::Server { name } => leaf(Role::Server, None, name, dir),
        CertsCommand::ApiClient { name } => leaf(Role::ApiClient, name.as_deref(), &[], dir),
        CertsCommand::Operator { name } => leaf(Role::Operator, name.as_deref(), &[], dir),
    }
}

/// The directory has all that the agent needs, so that it can be copied to the host as it is.
fn copy_ca(from: &Path, into: &Path) -> anyhow::Result<PathBuf> {
    let target = into.join(names::CA_CERT);
    let copy = || -> io::Result<()> {
        let pem = fs::read(from.join(names::CA_CERT))?;
        if fs::read(&target).is_ok_and(|there| there == pem) {
            return Ok(());
        }
        fs::write(&target, pem)
    };
    copy().with_context(|| format!("cannot write {}", target.display()))?;
    Ok(target)
}

/// A directory name for an agent id: ids may hold a slash or begin with a dot, names of directories may not.
fn directory_of(id: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || ":-_".contains(c);
    let mut out = String::with_capacity(id.len());
    for (at, c) in id.char_indices() {
        if safe(c) || (c == '.' && at > 0) {
            out.push(c);
        } else {
            let mut buffer = [0; 4];
            for byte in c.encode_utf8(&mut buffer).bytes() {
                out.push('%');
                out.push_str(&hex::encode_upper([byte]));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_become_harmless_directory_names() {
        assert_eq!(directory_of("0:10.0.0.1"), "0:10.0.0.1");
        assert_eq!(directory_of(".."), "%2E.");
        assert_eq!(directory_of("../../x"), "%2E.%2F..%2Fx");
        assert_eq!(directory_of("ü"), "%C3%BC");
    }
}
