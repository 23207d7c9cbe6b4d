//! Ends: a store as an ordinary client of it sees it, and what others need to make ends of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::oneshot;

use super::reply::{self, Reply};
use super::{End, Trouble, Words};
use crate::behind::Behind;
use crate::client::Client;
use crate::commands::{self, Run};
use crate::engine::{Batch, Job, Message, Op};
use crate::resp::parse::{Limits, Parser, Requests};
use crate::resp::write::Writer;
use crate::server::Store;
use crate::single::session::push_command;

/// Our own commands are as large as what they carry.
const LIMITS: Limits = Limits {
    max_args: 1 << 20,
    max_bulk: 512 << 20,
    max_query: 1 << 30,
};

/// Commands in their wire form.
pub(crate) fn encode(commands: &[Words]) -> Bytes {
    let mut out = Vec::with_capacity(commands.iter().flatten().map(|w| w.len() + 16).sum());
    for c in commands {
        push_command(&mut out, c.iter().map(AsRef::as_ref));
    }
    out.into()
}

/// Errors that say "not now", whatever the command was.
static LATER: &[&str] = &[
    "UNAVAILABLE",
    "UNCERTAIN",
    "NOREPLICAS",
    "MISCONF",
    "LOADING",
    "BUSY",
    "TRYAGAIN",
    "READONLY",
    "MASTERDOWN",
    "OOM",
    "CLUSTERDOWN",
];

/// Replies (in RESP2) to `count` commands. One that says "not now" stands for all of them.
pub(crate) fn answered(bytes: &Bytes, count: usize) -> Result<Vec<Reply>, Trouble> {
    let replies = reply::decode(bytes).map_err(|e| Trouble::Later(format!("its replies can't be understood: {e}")))?;
    if replies.len() != count {
        return Err(Trouble::Later(format!(
            "{} replies came to {count} commands",
            replies.len()
        )));
    }
    match replies
        .iter()
        .filter_map(Reply::error)
        .find(|e| LATER.contains(&e.split(' ').next().unwrap_or("")))
    {
        Some(e) => Err(Trouble::Later(e.to_owned())),
        None => Ok(replies),
    }
}

/// Ids of sessions that belong to no client, from the far end.
static SESSIONS: AtomicU64 = AtomicU64::new(u64::MAX / 2);

/// A store as one of its clients sees it: what routes, splits, waits for copies and confirms for clients does so for the copy.
pub(crate) struct StoreEnd {
    name: String,
    store: Arc<Store>,
    /// Whom the store takes the copy for.
    client: Arc<Client>,
}

impl StoreEnd {
    pub(crate) fn new(name: impl Into<String>, store: Arc<Store>) -> Self {
        Self {
            name: name.into(),
            store,
            client: Arc::new(Client::new(
                SESSIONS.fetch_add(1, Ordering::Relaxed),
                "copy:0".into(),
                "copy:0".into(),
            )),
        }
    }

    async fn send(&self, commands: &[Words]) -> Result<Vec<Reply>, Trouble> {
        if commands.is_empty() {
            return Ok(Vec::new());
        }
        let mut parser = Parser::default();
        parser.buf.extend_from_slice(&encode(commands));
        let n = parser
            .parse(&LIMITS, commands.len())
            .map_err(|e| Trouble::Unfit(format!("a command of the copy is too large: {}", e.0)))?;
        let requests = parser.take();
        if n != commands.len() {
            return Err(Trouble::Unfit("a command of the copy can't be sent".into()));
        }
        let out = match &*self.store {
            Store::Embedded(inbox) => embedded(inbox, self.client.id, requests).await?,
            store => {
                let mut out = Writer::new(false);
                let mut session = Behind::new(store, &self.client)
                    .ok_or_else(|| Trouble::Unfit("this store has no sessions".into()))?;
                for i in 0..n {
                    let spec = commands::find(requests.args(i).at(0));
                    session
                        .forward(&requests, i, spec, &mut out)
                        .await
                        .map_err(|e| Trouble::Later(e.to_string()))?;
                }
                session
                    .flush(&requests, &mut out)
                    .await
                    .map_err(|e| Trouble::Later(e.to_string()))?;
                out
            }
        };
        answered(&out.buf.freeze(), n)
    }
}

async fn embedded(
    inbox: &tokio::sync::mpsc::Sender<Message>,
    session: u64,
    requests: Requests,
) -> Result<Writer, Trouble> {
    let gone = || Trouble::Unfit("the embedded store has stopped".into());
    let ops = (0..requests.len())
        .map(|i| {
            let a = requests.args(i);
            let op: Op = match commands::find(a.at(0)) {
                None => Err(commands::unknown(a)),
                Some(s) if !s.arity_fits(a.len()) => Err(commands::wrong_arity(s)),
                Some(s) if !matches!(s.run, Run::Engine(_)) => Err(commands::not_embedded(s)),
                Some(s) => Ok(s),
            };
            (i as u32, op)
        })
        .collect();
    let (mut batch, mut out, mut from) = (Batch { requests, ops }, Writer::new(false), 0);
    loop {
        let total = batch.ops.len();
        let (reply, done) = oneshot::channel();
        let job = Job {
            session,
            batch,
            from,
            out,
            soft_limit: usize::MAX,
            reply,
        };
        inbox.send(Message::Job(Box::new(job))).await.map_err(|_| gone())?;
        let done = done.await.map_err(|_| gone())?;
        (batch, out, from) = (done.batch, done.out, done.next);
        if from >= total {
            return Ok(out);
        }
    }
}

impl End for StoreEnd {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn call<'a>(&'a self, commands: &'a [Words]) -> BoxFuture<'a, Result<Vec<Reply>, Trouble>> {
        self.send(commands).boxed()
    }
}
