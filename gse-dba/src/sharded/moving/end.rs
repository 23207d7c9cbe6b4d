//! A group as the copy sees it: a private connection, on which everything is sealed like a client's writes. Nothing is sent without a lease on the group.

use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::Mutex;

use crate::copy::{self, End, Reply, Trouble, Words};
use crate::sharded::{Fate, Group, Pinned};

pub(super) struct GroupEnd {
    group: Arc<Group>,
    conn: Mutex<Option<Pinned>>,
}

impl GroupEnd {
    pub(super) fn new(group: &Arc<Group>) -> Arc<Self> {
        Arc::new(Self {
            group: Arc::clone(group),
            conn: Mutex::new(None),
        })
    }

    async fn pass(&self, commands: &[Words]) -> Result<Vec<Reply>, Trouble> {
        if commands.is_empty() {
            return Ok(Vec::new());
        }
        if let Some(why) = self.group.seat.short() {
            return Err(Trouble::Later(why));
        }
        let mut conn = self.conn.lock().await;
        let mut pinned = match conn.take() {
            Some(p) => p,
            None => self.group.private(false).await.map_err(Trouble::Later)?,
        };
        let bytes = copy::encode(commands);
        let answer = self
            .group
            .exchange(&mut pinned, &bytes, commands.len(), true, false)
            .await;
        match answer.fate {
            Fate::Sealed => {
                *conn = Some(pinned);
                copy::answered(&answer.replies.freeze(), commands.len())
            }
            Fate::TooLarge => Err(Trouble::Unfit(format!(
                "group '{}': a part of a value is larger than limits.output_buffer_bytes",
                self.group.seat.name
            ))),
            fate => Err(Trouble::Later(format!("group '{}': {fate:?}", self.group.seat.name))),
        }
    }
}

impl End for GroupEnd {
    fn name(&self) -> String {
        format!("group '{}'", self.group.seat.name)
    }

    fn call<'a>(&'a self, commands: &'a [Words]) -> BoxFuture<'a, Result<Vec<Reply>, Trouble>> {
        self.pass(commands).boxed()
    }
}
