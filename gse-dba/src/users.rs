//! Who may do what: users with hashes of passwords, the commands they may give and the keys and channels they may name. Read once from a file of lines in the form that
//! Redis's own ACL files have.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use ahash::RandomState;
use anyhow::Context as _;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use crate::args::Args;
use crate::commands::{self, BLOCKS, Run, SUBSCRIBES, Spec, WRITE};
use crate::engine::glob;
use crate::sharded::route;

/// The user that connections begin as.
pub(crate) const DEFAULT: &str = "default";

/// Classes of commands that rules can name.
pub(crate) const CLASSES: &[&str] = &[
    "keyspace",
    "read",
    "write",
    "set",
    "sortedset",
    "list",
    "hash",
    "string",
    "bitmap",
    "hyperloglog",
    "geo",
    "stream",
    "pubsub",
    "admin",
    "blocking",
    "dangerous",
    "connection",
    "transaction",
    "scripting",
];

/// One user.
pub(crate) struct User {
    pub(crate) name: String,
    enabled: bool,
    no_password: bool,
    hashes: Vec<[u8; 32]>,
    every_command: bool,
    commands: HashSet<&'static str, RandomState>,
    keys: Vec<Pattern>,
    every_key: bool,
    channels: Vec<Vec<u8>>,
    every_channel: bool,
    rules: String,
}

struct Pattern {
    glob: Vec<u8>,
    read: bool,
    write: bool,
}

/// All users.
pub(crate) struct Users {
    by_name: BTreeMap<String, Arc<User>>,
}

/// Why a command is denied, as the client reads it.
pub(crate) const NO_COMMAND: &str = "NOPERM this user has no permissions to run the";
const NO_KEY: &str = "NOPERM this user has no permissions to access one of the keys used as arguments";
const NO_CHANNEL: &str = "NOPERM this user has no permissions to access one of the channels used as arguments";

fn hash(password: &[u8]) -> [u8; 32] {
    Sha256::digest(password).into()
}

impl Users {
    /// The one user there is without a file.
    pub(crate) fn of_password(password: &str) -> Self {
        let user = User {
            name: DEFAULT.into(),
            enabled: true,
            hashes: vec![hash(password.as_bytes())],
            every_command: true,
            every_key: true,
            every_channel: true,
            rules: format!("on #{} ~* &* +@all", hex(&hash(password.as_bytes()))),
            ..User::none(DEFAULT)
        };
        Self {
            by_name: BTreeMap::from([(DEFAULT.to_owned(), Arc::new(user))]),
        }
    }

    /// Adds those of a file; one that is called `default` replaces the one of the password. Blocking.
    ///
    /// # Errors
    /// When a line can't be understood: a rule that is not understood must not be taken for one that allows.
    pub(crate) fn read(&mut self, path: &Path) -> anyhow::Result<()> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read the users in {}", path.display()))?;
        self.add(&text)
            .with_context(|| format!("the users in {}", path.display()))
    }

    fn add(&mut self, text: &str) -> anyhow::Result<()> {
        let mut seen = HashSet::new();
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut words = line.split_whitespace();
            anyhow::ensure!(
                words.next() == Some("user"),
                "line {}: it does not begin with the word user",
                i + 1
            );
            let name = words
                .next()
                .with_context(|| format!("line {}: the user has no name", i + 1))?;
            anyhow::ensure!(
                seen.insert(name.to_owned()),
                "line {}: user {name} is there twice",
                i + 1
            );
            let mut user = User::none(name);
            for rule in words {
                user.rule(rule)
                    .map_err(|e| anyhow::anyhow!("line {}: user {name}: {e}", i + 1))?;
            }
            self.by_name.insert(name.to_owned(), Arc::new(user));
        }
        Ok(())
    }

    /// Whether the user that connections begin as needs no password.
    pub(crate) fn open(&self) -> Option<Arc<User>> {
        self.get(DEFAULT).filter(|u| u.enabled && u.no_password)
    }

    pub(crate) fn get(&self, name: &str) -> Option<Arc<User>> {
        self.by_name.get(name).cloned()
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<User>> {
        self.by_name.values()
    }

    /// The user, when this is a password of that user. Takes the same time whichever of its passwords it is.
    pub(crate) fn login(&self, name: &[u8], password: &[u8]) -> Option<Arc<User>> {
        let given = hash(password);
        let user = std::str::from_utf8(name).ok().and_then(|n| self.by_name.get(n))?;
        let right = user
            .hashes
            .iter()
            .fold(false, |right, h| right | bool::from(h.ct_eq(&given)));
        (user.enabled && (right || user.no_password)).then(|| Arc::clone(user))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some(out)
}

/// Every command that can be named in a rule.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    commands::TABLE
        .iter()
        .map(|s| s.name)
        .chain(route::further())
        .filter(|n| !n.is_empty())
}

