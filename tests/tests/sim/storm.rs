//! F14: a whole fleet comes back after the server was restarted.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use gse_agent::session::{Keeper, Link, Report, Work};
use gse_core::lifecycle::Lifecycle;
use gse_core::random::Random;
use gse_proto::session::{Dispatch, Stored, TargetRef};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::world::{SERVER, Setup, World, dialer, hello};

const HOSTS: usize = 20;
const EACH: usize = 60;
const FLEET: usize = HOSTS * EACH;

/// An agent with nothing to do.
#[derive(Default)]
struct Idle(Mutex<Option<mpsc::Sender<Report>>>);

impl Work for Idle {
    fn epoch(&self) -> Bytes {
        Bytes::from_static(b"epoch")
    }

    fn held(&self) -> Vec<TargetRef> {
        Vec::new()
    }

    fn counts(&self) -> (u32, u32) {
        (0, 0)
    }

    async fn dispatch(&self, _: Dispatch) {}

    async fn terminate(&self, _: TargetRef) {}

    fn stored(&self, _: Stored) {}

    fn attach(&self, _: Link) -> mpsc::Receiver<Report> {
        let (reports, receiver) = mpsc::channel(1);
        *self.0.lock() = Some(reports);
        receiver
    }
}

async fn fleet(host: usize) -> turmoil::Result {
    let life = Lifecycle::new("fleet");
    for n in host * EACH..(host + 1) * EACH {
        let config = gse_agent::Config {
            agent_id: format!("agent-{n}"),
            servers: vec![SERVER.into()],
            ..Default::default()
        };
        let random = Random::seeded(1_000_000 + n as u64);
        let hello = hello(&config.agent_id, n, &random);
        let keeper = Keeper::over(&config, hello, Arc::new(Idle::default()), dialer(), random, &life);
        life.spawn("agent", keeper.run());
    }
    std::future::pending().await
}

#[test]
fn a_fleet_comes_back_spread_out() {
    // contract: reliability#F14
    let mut setup = Setup::new(9, 0);
    setup.segments = 4096;
    let mut world = World::new(&setup);
    for host in 0..HOSTS {
        world.net.host(format!("fleet-{host}"), move || fleet(host));
    }
    let connected = |world: &World| world.node().map_or(0, |node| node.registry.len());
    let everybody = |world: &World| (connected(world) == FLEET).then_some(());
    world.until("the fleet", Duration::from_secs(60), everybody).unwrap();
    world.run(Duration::from_secs(40));
    world.kill_server();
    world.run(Duration::from_secs(10));
    world.start_server();
    let back = world.ms();
    world
        .until("the fleet is back", Duration::from_secs(60), everybody)
        .unwrap();
    let arrivals: Vec<u64> = world
        .log
        .lines()
        .iter()
        .filter(|line| line.contains("server accepts"))
        .filter_map(|line| line.split(' ').next()?.parse().ok())
        .filter(|at| *at >= back)
        .collect();
    assert!(arrivals.len() >= FLEET);
    let crowd = arrivals
        .iter()
        .map(|from| arrivals.iter().filter(|at| (*from..*from + 100).contains(at)).count())
        .max()
        .unwrap_or(0);
    assert!(crowd * 100 <= FLEET * 5, "{crowd} of {FLEET} came within 100 ms");
    // Nobody who is well is dropped.
    world.run(Duration::from_secs(120));
    assert_eq!(connected(&world), FLEET);
}
