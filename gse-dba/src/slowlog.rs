//! Which commands took long: a ring of the latest, bounded in entries and bytes. What is measured is the time from a batch's arrival to its last reply, waiting
//! for copies included; commands that came in one batch share it, so one entry stands for the batch. Who asks for it and in which form is `admin`'s.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::args::Args;
use crate::config::Admin;
use crate::resp::write::Writer;

/// Arguments kept of one command, and bytes of one argument: as Redis has them.
const MAX_ARGS: usize = 32;
const MAX_ARG: usize = 128;
/// What an entry takes beside its texts, about.
const OVERHEAD: usize = 160;
/// Entries that are told when nobody says how many.
const SHOWN: usize = 10;

/// One slow batch.
struct Entry {
    id: u64,
    unix_s: u64,
    took_us: u64,
    /// The first command of it that went to the store, clipped.
    args: Vec<Vec<u8>>,
    /// Commands that came together.
    batch: usize,
    addr: String,
    name: String,
}

impl Entry {
    fn bytes(&self) -> usize {
        OVERHEAD + self.addr.len() + self.name.len() + self.args.iter().map(|a| a.len() + 24).sum::<usize>()
    }
}

#[derive(Default)]
struct Ring {
    next: u64,
    entries: VecDeque<Entry>,
    bytes: usize,
}

/// The ring.
pub(crate) struct Slowlog {
    /// Microseconds; `u64::MAX` is never.
    slower_than: AtomicU64,
    max_len: usize,
    max_bytes: usize,
    ring: Mutex<Ring>,
}

impl Slowlog {
    pub(crate) fn new(config: &Admin) -> Self {
        Self {
            slower_than: AtomicU64::new(u64::try_from(config.slowlog_slower_than_us).unwrap_or(u64::MAX)),
            max_len: config.slowlog_max_len,
            max_bytes: config.slowlog_max_bytes,
            ring: Mutex::default(),
        }
    }

    /// Whether a batch that took so long is to be kept.
    pub(crate) fn is_slow(&self, took: Duration) -> bool {
        let limit = self.slower_than.load(Ordering::Relaxed);
        limit != u64::MAX && took.as_micros() >= u128::from(limit) && self.max_len > 0
    }

