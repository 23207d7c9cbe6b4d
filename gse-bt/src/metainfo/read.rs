//! Reads `.torrent` files.

use super::*;

pub(super) fn parse(bytes: &Bytes) -> Result<Metainfo, MetainfoError> {
    if bytes.len() > MAX_METAINFO {
        return Err(MetainfoError::TooLong(bytes.len()));
    }
    // Others take what follows the value for nothing (some tools end the file with a line break).
    let (root, _) = bencode::decode_prefix(bytes)?;
    let root = root.dict().ok_or(MetainfoError::Key("info"))?;
    let (mut info, mut announce, mut tiers) = (None, None, None);
    for (key, value) in root.iter() {
        let slot = match key {
            b"info" => &mut info,
            b"announce" => &mut announce,
            b"announce-list" => &mut tiers,
            _ => continue,
        };
        slot.get_or_insert(value);
    }
    let info = info.and_then(Value::dict).ok_or(MetainfoError::Key("info"))?;
    let mut metainfo = parse_info(bytes, info)?;
    metainfo.trackers = trackers(announce, tiers);
    Ok(metainfo)
}

fn parse_info(bytes: &Bytes, info: Dict<'_>) -> Result<Metainfo, MetainfoError> {
    let fields = Fields::of(info);
    let Some(pieces) = fields.pieces else {
        return Err(match fields.file_tree {
            Some(_) => MetainfoError::VersionTwo,
            None => MetainfoError::Key("pieces"),
        });
    };
    let pieces = pieces.bytes().ok_or(MetainfoError::Key("pieces"))?;
    let piece_length = fields
        .piece_length
        .and_then(Value::int)
        .ok_or(MetainfoError::Key("piece length"))?;
    let piece_length = u32::try_from(piece_length)
        .ok()
        .filter(|length| (1..=MAX_PIECE_LENGTH).contains(length))
        .ok_or(MetainfoError::Length {
            key: "piece length",
            value: piece_length,
        })?;
    let name = fields.name.and_then(Value::bytes).ok_or(MetainfoError::Key("name"))?;
    check_component(name).map_err(|problem| path_error(name, problem))?;
    let name = bytes.slice_ref(name);

    let multi = fields.files.is_some();
    let files = match fields.files {
        Some(list) => files(bytes, list.list().ok_or(MetainfoError::Key("files"))?)?,
        None => vec![File {
            path: name.clone(),
            length: length(fields.length)?,
            attr: attr(fields.attr)?,
        }],
    };
    let mut total = 0_u64;
    for file in &files {
        total = total
            .checked_add(file.length)
            .filter(|total| i64::try_from(*total).is_ok())
            .ok_or(MetainfoError::TooLarge)?;
    }
    if total == 0 {
        return Err(MetainfoError::Empty);
    }
    let geometry = Geometry::new(total, piece_length)?;
    debug_assert!(geometry.pieces() <= MAX_PIECES);
    if pieces.len() as u64 != u64::from(geometry.pieces()) * 20 {
        return Err(MetainfoError::Pieces {
            got: pieces.len(),
            pieces: geometry.pieces(),
        });
    }
    check_overlaps(&files)?;
    if let Some(tree) = fields.file_tree {
        hybrid::check(tree.dict().ok_or(MetainfoError::Key("file tree"))?, &files)?;
    }
    Ok(Metainfo {
        info_hash: info_hash(info.raw()),
        name,
        multi,
        geometry,
        pieces: bytes.slice_ref(pieces),
        files,
        private: fields.private.and_then(Value::int).is_some_and(|private| private != 0),
        source: fields
            .source
            .and_then(Value::bytes)
            .map(|source| bytes.slice_ref(source)),
        trackers: Vec::new(),
    })
}

/// Values of an info dictionary; the first of each key.
#[derive(Default)]
struct Fields<'a> {
    name: Option<Value<'a>>,
    piece_length: Option<Value<'a>>,
    pieces: Option<Value<'a>>,
    length: Option<Value<'a>>,
    files: Option<Value<'a>>,
    attr: Option<Value<'a>>,
    private: Option<Value<'a>>,
    source: Option<Value<'a>>,
    file_tree: Option<Value<'a>>,
}

impl<'a> Fields<'a> {
    fn of(info: Dict<'a>) -> Self {
        let mut fields = Self::default();
        for (key, value) in info.iter() {
            let slot = match key {
                b"name" => &mut fields.name,
                b"piece length" => &mut fields.piece_length,
                b"pieces" => &mut fields.pieces,
                b"length" => &mut fields.length,
                b"files" => &mut fields.files,
                b"attr" => &mut fields.attr,
                b"private" => &mut fields.private,
                b"source" => &mut fields.source,
                b"file tree" => &mut fields.file_tree,
                _ => continue,
            };
            slot.get_or_insert(value);
        }
        fields
    }
}

