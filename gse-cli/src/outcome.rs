//! What a row means, and what exit status a set of them adds up to. Pure; reading rows is left to the callers.

use gse_proto::codes::Inner;
use gse_proto::http::ScriptRow;

use crate::text::one_line;

/// Exit status when everything succeeded.
pub const EXIT_OK: u8 = 0;
/// Exit status when something failed on a target.
pub const EXIT_SOME_FAILED: u8 = 1;
/// Exit status of wrong usage, of a call that was refused, and of servers that do not answer.
pub const EXIT_ERROR: u8 = 2;
/// Exit status when nothing but time-outs went wrong, as timeout(1) has it.
pub const EXIT_TIMEOUT: u8 = 124;
/// Exit status when the user leaves with the second Ctrl-C, as shells have it.
pub const EXIT_INTERRUPTED: u8 = 130;

/// How one script on one target ended, or that it has not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Not over: the row will change.
    Running,
    /// It ended with exit code 0.
    Succeeded,
    /// It ran and ended with another exit code.
    Exited(i32),
    /// It ran out of time, before or after its start.
    TimedOut(String),
    /// It was stopped on request.
    Stopped(String),
    /// It was not run, or nobody knows how it ended.
    Failed {
        /// The row's error code.
        code: i32,
        /// Why, for people.
        message: String,
    },
}

const STATUS_SUCCEEDED: i32 = 2;
const STATUS_TIMED_OUT: i32 = 3;
const STATUS_STOPPED: i32 = 4;
const STATUS_FAILED: i32 = 5;

impl Outcome {
    /// Reads a row.
    #[must_use]
    pub fn of(row: &ScriptRow) -> Self {
        let message = || one_line(&row.error_msg);
        match (row.error_code, row.status) {
            (code, _) if code == Inner::Running.code() => Outcome::Running,
            (0, 0 | 1) => Outcome::Running,
            (0, STATUS_SUCCEEDED) => Outcome::Succeeded,
            (code, STATUS_TIMED_OUT) if code == 0 || code == Inner::Timeout.code() => Outcome::TimedOut(message()),
            (code, _) if code == Inner::Timeout.code() => Outcome::TimedOut(message()),
            (code, _) if code == Inner::Terminated.code() => Outcome::Stopped(message()),
            (0, STATUS_STOPPED) => Outcome::Stopped(message()),
            (0, STATUS_FAILED) if row.script_exit_code != 0 => Outcome::Exited(row.script_exit_code),
            (code, _) => Outcome::Failed {
                code,
                message: message(),
            },
        }
    }

    /// Whether the row will not change any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        *self != Outcome::Running
    }

    /// Whether this is what was wanted.
    #[must_use]
    pub fn is_success(&self) -> bool {
        *self == Outcome::Succeeded
    }

    /// The state in one word, as `--output json` has it.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Outcome::Running => "running",
            Outcome::Succeeded => "succeeded",
            Outcome::Exited(_) => "exited",
            Outcome::TimedOut(_) => "timed_out",
            Outcome::Stopped(_) => "stopped",
            Outcome::Failed { .. } => "failed",
        }
    }

    /// What went wrong, for a list of failures.
    #[must_use]
    pub fn describe(&self) -> String {
        let with = |what: &str, message: &str| {
            if message.is_empty() {
                what.to_owned()
            } else if message.starts_with(what) {
                message.to_owned()
            } else {
                format!("{what}: {message}")
            }
        };
        match self {
            Outcome::Running => "still running".to_owned(),
            Outcome::Succeeded => "succeeded".to_owned(),
            Outcome::Exited(code) => format!("exit code {code}"),
            Outcome::TimedOut(message) => with("timed out", message),
            Outcome::Stopped(message) => with("stopped", message),
            Outcome::Failed { code, message } if message.is_empty() => {
                let text = Inner::ALL
                    .iter()
                    .find(|inner| inner.code() == *code)
                    .map_or("no message", |inner| inner.text());
                format!("error {code}: {text}")
            }
            Outcome::Failed { code, message } => format!("error {code}: {message}"),
        }
    }
}

