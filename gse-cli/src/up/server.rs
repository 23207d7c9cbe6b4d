//! One server as a task of this process: its configuration, its start, its end.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use gse_core::config::{self, Config};
use gse_core::lifecycle::Lifecycle;
use gse_core::tls::TlsFiles;
use tokio::task::JoinHandle;
use toml::Value;

/// How long a server may take to start. Reading a large store back takes its time.
const START: Duration = Duration::from_secs(120);

/// Settings that `gse up` decides; they stand above the server's own file and the environment.
#[derive(Debug, Default)]
pub(super) struct Sets(Vec<String>);

impl Sets {
    /// Sets one key.
    #[must_use]
    pub(super) fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        let value: Value = value.into();
        self.0.push(format!("{key}={value}"));
        self
    }

    /// Sets a path.
    #[must_use]
    pub(super) fn path(self, key: &str, path: &Path) -> Self {
        self.with(key, path.display().to_string())
    }

    /// Sets the three files of a `tls` table.
    #[must_use]
    pub(super) fn tls(self, key: &str, files: &TlsFiles) -> Self {
        self.path(&format!("{key}.ca"), &files.ca)
            .path(&format!("{key}.cert"), &files.cert)
            .path(&format!("{key}.key"), &files.key)
    }

    /// The configuration of `service`: defaults, `file` if it is there, the environment, these settings.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub(super) fn load<C: Config>(&self, service: &str, file: &Path) -> anyhow::Result<C> {
        let file = file.exists().then_some(file);
        match config::load::<C>(service, file, &self.0) {
            Ok(loaded) => Ok(loaded.config),
            Err(errors) => bail!("the configuration of {service} is wrong: {errors}"),
        }
    }
}

/// A server that was started.
pub(super) struct Server {
    name: &'static str,
    /// Stops it.
    pub(super) life: Lifecycle,
    /// Where it listens.
    pub(super) addresses: BTreeMap<String, String>,
    /// None once its end was seen.
    task: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Server {
    /// Starts a server and waits until it listens.
    ///
    /// # Errors
    /// Why it did not start.
    pub(super) async fn start<C, F, Fut>(name: &'static str, config: C, grace: Duration, run: F) -> anyhow::Result<Self>
    where
        C: Config,
        F: FnOnce(C, Lifecycle) -> Fut,
        Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let life = Lifecycle::new(name);
        let running = run(config, life.clone());
        let owner = life.clone();
        let task = tokio::spawn(async move {
            let outcome = running.await;
            owner.drain();
            let in_time = owner.finished(grace).await;
            outcome?;
            if let Some(reason) = owner.failure() {
                bail!("{reason}");
            }
            anyhow::ensure!(in_time, "did not finish what it held within {} s", grace.as_secs());
            Ok(())
        });
        let mut server = Self {
            name,
            life,
            addresses: BTreeMap::new(),
            task: Some(task),
        };
        let life = server.life.clone();
        tokio::select! {
            biased;
            error = server.ended() => bail!("cannot start {name}: {error}"),
            addresses = life.wait_ready() => server.addresses = addresses,
            () = tokio::time::sleep(START) => bail!("cannot start {name}: it is not ready after {} s", START.as_secs()),
        }
        if server.life.is_draining() {
            let error = server.ended().await;
            bail!("cannot start {name}: {error}");
        }
        Ok(server)
    }

    /// An address it listens on.
    ///
    /// # Errors
    /// It has announced none of this name.
    pub(super) fn address(&self, listener: &str) -> anyhow::Result<String> {
        self.addresses
            .get(listener)
            .cloned()
            .with_context(|| format!("{} has not said where \"{listener}\" listens", self.name))
    }

    /// Resolves with the reason when the server ends without having been asked to.
    pub(super) async fn ended(&mut self) -> String {
        let outcome = match &mut self.task {
            Some(task) => task.await,
            None => std::future::pending().await,
        };
        self.task = None;
        self.reason(outcome).unwrap_or_else(|| "it has ended".to_owned())
    }

    fn reason(&self, outcome: Result<anyhow::Result<()>, tokio::task::JoinError>) -> Option<String> {
        match outcome {
            Ok(Ok(())) => self.life.failure(),
            Ok(Err(error)) => Some(gse_core::process::one_line(&error)),
            Err(error) => Some(format!("it has crashed: {error}")),
        }
    }

    /// Drains the server and waits for its end, twice `grace` at most.
    ///
    /// # Errors
    /// What went wrong on the way out.
    pub(super) async fn stop(mut self, grace: Duration) -> anyhow::Result<()> {
        self.life.drain();
        let Some(mut task) = self.task.take() else {
            return Ok(());
        };
        let Ok(outcome) = tokio::time::timeout(grace * 2, &mut task).await else {
            self.life.abort();
            task.abort();
            bail!("{} did not stop within {} s", self.name, (grace * 2).as_secs());
        };
        match self.reason(outcome) {
            Some(reason) => bail!("{}: {reason}", self.name),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_core::config::{LogConfig, OpsConfig, Problems, RuntimeConfig};
    use serde::{Deserialize, Serialize};

    #[derive(Default, Serialize, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Settings {
        listen: String,
        limit: u32,
        runtime: RuntimeConfig,
        log: LogConfig,
        ops: OpsConfig,
    }

    impl Config for Settings {
        fn runtime(&self) -> &RuntimeConfig {
            &self.runtime
        }
        fn log(&self) -> &LogConfig {
            &self.log
        }
        fn ops(&self) -> &OpsConfig {
            &self.ops
        }
        fn validate(&self, _: &mut Problems) {}
    }

    const GRACE: Duration = Duration::from_secs(5);

    #[test]
    fn what_is_decided_here_stands_above_the_file_and_the_rest_is_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.toml");
        std::fs::write(&file, "listen = \"file\"\nlimit = 7\n").unwrap();
        let odd = "a \"quoted\" = path\\";
        let config: Settings = Sets::default().with("listen", odd).load("gse_x", &file).unwrap();
        assert_eq!((config.listen.as_str(), config.limit), (odd, 7));
        std::fs::write(&file, "limmit = 7\n").unwrap();
        let error = Sets::default()
            .load::<Settings>("gse_x", &file)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("limmit") && error.contains("gse_x"), "{error}");
    }

    #[tokio::test]
    async fn a_server_that_cannot_start_says_why() {
        let failing = |_: Settings, _: Lifecycle| async { bail!("the port is taken") };
        let error = Server::start("gse_x", Settings::default(), GRACE, failing)
            .await
            .err()
            .unwrap()
            .to_string();
        assert_eq!(error, "cannot start gse_x: the port is taken");
        let crashing = |_: Settings, _: Lifecycle| async { panic!("oops") };
        let error = Server::start("gse_x", Settings::default(), GRACE, crashing)
            .await
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("crashed"), "{error}");
    }

    #[tokio::test]
    async fn a_server_is_ready_with_its_addresses_and_stops_when_told() {
        let serving = |_: Settings, life: Lifecycle| async move {
            life.announce("http", "127.0.0.1:1".into());
            life.ready();
            life.draining().await;
            Ok(())
        };
        let server = Server::start("gse_x", Settings::default(), GRACE, serving)
            .await
            .unwrap();
        assert_eq!(server.address("http").unwrap(), "127.0.0.1:1");
        assert!(server.address("ops").is_err());
        server.stop(GRACE).await.unwrap();
    }
}
