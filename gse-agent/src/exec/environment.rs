//! What a script finds in its environment: the account's own values and the host's, nothing of the agent's.

use std::collections::BTreeMap;
use std::path::Path;

const ROOT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const USER_PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games";
/// Shells that understand `-c` and the command language of the standard.
const POSIX_SHELLS: [&str; 6] = ["sh", "bash", "dash", "ksh", "zsh", "ash"];

/// Set in what is started for the supervisor of processes, and so in everything that comes of it.
pub(super) const SUPERVISED: &str = "GSE_SUPERVISED";

/// What is needed of an account.
#[derive(Debug, Clone)]
pub(super) struct Person<'a> {
    /// Login name.
    pub(super) name: &'a str,
    /// Home directory.
    pub(super) home: &'a str,
    /// Whether this is the superuser.
    pub(super) root: bool,
}

/// The shell that runs commands of an account: its own when that is a shell, else the host's.
pub(super) fn shell_for(own: &str) -> String {
    let name = Path::new(own).file_name().and_then(|n| n.to_str()).unwrap_or_default();
    if POSIX_SHELLS.contains(&name) && Path::new(own).is_absolute() && Path::new(own).is_file() {
        return own.to_owned();
    }
    let bash = "/bin/bash";
    if Path::new(bash).is_file() {
        bash.to_owned()
    } else {
        "/bin/sh".to_owned()
    }
}

/// Builds the environment. `etc` is `/etc`.
pub(super) fn compose(person: &Person<'_>, shell: &str, etc: &Path) -> BTreeMap<String, String> {
    let mut env: BTreeMap<String, String> = BTreeMap::new();
    let mut put = |key: &str, value: &str| env.insert(key.to_owned(), value.to_owned());
    put("PATH", if person.root { ROOT_PATH } else { USER_PATH });
    put("LANG", "C.UTF-8");
    for file in ["default/locale", "locale.conf"] {
        for (key, value) in assignments(&text(&etc.join(file))) {
            if key == "LANG" || key == "LANGUAGE" || key.starts_with("LC_") {
                put(&key, &value);
            }
        }
    }
    for (key, value) in assignments(&text(&etc.join("environment"))) {
        put(&key, &value);
    }
    // Last: nothing in those files may make an account somebody else.
    put("HOME", person.home);
    put("USER", person.name);
    put("LOGNAME", person.name);
    put("SHELL", shell);
    env
}

fn text(path: &Path) -> String {
    // A file that is not there sets nothing.
    std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

/// `KEY=value` lines, as PAM reads them: an optional `export`, quotes around the value, `#` comments.
fn assignments(text: &str) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
        if line.starts_with('#') {
            continue;
        }
        let Some((key, value)) = line.split_once('=') else {
            continue;
        };
        let valid = key
            .chars()
            .enumerate()
            .all(|(at, c)| c == '_' || c.is_ascii_alphabetic() || (at > 0 && c.is_ascii_digit()));
        if key.is_empty() || !valid || value.contains('\0') {
            continue;
        }
        let value = ['"', '\'']
            .iter()
            .find_map(|quote| value.strip_prefix(*quote)?.split_once(*quote).map(|(inside, _)| inside))
            .unwrap_or_else(|| value.split(" #").next().unwrap_or_default().trim_end());
        all.push((key.to_owned(), value.to_owned()));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_account_and_the_host() {
        let etc = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(etc.path().join("default")).expect("mkdir");
        std::fs::write(
            etc.path().join("default/locale"),
            "#  written by something\nLANG=\"de_DE.UTF-8\"\nEVIL=1\n",
        )
        .expect("write");
        std::fs::write(
            etc.path().join("environment"),
            "PATH='/opt/bin:/bin'\nexport PROXY=http://x # why\nHOME=/wrong\n1BAD=2\nno line\n",
        )
        .expect("write");
        let person = Person {
            name: "app",
            home: "/home/app",
            root: false,
        };
        let env = compose(&person, "/bin/sh", etc.path());
        let pairs: Vec<(&str, &str)> = env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(
            pairs,
            [
                ("HOME", "/home/app"),
                ("LANG", "de_DE.UTF-8"),
                ("LOGNAME", "app"),
                ("PATH", "/opt/bin:/bin"),
                ("PROXY", "http://x"),
                ("SHELL", "/bin/sh"),
                ("USER", "app"),
            ]
        );
    }

    #[test]
    fn defaults_without_any_file() {
        let none = Path::new("/nonexistent");
        let root = compose(
            &Person {
                name: "root",
                home: "/root",
                root: true,
            },
            "/bin/sh",
            none,
        );
        let app = compose(
            &Person {
                name: "app",
                home: "/",
                root: false,
            },
            "/bin/sh",
            none,
        );
        assert!(root["PATH"].contains("/sbin") && !app["PATH"].contains("/sbin"));
        assert_eq!(root["LANG"], "C.UTF-8");
    }

    #[test]
    fn only_real_shells() {
        assert_eq!(shell_for("/bin/sh"), "/bin/sh");
        for none in [
            "/usr/sbin/nologin",
            "/bin/false",
            "",
            "sh",
            "/nonexistent/bash",
            "/usr/bin/fish",
        ] {
            assert!(["/bin/bash", "/bin/sh"].contains(&shell_for(none).as_str()));
        }
    }
}