/// The exit status that outcomes add up to: 0 when all succeeded; with exactly one target that target's own exit code; 124 when
/// only time-outs went wrong; 1 otherwise.
#[must_use]
pub fn exit_status(outcomes: &[Outcome]) -> u8 {
    if let [only] = outcomes {
        return match only {
            Outcome::Succeeded => EXIT_OK,
            Outcome::TimedOut(_) => EXIT_TIMEOUT,
            Outcome::Exited(code) => shell_code(*code),
            _ => EXIT_SOME_FAILED,
        };
    }
    let mut bad = outcomes.iter().filter(|outcome| !outcome.is_success()).peekable();
    if bad.peek().is_none() {
        EXIT_OK
    } else if bad.all(|outcome| matches!(outcome, Outcome::TimedOut(_))) {
        EXIT_TIMEOUT
    } else {
        EXIT_SOME_FAILED
    }
}

/// An exit code as this process can hand it on; one that does not fit must not turn into success.
fn shell_code(code: i32) -> u8 {
    u8::try_from(code)
        .ok()
        .filter(|code| *code != 0)
        .unwrap_or(EXIT_SOME_FAILED)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(error_code: i32, status: i32, script_exit_code: i32) -> ScriptRow {
        ScriptRow {
            error_code,
            status,
            script_exit_code,
            error_msg: "why".into(),
            ..Default::default()
        }
    }

    #[test]
    fn rows_mean_what_the_contract_says() {
        // contract: v2-http-task#13, v2-http-task#14, v2-http-task#15, v2-http-task#16, v2-http-task#17, v2-http-task#19
        for (row, word) in [
            (row(115, 0, 0), "running"),
            (row(115, 1, 0), "running"),
            (row(0, 1, 0), "running"),
            (row(0, 2, 0), "succeeded"),
            (row(0, 5, 7), "exited"),
            (row(0, 5, 0), "failed"),
            (row(0, 3, 124), "timed_out"),
            (row(120, 3, 124), "timed_out"),
            (row(120, 5, 1), "timed_out"),
            (row(126, 4, 143), "stopped"),
            (row(0, 4, 143), "stopped"),
            (row(117, 5, 1), "failed"),
            (row(-1, 6, 1), "failed"),
            (row(0, 6, 1), "failed"),
        ] {
            assert_eq!(Outcome::of(&row).word(), word, "{row:?}");
        }
        assert_eq!(Outcome::of(&row(117, 5, 1)).describe(), "error 117: why");
        let silent = ScriptRow {
            error_code: 117,
            status: 5,
            ..Default::default()
        };
        assert_eq!(Outcome::of(&silent).describe(), "error 117: agent offline or unknown");
    }

    #[test]
    fn exit_status_of_one_and_of_many() {
        let ok = || Outcome::Succeeded;
        let late = || Outcome::TimedOut(String::new());
        let lost = || Outcome::Failed {
            code: 117,
            message: String::new(),
        };
        assert_eq!(exit_status(&[ok()]), 0);
        assert_eq!(exit_status(&[Outcome::Exited(7)]), 7);
        assert_eq!(exit_status(&[Outcome::Exited(255)]), 255);
        for odd in [256, 512, -1, 0, i32::MAX] {
            assert_eq!(exit_status(&[Outcome::Exited(odd)]), 1, "{odd}");
        }
        assert_eq!(exit_status(&[late()]), 124);
        assert_eq!(exit_status(&[lost()]), 1);
        assert_eq!(exit_status(&[Outcome::Stopped(String::new())]), 1);
        assert_eq!(exit_status(&[Outcome::Running]), 1);
        assert_eq!(exit_status(&[ok(), ok()]), 0);
        assert_eq!(exit_status(&[ok(), Outcome::Exited(7)]), 1);
        assert_eq!(exit_status(&[ok(), late(), late()]), 124);
        assert_eq!(exit_status(&[late(), lost()]), 1);
        assert_eq!(exit_status(&[ok(), Outcome::Running]), 1);
    }
}
