//! Names and paths: which are fit to be used, where links lead, what a pattern matches. Pure, except for [`real_path`].

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;

use gse_proto::codes::Inner;
use nix::errno::Errno;

use super::worker::Failed;

/// Longest name of one file.
const MAX_NAME: usize = 255;

/// The parts of an absolute path that holds no "..".
///
/// # Errors
/// A sentence for the row about the `role` directory.
pub(crate) fn absolute(path: &str, role: &str) -> Result<Vec<Vec<u8>>, Failed> {
    let bad = |why: &str| {
        Err(Failed::new(
            Inner::Arguments,
            format!("the {role} directory {path:?} {why}"),
        ))
    };
    if path.is_empty() {
        return Err(Failed::new(
            Inner::Arguments,
            format!("the {role} directory is empty; name one"),
        ));
    }
    if !path.starts_with('/') || path.contains('\0') {
        return bad("is not an absolute path");
    }
    let parts: Vec<Vec<u8>> = path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .map(|part| part.as_bytes().to_vec())
        .collect();
    if parts.iter().any(|part| part == b"..") {
        return bad("must not contain \"..\"");
    }
    Ok(parts)
}

/// Where an open directory really is.
pub(crate) fn real_path(dir: &impl AsFd) -> Result<String, Errno> {
    let path = nix::fcntl::readlink(format!("/proc/self/fd/{}", dir.as_fd().as_raw_fd()).as_str())?;
    Ok(String::from_utf8_lossy(path.as_bytes()).into_owned())
}

/// Whether `path` is one of `roots` or below one, part by part; no roots at all are no restriction.
pub(crate) fn within(path: &str, roots: &[String]) -> bool {
    let parts = |text: &str| -> Vec<String> {
        text.split('/')
            .filter(|part| !part.is_empty() && *part != ".")
            .map(str::to_owned)
            .collect()
    };
    let path = parts(path);
    roots.is_empty() || roots.iter().any(|root| path.starts_with(&parts(root)))
}

/// Whether `name` can be that of one file.
pub(crate) fn plain(name: &[u8]) -> bool {
    !name.is_empty()
        && name != b"."
        && name != b".."
        && name.len() <= MAX_NAME
        && !name.contains(&b'/')
        && !name.contains(&0)
}

/// Whether a link at `path` leads to something below the first part of that path, by its text alone.
pub(crate) fn stays_inside(path: &[Vec<u8>], link: &[u8]) -> bool {
    if link.is_empty() || link.starts_with(b"/") || link.contains(&0) || path.len() < 2 {
        return false;
    }
    // The directory that holds the link, below the first part. What stands behind a name may be a link itself, so ".." there may lead
    // anywhere.
    let mut depth = path.len() - 2;
    let mut named = false;
    for part in link.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." if depth == 0 || named => return false,
            b".." => depth -= 1,
            _ => named = true,
        }
    }
    true
}

/// Whether wildcards match a whole name: `*` anything, `?` one byte, `[a-z]` and `[!a-z]` one of a set. As in a shell, a leading dot is
/// only matched by a dot.
pub(crate) fn wildcard(pattern: &[u8], name: &[u8]) -> bool {
    if name.first() == Some(&b'.') && pattern.first() != Some(&b'.') {
        return false;
    }
    // The place of the last star and of what it has swallowed up to: going back to it is enough.
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        let step = match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
                continue;
            }
            Some(b'?') => Some(1),
            Some(b'[') => set(&pattern[p..], name[n]),
            Some(byte) if *byte == name[n] => Some(1),
            _ => None,
        };
        match (step, star) {
            (Some(len), _) => {
                p += len;
                n += 1;
            }
            (None, Some((at, swallowed))) => {
                p = at + 1;
                n = swallowed + 1;
                star = Some((at, n));
            }
            (None, None) => return false,
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// Length of the set at the head of `pattern`, if `byte` is in it. One that is never closed stands for itself.
fn set(pattern: &[u8], byte: u8) -> Option<usize> {
    let negated = matches!(pattern.get(1), Some(b'!' | b'^'));
    let start = 1 + usize::from(negated);
    // A bracket that comes first belongs to the set.
    let Some(end) = pattern
        .iter()
        .skip(start + 1)
        .position(|b| *b == b']')
        .map(|at| at + start + 1)
    else {
        return (byte == b'[').then_some(1);
    };
    let mut inside = false;
    let mut rest = &pattern[start..end];
    while let Some(first) = rest.first() {
        if rest.len() >= 3 && rest[1] == b'-' {
            inside |= (*first..=rest[2]).contains(&byte);
            rest = &rest[3..];
        } else {
            inside |= *first == byte;
            rest = &rest[1..];
        }
    }
    (inside != negated).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Vec<Vec<u8>> {
        text.split('/').map(|part| part.as_bytes().to_vec()).collect()
    }

    #[test]
    fn wildcards_match_as_in_a_shell() {
        for (pattern, name, expected) in [
            ("*.log", "a.log", true),
            ("*.log", ".log", false),
            (".*", ".log", true),
            ("*", "anything\nat all", true),
            ("a*b*c", "axxbyybzc", true),
            ("a*b*c", "axxbyybz", false),
            ("??", "ab", true),
            ("??", "abc", false),
            ("[a-c]x", "bx", true),
            ("[!a-c]x", "bx", false),
            ("[]]x", "]x", true),
            ("[x", "[x", true),
            ("", "", true),
            ("a", "", false),
        ] {
            assert_eq!(
                wildcard(pattern.as_bytes(), name.as_bytes()),
                expected,
                "{pattern} {name}"
            );
        }
        assert!(wildcard(b"*\xff*", b"a\xffb"));
        // Many stars do not take for ever.
        assert!(!wildcard(&b"*a".repeat(50), &b"a".repeat(49)));
    }

    #[test]
    fn links_stay_inside_what_is_sent() {
        assert!(stays_inside(&path("top/link"), b"file"));
        assert!(stays_inside(&path("top/a/link"), b"../b/file"));
        assert!(stays_inside(&path("top/a/link"), b".."));
        for (at, link) in [
            ("top/link", "../other"),
            ("top/a/link", "../../x"),
            ("top/link", "/etc/passwd"),
            ("top/link", "a/../../x"),
            ("link", "x"),
            ("top/link", ""),
        ] {
            assert!(!stays_inside(&path(at), link.as_bytes()), "{at} -> {link}");
        }
    }

    #[test]
    fn roots_are_whole_parts() {
        let roots = ["/data".to_owned()];
        assert!(within("/data/x", &roots) && within("/data", &roots) && within("/x", &[]));
        assert!(!within("/database", &roots) && within("/", &["/".to_owned()]));
    }
}
