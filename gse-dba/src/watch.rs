//! What is noted down about every batch that was served: how long it took, whether it belongs into the slow log, which keys it used. Called once for a batch, on
//! its connection; it takes no lock unless the batch was slow or drawn for the sample.

use std::time::Duration;

use crate::args::Args;
use crate::client::Client;
use crate::commands::{self, Class, Run};
use crate::config::Admin;
use crate::hotkeys::{Dice, Hotkeys, PER_BATCH};
use crate::metrics::Metrics;
use crate::resp::parse::Requests;
use crate::sharded::route;
use crate::slowlog::Slowlog;

/// The classes in the order in which a connection counts them.
pub(crate) const CLASSES: [Class; 5] = [
    Class::Read,
    Class::Write,
    Class::Transaction,
    Class::Connection,
    Class::Unknown,
];

pub(crate) struct Watch {
    pub(crate) slowlog: Slowlog,
    pub(crate) hotkeys: Hotkeys,
}

impl Watch {
    pub(crate) fn new(config: &Admin) -> Self {
        Self {
            slowlog: Slowlog::new(config),
            hotkeys: Hotkeys::new(config),
        }
    }

    /// Takes in a batch; `counts` are its commands by class, passed on and refused.
    pub(crate) fn batch(
        &self,
        metrics: &Metrics,
        client: &Client,
        dice: &mut Dice,
        requests: &Requests,
        counts: [(u64, u64); 5],
        took: Duration,
    ) {
        for (class, (passed, _)) in CLASSES.into_iter().zip(counts) {
            if passed > 0 {
                metrics.took(class, took, passed);
            }
        }
        if dice.falls(self.hotkeys.one_in()) {
            self.sample(requests);
        }
        if self.slowlog.is_slow(took) {
            self.slow(metrics, client, requests, took);
        }
    }

    fn sample(&self, requests: &Requests) {
        let n = requests.len();
        let step = n.div_ceil(PER_BATCH).max(1);
        let keys = (0..n).step_by(step).filter_map(|i| first_key(requests.args(i)));
        self.hotkeys.add(keys, step as u64);
    }

    fn slow(&self, metrics: &Metrics, client: &Client, requests: &Requests, took: Duration) {
        let mut first = None;
        for i in 0..requests.len() {
            let a = requests.args(i);
            let spec = commands::find(a.at(0));
            if route::blocks(spec, a) && !a.is(0, "WAIT") {
                // It was told to wait.
                return;
            }
            // What the connection answers itself (passwords among it) is not kept.
            if first.is_none() && !spec.is_some_and(|s| matches!(s.run, Run::Local(_) | Run::Admin)) {
                first = Some(a);
            }
        }
        if let Some(command) = first {
            metrics.slow();
            let name = client.names.lock().name.clone();
            self.slowlog.keep(took, command, requests.len(), &client.addr, &name);
        }
    }
}

/// The key that a command is about, if it names one at a place that can be told without reading all of it.
fn first_key(a: Args<'_>) -> Option<&[u8]> {
    let any = |names: &[&str]| names.iter().any(|n| a.is(0, n));
    let at = if any(&["EVAL", "EVALSHA", "EVAL_RO", "EVALSHA_RO", "FCALL", "FCALL_RO"]) {
        if a.at(2) == b"0" { 0 } else { 3 }
    } else {
        match commands::find(a.at(0)) {
            Some(spec) => usize::try_from(spec.keys.0).unwrap_or(0),
            None if any(&[
                "FUNCTION", "PUBSUB", "SPUBLISH", "LOLWUT", "ZUNION", "ZINTER", "ZDIFF", "LMPOP", "ZMPOP",
            ]) =>
            {
                0
            }
            None => 1,
        }
    };
    (at > 0 && at < a.len()).then(|| a.at(at))
}
