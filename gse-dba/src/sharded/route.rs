//! Where a command goes, as a pure function of its words: which keys it names, whether they are in one slot, and what is to be done with
//! commands that concern several groups or none.

use super::slots::{SlotMap, slot};
use crate::args::Args;
use crate::commands::{self, BLOCKS, Run, Spec, WRITE};

/// What is to be done with a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    /// All its keys are in this slot.
    Slot(u16),
    /// It names no key: any group can answer.
    Any,
    /// Its keys are in several groups, and it is the sum of its parts.
    Split(Split),
    /// It concerns every group.
    All(Merge),
    /// One step of an iteration over all groups.
    Scan,
    /// It can't be right when it is sent anywhere.
    Refuse(String),
}

/// How a command over several groups is cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Split {
    /// `MGET`: one element for each key, in order.
    Values,
    /// `DEL`, `EXISTS`: a count for each part.
    Counts,
    /// `MSET`: pairs.
    Pairs,
}

/// How the replies of all groups become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Merge {
    Sum,
    /// Lists put together.
    Join,
    /// They should be the same; an error wins.
    Same,
    /// One that is not null.
    AnyOf,
    /// Lists of numbers: the least of each place.
    Least,
}

const CROSS: &str = "CROSSSLOT Keys in request don't hash to the same slot";

/// Commands of a Redis beyond the command table: whether they change data, and first and last key and the step between.
static FURTHER: &[(&str, bool, (i8, i8, i8))] = &[
    ("BITCOUNT", false, (1, 1, 1)),
    ("BITFIELD", true, (1, 1, 1)),
    ("BITFIELD_RO", false, (1, 1, 1)),
    ("BITOP", true, (2, -1, 1)),
    ("BITPOS", false, (1, 1, 1)),
    ("DUMP", false, (1, 1, 1)),
    ("GEOADD", true, (1, 1, 1)),
    ("GEODIST", false, (1, 1, 1)),
    ("GEOHASH", false, (1, 1, 1)),
    ("GEOPOS", false, (1, 1, 1)),
    ("GEORADIUS_RO", false, (1, 1, 1)),
    ("GEORADIUSBYMEMBER_RO", false, (1, 1, 1)),
    ("GEOSEARCH", false, (1, 1, 1)),
    ("GEOSEARCHSTORE", true, (1, 2, 1)),
    ("GETBIT", false, (1, 1, 1)),
    ("LCS", false, (1, 2, 1)),
    ("MEMORY", false, (2, 2, 1)),
    ("PFADD", true, (1, 1, 1)),
    ("PFCOUNT", true, (1, -1, 1)),
    ("PFMERGE", true, (1, -1, 1)),
    ("RESTORE", true, (1, 1, 1)),
    ("SETBIT", true, (1, 1, 1)),
    ("XACK", true, (1, 1, 1)),
    ("XAUTOCLAIM", true, (1, 1, 1)),
    ("XCLAIM", true, (1, 1, 1)),
    ("XDEL", true, (1, 1, 1)),
    ("XGROUP", true, (2, 2, 1)),
    ("XINFO", false, (2, 2, 1)),
    ("XPENDING", false, (1, 1, 1)),
    ("XREVRANGE", false, (1, 1, 1)),
    ("XSETID", true, (1, 1, 1)),
    ("XTRIM", true, (1, 1, 1)),
    ("ZRANDMEMBER", false, (1, 1, 1)),
];

/// Commands whose keys are counted: where the count is, a key before it (0: none), and whether they change data.
static COUNTED: &[(&str, usize, usize, bool)] = &[
    ("EVAL", 2, 0, true),
    ("EVALSHA", 2, 0, true),
    ("EVAL_RO", 2, 0, false),
    ("EVALSHA_RO", 2, 0, false),
    ("FCALL", 2, 0, true),
    ("FCALL_RO", 2, 0, false),
    ("SINTERCARD", 1, 0, false),
    ("ZINTERCARD", 1, 0, false),
    ("ZUNION", 1, 0, false),
    ("ZINTER", 1, 0, false),
    ("ZDIFF", 1, 0, false),
    ("ZUNIONSTORE", 2, 1, true),
    ("ZINTERSTORE", 2, 1, true),
    ("ZDIFFSTORE", 2, 1, true),
    ("LMPOP", 1, 0, true),
    ("ZMPOP", 1, 0, true),
    ("BLMPOP", 2, 0, true),
    ("BZMPOP", 2, 0, true),
];

