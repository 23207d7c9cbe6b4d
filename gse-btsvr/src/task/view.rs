//! A row as callers are shown it.

use gse_proto::codes::Inner;
use gse_proto::xfer::StoredEnd;

/// `content.status` of what is under way.
pub(super) const MOVING: i32 = 500;
/// … of what is being verified.
pub(super) const VERIFYING: i32 = 508;
/// … of an upload that is over, well or not.
const UPLOAD_OVER: i32 = 590;
/// … of a download that is over, well or not.
const DOWNLOAD_OVER: i32 = 592;

/// A row as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// Inner code.
    pub code: i32,
    /// For people.
    pub message: String,
    /// `content.status`.
    pub status: i32,
    /// 0 to 100.
    pub progress: u32,
    /// Bytes.
    pub size: u64,
    /// Bytes per second.
    pub rate: u64,
    /// Unix ms; 0: not begun.
    pub start_ms: u64,
    /// Unix ms; 0: not over.
    pub end_ms: u64,
}

impl View {
    /// Of a row that is over.
    #[must_use]
    pub fn of_end(end: &StoredEnd, is_upload: bool) -> Self {
        Self {
            code: end.code,
            message: end.message.clone(),
            status: if is_upload { UPLOAD_OVER } else { DOWNLOAD_OVER },
            progress: end.progress,
            size: end.size,
            rate: end.rate,
            start_ms: end.start_ms,
            end_ms: end.end_ms,
        }
    }

    /// Of a row of which nothing is known but that it is not over.
    #[must_use]
    pub fn open() -> Self {
        Self {
            code: Inner::Running.code(),
            message: String::new(),
            status: MOVING,
            progress: 0,
            size: 0,
            rate: 0,
            start_ms: 0,
            end_ms: 0,
        }
    }
}
