//! The agent's session with the servers: finding one that lets the agent in, staying with it, and finding the next.
//!
//! One connection at a time carries everything (see `proto/gse/session.proto`). What is carried out and what is reported is the
//! executor's, behind [`Work`]; here is only the way there and back: addresses (`servers`), waits (`backoff`), the hello
//! (`dial`), a session while it lasts (`live`) and its way out (`lanes`).

pub(crate) mod backoff;
mod dial;
mod lanes;
mod live;
pub(crate) mod servers;
mod work;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use gse_core::lifecycle::Lifecycle;
use gse_core::net::Dialer;
use gse_core::ops::Health;
use gse_core::random::Random;
use gse_core::tls::{Role, TlsFiles};
use gse_proto::session::{Goodbye, Hello, Move, PROTOCOL, PROTOCOL_MIN, Purpose, Refuse, RefuseCode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::time::{Instant, sleep, sleep_until};

use self::backoff::Backoff;
use self::dial::{Connection, DialError, Way, dial};
use self::live::{End, Live, Pace};
use self::servers::{Next, Servers};
pub use self::work::{Link, Report, Work, refused};
use crate::config::{Config, FirstServer, ReconnectConfig, SessionConfig};
use crate::host::{LoadMeter, write_atomically};

/// A server may not keep an agent away for longer than this at a time.
const LONGEST_REFUSAL: Duration = Duration::from_secs(3600);
/// Refusals that a person must look into are said at most this often.
const LOUD_EVERY: Duration = Duration::from_secs(60);
/// Between two moves at least, so that servers that send an agent to each other do not keep it busy.
const MOVE_GAP: Duration = Duration::from_secs(1);
/// A move begins somewhere within this time.
const MOVE_SPREAD: Duration = Duration::from_millis(200);
/// Added, at random, to the wait that a refusal asks for.
const REFUSAL_SPREAD: Duration = Duration::from_millis(500);

/// What is counted about sessions.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    connected: Gauge,
    sessions: Counter,
    failures: Counter,
    refusals: Counter,
    moves: Counter,
}

impl Metrics {
    /// Registers them under the prefix `gse_agent_session`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("gse_agent_session");
        registry.register(
            "connected",
            "1 while a server holds the agent's session",
            self.connected.clone(),
        );
        registry.register("begun", "Sessions that began", self.sessions.clone());
        registry.register("dial_failures", "Tries that brought no session", self.failures.clone());
        registry.register("refusals", "Tries that a server refused", self.refusals.clone());
        registry.register("moves", "Moves to another server on request", self.moves.clone());
    }
}

/// Keeps the agent connected.
#[derive(Debug)]
pub struct Keeper<W> {
    work: Arc<W>,
    /// A hello with everything that stays the same.
    hello: Hello,
    files: TlsFiles,
    way: Way,
    random: Random,
    servers: Servers,
    backoff: Backoff,
    reconnect: ReconnectConfig,
    session: SessionConfig,
    metrics: Metrics,
    health: Health,
    last_loud: Option<Instant>,
    /// Where it stands what the agent is stopped for.
    leaving: Option<PathBuf>,
    life: Lifecycle,
}

/// File in the data directory in which whoever stops the agent may say what for, in one word: `upgrade` or `uninstall`. It is removed when
/// an agent starts there.
const LEAVING: &str = "leaving";

