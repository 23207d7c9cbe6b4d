//! Routes in the state store, as they were written.
//!
//! A data id is one hash: `m` says who made it and names this life of it, `r.<life>.<name>` and `f.<life>.<name>` are its routes and
//! filters. Each route is a field of its own, so that two who write different ones at once lose nothing. `m` is only ever set where
//! there is none: whoever sets it has the id; what others wrote for a life that never began, or that is over, is not looked at. Every
//! change is followed by the counters that [`super::watch`] looks at; all keys fall on one slot, so that this order holds everywhere.

use std::collections::BTreeMap;

use gse_core::random::Random;
use gse_core::store::{Batch, Store, StoreError, as_int, as_pairs, as_string, command};
use gse_proto::keys;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::raw::RawObject;

/// Tries at a fresh number before the range counts as full of numbers that were given by hand.
const TRIES: usize = 10_000;
/// Data ids read in one go.
const CHUNK: usize = 500;
/// The first number that is given to a stream; those below are for people who choose their own, such as the monitor's 500 to 599.
const FIRST_STREAM: u64 = 1_001;

/// A field that is an order and a kept object.
#[derive(Serialize, Deserialize)]
struct Kept {
    o: u64,
    v: RawObject,
}

/// What is kept of a data id beside its routes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Meta {
    /// Which life of the id this is.
    pub life: String,
    /// Platform.
    pub plat_name: String,
    /// As it was written; none if it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<Box<RawValue>>,
    /// Who made it.
    #[serde(default)]
    pub operator: String,
}

/// A data id and its routes, in the order in which they were added.
#[derive(Debug, Clone)]
pub struct Channel {
    /// Who made it.
    pub meta: Meta,
    /// Routes.
    pub routes: Vec<RawObject>,
    /// Filters.
    pub filters: Vec<RawObject>,
    orders: BTreeMap<String, u64>,
}

/// A stream as it was written.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeptStream {
    /// Platform.
    pub plat_name: String,
    /// As it was written; none if it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<Box<RawValue>>,
    /// As it was written.
    pub stream_to: RawObject,
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It is there already.
    #[error("{0}")]
    Exists(String),
    /// No numbers are left.
    #[error("{0}")]
    Full(String),
}

/// Named objects of a request.
pub type Named = Vec<(String, RawObject)>;

/// Routes and streams in the store.
#[derive(Debug, Clone)]
pub struct RouteStore {
    store: Store,
    random: Random,
}

fn json<T: Serialize>(value: &T) -> String {
    // Types of this module, whose keys are texts: writing them can't fail.
    serde_json::to_string(value).unwrap_or_default()
}

/// What must follow every change of a data id.
fn changed(batch: &mut Batch, data_id: u32) {
    let mut count = command("HINCRBY", keys::route_versions());
    count.arg(data_id).arg(1);
    batch.push(keys::route_versions(), count);
    batch.push(keys::route_version(), command("INCR", keys::route_version()));
}

impl RouteStore {
    /// In this store.
    #[must_use]
    pub fn new(store: Store, random: Random) -> Self {
        Self { store, random }
    }

