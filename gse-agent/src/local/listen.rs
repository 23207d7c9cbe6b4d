//! Listening on a place for as long as the agent runs, whatever happens to it: what is not to be had is tried again, what was taken away is
//! made anew. Says so once, not at every try.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use gse_core::lifecycle::Lifecycle;
use gse_core::ops::Health;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep, sleep_until};

use super::bind::{Bound, bind};
use super::{Binding, Gate, Pass, Peer, Place, Stream};

/// After a connection could not be taken, most likely for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections that are turned away are spoken of this often.
const SAY_EVERY: Duration = Duration::from_secs(60);

/// How it stands with all places of one kind, for the health page. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Status {
    part: &'static str,
    health: Health,
    wrong: Arc<Mutex<BTreeMap<String, String>>>,
}

impl Status {
    /// Reports as `part`.
    #[must_use]
    pub fn new(part: &'static str, health: Health) -> Self {
        Self {
            part,
            health,
            wrong: Arc::default(),
        }
    }

    fn set(&self, place: &Place, state: Result<(), &str>) {
        let mut wrong = self.wrong.lock();
        match state {
            Ok(()) => wrong.remove(&place.to_string()),
            Err(why) => wrong.insert(place.to_string(), why.to_owned()),
        };
        let all: Vec<&str> = wrong.values().map(String::as_str).collect();
        let state = if all.is_empty() { Ok(()) } else { Err(all.join("; ")) };
        self.health.set(self.part, state);
    }
}

/// One place.
#[derive(Debug)]
pub struct Listener {
    place: Place,
    binding: Binding,
    gate: Gate,
    status: Status,
    vital: bool,
    bound: Option<Bound>,
    said: Option<String>,
    turned_away: Option<Instant>,
    life: Lifecycle,
}

impl Listener {
    /// Tries to bind `place`. That it is not to be had is no error: it is said, and tried again by [`Listener::run`]. The health page tells
    /// of it if the place is `vital`.
    pub async fn start(
        (place, vital): (Place, bool),
        binding: Binding,
        gate: Gate,
        status: Status,
        life: &Lifecycle,
    ) -> Self {
        let mut listener = Self {
            place,
            binding,
            gate,
            status,
            vital,
            bound: None,
            said: None,
            turned_away: None,
            life: life.clone(),
        };
        listener.bind().await;
        listener
    }

    async fn bind(&mut self) {
        match bind(&self.place, &self.binding).await {
            Ok(bound) => {
                tracing::info!(part = self.status.part, place = %self.place, "listening for programs of this host");
                self.status.set(&self.place, Ok(()));
                self.bound = Some(bound);
                self.said = None;
            }
            Err(why) => {
                if self.vital {
                    self.status.set(&self.place, Err(&why));
                }
                if self.said.as_ref() != Some(&why) {
                    tracing::info!(part = self.status.part, "{why}; it is tried again");
                    self.said = Some(why);
                }
            }
        }
    }

    /// Hands every connection to `take`, with who is there and the right to it, until the process drains; connections that there is no room
    /// for are closed and told to `refused`.
    pub async fn run(mut self, mut take: impl FnMut(Stream, Peer, Pass), mut refused: impl FnMut()) {
        let life = self.life.clone();
        let mut check = Instant::now();
        loop {
            let Some(bound) = &self.bound else {
                tokio::select! {
                    biased;
                    () = life.draining() => return,
                    () = sleep(Duration::from_millis(self.binding.retry_ms)) => {}
                }
                self.bind().await;
                continue;
            };
            tokio::select! {
                biased;
                () = life.draining() => return,
                () = sleep_until(check) => {
                    if !bound.is_ours(&self.place).await {
                        tracing::warn!(part = self.status.part, place = %self.place, "the socket was taken away or replaced; it is made anew");
                        self.bound = None;
                        self.bind().await;
                    }
                    check = Instant::now() + Duration::from_millis(self.binding.check_ms);
                }
                accepted = bound.accept() => match accepted {
                    Ok(stream) => {
                        let peer = stream.peer();
                        match self.gate.enter(peer) {
                            Some(pass) => take(stream, peer, pass),
                            None => {
                                refused();
                                if self.turned_away.is_none_or(|at| at.elapsed() >= SAY_EVERY) {
                                    self.turned_away = Some(Instant::now());
                                    tracing::warn!(part = self.status.part, uid = ?peer.uid, pid = ?peer.pid, connections = self.gate.inside(),
                                        "a program was turned away: there are as many connections as there may be");
                                }
                            }
                        }
                    }
                    Err(error) => {
                        if self.turned_away.is_none_or(|at| at.elapsed() >= SAY_EVERY) {
                            self.turned_away = Some(Instant::now());
                            tracing::warn!(part = self.status.part, place = %self.place, %error, "a connection could not be taken");
                        }
                        sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
    }
}
