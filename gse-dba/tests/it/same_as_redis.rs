//! The same random commands to us and to a real Redis give the same replies, each one, through real sockets.
//!
//! What is normalised before replies are compared, and nothing else: the order of what Redis documents as unordered (members of a set, fields of a hash, keys of the keyspace), and times to
//! live within two seconds. Lexical ranges are asked of one key whose members all score the same: Redis leaves them unspecified elsewhere. Random draws (SPOP, SRANDMEMBER, RANDOMKEY, HRANDFIELD) and cursors have tests of their own.

use proptest::prelude::*;
use proptest::test_runner::{Config as Runs, TestCaseError, TestRunner};

use crate::rig::{Ours, Raw, Redis, Value, encode, single};
use crate::site::{Site, sharded_list};
use crate::templates::TEMPLATES;

fn fill(kind: char, b: u8) -> String {
    let pick = |all: &[&str]| all[b as usize % all.len()].to_owned();
    match kind {
        'k' => pick(&["a", "b", "c", "d"]),
        'v' => pick(&[
            "",
            "x",
            "hello world",
            "10",
            "-5",
            "3.5",
            "1e3",
            "9223372036854775807",
            "nan",
            "inf",
            " 1",
            "0x10",
            "long value long value long value long value long value long value",
            "\r\n",
            "é",
        ]),
        'f' => pick(&["f", "g", "h", "1", "2", "30", "x", "y"]),
        'i' => pick(&[
            "0",
            "1",
            "2",
            "3",
            "-1",
            "-2",
            "-3",
            "5",
            "100",
            "-100",
            "x",
            "1.5",
            "9223372036854775807",
            "-9223372036854775808",
            "01",
        ]),
        'n' => pick(&["0", "1", "2", "3", "4", "10"]),
        's' => pick(&[
            "0", "1", "2", "-1", "1.5", "0.1", "3e10", "-0", "1e100", "inf", "-inf", "1e-7", "0x1F", "x", "5",
        ]),
        'r' => pick(&["-inf", "+inf", "0", "1", "2", "(1", "(2", "1.5", "x", "(x", "-1"]),
        'x' => pick(&["-", "+", "[f", "(f", "[g", "(x", "[", "y", "[2"]),
        'd' => pick(&[
            "0.1",
            "0.2",
            "-0.3",
            "1",
            "3.0e3",
            "1e17",
            "12345678.9",
            "-1e-10",
            "100000000000.123",
            "x",
            "inf",
            "1e5000",
            ".5",
            "5.",
            "0.30000000000000004",
        ]),
        't' => pick(&["100", "1000", "5000", "0", "-1", "99999", "x", "500"]),
        'T' => pick(&["4000000000", "4100000000", "1", "-5", "3000000000"]),
        'F' => pick(&["4000000000000", "4100000000000", "0", "-5", "x"]),
        'M' => pick(&["4000000000000", "4100000000000", "1", "3000000000000"]),
        'p' => pick(&["100000", "4000000", "250000", "0", "-1", "x"]),
        'g' => pick(&["a*", "*", "[ab]", "?", "[^a]", "f*", "\\a", "x?y"]),
        other => panic!("no such placeholder: {other}"),
    }
}

/// What only a Redis behind us knows: scripts, bits, places, streams, pops that could wait.
const FAR: &[&str] = &[
    "EVAL return{KEYS[1],ARGV[1]} 1 $k $v",
    "EVAL return(redis.call('GET',KEYS[1])) 1 $k",
    "EVAL return(redis.call('SET',KEYS[1],ARGV[1])) 1 $k $v",
    "EVAL_RO return(redis.call('STRLEN',KEYS[1])) 1 $k",
    "EVALSHA e0e1f9fabfc9d4800c877a703b823ac0578ff8db 1 $k",
    "EVAL return x $k",
    "SETBIT $k $n 1",
    "GETBIT $k $i",
    "BITCOUNT $k",
    "BITFIELD $k INCRBY u8 0 1",
    "PFADD $k $f $v",
    "PFCOUNT $k",
    "GEOADD $k 1 2 $f",
    "GEOPOS $k $f",
    "XADD $k 1-$n $f $v",
    "XADD $k 9-* $f $v",
    "XLEN $k",
    "XRANGE $k - +",
    "XREAD COUNT 2 STREAMS $k 0",
    "XDEL $k 1-$n",
    "SORT $k ALPHA",
    "SORT $k LIMIT 0 $i",
    "LMPOP 1 $k LEFT COUNT $i",
    "ZMPOP 1 $k MIN",
    "BLPOP $k 0.001",
    "BZPOPMIN $k 0.001",
    "ZDIFF 1 $k",
    "LCS $k $k",
    "OBJECT ENCODING $k",
    "OBJECT NOSUCH $k",
    "PUBLISH $f $v",
    "GETBIT $k",
    "XADD $k",
    "NOSUCH $k",
];

