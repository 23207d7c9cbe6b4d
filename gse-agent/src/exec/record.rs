//! The form of every small file that the agent and its runners leave for each other: named fields of bytes and a checksum over
//! all of them, written so that a reader sees the old file, the new one or none, never a part. What the fields mean is left to
//! [`super::job`] and [`super::journal`].

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

const MAGIC: &[u8] = b"gse-record 1\n";
/// Length of the checksum line at the end.
const SUM_LEN: usize = 4 + 64 + 1;
/// No record is larger: scripts and a command of one dispatch, with room.
const MAX_LEN: u64 = 256 * 1024 * 1024;

/// Named fields, in the order of their names.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    fields: BTreeMap<String, Vec<u8>>,
}

fn bad(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

impl Record {
    /// Sets a field. Names have no blanks and no line ends.
    pub(crate) fn set(&mut self, name: impl Into<String>, value: impl AsRef<[u8]>) -> &mut Self {
        self.fields.insert(name.into(), value.as_ref().to_vec());
        self
    }

    /// Sets a number.
    pub(crate) fn set_number(&mut self, name: impl Into<String>, value: impl Into<i128>) -> &mut Self {
        let value: i128 = value.into();
        self.set(name, value.to_string())
    }

    /// A field that may be absent.
    pub(crate) fn get(&self, name: &str) -> Option<&[u8]> {
        self.fields.get(name).map(Vec::as_slice)
    }

    /// A field that has to be there.
    ///
    /// # Errors
    /// `InvalidData` when it is not.
    pub(crate) fn need(&self, name: &str) -> io::Result<&[u8]> {
        self.get(name).ok_or_else(|| bad(format!("field {name} is missing")))
    }

    /// A text that has to be there; invalid UTF-8 is replaced.
    ///
    /// # Errors
    /// `InvalidData` when it is missing.
    pub(crate) fn text(&self, name: &str) -> io::Result<String> {
        Ok(String::from_utf8_lossy(self.need(name)?).into_owned())
    }

    /// A number that has to be there.
    ///
    /// # Errors
    /// `InvalidData` when it is missing, no number or out of range.
    pub(crate) fn number<T: TryFrom<i128>>(&self, name: &str) -> io::Result<T> {
        let value: i128 = self
            .text(name)?
            .parse()
            .map_err(|_| bad(format!("field {name} is no number")))?;
        T::try_from(value).map_err(|_| bad(format!("field {name} is out of range")))
    }

    /// The bytes of the record, checksum included.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let size: usize = self.fields.iter().map(|(k, v)| k.len() + v.len() + 24).sum();
        let mut out = Vec::with_capacity(MAGIC.len() + size + SUM_LEN);
        out.extend_from_slice(MAGIC);
        for (name, value) in &self.fields {
            out.extend_from_slice(format!("{name} {}\n", value.len()).as_bytes());
            out.extend_from_slice(value);
            out.push(b'\n');
        }
        let sum = hex::encode(Sha256::digest(&out));
        out.extend_from_slice(format!("sum {sum}\n").as_bytes());
        out
    }

    /// Reads what [`Record::encode`] wrote.
    ///
    /// # Errors
    /// `InvalidData` for anything else, a single changed bit included.
    pub(crate) fn decode(bytes: &[u8]) -> io::Result<Self> {
        let body_len = bytes
            .len()
            .checked_sub(SUM_LEN)
            .ok_or_else(|| bad("too short for a record"))?;
        let (body, sum) = bytes.split_at(body_len);
        let expected = format!("sum {}\n", hex::encode(Sha256::digest(body)));
        if sum != expected.as_bytes() {
            return Err(bad("the checksum does not match"));
        }
        let mut rest = body.strip_prefix(MAGIC).ok_or_else(|| bad("not a record"))?;
        let mut fields = BTreeMap::new();
        while !rest.is_empty() {
            let line = rest
                .iter()
                .position(|b| *b == b'\n')
                .ok_or_else(|| bad("a field has no end"))?;
            let head = std::str::from_utf8(&rest[..line]).map_err(|_| bad("a field has no name"))?;
            let (name, len) = head.split_once(' ').ok_or_else(|| bad("a field has no length"))?;
            let len: usize = len.parse().map_err(|_| bad("a field has no length"))?;
            rest = &rest[line + 1..];
            if rest.len() <= len || rest[len] != b'\n' {
                return Err(bad("a field is longer than the record"));
            }
            fields.insert(name.to_owned(), rest[..len].to_vec());
            rest = &rest[len + 1..];
        }
        Ok(Self { fields })
    }

    /// Reads a record file.
    ///
    /// # Errors
    /// `NotFound` when there is none, `InvalidData` when it is damaged, or what the system says.
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        if len > MAX_LEN {
            return Err(bad("larger than any record"));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
        file.read_to_end(&mut bytes)?;
        Self::decode(&bytes)
    }

    /// Writes the record to `path` at once and for good: a new file is filled, synced and renamed over it. The directory is
    /// not synced: see [`sync_dir`].
    ///
    /// # Errors
    /// What the system says; then `path` is as it was.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        self.put(path, true)
    }

    /// As [`Record::write`], for what means nothing after a power cut: not synced.
    ///
    /// # Errors
    /// What the system says; then `path` is as it was.
    pub(crate) fn write_for_this_boot(&self, path: &Path) -> io::Result<()> {
        self.put(path, false)
    }

    fn put(&self, path: &Path, sync: bool) -> io::Result<()> {
        let fresh = added_extension(path, "new");
        let result = (|| {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&fresh)?;
            file.write_all(&self.encode())?;
            if sync {
                file.sync_all()?;
            }
            std::fs::rename(&fresh, path)
        })();
        if result.is_err() {
            // What could not be completed must not take space on a disk that may be full; the first error is the one to tell.
            drop(std::fs::remove_file(&fresh));
        }
        result
    }
}

/// `a/b.end` and `new` make `a/b.end.new`.
fn added_extension(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

/// Makes the names in a directory survive a power cut.
///
/// # Errors
/// What the system says.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Record {
        let mut record = Record::default();
        record.set("a", b"one\ntwo\x00").set("b", "").set_number("n", -7);
        record
    }

    #[test]
    fn written_and_read() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("x");
        sample().write(&path).expect("write");
        assert_eq!(Record::read(&path).expect("read"), sample());
        assert_eq!(sample().number::<i32>("n").expect("a number"), -7);
        assert!(sample().number::<u32>("n").is_err());
        assert!(sample().need("c").is_err());
    }

    proptest! {
        #[test]
        fn one_changed_bit_is_noticed(at in 0usize..10_000, bit in 0u8..8) {
            let mut bytes = sample().encode();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(Record::decode(&bytes).is_err());
        }

        #[test]
        fn a_part_is_noticed(len in 0usize..10_000) {
            let bytes = sample().encode();
            let len = len % bytes.len();
            prop_assert!(Record::decode(&bytes[..len]).is_err());
        }

        #[test]
        fn anything_goes_in(name in "[a-z.0-9]{1,8}", value in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut record = Record::default();
            record.set(name, value);
            prop_assert_eq!(Record::decode(&record.encode()).expect("own bytes"), record);
        }
    }
}
