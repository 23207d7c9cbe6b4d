//! What `gse cp` is to copy, and where to: reading the words of the command line, and the bodies of the calls.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use gse_proto::http::{AgentEndpoint, FileSource, FileTarget, PushFile, PushTask, TransferFile, TransferTask};
use gse_proto::ids::AgentId;

use crate::targets::Targets;
use crate::text::one_line;

/// Most bytes of a file that go inside the call.
pub const MAX_PUSH: u64 = 102_400;

/// One thing to copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// On a host with an agent.
    Remote {
        /// The agent.
        agent: String,
        /// Its directory.
        dir: String,
        /// File name or pattern; empty: the directory itself.
        name: String,
    },
    /// A file of this machine whose content goes inside the call.
    Content {
        /// Its name.
        name: String,
        /// What is in it.
        content: String,
        /// Its mode, the octal digits as decimal ones.
        mode: i64,
    },
}

/// Where to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// Which hosts.
    pub targets: Targets,
    /// Absolute directory there.
    pub dir: String,
}

/// The two sides of `SOMETHING:/PATH`.
fn split(word: &str) -> Option<(&str, &str)> {
    let at = word.find(":/")?;
    Some((&word[..at], &word[at + 1..]))
}

impl Destination {
    /// Reads `TARGETS:DIR`.
    ///
    /// # Errors
    /// It is not one.
    pub fn parse(word: &str) -> anyhow::Result<Self> {
        let Some((targets, dir)) = split(word) else {
            bail!(
                "\"{}\" does not say where to copy to; write TARGETS:DIR with an absolute directory, such as 0:10.0.0.1:/tmp or all:/opt/app",
                one_line(word)
            );
        };
        if targets.split(',').any(|id| id.trim().is_empty()) {
            bail!(
                "\"{}\" holds an empty target; say all:{} if all of them are meant",
                one_line(word),
                one_line(dir)
            );
        }
        let ids: Vec<String> = targets.split(',').map(str::to_owned).collect();
        Ok(Self {
            targets: Targets::parse(&ids)?,
            dir: dir.to_owned(),
        })
    }
}

/// Directory and name of a path; one that ends with a slash is a directory itself.
fn dir_and_name(path: &str) -> (String, String) {
    match path.rsplit_once('/') {
        Some((dir, "")) => (if dir.is_empty() { "/" } else { dir }.to_owned(), String::new()),
        Some(("", name)) => ("/".to_owned(), name.to_owned()),
        Some((dir, name)) => (dir.to_owned(), name.to_owned()),
        None => (String::new(), path.to_owned()),
    }
}

impl Source {
    /// Reads a word: `AGENT:/PATH`, or a path of this machine. `local_agent`: the agent on this machine, if it is known; it sends what
    /// does not fit into the call.
    ///
    /// # Errors
    /// There is no such file, or it can't be copied from here.
    pub fn parse(word: &str, local_agent: Option<&str>) -> anyhow::Result<Self> {
        if let Some((agent, path)) = split(word)
            && !word.starts_with(['/', '.'])
            && AgentId::parse(agent).is_ok()
        {
            let (dir, name) = dir_and_name(path);
            return Ok(Self::Remote {
                agent: agent.to_owned(),
                dir,
                name,
            });
        }
        Self::local(Path::new(word), local_agent)
    }

    fn local(path: &Path, local_agent: Option<&str>) -> anyhow::Result<Self> {
        let shown = path.display();
        let about = std::fs::metadata(path).with_context(|| format!("cannot read {shown}"))?;
        let whole = absolute(path, about.is_dir()).with_context(|| format!("cannot read {shown}"))?;
        if about.is_file() && about.len() <= MAX_PUSH {
            let bytes = std::fs::read(&whole).with_context(|| format!("cannot read {shown}"))?;
            let name = whole.file_name().and_then(|name| name.to_str());
            // Content travels as text; anything else goes the way of large files.
            if let (Ok(content), Some(name)) = (String::from_utf8(bytes), name) {
                return Ok(Self::Content {
                    name: name.to_owned(),
                    content,
                    mode: digits(about.permissions().mode()),
                });
            }
        }
        let (Some(agent), Some(text)) = (local_agent, whole.to_str()) else {
            bail!(
                "{shown} is not a text file of at most {} KiB, so that an agent has to send it: say --from AGENT with the id of the one on this host, or AGENT:{} for a file of any other",
                MAX_PUSH / 1024,
                whole.display()
            );
        };
        let (dir, name) = if about.is_dir() {
            (text.to_owned(), String::new())
        } else {
            dir_and_name(text)
        };
        Ok(Self::Remote {
            agent: agent.to_owned(),
            dir,
            name,
        })
    }
}