fn command(template: usize, bytes: [u8; 7]) -> Vec<Vec<u8>> {
    filled(TEMPLATES[template % TEMPLATES.len()], bytes)
}

fn filled(line: &str, bytes: [u8; 7]) -> Vec<Vec<u8>> {
    let mut bytes = bytes.into_iter();
    line.split(' ')
        .map(|word| match word.strip_prefix('$') {
            Some(kind) => fill(kind.chars().next().unwrap(), bytes.next().unwrap()).into_bytes(),
            None => word.as_bytes().to_vec(),
        })
        .collect()
}

fn sorted(mut items: Vec<Value>) -> Vec<Value> {
    items.sort_by(|a, b| a.partial_cmp(b).unwrap());
    items
}

fn sorted_pairs(items: Vec<Value>) -> Vec<Value> {
    let mut pairs: Vec<_> = items.chunks(2).map(<[Value]>::to_vec).collect();
    pairs.sort_by(|a, b| a.partial_cmp(b).unwrap());
    pairs.concat()
}

/// Brings what is documented as unordered into one order, and times to live to two seconds.
pub(crate) fn normal(command: &[Vec<u8>], value: Value) -> Value {
    let name = String::from_utf8_lossy(&command[0]).to_ascii_uppercase();
    match (name.as_str(), value) {
        (
            "SMEMBERS" | "SINTER" | "SUNION" | "SDIFF" | "KEYS" | "HKEYS" | "HVALS" | "SPOP" | "SRANDMEMBER",
            Value::Array(v),
        ) => Value::Array(sorted(v)),
        ("SMEMBERS" | "SINTER" | "SUNION" | "SDIFF" | "SPOP", Value::Set(v)) => Value::Set(sorted(v)),
        ("HGETALL", Value::Array(v)) => Value::Array(sorted_pairs(v)),
        ("HGETALL", Value::Map(v)) => Value::Map(sorted_pairs(v)),
        (scan @ ("SCAN" | "SSCAN" | "HSCAN" | "ZSCAN"), Value::Array(v)) if v.len() == 2 => {
            let items = v[1].items().to_vec();
            let items = if matches!(scan, "HSCAN" | "ZSCAN") {
                sorted_pairs(items)
            } else {
                sorted(items)
            };
            Value::Array(vec![v[0].clone(), Value::Array(items)])
        }
        ("TTL" | "EXPIRETIME", Value::Int(n)) if n > 2 => Value::Int(n / 10 * 10),
        ("PTTL" | "PEXPIRETIME", Value::Int(n)) if n > 2 => Value::Int(n / 10_000 * 10_000),
        (_, value) => value,
    }
}

pub(crate) fn near(a: &Value, b: &Value, name: &str) -> bool {
    let window = match name {
        "TTL" | "EXPIRETIME" => 2,
        "PTTL" | "PEXPIRETIME" => 2000,
        _ => return a == b,
    };
    match (a, b) {
        (Value::Int(a), Value::Int(b)) => a.signum() == b.signum() && a.abs_diff(*b) <= window,
        _ => a == b,
    }
}

fn replies(raw: &mut Raw, commands: &[Vec<Vec<u8>>], chunk: usize) -> Vec<Value> {
    let mut all = Vec::new();
    for chunk in commands.chunks(chunk) {
        raw.send(&chunk.iter().flat_map(|c| encode(c)).collect::<Vec<_>>());
        all.extend(chunk.iter().map(|_| raw.reply()));
    }
    all
}

