//! Which names may become names of files, and whether a set of paths can exist beside each other.

use bytes::Bytes;

/// Bytes of one part of a path, as common file systems have it.
const MAX_COMPONENT: usize = 255;

/// What is wrong with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathProblem {
    /// No parts, or an empty one.
    #[error("it has an empty part")]
    Empty,
    /// `.` or `..`.
    #[error("it has a part that is . or ..")]
    Dots,
    /// A separator or NUL within a part.
    #[error("a part of it holds / or NUL")]
    Separator,
    /// Longer than file systems take.
    #[error("it is too long")]
    TooLong,
    /// Two files of one path, or a file where another needs a directory.
    #[error("something else of the same content is in its place")]
    Overlaps,
}

/// Whether `part` may be a file's or directory's name.
pub fn check_component(part: &[u8]) -> Result<(), PathProblem> {
    if part.is_empty() {
        return Err(PathProblem::Empty);
    }
    if part == b"." || part == b".." {
        return Err(PathProblem::Dots);
    }
    if part.iter().any(|byte| matches!(byte, b'/' | 0)) {
        return Err(PathProblem::Separator);
    }
    if part.len() > MAX_COMPONENT {
        return Err(PathProblem::TooLong);
    }
    Ok(())
}

/// Finds a path that another one is equal to, or leads through without being allowed to. `paths` are joined with `/`; `is_dir` says
/// whether others may lie below a path. Returns the index of the one that is in the way.
pub(crate) fn find_overlap(paths: &[Bytes], is_dir: impl Fn(usize) -> bool) -> Option<usize> {
    let mut order: Vec<u32> = (0..paths.len() as u32).collect();
    // In the order of parts, whatever lies below a path follows it without a gap. `/` has to sort before every other byte for that.
    let key = |at: &u32| {
        paths[*at as usize]
            .iter()
            .map(|byte| if *byte == b'/' { 0 } else { u16::from(*byte) + 1 })
    };
    order.sort_unstable_by(|a, b| key(a).cmp(key(b)));
    order.windows(2).find_map(|pair| {
        let (first, second) = (pair[0] as usize, pair[1] as usize);
        let (short, long) = (&paths[first], &paths[second]);
        let below = long.strip_prefix(short.as_ref());
        match below.map(|rest| rest.first()) {
            Some(None) => Some(second),
            Some(Some(b'/')) if !is_dir(first) => Some(second),
            _ => None,
        }
    })
}

/// Parts joined with `/`.
pub(crate) fn join(parts: &[Bytes]) -> Bytes {
    match parts {
        [only] => only.clone(),
        _ => parts.join(&b'/').into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlap(paths: &[&'static str], dirs: &[usize]) -> Option<usize> {
        let paths: Vec<Bytes> = paths.iter().map(|path| Bytes::from_static(path.as_bytes())).collect();
        find_overlap(&paths, |at| dirs.contains(&at))
    }

    #[test]
    fn paths_in_each_others_way_are_found() {
        assert_eq!(overlap(&["a", "b", "c/d", "c/e"], &[]), None);
        assert_eq!(overlap(&["c", "a", "c"], &[]), Some(2));
        assert_eq!(overlap(&["a/b", "x", "a"], &[]), Some(0), "a is no directory");
        assert_eq!(overlap(&["a/b", "x", "a"], &[2]), None);
        assert_eq!(overlap(&["a", "a", "a/b"], &[0, 1]), Some(1), "a directory twice");
        // A byte below the separator between a path and what lies below it.
        assert_eq!(overlap(&["a", "a b", "a!", "a-b/c", "a/b"], &[]), Some(4));
        assert_eq!(overlap(&["a", "ab", "a.b", "a b/c"], &[]), None);
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for (name, problem) in [
            (&b""[..], PathProblem::Empty),
            (b".", PathProblem::Dots),
            (b"..", PathProblem::Dots),
            (b"a/b", PathProblem::Separator),
            (b"/", PathProblem::Separator),
            (b"a\0", PathProblem::Separator),
            (&[b'a'; 256], PathProblem::TooLong),
        ] {
            assert_eq!(check_component(name), Err(problem), "{}", name.escape_ascii());
        }
        for name in [&b"..."[..], b"a b", b"a\nb", b"\xff\xfe", b"-rf", &[b'a'; 255]] {
            assert_eq!(check_component(name), Ok(()), "{}", name.escape_ascii());
        }
    }
}
