//! The keyspace: entries, their expiry and version of being watched, the reckoning of memory. It knows nothing of the wire and nothing of the disk; what must reach the log
//! is collected as effects by the commands.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use ahash::RandomState;
use indexmap::IndexMap;

use super::value::{Kind, Value};
use crate::args::Args;
use crate::resp::write::Writer;

/// Why a command was refused: one error line.
#[derive(Debug)]
pub(crate) struct Refusal(pub(crate) Cow<'static, str>);

impl From<&'static str> for Refusal {
    fn from(text: &'static str) -> Self {
        Self(Cow::Borrowed(text))
    }
}

impl From<String> for Refusal {
    fn from(text: String) -> Self {
        Self(Cow::Owned(text))
    }
}

/// What a command comes to: its reply is written, or it is refused and nothing was changed.
pub(crate) type Outcome = Result<(), Refusal>;

pub(crate) const WRONG_TYPE: &str = "WRONGTYPE Operation against a key holding the wrong kind of value";
pub(crate) const SYNTAX: &str = "ERR syntax error";
pub(crate) const NOT_INT: &str = "ERR value is not an integer or out of range";
pub(crate) const NOT_FLOAT: &str = "ERR value is not a valid float";
pub(crate) const OUT_OF_RANGE: &str = "ERR index out of range";
pub(crate) const NO_KEY: &str = "ERR no such key";

/// Changes in the form in which they are logged and replayed: commands with absolute values, each as a count of arguments and length-prefixed arguments (u32, little endian).
#[derive(Default, Debug)]
pub(crate) struct Effects {
    pub(crate) buf: Vec<u8>,
    pub(crate) count: u32,
    /// Replay applies effects; it must not produce them again.
    pub(crate) off: bool,
}

impl Effects {
    pub(crate) fn clear(&mut self) {
        self.buf.clear();
        self.count = 0;
    }

    fn begin(&mut self, argc: usize) {
        self.count += 1;
        self.buf.extend_from_slice(&(argc as u32).to_le_bytes());
    }

    fn arg(&mut self, arg: &[u8]) {
        self.buf.extend_from_slice(&(arg.len() as u32).to_le_bytes());
        self.buf.extend_from_slice(arg);
    }

    pub(crate) fn push(&mut self, parts: &[&[u8]]) {
        if !self.off {
            self.begin(parts.len());
            parts.iter().for_each(|p| self.arg(p));
        }
    }

    /// A command with a list of arguments: `HEAD key item...`.
    pub(crate) fn push_many<'x>(&mut self, name: &[u8], key: &[u8], items: impl ExactSizeIterator<Item = &'x [u8]>) {
        if !self.off {
            self.begin(items.len() + 2);
            self.arg(name);
            self.arg(key);
            items.for_each(|i| self.arg(i));
        }
    }

    /// A command that is its own effect.
    pub(crate) fn push_args(&mut self, args: Args<'_>) {
        if !self.off {
            self.begin(args.len());
            args.iter().for_each(|a| self.arg(a));
        }
    }
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) value: Value,
    /// Milliseconds of the Unix epoch; 0 means never.
    pub(crate) expires: i64,
}

/// What a key costs beside its value and its name.
const ENTRY: usize = 120;
const EXPIRY: usize = 64;

#[derive(Default, Debug)]
pub(crate) struct Db {
    pub(crate) map: IndexMap<Arc<[u8]>, Entry, RandomState>,
    pub(crate) expires: BTreeSet<(i64, Arc<[u8]>)>,
    /// Bytes, by reckoning.
    pub(crate) memory: usize,
    pub(crate) expired: u64,
    watchers: HashMap<Vec<u8>, Vec<u64>, RandomState>,
    /// Sessions whose watched keys changed.
    pub(crate) dirty: HashSet<u64>,
}

