//! What is registered on this host, on disk: `procinfo.json` for what is hosted, in the shape that operators' tools look through (contract
//! procmgr-agent-lifecycle, 1.11), and `procknown.json` for what is known and not hosted. Written whole and atomically; a file that can't be
//! read is set aside, and gse_procmgr puts back what it knows. Which of the two a process is in, and when to write, is decided elsewhere.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use gse_proto::proc::{Label, MAX_LABELS, MAX_NAME, MAX_TEXT, Policy, Spec};
use serde::{Deserialize, Serialize};

use super::find::Ident;
use crate::exec::sync_dir;

/// Longest file that is read: tens of thousands of registrations.
const MAX_FILE: u64 = 256 << 20;

/// A process's name on its host.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    /// Whose it is.
    pub(super) namespace: String,
    /// Its name there.
    pub(super) name: String,
}

impl Key {
    /// Checked, from a message.
    ///
    /// # Errors
    /// A sentence.
    pub(super) fn from_wire(key: Option<&gse_proto::proc::Key>) -> Result<Self, String> {
        let key = key.ok_or("the operation names no process")?;
        for (what, text) in [("namespace", &key.namespace), ("name", &key.name)] {
            if text.is_empty() || text.len() > MAX_NAME || text.contains('\0') {
                return Err(format!("meta.{what} must have 1 to {MAX_NAME} bytes and no NUL"));
            }
        }
        Ok(Self {
            namespace: key.namespace.clone(),
            name: key.name.clone(),
        })
    }

    /// As a message.
    pub(super) fn to_wire(&self) -> gse_proto::proc::Key {
        gse_proto::proc::Key {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.namespace, self.name)
    }
}

/// What is kept of one process.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Registration {
    /// Labels.
    pub(super) labels: BTreeMap<String, String>,
    /// What it is.
    pub(super) spec: Arc<Spec>,
    /// Kept alive by this agent.
    pub(super) hosted: bool,
    /// Given by gse_procmgr with the operation that made it so.
    pub(super) revision: u64,
    /// Unix seconds.
    pub(super) register_time: u64,
    /// Unix seconds; 0 before it was started here.
    pub(super) last_start_time: u64,
    /// It was seen running since it was registered or stopped.
    pub(super) seen: bool,
    /// Which process it was last.
    pub(super) ident: Option<Ident>,
    /// Why it is not as it should be.
    pub(super) trouble: String,
    /// Counts changes: of two copies the greater one counts.
    pub(super) serial: u64,
}

/// One process in a file. The order of the fields is that of the lines.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Kept {
    namespace: String,
    name: String,
    proc_name: String,
    setup_path: String,
    pid_path: String,
    #[serde(default)]
    cfg_path: String,
    #[serde(default)]
    log_path: String,
    user: String,
    start_cmd: String,
    #[serde(rename = "type")]
    auto_type: u32,
    #[serde(default)]
    stop_cmd: String,
    #[serde(default)]
    restart_cmd: String,
    #[serde(default)]
    reload_cmd: String,
    #[serde(default)]
    kill_cmd: String,
    #[serde(default)]
    version_cmd: String,
    #[serde(default)]
    health_cmd: String,
    #[serde(default)]
    cpu_lmt: f64,
    #[serde(default)]
    mem_lmt: f64,
    start_check_secs: u32,
    stop_check_secs: u32,
    start_retries: u32,
    start_interval: u32,
    op_timeout: u32,
    #[serde(default)]
    crontab_rule: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    hosted: bool,
    revision: u64,
    serial: u64,
    register_time: u64,
    last_start_time: u64,
    seen: bool,
    #[serde(default)]
    pid: i32,
    #[serde(default)]
    pid_started: u64,
    #[serde(default)]
    boot_id: String,
    #[serde(default)]
    trouble: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Content<T> {
    procs: Vec<T>,
}

impl Kept {
    fn of(key: &Key, one: &Registration) -> Self {
        let (spec, policy) = (Spec::clone(&one.spec), Policy::of(&one.spec));
        let ident = one.ident.clone().unwrap_or_default();
        Self {
            namespace: key.namespace.clone(),
            name: key.name.clone(),
            proc_name: spec.proc_name,
            setup_path: spec.setup_path,
            pid_path: spec.pid_path,
            cfg_path: spec.config_path,
            log_path: spec.log_path,
            user: spec.user,
            start_cmd: spec.start_cmd,
            auto_type: policy.auto_type,
            stop_cmd: spec.stop_cmd,
            restart_cmd: spec.restart_cmd,
            reload_cmd: spec.reload_cmd,
            kill_cmd: spec.kill_cmd,
            version_cmd: spec.version_cmd,
            health_cmd: spec.health_cmd,
            cpu_lmt: spec.cpu_limit,
            mem_lmt: spec.mem_limit,
            start_check_secs: policy.start_check_secs,
            stop_check_secs: policy.stop_check_secs,
            start_retries: policy.start_retries,
            start_interval: policy.start_interval,
            op_timeout: policy.op_timeout,
            crontab_rule: spec.crontab_rule,
            labels: one.labels.clone(),
            hosted: one.hosted,
            revision: one.revision,
            serial: one.serial,
            register_time: one.register_time,
            last_start_time: one.last_start_time,
            seen: one.seen,
            pid: ident.pid,
            pid_started: ident.started,
            boot_id: ident.boot,
            trouble: one.trouble.clone(),
        }
    }

