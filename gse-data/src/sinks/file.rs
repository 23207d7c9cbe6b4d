//! Files: one for each name (a route's target, or the data id), rotated by size and age.
//!
//! How records are told apart is `file.framing`: the record and a newline, or its length and the record. A write that fails part way is
//! taken back, so that the attempt that follows does not leave a record twice or half.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::FutureExt;
use gse_core::random::HashMap;

use super::{Attempted, Failure, Group, Writer};
use crate::config::{Config, FileConfig, Framing};
use crate::routes::table::FileSpec;

/// A directory of files.
pub struct Files {
    state: Option<Box<State>>,
    dir: PathBuf,
    config: FileConfig,
}

struct State {
    dir: PathBuf,
    config: FileConfig,
    open: HashMap<String, Open>,
    turn: u64,
}

struct Open {
    file: File,
    bytes: u64,
    begun: Instant,
    used: u64,
}

impl Files {
    /// Files where a stream says; `trusted` when the directory is from the server's own configuration.
    ///
    /// # Errors
    /// The directory is not one that streams may write in.
    pub fn new(spec: &FileSpec, config: &Config, trusted: bool) -> Result<Self, String> {
        let own = config.data_dir.join("files");
        let dir = own.join(&spec.directory);
        let plain = |path: &Path| !path.components().any(|part| part == Component::ParentDir);
        let allowed = trusted
            || plain(&dir)
                && (dir.starts_with(&own) || config.file.allowed_dirs.iter().any(|one| dir.starts_with(one)));
        if !allowed {
            return Err(format!(
                "{:?} is outside of the directories that streams may write in (file.allowed_dirs)",
                spec.directory
            ));
        }
        let dir = if trusted { PathBuf::from(&spec.directory) } else { dir };
        Ok(Self {
            state: None,
            dir,
            config: config.file.clone(),
        })
    }
}

impl Writer for Files {
    fn write<'a>(&'a mut self, group: &'a Group) -> Attempted<'a> {
        let loads = group.loads.clone();
        async move {
            let mut state = self.state.take().unwrap_or_else(|| {
                Box::new(State {
                    dir: self.dir.clone(),
                    config: self.config.clone(),
                    open: HashMap::default(),
                    turn: 0,
                })
            });
            let work = tokio::task::spawn_blocking(move || {
                let written = state.write(&Group { loads });
                (state, written)
            });
            let (state, written) = work.await.map_err(|error| error.to_string())?;
            self.state = Some(state);
            written.map(|()| vec![])
        }
        .boxed()
    }

    fn patient(&self) -> bool {
        true
    }
}

/// A file's name: what a route says, without what would lead elsewhere.
fn file_name(target: &str) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let name: String = target
        .chars()
        .take(128)
        .map(|c| if safe(c) { c } else { '_' })
        .collect();
    format!("{}.log", name.trim_start_matches('.'))
}

impl State {
    fn write(&mut self, group: &Group) -> Result<(), Failure> {
        let mut texts: BTreeMap<&str, Vec<u8>> = BTreeMap::new();
        for load in &group.loads {
            for part in &load.parts {
                let text = texts.entry(&part.target).or_default();
                for payload in load.payloads(part) {
                    match self.config.framing {
                        Framing::Line => {
                            text.extend_from_slice(payload);
                            text.push(b'\n');
                        }
                        Framing::Length => {
                            text.extend_from_slice(&(payload.len() as u32).to_be_bytes());
                            text.extend_from_slice(payload);
                        }
                    }
                }
            }
        }
        let mut written: Vec<(String, u64)> = Vec::new();
        for (target, text) in texts {
            let name = file_name(target);
            let outcome = self.append(&name, &text);
            match outcome {
                Ok(before) => written.push((name, before)),
                Err(error) => {
                    // The whole group comes again.
                    for (name, before) in written.iter().rev() {
                        self.take_back(name, *before);
                    }
                    return Err(format!("{}: {error}", self.dir.join(&name).display()));
                }
            }
        }
        Ok(())
    }

