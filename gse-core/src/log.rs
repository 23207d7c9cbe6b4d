//! Where the process's log lines go: text or JSON, to standard error or to a file that is opened again on reload, with a level or
//! `tracing` filter directives.
//!
//! It sets up the one subscriber of the process. `gse up` and tests start many servers in one process, so a second [`init`] is
//! ignored. What is logged is the business of the code that logs it. Lines are written where they are logged, without a queue in
//! between: a line that explains a crash must not be the one that is lost in it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::Context;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// The `[log]` part of every configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// A level (`error`, `warn`, `info`, `debug`, `trace`, `off`) or filter directives such as `info,gse_task=debug`.
    pub level: String,
    /// How a line looks.
    pub format: LogFormat,
    /// The file to append to, opened again on SIGHUP; standard error when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Text,
            file: None,
        }
    }
}

/// The file that [`reopen`] opens again; unset when the log goes to standard error.
static LOG_FILE: OnceLock<ReopenFile> = OnceLock::new();

/// Parses a level or filter directives; the error says which directive is wrong.
pub fn parse_level(level: &str) -> Result<EnvFilter, String> {
    if level.trim().is_empty() {
        return Err("is empty; use a level such as \"info\"".to_owned());
    }
    // A lone word is also the name of a module to a filter, so that a mistyped level would silently log nothing.
    let lone_word = level.split(',').map(str::trim).find(|part| {
        !part.contains(['=', '[', ':'])
            && !["error", "warn", "info", "debug", "trace", "off"].contains(&part.to_ascii_lowercase().as_str())
    });
    if let Some(word) = lone_word {
        return Err(format!(
            "holds \"{word}\", which is neither a level (error, warn, info, debug, trace, off) nor target=level"
        ));
    }
    EnvFilter::builder()
        .parse(level)
        .map_err(|error| format!("\"{level}\" is not a log level or filter: {error}"))
}

/// Sets up logging for the process, and makes panics log lines. Ignored, and fine, when it was set up before.
///
/// # Errors
/// The file cannot be opened for appending, or the level does not parse.
pub fn init(cfg: &LogConfig) -> anyhow::Result<()> {
    let filter = parse_level(&cfg.level).map_err(|error| anyhow::anyhow!("log.level {error}"))?;
    if tracing::dispatcher::has_been_set() {
        return Ok(());
    }
    let set = match &cfg.file {
        None => install(filter, cfg.format, io::stderr),
        Some(path) => {
            let file = ReopenFile::open(path)?;
            let installed = install(filter, cfg.format, file.clone());
            if installed {
                LOG_FILE.get_or_init(|| file);
            }
            installed
        }
    };
    if set {
        log_panics();
    }
    Ok(())
}

/// Opens the log file again under its name, so that a rotated one is let go. Does nothing when the log goes to standard error.
///
/// # Errors
/// The file cannot be opened; the log then goes on into the old one.
pub fn reopen() -> anyhow::Result<()> {
    LOG_FILE.get().map_or(Ok(()), ReopenFile::reopen)
}

fn install<W>(filter: EnvFilter, format: LogFormat, writer: W) -> bool
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(false)
        // The library would report a failed write on standard error, and panic when that is what failed.
        .log_internal_errors(false);
    // try_init fails only when another subscriber is there already, which is the case that is to be ignored.
    match format {
        LogFormat::Text => builder.try_init().is_ok(),
        LogFormat::Json => builder.json().flatten_event(true).try_init().is_ok(),
    }
}

fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let location = info
            .location()
            .map_or_else(|| "unknown place".to_owned(), ToString::to_string);
        let text = crate::lifecycle::panic_text(info.payload());
        let thread = std::thread::current();
        tracing::error!(
            thread = thread.name().unwrap_or("unnamed"),
            "panic at {location}: {text}"
        );
    }));
}

/// A file opened in append mode that can be opened again under the same name.
#[derive(Clone)]
struct ReopenFile {
    path: PathBuf,
    file: Arc<Mutex<File>>,
}

impl ReopenFile {
    fn open(path: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            file: Arc::new(Mutex::new(open_append(path)?)),
        })
    }

    fn reopen(&self) -> anyhow::Result<()> {
        let fresh = open_append(&self.path)?;
        *self.file.lock() = fresh;
        Ok(())
    }
}

fn open_append(path: &Path) -> anyhow::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("cannot open the log file {} (log.file) for appending", path.display()))
}

/// Writes one line under the lock, so that lines of several threads do not mix.
struct Line<'a>(&'a ReopenFile);

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.file.lock().write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.file.lock().flush()
    }
}

impl<'a> MakeWriter<'a> for ReopenFile {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        Line(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_or_directives_parse_and_nonsense_does_not() {
        assert!(parse_level("info").is_ok());
        assert!(parse_level("warn,gse_task=debug").is_ok());
        assert!(parse_level("gse_task=loud").unwrap_err().contains("loud"));
        assert!(parse_level("inof").unwrap_err().contains("inof"));
        assert!(parse_level(" ").unwrap_err().contains("empty"));
    }

    #[test]
    fn a_rotated_file_is_let_go_on_reopen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gse.log");
        let file = ReopenFile::open(&path).unwrap();
        file.make_writer().write_all(b"one\n").unwrap();
        std::fs::rename(&path, dir.path().join("gse.log.1")).unwrap();
        file.make_writer().write_all(b"two\n").unwrap();
        file.reopen().unwrap();
        file.make_writer().write_all(b"three\n").unwrap();
        assert_eq!(
            std::fs::read_to_string(dir.path().join("gse.log.1")).unwrap(),
            "one\ntwo\n"
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "three\n");
    }

    #[test]
    fn a_log_file_that_cannot_be_opened_is_named() {
        let error = ReopenFile::open(Path::new("/nonexistent/dir/x.log")).err().unwrap();
        assert!(format!("{error:#}").contains("/nonexistent/dir/x.log"));
    }
}