impl Db {
    fn cost(key: &[u8], entry: &Entry) -> usize {
        ENTRY
            + key.len() * if entry.expires > 0 { 2 } else { 1 }
            + entry.value.bytes()
            + if entry.expires > 0 { EXPIRY } else { 0 }
    }

    pub(crate) fn watch(&mut self, key: &[u8], session: u64) {
        let list = self.watchers.entry(key.to_vec()).or_default();
        if !list.contains(&session) {
            list.push(session);
        }
    }

    pub(crate) fn unwatch(&mut self, key: &[u8], session: u64) {
        if let Some(list) = self.watchers.get_mut(key) {
            list.retain(|s| *s != session);
            if list.is_empty() {
                self.watchers.remove(key);
            }
        }
    }

    /// Says that a key changed, to those who watch it.
    pub(crate) fn touch(&mut self, key: &[u8]) {
        if !self.watchers.is_empty()
            && let Some(list) = self.watchers.get(key)
        {
            self.dirty.extend(list.iter().copied());
        }
    }

    pub(crate) fn put(&mut self, key: &[u8], value: Value, expires: i64) {
        let entry = Entry { value, expires };
        self.memory += Self::cost(key, &entry);
        if let Some((i, name, old)) = self.map.get_full_mut(key) {
            let name = Arc::clone(name);
            let old = std::mem::replace(old, entry);
            self.memory -= Self::cost(key, &old);
            if old.expires != expires {
                self.index_expiry(&name, old.expires, expires);
            }
            let _ = i;
        } else {
            let name: Arc<[u8]> = key.into();
            if expires > 0 {
                self.expires.insert((expires, Arc::clone(&name)));
            }
            self.map.insert(name, entry);
        }
    }

    fn index_expiry(&mut self, name: &Arc<[u8]>, old: i64, new: i64) {
        if old > 0 {
            self.expires.remove(&(old, Arc::clone(name)));
        }
        if new > 0 {
            self.expires.insert((new, Arc::clone(name)));
        }
    }

    pub(crate) fn remove(&mut self, key: &[u8]) -> Option<Entry> {
        let (name, entry) = self.map.swap_remove_entry(key)?;
        self.memory -= Self::cost(key, &entry);
        if entry.expires > 0 {
            self.expires.remove(&(entry.expires, name));
        }
        Some(entry)
    }

    pub(crate) fn set_expiry(&mut self, key: &[u8], at: i64) {
        let Some((_, name, entry)) = self.map.get_full_mut(key) else {
            return;
        };
        let name = Arc::clone(name);
        self.memory -= Self::cost(key, entry);
        let old = std::mem::replace(&mut entry.expires, at);
        self.memory += Self::cost(key, entry);
        self.index_expiry(&name, old, at);
    }

    pub(crate) fn clear(&mut self) {
        let names: Vec<Vec<u8>> = self
            .watchers
            .keys()
            .filter(|k| self.map.contains_key(k.as_slice()))
            .cloned()
            .collect();
        for name in names {
            self.touch(&name);
        }
        self.map = IndexMap::default();
        self.expires.clear();
        self.memory = 0;
    }
}

/// One command's view of the world.
pub(crate) struct Exec<'a> {
    pub(crate) db: &'a mut Db,
    pub(crate) log: &'a mut Effects,
    /// Milliseconds of the Unix epoch; 0 while replaying, when nothing expires by itself.
    pub(crate) now: i64,
}