fn of<T>(table: &'static [T], name: &[u8], key: impl Fn(&T) -> &'static str) -> Option<&'static T> {
    table.iter().find(|t| name.eq_ignore_ascii_case(key(t).as_bytes()))
}

/// Whether a command may change data; of one that nobody knows it must be supposed.
pub(crate) fn writes(spec: Option<&'static Spec>, a: Args<'_>) -> bool {
    match spec {
        Some(s) => s.is(WRITE) || matches!(s.run, Run::Tx(commands::Tx::Exec)),
        None => of(FURTHER, a.at(0), |t| t.0)
            .map(|t| t.1)
            .or_else(|| of(COUNTED, a.at(0), |t| t.0).map(|t| t.3))
            .unwrap_or(true),
    }
}

/// Whether it can make its connection wait, this time.
pub(crate) fn blocks(spec: Option<&'static Spec>, a: Args<'_>) -> bool {
    spec.is_some_and(|s| s.is(BLOCKS))
        && (!(a.is(0, "XREAD") || a.is(0, "XREADGROUP")) || (1..a.len()).any(|i| a.is(i, "BLOCK")))
}

/// Every name beyond the command table.
pub(crate) fn further() -> impl Iterator<Item = &'static str> {
    let counted = COUNTED
        .iter()
        .map(|c| c.0)
        .filter(|n| commands::find(n.as_bytes()).is_none());
    FURTHER.iter().map(|f| f.0).chain(counted).chain(OTHERS.iter().copied())
}

/// The name as it stands in the tables.
pub(crate) fn further_named(name: &[u8]) -> Option<&'static str> {
    further().find(|n| name.eq_ignore_ascii_case(n.as_bytes()))
}

/// Whether a command of this name may change data.
pub(crate) fn may_write(name: &'static str) -> bool {
    match commands::find(name.as_bytes()) {
        Some(s) => s.is(WRITE),
        None => of(FURTHER, name.as_bytes(), |t| t.0)
            .map(|t| t.1)
            .or_else(|| of(COUNTED, name.as_bytes(), |t| t.0).map(|t| t.3))
            .unwrap_or(!["SORT_RO", "PUBSUB", "LOLWUT"].contains(&name)),
    }
}

/// Commands that the tables have no row for, and that are known all the same.
static OTHERS: &[&str] = &[
    "SORT",
    "SORT_RO",
    "GEORADIUS",
    "GEORADIUSBYMEMBER",
    "FUNCTION",
    "SPUBLISH",
    "PUBSUB",
    "LOLWUT",
];

/// Parameters of the Redis behind that clients may set: how it stores and reports, never what it promises.
static SETTABLE: &[&str] = &[
    "active-expire-effort",
    "activedefrag",
    "activerehashing",
    "aof-use-rdb-preamble",
    "busy-reply-threshold",
    "client-query-buffer-limit",
    "hash-max-listpack-entries",
    "hash-max-listpack-value",
    "hash-max-ziplist-entries",
    "hash-max-ziplist-value",
    "hll-sparse-max-bytes",
    "hz",
    "latency-monitor-threshold",
    "latency-tracking",
    "latency-tracking-info-percentiles",
    "lazyfree-lazy-user-del",
    "lazyfree-lazy-user-flush",
    "lfu-decay-time",
    "lfu-log-factor",
    "list-compress-depth",
    "list-max-listpack-size",
    "list-max-ziplist-size",
    "lua-time-limit",
    "maxmemory",
    "notify-keyspace-events",
    "proto-max-bulk-len",
    "sanitize-dump-payload",
    "save",
    "set-max-intset-entries",
    "set-max-listpack-entries",
    "set-max-listpack-value",
    "slowlog-log-slower-than",
    "slowlog-max-len",
    "stream-node-max-bytes",
    "stream-node-max-entries",
    "zset-max-listpack-entries",
    "zset-max-listpack-value",
    "zset-max-ziplist-entries",
    "zset-max-ziplist-value",
];

