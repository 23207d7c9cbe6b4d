//! Random commands with a fail-over in the middle: every answer is that of a Redis which has executed exactly what was not refused. A command of unknown fate
//! has happened or not, whole: what is there afterwards says which.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::park::{Park, Plan, wait_long};
use super::{alone, seed};
use crate::rig::{Raw, Redis, Value};
use crate::same_as_redis::{near, normal, placed};
use crate::templates::TEMPLATES;

/// What depends on the moment at which it is executed, or concerns more than a slot; a fail-over holds commands back for seconds.
const LEFT_OUT: [&str; 21] = [
    "MULTI",
    "EXEC",
    "DISCARD",
    "WATCH",
    "UNWATCH",
    "EXPIRE",
    "PEXPIRE",
    "SETEX",
    "PSETEX",
    "GETEX",
    "TTL",
    "PTTL",
    "KEYS",
    "DBSIZE",
    "FLUSHALL",
    "FLUSHDB",
    "SCAN",
    "RANDOMKEY",
    "WAIT",
    "OBJECT",
    "EXPIRETIME",
];

/// All that is under the tag.
fn state(c: &mut Raw, tag: &str) -> Option<Vec<Value>> {
    let mut all = Vec::new();
    for key in ["a", "b", "c", "d", "lex"] {
        let key = format!("{tag}{key}");
        let kind = c.call(&["TYPE", &key]);
        let read: Vec<&str> = match &kind {
            Value::Simple(k) => match k.as_str() {
                "string" => vec!["GET", &key],
                "hash" => vec!["HGETALL", &key],
                "list" => vec!["LRANGE", &key, "0", "-1"],
                "set" => vec!["SMEMBERS", &key],
                "zset" => vec!["ZRANGE", &key, "0", "-1", "WITHSCORES"],
                _ => continue,
            },
            _ => return None,
        };
        let words: Vec<Vec<u8>> = read.iter().map(|w| w.as_bytes().to_vec()).collect();
        match c.call(&read) {
            Value::Error(_) => return None,
            value => all.extend([kind, normal(&words, value), c.call(&["PEXPIRETIME", &key])]),
        }
    }
    Some(all)
}

// contract: redis-proxy#5, redis-proxy#24
#[test]
fn random_commands_are_answered_as_by_one_redis_through_a_fail_over() {
    let _one = alone();
    let mut park = Park::start(&Plan::default()).unwrap();
    let mut rng = StdRng::seed_from_u64(seed());
    let redis = Redis::start();
    let (mut ours, mut theirs) = (Raw::login(park.fronts[0].addr), redis.client());
    let done = AtomicBool::new(false);
    let (mut commands, mut refused, mut unknown) = (0, 0, 0);
    std::thread::scope(|scope| {
        let (park, done, salt) = (&mut park, &done, rng.random_range(0..3));
        scope.spawn(move || {
            // The end of the run comes even when this fails.
            struct Ends<'a>(&'a AtomicBool);
            impl Drop for Ends<'_> {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::Relaxed);
                }
            }
            let _ends = Ends(done);
            for group in [salt, (salt + 1) % 3] {
                std::thread::park_timeout(Duration::from_secs(1));
                let primary = park.primary(group).unwrap();
                park.groups[group][primary].kill();
                wait_long("another primary", || park.primary(group).is_some_and(|p| p != primary));
                park.restart((group, primary));
                park.wait_well();
            }
        });
        while !done.load(Ordering::Relaxed) {
            let number = rng.random_range(0..40);
            let tag = format!("{{t{number}}}");
            let Some(words) = placed(rng.random_range(0..TEMPLATES.len()), rng.random(), Some(number)) else {
                continue;
            };
            let name = String::from_utf8_lossy(&words[0]).to_ascii_uppercase();
            let relative = words
                .iter()
                .any(|w| w.eq_ignore_ascii_case(b"EX") || w.eq_ignore_ascii_case(b"PX"));
            if LEFT_OUT.contains(&name.as_str()) || relative {
                continue;
            }
            commands += 1;
            let line = || {
                words
                    .iter()
                    .map(|w| String::from_utf8_lossy(w))
                    .collect::<Vec<_>>()
                    .join(" ")
            };
            let reply = ours.call(&words);
            match &reply {
                Value::Error(e) if e.starts_with("NOREPLICAS") || e.starts_with("UNAVAILABLE") => refused += 1,
                Value::Error(e) if e.starts_with("UNCERTAIN") => {
                    unknown += 1;
                    let until = Instant::now() + Duration::from_secs(60);
                    let now = loop {
                        match state(&mut ours, &tag) {
                            Some(now) => break now,
                            None => assert!(Instant::now() < until, "{tag} can't be read after {}", line()),
                        }
                    };
                    if state(&mut theirs, &tag).unwrap() != now {
                        theirs.call(&words);
                        assert_eq!(
                            state(&mut theirs, &tag).unwrap(),
                            now,
                            "neither what was before {:?} nor what is after it",
                            line()
                        );
                    }
                }
                _ => {
                    let want = theirs.call(&words);
                    let same =
                        near(&reply, &want, &name) || normal(&words, reply.clone()) == normal(&words, want.clone());
                    assert!(same, "{:?}: ours {reply:?}, Redis {want:?}", line());
                }
            }
        }
    });
    for number in 0..40 {
        let tag = format!("{{t{number}}}");
        assert_eq!(state(&mut ours, &tag), state(&mut theirs, &tag), "{tag} at the end");
    }
    println!("{commands} commands through two fail-overs: {refused} refused, {unknown} of unknown fate");
    assert!(commands > 200, "next to nothing was done: {commands}");
}