impl<W: Work> Keeper<W> {
    /// Reads certificates and known servers. `hello` says who the agent is; what it holds and the protocol's versions are filled in
    /// at each try. Blocking.
    ///
    /// # Errors
    /// When the certificate files cannot be used.
    pub fn new(
        config: &Config,
        hello: Hello,
        work: Arc<W>,
        metrics: Metrics,
        health: Health,
        life: &Lifecycle,
    ) -> anyhow::Result<Self> {
        let tls = gse_core::tls::client_config(&config.tls, Role::Server, &[])?;
        let servers = Servers::load(&config.servers, &config.data_dir);
        let leaving = config.data_dir.join(LEAVING);
        match std::fs::remove_file(&leaving) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(
                    "cannot remove {}, which says why an earlier agent was stopped: {error}",
                    leaving.display()
                );
            }
            _ => {}
        }
        let with = (Way::Tls(tls), servers, Random::system());
        let mut keeper = Self::build(config, hello, work, metrics, health, life, with);
        keeper.leaving = Some(leaving);
        Ok(keeper)
    }

    /// One that reaches its servers over streams that `dialer` makes, leaves the disk alone and does not read the host's load: for
    /// simulations. Whom a stream leads to, and that nobody else reads it, is the dialer's business.
    #[must_use]
    pub fn over(config: &Config, hello: Hello, work: Arc<W>, dialer: Dialer, random: Random, life: &Lifecycle) -> Self {
        let with = (Way::Given(dialer), Servers::configured(&config.servers), random);
        Self::build(config, hello, work, Metrics::default(), Health::new(), life, with)
    }

    fn build(
        config: &Config,
        mut hello: Hello,
        work: Arc<W>,
        metrics: Metrics,
        health: Health,
        life: &Lifecycle,
        (way, mut servers, random): (Way, Servers, Random),
    ) -> Self {
        hello.protocol = PROTOCOL;
        hello.protocol_min = PROTOCOL_MIN;
        if config.first_server == FirstServer::Random {
            servers.start_anywhere(&random);
        }
        Self {
            work,
            hello,
            files: config.tls.clone(),
            way,
            servers,
            backoff: Backoff::new(&config.reconnect, random.clone()),
            random,
            reconnect: config.reconnect.clone(),
            session: config.session.clone(),
            metrics,
            health,
            last_loud: None,
            leaving: None,
            life: life.clone(),
        }
    }

    /// Stays connected until the process drains; then says goodbye.
    pub async fn run(mut self) {
        let life = self.life.clone();
        let mut reloads = life.reloads();
        while let Some(connection) = self.connect().await {
            let mut live = self.begin(connection).await;
            let mut moves = live.moves();
            let mut servers = live.servers();
            let mut last_move: Option<Instant> = None;
            loop {
                tokio::select! {
                    biased;
                    () = life.draining() => {
                        let goodbye = Goodbye {
                            reason: "the agent is being stopped".to_owned(),
                            stopping: true,
                            purpose: self.purpose().await.into(),
                        };
                        let end = live.leave(goodbye, &self.session).await;
                        tracing::info!(server = live.address, ?end, "left");
                        self.metrics.connected.set(0);
                        return;
                    }
                    end = live.ended() => {
                        live.stop_orders().await;
                        if self.after(&live, end).await.is_none() {
                            return;
                        }
                        break;
                    }
                    Ok(()) = servers.changed() => {
                        let list = servers.borrow_and_update().clone();
                        if self.servers.learn(&list) {
                            tracing::info!(server = live.address, servers = ?list, "there are other servers now");
                            self.keep_servers().await;
                        }
                    }
                    Ok(()) = moves.changed() => {
                        let wish = moves.borrow_and_update().clone();
                        let Some(wish) = wish else { continue };
                        let gap = last_move.map_or(Duration::ZERO, |at| MOVE_GAP.saturating_sub(at.elapsed()));
                        if let Some(next) = self.move_away(&live, wish, gap).await {
                            last_move = Some(Instant::now());
                            self.metrics.moves.inc();
                            let next = self.begin(next).await;
                            moves = next.moves();
                            servers = next.servers();
                            self.retire(std::mem::replace(&mut live, next));
                        }
                    }
                    Ok(()) = reloads.changed() => self.reload().await,
                }
            }
        }
        self.metrics.connected.set(0);
    }

    fn hello_now(&self) -> Hello {
        Hello {
            journal_epoch: self.work.epoch(),
            held: self.work.held(),
            ..self.hello.clone()
        }
    }

    /// Tries one server after the other, round after round, until one lets the agent in. `None` when the process drains.
    async fn connect(&mut self) -> Option<Connection> {
        let life = self.life.clone();
        loop {
            let addresses = match self.servers.round(Instant::now()) {
                Next::Try(addresses) => addresses,
                Next::Wait(until) => {
                    tokio::select! {
                        biased;
                        () = life.draining() => return None,
                        () = sleep_until(until + self.random.up_to(REFUSAL_SPREAD)) => continue,
                    }
                }
            };
            let mut failed = Vec::new();
            for address in addresses {
                let tried = tokio::select! {
                    biased;
                    () = life.draining() => return None,
                    tried = dial(&address, self.way.clone(), self.hello_now(), &self.session) => tried,
                };
                match tried {
                    Ok(connection) => return Some(connection),
                    Err(DialError::Refused(refuse)) => {
                        if !self.refused(&address, &refuse) {
                            failed.push(format!("{address}: refused ({})", refuse.reason));
                        }
                    }
                    Err(DialError::Failed(error)) => {
                        self.metrics.failures.inc();
                        failed.push(format!("{address}: {error:#}"));
                    }
                }
            }
            if failed.is_empty() {
                // Every server has named its own time.
                continue;
            }
            let reason = failed.join("; ");
            let wait = self.backoff.wait();
            tracing::warn!(wait_ms = wait.as_millis() as u64, "no server took the agent: {reason}");
            self.health.set("session", Err(format!("not connected: {reason}")));
            tokio::select! {
                biased;
                () = life.draining() => return None,
                () = sleep(wait) => {}
            }
        }
    }

    /// Notes a refusal. True if the server said when to come back.
    fn refused(&mut self, address: &str, refuse: &Refuse) -> bool {
        self.metrics.refusals.inc();
        let retry_after = Duration::from_millis(refuse.retry_after_ms.into()).min(LONGEST_REFUSAL);
        let now = Instant::now();
        if !retry_after.is_zero() {
            self.servers.leave_alone(address, retry_after, now);
        }
        let code = RefuseCode::try_from(refuse.code).unwrap_or(RefuseCode::Unspecified);
        let what = match code {
            RefuseCode::Clone => {
                "another host that is connected has this agent's id: give one of the two its own agent_id"
            }
            RefuseCode::Identity => {
                "the certificate does not allow this agent id: issue one for it (gse certs) or correct agent_id"
            }
            RefuseCode::Protocol => "server and agent have no session protocol in common: upgrade the older one",
            RefuseCode::Busy | RefuseCode::Unspecified => "",
        };
        let retry_after_ms = retry_after.as_millis() as u64;
        if what.is_empty() {
            tracing::info!(server = address, retry_after_ms, "refused: {}", refuse.reason);
        } else if self.last_loud.is_none_or(|at| at.elapsed() >= LOUD_EVERY) {
            self.last_loud = Some(now);
            tracing::error!(
                server = address,
                agent_id = self.hello.agent_id,
                retry_after_ms,
                "refused: {} ({what})",
                refuse.reason
            );
        } else {
            tracing::debug!(server = address, retry_after_ms, "refused: {}", refuse.reason);
        }
        self.health
            .set("session", Err(format!("refused by {address}: {}", refuse.reason)));
        !retry_after.is_zero()
    }

    async fn begin(&mut self, connection: Connection) -> Live {
        let welcome = &connection.welcome;
        tracing::info!(
            server = connection.address,
            node = welcome.node_id,
            session = welcome.session_id,
            heartbeat_ms = welcome.heartbeat_interval_ms,
            resumed = connection.resumed,
            "connected"
        );
        self.servers.connected(&connection.address);
        if self.servers.learn(&connection.welcome.servers) {
            self.keep_servers().await;
        }
        self.metrics.sessions.inc();
        self.metrics.connected.set(1);
        self.health.set("session", Ok(()));
        let pace = Pace {
            random: self.random.clone(),
            meter: matches!(self.way, Way::Tls(_)).then(LoadMeter::default),
        };
        Live::start(connection, self.work.clone(), &self.session, pace, &self.life)
    }

    /// After a session has ended: what that means for the next one, and the wait before it. `None` when the process drains.
    async fn after(&mut self, live: &Live, end: End) -> Option<()> {
        let lasted = live.since.elapsed();
        self.metrics.connected.set(0);
        self.backoff.session_lasted(lasted);
        let reason = match &end {
            End::Goodbye(goodbye) => format!("the server said goodbye: {}", goodbye.reason),
            End::Silent(time) => format!("nothing was heard for {} ms", time.as_millis()),
            End::Closed => "the server closed the connection".to_owned(),
            End::Failed(reason) => reason.clone(),
            End::Refused(refuse) => format!("refused: {}", refuse.reason),
            End::Left => "left".to_owned(),
        };
        tracing::warn!(
            server = live.address,
            lasted_ms = lasted.as_millis() as u64,
            "session ended: {reason}"
        );
        self.health
            .set("session", Err(format!("session with {} ended: {reason}", live.address)));
        let stopping = matches!(&end, End::Goodbye(goodbye) if goodbye.stopping);
        if stopping || matches!(end, End::Silent(_)) {
            self.servers.prefer_others(&live.address);
        }
        if let End::Refused(refuse) = &end {
            self.refused(&live.address, refuse);
        }
        let spread = self.random.up_to(Duration::from_millis(self.reconnect.spread_ms));
        // A server that stops is no failure, so it does not lengthen the series.
        let short = lasted < Duration::from_millis(self.reconnect.settled_ms);
        let wait = if short && !stopping {
            spread.max(self.backoff.wait())
        } else {
            spread
        };
        tokio::select! {
            biased;
            () = self.life.draining() => None,
            () = sleep(wait) => Some(()),
        }
    }

    /// Connects to one of the servers named while `live` goes on. `None` if that did not come about.
    async fn move_away(&mut self, live: &Live, wish: Move, gap: Duration) -> Option<Connection> {
        let wanted: Vec<String> = wish
            .servers
            .iter()
            .filter(|address| servers::well_formed(address) && **address != live.address)
            .take(16)
            .cloned()
            .collect();
        tracing::info!(server = live.address, to = ?wanted, "asked to move: {}", wish.reason);
        if self.servers.learn_more(&wanted) {
            self.keep_servers().await;
        }
        let going = async {
            sleep(gap + self.random.up_to(MOVE_SPREAD)).await;
            // Orders of the old session wait from here on, so that the hello names all that is held; if the move succeeds the new
            // server sends them again.
            let paused = live.pause().await;
            for address in &wanted {
                match dial(address, self.way.clone(), self.hello_now(), &self.session).await {
                    Ok(connection) => return Some((connection, paused)),
                    Err(DialError::Refused(refuse)) => {
                        tracing::info!(server = address, "move refused: {}", refuse.reason);
                    }
                    Err(DialError::Failed(error)) => {
                        tracing::info!(server = address, "move failed: {error:#}");
                    }
                }
            }
            None
        };
        let life = self.life.clone();
        let gone = tokio::select! {
            biased;
            // Both are dealt with by the caller.
            () = life.draining() => None,
            _ = live.ended() => None,
            gone = going => gone,
        };
        let Some((connection, paused)) = gone else {
            tracing::info!(server = live.address, "stays: none of the servers named took the agent");
            return None;
        };
        match paused {
            Some(paused) => live.stop_paused(paused),
            None => live.stop_orders().await,
        }
        Some(connection)
    }

    /// Lets an old session end in peace.
    fn retire(&self, old: Live) {
        let config = self.session.clone();
        self.life.spawn_contained("old session", async move {
            let goodbye = Goodbye {
                reason: "moved to another server".to_owned(),
                stopping: false,
                ..Goodbye::default()
            };
            let end = old.leave(goodbye, &config).await;
            tracing::info!(server = old.address, ?end, "moved away");
        });
    }

    /// What the agent is stopped for, if whoever stops it has left that in the file [`LEAVING`].
    async fn purpose(&self) -> Purpose {
        let Some(path) = self.leaving.clone() else {
            return Purpose::Stop;
        };
        // Nothing there is what is usual, and anything that can't be read is as good as nothing.
        let said = tokio::fs::read_to_string(path).await.unwrap_or_default();
        match said.trim() {
            "upgrade" => Purpose::Upgrade,
            "uninstall" => Purpose::Uninstall,
            _ => Purpose::Stop,
        }
    }

    async fn keep_servers(&self) {
        let Some((path, bytes)) = self.servers.to_keep() else {
            return;
        };
        let name = path.display().to_string();
        let written = tokio::task::spawn_blocking(move || write_atomically(&path, &bytes)).await;
        if let Ok(Err(error)) = written {
            tracing::warn!("cannot keep the list of servers in {name}: {error}");
        }
    }

    async fn reload(&mut self) {
        if matches!(self.way, Way::Given(_)) {
            return;
        }
        let files = self.files.clone();
        let read = tokio::task::spawn_blocking(move || gse_core::tls::client_config(&files, Role::Server, &[])).await;
        match read {
            Ok(Ok(tls)) => {
                self.way = Way::Tls(tls);
                tracing::info!("certificates were read again, for the next session; other settings need a restart");
            }
            Ok(Err(error)) => tracing::error!("the certificates in use stay: {error}"),
            Err(error) => tracing::error!("the certificates in use stay: {error}"),
        }
    }
}