    fn into_registration(self) -> (Key, Registration) {
        let key = Key {
            namespace: self.namespace,
            name: self.name,
        };
        let spec = Spec {
            proc_name: self.proc_name,
            setup_path: self.setup_path,
            pid_path: self.pid_path,
            config_path: self.cfg_path,
            log_path: self.log_path,
            user: self.user,
            start_cmd: self.start_cmd,
            stop_cmd: self.stop_cmd,
            restart_cmd: self.restart_cmd,
            reload_cmd: self.reload_cmd,
            kill_cmd: self.kill_cmd,
            version_cmd: self.version_cmd,
            health_cmd: self.health_cmd,
            cpu_limit: self.cpu_lmt,
            mem_limit: self.mem_lmt,
            auto_type: Some(self.auto_type),
            start_check_secs: Some(self.start_check_secs),
            stop_check_secs: Some(self.stop_check_secs),
            start_retries: Some(self.start_retries),
            start_interval: Some(self.start_interval),
            op_timeout: Some(self.op_timeout),
            crontab_rule: self.crontab_rule,
        };
        let ident = (self.pid > 0).then_some(Ident {
            pid: self.pid,
            started: self.pid_started,
            boot: self.boot_id,
        });
        let one = Registration {
            labels: self.labels,
            spec: Arc::new(spec),
            hosted: self.hosted,
            revision: self.revision,
            register_time: self.register_time,
            last_start_time: self.last_start_time,
            seen: self.seen,
            ident,
            trouble: self.trouble,
            serial: self.serial,
        };
        (key, one)
    }
}

/// Labels of a message; later ones of the same name count.
///
/// # Errors
/// A sentence, when they are too many or too long.
pub(super) fn labels(labels: &[Label]) -> Result<BTreeMap<String, String>, String> {
    let long = labels
        .iter()
        .any(|label| label.key.len() + label.value.len() > MAX_TEXT);
    if labels.len() > MAX_LABELS || long {
        return Err(format!(
            "meta.labels may have {MAX_LABELS} entries of {MAX_TEXT} bytes at most"
        ));
    }
    Ok(labels.iter().map(|l| (l.key.clone(), l.value.clone())).collect())
}

/// Where the two files are.
#[derive(Debug, Clone)]
pub(super) struct Files {
    /// What is hosted.
    pub(super) info: PathBuf,
    /// What is known and not hosted.
    pub(super) known: PathBuf,
}

/// What was found on disk.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Every registration.
    pub(super) all: BTreeMap<Key, Registration>,
    /// Something is missing: there was no file, or one that could not be used. With the reason when that is trouble.
    pub(super) lost: Option<Option<String>>,
}

impl Files {
    /// Reads both. Blocking.
    ///
    /// # Errors
    /// When a file is there and can't even be opened or moved away: writing would destroy it.
    pub(super) fn load(&self) -> io::Result<Found> {
        let mut found = Found::default();
        for (path, must) in [(&self.info, true), (&self.known, false)] {
            match read(path) {
                Ok(None) if must => {
                    found.lost.get_or_insert(None);
                }
                Ok(None) => {}
                Ok(Some(kept)) => {
                    for (key, one) in kept.into_iter().map(Kept::into_registration) {
                        let newer = found.all.get(&key).is_none_or(|other| other.serial < one.serial);
                        if newer {
                            found.all.insert(key, one);
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    let aside = set_aside(path)?;
                    let text = format!(
                        "{} could not be used and was set aside as {}: {error}; gse_procmgr puts back what it knows",
                        path.display(),
                        aside.display()
                    );
                    found.lost = Some(Some(text));
                }
                Err(error) => {
                    return Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())));
                }
            }
        }
        Ok(found)
    }

    /// Writes both. Blocking.
    ///
    /// # Errors
    /// What the system says; each file is the old or the new one then.
    pub(super) fn store(&self, texts: &Texts) -> io::Result<()> {
        // What comes to be known goes first: a process is in both files for a moment, and never in none.
        for (path, text) in [(&self.known, &texts.known), (&self.info, &texts.info)] {
            let Some(text) = text else { continue };
            let dir = path.parent().unwrap_or(Path::new("/"));
            std::fs::create_dir_all(dir)?;
            crate::host::write_atomically(path, text)
                .and_then(|()| sync_dir(dir))
                .map_err(|error| io::Error::new(error.kind(), format!("cannot write {}: {error}", path.display())))?;
        }
        Ok(())
    }
}

/// What is to be written; `None` for a file that need not be.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Texts {
    info: Option<Vec<u8>>,
    known: Option<Vec<u8>>,
}

