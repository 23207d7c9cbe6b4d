//! Plugins under load: threads that write dynamic frames to the agent's socket, each payload beginning with its time; and the reader of
//! the file where they end.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use super::ID;

/// The meta area that every known sender has.
const AREA: usize = 408;
const HEAD: usize = 48;
/// In front of the time in each payload.
pub(super) const MARK: &[u8; 4] = b"T@T:";

/// Running plugins.
pub(super) struct Plugins {
    written: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Plugins {
    /// Records that the kernel has taken.
    pub(super) fn written(&self) -> u64 {
        self.written.load(Relaxed)
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Relaxed);
    }
}

impl Drop for Plugins {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Microseconds since 1970.
pub(super) fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

/// The time that a payload begins with: as 13 hexadecimal digits behind [`MARK`].
pub(super) fn time_of(payload: &[u8]) -> Option<u64> {
    let digits = payload.strip_prefix(MARK)?.get(..13)?;
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// Starts `connections` threads that write `rate` records a second together (0: all they can).
///
/// # Errors
/// When the agent's socket is not there.
pub(super) fn start(socket: &Path, connections: u32, bytes: u32, rate: u64) -> Result<Plugins> {
    let plugins = Plugins {
        written: Arc::default(),
        stop: Arc::default(),
    };
    for _ in 0..connections {
        let stream = connect(socket)?;
        let (written, stop) = (Arc::clone(&plugins.written), Arc::clone(&plugins.stop));
        let rate = rate.div_ceil(u64::from(connections));
        std::thread::Builder::new()
            .name("plugin".into())
            .spawn(move || {
                if let Err(error) = write(stream, bytes as usize, rate, &written, &stop) {
                    eprintln!("plugin: {error:#}");
                }
            })
            .context("a thread for a plugin")?;
    }
    Ok(plugins)
}

fn connect(socket: &Path) -> Result<UnixStream> {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if begun.elapsed() > Duration::from_secs(10) => {
                return Err(error).with_context(|| format!("no agent at {}", socket.display()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// A frame whose payload is `bytes` long.
fn frame(bytes: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEAD + AREA + bytes);
    let length = (24 + AREA + bytes) as u32;
    for number in [9, ID, 0x6448_9136, length, 0, 0, 0, 0, 0, 0, AREA as u32, 0] {
        frame.extend_from_slice(&number.to_be_bytes());
    }
    frame.resize(HEAD + AREA, 0);
    frame.extend_from_slice(MARK);
    frame.resize(HEAD + AREA + bytes, b'x');
    frame
}

fn write(mut stream: UnixStream, bytes: usize, rate: u64, written: &AtomicU64, stop: &AtomicBool) -> Result<()> {
    // As many frames in one write as a busy plugin's buffers give; one at a time where a rate is kept.
    let one = frame(bytes);
    let together = if rate > 0 { 1 } else { (64 << 10) / one.len() + 1 };
    let mut buffer = one.repeat(together);
    let begun = Instant::now();
    let mut count = 0u64;
    while !stop.load(Relaxed) {
        if let Some(passed) = count.saturating_mul(1_000_000_000).checked_div(rate) {
            let due = begun + Duration::from_nanos(passed);
            let now = Instant::now();
            if due > now {
                std::thread::sleep(due - now);
            }
        }
        let time = format!("{:013x}", now_us());
        for frame in buffer.chunks_mut(one.len()) {
            let from = HEAD + AREA + MARK.len();
            frame[from..from + 13].copy_from_slice(time.as_bytes());
        }
        match stream.write_all(&buffer) {
            Ok(()) => {}
            Err(_) if stop.load(Relaxed) => break,
            Err(error) => bail!("the agent's socket: {error}"),
        }
        count += together as u64;
        written.fetch_add(together as u64, Relaxed);
    }
    Ok(())
}

/// Follows the files of a directory, and notes how old each record is when it is seen there.
pub(super) struct Tail {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Result<Vec<u64>>>,
}

impl Tail {
    pub(super) fn begin(dir: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (dir, stopped) = (dir.to_owned(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || follow(&dir, &stopped));
        Self { stop, thread }
    }

    pub(super) fn end(self) -> Result<Vec<u64>> {
        self.stop.store(true, Relaxed);
        match self.thread.join() {
            Ok(latencies) => latencies,
            Err(_) => bail!("the reader of the sink's file panicked"),
        }
    }
}

/// The newest file below a directory.
fn newest(dir: &Path) -> Option<PathBuf> {
    let mut newest: Option<(SystemTime, PathBuf)> = None;
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).ok()?.flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                open.push(entry.path());
            } else if let Ok(changed) = meta.modified()
                && newest.as_ref().is_none_or(|(time, _)| *time < changed)
            {
                newest = Some((changed, entry.path()));
            }
        }
    }
    newest.map(|(_, path)| path)
}

fn follow(dir: &Path, stop: &AtomicBool) -> Result<Vec<u64>> {
    let path = newest(dir).with_context(|| format!("no file in {}", dir.display()))?;
    let mut file = File::open(&path)?;
    file.seek(SeekFrom::End(0))?;
    let mut latencies = Vec::new();
    let mut rest: Vec<u8> = Vec::new();
    while !stop.load(Relaxed) {
        let mut more = [0; 64 << 10];
        let read = file.read(&mut more)?;
        if read == 0 {
            std::thread::sleep(Duration::from_micros(200));
            continue;
        }
        let now = now_us();
        rest.extend_from_slice(&more[..read]);
        let mut at = 0;
        while let Some(found) = rest[at..].windows(MARK.len()).position(|bytes| bytes == MARK) {
            let Some(time) = time_of(&rest[at + found..]) else {
                break;
            };
            latencies.push(now.saturating_sub(time));
            at += found + MARK.len();
        }
        // What may be the beginning of a mark and its time stays.
        let keep = rest.len().saturating_sub(MARK.len() + 13).max(at);
        rest.drain(..keep);
    }
    Ok(latencies)
}