/// The path from the root on. The last part of a file's path stays what it is, for that is the name of the copy.
fn absolute(path: &Path, is_dir: bool) -> std::io::Result<PathBuf> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if !is_dir => {
            let parent = if parent.as_os_str().is_empty() {
                Path::new(".")
            } else {
                parent
            };
            Ok(parent.canonicalize()?.join(name))
        }
        _ => path.canonicalize(),
    }
}

/// A mode as the calls have it: octal digits as decimal ones, without the set-id bits.
fn digits(mode: u32) -> i64 {
    let (user, group, others) = ((mode >> 6) & 7, (mode >> 3) & 7, mode & 7);
    i64::from(user * 100 + group * 10 + others)
}

/// What all files of a command share.
#[derive(Debug, Clone, Default)]
pub struct Manner {
    /// Account that reads and writes.
    pub user: String,
    /// Account that files are to belong to; empty: `user`.
    pub owner: String,
    /// Mode, its octal digits as decimal ones; 0: as it is.
    pub mode: i64,
    /// MB/s; 0: no limit.
    pub limit: i64,
    /// Seconds.
    pub timeout: u32,
    /// Make missing directories.
    pub make_dirs: bool,
}

/// The bodies of the calls: of a push and of a distribution, each if there is anything for it.
#[must_use]
pub fn bodies(
    sources: Vec<Source>,
    ids: &[String],
    dir: &str,
    manner: &Manner,
) -> (Option<PushFile>, Option<TransferFile>) {
    let endpoint = |id: &str| AgentEndpoint {
        bk_agent_id: id.to_owned(),
        user: manner.user.clone(),
        ..AgentEndpoint::default()
    };
    let agents: Vec<AgentEndpoint> = ids.iter().map(|id| endpoint(id)).collect();
    let timeout_seconds = i64::from(manner.timeout);
    let mut push = PushFile {
        timeout_seconds,
        auto_mkdir: manner.make_dirs,
        tasks: vec![],
    };
    let mut transfer = TransferFile {
        timeout_seconds,
        auto_mkdir: manner.make_dirs,
        upload_speed: manner.limit,
        download_speed: manner.limit,
        tasks: vec![],
    };
    for source in sources {
        match source {
            Source::Content { name, content, mode } => push.tasks.push(PushTask {
                file_name: name,
                store_dir: dir.to_owned(),
                file_content: content,
                owner: manner.owner.clone(),
                right: if manner.mode == 0 { mode } else { manner.mode },
                agent_id_list: vec![],
                agents: agents.clone(),
            }),
            Source::Remote { agent, dir: from, name } => transfer.tasks.push(TransferTask {
                source: FileSource {
                    file_name: name,
                    store_dir: from,
                    agent: endpoint(&agent),
                },
                target: FileTarget {
                    file_name: String::new(),
                    store_dir: dir.to_owned(),
                    owner: manner.owner.clone(),
                    permission: manner.mode,
                    agents: agents.clone(),
                },
            }),
        }
    }
    (
        (!push.tasks.is_empty()).then_some(push),
        (!transfer.tasks.is_empty()).then_some(transfer),
    )
}

/// Reads `--mode`: octal digits.
///
/// # Errors
/// It is not one.
pub fn mode(text: &str) -> Result<i64, String> {
    let wrong = || format!("\"{text}\" is not a mode; write octal digits such as 644 or 0755");
    if text.is_empty() || text.len() > 5 || !text.bytes().all(|b| (b'0'..=b'7').contains(&b)) {
        return Err(wrong());
    }
    text.parse()
        .ok()
        .filter(|mode| (1..=7777).contains(mode))
        .ok_or_else(wrong)
}

