//! The command table: every command this server knows, its arity, where its keys are, what class it is of and who runs it. What is not here is unknown to the embedded store and is
//! passed on as it is when a Redis stands behind.

use std::collections::HashMap;
use std::sync::LazyLock;

use ahash::RandomState;

use crate::args::Args;
use crate::engine::db::{Handler, Refusal};
use crate::engine::{hash, keys, list, misc, set, string, zrange, zset};

/// Commands that the connection answers itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Local {
    Auth,
    Hello,
    Quit,
    Reset,
    Select,
    Client,
    Command,
    Info,
    Config,
    Acl,
    Role,
    Cluster,
    Slowlog,
}

/// Commands about transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tx {
    Multi,
    Exec,
    Discard,
    Watch,
    Unwatch,
}

/// Who runs a command.
#[derive(Clone, Copy)]
pub(crate) enum Run {
    /// The embedded engine.
    Engine(Handler),
    Local(Local),
    Tx(Tx),
    /// About this server itself, for its operator.
    Admin,
    /// Only a Redis behind.
    Elsewhere,
    /// Nobody: it would change the servers themselves.
    Refused,
}

/// Changes data.
pub(crate) const WRITE: u8 = 1;
/// Can make the data larger.
pub(crate) const GROWS: u8 = 2;
/// Can make its connection wait.
pub(crate) const BLOCKS: u8 = 4;
/// Subscribes or unsubscribes its connection.
pub(crate) const SUBSCRIBES: u8 = 8;
/// Is let through without a password.
pub(crate) const OPEN: u8 = 16;

/// One command.
pub(crate) struct Spec {
    /// Upper case.
    pub(crate) name: &'static str,
    /// Count of arguments with the name; negative: at least that many.
    pub(crate) arity: i32,
    pub(crate) flags: u8,
    /// First and last key and the step between, as `COMMAND INFO` has them.
    pub(crate) keys: (i8, i8, i8),
    pub(crate) run: Run,
}

impl Spec {
    pub(crate) fn is(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    pub(crate) fn arity_fits(&self, n: usize) -> bool {
        let want = self.arity.unsigned_abs() as usize;
        if self.arity >= 0 { n == want } else { n >= want }
    }

    /// The metric label.
    pub(crate) fn class(&self) -> Class {
        match self.run {
            Run::Local(_) | Run::Admin | Run::Refused => Class::Connection,
            Run::Tx(_) => Class::Transaction,
            _ if self.is(WRITE) => Class::Write,
            _ => Class::Read,
        }
    }
}

/// Classes of commands in the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Class {
    Read,
    Write,
    Transaction,
    Connection,
    Unknown,
}

const ONE: (i8, i8, i8) = (1, 1, 1);
const TWO: (i8, i8, i8) = (1, 2, 1);
const ALL: (i8, i8, i8) = (1, -1, 1);
const NONE: (i8, i8, i8) = (0, 0, 0);
const WG: u8 = WRITE | GROWS;

const fn e(name: &'static str, arity: i32, flags: u8, keys: (i8, i8, i8), run: Handler) -> Spec {
    Spec {
        name,
        arity,
        flags,
        keys,
        run: Run::Engine(run),
    }
}

const fn local(name: &'static str, arity: i32, flags: u8, run: Local) -> Spec {
    Spec {
        name,
        arity,
        flags,
        keys: NONE,
        run: Run::Local(run),
    }
}

const fn tx(name: &'static str, arity: i32, keys: (i8, i8, i8), run: Tx) -> Spec {
    Spec {
        name,
        arity,
        flags: 0,
        keys,
        run: Run::Tx(run),
    }
}

const fn far(name: &'static str, arity: i32, flags: u8, keys: (i8, i8, i8)) -> Spec {
    Spec {
        name,
        arity,
        flags,
        keys,
        run: Run::Elsewhere,
    }
}

const DBA: Spec = Spec {
    name: "DBA",
    arity: -2,
    flags: 0,
    keys: NONE,
    run: Run::Admin,
};

const fn refused(name: &'static str) -> Spec {
    Spec {
        name,
        arity: -1,
        flags: 0,
        keys: NONE,
        run: Run::Refused,
    }
}

