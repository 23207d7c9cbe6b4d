//! The document in one group: read, written by compare-and-set, and who else serves by it. It is in a database of its own, so that nothing a client can ask for
//! shows it, counts it or flushes it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use redis::aio::MultiplexedConnection;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::topology::Topology;
use crate::sharded::control;
use crate::sharded::seat::Seat;
use crate::single::dial::Place;

/// Installation, epoch and group, as a group has them noted.
type Noted = (Option<String>, Option<u64>, Option<String>);

/// The database for what is gse_dba's own.
const DATABASE: i64 = 1;
const TOPOLOGY: &str = "gse_dba:topology";
const INSTANCE: &str = "gse_dba:instance:";

/// Writes the document if it is newer than what is there, or exactly when a certain one is there.
const PUT: &str = "local id, epoch, name = unpack(redis.call('HMGET', KEYS[1], 'id', 'epoch', 'name'))
if id and id ~= ARGV[1] then return -2 end
if name and name ~= ARGV[5] then return -3 end
epoch = tonumber(epoch or '0')
if ARGV[4] ~= '' then
  if epoch ~= tonumber(ARGV[4]) then return epoch end
elseif epoch >= tonumber(ARGV[2]) then
  return epoch
end
redis.call('HSET', KEYS[1], 'id', ARGV[1], 'epoch', ARGV[2], 'doc', ARGV[3], 'name', ARGV[5])
return -1";

/// What a look at a group shows of its document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) id: String,
    pub(super) epoch: u64,
    pub(super) name: String,
}

/// How a look went.
#[derive(Debug, Default)]
pub(super) struct Looked {
    pub(super) seen: Option<Seen>,
    /// The group has taken down that we are there.
    pub(super) noted: bool,
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Put {
    Done,
    /// There is one of this epoch, and it stays.
    Other(u64),
}

/// A running gse_dba, as it says itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Instance {
    pub(crate) id: String,
    pub(crate) address: String,
    /// Nothing is under way any more by an older topology than that.
    pub(crate) epoch: u64,
    /// What it moves, when it moves something.
    #[serde(default)]
    pub(crate) work: Option<Value>,
}

/// A way to the document of one group.
pub(super) struct Shelf {
    seat: Arc<Seat>,
    conn: Option<(Place, MultiplexedConnection)>,
}

fn is_primary(role: &redis::Value) -> bool {
    let redis::Value::Array(items) = role else { return false };
    matches!(items.first(), Some(redis::Value::BulkString(b)) if b == b"master")
}

impl Shelf {
    pub(super) fn new(seat: &Arc<Seat>) -> Self {
        Self {
            seat: Arc::clone(seat),
            conn: None,
        }
    }

    /// What goes wrong on the connection may be the connection's fault: the next call has another.
    fn drop_on_error<T>(&mut self, result: anyhow::Result<T>) -> anyhow::Result<T> {
        if result.is_err() {
            self.conn = None;
        }
        result
    }

    async fn conn(&mut self) -> anyhow::Result<MultiplexedConnection> {
        let Some(place) = self.seat.head().place else {
            self.conn = None;
            bail!("group '{}' has no primary", self.seat.name);
        };
        if let Some((at, conn)) = &self.conn
            && *at == place
        {
            return Ok(conn.clone());
        }
        let wait = Duration::from_millis(self.seat.config.wait_ms);
        let conn = control::connect_longer(&place, &self.seat.login, DATABASE, wait)
            .await
            .with_context(|| {
                format!("the topology in group '{}' can't be reached (it is in database {DATABASE}, so the Redis needs `databases` of 2 or more)", self.seat.name)
            })?;
        self.conn = Some((place, conn.clone()));
        Ok(conn)
    }

    /// Says that we are there and looks at what there is, in this order: whoever writes later finds us, whoever wrote before is seen.
    pub(super) async fn look(&mut self, me: Option<(&Instance, Duration)>) -> anyhow::Result<Looked> {
        let mut conn = self.conn().await?;
        let looked = async {
            let mut noted = false;
            if let Some((me, lease)) = me {
                let set = redis::cmd("SET")
                    .arg(format!("{INSTANCE}{}", me.id))
                    .arg(serde_json::to_string(me)?)
                    .arg("PX")
                    .arg(u64::try_from(lease.as_millis())?.saturating_mul(2))
                    .exec_async(&mut conn)
                    .await;
                match set {
                    Ok(()) => noted = true,
                    // A group that is short of copies takes no writes, nor a newer document: reading is enough then.
                    Err(e) if e.code() == Some("NOREPLICAS") => {}
                    Err(e) => return Err(e.into()),
                }
            }
            let (seen, role): (Noted, redis::Value) = redis::pipe()
                .cmd("HMGET")
                .arg(TOPOLOGY)
                .arg(&["id", "epoch", "name"])
                .cmd("ROLE")
                .query_async(&mut conn)
                .await?;
            anyhow::ensure!(is_primary(&role), "it is no primary any more");
            let seen = match seen {
                (Some(id), Some(epoch), name) => Some(Seen {
                    id,
                    epoch,
                    name: name.unwrap_or_default(),
                }),
                _ => None,
            };
            Ok(Looked { seen, noted })
        }
        .await;
        self.drop_on_error(looked)
    }

