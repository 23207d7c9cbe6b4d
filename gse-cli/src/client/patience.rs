//! How long a command that follows a task puts up with servers that do not answer.

use std::time::Duration;

use tokio::time::Instant;

use super::Api;
use crate::text::one_line;

/// How long servers may not answer before a command gives up on them.
const LIMIT: Duration = Duration::from_secs(60);

/// Since when polls have failed.
#[derive(Debug, Default)]
pub struct Patience {
    since: Option<Instant>,
}

impl Patience {
    /// A poll was answered.
    pub fn answered(&mut self) {
        self.since = None;
    }

    /// A poll has failed; gives a line for the user the first time.
    ///
    /// # Errors
    /// The error itself, if it will not pass or polls have failed for a minute; `leaving` says what that means then.
    pub fn endure(&mut self, error: anyhow::Error, leaving: &str) -> anyhow::Result<Option<String>> {
        if !Api::may_pass(&error) {
            return Err(error);
        }
        match self.since {
            None => {
                self.since = Some(Instant::now());
                Ok(Some(format!("gse: {}; asking again", one_line(&format!("{error:#}")))))
            }
            Some(since) if since.elapsed() > LIMIT => Err(error.context(leaving.to_owned())),
            Some(_) => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::CallError;

    fn unreachable() -> anyhow::Error {
        anyhow::Error::from(CallError::Unreachable { message: "gone".into() })
    }

    #[tokio::test(start_paused = true)]
    async fn it_ends_after_a_minute_without_any_answer_and_says_so_once() {
        let mut patience = Patience::default();
        let line = patience.endure(unreachable(), "left").unwrap();
        assert_eq!(line.as_deref(), Some("gse: gone; asking again"));
        tokio::time::advance(LIMIT).await;
        assert_eq!(patience.endure(unreachable(), "left").unwrap(), None);
        patience.answered();
        tokio::time::advance(LIMIT).await;
        assert!(patience.endure(unreachable(), "left").unwrap().is_some());
        tokio::time::advance(LIMIT * 2).await;
        let error = format!("{:#}", patience.endure(unreachable(), "left").unwrap_err());
        assert_eq!(error, "left: gone");
        let refused = CallError::Refused {
            code: 1_000_106,
            message: "no".into(),
        };
        assert!(Patience::default().endure(refused.into(), "left").is_err());
    }
}