    /// How often anything has changed.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn version(&self) -> Result<u64, StoreError> {
        let mut batch = Batch::new();
        batch.push(keys::route_version(), command("GET", keys::route_version()));
        let reply = self.store.run(batch).await?.into_iter().next();
        let text = reply.map_or(Ok(None), as_string)?;
        Ok(text.and_then(|text| text.parse().ok()).unwrap_or(0))
    }

    /// How often each data id has changed, those that are gone among them.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn versions(&self) -> Result<BTreeMap<u32, u64>, StoreError> {
        let mut batch = Batch::new();
        batch.push(keys::route_versions(), command("HGETALL", keys::route_versions()));
        let reply = self.store.run(batch).await?.into_iter().next();
        let pairs = reply.map_or(Ok(vec![]), as_pairs)?;
        let number = |bytes: &[u8]| std::str::from_utf8(bytes).ok()?.parse::<u64>().ok();
        Ok(pairs
            .into_iter()
            .filter_map(|(id, count)| Some((u32::try_from(number(&id)?).ok()?, number(&count)?)))
            .collect())
    }

    /// All streams.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn streams(&self) -> Result<BTreeMap<u64, KeptStream>, StoreError> {
        let mut batch = Batch::new();
        batch.push(keys::streams(), command("HGETALL", keys::streams()));
        let reply = self.store.run(batch).await?.into_iter().next();
        let mut streams = BTreeMap::new();
        for (id, text) in reply.map_or(Ok(vec![]), as_pairs)? {
            let id: Option<u64> = std::str::from_utf8(&id).ok().and_then(|id| id.parse().ok());
            match (id, serde_json::from_slice(&text)) {
                (Some(id), Ok(stream)) => {
                    streams.insert(id, stream);
                }
                _ => tracing::error!(?id, "a stream in the store cannot be read and is left out"),
            }
        }
        Ok(streams)
    }

    /// Data ids, in the order asked; none for those that do not exist.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn channels(&self, ids: &[u32]) -> Result<Vec<Option<Channel>>, StoreError> {
        let mut found = Vec::with_capacity(ids.len());
        for some in ids.chunks(CHUNK) {
            let mut batch = Batch::new();
            for id in some {
                let key = keys::channel(*id);
                batch.push(&key, command("HGETALL", &key));
            }
            for (id, reply) in some.iter().zip(self.store.run(batch).await?) {
                found.push(read(*id, as_pairs(reply)?));
            }
        }
        Ok(found)
    }

    /// One data id.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn channel(&self, id: u32) -> Result<Option<Channel>, StoreError> {
        Ok(self.channels(&[id]).await?.pop().flatten())
    }

    /// Makes a data id with its first routes. False: it is there already.
    ///
    /// # Errors
    /// The store does not answer; it is not known then whether it was made.
    pub async fn create(&self, id: u32, meta: &Meta, routes: &Named, filters: &Named) -> Result<bool, StoreError> {
        let life = format!("{:016x}", self.random.u64());
        let meta = Meta {
            life: life.clone(),
            ..meta.clone()
        };
        let key = keys::channel(id);
        let mut batch = Batch::new();
        let mut fields = Vec::new();
        for (kind, list) in [('r', routes), ('f', filters)] {
            for (order, (name, value)) in (0..).zip(list) {
                fields.push(field(kind, &life, name));
                put(&mut batch, &key, fields.last().map_or("", String::as_str), order, value);
            }
        }
        let place = batch.len();
        let mut claim = command("HSETNX", &key);
        claim.arg("m").arg(json(&meta));
        batch.push(&key, claim);
        changed(&mut batch, id);
        let reply = self.store.run(batch).await?.into_iter().nth(place);
        if reply.map_or(Ok(0), as_int)? == 1 {
            return Ok(true);
        }
        if !fields.is_empty() {
            let mut batch = Batch::new();
            let mut undo = command("HDEL", &key);
            undo.arg(fields);
            batch.push(&key, undo);
            self.store.run(batch).await?;
        }
        Ok(false)
    }

    /// Makes a data id of a number that nobody has, from `first` to `last`.
    ///
    /// # Errors
    /// The store, or no number is left.
    pub async fn mint(
        &self,
        meta: &Meta,
        (first, last): (u32, u32),
        routes: &Named,
        filters: &Named,
    ) -> Result<u32, ChangeError> {
        let key = keys::channel_ids(&meta.plat_name);
        for _ in 0..TRIES {
            let next = self.next(&key, u64::from(first)).await?;
            let id = u32::try_from(next).ok().filter(|id| *id <= last).ok_or_else(|| {
                ChangeError::Full(format!(
                    "no data id is left for {} ({first} to {last}); say which one in metadata.channel_id",
                    meta.plat_name
                ))
            })?;
            // A number may have been given by hand before.
            if self.create(id, meta, routes, filters).await? {
                return Ok(id);
            }
        }
        Err(ChangeError::Full(format!(
            "{TRIES} data ids in a row were taken; try again"
        )))
    }

    /// A number that no other instance gets.
    async fn next(&self, key: &str, first: u64) -> Result<u64, StoreError> {
        let mut batch = Batch::new();
        let mut start = command("SET", key);
        start.arg(first.saturating_sub(1)).arg("NX");
        batch.push(key, start);
        batch.push(key, command("INCR", key));
        let reply = self.store.run(batch).await?.into_iter().nth(1);
        Ok(u64::try_from(reply.map_or(Ok(0), as_int)?).unwrap_or(0))
    }

    /// Adds routes and filters, and replaces those of the same names; all others stay.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn upsert(&self, id: u32, to: &Channel, routes: &Named, filters: &Named) -> Result<(), StoreError> {
        let key = keys::channel(id);
        let mut batch = Batch::new();
        let mut last = to.orders.values().max().map_or(0, |order| order + 1);
        for (kind, list) in [('r', routes), ('f', filters)] {
            for (name, value) in list {
                let field = field(kind, &to.meta.life, name);
                let order = to.orders.get(&field).copied().unwrap_or_else(|| {
                    last += 1;
                    last
                });
                put(&mut batch, &key, &field, order, value);
            }
        }
        changed(&mut batch, id);
        self.store.run(batch).await.map(|_| ())
    }

    /// Removes routes and filters by name.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn remove(
        &self,
        id: u32,
        from: &Channel,
        routes: &[String],
        filters: &[String],
    ) -> Result<(), StoreError> {
        let key = keys::channel(id);
        let life = &from.meta.life;
        let fields: Vec<String> = routes
            .iter()
            .map(|name| field('r', life, name))
            .chain(filters.iter().map(|name| field('f', life, name)))
            .collect();
        let mut batch = Batch::new();
        if !fields.is_empty() {
            let mut del = command("HDEL", &key);
            del.arg(fields);
            batch.push(&key, del);
        }
        changed(&mut batch, id);
        self.store.run(batch).await.map(|_| ())
    }

    /// Removes a data id.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn delete(&self, id: u32) -> Result<(), StoreError> {
        let key = keys::channel(id);
        let mut batch = Batch::new();
        batch.push(&key, command("DEL", &key));
        changed(&mut batch, id);
        self.store.run(batch).await.map(|_| ())
    }

    /// Adds a stream; `asked`: under this number.
    ///
    /// # Errors
    /// The store, or a stream with this number exists.
    pub async fn add_stream(&self, asked: Option<u64>, stream: &KeptStream) -> Result<u64, ChangeError> {
        for _ in 0..TRIES {
            let id = match asked {
                Some(id) => id,
                None => self.next(keys::stream_ids(), FIRST_STREAM).await?,
            };
            let mut batch = Batch::new();
            let mut claim = command("HSETNX", keys::streams());
            claim.arg(id).arg(json(stream));
            batch.push(keys::streams(), claim);
            batch.push(keys::route_version(), command("INCR", keys::route_version()));
            let reply = self.store.run(batch).await?.into_iter().next();
            if reply.map_or(Ok(0), as_int)? == 1 {
                return Ok(id);
            }
            if asked.is_some() {
                return Err(ChangeError::Exists(format!(
                    "stream_to_id {id} exists already; change it with update_streamto"
                )));
            }
        }
        Err(ChangeError::Full(format!(
            "{TRIES} numbers of streams in a row were taken; try again"
        )))
    }

    /// Replaces what a stream is.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn set_stream(&self, id: u64, stream: &KeptStream) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        let mut set = command("HSET", keys::streams());
        set.arg(id).arg(json(stream));
        batch.push(keys::streams(), set);
        batch.push(keys::route_version(), command("INCR", keys::route_version()));
        self.store.run(batch).await.map(|_| ())
    }

    /// Removes a stream. False: there is none.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn delete_stream(&self, id: u64) -> Result<bool, StoreError> {
        let mut batch = Batch::new();
        let mut del = command("HDEL", keys::streams());
        del.arg(id);
        batch.push(keys::streams(), del);
        batch.push(keys::route_version(), command("INCR", keys::route_version()));
        let reply = self.store.run(batch).await?.into_iter().next();
        Ok(reply.map_or(Ok(0), as_int)? == 1)
    }

    /// What was noted down when a site's file was put in; none if none ever was.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn seeded(&self) -> Result<Option<String>, StoreError> {
        let mut batch = Batch::new();
        batch.push(keys::routes_seeded(), command("GET", keys::routes_seeded()));
        let reply = self.store.run(batch).await?.into_iter().next();
        reply.map_or(Ok(None), as_string)
    }

    /// Notes down that a site's file has been put in.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn set_seeded(&self, note: &str) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        let mut set = command("SET", keys::routes_seeded());
        set.arg(note);
        batch.push(keys::routes_seeded(), set);
        self.store.run(batch).await.map(|_| ())
    }
}

