//! The way out: three bounded queues, control before results before bulk, and the writer that empties them. A flood of output
//! delays a heartbeat or an answer by one batch at most.

use std::time::Duration;

use bytes::BytesMut;
use gse_proto::frame::Frame;
use gse_proto::session::Goodbye;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::config::SessionConfig;

/// A batch is closed when it has reached this size; it is also how long a control frame may have to wait, in bytes.
const BATCH: usize = 64 * 1024;
/// A buffer that grew beyond this for one large frame is given back.
const KEEP_BUFFER: usize = 4 * BATCH;

/// The ends that frames are put into.
#[derive(Debug, Clone)]
pub(super) struct Lanes {
    control: mpsc::Sender<Frame>,
    results: mpsc::Sender<Frame>,
    bulk: mpsc::Sender<Frame>,
}

/// The ends that the writer takes frames from.
#[derive(Debug)]
pub(super) struct Outgoing {
    control: mpsc::Receiver<Frame>,
    results: mpsc::Receiver<Frame>,
    bulk: mpsc::Receiver<Frame>,
}

/// The writer has ended; nothing more can be sent on this session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gone;

pub(super) fn lanes(config: &SessionConfig) -> (Lanes, Outgoing) {
    let (control, control_out) = mpsc::channel(config.control_queue);
    let (results, results_out) = mpsc::channel(config.results_queue);
    let (bulk, bulk_out) = mpsc::channel(config.bulk_queue);
    (
        Lanes { control, results, bulk },
        Outgoing {
            control: control_out,
            results: results_out,
            bulk: bulk_out,
        },
    )
}

impl Lanes {
    /// Sends a frame of control, or drops it when even that lane is full: then the server reads nothing and the write deadline is
    /// about to end the session. False if it was dropped.
    pub(super) fn control(&self, frame: impl Into<Frame>) -> bool {
        match self.control.try_send(frame.into()) {
            Ok(()) => true,
            Err(TrySendError::Full(frame)) => {
                tracing::debug!(kind = frame.kind(), "dropped: the lane of control is full");
                false
            }
            Err(TrySendError::Closed(_)) => false,
        }
    }

    /// Sends a row; waits for a place.
    pub(super) async fn result(&self, frame: impl Into<Frame>) -> Result<(), Gone> {
        self.results.send(frame.into()).await.map_err(|_| Gone)
    }

    /// Waits for a place in the lane of rows, and keeps it.
    pub(super) async fn place(&self) -> Result<mpsc::Permit<'_, Frame>, Gone> {
        self.results.reserve().await.map_err(|_| Gone)
    }

    /// Sends a piece of output; waits for a place.
    pub(super) async fn bulk(&self, frame: impl Into<Frame>) -> Result<(), Gone> {
        self.bulk.send(frame.into()).await.map_err(|_| Gone)
    }
}

impl Outgoing {
    /// The most urgent frame, as soon as there is one; `None` when no sender is left.
    async fn next(&mut self) -> Option<Frame> {
        tokio::select! {
            biased;
            Some(frame) = self.control.recv() => Some(frame),
            Some(frame) = self.results.recv() => Some(frame),
            Some(frame) = self.bulk.recv() => Some(frame),
            else => None,
        }
    }

    /// The most urgent frame that is there already.
    fn ready(&mut self) -> Option<Frame> {
        self.control
            .try_recv()
            .or_else(|_| self.results.try_recv())
            .or_else(|_| self.bulk.try_recv())
            .ok()
    }
}

/// Why the writer ended.
#[derive(Debug)]
pub(super) enum WriterEnd {
    /// It has said goodbye.
    Left,
    /// The network did not take a batch.
    Failed(std::io::Error),
}

/// Writes frames in batches, one flush each, until the network fails or `leave` holds a goodbye; then it sends what is queued and
/// the goodbye last.
pub(super) async fn write_frames<W: AsyncWrite + Unpin>(
    mut socket: W,
    mut outgoing: Outgoing,
    mut leave: watch::Receiver<Option<Goodbye>>,
    write_timeout: Duration,
    leave_timeout: Duration,
) -> WriterEnd {
    let mut batch = BytesMut::with_capacity(BATCH);
    let goodbye = loop {
        let first = tokio::select! {
            biased;
            goodbye = asked_to_leave(&mut leave) => break goodbye,
            frame = outgoing.next() => frame,
        };
        let Some(first) = first else {
            break Goodbye::default();
        };
        first.encode(0, &mut batch);
        fill(&mut batch, &mut outgoing);
        if let Err(error) = write_batch(&mut socket, &mut batch, write_timeout).await {
            return WriterEnd::Failed(error);
        }
    };
    let last_words = async {
        while let Some(frame) = outgoing.ready() {
            frame.encode(0, &mut batch);
            fill(&mut batch, &mut outgoing);
            write_batch(&mut socket, &mut batch, leave_timeout).await?;
        }
        Frame::from(goodbye).encode(0, &mut batch);
        write_batch(&mut socket, &mut batch, leave_timeout).await?;
        socket.shutdown().await
    };
    match timeout(leave_timeout, last_words).await {
        Ok(Ok(())) => WriterEnd::Left,
        Ok(Err(error)) => WriterEnd::Failed(error),
        Err(_) => WriterEnd::Failed(std::io::ErrorKind::TimedOut.into()),
    }
}