/// Whether a command is of a class.
pub(crate) fn is_of(name: &'static str, class: &str) -> bool {
    let spec = commands::find(name.as_bytes());
    let writes = route::may_write(name);
    let starts = |p: &[&str]| p.iter().any(|p| name.starts_with(p));
    let is = |all: &[&str]| all.contains(&name);
    let local = spec.is_some_and(|s| matches!(s.run, Run::Local(_)));
    let tx = spec.is_some_and(|s| matches!(s.run, Run::Tx(_)));
    let refused = spec.is_some_and(|s| matches!(s.run, Run::Refused));
    let pubsub = spec.is_some_and(|s| s.is(SUBSCRIBES)) || is(&["PUBLISH", "SPUBLISH", "PUBSUB"]);
    let scripting = starts(&["EVAL", "FCALL", "SCRIPT", "FUNCTION"]);
    let admin = refused || is(&["CONFIG", "DBA", "SLOWLOG", "LATENCY", "DEBUG", "ACL", "MONITOR"]);
    let data = !(local || tx || admin || pubsub || scripting || is(&["PING", "ECHO", "TIME", "WAIT", "LOLWUT"]));
    match class {
        "all" => true,
        "read" => data && !writes,
        "write" => data && writes,
        "connection" => (local && !admin) || is(&["PING", "ECHO", "WAIT"]),
        "transaction" => tx,
        "pubsub" => pubsub,
        "scripting" => scripting,
        "blocking" => spec.is_some_and(|s| s.is(BLOCKS)),
        "admin" => admin,
        "dangerous" => admin || is(&["FLUSHALL", "FLUSHDB", "KEYS", "SORT", "SORT_RO", "INFO", "RESTORE"]),
        "keyspace" => is(&[
            "DEL",
            "UNLINK",
            "EXISTS",
            "TOUCH",
            "TYPE",
            "RENAME",
            "RENAMENX",
            "COPY",
            "EXPIRE",
            "PEXPIRE",
            "EXPIREAT",
            "PEXPIREAT",
            "PERSIST",
            "TTL",
            "PTTL",
            "EXPIRETIME",
            "PEXPIRETIME",
            "KEYS",
            "SCAN",
            "RANDOMKEY",
            "DBSIZE",
            "FLUSHALL",
            "FLUSHDB",
            "OBJECT",
            "DUMP",
            "RESTORE",
        ]),
        "hash" => data && name.starts_with('H') && name != "HELLO",
        "list" => {
            data && (starts(&[
                "LP", "RP", "LRANGE", "LLEN", "LI", "LSET", "LREM", "LTRIM", "LMOVE", "LMPOP", "BL", "BR",
            ]))
        }
        "sortedset" => data && starts(&["Z", "BZ"]),
        "stream" => data && name.starts_with('X'),
        "geo" => starts(&["GEO"]),
        "hyperloglog" => starts(&["PF"]),
        "bitmap" => starts(&["BIT", "GETBIT", "SETBIT"]),
        "set" => {
            data && (starts(&[
                "SADD", "SREM", "SMEM", "SIS", "SMIS", "SCARD", "SPOP", "SRAND", "SMOVE", "SINTER", "SUNION", "SDIFF",
                "SSCAN",
            ]))
        }
        "string" => is(&[
            "GET",
            "SET",
            "SETNX",
            "SETEX",
            "PSETEX",
            "GETSET",
            "GETDEL",
            "GETEX",
            "MGET",
            "MSET",
            "MSETNX",
            "APPEND",
            "STRLEN",
            "GETRANGE",
            "SUBSTR",
            "SETRANGE",
            "INCR",
            "DECR",
            "INCRBY",
            "DECRBY",
            "INCRBYFLOAT",
            "LCS",
        ]),
        _ => false,
    }
}

