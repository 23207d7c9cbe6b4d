//! What is asked of a Redis or a Sentinel beside the data: who it is, who copies from it, how it is set up. One short connection for each look; nothing here
//! is on the way of a command.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ConnectionAddr, IntoConnectionInfo as _, RedisConnectionInfo, Value};

use super::returned::Identity;
use crate::config::Sharded as Config;
use crate::single::dial::Place;
use crate::tls::Outward;

/// Reads `host:port` or the path of a Unix socket.
pub(crate) fn place(address: &str) -> anyhow::Result<Place> {
    if address.starts_with('/') {
        return Ok(Place::Unix(address.into()));
    }
    let (host, port) = address
        .rsplit_once(':')
        .with_context(|| format!("the address {address:?} has no port"))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    anyhow::ensure!(!host.is_empty(), "the address {address:?} has no host");
    let port = port
        .parse()
        .with_context(|| format!("{port:?} in the address {address:?} is not a port"))?;
    Ok(Place::Tcp(host.to_owned(), port))
}

/// How one is let in.
#[derive(Clone)]
pub(crate) struct Login {
    pub(crate) user: String,
    pub(crate) password: Option<String>,
    pub(crate) timeout: Duration,
    pub(crate) tls: Option<Arc<Outward>>,
    /// The Sentinels' own.
    pub(crate) sentinel_password: Option<String>,
}

impl Login {
    /// As it is configured. Blocking: it may read files.
    pub(crate) fn of(config: &Config) -> anyhow::Result<Self> {
        let [password, sentinel_password] = config.resolve_passwords()?;
        let tls = config.tls.as_ref().map(Outward::read).transpose()?;
        Ok(Self {
            user: config.user.clone(),
            password,
            timeout: config.connect_timeout(),
            tls: tls.map(Arc::new),
            sentinel_password,
        })
    }
}

/// What a server says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Replication {
    pub(crate) is_primary: bool,
    /// Whom it copies from, when it is a copy.
    pub(crate) copies_from: Option<String>,
    /// Addresses of copies that are connected, with the seconds since each was last heard of.
    pub(crate) copies: Vec<(String, u64)>,
    /// The same with the bytes of writes that each has not confirmed.
    pub(crate) lags: Vec<Lag>,
}

/// How far a copy is behind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Lag {
    pub(crate) address: String,
    pub(crate) seconds: u64,
    pub(crate) bytes: u64,
}

/// All that a server of a plain list says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Whole {
    pub(crate) replication: Replication,
    /// Its replication history, and the one that it has continued.
    pub(crate) history: String,
    pub(crate) history_before: String,
    /// How far it is in that history.
    pub(crate) offset: u64,
    /// A copy's connection to its primary stands, and it is not being filled.
    pub(crate) link_up: bool,
    /// No keys besides what `reserved` holds.
    pub(crate) empty: bool,
}

impl Whole {
    /// Reads `INFO`; database `reserved` counts for nothing.
    pub(crate) fn of(info: &str, reserved: i64) -> anyhow::Result<Self> {
        let f = fields(info);
        let is = |k: &str| f.get(k).copied().unwrap_or_default();
        let replication = replication_of(info)?;
        let offset = if replication.is_primary {
            is("master_repl_offset")
        } else {
            is("slave_repl_offset")
        };
        let empty = f.iter().all(|(k, v)| {
            let db = k.strip_prefix("db").and_then(|n| n.parse::<i64>().ok());
            db.is_none_or(|n| n == reserved || v.starts_with("keys=0,"))
        });
        anyhow::ensure!(is("loading") != "1", "it is still loading its data");
        Ok(Self {
            history: is("master_replid").to_owned(),
            history_before: is("master_replid2").to_owned(),
            offset: offset.parse().unwrap_or(0),
            link_up: is("master_link_status") == "up" && is("master_sync_in_progress") != "1",
            empty,
            replication,
        })
    }
}

fn client(place: &Place, login: &Login, db: i64) -> anyhow::Result<Client> {
    let address = match place {
        Place::Tcp(host, port) if login.tls.is_some() => ConnectionAddr::TcpTls {
            host: host.clone(),
            port: *port,
            insecure: false,
            tls_params: None,
        },
        Place::Tcp(host, port) => ConnectionAddr::Tcp(host.clone(), *port),
        Place::Unix(path) => ConnectionAddr::Unix(path.clone()),
    };
    let mut settings = RedisConnectionInfo::default().set_skip_set_lib_name().set_db(db);
    if let Some(password) = &login.password {
        settings = settings.set_password(password);
        if login.user != "default" {
            settings = settings.set_username(&login.user);
        }
    }
    let info = address.into_connection_info()?.set_redis_settings(settings);
    match (&login.tls, place) {
        (Some(tls), Place::Tcp(..)) => Ok(Client::build_with_tls(info, tls.pem.clone())?),
        _ => Ok(Client::open(info)?),
    }
}