fn field(kind: char, life: &str, name: &str) -> String {
    format!("{kind}.{life}.{name}")
}

fn put(batch: &mut Batch, key: &str, field: &str, order: u64, value: &RawObject) {
    let kept = Kept {
        o: order,
        v: value.clone(),
    };
    let mut set = command("HSET", key);
    set.arg(field).arg(json(&kept));
    batch.push(key, set);
}

/// A data id from its fields; none without `m`.
fn read(id: u32, fields: Vec<(bytes::Bytes, bytes::Bytes)>) -> Option<Channel> {
    let meta = fields.iter().find(|(name, _)| &name[..] == b"m")?;
    let meta: Meta = serde_json::from_slice(&meta.1)
        .inspect_err(|error| tracing::error!(data_id = id, %error, "a data id in the store cannot be read"))
        .ok()?;
    let mut orders = BTreeMap::new();
    let mut lists = [Vec::new(), Vec::new()];
    let prefixes = [field('r', &meta.life, ""), field('f', &meta.life, "")];
    for (name, text) in &fields {
        let Some(place) = prefixes.iter().position(|prefix| name.starts_with(prefix.as_bytes())) else {
            continue;
        };
        match serde_json::from_slice::<Kept>(text) {
            Ok(kept) => {
                let name = String::from_utf8_lossy(name).into_owned();
                orders.insert(name.clone(), kept.o);
                lists[place].push((kept.o, name, kept.v));
            }
            Err(error) => tracing::error!(data_id = id, %error, "a route in the store cannot be read and is left out"),
        }
    }
    let [routes, filters] = lists.map(|mut list| {
        list.sort_by(|a, b| (a.0, &a.1).cmp(&(b.0, &b.1)));
        list.into_iter().map(|(_, _, value)| value).collect()
    });
    Some(Channel {
        meta,
        routes,
        filters,
        orders,
    })
}
