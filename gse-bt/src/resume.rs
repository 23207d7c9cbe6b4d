//! Which pieces are on disk already, in a small file beside the content, so that a restart fetches only the rest. The file is given
//! opened; it is never renamed: it has two places, written in turn, and the newer one that is whole counts. A map of other content, or
//! one that is damaged, is no map.
//!
//! Whether the pieces themselves had reached the disk is left to whoever saves: [`crate::Storage::sync`] first.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use crate::Bitmap;

const MAGIC: &[u8; 8] = b"gsebtrm1";
/// Magic, number, manifest id, pieces.
const HEAD: usize = 8 + 8 + 32 + 4;
const CRC: usize = 4;

/// A resume map. Its calls block for as long as a small read or write of a file takes.
#[derive(Debug)]
pub struct ResumeFile {
    file: File,
    manifest_id: [u8; 32],
    pieces: u32,
    number: u64,
}

impl ResumeFile {
    /// Takes a file, opened for reading and writing, and says what it holds of this content: nothing if it is new.
    pub fn open(file: File, manifest_id: [u8; 32], pieces: u32) -> io::Result<(Self, Option<Bitmap>)> {
        let mut resume = Self {
            file,
            manifest_id,
            pieces,
            number: 0,
        };
        let mut newest = None;
        for place in 0..2 {
            if let Some((number, map)) = resume.read(place)?
                && number >= resume.number
            {
                resume.number = number;
                newest = Some(map);
            }
        }
        Ok((resume, newest))
    }

    /// Writes the map over the older of the two.
    pub fn save(&mut self, pieces: &Bitmap) -> io::Result<()> {
        if pieces.len() != self.pieces {
            return Err(io::Error::other(format!(
                "a map of {} pieces for content of {}",
                pieces.len(),
                self.pieces
            )));
        }
        let number = self.number + 1;
        let mut bytes = Vec::with_capacity(self.size());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&number.to_be_bytes());
        bytes.extend_from_slice(&self.manifest_id);
        bytes.extend_from_slice(&self.pieces.to_be_bytes());
        bytes.extend_from_slice(&pieces.to_wire());
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_be_bytes());
        self.file.write_all_at(&bytes, self.place(number))?;
        self.number = number;
        Ok(())
    }

    /// Has it put on the disk.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn size(&self) -> usize {
        HEAD + Bitmap::wire_len(self.pieces) + CRC
    }

    fn place(&self, number: u64) -> u64 {
        number % 2 * self.size() as u64
    }

    fn read(&self, place: u64) -> io::Result<Option<(u64, Bitmap)>> {
        let mut bytes = vec![0; self.size()];
        match self.file.read_exact_at(&mut bytes, self.place(place)) {
            Ok(()) => Ok(self.decode(&bytes)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn decode(&self, bytes: &[u8]) -> Option<(u64, Bitmap)> {
        let (body, crc) = bytes.split_last_chunk::<CRC>()?;
        let (head, map) = body.split_at_checked(HEAD)?;
        let (magic, rest) = head.split_first_chunk::<8>()?;
        let (number, rest) = rest.split_first_chunk::<8>()?;
        let (id, pieces) = rest.split_first_chunk::<32>()?;
        let whole = crc32c::crc32c(body).to_be_bytes() == *crc && magic == MAGIC;
        if !whole || *id != self.manifest_id || pieces != self.pieces.to_be_bytes() {
            return None;
        }
        Some((u64::from_be_bytes(*number), Bitmap::from_wire(map, self.pieces).ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(of: &[u32]) -> Bitmap {
        let mut map = Bitmap::new(100);
        for piece in of {
            map.set(*piece);
        }
        map
    }

    #[test]
    fn the_newest_map_that_is_whole_counts() {
        let file = tempfile::tempfile().unwrap();
        let again = || ResumeFile::open(file.try_clone().unwrap(), [7; 32], 100).unwrap();
        let (mut resume, found) = again();
        assert!(found.is_none());
        for last in 1..5 {
            resume.save(&map(&(0..last).collect::<Vec<_>>())).unwrap();
            assert_eq!(again().1.unwrap().count(), last);
        }
        // A write that was cut off leaves the one before.
        file.write_all_at(&[0xff; 20], resume.place(resume.number) + 30)
            .unwrap();
        let (mut resume, found) = again();
        assert_eq!(found.unwrap(), map(&[0, 1, 2]));
        resume.save(&map(&[9])).unwrap();
        assert_eq!(again().1.unwrap(), map(&[9]));
        resume.sync().unwrap();
        assert!(resume.save(&Bitmap::new(99)).is_err());
    }

    #[test]
    fn a_map_that_is_cut_or_changed_is_never_a_wrong_one() {
        // contract: reliability#F11
        let file = tempfile::tempfile().unwrap();
        let again = || ResumeFile::open(file.try_clone().unwrap(), [7; 32], 100).unwrap().1;
        let (mut resume, _) = ResumeFile::open(file.try_clone().unwrap(), [7; 32], 100).unwrap();
        let (older, newer) = (map(&[1, 2]), map(&[1, 2, 3, 99]));
        resume.save(&older).unwrap();
        resume.save(&newer).unwrap();
        let mut whole = vec![0; resume.size() * 2];
        file.read_exact_at(&mut whole, 0).unwrap();
        let newest_at = usize::try_from(resume.place(resume.number)).unwrap();
        for bit in 0..whole.len() * 8 {
            let at = bit / 8;
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (bit % 8);
            file.write_all_at(&bytes, 0).unwrap();
            let hit = (newest_at..newest_at + resume.size()).contains(&at);
            assert_eq!(again().as_ref(), Some(if hit { &older } else { &newer }), "bit {bit}");
        }
        for len in 0..whole.len() {
            file.set_len(0).unwrap();
            file.write_all_at(&whole[..len], 0).unwrap();
            let found = again();
            assert!(
                found.is_none() || found == Some(older.clone()) || found == Some(newer.clone()),
                "{len}"
            );
        }
    }

    #[test]
    fn a_map_of_something_else_is_none() {
        let file = tempfile::tempfile().unwrap();
        let (mut resume, _) = ResumeFile::open(file.try_clone().unwrap(), [7; 32], 100).unwrap();
        resume.save(&map(&[1])).unwrap();
        for (id, pieces) in [([8; 32], 100), ([7; 32], 101), ([7; 32], 99)] {
            assert!(
                ResumeFile::open(file.try_clone().unwrap(), id, pieces)
                    .unwrap()
                    .1
                    .is_none()
            );
        }
    }
}