impl Texts {
    /// Of all registrations.
    pub(super) fn of<'a>(all: impl Iterator<Item = (&'a Key, &'a Registration)> + Clone) -> serde_json::Result<Self> {
        let part = |hosted: bool| {
            let procs: Vec<Kept> = all
                .clone()
                .filter(|(_, one)| one.hosted == hosted)
                .map(|(key, one)| Kept::of(key, one))
                .collect();
            // One key a line: whoever looks through it does so line by line.
            let mut text = serde_json::to_vec_pretty(&Content { procs })?;
            text.push(b'\n');
            Ok(text)
        };
        Ok(Self {
            info: Some(part(true)?),
            known: Some(part(false)?),
        })
    }

    /// Without the files that are as they were.
    pub(super) fn without(mut self, before: &Self) -> Self {
        if self.info == before.info {
            self.info = None;
        }
        if self.known == before.known {
            self.known = None;
        }
        self
    }

    /// Takes over what `newer` has.
    pub(super) fn update(&mut self, newer: Self) {
        self.info = newer.info.or(self.info.take());
        self.known = newer.known.or(self.known.take());
    }
}

fn read(path: &Path) -> io::Result<Option<Vec<Kept>>> {
    let length = match std::fs::metadata(path) {
        Ok(meta) => meta.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if length > MAX_FILE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "longer than any such file"));
    }
    let bytes = std::fs::read(path)?;
    let content: Content<Kept> = serde_json::from_slice(&bytes)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
    Ok(Some(content.procs))
}

fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".damaged-{seconds}"));
    let aside = PathBuf::from(name);
    std::fs::rename(path, &aside)?;
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        Key {
            namespace: "nodeman".to_owned(),
            name: name.to_owned(),
        }
    }

    fn some() -> BTreeMap<Key, Registration> {
        let one = |hosted, serial| Registration {
            spec: Arc::new(Spec {
                proc_name: "bkmonitorbeat".to_owned(),
                start_cmd: "./start.sh \"bkmonitorbeat\"\nexit".to_owned(),
                auto_type: Some(1),
                start_check_secs: Some(9),
                stop_check_secs: Some(9),
                start_retries: Some(4),
                start_interval: Some(10),
                op_timeout: Some(60),
                cpu_limit: 12.5,
                ..Spec::default()
            }),
            hosted,
            serial,
            revision: 7,
            seen: true,
            ident: Some(Ident {
                pid: 42,
                started: 99,
                boot: "b".to_owned(),
            }),
            labels: BTreeMap::from([("a".to_owned(), "1".to_owned())]),
            ..Registration::default()
        };
        BTreeMap::from([(key("hosted-one"), one(true, 1)), (key("bscp \u{4e2d}"), one(false, 2))])
    }

    fn files(dir: &Path) -> Files {
        Files {
            info: dir.join("etc/procinfo.json"),
            known: dir.join("procknown.json"),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(dir.path());
        let fresh = files.load().unwrap();
        assert!(fresh.all.is_empty() && fresh.lost == Some(None));
        files.store(&Texts::of(some().iter()).unwrap()).unwrap();
        let found = files.load().unwrap();
        assert_eq!(found.all, some());
        assert!(found.lost.is_none());
    }

    #[test]
    fn as_operators_tools_look_through_it() {
        // contract: procmgr-agent-lifecycle#58
        let texts = Texts::of(some().iter()).unwrap();
        let text = String::from_utf8(texts.info.unwrap()).unwrap();
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("\"startCmd\"") || line.contains("\"type\""))
            .map(str::trim)
            .collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(
            lines[0].starts_with("\"startCmd\": ") && lines[1] == "\"type\": 1,",
            "{lines:?}"
        );
        assert!(
            text.contains("hosted-one") && !text.contains("bscp"),
            "only what is hosted: {text}"
        );
    }

    #[test]
    fn damaged_files_are_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(dir.path());
        let texts = Texts::of(some().iter()).unwrap();
        files.store(&texts).unwrap();
        let whole = std::fs::read(&files.info).unwrap();
        for cut in [0, 1, whole.len() / 2, whole.len() - 4] {
            std::fs::write(&files.info, &whole[..cut]).unwrap();
            let found = files.load().unwrap();
            assert!(found.lost.unwrap().unwrap().contains("set aside"), "cut at {cut}");
            assert_eq!(found.all.len(), 1, "what the other file has stays");
            assert!(!files.info.exists());
        }
        let aside = std::fs::read_dir(dir.path().join("etc")).unwrap().count();
        assert!(aside >= 1);
    }

    #[test]
    fn of_two_copies_the_younger_counts() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(dir.path());
        let mut all = some();
        let mut texts = Texts::of(all.iter()).unwrap();
        let one = all.get_mut(&key("hosted-one")).unwrap();
        one.hosted = false;
        one.serial = 5;
        // The agent was killed between the two files.
        texts.known = Texts::of(all.iter()).unwrap().known;
        files.store(&texts).unwrap();
        assert_eq!(files.load().unwrap().all, all);
    }
}
