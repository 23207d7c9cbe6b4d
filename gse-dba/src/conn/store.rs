//! The way to the store: what may go there, and the sending of what is collected. The order of a client's commands is `batch`'s, and which store it is `follow`'s.

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;

use super::{Conn, Ended};
use crate::commands::{self, Run};
use crate::engine::db::Refusal;
use crate::engine::{Batch, Job, Message};

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Conn<S> {
    /// Whether a command goes to the store: `Ok(None)` is one that only a Redis behind can know.
    pub(super) fn decide(
        &self,
        spec: Option<&'static commands::Spec>,
        a: crate::args::Args<'_>,
    ) -> Result<Option<&'static commands::Spec>, Refusal> {
        let embedded = self.session.is_none();
        let Some(spec) = spec else {
            return if embedded { Err(commands::unknown(a)) } else { Ok(None) };
        };
        match spec.run {
            Run::Local(kind) if self.passes_on(kind) => return Ok(Some(spec)),
            Run::Elsewhere if spec.name == "DEBUG" && !embedded && !a.is(1, "OBJECT") => {
                return Err(String::from("ERR of DEBUG, only DEBUG OBJECT is allowed through gse_dba").into());
            }
            Run::Refused if self.in_multi => {
                return Err(String::from("ERR Command not allowed inside a transaction").into());
            }
            Run::Refused => return Err(commands::not_allowed(spec)),
            // Queued, not done now; another database than the only one never reaches a Redis behind.
            Run::Local(commands::Local::Select) if a.len() == 2 && (embedded || a.at(1) == b"0") => {
                return Ok(embedded.then_some(&commands::SELECT_QUEUED));
            }
            Run::Local(_) | Run::Admin => {
                return Err(format!(
                    "ERR command '{}' is not allowed inside a transaction by gse_dba",
                    spec.name
                )
                .into());
            }
            _ => {}
        }
        // A Redis behind says itself what is wrong: inside a transaction it must.
        if embedded && !spec.arity_fits(a.len()) {
            return Err(commands::wrong_arity(spec));
        }
        if embedded && matches!(spec.run, Run::Elsewhere) {
            return Err(commands::not_embedded(spec));
        }
        Ok(Some(spec))
    }

    /// Sends what is collected to the store and takes its replies.
    pub(super) async fn store(&mut self, batch: &mut Batch) -> Result<(), Ended> {
        if let Some(session) = &mut self.session {
            return session.flush(&batch.requests, &mut self.out).await;
        }
        if batch.ops.is_empty() {
            return Ok(());
        }
        let mut from = 0;
        loop {
            let Some(inbox) = &self.engine else {
                return Err(Ended::StoreGone);
            };
            let resp3 = self.out.resp3;
            let (reply, done) = oneshot::channel();
            let job = Job {
                session: self.state.client.id,
                batch: std::mem::take(batch),
                from,
                out: std::mem::take(&mut self.out),
                soft_limit: self.shared.config.limits.output_soft_bytes,
                reply,
            };
            inbox
                .send(Message::Job(Box::new(job)))
                .await
                .map_err(|_| Ended::StoreGone)?;
            let done = done.await.map_err(|_| Ended::StoreGone)?;
            *batch = done.batch;
            self.out = done.out;
            self.out.resp3 = resp3;
            from = done.next;
            if from >= batch.ops.len() {
                batch.ops.clear();
                return Ok(());
            }
            self.flush().await?;
        }
    }
}
