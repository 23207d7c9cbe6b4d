//! Resource limits of an account, as a login would give them: those that the host's first process has, then the entries of
//! `limits.conf` that name the account, one of its groups or everybody. Only reads and decides; applying them is left to
//! [`super::stage`].

use std::collections::BTreeMap;
use std::path::Path;

use nix::sys::resource::Resource;

/// "unlimited".
pub(super) const INFINITY: u64 = u64::MAX;

/// A soft and a hard limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limit {
    /// What applies.
    pub(super) soft: u64,
    /// How far the account may raise it.
    pub(super) hard: u64,
}

/// A limit, its title in `/proc/PID/limits`, its item in `limits.conf` and the factor from the latter's unit.
struct Known {
    resource: Resource,
    title: &'static str,
    item: &'static str,
    factor: u64,
}

const fn known(resource: Resource, title: &'static str, item: &'static str, factor: u64) -> Known {
    Known {
        resource,
        title,
        item,
        factor,
    }
}

const KNOWN: [Known; 15] = [
    known(Resource::RLIMIT_CPU, "Max cpu time", "cpu", 60),
    known(Resource::RLIMIT_FSIZE, "Max file size", "fsize", 1024),
    known(Resource::RLIMIT_DATA, "Max data size", "data", 1024),
    known(Resource::RLIMIT_STACK, "Max stack size", "stack", 1024),
    known(Resource::RLIMIT_CORE, "Max core file size", "core", 1024),
    known(Resource::RLIMIT_RSS, "Max resident set", "rss", 1024),
    known(Resource::RLIMIT_NPROC, "Max processes", "nproc", 1),
    known(Resource::RLIMIT_NOFILE, "Max open files", "nofile", 1),
    known(Resource::RLIMIT_MEMLOCK, "Max locked memory", "memlock", 1024),
    known(Resource::RLIMIT_AS, "Max address space", "as", 1024),
    known(Resource::RLIMIT_LOCKS, "Max file locks", "locks", 1),
    known(Resource::RLIMIT_SIGPENDING, "Max pending signals", "sigpending", 1),
    known(Resource::RLIMIT_MSGQUEUE, "Max msgqueue size", "msgqueue", 1),
    known(Resource::RLIMIT_NICE, "Max nice priority", "nice", 1),
    known(Resource::RLIMIT_RTPRIO, "Max realtime priority", "rtprio", 1),
];

/// Limits by their place in the table of known ones.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Limits {
    of: BTreeMap<usize, Limit>,
}

impl Limits {
    /// Every limit that is to be set.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Resource, &'static str, Limit)> + '_ {
        self.of
            .iter()
            .map(|(at, limit)| (KNOWN[*at].resource, KNOWN[*at].item, *limit))
    }

    /// Reads the text of `/proc/PID/limits`; lines that are not understood are passed over.
    pub(super) fn from_proc(text: &str) -> Self {
        let mut of = BTreeMap::new();
        for line in text.lines() {
            let Some((at, title)) = KNOWN
                .iter()
                .enumerate()
                .find(|(_, k)| line.starts_with(k.title))
                .map(|(i, k)| (i, k.title))
            else {
                continue;
            };
            let mut words = line[title.len()..].split_whitespace().map(|word| match word {
                "unlimited" => Some(INFINITY),
                number => number.parse().ok(),
            });
            if let (Some(Some(soft)), Some(Some(hard))) = (words.next(), words.next()) {
                of.insert(at, Limit { soft, hard });
            }
        }
        Self { of }
    }

    /// Lays the entries of `limits.conf` files over these limits. Entries that name the account beat those of its groups, which
    /// beat `*`; within one rank the later one counts. `*` and groups do not touch root, as PAM has it.
    pub(super) fn apply_conf<'a>(
        &mut self,
        texts: impl IntoIterator<Item = &'a str>,
        user: &str,
        groups: &[String],
        root: bool,
    ) {
        let mut ranks: BTreeMap<(usize, bool), u8> = BTreeMap::new();
        for line in texts.into_iter().flat_map(str::lines) {
            let line = line.split('#').next().unwrap_or_default();
            let words: Vec<&str> = line.split_whitespace().collect();
            let [domain, kind, item, value] = words[..] else {
                continue;
            };
            let rank = match domain {
                name if name == user => 3,
                "*" if !root => 1,
                name => match name.strip_prefix('@') {
                    Some(group) if !root && groups.iter().any(|g| g == group) => 2,
                    _ => continue,
                },
            };
            let Some(at) = KNOWN.iter().position(|k| k.item == item) else {
                continue;
            };
            let Some(value) = value_of(value, &KNOWN[at]) else {
                continue;
            };
            let sides: &[bool] = match kind {
                "soft" => &[false],
                "hard" => &[true],
                "-" => &[false, true],
                _ => continue,
            };
            for hard in sides {
                let seen = ranks.entry((at, *hard)).or_default();
                if *seen <= rank {
                    *seen = rank;
                    let limit = self.of.entry(at).or_insert(Limit {
                        soft: INFINITY,
                        hard: INFINITY,
                    });
                    *(if *hard { &mut limit.hard } else { &mut limit.soft }) = value;
                }
            }
        }
        for limit in self.of.values_mut() {
            limit.soft = limit.soft.min(limit.hard);
        }
    }
}

