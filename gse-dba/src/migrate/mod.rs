//! `DBA MIGRATE`: moves all data to another store while clients go on, and back. It decides what is safe, copies with `copy`'s engine, changes the view of all clients
//! when both stores are equal, and writes down which store is the one. It knows the kinds of stores only by their configuration.

mod place;
mod run;
mod state;
mod verbs;

use std::sync::Arc;

use gse_core::lifecycle::Lifecycle;
use gse_core::ops::Health;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::copy::{Pace, Progress};
use crate::metrics::Metrics;
use crate::server::{self, Store};
use crate::view::{View, Views};
use crate::workers::Workers;
pub(crate) use place::Place;
use state::Note;
pub(crate) use verbs::migrate;

/// A store that was started, and what it lives in.
pub(crate) struct Started {
    pub(crate) place: Place,
    pub(crate) config: Config,
    pub(crate) store: Arc<Store>,
    /// Its own, when it can be stopped without the process.
    life: Option<Lifecycle>,
    health: Health,
}

/// How a move stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Idle,
    Checking,
    Copying,
    Verifying,
    Switching,
    Switched,
    Aborted,
    Failed,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Checking => "checking",
            Self::Copying => "copying",
            Self::Verifying => "verifying",
            Self::Switching => "switching",
            Self::Switched => "switched",
            Self::Aborted => "aborted",
            Self::Failed => "failed",
        }
    }

    fn is_running(self) -> bool {
        matches!(self, Self::Checking | Self::Copying | Self::Verifying | Self::Switching)
    }
}

/// The move of now, or the last one.
struct Move {
    phase: Phase,
    from: String,
    to: String,
    problem: Option<String>,
    stop: CancellationToken,
    pace: Arc<Pace>,
    progress: Arc<Progress>,
    /// Milliseconds for which commands were held back in the end.
    held_ms: u64,
    /// Times that holding them back was not enough.
    attempts: u64,
    /// Keys of both ends at the switch, as each counts them.
    keys: Option<(i64, i64)>,
}

struct State {
    current: Arc<Started>,
    /// The store before this one, kept for the way back.
    before: Option<Arc<Started>>,
    /// Where it is, should it not be running.
    back: Option<Place>,
    last: Option<Move>,
}

/// Which store serves, and what changes that.
pub(crate) struct Office {
    /// As it was read at the start: what every store's configuration is made from.
    base: Config,
    pub(crate) views: Views,
    workers: Workers,
    metrics: Metrics,
    life: Lifecycle,
    state: Mutex<State>,
    engines: Mutex<Vec<oneshot::Receiver<()>>>,
}

impl Office {
    /// Starts the store that serves: the configured one, or the one that data was moved to.
    pub(crate) async fn open(
        config: &Config,
        workers: &Workers,
        metrics: Metrics,
        life: &Lifecycle,
        health: &Health,
    ) -> anyhow::Result<Arc<Self>> {
        let note = {
            let dir = config.embedded.dir.clone();
            tokio::task::spawn_blocking(move || Note::read(&dir)).await??
        };
        let (place, back) = match note {
            Some(note) => {
                tracing::warn!(
                    store = %note.store.name(),
                    configured = config.backend.name(),
                    file = %state::path(&config.embedded.dir).display(),
                    "the data was moved by DBA MIGRATE: the store of this note is used, whatever the configuration says; put it into the configuration and remove the note, or move back with DBA MIGRATE BACK"
                );
                (note.store, Some(note.before))
            }
            None => (Place::Configured, None),
        };
        let effective = place.config(config).await?;
        let own = Health::new();
        let (store, engine) = server::start_store(&effective, workers, metrics.clone(), life, &own).await?;
        let started = Started {
            place,
            config: effective,
            store: Arc::new(store),
            life: None,
            health: own,
        };
        let office = Self::with(config, started, back, workers.clone(), metrics, life);
        office.engines.lock().extend(engine);
        office.mirror(health);
        Ok(office)
    }

    /// In front of a store that is there already.
    pub(crate) fn of(config: &Config, store: Store, metrics: Metrics, life: &Lifecycle) -> Arc<Self> {
        let started = Started {
            place: Place::Configured,
            config: config.clone(),
            store: Arc::new(store),
            life: None,
            health: Health::new(),
        };
        Self::with(config, started, None, Workers::default(), metrics, life)
    }

    fn with(
        config: &Config,
        started: Started,
        back: Option<Place>,
        workers: Workers,
        metrics: Metrics,
        life: &Lifecycle,
    ) -> Arc<Self> {
        let view = view_of(&started, 1);
        Arc::new(Self {
            base: config.clone(),
            views: Views::new(view),
            workers,
            metrics,
            life: life.clone(),
            state: Mutex::new(State {
                current: Arc::new(started),
                before: None,
                back,
                last: None,
            }),
            engines: Mutex::default(),
        })
    }

    /// Says of the server what the store that serves says of itself.
    fn mirror(self: &Arc<Self>, health: &Health) {
        let (weak, health) = (Arc::downgrade(self), health.clone());
        let say = move |office: &Self| {
            let current = Arc::clone(&office.state.lock().current);
            let reasons = current.health.reasons();
            let state = reasons.into_values().next().map_or(Ok(()), Err);
            health.set("store", state);
            current.life.as_ref().and_then(Lifecycle::failure)
        };
        if let Some(failure) = say(self) {
            self.life.fail(failure);
        }
        self.life.spawn_until_closed("dba-store-health", async move {
            let mut every = tokio::time::interval(std::time::Duration::from_millis(200));
            loop {
                every.tick().await;
                let Some(office) = weak.upgrade() else { return };
                if let Some(failure) = say(&office) {
                    office.life.fail(failure);
                }
            }
        });
    }

    /// What tells when the embedded engines have ended; asked once, at the end. What was only kept for the way back is let go.
    pub(crate) fn engines(&self) -> Vec<oneshot::Receiver<()>> {
        self.state.lock().before = None;
        std::mem::take(&mut *self.engines.lock())
    }

    /// The store that serves now, with its configuration.
    pub(crate) fn current(&self) -> Arc<Started> {
        Arc::clone(&self.state.lock().current)
    }

    fn set_phase(&self, phase: Phase) {
        if let Some(m) = &mut self.state.lock().last {
            m.phase = phase;
        }
    }
}

fn view_of(started: &Started, generation: u64) -> View {
    View::new(
        Arc::clone(&started.store),
        started.config.backend,
        server::durability(&started.config),
        generation,
    )
}