fn config(a: Args<'_>) -> Route {
    if a.is(1, "GET") {
        return Route::Any;
    }
    if a.is(1, "RESETSTAT") {
        return Route::All(Merge::Same);
    }
    if a.is(1, "HELP") && a.len() == 2 {
        return Route::Any;
    }
    if !a.is(1, "SET") {
        return Route::Refuse(
            "ERR this form of CONFIG is not allowed through gse_dba: it would change the server, not the data".into(),
        );
    }
    let mut names = (2..a.len()).step_by(2);
    // What the promise needs may be said again.
    let settable = |i: usize| SETTABLE.iter().any(|s| a.is(i, s)) || a.is(i, "appendonly") && a.is(i + 1, "yes");
    match names.find(|i| !settable(*i)) {
        Some(i) => {
            let name: String = String::from_utf8_lossy(a.at(i)).chars().take(64).collect();
            Route::Refuse(format!(
                "ERR CONFIG SET of '{name}' is not allowed through gse_dba: it could break what is promised of acknowledged writes; set it on each Redis"
            ))
        }
        None => Route::All(Merge::Same),
    }
}

/// Where a command goes.
pub(crate) fn route(map: &SlotMap, spec: Option<&'static Spec>, a: Args<'_>, split_mset: bool) -> Route {
    way(map, spec, a, split_mset, true)
}

/// Where a command goes while there is one group only, and slots are not to matter: as on one Redis.
pub(crate) fn undivided(map: &SlotMap, spec: Option<&'static Spec>, a: Args<'_>) -> Route {
    way(map, spec, a, true, false)
}

fn way(map: &SlotMap, spec: Option<&'static Spec>, a: Args<'_>, split_mset: bool, divided: bool) -> Route {
    if let Some(spec) = spec {
        match spec.name {
            "CONFIG" => return config(a),
            "COMMAND" => return Route::Any,
            _ => {}
        }
        if !spec.arity_fits(a.len()) {
            // Redis says it in its own words.
            return Route::Any;
        }
        match spec.name {
            "PING" | "ECHO" | "TIME" | "PUBLISH" | "WAIT" | "LASTSAVE" => return Route::Any,
            "DBSIZE" => return Route::All(Merge::Sum),
            "KEYS" => return Route::All(Merge::Join),
            "FLUSHALL" | "FLUSHDB" => return Route::All(Merge::Same),
            "RANDOMKEY" => return Route::All(Merge::AnyOf),
            "SCAN" => return Route::Scan,
            "SCRIPT" if a.is(1, "EXISTS") => return Route::All(Merge::Least),
            "SCRIPT" if ["LOAD", "FLUSH"].iter().any(|s| a.is(1, s)) => return Route::All(Merge::Same),
            "SCRIPT" => return Route::Any,
            "SLOWLOG" | "LATENCY" => {
                return match a.at(1).to_ascii_uppercase().as_slice() {
                    b"GET" | b"LATEST" => Route::All(Merge::Join),
                    b"HISTORY" => Route::All(Merge::Join),
                    b"LEN" => Route::All(Merge::Sum),
                    b"RESET" if spec.name == "LATENCY" => Route::All(Merge::Sum),
                    b"RESET" => Route::All(Merge::Same),
                    _ => Route::Any,
                };
            }
            "MGET" => return split(map, a, 1, Split::Values),
            "DEL" | "UNLINK" | "EXISTS" | "TOUCH" => return split(map, a, 1, Split::Counts),
            "MSET" if split_mset && a.len() % 2 == 1 => return split(map, a, 2, Split::Pairs),
            "DEBUG" if !a.is(1, "OBJECT") => {
                return Route::Refuse("ERR of DEBUG, only DEBUG OBJECT is allowed through gse_dba".into());
            }
            _ => {}
        }
    } else if a.is(0, "SORT") || a.is(0, "SORT_RO") {
        if let Some(why) = sort_denied(a).filter(|_| divided) {
            return Route::Refuse(why.into());
        }
    } else if a.is(0, "FUNCTION") {
        let everywhere = ["LOAD", "DELETE", "FLUSH", "RESTORE"];
        return if everywhere.iter().any(|s| a.is(1, s)) {
            Route::All(Merge::Same)
        } else {
            Route::Any
        };
    }
    let (mut first, mut crosses) = (None, false);
    let known = keys(spec, a, &mut |i| {
        let s = if divided { slot(a.at(i)) } else { 0 };
        crosses |= *first.get_or_insert(s) != s;
    });
    match (known, crosses, first) {
        (false, ..) => Route::Refuse(commands::unknown(a).0.into_owned()),
        (true, true, _) => Route::Refuse(CROSS.into()),
        (true, false, Some(s)) => Route::Slot(s),
        (true, false, None) => Route::Any,
    }
}