/// Resolves with the goodbye once there is one; never if nobody can ask any more.
async fn asked_to_leave(leave: &mut watch::Receiver<Option<Goodbye>>) -> Goodbye {
    let asked = leave
        .wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|goodbye| goodbye.clone());
    match asked {
        Some(goodbye) => goodbye,
        None => std::future::pending().await,
    }
}

fn fill(batch: &mut BytesMut, outgoing: &mut Outgoing) {
    while batch.len() < BATCH {
        let Some(frame) = outgoing.ready() else { break };
        frame.encode(0, batch);
    }
}

async fn write_batch<W: AsyncWrite + Unpin>(
    socket: &mut W,
    batch: &mut BytesMut,
    deadline: Duration,
) -> std::io::Result<()> {
    let written = timeout(deadline, async {
        socket.write_all(batch).await?;
        socket.flush().await
    });
    match written.await {
        Ok(outcome) => outcome?,
        Err(_) => {
            return Err(std::io::Error::new(
                std::io::ErrorKind::TimedOut,
                format!("the server took nothing for {} ms", deadline.as_millis()),
            ));
        }
    }
    if batch.capacity() > KEEP_BUFFER {
        *batch = BytesMut::with_capacity(BATCH);
    } else {
        batch.clear();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::session as s;
    use tokio::io::AsyncReadExt;

    const WRITE_TIMEOUT: Duration = Duration::from_millis(700);

    fn output(n: u64) -> s::Output {
        s::Output {
            offset: n,
            data: vec![b'x'; 32 * 1024].into(),
            ..Default::default()
        }
    }

    /// Starts a writer on a pipe of 4 KiB.
    fn writer(
        leave_timeout: Duration,
    ) -> (
        Lanes,
        watch::Sender<Option<Goodbye>>,
        tokio::io::DuplexStream,
        tokio::task::JoinHandle<WriterEnd>,
    ) {
        let (lanes, outgoing) = lanes(&SessionConfig::default());
        let (leave, left) = watch::channel(None);
        let (near, far) = tokio::io::duplex(4096);
        let task = tokio::spawn(write_frames(near, outgoing, left, WRITE_TIMEOUT, leave_timeout));
        (lanes, leave, far, task)
    }

    async fn read_all(mut far: tokio::io::DuplexStream) -> Vec<Frame> {
        let mut bytes = Vec::new();
        far.read_to_end(&mut bytes).await.unwrap();
        let mut buffer = BytesMut::from(&bytes[..]);
        let mut frames = Vec::new();
        while let Some(frame) = Frame::take(&mut buffer, 1 << 20).unwrap() {
            frames.push(frame);
        }
        assert!(buffer.is_empty());
        frames
    }

    #[tokio::test]
    async fn control_overtakes_results_and_results_overtake_bulk() {
        let (lanes, leave, far, task) = writer(Duration::from_secs(5));
        for n in 0..20 {
            lanes.bulk(output(n)).await.unwrap();
        }
        // The writer fills its first batch and stays in it: nobody reads yet.
        tokio::time::sleep(Duration::from_millis(50)).await;
        lanes.result(s::Row::default()).await.unwrap();
        assert!(lanes.control(s::Pong { nonce: 9 }));
        leave.send_replace(Some(Goodbye {
            reason: "test".into(),
            stopping: true,
            ..Goodbye::default()
        }));
        let frames = read_all(far).await;
        let kinds: Vec<u16> = frames.iter().map(Frame::kind).collect();
        let at = |kind| kinds.iter().position(|k| *k == kind).unwrap();
        assert!(at(6) <= 3, "the pong waited for more than a batch: {kinds:?}");
        assert_eq!(at(18), at(6) + 1, "{kinds:?}");
        assert_eq!(kinds.iter().filter(|k| **k == 19).count(), 20);
        assert_eq!(kinds.last(), Some(&7), "the goodbye is the last word");
        assert!(matches!(task.await.unwrap(), WriterEnd::Left));
    }

    #[tokio::test]
    async fn a_server_that_reads_nothing_ends_the_session() {
        let (lanes, _leave, far, task) = writer(Duration::from_secs(5));
        lanes.bulk(output(0)).await.unwrap();
        let WriterEnd::Failed(error) = task.await.unwrap() else {
            panic!("nothing failed")
        };
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
        drop(far);
    }

    #[tokio::test]
    async fn leaving_does_not_wait_for_ever() {
        let (lanes, leave, far, task) = writer(Duration::from_millis(300));
        lanes
            .result(s::Row {
                tail: vec![0; 100_000].into(),
                ..Default::default()
            })
            .await
            .unwrap();
        leave.send_replace(Some(Goodbye::default()));
        let started = tokio::time::Instant::now();
        assert!(matches!(task.await.unwrap(), WriterEnd::Failed(_)));
        assert!(started.elapsed() <= Duration::from_secs(3));
        drop(far);
    }

    #[tokio::test]
    async fn a_full_lane_of_control_drops_and_never_blocks() {
        let (lanes, _outgoing) = lanes(&SessionConfig {
            control_queue: 4,
            ..Default::default()
        });
        let sent = (0..10).filter(|n| lanes.control(s::Ping { nonce: *n })).count();
        assert_eq!(sent, 4);
    }
}
