//! What `-t` means, for all commands that take it.

use anyhow::bail;
use gse_proto::ids::AgentId;

use crate::client::Api;
use crate::text::one_line;
use crate::{agents, ids};

/// The targets that the user named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Targets {
    /// Everything: `-t all`, or no `-t` at all.
    pub all: bool,
    /// Ids that were named, in the order of the command line.
    pub ids: Vec<String>,
}

impl Targets {
    /// Reads the values of `-t`.
    ///
    /// # Errors
    /// One of them is no id. An empty one never is "all": it is what a shell variable that is not set leaves.
    pub fn parse(asked: &[String]) -> anyhow::Result<Self> {
        let mut targets = Self {
            all: asked.is_empty(),
            ids: Vec::new(),
        };
        for id in asked {
            if id.trim().is_empty() {
                bail!("-t holds an empty target; say \"-t all\" if all of them are meant");
            }
            if id == "all" {
                targets.all = true;
            } else if let Err(error) = AgentId::parse(id) {
                bail!("\"{}\" is no target: {error}", one_line(id));
            } else {
                targets.ids.push(id.clone());
            }
        }
        Ok(targets)
    }

    /// The ids that are meant, sorted: those named, and every connected agent where all are meant.
    ///
    /// # Errors
    /// The servers can't be asked, or all are meant and there is none.
    pub async fn resolve(self, api: &Api) -> anyhow::Result<Vec<String>> {
        let Self { all, ids: mut found } = self;
        if all {
            let connected = agents::all(api, true).await?.into_iter();
            found.extend(connected.map(|agent| agent.info.bk_agent_id));
            if found.is_empty() {
                bail!("no agent is connected; gse agents lists those that are known");
            }
        }
        found.sort_by(|a, b| ids::natural(a, b));
        found.dedup();
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(asked: &[&str]) -> anyhow::Result<Targets> {
        Targets::parse(&asked.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn all_are_meant_only_when_that_is_said_or_nothing_is() {
        for asked in [&[][..], &["all"], &["0:10.0.0.1", "all"]] {
            assert!(parse(asked).unwrap().all, "{asked:?}");
        }
        let some = parse(&["0:10.0.0.1", "0:10.0.0.2"]).unwrap();
        assert_eq!(
            (some.all, some.ids),
            (false, vec!["0:10.0.0.1".into(), "0:10.0.0.2".into()])
        );
        for asked in [&[""][..], &["", ""], &[" "], &["0:10.0.0.1", ""], &["all", ""]] {
            let error = parse(asked).err().unwrap().to_string();
            assert!(error.contains("empty target"), "{asked:?}: {error}");
        }
    }
}