/// Calls `each` with the place of every key that the command names; false when the command is not known.
pub(crate) fn keys(spec: Option<&'static Spec>, a: Args<'_>, each: &mut impl FnMut(usize)) -> bool {
    match spec {
        Some(s) => match s.name {
            "OBJECT" | "DEBUG" => {
                if a.len() > 2 {
                    each(2);
                }
            }
            "XREAD" | "XREADGROUP" => streams(a, each),
            _ => {
                let may_count = s.keys == (0, 0, 0) || s.name.ends_with("STORE");
                match may_count.then(|| of(COUNTED, a.at(0), |t| t.0)).flatten() {
                    Some(c) => counted(a, c.1, c.2, each),
                    None => at(a, s.keys, each),
                }
            }
        },
        None => {
            if let Some(c) = of(COUNTED, a.at(0), |t| t.0) {
                counted(a, c.1, c.2, each);
            } else if let Some(f) = of(FURTHER, a.at(0), |t| t.0) {
                at(a, f.2, each);
            } else if a.is(0, "SORT") {
                stored(a, &["STORE"], each);
            } else if a.is(0, "SORT_RO") {
                stored(a, &[], each);
            } else if a.is(0, "GEORADIUS") || a.is(0, "GEORADIUSBYMEMBER") {
                stored(a, &["STORE", "STOREDIST"], each);
            } else {
                return a.is(0, "SELECT") || OTHERS.iter().any(|n| a.is(0, n));
            }
        }
    }
    true
}

fn at(a: Args<'_>, (first, last, step): (i8, i8, i8), each: &mut impl FnMut(usize)) {
    if first <= 0 || a.len() <= first as usize {
        return;
    }
    let last = if last < 0 {
        a.len().saturating_sub(usize::from(last.unsigned_abs()))
    } else {
        (last as usize).min(a.len() - 1)
    };
    (first as usize..=last).step_by(step.max(1) as usize).for_each(each);
}

fn counted(a: Args<'_>, at: usize, before: usize, each: &mut impl FnMut(usize)) {
    let n = crate::engine::numbers::parse_int(a.at(at)).and_then(|n| usize::try_from(n).ok());
    if before > 0 && a.len() > before {
        each(before);
    }
    // A count that is none, or too large: Redis says what is wrong with it, wherever it is asked.
    if let Some(n) = n
        && n <= a.len().saturating_sub(at + 1)
    {
        (at + 1..=at + n).for_each(each);
    }
}

fn streams(a: Args<'_>, each: &mut impl FnMut(usize)) {
    if let Some(from) = (1..a.len()).find(|i| a.is(*i, "STREAMS")) {
        let rest = a.len() - from - 1;
        (from + 1..from + 1 + rest / 2).for_each(each);
    }
}

/// The first word, and the words after one of these.
fn stored(a: Args<'_>, words: &[&str], each: &mut impl FnMut(usize)) {
    if a.len() > 1 {
        each(1);
    }
    for i in 2..a.len().saturating_sub(1) {
        if words.iter().any(|w| a.is(i, w)) {
            each(i + 1);
        }
    }
}