fn value_of(text: &str, known: &Known) -> Option<u64> {
    if matches!(text, "-1" | "unlimited" | "infinity") && known.item != "nice" {
        return Some(INFINITY);
    }
    if known.item == "nice" {
        // From 19 (nicest) to -20; the kernel counts upwards from 1.
        let nice: i64 = text.parse().ok()?;
        return u64::try_from(20 - nice.clamp(-20, 19)).ok();
    }
    text.parse::<u64>().ok()?.checked_mul(known.factor)
}

/// The texts of `limits.conf` and of the files in `limits.d`, in the order in which they count.
pub(super) fn conf_texts(security: &Path) -> Vec<String> {
    let mut files = vec![security.join("limits.conf")];
    if let Ok(entries) = std::fs::read_dir(security.join("limits.d")) {
        let mut more: Vec<_> = entries
            .flatten()
            .map(|e| e.path())
            .filter(|p| p.extension().is_some_and(|e| e == "conf"))
            .collect();
        more.sort();
        files.extend(more);
    }
    // A file that is not there sets nothing.
    files
        .iter()
        .filter_map(|file| std::fs::read(file).ok())
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROC: &str = "Limit                     Soft Limit           Hard Limit           Units     \n\
        Max stack size            8388608              unlimited            bytes     \n\
        Max open files            1024                 524288               files     \n\
        Max nice priority         0                    0                    \n\
        Max something new         1                    2                    \n";

    fn of(conf: &[&str], user: &str, groups: &[&str], root: bool) -> BTreeMap<&'static str, (u64, u64)> {
        let mut limits = Limits::from_proc(PROC);
        let groups: Vec<String> = groups.iter().map(|g| (*g).to_owned()).collect();
        limits.apply_conf(conf.iter().copied(), user, &groups, root);
        limits
            .iter()
            .map(|(_, item, limit)| (item, (limit.soft, limit.hard)))
            .collect()
    }

    #[test]
    fn base_is_the_first_process() {
        let limits = of(&[], "app", &[], false);
        assert_eq!(limits["nofile"], (1024, 524_288));
        assert_eq!(limits["stack"], (8_388_608, INFINITY));
        assert_eq!(limits.len(), 3);
    }

    #[test]
    fn the_nearer_entry_wins_whatever_the_order() {
        let conf = [
            "app soft nofile 11\n* - nofile 33\n@web - nofile 22\n",
            "* soft nofile 44 # later file\n",
        ];
        assert_eq!(of(&conf, "app", &["web"], false)["nofile"], (11, 22));
        assert_eq!(of(&conf, "else", &["web"], false)["nofile"], (22, 22));
        assert_eq!(of(&conf, "else", &[], false)["nofile"], (33, 33));
        assert_eq!(of(&conf, "root", &["web"], true)["nofile"], (1024, 524_288));
        assert_eq!(
            of(&["root hard nofile 2000"], "root", &[], true)["nofile"],
            (1024, 2000)
        );
    }

    #[test]
    fn units_and_words() {
        let limits = of(
            &["app - memlock 64\napp - cpu 2\napp - nice -10\napp hard stack unlimited\n"],
            "app",
            &[],
            false,
        );
        assert_eq!(limits["memlock"], (65_536, 65_536));
        assert_eq!(limits["cpu"], (120, 120));
        assert_eq!(limits["nice"], (30, 30));
        assert_eq!(limits["stack"], (8_388_608, INFINITY));
    }

    #[test]
    fn what_is_not_understood_is_passed_over() {
        let conf = [
            "%web - nofile 1\napp - maxlogins 4\napp both nofile 1\napp - nofile many\napp - nofile\n99999999999999999999 - -\n",
        ];
        assert_eq!(of(&conf, "app", &["web"], false), of(&[], "app", &[], false));
    }

    #[test]
    fn soft_never_above_hard() {
        assert_eq!(of(&["app hard nofile 100"], "app", &[], false)["nofile"], (100, 100));
    }
}
