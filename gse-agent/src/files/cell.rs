//! One order as it is kept in memory: what it is, how far it is, who has been told.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;
use gse_proto::file::order::What;
use gse_proto::file::{Order, Phase, Report};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::stop::Stop;
use super::worker::Failed;

/// Names an order.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    /// The task.
    pub(super) task_id: String,
    /// Its order.
    pub(super) order: u32,
}

/// One order.
#[derive(Debug)]
pub(super) struct Cell {
    pub(super) key: Key,
    /// The order without content.
    pub(super) order: Order,
    /// Where it is reported: another instance than at first, if that has taken the task over.
    server: Mutex<Option<String>>,
    /// The latest report; `None` until it is certain that the order was taken.
    pub(super) report: watch::Sender<Option<Report>>,
    /// Bytes moved so far.
    pub(super) moved: AtomicU64,
    /// A manifest that is too long for a report.
    pub(super) manifest: Mutex<Option<Bytes>>,
    pub(super) stop: Stop,
    pub(super) cancel: CancellationToken,
    /// Others may still fetch from here what this order has brought.
    pub(super) seeding: AtomicBool,
    /// The server has the final report.
    pub(super) stored: AtomicBool,
    /// It was given as the answer of a call.
    pub(super) answered: AtomicBool,
    /// It has to travel over the link.
    pub(super) linked: AtomicBool,
    pub(super) ended: Mutex<Option<Instant>>,
}

/// Whether nothing follows a report.
pub(super) fn is_final(report: &Report) -> bool {
    matches!(report.phase(), Phase::Done | Phase::Failed)
}

/// Whether it is worth telling before anything else happens: the end, or a source that is ready.
pub(super) fn is_telling(report: &Report) -> bool {
    is_final(report) || !report.manifest_id.is_empty()
}

impl Cell {
    pub(super) fn new(order: &Order) -> Self {
        Self {
            key: Key {
                task_id: order.task_id.clone(),
                order: order.order,
            },
            order: without_content(order),
            server: Mutex::new(order.servers.first().cloned()),
            report: watch::Sender::new(None),
            moved: AtomicU64::new(0),
            manifest: Mutex::default(),
            stop: Stop::default(),
            cancel: CancellationToken::new(),
            seeding: AtomicBool::new(false),
            stored: AtomicBool::new(false),
            answered: AtomicBool::new(false),
            linked: AtomicBool::new(false),
            ended: Mutex::default(),
        }
    }

    /// The latest report, with what has been moved since.
    pub(super) fn report(&self) -> Option<Report> {
        let mut report = self.report.borrow().clone()?;
        if !is_final(&report) {
            report.moved = self.moved.load(Ordering::Relaxed);
        }
        Some(report)
    }

    /// Changes what is reported.
    pub(super) fn tell(&self, change: impl FnOnce(&mut Report)) {
        self.report.send_modify(|report| {
            if let Some(report) = report.as_mut().filter(|report| !is_final(report)) {
                change(report);
            }
        });
    }

    /// Where it is reported.
    pub(super) fn server(&self) -> Option<String> {
        self.server.lock().clone()
    }

    /// The order has come again: it is reported to whoever has given it last. Gives the server of before if it was another one.
    pub(super) fn move_to(&self, servers: &[String]) -> Option<String> {
        let new = servers.first()?;
        let mut server = self.server.lock();
        if server.as_ref() == Some(new) {
            return None;
        }
        Some(server.replace(new.clone()).unwrap_or_default())
    }

    /// Whether the link has something to say about it, now or later.
    pub(super) fn wants_link(&self) -> bool {
        self.linked.load(Ordering::Acquire) && (!self.is_stored() || self.seeding.load(Ordering::Acquire))
    }

    /// Whether the server has the final report.
    pub(super) fn is_stored(&self) -> bool {
        self.stored.load(Ordering::Acquire)
    }

    /// Resolves when it is to end; why, says `stop`.
    pub(super) async fn cancelled(&self) {
        self.cancel.cancelled().await;
    }

    /// The server has the final report.
    pub(super) fn is_settled(&self) -> bool {
        self.stored.load(Ordering::Acquire) || self.answered.load(Ordering::Acquire)
    }
}

fn without_content(order: &Order) -> Order {
    let mut order = order.clone();
    match &mut order.what {
        Some(What::Push(push)) => push.content = Bytes::new(),
        Some(What::Target(target)) => {
            target.inline_content = Bytes::new();
            target.inline_manifest = Bytes::new();
        }
        _ => {}
    }
    order
}

/// The report of an order that could not be carried out.
pub(super) fn failed(order: &Order, failed: Failed) -> Report {
    Report {
        task_id: order.task_id.clone(),
        order: order.order,
        phase: Phase::Failed.into(),
        code: failed.code,
        message: failed.message,
        ..Report::default()
    }
}

/// What there is to say about an order that was carried out.
#[derive(Debug, Default)]
pub(super) struct Done {
    /// Bytes of content.
    pub(super) size: u64,
    /// A note for the row.
    pub(super) message: String,
}

impl Done {
    /// So many bytes.
    pub(super) fn of(size: u64) -> Self {
        Self {
            size,
            message: String::new(),
        }
    }

    pub(super) fn put(self, report: &mut Report) {
        report.size = self.size;
        report.moved = self.size;
        report.message = self.message;
    }
}
