//! Which program runs a script file that does not say so itself: by its ending, where the host has that program. Files that
//! begin with `#!` and commands that are no script file are left as they are.

use std::path::{Path, PathBuf};

/// Programs by ending, the preferred one first.
const BY_ENDING: [(&str, &[&str]); 11] = [
    ("sh", &["bash", "sh"]),
    ("bash", &["bash"]),
    ("ksh", &["ksh", "ksh93", "mksh"]),
    ("zsh", &["zsh"]),
    ("py", &["python3", "python"]),
    ("pl", &["perl"]),
    ("rb", &["ruby"]),
    ("lua", &["lua"]),
    ("php", &["php"]),
    ("js", &["node", "nodejs"]),
    ("ps1", &["pwsh"]),
];

/// The command to run instead of `command`, when its first word is the script at `dir/name` with this beginning.
pub(super) fn with_interpreter(command: &str, dir: &str, name: &str, head: &[u8], path: &str) -> Option<String> {
    if head.starts_with(b"#!") || !is_file_of(first_word(command)?, dir, name) {
        return None;
    }
    let ending = Path::new(name).extension()?.to_str()?.to_ascii_lowercase();
    let (_, programs) = BY_ENDING.iter().find(|(known, _)| *known == ending)?;
    let program = programs.iter().find_map(|program| find(program, path))?;
    Some(format!(
        "{} {}",
        quoted(&program.to_string_lossy()),
        command.trim_start()
    ))
}

/// The first word, when it can be told without a shell: plain, or quoted as a whole.
fn first_word(command: &str) -> Option<&str> {
    let command = command.trim_start();
    for quote in ['\'', '"'] {
        if let Some(rest) = command.strip_prefix(quote) {
            let (word, after) = rest.split_once(quote)?;
            let alone = after.is_empty() || after.starts_with(|c: char| c.is_whitespace() || ";&|<>".contains(c));
            let plain = quote == '\'' || !word.contains(['$', '`', '\\']);
            return (alone && plain).then_some(word);
        }
    }
    let end = command
        .find(|c: char| c.is_whitespace() || ";&|<>()".contains(c))
        .unwrap_or(command.len());
    let word = &command[..end];
    (!word.is_empty() && !word.contains(['\\', '\'', '"', '$', '`', '*', '?', '['])).then_some(word)
}

fn is_file_of(word: &str, dir: &str, name: &str) -> bool {
    let Some((word_dir, word_name)) = word.rsplit_once('/') else {
        return false;
    };
    let parts = |path: &str| {
        path.split('/')
            .filter(|p| !p.is_empty())
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    word.starts_with('/') && word_name == name && parts(word_dir) == parts(dir)
}

fn find(program: &str, path: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    path.split(':')
        .filter(|dir| dir.starts_with('/'))
        .map(|dir| Path::new(dir).join(program))
        .find(|file| {
            // A program that cannot be looked at cannot be run either.
            std::fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATH: &str = "/usr/bin:/bin";

    fn of(command: &str, name: &str, head: &[u8]) -> Option<String> {
        with_interpreter(command, "/tmp/job/root/", name, head, PATH)
    }

    #[test]
    fn only_the_script_itself_and_only_without_a_line_of_its_own() {
        let sh = |rest: &str| Some(format!("'/usr/bin/bash' {rest}"));
        assert_eq!(of("/tmp/job/root/a.sh", "a.sh", b"echo"), sh("/tmp/job/root/a.sh"));
        assert_eq!(
            of(" /tmp/job//root/a.sh 'x y'; ls", "a.sh", b""),
            sh("/tmp/job//root/a.sh 'x y'; ls")
        );
        assert_eq!(of("'/tmp/job/root/a.sh' x", "a.sh", b""), sh("'/tmp/job/root/a.sh' x"));
        for (command, head) in [
            ("/tmp/job/root/a.sh", b"#!/bin/ksh".as_slice()),
            ("/tmp/job/root/b.sh", b""),
            ("sh /tmp/job/root/a.sh", b""),
            ("a.sh", b""),
            ("/tmp/job/root/a.sh$x", b""),
            ("'/tmp/job/root/a.sh'x", b""),
            ("", b""),
        ] {
            assert_eq!(of(command, "a.sh", head), None, "{command}");
        }
        assert_eq!(of("/tmp/job/root/a", "a", b""), None);
        assert_eq!(of("/tmp/job/root/a.unknown", "a.unknown", b""), None);
        assert_eq!(
            of("/tmp/job/root/a.pl", "a.pl", b""),
            Some("'/usr/bin/perl' /tmp/job/root/a.pl".to_owned())
        );
    }

    #[test]
    fn a_program_that_is_not_there_changes_nothing() {
        assert_eq!(with_interpreter("/d/a.sh", "/d", "a.sh", b"", "/nonexistent"), None);
    }
}
