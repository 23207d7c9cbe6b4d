//! Answers the calls of gse_procmgr: takes operations, once each, and waits for their outcomes as long as it is asked to; brings registrations
//! in line; tells what there is. Carrying out is left to [`super::operate`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_proto::proc::{
    MAX_OPERATIONS, MAX_REGISTRATIONS, Operate, Operated, Operation, Outcome, ProcAnswer, ProcCall, Process, Read,
    Reconcile, Reconciled, Registration as Told, Registrations, code, proc_answer, proc_call, spec_digest,
};
use prost::Message;

use super::hosting::{check_spec, make_room};
use super::journal::{Admitted, Op, OpId};
use super::operate;
use super::registry::{Key, Registration, labels};
use super::{Shared, unix_ms};

/// Longest answer, some way below what a session passes on.
const ANSWER: usize = 8 << 20;

pub(super) async fn call(shared: &Arc<Shared>, payload: Bytes) -> Bytes {
    let answer = match ProcCall::decode(payload) {
        Ok(ProcCall { call: Some(call) }) => match call {
            proc_call::Call::Operate(operate) => proc_answer::Answer::Operated(take(shared, operate).await),
            proc_call::Call::Reconcile(wanted) => reconcile(shared, wanted).await,
            proc_call::Call::Read(read) => proc_answer::Answer::Registrations(tell(shared, &read)),
        },
        Ok(ProcCall { call: None }) => proc_answer::Answer::Refused("this agent does not know such a call".to_owned()),
        Err(error) => proc_answer::Answer::Refused(format!("the call does not decode: {error}")),
    };
    ProcAnswer { answer: Some(answer) }.encode_to_vec().into()
}

/// What is waited for, in the order of the call.
enum Place {
    Over(Box<Outcome>),
    Waits(Arc<Op>),
}

async fn take(shared: &Arc<Shared>, call: Operate) -> Operated {
    let mut places = Vec::new();
    let mut fresh: BTreeMap<(String, String), Vec<Arc<Op>>> = BTreeMap::new();
    let mut alone = Vec::new();
    for (at, order) in call.operations.into_iter().enumerate() {
        if at >= MAX_OPERATIONS {
            let text = format!("a call may have {MAX_OPERATIONS} operations at most");
            places.push(Place::Over(Box::new(refused(&order, &text))));
            continue;
        }
        let Ok(id) = OpId::try_from(order.op_id.as_ref()) else {
            places.push(Place::Over(Box::new(refused(&order, "op_id must have 16 bytes"))));
            continue;
        };
        if order.only_ask {
            places.push(match shared.ops.get(&id) {
                Some(op) => Place::Waits(op),
                None => Place::Over(Box::new(Outcome {
                    op_id: order.op_id,
                    unknown: true,
                    ..Outcome::default()
                })),
            });
            continue;
        }
        let admitted = match shared.ops.admit(id, order.clone()) {
            Admitted::Full => {
                shared.ops.sweep();
                shared.ops.admit(id, order.clone())
            }
            admitted => admitted,
        };
        places.push(match admitted {
            Admitted::Known(op) => Place::Waits(op),
            Admitted::New(op) => {
                // On one process in their order; a look at it waits for nobody.
                let key = op
                    .order
                    .key
                    .as_ref()
                    .map(|key| (key.namespace.clone(), key.name.clone()));
                match key.filter(|_| op.order.op_type != 2) {
                    Some(key) => fresh.entry(key).or_default().push(Arc::clone(&op)),
                    None => alone.push(Arc::clone(&op)),
                }
                Place::Waits(op)
            }
            Admitted::Full => {
                shared.metrics.refused.inc();
                let text = "the agent has too many operations under way (proc.max_operations); try again later";
                Place::Over(Box::new(refused(&order, text)))
            }
        });
    }
    for op in alone {
        operate::spawn(shared, vec![op], None);
    }
    for ops in fresh.into_values() {
        operate::spawn(shared, ops, None);
    }
    let wait = Duration::from_millis(u64::from(call.wait_ms).min(shared.config.max_wait_ms));
    let until = tokio::time::Instant::now() + wait;
    let mut outcomes = Vec::with_capacity(places.len());
    let mut length = 0usize;
    for place in places {
        let outcome = match place {
            Place::Over(outcome) => *outcome,
            Place::Waits(op) => {
                let mut over = op.outcome.subscribe();
                let ended = tokio::time::timeout_at(until, over.wait_for(Option::is_some)).await;
                let outcome = match ended {
                    Ok(Ok(outcome)) => outcome.as_ref().map(|(outcome, _)| Outcome::clone(outcome)),
                    Ok(Err(_)) | Err(_) => None,
                };
                // What has no room is told when it is asked for again.
                let outcome = outcome.filter(|outcome| outcomes.is_empty() || length + outcome.encoded_len() <= ANSWER);
                outcome.unwrap_or_else(|| Outcome {
                    op_id: op.order.op_id.clone(),
                    running: true,
                    code: code::RUNNING,
                    ..Outcome::default()
                })
            }
        };
        length += outcome.encoded_len();
        outcomes.push(outcome);
    }
    Operated { outcomes }
}

