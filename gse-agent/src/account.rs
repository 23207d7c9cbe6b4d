//! Becoming an account of the host for good: what every process does that touches something on an account's behalf. What it does then is
//! the business of scripts ([`crate::exec`]) and files ([`crate::files`]).

use std::ffi::CString;

use nix::unistd::{Uid, User, getresgid, getresuid, initgroups, setresgid, setresuid, setuid};

/// Why this process is not the account.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AccountError {
    /// There is no such account.
    #[error("{0}")]
    Missing(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

fn failed(text: impl Into<String>) -> AccountError {
    AccountError::Failed(text.into())
}

/// Looks an account up.
///
/// # Errors
/// When there is none, or it can't be known whether there is.
pub(crate) fn look_up(name: &str) -> Result<User, AccountError> {
    let found = if name.contains('\0') {
        Ok(None)
    } else {
        User::from_name(name)
    };
    match found {
        Ok(Some(user)) => Ok(user),
        Ok(None) => Err(AccountError::Missing(format!(
            "there is no account {name:?} on this host"
        ))),
        // The directory of accounts cannot be asked right now: that is not the same as an account that is not there.
        Err(error) => Err(failed(format!(
            "account {name:?} cannot be looked up: {}",
            error.desc()
        ))),
    }
}

/// Whether this process may become `user`: root may become anybody, everybody else is one already.
///
/// # Errors
/// A sentence that says `what` it cannot do.
pub(crate) fn may_become(user: &User, what: &str) -> Result<(), AccountError> {
    let me = Uid::effective();
    if me.is_root() || me == user.uid {
        return Ok(());
    }
    let own = User::from_uid(me)
        .ok()
        .flatten()
        .map_or_else(|| format!("uid {me}"), |own| own.name);
    Err(failed(format!(
        "the agent runs as {own} and cannot {what} as {}; start it as root for that",
        user.name
    )))
}

fn login(user: &User, what: &str, error: nix::Error) -> AccountError {
    failed(format!("cannot become {}: {what}: {}", user.name, error.desc()))
}

/// Takes on the account's groups, if this process is root.
///
/// # Errors
/// What the system says.
pub(crate) fn take_groups(user: &User) -> Result<(), AccountError> {
    if !Uid::effective().is_root() {
        return Ok(());
    }
    let name = CString::new(user.name.as_bytes()).map_err(|_| failed("the account's name holds a NUL"))?;
    initgroups(&name, user.gid).map_err(|e| login(user, "its groups", e))?;
    setresgid(user.gid, user.gid, user.gid).map_err(|e| login(user, "its group", e))
}

/// Takes on the account's uid, if this process is root, and makes sure that there is no way back.
///
/// # Errors
/// What the system says.
pub(crate) fn take_uid(user: &User) -> Result<(), AccountError> {
    if !Uid::effective().is_root() {
        return Ok(());
    }
    setresuid(user.uid, user.uid, user.uid).map_err(|e| login(user, "its uid", e))?;
    check_dropped(user)
}

/// The way back must be closed before anything of the account's is touched.
fn check_dropped(user: &User) -> Result<(), AccountError> {
    let what = |e: nix::Error| failed(format!("cannot make sure to have become {}: {}", user.name, e.desc()));
    let uids = getresuid().map_err(what)?;
    let gids = getresgid().map_err(what)?;
    let all = [uids.real, uids.effective, uids.saved]
        .iter()
        .all(|uid| *uid == user.uid)
        && [gids.real, gids.effective, gids.saved]
            .iter()
            .all(|gid| *gid == user.gid);
    if !all || (!user.uid.is_root() && setuid(Uid::from_raw(0)).is_ok()) {
        return Err(failed(format!(
            "could not give up the agent's own rights for those of {}; nothing was done",
            user.name
        )));
    }
    Ok(())
}