/// Connects. Every wait on the connection is bounded.
pub(crate) async fn connect(place: &Place, login: &Login) -> anyhow::Result<MultiplexedConnection> {
    connect_longer(place, login, 0, Duration::ZERO).await
}

/// Connects to one of a server's databases.
pub(crate) async fn connect_to(place: &Place, login: &Login, db: i64) -> anyhow::Result<MultiplexedConnection> {
    connect_longer(place, login, db, Duration::ZERO).await
}

/// Connects; what is asked there may take this much longer.
pub(crate) async fn connect_longer(
    place: &Place,
    login: &Login,
    db: i64,
    longer: Duration,
) -> anyhow::Result<MultiplexedConnection> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(login.timeout))
        .set_response_timeout(Some(login.timeout + longer));
    tokio::time::timeout(
        login.timeout,
        client(place, login, db)?.get_multiplexed_async_connection_with_config(&config),
    )
    .await
    .map_err(|_| anyhow::anyhow!("it did not answer within {:?}", login.timeout))?
    .with_context(|| format!("cannot connect to {place}"))
}

/// What a Sentinel says when a fail-over comes to the point at which there is another primary, or its copies are told.
pub(crate) const NEWS: [&str; 9] = [
    "+odown",
    "+try-failover",
    super::early::CHOSEN,
    super::early::TOLD,
    "+switch-master",
    "+promoted-slave",
    "+config-update-from",
    "+slave-reconf-sent",
    "+slave-reconf-done",
];

/// Subscribes to channels of a Sentinel or a Redis.
pub(crate) async fn news(place: &Place, login: &Login, channels: &[&str]) -> anyhow::Result<redis::aio::PubSub> {
    let mut news = tokio::time::timeout(login.timeout, client(place, login, 0)?.get_async_pubsub())
        .await
        .map_err(|_| anyhow::anyhow!("it did not answer within {:?}", login.timeout))??;
    news.subscribe(channels).await?;
    Ok(news)
}

/// The fields of an INFO section.
fn fields(text: &str) -> HashMap<&str, &str> {
    text.lines().filter_map(|l| l.trim_end().split_once(':')).collect()
}

pub(crate) fn replication_of(text: &str) -> anyhow::Result<Replication> {
    let f = fields(text);
    let role = f.get("role").context("INFO replication has no role")?;
    let mut copies = Vec::new();
    let mut lags = Vec::new();
    let number = |text: Option<&&str>| text.and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    let written = number(f.get("master_repl_offset"));
    for (key, line) in &f {
        let numbered = key
            .strip_prefix("slave")
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
        if !numbered {
            continue;
        }
        let parts: HashMap<&str, &str> = line.split(',').filter_map(|p| p.split_once('=')).collect();
        if parts.get("state") == Some(&"online")
            && let (Some(ip), Some(port), Some(lag)) = (parts.get("ip"), parts.get("port"), parts.get("lag"))
        {
            let (address, seconds) = (format!("{ip}:{port}"), lag.parse().unwrap_or(u64::MAX));
            lags.push(Lag {
                address: address.clone(),
                seconds,
                bytes: written.saturating_sub(number(parts.get("offset"))),
            });
            copies.push((address, seconds));
        }
    }
    copies.sort();
    lags.sort();
    let from = match (f.get("master_host"), f.get("master_port")) {
        (Some(host), Some(port)) => Some(format!("{host}:{port}")),
        _ => None,
    };
    Ok(Replication {
        is_primary: *role == "master",
        copies_from: from,
        copies,
        lags,
    })
}

/// Asks a server what it is.
pub(crate) async fn replication(conn: &mut MultiplexedConnection) -> anyhow::Result<Replication> {
    let text: String = redis::cmd("INFO").arg("replication").query_async(conn).await?;
    replication_of(&text)
}

