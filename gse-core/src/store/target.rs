//! Which server, or servers, a store URL means, and opening one connection to it.

use std::path::PathBuf;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::cluster::{ClusterClient, ClusterClientBuilder};
use redis::io::tcp::TcpSettings;
use redis::{AsyncConnectionConfig, Client, ConnectionInfo, IntoConnectionInfo, RedisError, TlsCertificates};

use super::{Conn, StoreConfig, StoreError, error};
use crate::config::mask_url;
use crate::net::Dialer;

/// Passwords and certificate bundles larger than this are no such things.
const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;
/// Times a cluster's redirection is followed, and the wait between.
const CLUSTER_REDIRECTS: u32 = 4;
const CLUSTER_WAIT_MIN_MS: u64 = 50;
const CLUSTER_WAIT_MAX_MS: u64 = 500;
/// What a cluster's node gets to answer beyond the deadline of a batch. The client library sends again what a node has not
/// answered by then, unless nobody waits for it any more, which after the deadline is so.
const CLUSTER_ANSWER_MARGIN: Duration = Duration::from_millis(250);

/// What a connection is made to.
#[derive(Clone)]
pub(super) struct Target {
    nodes: Vec<ConnectionInfo>,
    cluster: bool,
    shown: String,
    password_file: Option<PathBuf>,
    tls_ca: Option<PathBuf>,
    connect: Duration,
    command: Duration,
    /// Makes the streams instead of the client library; one server without TLS only.
    dialer: Option<Dialer>,
}

/// What is read from files at every connection.
struct Files {
    password: Option<String>,
    tls_ca: Option<Vec<u8>>,
}

impl Target {
    /// Reads the URL; touches neither files nor network.
    pub(super) fn from_config(cfg: &StoreConfig) -> Result<Self, StoreError> {
        let shown = mask_url(&cfg.url);
        let wrong = |why: &str| StoreError::config(format!("the store URL {shown} {why}"));
        let Some((scheme, rest)) = cfg.url.split_once("://") else {
            return Err(wrong("has no scheme; write redis://host:6379/0, say"));
        };
        let (urls, cluster) = match scheme {
            "redis" | "rediss" | "redis+unix" => (vec![cfg.url.clone()], false),
            "redis+cluster" | "rediss+cluster" => {
                let plain = scheme.trim_end_matches("+cluster");
                let (login, nodes) = rest
                    .rsplit_once('@')
                    .map_or(("", rest), |(login, nodes)| (login, nodes));
                let nodes = nodes.trim_end_matches('/');
                if nodes.contains('/') {
                    return Err(wrong("names a database; a cluster has only one"));
                }
                let at = if login.is_empty() { "" } else { "@" };
                let nodes = nodes.split(',').map(str::trim).filter(|node| !node.is_empty());
                (nodes.map(|node| format!("{plain}://{login}{at}{node}")).collect(), true)
            }
            _ => {
                return Err(wrong(
                    "has an unknown scheme; known: redis, rediss, redis+unix, redis+cluster, rediss+cluster",
                ));
            }
        };
        if urls.is_empty() {
            return Err(wrong("names no node"));
        }
        let mut nodes = Vec::with_capacity(urls.len());
        for url in urls {
            let info = url
                .as_str()
                .into_connection_info()
                .map_err(|error| wrong(&format!("is malformed: {}", error::reason(&error))))?;
            if cfg.password_file.is_some() && info.redis_settings().password().is_some() {
                return Err(wrong("holds a password although password_file is set; use one of them"));
            }
            nodes.push(info.set_tcp_settings(TcpSettings::default().set_nodelay(true)));
        }
        let tls = matches!(scheme, "rediss" | "rediss+cluster");
        if cfg.tls_ca.is_some() && !tls {
            return Err(wrong("does not use TLS although tls_ca is set; write rediss://"));
        }
        Ok(Self {
            nodes,
            cluster,
            shown,
            password_file: cfg.password_file.clone(),
            tls_ca: cfg.tls_ca.clone(),
            connect: Duration::from_millis(cfg.connect_timeout_ms),
            command: Duration::from_millis(cfg.command_timeout_ms),
            dialer: None,
        })
    }

    /// Has the streams to the one server made by `dialer`.
    pub(super) fn over(mut self, dialer: Dialer) -> Result<Self, StoreError> {
        if self.cluster || self.tls_ca.is_some() {
            let text = format!(
                "the store {}: only one server without TLS can be reached over given streams",
                self.shown
            );
            return Err(StoreError::config(text));
        }
        self.dialer = Some(dialer);
        Ok(self)
    }

    /// For one attempt to connect.
    pub(super) fn connect_timeout(&self) -> Duration {
        self.connect
    }

    /// For one batch to be answered.
    pub(super) fn command_timeout(&self) -> Duration {
        self.command
    }