    /// Keeps a batch; the oldest ones make room.
    pub(crate) fn keep(&self, took: Duration, command: Args<'_>, batch: usize, addr: &str, name: &str) {
        let mut entry = Entry {
            id: 0,
            unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            took_us: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            args: clipped(command),
            batch,
            addr: addr.to_owned(),
            name: name.to_owned(),
        };
        let mut ring = self.ring.lock();
        entry.id = ring.next;
        ring.next += 1;
        ring.bytes += entry.bytes();
        ring.entries.push_front(entry);
        while ring.entries.len() > self.max_len || (ring.bytes > self.max_bytes && ring.entries.len() > 1) {
            if let Some(old) = ring.entries.pop_back() {
                ring.bytes -= old.bytes();
            }
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.ring.lock().entries.len()
    }

    pub(crate) fn reset(&self) {
        let mut ring = self.ring.lock();
        ring.entries.clear();
        ring.bytes = 0;
    }

    /// The latest entries, newest first.
    pub(crate) fn json(&self, n: usize) -> Value {
        let ring = self.ring.lock();
        let entries: Vec<Value> = ring
            .entries
            .iter()
            .take(n)
            .map(|e| {
                json!({
                    "id": e.id,
                    "time": e.unix_s,
                    "took_us": e.took_us,
                    "command": e.args.iter().map(|a| String::from_utf8_lossy(a)).collect::<Vec<_>>(),
                    "batch": e.batch,
                    "client": e.addr,
                    "name": e.name,
                })
            })
            .collect();
        let limit = self.slower_than.load(Ordering::Relaxed);
        json!({
            "entries": entries,
            "kept": ring.entries.len(),
            "seen": ring.next,
            "slower_than_us": (limit != u64::MAX).then_some(limit),
        })
    }

    /// Answers `SLOWLOG` as Redis does.
    pub(crate) fn answer(&self, a: Args<'_>, w: &mut Writer) {
        let is = |word: &str, len: usize| a.is(1, word) && a.len() == len;
        if is("LEN", 2) {
            w.len(self.len());
        } else if is("RESET", 2) {
            self.reset();
            w.ok();
        } else if is("GET", 2) {
            self.entries(SHOWN, w);
        } else if is("GET", 3) {
            match crate::engine::numbers::parse_int(a.at(2)) {
                Some(-1) => self.entries(usize::MAX, w),
                Some(n) if n >= 0 => self.entries(usize::try_from(n).unwrap_or(usize::MAX), w),
                Some(_) => w.error(b"ERR count should be greater than or equal to -1"),
                None => w.error(b"ERR value is not an integer or out of range"),
            }
        } else {
            w.error(
                format!(
                    "ERR unknown subcommand or wrong number of arguments for '{}'. Try SLOWLOG HELP.",
                    String::from_utf8_lossy(a.at(1)).chars().take(128).collect::<String>()
                )
                .as_bytes(),
            );
        }
    }

    fn entries(&self, n: usize, w: &mut Writer) {
        let ring = self.ring.lock();
        let n = n.min(ring.entries.len());
        w.array(n);
        for e in ring.entries.iter().take(n) {
            w.array(6);
            w.int(i64::try_from(e.id).unwrap_or(i64::MAX));
            w.int(i64::try_from(e.unix_s).unwrap_or(i64::MAX));
            w.int(i64::try_from(e.took_us).unwrap_or(i64::MAX));
            w.array(e.args.len());
            e.args.iter().for_each(|a| w.bulk(a));
            w.bulk(e.addr.as_bytes());
            w.bulk(e.name.as_bytes());
        }
    }
}

fn clipped(a: Args<'_>) -> Vec<Vec<u8>> {
    let whole = if a.len() > MAX_ARGS { MAX_ARGS - 1 } else { a.len() };
    let mut out: Vec<Vec<u8>> = a
        .iter()
        .take(whole)
        .map(|arg| {
            let mut kept = arg[..arg.len().min(MAX_ARG)].to_vec();
            if arg.len() > MAX_ARG {
                kept.extend_from_slice(format!("... ({} more bytes)", arg.len() - MAX_ARG).as_bytes());
            }
            kept
        })
        .collect();
    if a.len() > whole {
        out.push(format!("... ({} more arguments)", a.len() - whole).into_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Span;

    fn keep(log: &Slowlog, words: &[&[u8]], took_us: u64) {
        let mut buf = Vec::new();
        let spans: Vec<Span> = words
            .iter()
            .map(|w| {
                let start = buf.len() as u32;
                buf.extend_from_slice(w);
                Span {
                    start,
                    end: buf.len() as u32,
                }
            })
            .collect();
        log.keep(
            Duration::from_micros(took_us),
            Args::new(&buf, &spans),
            1,
            "1.2.3.4:5",
            "n",
        );
    }

    #[test]
    fn the_newest_are_kept_and_the_rest_makes_room() {
        let log = Slowlog::new(&Admin {
            slowlog_slower_than_us: 100,
            slowlog_max_len: 3,
            ..Admin::default()
        });
        assert!(log.is_slow(Duration::from_micros(100)) && !log.is_slow(Duration::from_micros(99)));
        for i in 0..5u64 {
            keep(&log, &[b"GET", format!("k{i}").as_bytes()], 100 + i);
        }
        let told = log.json(2);
        assert_eq!((&told["kept"], &told["seen"]), (&json!(3), &json!(5)));
        assert_eq!(told["entries"][0]["command"], json!(["GET", "k4"]));
        assert_eq!(told["entries"].as_array().map(Vec::len), Some(2));
        log.reset();
        assert_eq!(log.len(), 0);
        let never = Slowlog::new(&Admin {
            slowlog_slower_than_us: -1,
            ..Admin::default()
        });
        assert!(!never.is_slow(Duration::from_secs(3600)));
    }

    #[test]
    fn large_commands_are_clipped_and_bytes_are_bounded() {
        let log = Slowlog::new(&Admin {
            slowlog_max_bytes: 64 << 10,
            slowlog_max_len: 10_000,
            ..Admin::default()
        });
        let (big, many) = (vec![b'x'; 1 << 20], vec![&b"aaaaaaaaaaaaaaaa"[..]; 5000]);
        for _ in 0..2000 {
            keep(&log, &[b"SET", b"k", &big], 20_000);
            keep(&log, &many, 20_000);
        }
        let ring = log.ring.lock();
        assert!(ring.bytes <= 64 << 10 && ring.entries.len() > 30, "{}", ring.bytes);
        assert_eq!(ring.bytes, ring.entries.iter().map(Entry::bytes).sum::<usize>());
        let newest = &ring.entries[0];
        assert_eq!(newest.args.len(), MAX_ARGS);
        assert_eq!(newest.args[31], b"... (4969 more arguments)");
        assert!(ring.entries[1].args[2].ends_with(b"... (1048448 more bytes)"));
    }
}
