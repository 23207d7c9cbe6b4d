//! Brings what is due to its hosts: one order "push" for each, as a call to the agent's file service over its session. The agent writes
//! beside the file and puts the new one in its place in one step.
//!
//! All hosts of a batch are asked in one request for each node of gse_task; a host that does not answer holds up no other batch.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_core::audit::Entry;
use gse_core::fleet::{Question, Silence};
use gse_proto::file::order::What;
use gse_proto::file::{Order, Phase, Placing, Push, Report};
use gse_proto::ids::AgentId;
use prost::Message;
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::agents::{Present, present};
use crate::config::PlaceConfig;
use crate::desk::Desk;
use crate::identity::Os;
use crate::ledger::{End, Job};

/// The part of the agent that is meant.
const SERVICE: &str = "file";
/// Answers that wait to be taken.
const ANSWERS: usize = 1_024;
/// What has ended is stored when nothing has come for so long.
const STORE: Duration = Duration::from_millis(300);
/// What one host costs beside its content.
const PER_HOST: usize = 1_024;
/// The account that writes where none is named.
const ROOT: &str = "root";

/// Pushes for as long as this instance is the active one.
pub async fn run(desk: &Arc<Desk>) {
    let memory = Arc::new(Semaphore::new(desk.node.config.push.memory_bytes / 1024));
    let mut batches = JoinSet::new();
    loop {
        let jobs = match desk.take_due() {
            Ok(jobs) => jobs,
            Err(next) => {
                let due = async {
                    match next {
                        Some(wait) => tokio::time::sleep(wait).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    () = due => {}
                    () = desk.wake.notified() => {}
                    Some(ended) = batches.join_next() => crashed(ended),
                }
                continue;
            }
        };
        let bytes: usize = jobs.iter().map(|job| job.size as usize + PER_HOST).sum();
        let wanted = (bytes / 1024).clamp(1, desk.node.config.push.memory_bytes / 1024);
        let wanted = u32::try_from(wanted).unwrap_or(u32::MAX);
        let Ok(place) = Arc::clone(&memory).acquire_many_owned(wanted).await else {
            return;
        };
        batches.spawn(batch(Arc::clone(desk), jobs, place));
        while let Some(ended) = batches.try_join_next() {
            crashed(ended);
        }
    }
}

fn crashed(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a batch of pushes has crashed; its hosts are tried again by the next active instance");
    }
}

/// One try of each of some hosts.
async fn batch(desk: Arc<Desk>, jobs: Vec<Job>, place: OwnedSemaphorePermit) {
    let (orders, others) = match prepare(&desk, &jobs).await {
        Ok(prepared) => prepared,
        Err(why) => {
            tracing::warn!(hosts = jobs.len(), "identities can't be pushed yet: {why}");
            for job in &jobs {
                desk.end(job, End::Unsure(why.clone()));
            }
            return;
        }
    };
    for (job, end) in others {
        note(&desk, job, end);
    }
    if !orders.is_empty() {
        ask(&desk, orders).await;
    }
    // Hosts that were found to be away, and so on: what is stored of them need not be at once.
    let rest: Vec<Arc<str>> = jobs.iter().map(|job| Arc::clone(&job.key)).collect();
    desk.flush(&rest).await;
    drop(place);
}

/// A host that can be asked.
struct Ready<'a> {
    job: &'a Job,
    present: Present,
    path: String,
    order: Bytes,
}

type Prepared<'a> = (Vec<Ready<'a>>, Vec<(&'a Job, End)>);

/// Finds the agents, and what they are to be told.
async fn prepare<'a>(desk: &Desk, jobs: &'a [Job]) -> Result<Prepared<'a>, String> {
    let node = &desk.node;
    let names: Vec<&[AgentId]> = jobs.iter().map(|job| &job.agents[..]).collect();
    let agents = present(node.store.raw(), &names)
        .await
        .map_err(|error| error.to_string())?;
    let (mut there, mut others) = (Vec::new(), Vec::new());
    for (job, agent) in jobs.iter().zip(agents) {
        match agent {
            Some(present) => there.push((job, present)),
            None => others.push((job, End::Away)),
        }
    }
    let keys: Vec<&str> = there.iter().map(|(job, _)| &*job.key).collect();
    let contents = if keys.is_empty() {
        vec![]
    } else {
        node.store.contents(&keys).await.map_err(|error| error.to_string())?
    };
    let not_after_ms = node.clock.unix_ms() + node.config.push.order_ms;
    let mut ready = Vec::with_capacity(there.len());
    for ((job, present), content) in there.into_iter().zip(contents) {
        let Some(content) = content else {
            let message = "the content is not in the store; the next full pass brings it".to_owned();
            others.push((job, End::Unsure(message)));
            continue;
        };
        let (path, placing) = placing(desk, job, &present);
        let order = Order {
            task_id: job.task_id.clone(),
            order: job.order,
            servers: vec![],
            not_after_ms,
            what: Some(What::Push(Push {
                placing: Some(placing),
                sha256: Bytes::copy_from_slice(&Sha256::digest(&content)),
                content,
            })),
        };
        ready.push(Ready {
            job,
            present,
            path,
            order: order.encode_to_vec().into(),
        });
    }
    Ok((ready, others))
}

