//! What the agent and a file worker say to each other: length-prefixed messages over a socket pair, and open files beside them.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use prost::{Message, Oneof};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

/// No message is longer.
const MAX_MESSAGE: usize = 256 << 20;
/// Stands for the file that is sent with it.
const FILE_MARK: u8 = b'F';

/// A question to a worker.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Ask {
    #[prost(oneof = "What", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13")]
    pub(crate) what: Option<What>,
}

/// What is asked.
#[derive(Clone, PartialEq, Oneof)]
pub(crate) enum What {
    /// First of all: become this account.
    #[prost(string, tag = "1")]
    Become(String),
    /// Find the files of a source.
    #[prost(message, tag = "2")]
    Expand(Expand),
    /// Open one of them, by its place in the answer to Expand.
    #[prost(uint32, tag = "3")]
    Open(u32),
    /// Open the target directory.
    #[prost(message, tag = "4")]
    Enter(Enter),
    /// Make a part file in it, or open it again.
    #[prost(message, tag = "5")]
    Create(Create),
    /// Put something at its place.
    #[prost(message, tag = "6")]
    Put(Put),
    /// Remove what is unfinished.
    #[prost(message, tag = "7")]
    Discard(Discard),
    /// Everything is at its place: sync the directories, remove the stage.
    #[prost(message, tag = "8")]
    Finish(Finish),
    /// Whether the target directory is the one of a source, and what is there under a name.
    #[prost(message, tag = "9")]
    Same(Same),
    /// Everything that was written to the target's file system is to be on the disk.
    #[prost(bool, tag = "10")]
    Sync(bool),
    /// Remove whatever is in the target directory under a name that ends like this: what an earlier life has left unfinished.
    #[prost(bytes, tag = "11")]
    Sweep(Vec<u8>),
    /// Open a part file once more, or what it has become at its place.
    #[prost(message, tag = "12")]
    Again(Again),
    /// Open a directory that was made here, at this path; nothing comes of one that was there before.
    #[prost(message, tag = "13")]
    Fresh(Put),
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Expand {
    #[prost(string, tag = "1")]
    pub(crate) dir: String,
    #[prost(string, tag = "2")]
    pub(crate) name: String,
    #[prost(uint64, tag = "3")]
    pub(crate) max_entries: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) max_bytes: u64,
    /// Directories in or below which may be read; empty: everywhere.
    #[prost(string, repeated, tag = "5")]
    pub(crate) roots: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Enter {
    #[prost(string, tag = "1")]
    pub(crate) dir: String,
    #[prost(bool, tag = "2")]
    pub(crate) make_dirs: bool,
    #[prost(string, repeated, tag = "3")]
    pub(crate) roots: Vec<String>,
    /// Name of the directory that part files of a whole tree are kept in; empty: none.
    #[prost(bytes = "vec", tag = "4")]
    pub(crate) stage: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Create {
    /// In the stage if there is one, else in the target directory.
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) part: Vec<u8>,
    /// What an earlier run has left is taken up, if it is a plain file of the account with one name.
    #[prost(bool, tag = "2")]
    pub(crate) again: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Again {
    /// The part file; empty: it is at its place for sure.
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) part: Vec<u8>,
    /// Its place, below the target directory.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub(crate) path: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Put {
    /// As [`gse_proto::file::EntryKind`].
    #[prost(int32, tag = "1")]
    pub(crate) kind: i32,
    /// Below the target directory.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub(crate) path: Vec<Vec<u8>>,
    /// The part file.
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) part: Vec<u8>,
    #[prost(uint32, tag = "4")]
    pub(crate) mode: u32,
    #[prost(bytes = "vec", tag = "5")]
    pub(crate) link: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Discard {
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub(crate) parts: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Finish {
    /// Directories with the modes that they get now that everything is in them.
    #[prost(message, repeated, tag = "1")]
    pub(crate) dirs: Vec<Put>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Same {
    /// Directory and name of the source, as asked for.
    #[prost(string, tag = "1")]
    pub(crate) dir: String,
    /// First parts of the paths that would be written.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub(crate) tops: Vec<Vec<u8>>,
    /// The source is the directory itself.
    #[prost(bool, tag = "3")]
    pub(crate) whole: bool,
}

/// A worker's answer.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Said {
    /// Inner code of a row; 0 when it was done.
    #[prost(int32, tag = "1")]
    pub(crate) code: i32,
    #[prost(string, tag = "2")]
    pub(crate) message: String,
    #[prost(message, repeated, tag = "3")]
    pub(crate) entries: Vec<Found>,
    /// Bytes free on the target's file system.
    #[prost(uint64, tag = "4")]
    pub(crate) free: u64,
    /// Where the directory really is.
    #[prost(string, tag = "5")]
    pub(crate) real: String,
    /// Of an open file: it says which one it is, and the account may do no more with it.
    #[prost(bool, tag = "6")]
    pub(crate) yes: bool,
    /// An open file follows.
    #[prost(bool, tag = "7")]
    pub(crate) file: bool,
    /// Directories that were made on the way, opened; so many follow.
    #[prost(uint32, tag = "8")]
    pub(crate) more_files: u32,
}

/// Something found at a source.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Found {
    #[prost(int32, tag = "1")]
    pub(crate) kind: i32,
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub(crate) path: Vec<Vec<u8>>,
    #[prost(uint64, tag = "3")]
    pub(crate) size: u64,
    #[prost(uint32, tag = "4")]
    pub(crate) mode: u32,
    #[prost(int64, tag = "5")]
    pub(crate) mtime_ns: i64,
    #[prost(bytes = "vec", tag = "6")]
    pub(crate) link: Vec<u8>,
    #[prost(uint64, tag = "7")]
    pub(crate) inode: u64,
}

/// Sends one message.
///
/// # Errors
/// When the other side is gone.
pub(crate) fn send(mut socket: &UnixStream, message: &impl Message) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(message.encoded_len() + 4);
    let len = u32::try_from(message.encoded_len()).map_err(io::Error::other)?;
    bytes.extend_from_slice(&len.to_be_bytes());
    message.encode_raw(&mut bytes);
    socket.write_all(&bytes)
}

