//! A connection that has subscribed at the one Redis behind: bytes go both ways, as they come. Subscriptions in front of groups need none of this, they are
//! `subscriber`'s.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout;

use super::wire::READ;
use super::{Conn, Ended};
use crate::behind::Behind;
use crate::commands::{self, Run, SUBSCRIBES};
use crate::copy::Tracker;

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Conn<S> {
    /// The connection has subscribed: from now on what the store sends goes to the client as it comes, and the client's commands to the store.
    pub(super) async fn pump(&mut self) -> Result<bool, Ended> {
        let Some(mut private) = self.session.as_mut().and_then(Behind::take_subscribed) else {
            return Err(Ended::StoreGone);
        };
        let limit = Duration::from_millis(self.shared.config.limits.write_timeout_ms);
        let mut chunk = BytesMut::with_capacity(READ);
        let life = self.shared.life.clone();
        let mut turn = self.shared.office.views.now().ended.clone();
        loop {
            self.parser.buf.reserve(READ);
            tokio::select! {
                () = turn.cancelled() => {
                    let generation = self.generation;
                    turn = self.turn_over().await?;
                    if self.generation != generation {
                        return Ok(true);
                    }
                }
                () = life.draining() => return Ok(false),
                read = private.stream.read_buf(&mut chunk) => {
                    if read? == 0 {
                        return Err(Ended::StoreGone);
                    }
                    self.shared.metrics.sent(chunk.len());
                    timeout(limit, self.stream.write_all(&chunk)).await.map_err(|_| Ended::SlowReader)??;
                    chunk.clear();
                }
                read = self.stream.read_buf(&mut self.parser.buf) => {
                    let n = read?;
                    if n == 0 {
                        return Ok(false);
                    }
                    self.shared.metrics.received(n);
                }
            }
            let broken = self
                .parser
                .parse(&self.limits, self.shared.config.limits.max_batch)
                .err();
            let requests = self.parser.take();
            for i in 0..requests.len() {
                let a = requests.args(i);
                let spec = commands::find(a.at(0));
                match spec.map(|s| s.run) {
                    Some(Run::Local(commands::Local::Quit | commands::Local::Reset)) => {
                        self.out.ok();
                        return self.flush().await.map(|()| false);
                    }
                    Some(Run::Local(_) | Run::Admin | Run::Refused) => self
                        .out
                        .error(b"ERR this command is not allowed through gse_dba on a connection that has subscribed"),
                    // With RESP3 it may still do anything: that goes where it would go without subscriptions.
                    _ if self.out.resp3 && !spec.is_some_and(|s| s.is(SUBSCRIBES)) => {
                        let office = Arc::clone(&self.shared.office);
                        let view = office.views.enter().await;
                        let mut touches = view.tracker.as_ref().map(Tracker::batch);
                        if let Some(t) = &mut touches {
                            match spec.map(|s| s.run) {
                                Some(Run::Tx(_)) => t.add_unknown(),
                                _ => t.add(spec, a),
                            }
                        }
                        if let Some(session) = self.session.as_mut().filter(|_| view.generation == self.generation) {
                            session.forward(&requests, i, spec, &mut self.out).await?;
                            session.flush(&requests, &mut self.out).await?;
                        } else {
                            self.out.error(
                                b"UNAVAILABLE the data has just moved to another store; the command was not sent",
                            );
                        }
                    }
                    _ => {
                        self.subscriptions.note(spec, a);
                        let bytes = crate::single::session::encode(&requests, i);
                        timeout(limit, private.stream.write_all(&bytes))
                            .await
                            .map_err(|_| Ended::SlowReader)??;
                    }
                }
            }
            if let Some(e) = broken {
                self.out.error(format!("ERR {}", e.0).as_bytes());
                return self.flush().await.map(|()| false);
            }
            self.flush().await?;
        }
    }
}
