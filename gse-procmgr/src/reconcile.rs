//! Brings registrations of the store and of hosts in line, both ways, when agents have told everything they know.
//!
//! gse_task puts an agent on a list when its snapshot is complete (or when it has forgotten something). An instance that takes it off
//! compares: with what was told, and, where that leaves a doubt, with what the agent answers when it is asked. The greater revision counts;
//! with equal ones the host is right. What a host has lost is put back if it is to be hosted; what the store does not know is taken up.
//! An agent that is away meanwhile tells everything again when it is back.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_core::fleet::processes::Writes;
use gse_core::fleet::{Question, Silence};
use gse_core::random::HashMap;
use gse_core::store::{Batch, StoreError, as_array, as_string, command};
use gse_proto::ids::AgentId;
use gse_proto::keys;
use gse_proto::proc::{self as p, Key, Process, Registration, spec_digest};
use prost::Message;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::Node;
use crate::registry::{self, Entry, Host};

/// Between two looks at indexes for what has gone.
const SWEEP: Duration = Duration::from_secs(60);
/// Keys of one question: specs come back, and an answer may not be long.
const KEYS: usize = 100;
/// Registrations of one call: states come back.
const PUT: usize = 500;
/// How often a host that did not answer is asked again before its next snapshot: what it has reported may be in the store before it is said
/// there where the host is connected.
const AGAIN: u8 = 6;
/// Hosts that are remembered for that.
const MAX_SILENT: usize = 50_000;

/// What is to be done about one host, as far as it can be told from the store.
#[derive(Debug, Default, PartialEq)]
struct Plan {
    /// The host is asked what it has of these.
    doubtful: Vec<Key>,
    /// The host gets these.
    put: Vec<Registration>,
    /// The store gets these.
    take: Vec<Registration>,
}

/// Looks at one host. Nothing is decided here that a stale state could make wrong: those are doubtful.
fn plan(host: &Host) -> Plan {
    let mut plan = Plan::default();
    for ((namespace, name), entry) in &host.entries {
        let key = Key {
            namespace: namespace.clone(),
            name: name.clone(),
        };
        let Entry {
            state: Some(state),
            registration: Some(registration),
            snapshot,
        } = entry
        else {
            plan.doubtful.push(key);
            continue;
        };
        if *snapshot != host.snapshot || !state.known {
            plan.doubtful.push(key);
        } else if registration.revision > state.revision {
            plan.put.push(as_it_ran(registration, Some(state)));
        } else if registration.spec.as_ref().map(spec_digest) != Some(state.spec_digest) {
            plan.doubtful.push(key);
        } else if (registration.revision, registration.hosted) != (state.revision, state.hosted) {
            plan.take.push(Registration {
                hosted: state.hosted,
                revision: state.revision,
                ..registration.clone()
            });
        }
    }
    plan
}

/// What is done about a process after the host was asked: it goes to the host, to the store, or is forgotten.
#[derive(Debug, PartialEq)]
enum Verdict {
    Put(Registration),
    Take(Registration),
    Forget,
    Fine,
}

/// What a host gets back, with what is known of how it was: one that has lost it can't know.
fn as_it_ran(registration: &Registration, state: Option<&Process>) -> Registration {
    Registration {
        was_running: state.map_or(registration.was_running, |state| state.pid > 0),
        ..registration.clone()
    }
}

fn same(ours: &Registration, theirs: &Registration) -> bool {
    let digest = |registration: &Registration| registration.spec.as_ref().map(spec_digest);
    (ours.revision, ours.hosted) == (theirs.revision, theirs.hosted)
        && ours.labels == theirs.labels
        && digest(ours) == digest(theirs)
}

fn judge(ours: Option<&Registration>, theirs: Option<&Registration>, state: Option<&Process>) -> Verdict {
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if ours.revision > theirs.revision => Verdict::Put(as_it_ran(ours, state)),
        (Some(ours), Some(theirs)) if same(ours, theirs) => Verdict::Fine,
        (_, Some(theirs)) => Verdict::Take(theirs.clone()),
        (Some(ours), None) if ours.hosted => Verdict::Put(as_it_ran(ours, state)),
        (_, None) => Verdict::Forget,
    }
}

