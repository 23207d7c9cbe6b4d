//! F15: one agent is connected, sends heartbeats, and reads nothing.

use std::time::Duration;

use gse_core::random::Random;
use gse_proto::codes::Inner;
use gse_proto::frame::Frame;
use gse_proto::session::{Heartbeat, PROTOCOL, PROTOCOL_MIN};
use gse_task::session::outbox::CloseReason;
use tokio::io::AsyncWriteExt;

use super::script::Script;
use super::world::{SERVER, Setup, World, hello, task_id};

const SECOND: Duration = Duration::from_secs(1);
const OTHERS: usize = 3;

/// What the deaf agent's rows and the others came to.
struct Outcome {
    /// Scripts of the others that succeeded in time.
    done: usize,
    /// Codes of the deaf one's rows.
    deaf: Vec<i32>,
    /// Why its first session ended.
    closed: Option<CloseReason>,
}

/// An agent that never reads.
async fn deaf(n: usize) -> turmoil::Result {
    loop {
        let Ok(mut stream) = turmoil::net::TcpStream::connect(SERVER).await else {
            tokio::time::sleep(SECOND).await;
            continue;
        };
        let mut hello = hello(&format!("agent-{n}"), n, &Random::seeded(n as u64));
        (hello.protocol, hello.protocol_min) = (PROTOCOL, PROTOCOL_MIN);
        stream.write_all(&Frame::from(hello).to_bytes()).await?;
        while stream
            .write_all(&Frame::from(Heartbeat::default()).to_bytes())
            .await
            .is_ok()
        {
            tokio::time::sleep(SECOND).await;
        }
    }
}

fn load(with_deaf: bool) -> Result<Outcome, String> {
    let mut setup = Setup::new(5, OTHERS + 1);
    setup.segments = 32;
    setup.server.session.outbox_frames = 64;
    if with_deaf {
        setup.agents = OTHERS;
    }
    let mut world = World::new(&setup);
    if with_deaf {
        world.net.host("deaf", || deaf(OTHERS));
        world.hosts.push(super::world::Host {
            name: "deaf".into(),
            agent: gse_proto::ids::AgentId::parse(&format!("agent-{OTHERS}")).map_err(|error| error.to_string())?,
            disk: Default::default(),
        });
    }
    world.all_online(SECOND * 60)?;
    let deaf_session = world
        .node()
        .and_then(|node| node.registry.get(&world.hosts[OTHERS].agent));
    let all: Vec<usize> = (0..=OTHERS).collect();
    let script = Script {
        runs_ms: 200,
        bytes: 2_000,
        exit: 0,
    };
    let mut slots = Vec::new();
    let end = world.now() + SECOND * 40;
    while world.now() < end {
        slots.extend(world.submit(&all, &[script], 30));
        world.run(SECOND / 10);
    }
    world.run(SECOND * 3);
    let mut outcome = Outcome {
        done: 0,
        deaf: Vec::new(),
        closed: deaf_session.and_then(|session| session.outbox.closed()),
    };
    let ids: Vec<String> = slots
        .iter()
        .filter_map(|slot| task_id(slot.lock().as_ref()?).ok())
        .collect();
    for id in ids {
        let rows = world.rows(&id, &all, 1)?;
        outcome.done += rows[..OTHERS].iter().filter(|row| row.status == 2).count();
        outcome.deaf.push(rows[OTHERS].error_code);
    }
    Ok(outcome)
}

#[test]
fn one_that_does_not_read_costs_the_others_nothing() {
    // contract: reliability#F15
    let baseline = load(false).expect("baseline");
    let slow = load(true).expect("with one that does not read");
    assert!(baseline.done >= 1_000, "{}", baseline.done);
    assert!(
        slow.done * 100 >= baseline.done * 95,
        "{} instead of {} scripts",
        slow.done,
        baseline.done
    );
    assert!(
        slow.deaf.contains(&Inner::Limit.code()),
        "its queue never hit the bound: {:?}",
        slow.deaf
    );
    assert_eq!(baseline.closed, None);
    assert!(
        matches!(slow.closed, Some(CloseReason::NotReading | CloseReason::Overflow)),
        "its session went on: {:?}",
        slow.closed
    );
}