fn refused(order: &Operation, text: &str) -> Outcome {
    Outcome {
        op_id: order.op_id.clone(),
        code: code::COMMAND_FAILED,
        message: text.to_owned(),
        start_ms: unix_ms(),
        end_ms: unix_ms(),
        ..Outcome::default()
    }
}

async fn reconcile(shared: &Arc<Shared>, wanted: Reconcile) -> proc_answer::Answer {
    if wanted.put.len() > MAX_REGISTRATIONS {
        return proc_answer::Answer::Refused(format!("a call may put {MAX_REGISTRATIONS} registrations at most"));
    }
    let mut processes = Vec::with_capacity(wanted.put.len());
    for told in wanted.put {
        processes.push(put(shared, told).await);
    }
    match shared.keeper.commit(shared).await {
        Ok(Ok(())) => proc_answer::Answer::Reconciled(Reconciled { processes }),
        Ok(Err(error)) => proc_answer::Answer::Refused(format!("the registrations cannot be kept: {error}")),
        Err(_) => proc_answer::Answer::Refused("the agent is being stopped".to_owned()),
    }
}

/// Takes one registration over if it is newer than what is known.
async fn put(shared: &Arc<Shared>, told: Told) -> Process {
    let wire = told.key.clone();
    let trouble = |trouble: String| Process {
        key: wire.clone(),
        pid: -1,
        trouble,
        ..Process::default()
    };
    let spec = told.spec.clone().unwrap_or_default();
    let checked = Key::from_wire(told.key.as_ref())
        .and_then(|key| check_spec(&spec, told.hosted).map(|()| key))
        .and_then(|key| Ok((key, labels(&told.labels)?)));
    let (key, labels) = match checked {
        Ok(checked) => checked,
        Err(text) => return trouble(format!("not taken: {text}")),
    };
    let Ok(_held) = shared.turn(&key).await else {
        return trouble("not taken: the agent is being stopped".to_owned());
    };
    let known = shared.entries.lock().get(&key).map(|entry| entry.kept.revision);
    if known.is_none_or(|revision| revision < told.revision) {
        let spec = Arc::new(spec);
        {
            let mut entries = shared.entries.lock();
            if known.is_none() && entries.len() >= shared.config.max_processes && !make_room(shared, &mut entries) {
                return trouble("not taken: too many processes are known (proc.max_processes)".to_owned());
            }
            let new = || {
                shared.entry(Registration {
                    register_time: told.register_time,
                    ..Registration::default()
                })
            };
            let entry = entries.entry(Arc::new(key.clone())).or_insert_with(new);
            entry.kept.spec = Arc::clone(&spec);
            entry.kept.labels = labels;
            entry.kept.revision = told.revision;
            entry.digest = spec_digest(&spec);
            entry.machine.rules(shared.rules(&spec));
        }
        let last = shared
            .entries
            .lock()
            .get(&key)
            .and_then(|entry| entry.kept.ident.clone());
        let found = shared.find(&spec, last, None, true).await;
        let now = shared.now();
        let resumed = told.hosted && told.was_running;
        shared.change(&key, |entry| {
            entry.machine.operation_begins();
            if found.is_none() && resumed && known.is_none() {
                // Lost with the file, and it ran: it is as if this agent had seen it running.
                entry.machine = super::Machine::new(shared.rules(&spec), true, true);
            } else {
                entry.machine.operation_ended(now, found.is_some(), told.hosted, true);
            }
            shared.seen_as(entry, found);
        });
    }
    let entries = shared.entries.lock();
    entries
        .get(&key)
        .map_or_else(|| trouble("not taken".to_owned()), |entry| shared.process(&key, entry))
}

fn tell(shared: &Shared, read: &Read) -> Registrations {
    let entries = shared.entries.lock();
    let asked: Vec<Key> = read
        .keys
        .iter()
        .filter_map(|key| Key::from_wire(Some(key)).ok())
        .collect();
    let wanted = entries
        .iter()
        .filter(|(key, _)| asked.is_empty() || asked.contains(key));
    let mut registrations = Vec::new();
    let mut more = false;
    for (key, entry) in wanted {
        if registrations.len() >= MAX_REGISTRATIONS {
            more = true;
            break;
        }
        let kept = &entry.kept;
        registrations.push(Told {
            key: Some(key.to_wire()),
            labels: shared.process(key, entry).labels,
            spec: Some(Arc::unwrap_or_clone(Arc::clone(&kept.spec))),
            hosted: kept.hosted,
            revision: kept.revision,
            register_time: kept.register_time,
            was_running: kept.seen,
        });
    }
    Registrations { registrations, more }
}