    /// The URL without its password.
    pub(super) fn shown(&self) -> &str {
        &self.shown
    }

    /// Whether all that is configured can be read and makes sense.
    pub(super) async fn check(&self) -> Result<(), StoreError> {
        let files = self.files().await.map_err(StoreError::config)?;
        let wrong =
            |error: RedisError| StoreError::config(format!("the store {}: {}", self.shown, error::reason(&error)));
        if self.cluster {
            self.cluster_client(files).map(drop).map_err(wrong)
        } else {
            self.client(files).map(drop).map_err(wrong)
        }
    }

    /// Makes a connection, log-in included. Has no deadline of its own.
    pub(super) async fn open(&self) -> Result<Conn, String> {
        let files = self.files().await?;
        let opened = if self.cluster {
            match self.cluster_client(files) {
                Ok(client) => client.get_async_connection().await.map(Conn::Cluster),
                Err(error) => Err(error),
            }
        } else {
            match self.client(files) {
                // Deadlines are the caller's: one for the whole attempt here, one for each batch there.
                Ok(client) => {
                    let config = AsyncConnectionConfig::new()
                        .set_connection_timeout(None)
                        .set_response_timeout(None);
                    if let Some(dialer) = &self.dialer {
                        return open_over(dialer, client.get_connection_info(), config).await;
                    }
                    client
                        .get_multiplexed_async_connection_with_config(&config)
                        .await
                        .map(Conn::Single)
                }
                Err(error) => Err(error),
            }
        };
        opened.map_err(|error| error::reason(&error))
    }

    fn client(&self, files: Files) -> Result<Client, RedisError> {
        let mut info = self.nodes[0].clone();
        if let Some(password) = &files.password {
            let login = info.redis_settings().clone().set_password(password);
            info = info.set_redis_settings(login);
        }
        match files.tls_ca {
            Some(ca) => Client::build_with_tls(
                info,
                TlsCertificates {
                    client_tls: None,
                    root_cert: Some(ca),
                },
            ),
            None => Client::open(info),
        }
    }

    fn cluster_client(&self, files: Files) -> Result<ClusterClient, RedisError> {
        let mut nodes = self.nodes.clone();
        if let Some(password) = &files.password {
            for node in &mut nodes {
                let login = node.redis_settings().clone().set_password(password);
                *node = node.clone().set_redis_settings(login);
            }
        }
        let mut builder = ClusterClientBuilder::new(nodes)
            .retries(CLUSTER_REDIRECTS)
            .min_retry_wait(CLUSTER_WAIT_MIN_MS)
            .max_retry_wait(CLUSTER_WAIT_MAX_MS)
            // A node that hangs must leave time for the others within one attempt.
            .connection_timeout(self.connect / 2)
            .response_timeout(self.command + CLUSTER_ANSWER_MARGIN)
            .tcp_settings(TcpSettings::default().set_nodelay(true));
        if let Some(ca) = files.tls_ca {
            builder = builder.certs(TlsCertificates {
                client_tls: None,
                root_cert: Some(ca),
            });
        }
        builder.build()
    }

    async fn files(&self) -> Result<Files, String> {
        let password = match &self.password_file {
            None => None,
            Some(path) => {
                let bytes = read("password_file", path).await?;
                let text = String::from_utf8(bytes)
                    .map_err(|_| format!("password_file {} is not UTF-8 text", path.display()))?;
                let password = text.trim_end_matches(['\r', '\n']);
                if password.is_empty() {
                    return Err(format!("password_file {} is empty", path.display()));
                }
                Some(password.to_owned())
            }
        };
        let tls_ca = match &self.tls_ca {
            None => None,
            Some(path) => Some(read("tls_ca", path).await?),
        };
        Ok(Files { password, tls_ca })
    }
}

/// A connection over a stream that `dialer` makes.
async fn open_over(dialer: &Dialer, info: &ConnectionInfo, config: AsyncConnectionConfig) -> Result<Conn, String> {
    let stream = dialer
        .dial(&info.addr().to_string())
        .await
        .map_err(|error| error.to_string())?;
    let (conn, driver) = MultiplexedConnection::new_with_config(info.redis_settings(), stream, config)
        .await
        .map_err(|error| error::reason(&error))?;
    // Ends with the last clone of the connection.
    drop(tokio::spawn(driver));
    Ok(Conn::Single(conn))
}

async fn read(what: &str, path: &std::path::Path) -> Result<Vec<u8>, String> {
    let failed = |error: std::io::Error| format!("cannot read {what} {}: {error}", path.display());
    let size = tokio::fs::metadata(path).await.map_err(failed)?.len();
    if size > MAX_FILE_BYTES {
        return Err(format!(
            "{what} {} is larger than {MAX_FILE_BYTES} bytes",
            path.display()
        ));
    }
    tokio::fs::read(path).await.map_err(failed)
}