fn compare(ours: &mut Raw, theirs: &mut Raw, commands: &[Vec<Vec<u8>>], chunk: usize) -> Result<(), TestCaseError> {
    // A transaction that an earlier case left open must not swallow the cleaning.
    for raw in [&mut *ours, &mut *theirs] {
        raw.say("DISCARD");
        raw.say("UNWATCH");
        prop_assert_eq!(raw.say("FLUSHALL"), Value::ok());
    }
    let (a, b) = (replies(ours, commands, chunk), replies(theirs, commands, chunk));
    let mut queue: Vec<&Vec<Vec<u8>>> = Vec::new();
    for (i, command) in commands.iter().enumerate() {
        let name = String::from_utf8_lossy(&command[0]).into_owned();
        let line = |c: &Vec<Vec<u8>>| {
            c.iter()
                .map(|a| String::from_utf8_lossy(a).into_owned())
                .collect::<Vec<_>>()
                .join(" ")
        };
        let show = || {
            format!(
                "{:?} in {:?}",
                line(command),
                commands.iter().map(line).collect::<Vec<_>>()
            )
        };
        match (&a[i], &b[i]) {
            (Value::Array(x), Value::Array(y)) if name == "EXEC" => {
                prop_assert_eq!(x.len(), y.len(), "EXEC at {}", i);
                for ((x, y), c) in x.iter().zip(y).zip(&queue) {
                    let inner = String::from_utf8_lossy(&c[0]).into_owned();
                    let same = near(x, y, &inner) || normal(c, x.clone()) == normal(c, y.clone());
                    prop_assert!(
                        same,
                        "in EXEC at {}, {:?}: ours {:?}, Redis {:?}: {}",
                        i,
                        line(c),
                        x,
                        y,
                        show()
                    );
                }
            }
            (x, y) => {
                let same = near(x, y, &name) || normal(command, x.clone()) == normal(command, y.clone());
                prop_assert!(same, "command {}: ours {:?}, Redis {:?}: {}", i, x, y, show());
            }
        }
        match &a[i] {
            Value::Simple(s) if s == "QUEUED" => queue.push(command),
            _ if matches!(name.as_str(), "EXEC" | "DISCARD") => queue.clear(),
            _ => {}
        }
    }
    Ok(())
}

fn same(ours: &Ours, cases: u32) {
    let redis = Redis::start();
    let mut pairs: Vec<(Raw, Raw)> = (2..=3)
        .map(|v| {
            let (mut a, mut b) = (ours.client(), redis.client());
            a.say(&format!("HELLO {v}"));
            b.say(&format!("HELLO {v}"));
            (a, b)
        })
        .collect();
    let one = (0..TEMPLATES.len(), any::<[u8; 7]>());
    let input = (prop::collection::vec(one, 1..100), 1usize..40, 0usize..2);
    let pairs = std::cell::RefCell::new(&mut pairs);
    let mut runner = TestRunner::new(Runs {
        cases,
        max_shrink_iters: 2000,
        failure_persistence: None,
        ..Runs::default()
    });
    let result = runner.run(&input, |(commands, chunk, which)| {
        let commands: Vec<_> = commands.into_iter().map(|(t, b)| command(t, b)).collect();
        let mut pairs = pairs.borrow_mut();
        let (a, b) = &mut pairs[which];
        compare(a, b, &commands, chunk)
    });
    if let Err(e) = result {
        panic!("{e}");
    }
}

// contract: redis-proxy#5
#[test]
fn the_embedded_store_replies_as_redis_does() {
    let dir = tempfile::tempdir().unwrap();
    same(&Ours::embedded(dir.path()), 1500);
}

// contract: redis-proxy#5
#[test]
fn one_redis_behind_us_replies_as_it_does_alone() {
    let behind = Redis::start();
    same(&Ours::start(single(&behind)), 200);
}

/// Commands that concern all groups and so can't be in a transaction, which is in one slot.
const EVERYWHERE: [&str; 6] = ["KEYS", "DBSIZE", "FLUSHALL", "FLUSHDB", "SCAN", "RANDOMKEY"];