pub(crate) static TABLE: &[Spec] = &[
    local("AUTH", -2, OPEN, Local::Auth),
    local("HELLO", -1, OPEN, Local::Hello),
    local("QUIT", -1, OPEN, Local::Quit),
    local("RESET", 1, OPEN, Local::Reset),
    local("SELECT", 2, 0, Local::Select),
    local("CLIENT", -2, 0, Local::Client),
    local("COMMAND", -1, 0, Local::Command),
    local("INFO", -1, 0, Local::Info),
    local("CONFIG", -2, 0, Local::Config),
    local("ACL", -2, 0, Local::Acl),
    local("ROLE", 1, 0, Local::Role),
    local("CLUSTER", -2, 0, Local::Cluster),
    local("READONLY", 1, 0, Local::Cluster),
    local("READWRITE", 1, 0, Local::Cluster),
    local("ASKING", 1, 0, Local::Cluster),
    local("SLOWLOG", -2, 0, Local::Slowlog),
    DBA,
    tx("MULTI", 1, NONE, Tx::Multi),
    tx("EXEC", 1, NONE, Tx::Exec),
    tx("DISCARD", 1, NONE, Tx::Discard),
    tx("WATCH", -2, ALL, Tx::Watch),
    tx("UNWATCH", 1, NONE, Tx::Unwatch),
    e("PING", -1, 0, NONE, misc::ping),
    e("ECHO", 2, 0, NONE, misc::echo),
    e("TIME", 1, 0, NONE, misc::time),
    e("WAIT", 3, BLOCKS, NONE, misc::wait),
    // Strings
    e("GET", 2, 0, ONE, string::get),
    e("SET", -3, WG, ONE, string::set),
    e("SETNX", 3, WG, ONE, string::setnx),
    e("SETEX", 4, WG, ONE, string::setex),
    e("PSETEX", 4, WG, ONE, string::psetex),
    e("GETSET", 3, WG, ONE, string::getset),
    e("GETDEL", 2, WRITE, ONE, string::getdel),
    e("GETEX", -2, WRITE, ONE, string::getex),
    e("MGET", -2, 0, ALL, string::mget),
    e("MSET", -3, WG, (1, -1, 2), string::mset),
    e("MSETNX", -3, WG, (1, -1, 2), string::msetnx),
    e("APPEND", 3, WG, ONE, string::append),
    e("STRLEN", 2, 0, ONE, string::strlen),
    e("GETRANGE", 4, 0, ONE, string::getrange),
    e("SUBSTR", 4, 0, ONE, string::getrange),
    e("SETRANGE", 4, WG, ONE, string::setrange),
    e("INCR", 2, WG, ONE, string::incr),
    e("DECR", 2, WG, ONE, string::decr),
    e("INCRBY", 3, WG, ONE, string::incrby),
    e("DECRBY", 3, WG, ONE, string::decrby),
    e("INCRBYFLOAT", 3, WG, ONE, string::incrbyfloat),
    // Keys
    e("DEL", -2, WRITE, ALL, keys::del),
    e("UNLINK", -2, WRITE, ALL, keys::del),
    e("EXISTS", -2, 0, ALL, keys::exists),
    e("TOUCH", -2, 0, ALL, keys::exists),
    e("TYPE", 2, 0, ONE, keys::type_of),
    e("RENAME", 3, WRITE, TWO, keys::rename),
    e("RENAMENX", 3, WRITE, TWO, keys::renamenx),
    e("COPY", -3, WG, TWO, keys::copy),
    e("EXPIRE", -3, WRITE, ONE, keys::expire),
    e("PEXPIRE", -3, WRITE, ONE, keys::pexpire),
    e("EXPIREAT", -3, WRITE, ONE, keys::expireat),
    e("PEXPIREAT", -3, WRITE, ONE, keys::pexpireat),
    e("PERSIST", 2, WRITE, ONE, keys::persist),
    e("TTL", 2, 0, ONE, keys::ttl),
    e("PTTL", 2, 0, ONE, keys::pttl),
    e("EXPIRETIME", 2, 0, ONE, keys::expiretime),
    e("PEXPIRETIME", 2, 0, ONE, keys::pexpiretime),
    e("KEYS", 2, 0, NONE, keys::keys),
    e("SCAN", -2, 0, NONE, keys::scan),
    e("RANDOMKEY", 1, 0, NONE, keys::randomkey),
    e("DBSIZE", 1, 0, NONE, keys::dbsize),
    e("FLUSHALL", -1, WRITE, NONE, keys::flush),
    e("FLUSHDB", -1, WRITE, NONE, keys::flush),
    e("OBJECT", -2, 0, (2, 2, 1), keys::object),
    // Hashes
    e("HSET", -4, WG, ONE, hash::hset),
    e("HSETNX", 4, WG, ONE, hash::hsetnx),
    e("HMSET", -4, WG, ONE, hash::hmset),
    e("HGET", 3, 0, ONE, hash::hget),
    e("HMGET", -3, 0, ONE, hash::hmget),
    e("HGETALL", 2, 0, ONE, hash::hgetall),
    e("HKEYS", 2, 0, ONE, hash::hkeys),
    e("HVALS", 2, 0, ONE, hash::hvals),
    e("HLEN", 2, 0, ONE, hash::hlen),
    e("HEXISTS", 3, 0, ONE, hash::hexists),
    e("HDEL", -3, WRITE, ONE, hash::hdel),
    e("HINCRBY", 4, WG, ONE, hash::hincrby),
    e("HINCRBYFLOAT", 4, WG, ONE, hash::hincrbyfloat),
    e("HSTRLEN", 3, 0, ONE, hash::hstrlen),
    e("HSCAN", -3, 0, ONE, hash::hscan),
    e("HRANDFIELD", -2, 0, ONE, hash::hrandfield),
    // Lists
    e("LPUSH", -3, WG, ONE, list::lpush),
    e("RPUSH", -3, WG, ONE, list::rpush),
    e("LPUSHX", -3, WG, ONE, list::lpushx),
    e("RPUSHX", -3, WG, ONE, list::rpushx),
    e("LPOP", -2, WRITE, ONE, list::lpop),
    e("RPOP", -2, WRITE, ONE, list::rpop),
    e("LRANGE", 4, 0, ONE, list::lrange),
    e("LLEN", 2, 0, ONE, list::llen),
    e("LINDEX", 3, 0, ONE, list::lindex),
    e("LSET", 4, WG, ONE, list::lset),
    e("LREM", 4, WRITE, ONE, list::lrem),
    e("LTRIM", 4, WRITE, ONE, list::ltrim),
    e("LINSERT", 5, WG, ONE, list::linsert),
    e("LPOS", -3, 0, ONE, list::lpos),
    e("LMOVE", 5, WG, TWO, list::lmove),
    e("RPOPLPUSH", 3, WG, TWO, list::rpoplpush),
    // Sets
    e("SADD", -3, WG, ONE, set::sadd),
    e("SREM", -3, WRITE, ONE, set::srem),
    e("SMEMBERS", 2, 0, ONE, set::smembers),
    e("SISMEMBER", 3, 0, ONE, set::sismember),
    e("SMISMEMBER", -3, 0, ONE, set::smismember),
    e("SCARD", 2, 0, ONE, set::scard),
    e("SPOP", -2, WRITE, ONE, set::spop),
    e("SRANDMEMBER", -2, 0, ONE, set::srandmember),
    e("SMOVE", 4, WRITE, TWO, set::smove),
    e("SINTER", -2, 0, ALL, set::sinter),
    e("SUNION", -2, 0, ALL, set::sunion),
    e("SDIFF", -2, 0, ALL, set::sdiff),
    e("SINTERSTORE", -3, WG, ALL, set::sinterstore),
    e("SUNIONSTORE", -3, WG, ALL, set::sunionstore),
    e("SDIFFSTORE", -3, WG, ALL, set::sdiffstore),
    e("SINTERCARD", -3, 0, NONE, set::sintercard),
    e("SSCAN", -3, 0, ONE, set::sscan),
    // Sorted sets
    e("ZADD", -4, WG, ONE, zset::zadd),
    e("ZREM", -3, WRITE, ONE, zset::zrem),
    e("ZSCORE", 3, 0, ONE, zset::zscore),
    e("ZMSCORE", -3, 0, ONE, zset::zmscore),
    e("ZCARD", 2, 0, ONE, zset::zcard),
    e("ZCOUNT", 4, 0, ONE, zrange::zcount),
    e("ZLEXCOUNT", 4, 0, ONE, zrange::zlexcount),
    e("ZINCRBY", 4, WG, ONE, zset::zincrby),
    e("ZRANK", 3, 0, ONE, zset::zrank),
    e("ZREVRANK", 3, 0, ONE, zset::zrevrank),
    e("ZRANGE", -4, 0, ONE, zrange::zrange),
    e("ZREVRANGE", -4, 0, ONE, zrange::zrevrange),
    e("ZRANGEBYSCORE", -4, 0, ONE, zrange::zrangebyscore),
    e("ZREVRANGEBYSCORE", -4, 0, ONE, zrange::zrevrangebyscore),
    e("ZRANGEBYLEX", -4, 0, ONE, zrange::zrangebylex),
    e("ZREVRANGEBYLEX", -4, 0, ONE, zrange::zrevrangebylex),
    e("ZRANGESTORE", -5, WG, TWO, zrange::zrangestore),
    e("ZREMRANGEBYRANK", 4, WRITE, ONE, zrange::zremrangebyrank),
    e("ZREMRANGEBYSCORE", 4, WRITE, ONE, zrange::zremrangebyscore),
    e("ZREMRANGEBYLEX", 4, WRITE, ONE, zrange::zremrangebylex),
    e("ZPOPMIN", -2, WRITE, ONE, zset::zpopmin),
    e("ZPOPMAX", -2, WRITE, ONE, zset::zpopmax),
    e("ZSCAN", -3, 0, ONE, zset::zscan),
    e("ZUNIONSTORE", -4, WG, ONE, zset::zunionstore),
    e("ZINTERSTORE", -4, WG, ONE, zset::zinterstore),
    // Only with a Redis behind
    far("BLPOP", -3, WRITE | BLOCKS, (1, -2, 1)),
    far("BRPOP", -3, WRITE | BLOCKS, (1, -2, 1)),
    far("BLMOVE", 6, WRITE | BLOCKS, TWO),
    far("BRPOPLPUSH", 4, WRITE | BLOCKS, TWO),
    far("BLMPOP", -5, WRITE | BLOCKS, NONE),
    far("BZPOPMIN", -3, WRITE | BLOCKS, (1, -2, 1)),
    far("BZPOPMAX", -3, WRITE | BLOCKS, (1, -2, 1)),
    far("BZMPOP", -5, WRITE | BLOCKS, NONE),
    far("XREAD", -4, BLOCKS, NONE),
    far("XREADGROUP", -7, WRITE | BLOCKS, NONE),
    far("XADD", -5, WG, ONE),
    far("XLEN", 2, 0, ONE),
    far("XRANGE", -4, 0, ONE),
    far("SUBSCRIBE", -2, SUBSCRIBES, NONE),
    far("PSUBSCRIBE", -2, SUBSCRIBES, NONE),
    far("SSUBSCRIBE", -2, SUBSCRIBES, NONE),
    far("UNSUBSCRIBE", -1, SUBSCRIBES, NONE),
    far("PUNSUBSCRIBE", -1, SUBSCRIBES, NONE),
    far("SUNSUBSCRIBE", -1, SUBSCRIBES, NONE),
    far("PUBLISH", 3, WRITE, NONE),
    far("EVAL", -3, WRITE, NONE),
    far("EVALSHA", -3, WRITE, NONE),
    far("SCRIPT", -2, WRITE, NONE),
    far("LASTSAVE", 1, 0, NONE),
    far("LATENCY", -2, 0, NONE),
    far("DEBUG", -2, 0, (2, 2, 1)),
    // They would change the servers, not the data
    refused("SHUTDOWN"),
    refused("REPLICAOF"),
    refused("SLAVEOF"),
    refused("MODULE"),
    refused("MONITOR"),
    refused("MIGRATE"),
    refused("SWAPDB"),
    refused("MOVE"),
    refused("SAVE"),
    refused("BGSAVE"),
    refused("BGREWRITEAOF"),
    refused("FAILOVER"),
    refused("SYNC"),
    refused("PSYNC"),
    refused("REPLCONF"),
];