    /// Appends to a file and says how long it was before.
    fn append(&mut self, name: &str, text: &[u8]) -> io::Result<u64> {
        self.turn += 1;
        let over = self.open.get(name).is_some_and(|open| {
            open.bytes > 0
                && (open.bytes + text.len() as u64 > self.config.rotate_bytes
                    || open.begun.elapsed() >= Duration::from_secs(self.config.rotate_s))
        });
        if over {
            self.rotate(name)?;
        }
        if !self.open.contains_key(name) {
            let opened = self.begin(name)?;
            self.open.insert(name.to_owned(), opened);
        }
        let Some(open) = self.open.get_mut(name) else {
            return Err(io::Error::other("it was just opened"));
        };
        open.used = self.turn;
        let before = open.bytes;
        if let Err(error) = open.file.write_all(text) {
            self.take_back(name, before);
            return Err(error);
        }
        open.bytes += text.len() as u64;
        Ok(before)
    }

    fn take_back(&mut self, name: &str, before: u64) {
        let Some(open) = self.open.get_mut(name) else { return };
        match open.file.set_len(before) {
            Ok(()) => open.bytes = before,
            Err(error) => tracing::error!(name, %error, "a file keeps a part of what will be written again"),
        }
    }

    fn begin(&mut self, name: &str) -> io::Result<Open> {
        if self.open.len() >= self.config.max_open
            && let Some(oldest) = self
                .open
                .iter()
                .min_by_key(|(_, open)| open.used)
                .map(|(name, _)| name.clone())
        {
            self.open.remove(&oldest);
        }
        fs::create_dir_all(&self.dir)?;
        let file = OpenOptions::new().append(true).create(true).open(self.dir.join(name))?;
        let bytes = file.metadata()?.len();
        Ok(Open {
            file,
            bytes,
            begun: Instant::now(),
            used: self.turn,
        })
    }

    /// Puts a file aside under the time, and removes the oldest of those beyond what is kept.
    fn rotate(&mut self, name: &str) -> io::Result<()> {
        self.open.remove(name);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let prefix = format!("{name}.");
        let aside = format!("{prefix}{:013}", now.as_millis());
        fs::rename(self.dir.join(name), self.dir.join(aside))?;
        let mut old: Vec<String> = fs::read_dir(&self.dir)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|one| {
                one.strip_prefix(&prefix)
                    .is_some_and(|end| end.len() == 13 && end.bytes().all(|b| b.is_ascii_digit()))
            })
            .collect();
        old.sort();
        for name in old.iter().take(old.len().saturating_sub(self.config.keep)) {
            fs::remove_file(self.dir.join(name))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Load, Part};
    use super::*;
    use bytes::BytesMut;
    use gse_proto::datalink::put_record;

    fn group(payloads: &[&[u8]]) -> Group {
        let mut body = BytesMut::new();
        for payload in payloads {
            put_record(&mut body, 7, 0, 9, payload);
        }
        let to = body.len();
        let mut load = Load::new(body.freeze());
        load.push(Part {
            data_id: 7,
            target: "../7".into(),
            from: 0,
            to,
            records: payloads.len() as u32,
        });
        Group { loads: vec![load] }
    }

    fn files(dir: &Path, framing: Framing) -> Files {
        let mut config = Config {
            data_dir: dir.to_owned(),
            ..Config::default()
        };
        config.file.framing = framing;
        config.file.rotate_bytes = 4_096;
        config.file.keep = 2;
        Files::new(&FileSpec::default(), &config, false).unwrap()
    }

    #[tokio::test]
    async fn lines_lengths_and_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let mut lines = files(dir.path(), Framing::Line);
        lines.write(&group(&[b"{}", b"\xff"])).await.unwrap();
        let path = dir.path().join("files/_7.log");
        assert_eq!(fs::read(&path).unwrap(), b"{}\n\xff\n");
        let long = vec![b'x'; 4_000];
        for _ in 0..6 {
            lines.write(&group(&[&long])).await.unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(fs::read_dir(dir.path().join("files")).unwrap().count(), 3);
        fs::remove_dir_all(dir.path().join("files")).unwrap();
        let mut lengths = files(dir.path(), Framing::Length);
        lengths.write(&group(&[b"a\n"])).await.unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"\0\0\0\x02a\n");
    }

    #[test]
    fn streams_stay_in_their_directories() {
        let config = Config {
            file: FileConfig {
                allowed_dirs: vec!["/srv/gse".into()],
                ..FileConfig::default()
            },
            ..Config::default()
        };
        for (directory, fine) in [
            ("", true),
            ("sub", true),
            ("/srv/gse/x", true),
            ("/etc", false),
            ("../x", false),
            ("/srv/gse/../x", false),
        ] {
            let spec = FileSpec {
                directory: directory.into(),
            };
            assert_eq!(Files::new(&spec, &config, false).is_ok(), fine, "{directory:?}");
        }
    }
}