/// Puts keys where a case wants them: with a tag all in one slot, or (with none) each where it falls. What would cross slots then, and transactions, are left out:
/// that they are refused is tested elsewhere.
pub(crate) fn placed(template: usize, bytes: [u8; 7], tag: Option<usize>) -> Option<Vec<Vec<u8>>> {
    const KEYS: &str = "$k";
    let line = TEMPLATES
        .get(template)
        .copied()
        .unwrap_or_else(|| FAR[(template - TEMPLATES.len()) % FAR.len()]);
    let words: Vec<&str> = line.split(' ').collect();
    let mut filled = filled(line, bytes);
    let merged = ["MGET", "DEL", "UNLINK", "EXISTS", "TOUCH"].contains(&words[0]);
    let keys = words.iter().filter(|w| **w == KEYS).count();
    let Some(tag) = tag else {
        let fits = keys <= 1 || merged;
        return (fits && !["MULTI", "EXEC", "DISCARD", "WATCH", "UNWATCH"].contains(&words[0])).then_some(filled);
    };
    for (word, at) in words.iter().zip(&mut filled) {
        if *word == KEYS || *word == "lex" {
            *at = [format!("{{t{tag}}}").as_bytes(), at.as_slice()].concat();
        }
    }
    Some(filled)
}

// contract: redis-proxy#5, redis-proxy#6
#[test]
fn three_groups_reply_as_one_redis_does() {
    let site = Site::start(3, 2, false);
    alike(&Ours::start(sharded_list(&site)), 150);
}

/// Random commands over slots, in front of `ours` and of one Redis.
pub(crate) fn alike(ours: &Ours, cases: u32) {
    let redis = Redis::start();
    let (mut a, mut b) = (ours.client(), redis.client());
    let one = (0..TEMPLATES.len() + FAR.len() * 3, any::<[u8; 7]>());
    let tags = prop::option::of(0usize..12);
    let input = (prop::collection::vec(one, 1..60), 1usize..30, tags);
    let pair = std::cell::RefCell::new((&mut a, &mut b));
    let mut runner = TestRunner::new(Runs {
        cases,
        max_shrink_iters: 300,
        failure_persistence: None,
        ..Runs::default()
    });
    let result = runner.run(&input, |(commands, chunk, tag)| {
        let mut open = false;
        let commands: Vec<_> = commands
            .into_iter()
            .filter_map(|(t, b)| placed(t, b, tag))
            .filter(|c| {
                let name = String::from_utf8_lossy(&c[0]).into_owned();
                match name.as_str() {
                    "MULTI" => open = true,
                    "EXEC" | "DISCARD" => open = false,
                    _ => {}
                }
                // Cursors are ours, and how many copies have a write is not what a Redis without copies says.
                let everywhere = EVERYWHERE.contains(&name.as_str());
                // After a command that has spoiled a transaction the others are not looked at any further.
                let odd = open && c.get(1).is_some_and(|w| w == b"NOSUCH");
                !(["SCAN", "WAIT"].contains(&name.as_str()) || open && everywhere || odd)
            })
            .collect();
        let mut pair = pair.borrow_mut();
        let (a, b) = &mut *pair;
        compare(a, b, &commands, chunk)
    });
    if let Err(e) = result {
        panic!("{e}");
    }
}

/// Every template once in each kind of state, so that none is left to chance.
#[test]
fn every_command_was_compared() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, redis) = (Ours::embedded(dir.path()), Redis::start());
    let (mut a, mut b) = (ours.client(), redis.client());
    let states = [
        vec![],
        vec!["SET a 10"],
        vec!["HSET a f 1 g 2"],
        vec!["RPUSH a f g h f"],
        vec!["SADD a f g 1"],
        vec!["ZADD a 1 f 2 g 3 h"],
    ];
    for state in &states {
        for t in (0..TEMPLATES.len()).filter(|t| !matches!(TEMPLATES[*t], "MULTI" | "EXEC" | "DISCARD")) {
            for salt in 0..6u8 {
                let mut commands: Vec<Vec<Vec<u8>>> = state
                    .iter()
                    .map(|l| l.split(' ').map(|w| w.as_bytes().to_vec()).collect())
                    .collect();
                commands.push(command(
                    t,
                    [
                        0,
                        salt,
                        salt.wrapping_mul(3),
                        salt.wrapping_mul(5),
                        salt.wrapping_mul(7),
                        salt.wrapping_mul(11),
                        1,
                    ],
                ));
                for look in ["TYPE a", "PTTL a", "DBSIZE"] {
                    commands.push(look.split(' ').map(|w| w.as_bytes().to_vec()).collect());
                }
                if let Err(e) = compare(&mut a, &mut b, &commands, 40) {
                    panic!("after {state:?}: {e}");
                }
            }
        }
    }
}
