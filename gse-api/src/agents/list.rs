//! All agents, page by page, in the order of shard and id: an agent that is there throughout is shown exactly once, however many come
//! and go between the pages.

use std::collections::HashSet;

use gse_core::store::{Batch, StoreError, as_array, as_int, as_string};
use gse_proto::keys::{AGENT_SHARDS, agent_info};
use redis::Value;

use super::{Agents, Known};

/// Where a page starts: behind this id of this shard.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cursor {
    shard: u16,
    after: String,
}

impl Cursor {
    /// Reads what [`Cursor::text`] wrote; empty is the beginning. None if it is anything else.
    pub fn parse(text: &str) -> Option<Self> {
        if text.is_empty() {
            return Some(Self::default());
        }
        let (shard, after) = text.split_once(';')?;
        let shard = shard.parse().ok().filter(|shard| *shard < AGENT_SHARDS)?;
        Some(Self {
            shard,
            after: after.to_owned(),
        })
    }

    /// As text for the caller.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{};{}", self.shard, self.after)
    }
}

impl Agents {
    /// At most `limit` agents from `start` on, and where the next page starts; none after the last.
    ///
    /// # Errors
    /// The store does not answer, or not in time.
    pub async fn page(&self, start: &Cursor, limit: usize) -> Result<(Vec<Known>, Option<Cursor>), StoreError> {
        self.within(async {
            let (ids, next) = self.ids(start, limit).await?;
            let asked: HashSet<&str> = ids.iter().map(String::as_str).collect();
            let (mut found, _) = self.fetch(&asked, &[], true).await?;
            let page = ids.iter().filter_map(|id| found.remove(id.as_str())).collect();
            Ok((page, next))
        })
        .await
    }

    async fn ids(&self, start: &Cursor, limit: usize) -> Result<(Vec<String>, Option<Cursor>), StoreError> {
        // First how many there are, so that only the shards of this page are read.
        let mut batch = Batch::new();
        for shard in start.shard..AGENT_SHARDS {
            push(&mut batch, "HLEN", shard);
        }
        let mut wanted = Vec::new();
        let mut expected = 0;
        for (shard, size) in (start.shard..AGENT_SHARDS).zip(self.store.run(batch).await?) {
            let size = usize::try_from(as_int(size)?).unwrap_or(0);
            if size > 0 {
                wanted.push(shard);
                // The first shard may have been shown already, so it does not count.
                expected += if shard == start.shard { 0 } else { size };
            }
            if expected > limit {
                break;
            }
        }
        let mut batch = Batch::new();
        for shard in &wanted {
            push(&mut batch, "HKEYS", *shard);
        }
        let mut ids: Vec<String> = Vec::new();
        for (shard, reply) in wanted.iter().zip(self.store.run(batch).await?) {
            let mut of_shard = as_array(reply)?
                .into_iter()
                .filter_map(|id: Value| as_string(id).transpose())
                .collect::<Result<Vec<String>, StoreError>>()?;
            if *shard == start.shard {
                of_shard.retain(|id| *id > start.after);
            }
            of_shard.sort_unstable();
            for id in of_shard {
                if ids.len() == limit {
                    let after = ids.last().cloned().unwrap_or_default();
                    return Ok((ids, Some(place(*shard, after))));
                }
                ids.push(id);
            }
        }
        let last = wanted.last().copied().unwrap_or(AGENT_SHARDS);
        let more = expected > limit && last + 1 < AGENT_SHARDS;
        Ok((
            ids,
            more.then(|| Cursor {
                shard: last + 1,
                after: String::new(),
            }),
        ))
    }
}

/// The cursor behind `after`, met while `shard` was being read: if `after` is of an earlier shard, all of `shard` is still to come.
fn place(shard: u16, after: String) -> Cursor {
    if gse_proto::keys::agent_shard(&after) == shard {
        Cursor { shard, after }
    } else {
        Cursor {
            shard,
            after: String::new(),
        }
    }
}

fn push(batch: &mut Batch, command: &str, shard: u16) {
    let key = agent_info(shard);
    let mut cmd = redis::cmd(command);
    cmd.arg(&key);
    batch.push(key, cmd);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_are_read_back_and_nonsense_is_not() {
        for cursor in [
            place(3, "x".into()),
            Cursor {
                shard: 63,
                after: "0:10.0.0.1;y".into(),
            },
        ] {
            assert_eq!(Cursor::parse(&cursor.text()), Some(cursor));
        }
        assert_eq!(Cursor::parse(""), Some(Cursor::default()));
        for bad in ["x", "64;a", "-1;a", ";", "99999999;"] {
            assert_eq!(Cursor::parse(bad), None, "{bad}");
        }
    }
}