/// Which run of which server this is, and how long its log is.
pub(crate) async fn identity(conn: &mut MultiplexedConnection) -> anyhow::Result<Identity> {
    let mut info: String = redis::cmd("INFO").arg("server").query_async(conn).await?;
    info.push_str(
        &redis::cmd("INFO")
            .arg("persistence")
            .query_async::<String>(conn)
            .await?,
    );
    Identity::read(&info).context("INFO has no run_id")
}

/// The settings of these names.
pub(crate) async fn settings(
    conn: &mut MultiplexedConnection,
    names: &[&str],
) -> anyhow::Result<HashMap<String, String>> {
    Ok(redis::cmd("CONFIG").arg("GET").arg(names).query_async(conn).await?)
}

/// What a Sentinel says of a group.
pub(crate) struct Heard {
    pub(crate) epoch: u64,
    pub(crate) address: String,
    /// It takes the one at that address for dead, or replaces it just now.
    pub(crate) doubts: bool,
    /// It has just promoted that one itself, and the others need not know yet.
    pub(crate) promoted: bool,
    /// How long a primary may be silent before it is taken for dead.
    pub(crate) patience: Duration,
}

/// Asks a Sentinel who is primary, and what it thinks of it.
pub(crate) async fn hear_sentinel(place: &Place, login: &Login, name: &str) -> anyhow::Result<Heard> {
    let mut conn = connect(place, login).await?;
    let (epoch, address) = ask_sentinel_on(&mut conn, name).await?;
    let reply: Value = redis::cmd("SENTINEL")
        .arg("MASTER")
        .arg(name)
        .query_async(&mut conn)
        .await?;
    let f: HashMap<String, String> = redis::from_redis_value(reply)?;
    let field = |name: &str| f.get(name).map_or("", String::as_str);
    let flags = field("flags");
    // After a promotion it names the new one already, and its doubts are of the old one.
    let of_this = address == format!("{}:{}", field("ip"), field("port"));
    Ok(Heard {
        epoch,
        address,
        promoted: !of_this,
        doubts: of_this
            && flags
                .split(',')
                .any(|flag| flag == "o_down" || flag == "failover_in_progress"),
        patience: Duration::from_millis(field("down-after-milliseconds").parse().unwrap_or(30_000)),
    })
}

/// Where a Sentinel has the primary of a group, and since which configuration.
pub(crate) async fn ask_sentinel(place: &Place, login: &Login, name: &str) -> anyhow::Result<(u64, String)> {
    ask_sentinel_on(&mut connect(place, login).await?, name).await
}

/// The same, on a connection that stands.
pub(crate) async fn ask_sentinel_on(conn: &mut MultiplexedConnection, name: &str) -> anyhow::Result<(u64, String)> {
    let reply: Value = redis::cmd("SENTINEL").arg("MASTER").arg(name).query_async(conn).await?;
    let fields: HashMap<String, String> = redis::from_redis_value(reply)?;
    let epoch = fields.get("config-epoch").and_then(|e| e.parse().ok()).unwrap_or(0);
    let addr: Option<(String, u16)> = redis::cmd("SENTINEL")
        .arg("GET-MASTER-ADDR-BY-NAME")
        .arg(name)
        .query_async(conn)
        .await?;
    match addr {
        Some((host, port)) => Ok((epoch, format!("{host}:{port}"))),
        None => bail!("it watches no group called {name:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        assert!(matches!(place("a:1").unwrap(), Place::Tcp(h, 1) if h == "a"));
        assert!(matches!(place("[::1]:6379").unwrap(), Place::Tcp(h, 6379) if h == "::1"));
        assert!(matches!(place("/run/redis.sock").unwrap(), Place::Unix(_)));
        for bad in ["a", ":1", "a:x", "a:70000", ""] {
            assert!(place(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_copies_that_are_online_count() {
        let r = replication_of("# Replication\r\nrole:master\r\nconnected_slaves:2\r\nslave0:ip=1.1.1.1,port=1,state=online,offset=5,lag=1\r\nslave1:ip=1.1.1.2,port=2,state=wait_bgsave,offset=0,lag=0\r\nslave_read_only:1\r\n").unwrap();
        assert!(r.is_primary);
        assert_eq!(r.copies, vec![("1.1.1.1:1".to_owned(), 1)]);
        let r = replication_of("role:slave\r\nmaster_host:h\r\nmaster_port:3\r\n").unwrap();
        assert!(!r.is_primary);
        assert_eq!(r.copies_from.as_deref(), Some("h:3"));
    }
}
