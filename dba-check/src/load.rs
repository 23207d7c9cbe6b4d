//! Clients that run all workloads at once, through every gse_dba, until they are told to stop.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::client::{Client, Login};
use crate::history::{Clock, Event, Kind, Outcome, Recorder, Reply, Workload};

/// Keys change this often, so that none has more operations than can be checked.
const EPOCH_NS: u64 = 1_000_000_000;

/// Clients that are running.
pub struct Load {
    pub clock: Clock,
    logins: Vec<Login>,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<JoinHandle<(Vec<Event>, Vec<String>)>>,
}

/// What was recorded, and errors that no client should have seen.
#[derive(Debug, Default)]
pub struct Recorded {
    pub events: Vec<Event>,
    pub strange: Vec<String>,
}

impl Load {
    /// Starts seven clients for each address. Their keys begin with `prefix`, so that what another load has left does not matter.
    #[must_use]
    pub fn start(logins: Vec<Login>, prefix: &str, seed: u64) -> Self {
        let (clock, stop, answered) = (
            Clock::default(),
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let all = [
            Workload::Register,
            Workload::Register,
            Workload::Register,
            Workload::Counter,
            Workload::List,
            Workload::Set,
            Workload::Queue,
        ];
        let threads = logins
            .iter()
            .flat_map(|login| all.iter().map(move |w| (login, *w)))
            .enumerate()
            .map(|(i, (login, workload))| {
                let (login, stop, answered) = (login.clone(), Arc::clone(&stop), Arc::clone(&answered));
                let prefix = prefix.to_owned();
                let rng = StdRng::seed_from_u64(seed.wrapping_mul(1000).wrapping_add(i as u64));
                std::thread::spawn(move || run((workload, &prefix), i as u32, login, rng, clock, &stop, &answered))
            })
            .collect();
        Self {
            clock,
            logins,
            stop,
            answered,
            threads,
        }
    }

    /// Operations answered so far.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Stops the clients, then reads every key through every address and empties the queues. All must be well again by now: what can't be read within
    /// `limit` stays unread, and is told.
    #[must_use]
    pub fn finish(self, limit: Duration) -> Recorded {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Recorded::default();
        for t in self.threads {
            match t.join() {
                Ok((mut events, mut strange)) => {
                    all.events.append(&mut events);
                    all.strange.append(&mut strange);
                }
                Err(_) => all.strange.push("a client has panicked".into()),
            }
        }
        let mut keys: BTreeMap<(Workload, Arc<str>), ()> = BTreeMap::new();
        for e in &all.events {
            keys.insert((e.kind.workload(), Arc::clone(&e.key)), ());
        }
        let until = Instant::now() + limit;
        for (i, login) in self.logins.into_iter().enumerate() {
            let mut client = Client::new(login);
            let mut recorder = Recorder::new(self.clock, 1_000_000 + i as u32);
            for (workload, key) in keys.keys() {
                let kind = match workload {
                    Workload::Register => Kind::Read,
                    Workload::Counter => Kind::ReadCounter,
                    Workload::List => Kind::ReadList,
                    Workload::Set => Kind::Members,
                    Workload::Queue => Kind::Pop,
                };
                loop {
                    match recorder.run(key, kind.clone(), |k, kind| client.perform(k, kind)) {
                        Outcome::Ok(Reply::Value(Some(_))) if kind == Kind::Pop => {}
                        Outcome::Ok(_) => break,
                        _ if Instant::now() > until => {
                            all.strange.push(format!("{key} can't be read at the end"));
                            break;
                        }
                        _ => std::thread::park_timeout(Duration::from_millis(50)),
                    }
                }
            }
            all.events.append(&mut recorder.events);
            all.strange.append(&mut client.strange);
        }
        all
    }
}

fn run(
    (workload, prefix): (Workload, &str),
    process: u32,
    login: Login,
    mut rng: StdRng,
    clock: Clock,
    stop: &AtomicBool,
    answered: &AtomicU64,
) -> (Vec<Event>, Vec<String>) {
    let mut client = Client::new(login);
    let mut recorder = Recorder::new(clock, process);
    let (mut next, mut last_read) = (i64::from(process) * 1_000_000, None::<(Arc<str>, Option<i64>)>);
    while !stop.load(Ordering::Relaxed) {
        let epoch = clock.now() / EPOCH_NS;
        let (epochs, keys) = match workload {
            Workload::Register => (1, 6),
            Workload::List => (2, 4),
            Workload::Counter | Workload::Set => (4, 4),
            Workload::Queue => (1000, 4),
        };
        let key: Arc<str> = format!("{prefix}{workload:?}:{}:{}", epoch / epochs, rng.random_range(0..keys)).into();
        next += 1;
        let dice = rng.random_range(0..100);
        let kind = match workload {
            Workload::Register if dice < 45 => Kind::Read,
            Workload::Register if dice < 75 => Kind::Write(next),
            Workload::Register => match &last_read {
                Some((of, from)) if *of == key => Kind::Swap { from: *from, to: next },
                _ => Kind::Swap { from: None, to: next },
            },
            Workload::Counter if dice < 70 => Kind::Incr,
            Workload::Counter => Kind::ReadCounter,
            Workload::List if dice < 60 => Kind::Append(next),
            Workload::List => Kind::ReadList,
            Workload::Set if dice < 90 => Kind::Add(next),
            Workload::Set => Kind::Members,
            Workload::Queue if dice < 55 => Kind::Push(next),
            Workload::Queue => Kind::Pop,
        };
        let outcome = recorder.run(&key, kind, |k, kind| client.perform(k, kind));
        let rest = match outcome {
            Outcome::Ok(reply) => {
                answered.fetch_add(1, Ordering::Relaxed);
                if let (Workload::Register, Reply::Value(v)) = (workload, reply) {
                    last_read = Some((Arc::clone(&key), *v));
                }
                rng.random_range(500..3000)
            }
            // Somebody who is refused does not hammer.
            _ => 20_000,
        };
        std::thread::park_timeout(Duration::from_micros(rest));
    }
    (recorder.events, client.strange)
}
