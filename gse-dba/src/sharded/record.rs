//! What the servers of a plain list remember of who is primary: a small record beside the data, in a database of its own that no command of a client reaches. It
//! is copied like any other key, so whoever sees enough servers sees the newest one. Changes to a server are made only while its record is what was seen.

use anyhow::Context as _;
use redis::aio::MultiplexedConnection;
use serde::{Deserialize, Serialize};

use super::control::Whole;

/// The database that holds the record.
pub(super) const DB: i64 = 1;
pub(super) const KEY: &str = "gse_dba:seat";

/// Who is primary, and since which change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) group: String,
    /// Drawn when the group was first put together: servers of another one are not taken for its own.
    pub(super) id: String,
    /// Rises with every change of the primary, and when its history begins anew.
    pub(super) epoch: u64,
    pub(super) primary: String,
    /// The replication history that the primary had then.
    pub(super) history: String,
}

impl Record {
    /// The first record of a group.
    pub(super) fn first(group: &str, primary: &str, history: &str) -> Self {
        Self {
            group: group.to_owned(),
            id: format!("{:032x}", rand::random::<u128>()),
            epoch: 1,
            primary: primary.to_owned(),
            history: history.to_owned(),
        }
    }

    /// The next one.
    pub(super) fn next(&self, epoch: u64, primary: &str, history: &str) -> Self {
        Self {
            epoch: epoch + 1,
            primary: primary.to_owned(),
            history: history.to_owned(),
            ..self.clone()
        }
    }

    /// Reads one; what can't be understood is none.
    pub(super) fn read(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}

/// The record's text on a server, as it is now.
pub(super) async fn text(conn: &mut MultiplexedConnection) -> anyhow::Result<Option<String>> {
    Ok(redis::cmd("GET").arg(KEY).query_async(conn).await?)
}

/// Does something on a server, provided that its record is still `seen`; false when it is not, and then nothing was done.
async fn guarded(conn: &mut MultiplexedConnection, seen: Option<&str>, what: &redis::Cmd) -> anyhow::Result<bool> {
    let _: () = redis::cmd("WATCH").arg(KEY).query_async(conn).await?;
    if text(conn).await?.as_deref() != seen {
        let _: () = redis::cmd("UNWATCH").query_async(conn).await?;
        return Ok(false);
    }
    let done: Option<Vec<redis::Value>> = redis::pipe()
        .atomic()
        .add_command(what.clone())
        .query_async(conn)
        .await?;
    Ok(done.is_some())
}

/// Writes a record where `seen` is now. It is on `copies` other servers when this is true.
pub(super) async fn write(
    conn: &mut MultiplexedConnection,
    seen: Option<&str>,
    new: &Record,
    copies: usize,
) -> anyhow::Result<bool> {
    let text = serde_json::to_string(new)?;
    let mut set = redis::cmd("SET");
    set.arg(KEY).arg(text);
    if !guarded(conn, seen, &set).await? {
        return Ok(false);
    }
    if copies > 0 {
        let got: usize = redis::cmd("WAIT").arg(copies).arg(500).query_async(conn).await?;
        anyhow::ensure!(
            got >= copies,
            "{got} of {copies} other servers have confirmed who the primary is"
        );
    }
    Ok(true)
}

/// Makes a server a copy of another, or (with none) a primary.
pub(super) async fn follow(
    conn: &mut MultiplexedConnection,
    seen: Option<&str>,
    whom: Option<&str>,
) -> anyhow::Result<bool> {
    let mut cmd = redis::cmd("REPLICAOF");
    match whom {
        Some(address) => {
            let (host, port) = split(address)?;
            cmd.arg(host).arg(port);
        }
        None => {
            cmd.arg("NO").arg("ONE");
        }
    }
    guarded(conn, seen, &cmd).await
}

/// Has a server keep whom it follows in its configuration file. Without one there is nothing to keep it in, and the record stands in for that.
pub(super) async fn remember(conn: &mut MultiplexedConnection) {
    if let Err(e) = redis::cmd("CONFIG").arg("REWRITE").query_async::<()>(conn).await {
        tracing::debug!(error = %e, "the server does not keep this in a configuration file");
    }
}

/// Gives a server that is to be a copy the password for its primary, unless it has one.
pub(super) async fn introduce(
    conn: &mut MultiplexedConnection,
    user: &str,
    password: Option<&str>,
) -> anyhow::Result<()> {
    let Some(password) = password else { return Ok(()) };
    let now = super::control::settings(conn, &["masterauth"]).await?;
    if now.get("masterauth").is_none_or(String::is_empty) {
        let mut set = redis::cmd("CONFIG");
        set.arg("SET").arg("masterauth").arg(password);
        if user != "default" {
            set.arg("masteruser").arg(user);
        }
        let _: () = set.query_async(conn).await.context("cannot give it masterauth")?;
    }
    Ok(())
}

/// Host and port of an address.
pub(super) fn split(address: &str) -> anyhow::Result<(String, u16)> {
    match super::control::place(address)? {
        crate::single::dial::Place::Tcp(host, port) => Ok((host, port)),
        crate::single::dial::Place::Unix(path) => {
            anyhow::bail!(
                "{} is a socket on this host: say how others reach it, as \"/path=host:port\"",
                path.display()
            )
        }
    }
}

/// What `INFO` says that matters here.
pub(super) async fn look(conn: &mut MultiplexedConnection) -> anyhow::Result<Whole> {
    let info: String = redis::cmd("INFO").query_async(conn).await?;
    Whole::of(&info, DB)
}
