//! How data is moved to another store while clients go on.

use gse_core::config::Problems;
use serde::{Deserialize, Serialize};

/// `DBA MIGRATE`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Migrate {
    /// Bytes copied in a second at most; 0 is no bound.
    pub bytes_per_s: u64,
    /// Keys copied in a second at most; 0 is no bound.
    pub keys_per_s: u64,
    /// Milliseconds for which commands are held back at most while the last keys are copied. When that is not enough, they go on and it is tried again.
    pub hold_ms: u64,
    /// Milliseconds for which either store may be out of reach before the move is given up.
    pub patience_ms: u64,
}

impl Default for Migrate {
    fn default() -> Self {
        Self {
            bytes_per_s: 0,
            keys_per_s: 0,
            hold_ms: 2000,
            patience_ms: 30_000,
        }
    }
}

impl Migrate {
    pub(super) fn validate(&self, problems: &mut Problems) {
        problems.check_range("migrate.hold_ms", self.hold_ms, 10, 600_000);
        problems.check_range("migrate.patience_ms", self.patience_ms, 100, 86_400_000);
    }
}
