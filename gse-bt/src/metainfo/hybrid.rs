//! Torrents that are of version 1 and version 2 at once (BEP 52) name their files twice. Only version 1 is used here, but a torrent
//! whose two lists differ would be two contents under one name, and is refused.

use super::{Dict, File, MetainfoError, Value};

/// Whether a file tree has the files of version 1 (`files`, filler apart), in their order.
pub(super) fn check(tree: Dict<'_>, files: &[File]) -> Result<(), MetainfoError> {
    let mut left = files.iter().filter(|file| !file.attr.padding);
    let mut path = Vec::new();
    walk(tree, &mut path, &mut left)?;
    match left.next() {
        None => Ok(()),
        Some(_) => Err(MetainfoError::Hybrid),
    }
}

/// The decoder bounds how deep this goes.
fn walk<'f>(
    tree: Dict<'_>,
    path: &mut Vec<u8>,
    left: &mut impl Iterator<Item = &'f File>,
) -> Result<(), MetainfoError> {
    for (name, value) in tree.iter() {
        let below = value.dict().ok_or(MetainfoError::Key("file tree"))?;
        if name.is_empty() {
            let length = length(below).ok_or(MetainfoError::Key("file tree"))?;
            let same = left
                .next()
                .is_some_and(|file| file.path == *path && file.length == length);
            if !same {
                return Err(MetainfoError::Hybrid);
            }
            continue;
        }
        let above = path.len();
        if above > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        walk(below, path, left)?;
        path.truncate(above);
    }
    Ok(())
}

/// Length of a file that is described as it must be.
fn length(file: Dict<'_>) -> Option<u64> {
    let Some(length) = file.get(b"length") else {
        let attr = file.get(b"attr").and_then(Value::bytes)?;
        return attr.contains(&b'l').then_some(0);
    };
    let length = u64::try_from(length.int()?).ok()?;
    let root = file.get(b"pieces root").and_then(Value::bytes).map(<[u8]>::len);
    (length == 0 || root == Some(32)).then_some(length)
}