    /// The document, confirmed by as many copies as a write needs.
    pub(super) async fn read(&mut self) -> anyhow::Result<Option<Topology>> {
        let mut conn = self.conn().await?;
        let need = self.seat.need;
        let wait = self.seat.config.wait_ms;
        let read = async {
            let (doc, role, copies): (Option<String>, redis::Value, usize) = redis::pipe()
                .cmd("HGET")
                .arg(TOPOLOGY)
                .arg("doc")
                .cmd("ROLE")
                .cmd("WAIT")
                .arg(need)
                .arg(if need > 0 { wait } else { 1 })
                .query_async(&mut conn)
                .await?;
            anyhow::ensure!(is_primary(&role), "it is no primary any more");
            anyhow::ensure!(
                copies >= need,
                "the topology in it is on {copies} of the {need} other copies that it needs"
            );
            let Some(doc) = doc else { return Ok(None) };
            serde_json::from_str(&doc)
                .context("the topology in it can't be understood: is a newer gse_dba at work?")
                .map(Some)
        }
        .await;
        self.drop_on_error(read)
    }

    /// Writes it, if it is newer; with `expected`, only over exactly this epoch. Done means on enough copies.
    pub(super) async fn put(&mut self, doc: &Topology, expected: Option<u64>) -> anyhow::Result<Put> {
        let mut conn = self.conn().await?;
        let (need, wait) = (self.seat.need, self.seat.config.wait_ms);
        let name = self.seat.name.clone();
        let put = async {
            let (done, role, copies): (i64, redis::Value, usize) = redis::pipe()
                .cmd("EVAL")
                .arg(PUT)
                .arg(1)
                .arg(TOPOLOGY)
                .arg(&doc.id)
                .arg(doc.epoch)
                .arg(serde_json::to_string(doc)?)
                .arg(expected.map_or(String::new(), |e| e.to_string()))
                .arg(&name)
                .cmd("ROLE")
                .cmd("WAIT")
                .arg(need)
                .arg(if need > 0 { wait } else { 1 })
                .query_async(&mut conn)
                .await?;
            anyhow::ensure!(is_primary(&role), "it is no primary any more");
            anyhow::ensure!(
                copies >= need,
                "the topology in it is on {copies} of the {need} other copies that it needs"
            );
            Ok(match done {
                -1 => Put::Done,
                -2 => bail!("group '{name}' belongs to another installation"),
                -3 => bail!("the servers of group '{name}' are those of another group"),
                epoch => Put::Other(epoch.unsigned_abs()),
            })
        }
        .await;
        self.drop_on_error(put)
    }

    /// Everybody who serves this group.
    pub(super) async fn instances(&mut self) -> anyhow::Result<Vec<Instance>> {
        let mut conn = self.conn().await?;
        let all = async {
            let (keys, role): (Vec<String>, redis::Value) = redis::pipe()
                .cmd("KEYS")
                .arg(format!("{INSTANCE}*"))
                .cmd("ROLE")
                .query_async(&mut conn)
                .await?;
            anyhow::ensure!(is_primary(&role), "it is no primary any more");
            if keys.is_empty() {
                return Ok(Vec::new());
            }
            let docs: Vec<Option<String>> = redis::cmd("MGET").arg(&keys).query_async(&mut conn).await?;
            docs.into_iter()
                .flatten()
                .map(|d| serde_json::from_str(&d).context("what another gse_dba says of itself can't be understood"))
                .collect()
        }
        .await;
        self.drop_on_error(all)
    }

    /// We are not there any more.
    pub(super) async fn leave(&mut self, id: &str) -> anyhow::Result<()> {
        let mut conn = self.conn().await?;
        let left = redis::cmd("DEL")
            .arg(format!("{INSTANCE}{id}"))
            .exec_async(&mut conn)
            .await;
        self.drop_on_error(left.map_err(Into::into))
    }
}