fn files(bytes: &Bytes, list: List<'_>) -> Result<Vec<File>, MetainfoError> {
    let mut files = Vec::new();
    for entry in list.iter() {
        if files.len() == MAX_FILES {
            return Err(MetainfoError::TooManyFiles);
        }
        let entry = entry.dict().ok_or(MetainfoError::Key("files"))?;
        let (mut path, mut size, mut flags) = (None, None, None);
        for (key, value) in entry.iter() {
            let slot = match key {
                b"path" => &mut path,
                b"length" => &mut size,
                b"attr" => &mut flags,
                _ => continue,
            };
            slot.get_or_insert(value);
        }
        let attr = attr(flags)?;
        let path = match path {
            Some(parts) => join_path(bytes, parts.list().ok_or(MetainfoError::Key("path"))?)?,
            // Nobody needs a name for filler.
            None if attr.padding => Bytes::from_static(b".pad"),
            None => return Err(MetainfoError::Key("path")),
        };
        files.push(File {
            path,
            // A link has no content of its own, and mostly no length.
            length: if attr.symlink && size.is_none() {
                0
            } else {
                length(size)?
            },
            attr,
        });
    }
    Ok(files)
}

/// Checks the parts of a path and joins them; a single part is not copied.
fn join_path(bytes: &Bytes, list: List<'_>) -> Result<Bytes, MetainfoError> {
    let mut parts: Vec<Bytes> = Vec::new();
    let mut len = 0;
    for part in list.iter() {
        let part = part.bytes().ok_or(MetainfoError::Key("path"))?;
        check_component(part).map_err(|problem| path_error(part, problem))?;
        len += part.len() + 1;
        if len > MAX_PATH {
            return Err(path_error(part, PathProblem::TooLong));
        }
        parts.push(bytes.slice_ref(part));
    }
    if parts.is_empty() {
        return Err(path_error(b"", PathProblem::Empty));
    }
    Ok(paths::join(&parts))
}

fn length(value: Option<Value<'_>>) -> Result<u64, MetainfoError> {
    let value = value.and_then(Value::int).ok_or(MetainfoError::Key("length"))?;
    u64::try_from(value).map_err(|_| MetainfoError::Length { key: "length", value })
}

fn attr(value: Option<Value<'_>>) -> Result<Attr, MetainfoError> {
    let Some(value) = value else {
        return Ok(Attr::default());
    };
    let flags = value.bytes().ok_or(MetainfoError::Key("attr"))?;
    Ok(Attr {
        padding: flags.contains(&b'p'),
        executable: flags.contains(&b'x'),
        hidden: flags.contains(&b'h'),
        symlink: flags.contains(&b'l'),
    })
}

/// Filler is written by nobody, so its names may be what they like.
fn check_overlaps(files: &[File]) -> Result<(), MetainfoError> {
    let paths: Vec<Bytes> = files
        .iter()
        .filter(|file| !file.attr.padding)
        .map(|file| file.path.clone())
        .collect();
    match paths::find_overlap(&paths, |_| false) {
        None => Ok(()),
        Some(at) => Err(path_error(&paths[at], PathProblem::Overlaps)),
    }
}

fn path_error(path: &[u8], problem: PathProblem) -> MetainfoError {
    let shown = path.get(..200).unwrap_or(path);
    MetainfoError::Path {
        path: shown.escape_ascii().to_string(),
        problem,
    }
}

/// Trackers that can be of use: what is not text, too long or one too many is left out.
fn trackers(announce: Option<Value<'_>>, tiers: Option<Value<'_>>) -> Vec<Vec<String>> {
    let url = |value: Value<'_>| {
        let text = std::str::from_utf8(value.bytes()?).ok()?.trim();
        (!text.is_empty() && text.len() <= MAX_URL).then(|| text.to_owned())
    };
    let mut left = MAX_TRACKERS;
    let mut out: Vec<Vec<String>> = Vec::new();
    // Empty tiers cost nothing but the walk through them.
    for tier in tiers.and_then(Value::list).into_iter().flat_map(|list| list.iter()) {
        let Some(tier) = tier.list() else { continue };
        let urls: Vec<String> = tier.iter().filter_map(url).take(left).collect();
        left -= urls.len();
        if !urls.is_empty() {
            out.push(urls);
        }
        if left == 0 {
            break;
        }
    }
    if out.is_empty() {
        out.extend(announce.and_then(url).map(|url| vec![url]));
    }
    out
}