impl User {
    fn none(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            enabled: false,
            no_password: false,
            hashes: Vec::new(),
            every_command: false,
            commands: HashSet::default(),
            keys: Vec::new(),
            every_key: false,
            channels: Vec::new(),
            every_channel: false,
            rules: String::new(),
        }
    }

    fn rule(&mut self, rule: &str) -> Result<(), String> {
        let shown = match rule.strip_prefix('>') {
            Some(password) => format!("#{}", hex(&hash(password.as_bytes()))),
            None => rule.to_owned(),
        };
        let word = rule.to_ascii_lowercase();
        match word.as_str() {
            "on" => self.enabled = true,
            "off" => self.enabled = false,
            "nopass" => self.no_password = true,
            "resetpass" => (self.no_password, self.hashes) = (false, Vec::new()),
            "allkeys" | "~*" => self.every_key = true,
            "resetkeys" => (self.every_key, self.keys) = (false, Vec::new()),
            "allchannels" | "&*" => self.every_channel = true,
            "resetchannels" => (self.every_channel, self.channels) = (false, Vec::new()),
            "allcommands" | "+@all" => self.every_command = true,
            "nocommands" | "-@all" => (self.every_command, self.commands) = (false, HashSet::default()),
            "sanitize-payload" | "skip-sanitize-payload" => {}
            "reset" => *self = Self::none(&self.name),
            _ => self.detail(rule, &word)?,
        }
        if !self.rules.is_empty() {
            self.rules.push(' ');
        }
        self.rules.push_str(&shown);
        Ok(())
    }

    fn detail(&mut self, rule: &str, word: &str) -> Result<(), String> {
        let Some((kind, rest)) = rule.split_at_checked(1) else {
            return Err("there is an empty rule".into());
        };
        match kind {
            "#" => self
                .hashes
                .push(unhex(rest).ok_or("what follows # is no SHA-256 in 64 hexadecimal digits")?),
            ">" => self.hashes.push(hash(rest.as_bytes())),
            "~" => self.keys.push(Pattern {
                glob: rest.into(),
                read: true,
                write: true,
            }),
            "%" => {
                let (rights, glob) = rest.split_once('~').ok_or("a rule of keys needs a ~: %R~pattern")?;
                let rights = rights.to_ascii_uppercase();
                let (read, write) = (rights.contains('R'), rights.contains('W'));
                if !(read || write) || rights.chars().any(|c| !"RW".contains(c)) {
                    return Err(format!("{rule:?} is none of %R~, %W~ and %RW~"));
                }
                self.keys.push(Pattern {
                    glob: glob.into(),
                    read,
                    write,
                });
            }
            "&" => self.channels.push(rest.into()),
            "+" | "-" => {
                let what = &word[1..];
                let on = kind == "+";
                let chosen: Vec<&'static str> = match what.strip_prefix('@') {
                    Some(class) if CLASSES.contains(&class) => names().filter(|n| is_of(n, class)).collect(),
                    Some(class) => return Err(format!("there is no class of commands {class:?}")),
                    None => {
                        if what.contains('|') {
                            return Err(format!("{rule:?}: rules about subcommands are not supported"));
                        }
                        let upper = what.to_ascii_uppercase();
                        let found: Vec<&'static str> = names().filter(|n| *n == upper).collect();
                        if found.is_empty() {
                            return Err(format!("there is no command {what:?}"));
                        }
                        found
                    }
                };
                if on {
                    self.commands.extend(chosen);
                } else {
                    if std::mem::take(&mut self.every_command) {
                        self.commands = names().collect();
                    }
                    for name in chosen {
                        self.commands.remove(name);
                    }
                }
            }
            _ => return Err(format!("the rule {rule:?} is not known")),
        }
        Ok(())
    }

    /// The line that `ACL LIST` shows: hashes, never passwords.
    pub(crate) fn line(&self) -> String {
        format!("user {} {}", self.name, self.rules)
    }

    /// For `ACL GETUSER`: flags, hashes, commands, keys, channels.
    pub(crate) fn shown(&self) -> (Vec<&'static str>, Vec<String>, String, String, String) {
        let mut flags = vec![if self.enabled { "on" } else { "off" }];
        if self.no_password {
            flags.push("nopass");
        }
        let of = |start: &[char]| {
            self.rules
                .split(' ')
                .filter(|r| r.starts_with(start))
                .collect::<Vec<_>>()
                .join(" ")
        };
        let commands = if self.every_command {
            "+@all".to_owned()
        } else {
            format!("-@all {}", of(&['+', '-'])).trim_end().to_owned()
        };
        let keys = if self.every_key { "~*".into() } else { of(&['~', '%']) };
        let channels = if self.every_channel { "&*".into() } else { of(&['&']) };
        (
            flags,
            self.hashes.iter().map(|h| hex(h)).collect(),
            commands,
            keys,
            channels,
        )
    }

    /// Nothing is denied to this user.
    pub(crate) fn may_everything(&self) -> bool {
        self.every_command && self.every_key && self.every_channel
    }

    /// Whether this command may be given; otherwise what the client is told.
    pub(crate) fn may(&self, spec: Option<&'static Spec>, a: Args<'_>) -> Result<(), String> {
        if self.may_everything() || spec.is_some_and(|s| s.is(commands::OPEN)) {
            return Ok(());
        }
        if !self.every_command {
            let name = spec.map(|s| s.name).or_else(|| route::further_named(a.at(0)));
            if !name.is_some_and(|n| self.commands.contains(n)) {
                let name: String = String::from_utf8_lossy(a.at(0)).chars().take(64).collect();
                return Err(format!("{NO_COMMAND} '{}' command", name.to_ascii_lowercase()));
            }
        }
        if !self.every_key {
            let write = spec.map_or_else(|| route::writes(spec, a), |s| s.is(WRITE));
            let mut denied = false;
            route::keys(spec, a, &mut |i| {
                let key = a.at(i);
                denied |= !self
                    .keys
                    .iter()
                    .any(|p| (p.write || !write) && (p.read || write) && glob::matches(&p.glob, key));
            });
            if denied {
                return Err(NO_KEY.into());
            }
        }
        if !self.every_channel {
            let of = match spec.map_or("", |s| s.name) {
                "PUBLISH" => 1..2,
                "SUBSCRIBE" | "SSUBSCRIBE" | "PSUBSCRIBE" => 1..a.len(),
                _ if a.is(0, "SPUBLISH") => 1..2,
                _ => 0..0,
            };
            let pattern = spec.is_some_and(|s| s.name == "PSUBSCRIBE");
            for i in of {
                // A pattern is allowed only when it stands among the rules: what it would match can't be foreseen.
                let allowed = self.channels.iter().any(|c| {
                    if pattern {
                        c == a.at(i)
                    } else {
                        glob::matches(c, a.at(i))
                    }
                });
                if !allowed {
                    return Err(NO_CHANNEL.into());
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Span;

    fn may(user: &User, line: &str) -> Result<(), String> {
        let mut at = 0;
        let spans: Vec<Span> = line
            .split(' ')
            .map(|w| {
                let s = Span {
                    start: at as u32,
                    end: (at + w.len()) as u32,
                };
                at += w.len() + 1;
                s
            })
            .collect();
        let a = Args::new(line.as_bytes(), &spans);
        user.may(commands::find(a.at(0)), a)
    }

    #[test]
    fn rules_allow_what_they_name_and_nothing_else() {
        let mut users = Users::of_password("secret");
        users
            .add("# people\nuser app on >pw ~app:* %R~shared:* &app.* +@read +@write +@pubsub -keys +eval\nuser off off >pw +@all ~*\nuser ro on #5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8 ~* +get +mget")
            .unwrap();
        let app = users.login(b"app", b"pw").unwrap();
        assert!(users.login(b"app", b"other").is_none());
        assert!(users.login(b"off", b"pw").is_none());
        assert!(users.login(b"ro", b"password").is_some());
        assert!(users.login(b"default", b"secret").is_some());
        for fine in [
            "GET app:1",
            "SET app:1 x",
            "GET shared:1",
            "MGET app:1 shared:2",
            "PUBLISH app.x hello",
            "SUBSCRIBE app.a app.b",
            "PSUBSCRIBE app.*",
            "EVAL return 1 app:1",
            "BITCOUNT app:1",
            "AUTH x",
        ] {
            assert_eq!(may(&app, fine), Ok(()), "{fine}");
        }
        for (denied, why) in [
            ("GET other", NO_KEY),
            ("SET shared:1 x", NO_KEY),
            ("MGET app:1 other", NO_KEY),
            ("EVAL return 1 other", NO_KEY),
            ("ZUNIONSTORE app:1 2 app:2 other", NO_KEY),
            ("KEYS *", NO_COMMAND),
            ("CONFIG GET *", NO_COMMAND),
            ("NOSUCH", NO_COMMAND),
            ("PUBLISH other x", NO_CHANNEL),
            ("PSUBSCRIBE app.x*", NO_CHANNEL),
        ] {
            let told = may(&app, denied).unwrap_err();
            assert!(told.starts_with(why), "{denied}: {told}");
        }
        for bad in [
            "user x +@nosuch",
            "user x +nosuch",
            "user x #12",
            "user x %Q~a",
            "user x whatever",
            "user x on\nuser x off",
            "x on",
        ] {
            assert!(Users::of_password("s").add(bad).is_err(), "{bad}");
        }
        assert!(!app.line().contains("pw"), "{}", app.line());
    }
}