/// Compares until the instance drains.
pub async fn run(node: Arc<Node>) {
    let look = Duration::from_millis(node.config.reconcile.look_ms);
    let mut swept = Instant::now();
    let mut silent: HashMap<AgentId, u8> = HashMap::default();
    loop {
        let more = match take(&node).await {
            Ok(agents) if agents.is_empty() => false,
            Ok(agents) => {
                match compare(&node, &agents).await {
                    Ok(unasked) => put_back(&node, &to_ask_again(&mut silent, &agents, &unasked)).await,
                    Err(error) => {
                        tracing::warn!(%error, agents = agents.len(), "registrations can't be compared now; they are with the next snapshot");
                        put_back(&node, &agents).await;
                    }
                }
                agents.len() >= node.config.reconcile.agents
            }
            Err(error) => {
                tracing::debug!(%error, "which registrations to compare can't be read now");
                false
            }
        };
        if swept.elapsed() >= SWEEP {
            swept = Instant::now();
            let before_ms = node.clock.unix_ms().saturating_sub(node.config.query.gone_ms);
            if let Err(error) = registry::sweep(node.store.raw(), before_ms).await {
                tracing::debug!(%error, "indexes can't be swept now");
            }
        }
        tokio::select! {
            () = node.life.draining() => return,
            () = tokio::time::sleep(if more { Duration::ZERO } else { look }) => {}
        }
    }
}

/// Agents whose turn it is; nobody else gets them.
async fn take(node: &Node) -> Result<Vec<AgentId>, StoreError> {
    let key = keys::proc_check();
    let mut pop = command("SPOP", key);
    pop.arg(node.config.reconcile.agents);
    let mut batch = Batch::new();
    batch.push(key, pop);
    let reply = node.store.raw().run(batch).await?.into_iter().next();
    let mut agents = Vec::new();
    for member in reply.map_or(Ok(vec![]), as_array)? {
        agents.extend(as_string(member)?.and_then(|id| AgentId::parse(&id).ok()));
    }
    Ok(agents)
}

/// Which of the agents that did not answer (positions in `agents`) are asked again; counts how often that was.
fn to_ask_again(silent: &mut HashMap<AgentId, u8>, agents: &[AgentId], unasked: &BTreeSet<usize>) -> Vec<AgentId> {
    if silent.len() > MAX_SILENT {
        silent.clear();
    }
    let mut again = Vec::new();
    for (n, agent) in agents.iter().enumerate() {
        if !unasked.contains(&n) {
            silent.remove(agent);
            continue;
        }
        let times = silent.entry(agent.clone()).or_default();
        *times += 1;
        if *times > AGAIN {
            silent.remove(agent);
        } else {
            again.push(agent.clone());
        }
    }
    again
}

async fn put_back(node: &Node, agents: &[AgentId]) {
    if agents.is_empty() {
        return;
    }
    let mut writes = Writes::new(node.clock.unix_ms());
    for agent in agents {
        writes.check(agent.as_str());
    }
    if let Err(error) = node.store.raw().run(writes.batch()).await {
        tracing::debug!(%error, "agents to compare are not noted again; their next snapshots do that");
    }
}

