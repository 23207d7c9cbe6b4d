//! A group that is a plain list of addresses: its servers are asked what they are, `decide` says what should be, and here it is done. Every gse_dba in front of
//! the group does the same, and what one has done the others find done.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use redis::aio::MultiplexedConnection;

use super::control;
use super::decide::{self, Follows, Plan, Rules, View};
use super::record::{self, Record};
use super::seat::Seat;
use crate::config::sharded::{Group, Member};
use crate::single::dial::Place;

/// A server that stands still is not waited for longer than this.
const LOOK: Duration = Duration::from_secs(1);

/// The servers of a list.
#[derive(Clone, Debug)]
pub(super) struct List {
    pub(super) members: Vec<Member>,
    pub(super) names: Vec<String>,
    /// Where its record is; a group under Sentinel has none.
    pub(super) db: i64,
}

/// A server that has answered.
pub(super) struct Met {
    pub(super) conn: MultiplexedConnection,
    pub(super) view: View,
}

impl List {
    pub(super) fn of(group: &Group) -> anyhow::Result<Self> {
        let members = group
            .servers
            .iter()
            .map(|s| Member::read(s))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let names = members.iter().map(|m| m.known.clone()).collect();
        Ok(Self {
            members,
            names,
            db: record::DB,
        })
    }

    pub(super) fn at(&self, place: &Place) -> Option<usize> {
        self.members.iter().position(|m| m.place == *place)
    }

    /// The server that goes by this address.
    pub(super) async fn find(&self, address: &str) -> Option<usize> {
        if let Some(i) = self.names.iter().position(|n| n == address) {
            return Some(i);
        }
        for (i, name) in self.names.iter().enumerate() {
            if same(name, address).await {
                return Some(i);
            }
        }
        None
    }

    pub(super) fn rules<'a>(&'a self, seat: &'a Seat, floor: u64) -> Rules<'a> {
        Rules {
            group: &seat.name,
            names: &self.names,
            acknowledged: seat.config.acknowledged,
            current: seat.head().place.and_then(|p| self.at(&p)),
            floor,
        }
    }

    /// Asks all of them at once.
    pub(super) async fn meet(&self, seat: &Seat) -> Vec<Option<Met>> {
        let limit = seat.login.timeout.min(LOOK);
        futures::future::join_all(self.members.iter().map(|m| async move {
            match tokio::time::timeout(limit, self.ask(seat, m)).await {
                Ok(Ok(met)) => Some(met),
                Ok(Err(e)) => {
                    tracing::debug!(group = %seat.name, server = %m.known, error = %format!("{e:#}"), "a server does not say what it is");
                    None
                }
                Err(_) => None,
            }
        }))
        .await
    }

    async fn ask(&self, seat: &Seat, member: &Member) -> anyhow::Result<Met> {
        let mut conn = control::connect_to(&member.place, &seat.login, self.db).await?;
        let whole = record::look(&mut conn).await?;
        let text = record::text(&mut conn).await?;
        let follows = if whole.replication.is_primary {
            Follows::Nobody
        } else {
            let whom = whole.replication.copies_from.clone().unwrap_or_default();
            match self.find(&whom).await {
                // Its own copy is what a change of the primary makes of it for a moment.
                Some(i) if self.names[i] != member.known => Follows::Listed(i),
                _ => Follows::Elsewhere(whom),
            }
        };
        let record = text.as_deref().and_then(Record::read);
        Ok(Met {
            conn,
            view: View {
                whole,
                follows,
                text,
                record,
            },
        })
    }
}

/// Whether two addresses are one, by whatever names.
pub(super) async fn same(a: &str, b: &str) -> bool {
    if a == b {
        return true;
    }
    let (Ok((ah, ap)), Ok((bh, bp))) = (record::split(a), record::split(b)) else {
        return false;
    };
    if ap != bp {
        return false;
    }
    async fn all(host: &str, port: u16) -> HashSet<SocketAddr> {
        let found = tokio::time::timeout(LOOK, tokio::net::lookup_host((host, port))).await;
        found
            .ok()
            .and_then(Result::ok)
            .map(Iterator::collect)
            .unwrap_or_default()
    }
    let (a, b) = (all(&ah, ap).await, all(&bh, bp).await);
    !a.is_disjoint(&b)
}

