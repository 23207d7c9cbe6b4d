//! What happened in a run, in order, with the simulated time; and a hash of it, by which two runs are told apart.

use std::fmt::Write as _;
use std::sync::Arc;

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

/// The log. Cheap to clone; every clone is the same.
#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<(u64, String)>>>);

impl Log {
    /// Adds a line.
    pub(crate) fn add(&self, at_ms: u64, text: impl Into<String>) {
        let text = text.into();
        if std::env::var_os("SIM_LOG").is_some() {
            eprintln!("{:>10.3} {text}", at_ms as f64 / 1000.0);
        }
        self.0.lock().push((at_ms, text));
    }

    /// All lines.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.0.lock().iter().map(|(at, text)| format!("{at} {text}")).collect()
    }

    /// SHA-256 of all lines.
    pub(crate) fn hash(&self) -> String {
        let mut text = String::new();
        for line in self.lines() {
            // Writing to a text never fails.
            let _ = writeln!(text, "{line}");
        }
        hex::encode(Sha256::digest(text))
    }
}
