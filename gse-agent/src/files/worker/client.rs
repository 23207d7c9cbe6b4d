//! The agent's end of a file worker. Everything in here blocks and belongs on a blocking thread.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use gse_proto::codes::Inner;
use parking_lot::Mutex;

use super::wire::{self, Ask, Said, What};
use super::{Failed, Found};

/// How long a worker may take for one answer: a directory on a slow network file system may take its time.
const PATIENCE: Duration = Duration::from_secs(300);

/// A running worker of one account; it is ended when this is dropped. It answers one question at a time, whoever asks.
#[derive(Debug)]
pub(crate) struct Worker {
    child: Child,
    /// `None` once an answer did not come whole: what follows could be taken for the answer to something else.
    socket: Mutex<Option<UnixStream>>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended by itself.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn broken(error: impl std::fmt::Display) -> Failed {
    Failed::new(
        Inner::System,
        format!("the agent's own processes could not talk to each other: {error}"),
    )
}

fn exchange(socket: &UnixStream, what: What) -> std::io::Result<(Said, Vec<OwnedFd>)> {
    wire::send(socket, &Ask { what: Some(what) })?;
    let said: Said = wire::receive(socket)?;
    let mut files = Vec::new();
    for _ in 0..u32::from(said.file) + said.more_files {
        files.push(wire::receive_file(socket)?);
    }
    Ok((said, files))
}

impl Worker {
    /// Starts a worker and has it become `user`.
    ///
    /// # Errors
    /// When there is no such account, or the agent may not become it.
    pub(crate) fn start(self_exec: &[OsString], user: &str) -> Result<Self, Failed> {
        let (near, far) = UnixStream::pair().map_err(broken)?;
        near.set_read_timeout(Some(PATIENCE)).map_err(broken)?;
        near.set_write_timeout(Some(PATIENCE)).map_err(broken)?;
        let (program, args) = self_exec
            .split_first()
            .ok_or_else(|| broken("the agent does not know its own program"))?;
        let child = Command::new(program)
            .args(args)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(far)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(broken)?;
        let worker = Self {
            child,
            socket: Mutex::new(Some(near)),
        };
        worker.ask(What::Become(user.to_owned()))?;
        Ok(worker)
    }

    fn answer(&self, what: What) -> Result<(Said, Vec<OwnedFd>), Failed> {
        let mut socket = self.socket.lock();
        let there = socket
            .as_ref()
            .ok_or_else(|| broken("an earlier answer did not come"))?;
        let (said, files) = exchange(there, what).inspect_err(|_| *socket = None).map_err(broken)?;
        drop(socket);
        if said.code != 0 {
            return Err(Failed {
                code: said.code,
                message: said.message,
            });
        }
        Ok((said, files))
    }

    /// Asks for something that no single file comes of.
    ///
    /// # Errors
    /// What could not be done.
    pub(crate) fn ask(&self, what: What) -> Result<(Said, Vec<File>), Failed> {
        let (said, files) = self.answer(what)?;
        Ok((said, files.into_iter().map(File::from).collect()))
    }

    /// Asks for something that a file comes of.
    ///
    /// # Errors
    /// What could not be done.
    pub(crate) fn file(&self, what: What) -> Result<(File, Option<Found>), Failed> {
        let (file, mut said) = self.file_and(what)?;
        Ok((file, said.entries.pop()))
    }

    /// As [`Worker::file`], with all that was said.
    ///
    /// # Errors
    /// What could not be done.
    pub(crate) fn file_and(&self, what: What) -> Result<(File, Said), Failed> {
        let (said, files) = self.answer(what)?;
        let file = files.into_iter().next().ok_or_else(|| broken("no file came"))?;
        Ok((File::from(file), said))
    }
}
