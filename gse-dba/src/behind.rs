//! One client's way to whatever Redis stands behind: one, or several groups.

use std::sync::Arc;

use crate::client::Client;
use crate::commands::Spec;
use crate::conn::Ended;
use crate::resp::parse::Requests;
use crate::resp::write::Writer;
use crate::server::Store;
use crate::sharded::session::Session as Sharded;
use crate::single::dial::Private;
use crate::single::session::Session as Single;

pub(crate) enum Behind {
    Single(Box<Single>),
    Sharded(Box<Sharded>),
}

impl Behind {
    /// None in front of the embedded store.
    pub(crate) fn new(store: &Store, client: &Arc<Client>) -> Option<Self> {
        match store {
            Store::Embedded(_) => None,
            Store::Single(single) => Some(Self::Single(Box::new(Single::new(single.clone(), Arc::clone(client))))),
            Store::Sharded(sharded) => Some(Self::Sharded(Box::new(Sharded::new(
                sharded.clone(),
                Arc::clone(client),
            )))),
        }
    }

    /// Whether the connection has become one that is sent to.
    pub(crate) fn subscribed(&self) -> bool {
        match self {
            Self::Single(s) => s.subscribed(),
            Self::Sharded(_) => false,
        }
    }

    pub(crate) fn take_subscribed(&mut self) -> Option<Private> {
        match self {
            Self::Single(s) => s.take_subscribed(),
            Self::Sharded(_) => None,
        }
    }

    /// Forgets transaction and watches.
    pub(crate) fn reset(&mut self) {
        match self {
            Self::Single(s) => s.reset(),
            Self::Sharded(s) => s.reset(),
        }
    }

    /// What every group says of itself in `INFO`, as far as they answer; none when there are no groups.
    pub(crate) async fn info(&mut self) -> Option<Vec<String>> {
        match self {
            Self::Single(_) => None,
            Self::Sharded(s) => Some(s.info().await),
        }
    }

    /// Wakes a connection that waits at a group.
    pub(crate) async fn unblock(&mut self, group: usize, upstream: i64, error: bool, out: &mut Writer) {
        match self {
            Self::Single(_) => out.int(0),
            Self::Sharded(s) => s.unblock(group, upstream, error, out).await,
        }
    }

    /// A command was refused before it came here.
    pub(crate) fn spoil(&mut self) {
        if let Self::Sharded(s) = self {
            s.spoil();
        }
    }

    /// Collects request `i`; sends what was collected before when this one goes another way.
    pub(crate) async fn forward(
        &mut self,
        requests: &Requests,
        i: usize,
        spec: Option<&'static Spec>,
        out: &mut Writer,
    ) -> Result<(), Ended> {
        match self {
            Self::Single(s) => s.forward(requests, i, spec, out).await,
            Self::Sharded(s) => s.forward(requests, i, spec, out).await,
        }
    }

    /// Sends what is collected and takes the replies.
    pub(crate) async fn flush(&mut self, requests: &Requests, out: &mut Writer) -> Result<(), Ended> {
        match self {
            Self::Single(s) => s.flush(requests, out).await,
            Self::Sharded(s) => s.flush(requests, out).await,
        }
    }
}
