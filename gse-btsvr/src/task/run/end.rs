//! How rows end: at once, or once their agents have stopped; and what follows for the upload that they belong to.

use std::sync::Arc;

use gse_proto::codes::Inner;
use gse_proto::xfer::{Endpoint, StoredEnd};

use super::{Effect, Run, Step, Winding};

impl Run {
    /// The end of rows is asked for whose agents may hold orders that this run knows nothing of: they are told to stop.
    pub fn stop_held(&mut self, is_meant: impl Fn(&Endpoint) -> bool, now: u64) {
        for row in 0..self.layout.rows() {
            if self.is_over(row) || !self.endpoint(row).is_some_and(&is_meant) {
                continue;
            }
            self.assume_sent(row);
            if row < self.layout.uploads() {
                let downloads: Vec<u32> = self.layout.downloads_of(row).collect();
                downloads.into_iter().for_each(|download| self.assume_sent(download));
            }
        }
        self.stop(is_meant, now);
    }

    fn assume_sent(&mut self, row: u32) {
        if let Some(state) = self
            .rows
            .get_mut(row as usize)
            .filter(|state| state.step == Step::Waiting)
        {
            (state.step, state.sent) = (Step::Asked, true);
        }
    }

    /// Ends a row now if nothing of it was sent, or else as soon as its agent has stopped.
    pub(super) fn wind_down(&mut self, row: u32, code: i32, message: &str, now: u64) {
        let Some(state) = self.rows.get_mut(row as usize) else {
            return;
        };
        match state.step {
            Step::Over => {}
            Step::Waiting => self.end_any(row, code, message, now),
            _ => {
                if state.winding.is_none() {
                    state.winding = Some(Box::new(Winding {
                        code,
                        message: message.to_owned(),
                        since_ms: now,
                    }));
                    self.effects.push(Effect::Cancel(row));
                }
            }
        }
    }

    pub(super) fn end_any(&mut self, row: u32, code: i32, message: &str, now: u64) {
        if row < self.layout.uploads() {
            self.end_upload(row, code, message, now);
        } else {
            self.end(row, code, message, now);
        }
    }

    pub(super) fn end_upload(&mut self, upload: u32, code: i32, message: &str, now: u64) {
        self.end(upload, code, message, now);
        if code != 0 {
            self.fail_downloads(upload, code, message, now);
        }
    }

    pub(super) fn fail_downloads(&mut self, upload: u32, code: i32, message: &str, now: u64) {
        let text = match code {
            126 => message.to_owned(),
            _ if message.is_empty() => "the source failed".to_owned(),
            _ => format!("the source failed: {message}"),
        };
        let rows: Vec<u32> = self.layout.downloads_of(upload).collect();
        for row in rows {
            self.wind_down(row, code, &text, now);
        }
        self.settle(upload, now);
    }

    pub(super) fn end(&mut self, row: u32, code: i32, message: &str, now: u64) {
        let Some(state) = self.rows.get(row as usize) else {
            return;
        };
        let start_ms = if state.start_ms == 0 { now } else { state.start_ms };
        let took_ms = now.saturating_sub(start_ms).max(1);
        let moved = if code == 0 { state.size } else { 0 };
        let view = self.view(row);
        let end = StoredEnd {
            code,
            message: message.to_owned(),
            size: state.size,
            progress: if code == 0 { 100 } else { view.progress },
            rate: moved.saturating_mul(1000) / took_ms,
            start_ms,
            end_ms: now.max(start_ms),
        };
        self.take_end(row, end, false);
        if let Some(upload) = self.upload_of(row) {
            self.settle(upload, now);
        }
    }

    pub(super) fn take_end(&mut self, row: u32, end: StoredEnd, stored: bool) {
        let Some(state) = self.rows.get_mut(row as usize).filter(|state| state.step != Step::Over) else {
            return;
        };
        let code = end.code;
        let failure = (code != 0).then(|| (code, end.message.clone()));
        (state.step, state.stored, state.winding, state.again_ms) = (Step::Over, stored, None, 0);
        state.end = Some(Arc::new(end));
        self.open -= 1;
        if !stored {
            self.unstored.push(row);
        }
        if code == 0 {
            self.advance(row, 100);
        }
        if let Some(upload) = self.upload_of(row) {
            let shared = &mut self.uploads[upload as usize];
            shared.open = shared.open.saturating_sub(1);
            shared.succeeded += u32::from(code == 0);
            shared.terminated += u32::from(code == Inner::Terminated.code());
            if failure.is_some() {
                shared.failure = failure;
            }
        }
    }

    /// If all downloads of an upload are over, so is the upload.
    pub(super) fn settle(&mut self, upload: u32, now: u64) {
        let shared = &self.uploads[upload as usize];
        if shared.open > 0 || shared.closed {
            return;
        }
        let failure = shared.failure.clone();
        let all_stopped = shared.terminated > 0 && shared.terminated == shared.downloads;
        let ready = shared.ready;
        if !self.header.push && !self.is_over(upload) {
            let winding = self.rows[upload as usize].winding.as_ref();
            let winding = winding.map(|winding| (winding.code, winding.message.clone()));
            let (code, message) = match (winding, failure) {
                (Some(winding), _) => winding,
                (None, Some((_, message))) if all_stopped => (Inner::Terminated.code(), message),
                (None, _) if ready => (0, String::new()),
                // Nothing was sent, and that is nobody's success.
                (None, Some((code, message))) => (code, format!("nothing was sent, no target can take it: {message}")),
                (None, None) => (0, String::new()),
            };
            self.end(upload, code, &message, now);
        }
        self.uploads[upload as usize].closed = true;
        if !self.header.push {
            self.effects.push(Effect::Over(upload));
        }
    }
}
