//! `PUBLISH` of each record as it is, on the channel that the route names (contract data-plane#28).
//!
//! Whether anybody listens is not ours to know: Redis keeps nothing.

use futures::FutureExt;
use redis::aio::MultiplexedConnection;
use redis::{Client, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisConnectionInfo, RedisError};

use super::{Attempted, Failure, Group, Writer};
use crate::routes::table::{Endpoint, RedisSpec, Secret};

/// Publishes on one connection.
pub struct Publisher {
    spec: RedisSpec,
    connection: Option<MultiplexedConnection>,
}

impl Publisher {
    /// Connects when there is something to publish.
    #[must_use]
    pub fn new(spec: RedisSpec) -> Self {
        Self { spec, connection: None }
    }

    async fn connect(&self) -> Result<MultiplexedConnection, Failure> {
        let mut last = "no address is named".to_owned();
        for address in &self.spec.addresses {
            let tried = if self.spec.master_name.is_empty() {
                open(address, &self.spec.password).await
            } else {
                self.master(address).await
            };
            match tried {
                Ok(connection) => return Ok(connection),
                Err(error) => last = format!("{address}: {error}"),
            }
        }
        Err(last)
    }

    /// The master that the sentinel at `address` names.
    async fn master(&self, address: &Endpoint) -> Result<MultiplexedConnection, Failure> {
        let mut sentinel = open(address, &self.spec.sentinel_password).await?;
        let found: Option<(String, u16)> = redis::cmd("SENTINEL")
            .arg("get-master-addr-by-name")
            .arg(&self.spec.master_name)
            .query_async(&mut sentinel)
            .await
            .map_err(words)?;
        let (host, port) = found.ok_or_else(|| format!("the sentinel knows no master {:?}", self.spec.master_name))?;
        let master = Endpoint { host, port };
        let mut connection = open(&master, &self.spec.password).await?;
        let role: Vec<redis::Value> = redis::cmd("ROLE").query_async(&mut connection).await.map_err(words)?;
        let role = role
            .into_iter()
            .next()
            .and_then(|role| redis::from_redis_value::<String>(role).ok());
        match role.as_deref() {
            Some("master") => Ok(connection),
            other => Err(format!(
                "{master}, which the sentinel names, is {}",
                other.unwrap_or("no server")
            )),
        }
    }
}

fn words(error: RedisError) -> Failure {
    error.to_string()
}

async fn open(address: &Endpoint, password: &Secret) -> Result<MultiplexedConnection, Failure> {
    let mut settings = RedisConnectionInfo::default();
    if !password.is_empty() {
        settings = settings.set_password(password.reveal());
    }
    let info: ConnectionInfo = ConnectionAddr::Tcp(address.host.clone(), address.port)
        .into_connection_info()
        .map_err(words)?
        .set_redis_settings(settings);
    let client = Client::open(info).map_err(words)?;
    client.get_multiplexed_async_connection().await.map_err(words)
}

impl Writer for Publisher {
    fn write<'a>(&'a mut self, group: &'a Group) -> Attempted<'a> {
        async move {
            let mut connection = match self.connection.take() {
                Some(connection) => connection,
                None => self.connect().await?,
            };
            let mut pipeline = redis::pipe();
            for load in &group.loads {
                for part in &load.parts {
                    for payload in load.payloads(part) {
                        pipeline.cmd("PUBLISH").arg(&*part.target).arg(payload).ignore();
                    }
                }
            }
            pipeline.query_async::<()>(&mut connection).await.map_err(words)?;
            self.connection = Some(connection);
            Ok(vec![])
        }
        .boxed()
    }
}
