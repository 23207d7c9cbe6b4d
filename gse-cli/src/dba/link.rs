//! The connection to a gse_dba: where it is, who we are there, one `DBA` command and its answer.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use gse_core::config::mask_url;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, IntoConnectionInfo, RedisError, TlsCertificates};
use serde_json::Value;

use super::URL_FILE;
use crate::args::DbaPlace;
use crate::client::data_dir;

/// Environment variable with the password.
const PASSWORD_VARIABLE: &str = "GSE_DBA_PASSWORD";
/// For the connection to be made, log-in included.
const CONNECT: Duration = Duration::from_secs(5);

/// Why there is no answer to show. Anything else that goes wrong is wrong usage.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    /// gse_dba said no.
    #[error("{0}")]
    Refused(String),
    /// gse_dba said nothing.
    #[error("{0}")]
    Unreachable(String),
}

/// A connection.
pub(super) struct Link {
    conn: MultiplexedConnection,
    shown: String,
    limit: Duration,
}

fn said(error: &RedisError) -> String {
    match (error.code(), error.detail()) {
        (Some(code), Some(detail)) => format!("{code} {detail}"),
        (_, Some(detail)) => detail.to_owned(),
        _ => error.to_string(),
    }
}

/// Whether the server itself has answered with this error.
fn is_refusal(error: &RedisError) -> bool {
    error.code().is_some() && !error.is_io_error() && !error.is_timeout() && !error.is_connection_dropped()
}

fn first_line(path: &Path) -> anyhow::Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read the password in {}", path.display()))?;
    let line = text.lines().next().unwrap_or_default().trim();
    anyhow::ensure!(
        !line.is_empty(),
        "{} is empty; it should hold a password",
        path.display()
    );
    Ok(line.to_owned())
}

/// Address and password.
fn place(args: &DbaPlace) -> anyhow::Result<(String, Option<String>)> {
    let given = match &args.password_file {
        Some(path) => Some(first_line(path)?),
        None => std::env::var(PASSWORD_VARIABLE).ok().filter(|p| !p.is_empty()),
    };
    if let Some(url) = args.url.clone().filter(|url| !url.is_empty()) {
        return Ok((url, given));
    }
    let dir = data_dir(&args.data)?;
    let file = dir.join(URL_FILE);
    let url = match fs::read_to_string(&file) {
        Ok(text) => text.trim().to_owned(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Trouble::Unreachable(format!(
                "no gse_dba known: there is no {}; start one with gse up, or say --url URL",
                file.display()
            ))
            .into());
        }
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
    };
    let password = match given {
        Some(password) => password,
        None => first_line(&dir.join("store.password"))?,
    };
    Ok((url, Some(password)))
}

impl Link {
    /// Connects and logs in.
    ///
    /// # Errors
    /// Nobody is there, or does not let us in; or what was said on the command line makes no sense.
    pub(super) async fn open(args: &DbaPlace) -> anyhow::Result<Self> {
        let (url, password) = place(args)?;
        let shown = mask_url(&url);
        let mut info = url
            .as_str()
            .into_connection_info()
            .map_err(|error| anyhow::anyhow!("the address {shown} is malformed: {}", said(&error)))?;
        let mut login = info.redis_settings().clone();
        if let Some(password) = password {
            login = login.set_password(password);
        }
        if let Some(user) = args.user.as_ref().filter(|user| !user.is_empty()) {
            login = login.set_username(user);
        }
        info = info.set_redis_settings(login);
        let client = match &args.ca {
            Some(ca) if url.starts_with("rediss:") => {
                let root = fs::read(ca).with_context(|| format!("cannot read {}", ca.display()))?;
                Client::build_with_tls(
                    info,
                    TlsCertificates {
                        client_tls: None,
                        root_cert: Some(root),
                    },
                )
            }
            _ => Client::open(info),
        }
        .map_err(|error| anyhow::anyhow!("cannot make a connection to {shown}: {}", said(&error)))?;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT))
            .set_response_timeout(None);
        let opened = tokio::time::timeout(CONNECT, client.get_multiplexed_async_connection_with_config(&config)).await;
        let conn = match opened {
            Ok(Ok(conn)) => conn,
            Ok(Err(error)) if error.kind() == redis::ErrorKind::AuthenticationFailed || is_refusal(&error) => {
                return Err(Trouble::Refused(format!(
                    "{shown} does not let us in: {} (--password-file, {PASSWORD_VARIABLE})",
                    said(&error)
                ))
                .into());
            }
            Ok(Err(error)) => {
                return Err(Trouble::Unreachable(format!("cannot reach gse_dba at {shown}: {}", said(&error))).into());
            }
            Err(_) => {
                return Err(Trouble::Unreachable(format!(
                    "gse_dba at {shown} does not answer within {} s",
                    CONNECT.as_secs()
                ))
                .into());
            }
        };
        Ok(Self {
            conn,
            shown,
            limit: Duration::from_secs(args.timeout.into()),
        })
    }

    /// Sends `DBA` with these words.
    ///
    /// # Errors
    /// It is refused, or there is no answer.
    pub(super) async fn ask(&mut self, words: &[&str]) -> Result<Value, Trouble> {
        let mut command = redis::cmd("DBA");
        for word in words {
            command.arg(*word);
        }
        let what = || format!("DBA {}", words.first().unwrap_or(&""));
        let asked = tokio::time::timeout(self.limit, command.query_async::<String>(&mut self.conn)).await;
        match asked {
            Ok(Ok(text)) => serde_json::from_str(&text).map_err(|error| {
                Trouble::Unreachable(format!(
                    "{} answers {} with no JSON: {error}; is it gse_dba?",
                    self.shown,
                    what()
                ))
            }),
            Ok(Err(error)) if is_refusal(&error) => Err(Trouble::Refused(said(&error))),
            Ok(Err(error)) => Err(Trouble::Unreachable(format!(
                "{} was lost before it answered {}: {}",
                self.shown,
                what(),
                said(&error)
            ))),
            Err(_) => Err(Trouble::Unreachable(format!(
                "{} has not answered {} within {} s; it may still be at it",
                self.shown,
                what(),
                self.limit.as_secs()
            ))),
        }
    }
}