/// Receives one message.
///
/// # Errors
/// When the other side is gone, or does not speak this language.
pub(crate) fn receive<M: Message + Default>(mut socket: &UnixStream) -> io::Result<M> {
    let mut len = [0; 4];
    socket.read_exact(&mut len)?;
    let len = u32::from_be_bytes(len) as usize;
    if len > MAX_MESSAGE {
        return Err(io::Error::other(format!("a message of {len} bytes")));
    }
    let mut bytes = vec![0; len];
    socket.read_exact(&mut bytes)?;
    M::decode(&bytes[..]).map_err(io::Error::other)
}

/// Hands an open file over.
///
/// # Errors
/// When the other side is gone.
pub(crate) fn send_file(socket: &UnixStream, file: BorrowedFd<'_>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file];
    if !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(io::Error::other("no room for a file"));
    }
    sendmsg(
        socket.as_fd(),
        &[IoSlice::new(&[FILE_MARK])],
        &mut control,
        SendFlags::empty(),
    )?;
    Ok(())
}

/// Takes an open file.
///
/// # Errors
/// When the other side is gone, or sends something else.
pub(crate) fn receive_file(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut mark = [0];
    let got = recvmsg(
        socket.as_fd(),
        &mut [IoSliceMut::new(&mut mark)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    if got.bytes != 1 || mark != [FILE_MARK] {
        return Err(io::Error::other("no file came where one was to come"));
    }
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut files) = message
            && let Some(file) = files.next()
        {
            return Ok(file);
        }
    }
    Err(io::Error::other("no file came where one was to come"))
}