/// Reads `--from`.
///
/// # Errors
/// It is no id of an agent.
pub fn agent(text: &str) -> Result<String, String> {
    match AgentId::parse(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(format!("\"{}\" is no agent: {error}", one_line(text))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations() {
        let to = Destination::parse("0:10.0.0.1,agent-2:/opt/app/").unwrap();
        assert_eq!(to.targets.ids, ["0:10.0.0.1", "agent-2"]);
        assert_eq!(to.dir, "/opt/app/");
        assert!(Destination::parse("all:/tmp").unwrap().targets.all);
        for bad in ["/tmp", "a:tmp", ":/tmp", "a", "a b:/tmp", "a,:/tmp"] {
            assert!(Destination::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sources() {
        let remote = |word: &str| match Source::parse(word, None).unwrap() {
            Source::Remote { agent, dir, name } => (agent, dir, name),
            other => panic!("{other:?}"),
        };
        let parts = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
        assert_eq!(
            remote("0:10.0.0.1:/var/log/*.log"),
            parts("0:10.0.0.1", "/var/log", "*.log")
        );
        assert_eq!(remote("agent-1:/data/"), parts("agent-1", "/data", ""));
        assert_eq!(remote("agent-1:/x"), parts("agent-1", "/", "x"));

        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(at("small"), "text").unwrap();
        std::fs::set_permissions(at("small"), PermissionsExt::from_mode(0o750)).unwrap();
        std::fs::write(at("bytes"), [0xff, 0xfe]).unwrap();
        let small = Source::parse(&at("small"), None).unwrap();
        assert_eq!(
            small,
            Source::Content {
                name: "small".into(),
                content: "text".into(),
                mode: 750,
            }
        );
        let error = Source::parse(&at("bytes"), None).unwrap_err().to_string();
        assert!(
            error.contains("--from AGENT") && error.contains(&format!("AGENT:{}", at("bytes"))),
            "{error}"
        );
        // One byte more than fits, and a name that a link gives.
        std::fs::write(at("full"), "x".repeat(102_400)).unwrap();
        assert!(matches!(Source::parse(&at("full"), None), Ok(Source::Content { .. })));
        std::fs::write(at("large"), "x".repeat(102_401)).unwrap();
        assert!(Source::parse(&at("large"), None).is_err());
        std::os::unix::fs::symlink("large", at("link")).unwrap();
        assert!(matches!(
            Source::parse(&at("link"), Some("me")).unwrap(),
            Source::Remote { name, .. } if name == "link"
        ));
        assert!(matches!(
            Source::parse(&at("bytes"), Some("me")).unwrap(),
            Source::Remote { agent, name, .. } if agent == "me" && name == "bytes"
        ));
        assert!(matches!(
            Source::parse(dir.path().to_str().unwrap(), Some("me")).unwrap(),
            Source::Remote { name, .. } if name.is_empty()
        ));
        let error = format!("{:#}", Source::parse("/nonexistent/x", None).unwrap_err());
        assert!(error.contains("/nonexistent/x"), "{error}");
    }

    #[test]
    fn modes_are_octal_digits() {
        assert_eq!((mode("644"), mode("0755")), (Ok(644), Ok(755)));
        for bad in ["", "8", "rw", "-1", "0", "000000"] {
            assert!(mode(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn small_files_are_pushed_and_the_rest_is_distributed() {
        let sources = vec![
            Source::Content {
                name: "a".into(),
                content: "x".into(),
                mode: 755,
            },
            Source::Remote {
                agent: "s".into(),
                dir: "/d".into(),
                name: String::new(),
            },
        ];
        let manner = Manner {
            user: "app".into(),
            mode: 600,
            limit: 5,
            timeout: 60,
            ..Manner::default()
        };
        let ids = ["t".to_owned()];
        let as_it_is = Manner::default();
        let (push, _) = bodies(sources.clone(), &ids, "/to", &as_it_is);
        assert_eq!(push.unwrap().tasks[0].right, 755);
        let (push, transfer) = bodies(sources, &ids, "/to", &manner);
        let (push, transfer) = (push.unwrap(), transfer.unwrap());
        assert_eq!(
            (push.tasks[0].right, push.tasks[0].agents[0].user.as_str()),
            (600, "app")
        );
        assert_eq!((transfer.download_speed, transfer.tasks[0].target.permission), (5, 600));
        assert_eq!(transfer.tasks[0].source.agent.bk_agent_id, "s");
    }
}
