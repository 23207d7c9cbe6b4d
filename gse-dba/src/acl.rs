//! `ACL`: who one is and who there is. Users are changed in their file.

use crate::args::Args;
use crate::local::State;
use crate::resp::write::Writer;
use crate::server::Shared;
use crate::users;

const MAX_BITS: i64 = 4096;

impl State {
    pub(crate) fn acl(&self, shared: &Shared, a: Args<'_>, w: &mut Writer) {
        let sub = a.at(1).to_ascii_uppercase();
        let shown = |i: usize| String::from_utf8_lossy(a.at(i)).into_owned();
        match (sub.as_slice(), a.len()) {
            (b"WHOAMI", 2) => w.bulk(self.user.as_ref().map_or(users::DEFAULT, |u| &u.name).as_bytes()),
            (b"USERS", 2) => {
                let all: Vec<_> = shared.users.all().collect();
                w.array(all.len());
                all.iter().for_each(|u| w.bulk(u.name.as_bytes()));
            }
            (b"LIST", 2) => {
                let all: Vec<_> = shared.users.all().collect();
                w.array(all.len());
                all.iter().for_each(|u| w.bulk(u.line().as_bytes()));
            }
            (b"GETUSER", 3) => match shared.users.get(&shown(2)) {
                None => w.null(),
                Some(user) => {
                    let (flags, hashes, commands, keys, channels) = user.shown();
                    w.map(6);
                    w.bulk(b"flags");
                    w.set(flags.len());
                    flags.iter().for_each(|f| w.bulk(f.as_bytes()));
                    w.bulk(b"passwords");
                    w.array(hashes.len());
                    hashes.iter().for_each(|h| w.bulk(h.as_bytes()));
                    for (name, value) in [("commands", commands), ("keys", keys), ("channels", channels)] {
                        w.bulk(name.as_bytes());
                        w.bulk(value.as_bytes());
                    }
                    w.bulk(b"selectors");
                    w.array(0);
                }
            },
            (b"CAT", 2) => {
                w.array(users::CLASSES.len());
                users::CLASSES.iter().for_each(|c| w.bulk(c.as_bytes()));
            }
            (b"CAT", 3) => {
                let class = shown(2).to_ascii_lowercase();
                if !users::CLASSES.contains(&class.as_str()) {
                    return w.error(format!("ERR Unknown category '{}'", shown(2)).as_bytes());
                }
                let all: Vec<&str> = users::names().filter(|n| users::is_of(n, &class)).collect();
                w.array(all.len());
                all.iter().for_each(|n| w.bulk(n.to_ascii_lowercase().as_bytes()));
            }
            (b"GENPASS", 2 | 3) => {
                let bits = if a.len() == 2 {
                    256
                } else {
                    crate::engine::numbers::parse_int(a.at(2)).unwrap_or(0)
                };
                if !(1..=MAX_BITS).contains(&bits) {
                    return w.error(
                        b"ERR ACL GENPASS argument must be the number of bits for the output password, a positive number up to 4096",
                    );
                }
                let digits = usize::try_from(bits).unwrap_or(256).div_ceil(4);
                let text: String = (0..digits)
                    .map(|_| char::from_digit(rand::random_range(0..16), 16).unwrap_or('0'))
                    .collect();
                w.bulk(text.as_bytes());
            }
            (b"HELP", 2) => {
                w.array(2);
                w.simple("ACL <subcommand> [<arg> [value] [opt] ...]. Subcommands are:");
                w.simple("CAT, GENPASS, GETUSER, LIST, USERS, WHOAMI");
            }
            (b"SETUSER" | b"DELUSER" | b"LOAD" | b"SAVE" | b"LOG" | b"DRYRUN", _) => w.error(
                format!(
                    "ERR ACL {} is not allowed through gse_dba: its users are in the file that users_file names",
                    shown(1).to_ascii_uppercase()
                )
                .as_bytes(),
            ),
            _ => w.error(
                format!(
                    "ERR unknown subcommand or wrong number of arguments for '{}'. Try ACL HELP.",
                    shown(1)
                )
                .as_bytes(),
            ),
        }
    }
}