/// What came of a look at a list.
pub(super) struct Looked {
    pub(super) place: Place,
    pub(super) conn: MultiplexedConnection,
    pub(super) problems: Vec<String>,
    pub(super) strangers: Vec<String>,
    pub(super) epoch: u64,
}

/// Looks, decides, and does what is to be done. An error says why nobody can be the primary; `Ok(None)` keeps the one that was.
pub(super) async fn look(list: &List, seat: &Seat, floor: u64) -> Result<Looked, (Vec<String>, bool)> {
    let mut met = list.meet(seat).await;
    let views: Vec<Option<View>> = met.iter().map(|m| m.as_ref().map(|m| m.view.clone())).collect();
    let rules = list.rules(seat, floor);
    let mut plan = decide::decide(&rules, &views);
    let Some(head) = plan.head else {
        // A primary that does not answer now may do so in a moment; one that has become a copy is none.
        let keep = rules
            .current
            .is_some_and(|i| views.get(i).is_some_and(|v| v.as_ref().is_none_or(View::is_primary)));
        return Err((plan.problems, keep));
    };
    let made = arrange(list, seat, &mut met, &mut plan, head).await;
    if let Err(e) = made {
        plan.problems.push(format!("{e:#}"));
    }
    let newest = views.iter().flatten().map(View::epoch).max().unwrap_or(0);
    match met.get_mut(head).and_then(Option::take) {
        Some(m) => Ok(Looked {
            place: list.members[head].place.clone(),
            conn: m.conn,
            problems: plan.problems,
            strangers: plan.strangers,
            epoch: newest,
        }),
        None => Err((plan.problems, true)),
    }
}

/// Makes the servers what the plan says.
async fn arrange(
    list: &List,
    seat: &Seat,
    met: &mut [Option<Met>],
    plan: &mut Plan,
    head: usize,
) -> anyhow::Result<()> {
    let newest = met
        .iter()
        .flatten()
        .filter_map(|m| m.view.record.clone())
        .max_by_key(|r| r.epoch);
    let name = &list.names[head];
    if let Some(m) = met.get_mut(head).and_then(Option::as_mut)
        && !m.view.is_primary()
    {
        tracing::warn!(group = %seat.name, server = %name, "no server of the group is a primary: the one that has most becomes it");
        anyhow::ensure!(
            record::follow(&mut m.conn, m.view.text.as_deref(), None).await?,
            "the record of {name} has changed meanwhile"
        );
        record::remember(&mut m.conn).await;
    }
    for i in plan.attach.clone() {
        let Some(m) = met.get_mut(i).and_then(Option::as_mut) else {
            continue;
        };
        tracing::warn!(group = %seat.name, server = %list.names[i], primary = %name, "made a copy of the primary");
        let done = async {
            record::introduce(&mut m.conn, &seat.login.user, seat.login.password.as_deref()).await?;
            record::follow(&mut m.conn, m.view.text.as_deref(), Some(name)).await
        };
        match done.await {
            Ok(true) => record::remember(&mut m.conn).await,
            Ok(false) => plan
                .problems
                .push(format!("the record of {} has changed meanwhile", list.names[i])),
            Err(e) => plan
                .problems
                .push(format!("{} could not be made a copy of {name}: {e:#}", list.names[i])),
        }
    }
    if plan.renew
        && let Some(m) = met.get_mut(head).and_then(Option::as_mut)
    {
        // It is a copy itself one day.
        record::introduce(&mut m.conn, &seat.login.user, seat.login.password.as_deref()).await?;
        let whole = record::look(&mut m.conn).await?;
        if list.names.len() == 1 {
            // There is nobody to agree with.
            return Ok(());
        }
        if whole.replication.copies.len() < seat.need {
            // It would take no write now. Who follows whom says the same until it does.
            return Ok(());
        }
        let new = match &newest {
            Some(r) => r.next(r.epoch, name, &whole.history),
            None => Record::first(&seat.name, name, &whole.history),
        };
        if record::write(&mut m.conn, m.view.text.as_deref(), &new, seat.need).await? {
            tracing::info!(group = %seat.name, primary = %name, epoch = new.epoch, "written down who the primary is");
        }
    }
    Ok(())
}