/// Compares what is known of these agents; positions of those that had to be asked and have not answered.
async fn compare(node: &Arc<Node>, agents: &[AgentId]) -> Result<BTreeSet<usize>, StoreError> {
    let mut unasked = BTreeSet::new();
    let names: Vec<&str> = agents.iter().map(AgentId::as_str).collect();
    let hosts = registry::hosts(node.store.raw(), &names).await?;
    let mut writes = Writes::new(node.clock.unix_ms());
    let mut reads: Vec<(usize, Vec<Key>)> = Vec::new();
    let mut puts: HashMap<usize, Vec<Registration>> = HashMap::default();
    for (n, host) in hosts.iter().enumerate() {
        let plan = plan(host);
        for registration in &plan.take {
            registry::put(&mut writes, names[n], registration);
        }
        for keys in plan.doubtful.chunks(KEYS) {
            reads.push((n, keys.to_vec()));
        }
        if !plan.put.is_empty() {
            puts.entry(n).or_default().extend(plan.put);
        }
    }
    let calls = reads
        .iter()
        .map(|(n, keys)| {
            let read = p::Read { keys: keys.clone() };
            (agents[*n].clone(), p::proc_call::Call::Read(read))
        })
        .collect();
    for ((n, keys), answer) in reads.iter().zip(ask(node, calls).await) {
        let Some(p::proc_answer::Answer::Registrations(told)) = answer else {
            unasked.insert(*n);
            continue;
        };
        let mut theirs: HashMap<(&str, &str), &Registration> = HashMap::default();
        for registration in &told.registrations {
            if let Some(key) = &registration.key {
                theirs.insert((&key.namespace, &key.name), registration);
            }
        }
        for key in keys {
            let entry = hosts[*n].entries.get(&(key.namespace.clone(), key.name.clone()));
            let ours = entry.and_then(|entry| entry.registration.as_ref());
            let theirs = theirs.get(&(key.namespace.as_str(), key.name.as_str())).copied();
            let state = entry.and_then(|entry| entry.state.as_ref());
            match judge(ours, theirs, state) {
                Verdict::Put(registration) => puts.entry(*n).or_default().push(registration),
                Verdict::Take(registration) => {
                    node.metrics.taken_up.inc();
                    registry::put(&mut writes, names[*n], &registration);
                }
                Verdict::Forget => registry::forget(&mut writes, names[*n], key),
                Verdict::Fine => {}
            }
        }
    }
    let puts: Vec<(usize, Vec<Registration>)> = puts
        .into_iter()
        .flat_map(|(n, all)| {
            let parts: Vec<_> = all.chunks(PUT).map(|some| (n, some.to_vec())).collect();
            parts
        })
        .collect();
    let calls = puts
        .iter()
        .map(|(n, put)| {
            let reconcile = p::Reconcile { put: put.clone() };
            (agents[*n].clone(), p::proc_call::Call::Reconcile(reconcile))
        })
        .collect();
    for ((n, put), answer) in puts.iter().zip(ask(node, calls).await) {
        let Some(p::proc_answer::Answer::Reconciled(told)) = answer else {
            unasked.insert(*n);
            continue;
        };
        tracing::info!(
            agent = names[*n],
            registrations = put.len(),
            "registrations were put back on a host"
        );
        node.metrics.put_back.inc_by(put.len() as u64);
        for process in told.processes.iter().filter(|process| process.known) {
            writes.state(names[*n], process, hosts[*n].snapshot);
        }
    }
    node.metrics
        .compared
        .inc_by(agents.len().saturating_sub(unasked.len()) as u64);
    node.store.raw().run(writes.batch()).await?;
    Ok(unasked)
}