/// SELECT as a transaction queues it.
pub(crate) static SELECT_QUEUED: Spec = e("SELECT", 2, 0, NONE, misc::select);

static BY_NAME: LazyLock<HashMap<&'static [u8], &'static Spec, RandomState>> =
    LazyLock::new(|| TABLE.iter().map(|s| (s.name.as_bytes(), s)).collect());

/// The command of this name, in any case.
pub(crate) fn find(name: &[u8]) -> Option<&'static Spec> {
    let mut upper = [0u8; 24];
    let upper = upper.get_mut(..name.len())?;
    upper.copy_from_slice(name);
    upper.make_ascii_uppercase();
    BY_NAME.get(&*upper).copied()
}

fn clipped(bytes: &[u8], n: usize) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(n)]).into_owned()
}

/// The refusal of a command that nobody knows.
pub(crate) fn unknown(a: Args<'_>) -> Refusal {
    let mut rest = String::new();
    for arg in a.iter().skip(1) {
        if rest.len() >= 128 {
            break;
        }
        rest.push_str(&format!("'{}' ", clipped(arg, 128 - rest.len())));
    }
    format!(
        "ERR unknown command '{}', with args beginning with: {rest}",
        clipped(a.at(0), 128)
    )
    .into()
}

pub(crate) fn wrong_arity(spec: &Spec) -> Refusal {
    format!(
        "ERR wrong number of arguments for '{}' command",
        spec.name.to_ascii_lowercase()
    )
    .into()
}

pub(crate) fn not_allowed(spec: &Spec) -> Refusal {
    format!(
        "ERR command '{}' is not allowed through gse_dba: it would change the server, not the data",
        spec.name
    )
    .into()
}

pub(crate) fn not_embedded(spec: &Spec) -> Refusal {
    format!("ERR command '{}' is not supported by the embedded store; run gse_dba with backend = \"single\" and a Redis for it", spec.name).into()
}
