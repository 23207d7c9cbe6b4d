//! What an agent's own settings allow of script files, whoever asks: where they may be (judged on the way, in [`super::scripts`]) and how
//! much of the disk they may take, which is judged here.

use std::io;
use std::os::fd::OwnedFd;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{Mode, SFlag, fstatat};
use nix::sys::statvfs::fstatvfs;

use super::job::ScriptFile;
use super::record::Record;
use super::scripts::{DIR_FLAGS, kind};

/// What an agent allows of script files, whoever asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ScriptLimits {
    /// Directories in or below which they are written.
    pub(super) roots: Vec<String>,
    /// Beginning of the names of those that count.
    pub(super) prefix: String,
    /// Bytes that those in one directory may take; 0 is no limit.
    pub(super) dir_bytes: u64,
    /// Bytes that have to stay free on the file system.
    pub(super) free_bytes: u64,
}

impl Default for ScriptLimits {
    fn default() -> Self {
        Self {
            roots: vec!["/".to_owned()],
            prefix: String::new(),
            dir_bytes: 0,
            free_bytes: 0,
        }
    }
}

impl ScriptLimits {
    /// Puts them into a job's record.
    pub(super) fn put(&self, record: &mut Record) {
        record.set_number("roots", self.roots.len() as i128);
        for (at, root) in self.roots.iter().enumerate() {
            record.set(format!("root.{at}"), root);
        }
        record
            .set("script_prefix", &self.prefix)
            .set_number("dir_bytes", self.dir_bytes)
            .set_number("free_bytes", self.free_bytes);
    }

    /// Takes them out again.
    ///
    /// # Errors
    /// `InvalidData` when something is missing.
    pub(super) fn from_record(record: &Record) -> io::Result<Self> {
        // A job of an agent that was replaced by this version a moment ago knows no limits.
        let Ok(count) = record.number::<usize>("roots") else {
            return Ok(Self::default());
        };
        let roots = (0..count).map(|at| record.text(&format!("root.{at}")));
        Ok(Self {
            roots: roots.collect::<io::Result<_>>()?,
            prefix: record.text("script_prefix")?,
            dir_bytes: record.number("dir_bytes")?,
            free_bytes: record.number("free_bytes")?,
        })
    }
}

/// Whether there is room for a script file: what the others in the directory take, what is free on the disk.
///
/// # Errors
/// A sentence for the row.
pub(super) fn check_room(dir: &OwnedFd, script: &ScriptFile, limits: &ScriptLimits) -> Result<(), String> {
    let says = |e: Errno| format!("script directory {}: {}", script.dir, e.desc());
    let need = script.content.len() as u64;
    if limits.free_bytes > 0 {
        let disk = fstatvfs(dir).map_err(says)?;
        // Widths differ between platforms.
        #[allow(clippy::useless_conversion, reason = "not useless where they are narrower")]
        let free = u64::from(disk.blocks_available()).saturating_mul(u64::from(disk.fragment_size()));
        if free < limits.free_bytes.saturating_add(need) {
            return Err(format!(
                "script directory {}: {free} bytes are free on its file system; with the script's {need} bytes less than the {} that this agent's settings (exec.min_free_disk_bytes) want to stay free would be left; make room there",
                script.dir, limits.free_bytes
            ));
        }
    }
    if limits.dir_bytes > 0 {
        let mut taken: u64 = 0;
        let mut list = Dir::openat(dir, ".", DIR_FLAGS, Mode::empty()).map_err(says)?;
        for entry in list.iter() {
            let entry = entry.map_err(says)?;
            let name = entry.file_name();
            if !name.to_bytes().starts_with(limits.prefix.as_bytes()) || name.to_bytes() == script.name.as_bytes() {
                continue;
            }
            // What is gone by now takes nothing.
            let Ok(stat) = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) else {
                continue;
            };
            if kind(&stat) == SFlag::S_IFREG {
                taken = taken.saturating_add(u64::try_from(stat.st_size).unwrap_or(0));
            }
        }
        if taken.saturating_add(need) > limits.dir_bytes {
            return Err(format!(
                "script directory {}: its script files take {taken} bytes; with {need} more they would be above the {} that this agent's settings (exec.max_script_dir_bytes) allow; old ones are removed after exec.script_expire_hours",
                script.dir, limits.dir_bytes
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::scripts::write;
    use super::*;

    #[test]
    fn a_job_of_an_earlier_version_has_none() {
        assert_eq!(
            ScriptLimits::from_record(&Record::default()).expect("none"),
            ScriptLimits::default()
        );
    }

    #[test]
    fn there_must_be_room() {
        let place = tempfile::tempdir().expect("a directory");
        let uid = nix::unistd::geteuid().as_raw();
        let script = |name: &str, len: usize| ScriptFile {
            name: name.to_owned(),
            dir: place.path().to_str().expect("plain").to_owned(),
            content: vec![b'x'; len],
        };
        let limits = ScriptLimits {
            prefix: "bk_".to_owned(),
            dir_bytes: 100,
            ..ScriptLimits::default()
        };
        write(&script("other", 1000), uid, &limits).expect_err("more than may be there at all");
        std::fs::write(place.path().join("other"), [0; 1000]).expect("write");
        write(&script("bk_1", 60), uid, &limits).expect("there is room");
        write(&script("bk_1", 100), uid, &limits).expect("it takes its own place");
        let error = write(&script("bk_2", 1), uid, &limits).expect_err("no room");
        assert!(error.contains("max_script_dir_bytes"), "{error}");
        let limits = ScriptLimits {
            free_bytes: u64::MAX,
            ..ScriptLimits::default()
        };
        let error = write(&script("bk_3", 1), uid, &limits).expect_err("nothing has so much");
        assert!(error.contains("min_free_disk_bytes"), "{error}");
        assert!(!place.path().join("bk_3").exists());
    }
}