/// Asks agents, each its own question; `None` of those that have no answer now.
async fn ask(node: &Arc<Node>, calls: Vec<(AgentId, p::proc_call::Call)>) -> Vec<Option<p::proc_answer::Answer>> {
    let mut answers: Vec<Option<p::proc_answer::Answer>> = calls.iter().map(|_| None).collect();
    if calls.is_empty() {
        return answers;
    }
    let wait = Duration::from_millis(node.config.reconcile.wait_ms);
    let question = Question {
        service: p::SERVICE,
        caller: format!("gse_procmgr {}", node.config.node_id),
        shared: Bytes::new(),
        agents: calls
            .into_iter()
            .map(|(agent, call)| (agent, Bytes::from(p::ProcCall { call: Some(call) }.encode_to_vec())))
            .collect(),
        patience: wait,
        deadline: Instant::now() + wait,
    };
    let (sender, mut receiver) = mpsc::channel(256);
    let asking = async {
        node.fleet.ask(question, &sender).await;
        drop(sender);
    };
    let taking = async {
        while let Some((n, answer)) = receiver.recv().await {
            let read = match answer {
                Ok(bytes) => p::ProcAnswer::decode(bytes).ok().and_then(|answer| answer.answer),
                Err(Silence::Offline(_)) => None,
                Err(silence) => {
                    tracing::debug!(%silence, "an agent does not say what it has registered; it is asked with its next snapshot");
                    None
                }
            };
            if let Some(place) = answers.get_mut(n) {
                *place = read;
            }
        }
    };
    tokio::join!(asking, taking);
    answers
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::proc::Spec;

    #[test]
    fn who_does_not_answer_is_asked_again_some_times() {
        let agents: Vec<AgentId> = ["0200a", "0200b"]
            .iter()
            .map(|id| AgentId::parse(id).unwrap())
            .collect();
        let mut silent = HashMap::default();
        for _ in 0..AGAIN {
            assert_eq!(to_ask_again(&mut silent, &agents, &BTreeSet::from([1])), agents[1..]);
        }
        assert!(to_ask_again(&mut silent, &agents, &BTreeSet::from([1])).is_empty() && silent.is_empty());
        assert_eq!(to_ask_again(&mut silent, &agents, &BTreeSet::from([0])), agents[..1]);
        // It has answered: counted anew.
        assert!(to_ask_again(&mut silent, &agents, &BTreeSet::new()).is_empty() && silent.is_empty());
    }

    fn key() -> Key {
        Key {
            namespace: "n".into(),
            name: "p".into(),
        }
    }

    fn ours(revision: u64, hosted: bool) -> Registration {
        Registration {
            key: Some(key()),
            spec: Some(Spec::default()),
            hosted,
            revision,
            ..Registration::default()
        }
    }

    fn host(state: Option<(u64, bool, u64)>, registration: Option<Registration>) -> Host {
        let entry = Entry {
            state: state.map(|(revision, hosted, _)| Process {
                key: Some(key()),
                known: true,
                hosted,
                revision,
                spec_digest: spec_digest(&Spec::default()),
                ..Process::default()
            }),
            snapshot: state.map_or(0, |(.., snapshot)| snapshot),
            registration,
        };
        Host {
            entries: [(("n".to_owned(), "p".to_owned()), entry)].into(),
            snapshot: 5,
        }
    }

    #[test]
    fn what_the_store_can_tell_and_what_the_host_is_asked() {
        let same = plan(&host(Some((3, true, 5)), Some(ours(3, true))));
        assert_eq!(same, Plan::default());
        let older = plan(&host(Some((2, true, 5)), Some(ours(3, true))));
        assert_eq!(older.put, [ours(3, true)]);
        let newer = plan(&host(Some((4, false, 5)), Some(ours(3, true))));
        assert_eq!(newer.take, [ours(4, false)]);
        // It has given up hosting by itself.
        let given_up = plan(&host(Some((3, false, 5)), Some(ours(3, true))));
        assert_eq!(given_up.take, [ours(3, false)]);
        // Not part of the last snapshot, changed since, lost, or never heard of.
        for doubtful in [
            host(Some((3, true, 4)), Some(ours(3, true))),
            host(Some((3, true, 0)), Some(ours(3, true))),
            host(None, Some(ours(3, true))),
            host(Some((3, true, 5)), None),
        ] {
            let plan = plan(&doubtful);
            assert_eq!((plan.doubtful.len(), plan.put.len(), plan.take.len()), (1, 0, 0));
        }
    }

    #[test]
    fn the_newer_one_counts() {
        assert_eq!(judge(Some(&ours(3, true)), None, None), Verdict::Put(ours(3, true)));
        assert_eq!(judge(Some(&ours(3, false)), None, None), Verdict::Forget);
        assert_eq!(judge(None, None, None), Verdict::Forget);
        assert_eq!(judge(None, Some(&ours(1, true)), None), Verdict::Take(ours(1, true)));
        assert_eq!(
            judge(Some(&ours(3, true)), Some(&ours(2, true)), None),
            Verdict::Put(ours(3, true))
        );
        assert_eq!(
            judge(Some(&ours(2, true)), Some(&ours(3, true)), None),
            Verdict::Take(ours(3, true))
        );
        assert_eq!(
            judge(Some(&ours(3, true)), Some(&ours(3, false)), None),
            Verdict::Take(ours(3, false))
        );
        assert_eq!(judge(Some(&ours(3, true)), Some(&ours(3, true)), None), Verdict::Fine);
    }
}
