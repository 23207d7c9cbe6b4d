//! Numbers of a task's rows, and its header as it is stored.
//!
//! Rows are numbered once and for all: uploads first, then the targets of one group after the other. The number is what a row is
//! called in the store and in orders to agents.

use bytes::Bytes;
use gse_proto::xfer::{Endpoint, Group, Upload, XferHeader};
use prost::Message;

/// What a row is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Index of the upload.
    Upload(u32),
    /// A target of a group.
    Download {
        /// Index of the group.
        group: u32,
        /// Position in the group's list.
        target: u32,
    },
}

/// The numbers of a task's rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    uploads: u32,
    /// First row of each group.
    starts: Vec<u32>,
    rows: u32,
    /// Groups of each upload; of a push, all of them under one that has no row.
    groups: Vec<Vec<u32>>,
}

fn size(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

impl Layout {
    /// Of a header.
    #[must_use]
    pub fn new(header: &XferHeader) -> Self {
        let uploads = size(header.uploads.len());
        let mut rows = uploads;
        let mut starts = Vec::with_capacity(header.groups.len());
        let mut groups = vec![Vec::new(); header.uploads.len().max(1)];
        for (n, group) in (0..).zip(&header.groups) {
            starts.push(rows);
            let targets = header
                .lists
                .get(group.list as usize)
                .map_or(0, |list| list.endpoints.len());
            rows = rows.saturating_add(size(targets));
            if let Some(of_upload) = groups.get_mut(group.upload as usize) {
                of_upload.push(n);
            }
        }
        Self {
            uploads,
            starts,
            rows,
            groups,
        }
    }

    /// How many rows there are.
    #[must_use]
    pub fn rows(&self) -> u32 {
        self.rows
    }

    /// How many of them are uploads.
    #[must_use]
    pub fn uploads(&self) -> u32 {
        self.uploads
    }

    /// What a row is about; `None` past the last one.
    #[must_use]
    pub fn place(&self, row: u32) -> Option<Place> {
        if row >= self.rows {
            return None;
        }
        if row < self.uploads {
            return Some(Place::Upload(row));
        }
        let group = self.starts.partition_point(|start| *start <= row).checked_sub(1)?;
        let start = *self.starts.get(group)?;
        Some(Place::Download {
            group: size(group),
            target: row - start,
        })
    }

    /// The rows of a group.
    #[must_use]
    pub fn of_group(&self, group: u32) -> std::ops::Range<u32> {
        let start = self.starts.get(group as usize).copied().unwrap_or(self.rows);
        start..self.starts.get(group as usize + 1).copied().unwrap_or(self.rows)
    }

    /// The groups of an upload.
    #[must_use]
    pub fn groups_of(&self, upload: u32) -> &[u32] {
        self.groups.get(upload as usize).map_or(&[], Vec::as_slice)
    }

    /// The download rows of an upload.
    pub fn downloads_of(&self, upload: u32) -> impl Iterator<Item = u32> + '_ {
        self.groups_of(upload).iter().flat_map(|group| self.of_group(*group))
    }
}

/// What a row means in its header.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// What is sent; none for a push.
    pub upload: Option<&'a Upload>,
    /// Where it goes; none for an upload.
    pub group: Option<&'a Group>,
    /// Who has to do it.
    pub endpoint: &'a Endpoint,
}

/// Finds what a row means.
#[must_use]
pub fn subject<'a>(header: &'a XferHeader, layout: &Layout, row: u32) -> Option<Subject<'a>> {
    match layout.place(row)? {
        Place::Upload(n) => {
            let upload = header.uploads.get(n as usize)?;
            Some(Subject {
                upload: Some(upload),
                group: None,
                endpoint: upload.source.as_ref()?,
            })
        }
        Place::Download { group, target } => {
            let group = header.groups.get(group as usize)?;
            let list = header.lists.get(group.list as usize)?;
            Some(Subject {
                upload: header.uploads.get(group.upload as usize),
                group: Some(group),
                endpoint: list.endpoints.get(target as usize)?,
            })
        }
    }
}

/// Longest header once unpacked: what a submit may carry, and more.
const MAX_HEADER: usize = 512 << 20;
const RAW: u8 = 0;
const ZSTD: u8 = 1;

