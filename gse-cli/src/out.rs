//! Printing that does not panic when nobody reads any more.

use std::io::{self, IsTerminal, Write};

use crate::text::Escape;

/// Writes to standard output at once.
///
/// # Errors
/// The output cannot be written, such as when the reader of a pipe has gone.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes a value as one JSON document to standard output.
///
/// # Errors
/// As [`print()`].
pub fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    Ok(print(&(text + "\n"))?)
}

/// Writes a line to standard error. When that is gone there is nobody left to tell.
pub fn note(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// How text from elsewhere is to be escaped on standard output.
#[must_use]
pub fn stdout_escape(colour: bool) -> Escape {
    escape_for(io::stdout().is_terminal(), colour)
}

/// How text from elsewhere is to be escaped on standard error.
#[must_use]
pub fn stderr_escape(colour: bool) -> Escape {
    escape_for(io::stderr().is_terminal(), colour)
}

fn escape_for(terminal: bool, colour: bool) -> Escape {
    match (terminal, colour) {
        (false, _) => Escape::Nothing,
        (true, false) => Escape::All,
        (true, true) => Escape::AllButColour,
    }
}

/// Whether `error` only says that the reader of our output has gone.
#[must_use]
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