/// Where the file is, on this kind of system; the agent knows best which one that is.
fn placing(desk: &Desk, job: &Job, present: &Present) -> (String, Placing) {
    let os = match Os::parse(&present.os) {
        Os::Unknown => job.os,
        known => known,
    };
    let windows = os == Os::Windows;
    let file = &desk.node.config.file;
    let place: &PlaceConfig = if windows { &file.windows } else { &file.linux };
    // An agent of the older kind knows no other owner there.
    let old = windows && job.agents.first().is_some_and(|name| name.cloud_ip().is_some());
    let owner = if old { ROOT } else { &place.owner };
    let account = match (&place.account[..], old) {
        ("", _) | (_, true) => ROOT,
        (account, false) => account,
    };
    let slash = if place.dir.ends_with(['/', '\\']) { "" } else { "/" };
    let placing = Placing {
        dir: place.dir.clone(),
        name: place.name.clone(),
        make_dirs: true,
        user: account.to_owned(),
        owner: owner.to_owned(),
        mode: place.bits().unwrap_or(0o644),
    };
    (format!("{}{slash}{}", place.dir, place.name), placing)
}

/// Asks agents and takes their answers.
async fn ask(desk: &Desk, ready: Vec<Ready<'_>>) {
    let node = &desk.node;
    if let Err(why) = audit(desk, &ready).await {
        for one in &ready {
            note(desk, one.job, End::Unsure(why.clone()));
        }
        return;
    }
    let patience = Duration::from_millis(node.config.push.answer_timeout_ms);
    let question = Question {
        service: SERVICE,
        caller: format!("gse_syncdata {}", node.config.node_id),
        shared: Bytes::new(),
        agents: ready
            .iter()
            .map(|one| (one.present.agent.clone(), one.order.clone()))
            .collect(),
        patience,
        deadline: Instant::now() + patience + Duration::from_millis(node.config.fleet.reconnect_grace_ms),
    };
    let (sender, mut answers) = mpsc::channel(ANSWERS);
    let asking = async {
        node.fleet.ask(question, &sender).await;
        drop(sender);
    };
    let taking = async {
        let mut ended: Vec<Arc<str>> = Vec::new();
        loop {
            match timeout(STORE, answers.recv()).await {
                Ok(Some((n, answer))) => {
                    let Some(one) = ready.get(n) else { continue };
                    note(desk, one.job, end_of(one, answer));
                    ended.push(Arc::clone(&one.job.key));
                }
                Ok(None) => break,
                // Those that are slow are not waited for.
                Err(_) if !ended.is_empty() => desk.flush(&std::mem::take(&mut ended)).await,
                Err(_) => {}
            }
        }
        // The rest is written with those that were away.
    };
    tokio::join!(asking, taking);
}

/// One line for a batch, before anything is sent.
async fn audit(desk: &Desk, ready: &[Ready<'_>]) -> Result<(), String> {
    let node = &desk.node;
    let entry = Entry {
        request_id: format!("hostid-{:016x}", node.random.u64()),
        app: "gse_syncdata".to_owned(),
        via: "gse_syncdata".to_owned(),
        operation: "file.push".to_owned(),
        task_id: ready.first().map(|one| one.job.task_id.clone()),
        ..Entry::default()
    };
    let entry = entry
        .with_targets(ready.iter().map(|one| one.present.agent.as_str()))
        .with_accounts(std::iter::once(&node.config.file.linux.owner[..]).filter(|owner| !owner.is_empty()));
    node.front.audit.record(entry).await.map_err(|error| {
        tracing::error!(%error, "the audit trail can't be written; nothing is pushed");
        format!("the audit trail can't be written: {error}")
    })
}

fn end_of(one: &Ready<'_>, answer: Result<Bytes, Silence>) -> End {
    let report = match answer {
        Ok(bytes) => match Report::decode(bytes) {
            Ok(report) => report,
            Err(error) => return End::Unsure(format!("the agent's answer does not decode: {error}")),
        },
        Err(Silence::Offline(_)) => return End::Away,
        Err(Silence::Unsupported) => {
            return End::Failed {
                code: gse_proto::codes::Inner::System.code(),
                message: Silence::Unsupported.to_string(),
            };
        }
        Err(other) => return End::Unsure(other.to_string()),
    };
    match report.phase() {
        Phase::Done => End::Placed {
            to: one.present.agent.as_str().to_owned(),
            epoch: one.present.epoch.clone(),
            path: one.path.clone(),
        },
        Phase::Failed => End::Failed {
            code: if report.code == 0 {
                gse_proto::codes::Inner::System.code()
            } else {
                report.code
            },
            message: report.message,
        },
        Phase::Queued | Phase::Moving | Phase::Verifying => {
            End::Unsure("the agent has begun and not ended yet".to_owned())
        }
    }
}

fn note(desk: &Desk, job: &Job, end: End) {
    let kind = match &end {
        End::Placed { .. } => "placed",
        End::Failed { code, message } => {
            tracing::warn!(
                host = &*job.key,
                code,
                "the identity could not be put on its host: {message}"
            );
            "failed"
        }
        End::Away => "away",
        End::Unsure(why) => {
            tracing::debug!(
                host = &*job.key,
                "whether the identity is on its host is not known: {why}"
            );
            "unsure"
        }
    };
    desk.node.metrics.push(kind);
    desk.end(job, end);
}