/// A header as it is stored: a tag, the length of the message, and the message, compressed when that is shorter.
#[must_use]
pub fn pack(header: &XferHeader) -> Vec<u8> {
    let plain = header.encode_to_vec();
    let plain_len = size(plain.len());
    let (tag, body) = match zstd::bulk::compress(&plain, 1) {
        Ok(packed) if packed.len() < plain.len() => (ZSTD, packed),
        _ => (RAW, plain),
    };
    let mut out = Vec::with_capacity(body.len() + 5);
    out.push(tag);
    out.extend_from_slice(&plain_len.to_be_bytes());
    out.extend_from_slice(&body);
    out
}

/// Reads a stored header; `None` when it is damaged.
#[must_use]
pub fn unpack(bytes: Bytes) -> Option<XferHeader> {
    let len = u32::from_be_bytes(bytes.get(1..5)?.try_into().ok()?) as usize;
    match *bytes.first()? {
        RAW => XferHeader::decode(bytes.slice(5..)).ok(),
        // A damaged length must not make us allocate.
        ZSTD if len <= MAX_HEADER => {
            let plain = zstd::bulk::decompress(&bytes[5..], len).ok()?;
            XferHeader::decode(Bytes::from(plain)).ok()
        }
        _ => None,
    }
}

/// A header without what was pushed: results need none of it.
#[must_use]
pub fn without_content(mut header: XferHeader) -> XferHeader {
    for group in &mut header.groups {
        group.content = Bytes::new();
    }
    header
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use gse_proto::xfer::Targets;

    pub(crate) fn endpoint(id: &str) -> Endpoint {
        Endpoint {
            agent_id: id.into(),
            user: "root".into(),
            ..Endpoint::default()
        }
    }

    /// Two uploads; the first goes to three targets and, elsewhere, to one of them, the second to two.
    pub(crate) fn header() -> XferHeader {
        let upload = |name: &str| Upload {
            source: Some(endpoint("src")),
            dir: "/data".into(),
            name: name.into(),
        };
        let group = |upload, list| Group {
            upload,
            dir: "/t/".into(),
            list,
            ..Group::default()
        };
        let list = |ids: &[&str]| Targets {
            endpoints: ids.iter().map(|id| endpoint(id)).collect(),
        };
        XferHeader {
            task_id: "T".into(),
            deadline_ms: 100_000,
            uploads: vec![upload("a"), upload("b")],
            groups: vec![group(0, 0), group(1, 1), group(0, 2)],
            lists: vec![list(&["x", "y", "z"]), list(&["x", "y"]), list(&["z"])],
            ..XferHeader::default()
        }
    }

    #[test]
    fn every_row_has_one_place() {
        // contract: v2-http-task#30
        let header = header();
        let layout = Layout::new(&header);
        assert_eq!((layout.rows(), layout.uploads()), (8, 2));
        assert_eq!(layout.place(1), Some(Place::Upload(1)));
        assert_eq!(layout.place(4), Some(Place::Download { group: 0, target: 2 }));
        assert_eq!(layout.place(7), Some(Place::Download { group: 2, target: 0 }));
        assert_eq!(layout.place(8), None);
        assert_eq!(layout.downloads_of(0).collect::<Vec<_>>(), [2, 3, 4, 7]);
        assert_eq!(layout.downloads_of(1).collect::<Vec<_>>(), [5, 6]);
        let who: Vec<&str> = (0..8)
            .filter_map(|row| Some(subject(&header, &layout, row)?.endpoint.agent_id.as_str()))
            .collect();
        assert_eq!(who, ["src", "src", "x", "y", "z", "x", "y", "z"]);
    }

    #[test]
    fn headers_read_back() {
        let mut header = header();
        header.groups[0].content = Bytes::from("some text ".repeat(1_000));
        let packed = Bytes::from(pack(&header));
        assert!(packed.len() < 1_000);
        assert_eq!(unpack(packed), Some(header.clone()));
        assert!(without_content(header).groups[0].content.is_empty());
        for damaged in [
            &b""[..],
            b"\x07\0\0\0\x03abc",
            b"\x01\xff\xff\xff\xffabc",
            b"\0\0\0\0\x02\xff\xff",
        ] {
            assert_eq!(unpack(Bytes::copy_from_slice(damaged)), None);
        }
    }
}