fn sort_denied(a: Args<'_>) -> Option<&'static str> {
    (2..a.len())
        .any(|i| a.is(i, "BY") && a.at(i + 1).contains(&b'*') || a.is(i, "GET") && a.at(i + 1) != b"#")
        .then_some("ERR BY and GET of SORT read keys of other slots and are denied by gse_dba")
}

fn split(map: &SlotMap, a: Args<'_>, step: usize, how: Split) -> Route {
    let part = |key: &[u8]| map.part(slot(key));
    let first = part(a.at(1));
    if (map.groups() == 1 && !map.is_strict()) || (1..a.len()).step_by(step).all(|i| part(a.at(i)) == first) {
        Route::Slot(slot(a.at(1)))
    } else {
        Route::Split(how)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Span;
    use crate::config::sharded::Group;

    fn routed(line: &str) -> Route {
        let spans: Vec<Span> = {
            let mut at = 0;
            line.split(' ')
                .map(|w| {
                    let s = Span {
                        start: at as u32,
                        end: (at + w.len()) as u32,
                    };
                    at += w.len() + 1;
                    s
                })
                .collect()
        };
        let a = Args::new(line.as_bytes(), &spans);
        let groups = vec![Group::default(), Group::default(), Group::default()];
        route(&SlotMap::of(&groups).unwrap(), commands::find(a.at(0)), a, false)
    }

    fn crosses(r: &Route) -> bool {
        matches!(r, Route::Refuse(e) if e.starts_with("CROSSSLOT"))
    }

    // contract: redis-proxy#7
    #[test]
    fn what_crosses_slots_is_refused_and_one_hash_tag_is_not() {
        for line in [
            "RENAME K1 K2",
            "RENAMENX K1 K2",
            "COPY K1 K2",
            "SINTER K1 K2",
            "SUNIONSTORE K1 K2 K2",
            "ZUNION 2 K1 K2",
            "ZUNIONSTORE K1 2 K1 K2",
            "ZINTERCARD 2 K1 K2",
            "EVAL return 2 K1 K2",
            "LMOVE K1 K2 LEFT LEFT",
            "MSET K1 v K2 v",
            "MSETNX K1 v K2 v",
            "BITOP AND K1 K2",
            "SORT K1 STORE K2",
            "XREAD STREAMS K1 K2 0 0",
            "BLPOP K1 K2 0",
            "GEORADIUS K1 1 1 1 m STORE K2",
            "PFMERGE K1 K2",
        ] {
            for n in 0..20 {
                let plain = line.replace("K1", &format!("a{n}")).replace("K2", &format!("b{n}"));
                assert!(crosses(&routed(&plain)), "{plain}");
                let tagged = line
                    .replace("K1", &format!("{{t{n}}}a"))
                    .replace("K2", &format!("{{t{n}}}b"));
                assert_eq!(
                    routed(&tagged),
                    Route::Slot(slot(format!("t{n}").as_bytes())),
                    "{tagged}"
                );
            }
        }
    }

    #[test]
    fn what_concerns_several_groups_is_cut_up_or_sent_to_all() {
        assert_eq!(routed("MGET a b c"), Route::Split(Split::Values));
        assert_eq!(routed("DEL a b c"), Route::Split(Split::Counts));
        assert_eq!(routed("DEL {x}a {x}b"), Route::Slot(slot(b"x")));
        assert_eq!(routed("DBSIZE"), Route::All(Merge::Sum));
        assert_eq!(routed("SCAN 0"), Route::Scan);
        assert_eq!(routed("GET"), Route::Any, "Redis says itself what is wrong");
        assert_eq!(routed("EVAL return 0"), Route::Any);
        assert_eq!(routed("EVAL return 99 a"), Route::Any);
        assert_eq!(routed("set foo 1"), Route::Slot(12182));
        assert!(matches!(routed("NOSUCH a"), Route::Refuse(e) if e.starts_with("ERR unknown command")));
        assert!(matches!(routed("SORT a BY w_*"), Route::Refuse(_)));
    }

    /// Every command of the table is either routed by its keys or known to have none.
    #[test]
    fn no_data_command_is_sent_anywhere_by_accident() {
        let keyless = [
            "PING",
            "ECHO",
            "TIME",
            "WAIT",
            "PUBLISH",
            "SCRIPT",
            "SUBSCRIBE",
            "PSUBSCRIBE",
            "SSUBSCRIBE",
            "UNSUBSCRIBE",
            "PUNSUBSCRIBE",
            "SUNSUBSCRIBE",
            "LASTSAVE",
            "LATENCY",
        ];
        for spec in commands::TABLE {
            if !matches!(spec.run, Run::Engine(_) | Run::Elsewhere) || keyless.contains(&spec.name) {
                continue;
            }
            let n = spec.arity.unsigned_abs() as usize;
            let mut words = vec![spec.name.to_owned()];
            words.extend((1..n.max(4)).map(|_| "1".to_owned()));
            if spec.name.starts_with("XREAD") {
                words = format!("{} STREAMS 1 1 1 1 1", spec.name)
                    .split(' ')
                    .map(str::to_owned)
                    .collect();
            }
            if spec.arity > 0 {
                words.truncate(n);
            }
            assert_ne!(routed(&words.join(" ")), Route::Any, "{words:?}");
        }
    }
}