impl Exec<'_> {
    /// Whether the key exists now; an expired one is removed on the way, and that is logged.
    pub(crate) fn live(&mut self, key: &[u8]) -> bool {
        match self.db.map.get(key) {
            None => false,
            Some(e) if e.expires == 0 || self.now == 0 || e.expires > self.now => true,
            Some(_) => {
                self.db.remove(key);
                self.db.expired += 1;
                self.log.push(&[b"DEL", key]);
                self.db.touch(key);
                false
            }
        }
    }

    pub(crate) fn entry(&mut self, key: &[u8]) -> Option<&Entry> {
        if self.live(key) { self.db.map.get(key) } else { None }
    }

    /// The value of this kind under the key, if there is one; another kind refuses.
    pub(crate) fn read<T: Kind>(&mut self, key: &[u8]) -> Result<Option<&T>, Refusal> {
        match self.entry(key) {
            None => Ok(None),
            Some(e) => T::of(&e.value).map(Some).ok_or(WRONG_TYPE.into()),
        }
    }

    /// Refuses a key of another kind; says whether the key exists.
    pub(crate) fn check<T: Kind>(&mut self, key: &[u8]) -> Result<bool, Refusal> {
        Ok(self.read::<T>(key)?.is_some())
    }

    /// Changes the value under the key, making an empty one first when `create`; a collection left empty goes. `None` when there is no key.
    pub(crate) fn edit<T: Kind, R>(
        &mut self,
        key: &[u8],
        create: bool,
        change: impl FnOnce(&mut T) -> R,
    ) -> Result<Option<R>, Refusal> {
        if !self.live(key) {
            if !create {
                return Ok(None);
            }
            self.db.put(key, T::empty(), 0);
        }
        let Some(entry) = self.db.map.get_mut(key) else {
            return Ok(None);
        };
        let before = entry.value.bytes();
        let Some(value) = T::of_mut(&mut entry.value) else {
            return Err(WRONG_TYPE.into());
        };
        let result = change(value);
        let after = entry.value.bytes();
        let empty = entry.value.is_empty_collection();
        self.db.memory = self.db.memory + after - before;
        if empty {
            self.db.remove(key);
        }
        Ok(Some(result))
    }

    /// The key changed: watchers learn it.
    pub(crate) fn touch(&mut self, key: &[u8]) {
        self.db.touch(key);
    }

    /// Stores a value under a key, whatever was there.
    pub(crate) fn put(&mut self, key: &[u8], value: Value, expires: i64) {
        self.db.put(key, value, expires);
        self.db.touch(key);
    }

    /// Deletes and logs; true when there was something.
    pub(crate) fn delete(&mut self, key: &[u8]) -> bool {
        if !self.live(key) {
            return false;
        }
        self.db.remove(key);
        self.log.push(&[b"DEL", key]);
        self.db.touch(key);
        true
    }
}

/// A command of the embedded store.
pub(crate) type Handler = fn(&mut Exec<'_>, Args<'_>, &mut Writer) -> Outcome;

/// Removes keys whose time has come, `limit` at most; returns how many went.
pub(crate) fn expire_due(x: &mut Exec<'_>, limit: usize) -> usize {
    let mut gone = 0;
    while gone < limit {
        let key = match x.db.expires.first() {
            Some((at, key)) if *at <= x.now => Arc::clone(key),
            _ => break,
        };
        x.live(&key);
        gone += 1;
    }
    gone
}

/// An integer argument.
pub(crate) fn int(arg: &[u8]) -> Result<i64, Refusal> {
    super::numbers::parse_int(arg).ok_or(NOT_INT.into())
}

/// A double argument.
pub(crate) fn float(arg: &[u8]) -> Result<f64, Refusal> {
    super::numbers::parse_double(arg).ok_or(NOT_FLOAT.into())
}

/// Python-like slice ends over `len` elements, both inclusive, as half-open bounds.
pub(crate) fn slice(len: usize, start: i64, stop: i64) -> (usize, usize) {
    let n = len as i64;
    let from = if start < 0 { (n + start).max(0) } else { start };
    let to = if stop < 0 {
        n.saturating_add(stop)
    } else {
        stop.min(n - 1)
    };
    if from > to || from >= n {
        (0, 0)
    } else {
        (from as usize, to as usize + 1)
    }
}

/// Refuses with the way Redis names a command.
pub(crate) fn invalid_expire(command: &str) -> Refusal {
    format!("ERR invalid expire time in '{command}' command").into()
}
