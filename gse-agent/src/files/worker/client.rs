//! The agent's end of a file worker. Everything in here blocks and belongs on a blocking thread.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use gse_proto::codes::Inner;

use super::wire::{self, Ask, Said, What};
use super::{Failed, Found};

/// How long a worker may take for one answer: a directory on a slow network file system may take its time.
const PATIENCE: Duration = Duration::from_secs(300);

/// A running worker of one account; it is ended when this is dropped.
#[derive(Debug)]
pub(crate) struct Worker {
    child: Child,
    socket: UnixStream,
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
        let worker = Self { child, socket: near };
        worker.ask(What::Become(user.to_owned()))?;
        Ok(worker)
    }

    fn answer(&self, what: What) -> Result<(Said, Vec<OwnedFd>), Failed> {
        wire::send(&self.socket, &Ask { what: Some(what) }).map_err(broken)?;
        let said: Said = wire::receive(&self.socket).map_err(broken)?;
        let mut files = Vec::new();
        for _ in 0..u32::from(said.file) + said.more_files {
            files.push(wire::receive_file(&self.socket).map_err(broken)?);
        }
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
        let (mut said, files) = self.answer(what)?;
        let file = files.into_iter().next().ok_or_else(|| broken("no file came"))?;
        Ok((File::from(file), said.entries.pop()))
    }
}
