//! The file worker: a child of the agent that becomes the asked account for good and is then the only one that touches paths. It finds,
//! opens, makes, renames and lists as that account, and hands open files to the agent. Bytes are the agent's business, and so is what is
//! to be done at all ([`super::work`]).

mod client;
mod source;
mod target;
pub(crate) mod wire;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use gse_proto::codes::Inner;
use nix::errno::Errno;
use nix::sys::stat::{Mode, umask};

pub(super) use client::Worker;
pub(super) use wire::Found;

use self::wire::{Ask, Said, What};
use crate::account::{self, AccountError};

/// Something that could not be done: a code and a sentence for the row.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failed {
    /// Inner code.
    pub(crate) code: i32,
    /// Why.
    pub(crate) message: String,
}

impl Failed {
    pub(crate) fn new(code: Inner, message: impl Into<String>) -> Self {
        Self {
            code: code.code(),
            message: message.into(),
        }
    }
}

impl From<AccountError> for Failed {
    fn from(error: AccountError) -> Self {
        match error {
            AccountError::Missing(text) => Self::new(Inner::NoSuchUser, text),
            AccountError::Failed(text) => Self::new(Inner::System, text),
        }
    }
}

/// A failure at the target.
fn at_target(what: &str, error: Errno) -> Failed {
    let code = match error {
        Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG => Inner::NoSpace,
        _ => Inner::Place,
    };
    Failed::new(code, format!("{what}: {}", error.desc()))
}

/// A failure at the source.
fn at_source(what: &str, error: Errno) -> Failed {
    let code = match error {
        Errno::ENOENT | Errno::ENOTDIR => Inner::NoSource,
        Errno::ELOOP => Inner::SourceKind,
        _ => Inner::Read,
    };
    Failed::new(code, format!("{what}: {}", error.desc()))
}

/// A path's parts as people read them.
fn shown(path: &[Vec<u8>]) -> String {
    let parts: Vec<String> = path
        .iter()
        .map(|part| String::from_utf8_lossy(part).escape_debug().to_string())
        .collect();
    parts.join("/")
}

/// What a worker has open.
#[derive(Default)]
struct State {
    account: bool,
    source: Option<source::Source>,
    target: Option<target::Target>,
}

/// An answer and the files that go with it.
#[derive(Default)]
struct Answer {
    said: Said,
    file: Option<OwnedFd>,
    more: Vec<OwnedFd>,
}

impl From<Said> for Answer {
    fn from(said: Said) -> Self {
        Self {
            said,
            ..Self::default()
        }
    }
}

/// What the worker mode of this executable does: answers what comes over the socket that is its standard input, until that is closed.
pub(crate) fn worker_main() -> ExitCode {
    crate::exec::close_inherited();
    let socket = match io::stdin().as_fd().try_clone_to_owned() {
        Ok(fd) => UnixStream::from(fd),
        // Without the socket there is nobody to tell; the exit code is all that is left.
        Err(_) => return ExitCode::from(125),
    };
    umask(Mode::from_bits_truncate(0o022));
    let mut state = State::default();
    // The other side closes the socket when it is done.
    while let Ok(ask) = wire::receive::<Ask>(&socket) {
        let answer = state.answer(ask).unwrap_or_else(|failed| {
            Said {
                code: failed.code,
                message: failed.message,
                ..Said::default()
            }
            .into()
        });
        if answer_with(&socket, answer).is_err() {
            return ExitCode::from(1);
        }
    }
    ExitCode::SUCCESS
}

fn answer_with(socket: &UnixStream, mut answer: Answer) -> io::Result<()> {
    answer.said.file = answer.file.is_some();
    answer.said.more_files = u32::try_from(answer.more.len()).map_err(io::Error::other)?;
    wire::send(socket, &answer.said)?;
    for file in answer.file.iter().chain(&answer.more) {
        wire::send_file(socket, file.as_fd())?;
    }
    Ok(())
}

impl State {
    fn answer(&mut self, ask: Ask) -> Result<Answer, Failed> {
        let nothing = || Failed::new(Inner::System, "the agent's own processes did not understand each other");
        let what = ask.what.ok_or_else(nothing)?;
        if let What::Become(name) = &what {
            let user = account::look_up(name)?;
            account::may_become(&user, "move files")?;
            account::take_groups(&user)?;
            account::take_uid(&user)?;
            // A relative path means nothing here.
            nix::unistd::chdir("/").map_err(|e| at_target("the root directory can't be entered", e))?;
            self.account = true;
            return Ok(Answer::default());
        }
        if !self.account {
            return Err(nothing());
        }
        match what {
            What::Become(_) => Err(nothing()),
            What::Expand(ask) => {
                let (source, entries) = source::Source::expand(&ask)?;
                self.source = Some(source);
                Ok(Said {
                    entries,
                    ..Said::default()
                }
                .into())
            }
            What::Open(n) => {
                let source = self.source.as_ref().ok_or_else(nothing)?;
                let (file, found) = source.open(n)?;
                Ok(Answer {
                    said: Said {
                        entries: vec![found],
                        ..Said::default()
                    },
                    file: Some(file),
                    more: vec![],
                })
            }
            What::Enter(ask) => {
                let (target, made) = target::Target::enter(&ask)?;
                let said = Said {
                    free: target.free()?,
                    real: target.real().to_owned(),
                    ..Said::default()
                };
                self.target = Some(target);
                Ok(Answer {
                    said,
                    file: None,
                    more: made,
                })
            }
            What::Same(ask) => {
                let target = self.target.as_ref().ok_or_else(nothing)?;
                Ok(Said {
                    yes: target.same(&ask),
                    ..Said::default()
                }
                .into())
            }
            What::Create(ask) => {
                let target = self.target.as_mut().ok_or_else(nothing)?;
                Ok(Answer {
                    file: Some(target.create(&ask)?),
                    ..Answer::default()
                })
            }
            What::Again(ask) => {
                let target = self.target.as_ref().ok_or_else(nothing)?;
                let (file, only_place) = target.again(&ask)?;
                Ok(Answer {
                    said: Said {
                        yes: only_place,
                        ..Said::default()
                    },
                    file: Some(file),
                    more: vec![],
                })
            }
            What::Fresh(ask) => {
                let target = self.target.as_ref().ok_or_else(nothing)?;
                Ok(Answer {
                    file: target.fresh(&ask.path)?,
                    ..Answer::default()
                })
            }
            What::Put(ask) => {
                let target = self.target.as_mut().ok_or_else(nothing)?;
                Ok(Answer {
                    file: target.put(&ask)?,
                    ..Answer::default()
                })
            }
            What::Discard(ask) => {
                let target = self.target.as_mut().ok_or_else(nothing)?;
                target.discard(&ask.parts)?;
                Ok(Answer::default())
            }
            What::Sweep(ending) => {
                let target = self.target.as_mut().ok_or_else(nothing)?;
                target.sweep(&ending)?;
                Ok(Answer::default())
            }
            What::Sync(_) => {
                let target = self.target.as_ref().ok_or_else(nothing)?;
                target.sync_all()?;
                Ok(Answer::default())
            }
            What::Finish(ask) => {
                let target = self.target.as_mut().ok_or_else(nothing)?;
                target.finish(&ask.dirs)?;
                Ok(Answer::default())
            }
        }
    }
}
