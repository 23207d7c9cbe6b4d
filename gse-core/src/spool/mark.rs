//! The mark: up to where entries were released, and the caller's note. One file with two places that are written in turn, so that one
//! of them is whole whenever the power goes, and no space is needed to write it again on a full disk.

use std::io;

use super::disk::{Disk, DiskFile};

/// Its name.
pub(super) const FILE: &str = "mark";
/// Longest note.
pub const MAX_NOTE: usize = 448;

/// Bytes of a place; the second begins where another block of the disk does.
const PLACE: usize = 512;
const SECOND: u64 = 4096;
const MAGIC: &[u8; 4] = b"GSM1";
const HEAD: usize = 4 + 8 + 8 + 4;

/// See the module.
#[derive(Default)]
pub(super) struct Mark {
    pub(super) released: u64,
    pub(super) note: Vec<u8>,
    generation: u64,
    file: Option<Box<dyn DiskFile>>,
}

impl Mark {
    /// Reads the mark; false: there was one and neither place is whole.
    pub(super) fn load(disk: &dyn Disk) -> io::Result<(Self, bool)> {
        let file = match disk.open(FILE) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Self::default(), true)),
            Err(error) => return Err(error),
        };
        let mut newest: Option<Self> = None;
        let mut place = [0; PLACE];
        // One that could not be made on a full disk, or was never written to.
        let mut blank = true;
        for at in [0, SECOND] {
            let read = file.read_at(&mut place, at)?;
            blank &= place[..read].iter().all(|byte| *byte == 0);
            if let Some(mark) = Self::decode(&place[..read])
                && newest.as_ref().is_none_or(|newest| newest.generation < mark.generation)
            {
                newest = Some(mark);
            }
        }
        let whole = newest.is_some() || blank;
        let mut mark = newest.unwrap_or_default();
        mark.file = Some(file);
        Ok((mark, whole))
    }

    fn decode(place: &[u8]) -> Option<Self> {
        if place.len() < PLACE || &place[..4] != MAGIC {
            return None;
        }
        let (content, crc) = place.split_at(PLACE - 4);
        if crc32c::crc32c(content).to_be_bytes() != crc {
            return None;
        }
        let number = |at: usize| Some(u64::from_be_bytes(place[at..at + 8].try_into().ok()?));
        let len = u32::from_be_bytes(place[20..24].try_into().ok()?) as usize;
        Some(Self {
            generation: number(4)?,
            released: number(12)?,
            note: place.get(HEAD..HEAD + len.min(MAX_NOTE))?.to_vec(),
            file: None,
        })
    }

    pub(super) fn save(&mut self, disk: &dyn Disk, sync: bool) -> io::Result<()> {
        let file = match self.file.take() {
            Some(file) => file,
            None => {
                let file = disk.create(FILE)?;
                // Both places have their blocks from the beginning.
                file.write_at(&[0; SECOND as usize + PLACE], 0)?;
                if sync {
                    disk.sync_dir()?;
                }
                file
            }
        };
        let generation = self.generation + 1;
        let mut place = [0; PLACE];
        place[..4].copy_from_slice(MAGIC);
        place[4..12].copy_from_slice(&generation.to_be_bytes());
        place[12..20].copy_from_slice(&self.released.to_be_bytes());
        place[20..24].copy_from_slice(&(self.note.len() as u32).to_be_bytes());
        place[HEAD..HEAD + self.note.len()].copy_from_slice(&self.note);
        let crc = crc32c::crc32c(&place[..PLACE - 4]);
        place[PLACE - 4..].copy_from_slice(&crc.to_be_bytes());
        let at = if generation.is_multiple_of(2) { 0 } else { SECOND };
        let saved = file
            .write_at(&place, at)
            .and_then(|()| if sync { file.sync() } else { Ok(()) });
        self.file = Some(file);
        saved?;
        self.generation = generation;
        Ok(())
    }
}
