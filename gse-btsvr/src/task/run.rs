//! What is known of every row of a task while it is under way, and what follows from each event. Pure: time is passed in, and what is
//! to be done comes out as [`Effect`]s.
//!
//! A download waits until its source is ready, is asked of its agent, moves, is verified and is over. An upload is over when all its
//! downloads are, or when its source fails; then those of its downloads that are still open fail with it. A row that may have been
//! sent is not closed over its agent's head: the agent is told to stop, and the row ends with what it says, or after a grace.

mod end;

use std::sync::Arc;

use gse_core::random::HashMap;
use gse_proto::codes::Inner;
use gse_proto::file::{Phase, Report};
use gse_proto::xfer::{Endpoint, StoredEnd, XferHeader};

use super::layout::{Layout, Place, subject};
pub use super::view::View;
use super::view::{MOVING, VERIFYING};

/// After so long without a word from an agent that has no link it is asked again.
const SILENT_MS: u64 = 20_000;
/// Pause before an agent that is away is asked again.
const AWAY_MS: u64 = 3_000;
/// Pause before a call that failed is made again; doubled each time.
const AGAIN_MS: u64 = 500;
/// How far a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// Nothing was asked of its agent.
    Waiting,
    /// Its agent may have the order.
    Asked,
    /// Its agent has it.
    Taken,
    Verifying,
    Over,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Give the order of this row to its agent.
    Ask(u32),
    /// Tell the agent of this row to stop.
    Cancel(u32),
    /// Nothing of this upload is needed any more.
    Over(u32),
}

/// Why a call to an agent has not been answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallFailed {
    /// It is not connected.
    Offline(String),
    /// It can't do this.
    Unsupported(String),
    /// Something that may pass.
    Passing(String),
}

/// Patience of a [`Run`].
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For an agent that has begun and is away.
    pub lost_ms: u64,
    /// For an agent to confirm that it has stopped something.
    pub stop_ms: u64,
    /// Calls to an agent that were not answered.
    pub tries: u32,
}

/// An end that a row will have once its agent has stopped.
#[derive(Debug)]
struct Winding {
    code: i32,
    message: String,
    since_ms: u64,
}

#[derive(Debug)]
struct Row {
    step: Step,
    percent: u8,
    tries: u16,
    /// Its agent may have the order.
    sent: bool,
    /// A call is on its way.
    asking: bool,
    stored: bool,
    /// When it is to be asked again; 0: not at all.
    again_ms: u64,
    /// When its agent was last heard about it.
    heard_ms: u64,
    start_ms: u64,
    size: u64,
    rate: u64,
    winding: Option<Box<Winding>>,
    end: Option<Arc<StoredEnd>>,
}

impl Row {
    const fn new() -> Self {
        Self {
            step: Step::Waiting,
            percent: 0,
            tries: 0,
            sent: false,
            asking: false,
            stored: false,
            again_ms: 0,
            heard_ms: 0,
            start_ms: 0,
            size: 0,
            rate: 0,
            winding: None,
            end: None,
        }
    }
}

/// What the downloads of an upload share.
#[derive(Debug, Default)]
struct Shared {
    /// The manifest is there.
    ready: bool,
    /// The source is not needed any more.
    apart: bool,
    /// Nothing of it is under way, and everybody has been told.
    closed: bool,
    downloads: u32,
    open: u32,
    succeeded: u32,
    terminated: u32,
    percents: u64,
    /// The last failure of a download.
    failure: Option<(i32, String)>,
}

/// A task under way.
#[derive(Debug)]
pub struct Run {
    header: Arc<XferHeader>,
    layout: Arc<Layout>,
    patience: Patience,
    rows: Vec<Row>,
    uploads: Vec<Shared>,
    open: u32,
    unstored: Vec<u32>,
    effects: Vec<Effect>,
}

impl Run {
    /// A task of which nothing has been done; `ends`: what an earlier life has brought to its end.
    #[must_use]
    pub fn new(
        header: Arc<XferHeader>,
        layout: Arc<Layout>,
        patience: Patience,
        ends: HashMap<u32, StoredEnd>,
    ) -> Self {
        let mut run = Self {
            rows: (0..layout.rows()).map(|_| Row::new()).collect(),
            uploads: (0..layout.uploads().max(1)).map(|_| Shared::default()).collect(),
            open: layout.rows(),
            unstored: vec![],
            effects: vec![],
            header,
            layout,
            patience,
        };
        for (n, shared) in (0..).zip(&mut run.uploads) {
            let downloads: u32 = run
                .layout
                .groups_of(n)
                .iter()
                .map(|group| run.layout.of_group(*group).len())
                .sum::<usize>()
                .try_into()
                .unwrap_or(u32::MAX);
            (shared.downloads, shared.open) = (downloads, downloads);
        }
        for (row, end) in ends {
            run.take_end(row, end, true);
        }
        run
    }

    /// How many rows are not over.
    #[must_use]
    pub fn open_rows(&self) -> u32 {
        self.open
    }

    /// Whether every row is over and stored.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.open == 0 && self.unstored.is_empty()
    }

    /// What is to be done since the last time this was asked.
    pub fn effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// Rows that are over and not stored, some of them.
    #[must_use]
    pub fn unstored(&self, most: usize) -> Vec<(u32, Arc<StoredEnd>)> {
        self.unstored
            .iter()
            .take(most)
            .filter_map(|row| Some((*row, Arc::clone(self.rows.get(*row as usize)?.end.as_ref()?))))
            .collect()
    }

    /// These rows are stored now; `other`: another end was stored for them before, and counts.
    pub fn stored(&mut self, rows: &[u32], other: HashMap<u32, StoredEnd>) {
        for row in rows {
            if let Some(row) = self.rows.get_mut(*row as usize) {
                row.stored = true;
            }
        }
        for (row, end) in other {
            if let Some(row) = self.rows.get_mut(row as usize) {
                row.end = Some(Arc::new(end));
            }
        }
        self.unstored.retain(|row| !self.rows[*row as usize].stored);
    }

    /// Whether a row is over, stored or not.
    #[must_use]
    pub fn is_over(&self, row: u32) -> bool {
        self.rows.get(row as usize).is_none_or(|row| row.step == Step::Over)
    }

    /// Whether a row is over and stored: its agent may forget it.
    #[must_use]
    pub fn is_stored(&self, row: u32) -> bool {
        self.rows.get(row as usize).is_none_or(|row| row.stored)
    }

    /// Whether an order of this row still has something to do.
    #[must_use]
    pub fn is_wanted(&self, row: u32) -> bool {
        match self.layout.place(row) {
            Some(Place::Upload(upload)) => !self.uploads[upload as usize].closed,
            Some(Place::Download { .. }) => !self.is_over(row) && self.rows[row as usize].winding.is_none(),
            None => false,
        }
    }

    /// The agent of a row goes on with what is not wanted: it is told (again).
    pub fn cancel(&mut self, row: u32) {
        self.effects.push(Effect::Cancel(row));
    }

    /// Whether the agent of a row may have been given its order.
    #[must_use]
    pub fn was_asked(&self, row: u32) -> bool {
        self.rows.get(row as usize).is_some_and(|row| row.sent)
    }

    /// Whether an upload is ready.
    #[must_use]
    pub fn is_ready(&self, upload: u32) -> bool {
        self.uploads.get(upload as usize).is_some_and(|shared| shared.ready)
    }

    /// Download rows of an upload that are not over.
    #[must_use]
    pub fn open_downloads(&self, upload: u32) -> u32 {
        self.uploads.get(upload as usize).map_or(0, |shared| shared.open)
    }

    /// Closes the rows of hosts that can't take part whatever their agents say.
    pub fn refuse(&mut self, now: u64) {
        for row in (0..self.layout.rows()).rev() {
            if self.is_over(row) {
                continue;
            }
            let refused = self.endpoint(row).and_then(|endpoint| {
                (endpoint.refused_code != 0).then(|| (endpoint.refused_code, endpoint.refused_msg.clone()))
            });
            if let Some((code, message)) = refused {
                self.fail(row, code, &message, now);
            }
        }
    }

    /// Closes what can't be done at all and asks for the rest.
    pub fn begin(&mut self, now: u64) {
        self.refuse(now);
        if self.header.push {
            for row in 0..self.layout.rows() {
                self.ask(row);
            }
            return;
        }
        for upload in 0..self.layout.uploads() {
            let failed = self.rows[upload as usize]
                .end
                .as_ref()
                .filter(|end| end.code != 0)
                .map(|end| (end.code, end.message.clone()));
            match failed {
                // An earlier life has come no further than this.
                Some((code, message)) => self.fail_downloads(upload, code, &message, now),
                None if self.uploads[upload as usize].open > 0 => self.ask(upload),
                None => self.settle(upload, now),
            }
        }
    }

    /// What the agent of a row says about it.
    pub fn report(&mut self, row: u32, report: &Report, now: u64) {
        let place = self.layout.place(row);
        let Some(state) = self.rows.get_mut(row as usize) else {
            return;
        };
        (state.asking, state.tries, state.again_ms, state.heard_ms) = (false, 0, 0, now);
        if state.step == Step::Over {
            return;
        }
        state.step = state.step.max(Step::Taken);
        state.start_ms = if state.start_ms == 0 { now } else { state.start_ms };
        state.size = state.size.max(report.size);
        state.rate = report.rate;
        let winding = state
            .winding
            .as_ref()
            .map(|winding| (winding.code, winding.message.clone()));
        match (report.phase(), place) {
            (Phase::Failed, Some(place)) => {
                let code = match report.code {
                    // These say nothing about an end.
                    0 | 115 => Inner::System.code(),
                    code => code,
                };
                match (winding, place) {
                    (Some((code, message)), Place::Download { .. }) => self.end(row, code, &message, now),
                    (Some((code, message)), Place::Upload(_)) => self.end_upload(row, code, &message, now),
                    (None, Place::Upload(upload)) if self.uploads[upload as usize].apart => {}
                    (None, _) => self.fail(row, code, &report.message, now),
                }
            }
            (Phase::Done, Some(Place::Download { .. })) => self.end(row, 0, "", now),
            (Phase::Verifying, Some(Place::Download { .. })) => {
                state.step = Step::Verifying;
                self.advance(row, 99);
            }
            (_, Some(Place::Download { .. })) => {
                let percent = (report.moved.saturating_mul(100)).checked_div(state.size).unwrap_or(0);
                self.advance(row, u8::try_from(percent.min(99)).unwrap_or(99));
            }
            (_, Some(Place::Upload(_)) | None) => {}
        }
    }

    /// The content of an upload is known: its targets can be asked. `apart`: the source is not needed for that.
    pub fn ready(&mut self, upload: u32, size: u64, apart: bool) {
        let Some(shared) = self.uploads.get_mut(upload as usize).filter(|shared| !shared.ready) else {
            return;
        };
        (shared.ready, shared.apart) = (true, apart);
        if let Some(row) = self.rows.get_mut(upload as usize) {
            row.size = size;
        }
        let rows: Vec<u32> = self.layout.downloads_of(upload).collect();
        for row in rows {
            if self.rows[row as usize].step == Step::Waiting {
                self.rows[row as usize].size = size;
                self.ask(row);
            }
        }
    }

    /// A row can't be carried out. A source takes its downloads along.
    pub fn fail(&mut self, row: u32, code: i32, message: &str, now: u64) {
        match self.layout.place(row) {
            Some(Place::Upload(_)) => self.end_upload(row, code, message, now),
            Some(Place::Download { .. }) => self.end(row, code, message, now),
            None => {}
        }
    }

    /// A call to the agent of a row was not answered.
    pub fn call_failed(&mut self, row: u32, failed: &CallFailed, now: u64) {
        let patience = self.patience;
        let Some(state) = self.rows.get_mut(row as usize) else {
            return;
        };
        state.asking = false;
        if state.step == Step::Over {
            // A source that is needed although its row is stored, after a restart.
            state.again_ms = now + AWAY_MS;
            return;
        }
        if state.winding.is_some() {
            return;
        }
        match failed {
            CallFailed::Unsupported(message) => {
                let message = format!("the agent can't move files: {message}; update it");
                self.fail(row, Inner::System.code(), &message, now);
            }
            CallFailed::Offline(message) => {
                let lost = now.saturating_sub(state.heard_ms) >= patience.lost_ms;
                if state.step > Step::Asked && !lost {
                    state.again_ms = now + AWAY_MS;
                } else {
                    self.fail(row, Inner::AgentOffline.code(), message, now);
                }
            }
            CallFailed::Passing(message) => {
                state.tries = state.tries.saturating_add(1);
                if u32::from(state.tries) >= patience.tries {
                    let message = format!("the agent does not answer: {message}");
                    self.fail(row, Inner::AgentOffline.code(), &message, now);
                } else {
                    state.again_ms = now + (AGAIN_MS << state.tries.min(6));
                }
            }
        }
    }

    /// The end of rows is asked for. The rows of a source that is named end with it.
    pub fn stop(&mut self, is_meant: impl Fn(&Endpoint) -> bool, now: u64) {
        let text = "ended on request";
        let code = Inner::Terminated.code();
        for row in 0..self.layout.rows() {
            if self.is_over(row) || !self.endpoint(row).is_some_and(&is_meant) {
                continue;
            }
            if let Some(Place::Upload(upload)) = self.layout.place(row) {
                let downloads: Vec<u32> = self.layout.downloads_of(upload).collect();
                // First, so that the upload ends with this code and not with that of its last download.
                self.wind_down(row, code, text, now);
                for download in downloads {
                    self.wind_down(download, code, text, now);
                }
            } else {
                self.wind_down(row, code, text, now);
            }
        }
    }

    /// Looks at what is due. `is_linked`: whether the agent of a row holds its link, so that it will be heard without being asked.
    pub fn tick(&mut self, now: u64, is_linked: impl Fn(u32) -> bool) {
        let late = now >= self.header.deadline_ms;
        for row in 0..self.layout.rows() {
            let upload_wanted = row < self.layout.uploads() && self.is_wanted(row);
            let state = &mut self.rows[row as usize];
            if state.step == Step::Over {
                // A source is needed for its downloads even if its own row is stored.
                if upload_wanted && state.again_ms != 0 && state.again_ms <= now {
                    self.ask(row);
                }
                continue;
            }
            if let Some(winding) = &state.winding {
                if now.saturating_sub(winding.since_ms) >= self.patience.stop_ms {
                    let (code, message) = (winding.code, winding.message.clone());
                    self.fail(row, code, &message, now);
                }
                continue;
            }
            if late {
                let text = "not finished in time";
                self.wind_down(row, Inner::Timeout.code(), text, now);
                continue;
            }
            let silent = state.step > Step::Asked && now.saturating_sub(state.heard_ms) >= SILENT_MS;
            let due = state.again_ms != 0 && state.again_ms <= now;
            if !state.asking && (due || (silent && state.again_ms == 0 && !is_linked(row))) {
                self.ask(row);
            }
        }
    }

    /// A row as it is shown now. One that is not stored is not shown as over.
    #[must_use]
    pub fn view(&self, row: u32) -> View {
        let is_upload = row < self.layout.uploads();
        let Some(state) = self.rows.get(row as usize) else {
            return View::open();
        };
        if let (Some(end), true) = (&state.end, state.stored) {
            return View::of_end(end, is_upload);
        }
        let mut progress = u32::from(state.percent);
        if let Some(end) = &state.end {
            progress = end.progress;
        } else if is_upload && let Some(shared) = self.uploads.get(row as usize).filter(|shared| shared.downloads > 0) {
            progress = u32::try_from(shared.percents / u64::from(shared.downloads)).unwrap_or(99);
        }
        View {
            status: if state.step == Step::Verifying {
                VERIFYING
            } else {
                MOVING
            },
            progress: progress.min(99),
            size: state.size,
            rate: state.rate,
            start_ms: state.start_ms,
            ..View::open()
        }
    }

    fn endpoint(&self, row: u32) -> Option<&Endpoint> {
        subject(&self.header, &self.layout, row).map(|subject| subject.endpoint)
    }

    fn ask(&mut self, row: u32) {
        let wanted = self.is_wanted(row);
        let Some(state) = self.rows.get_mut(row as usize).filter(|_| wanted) else {
            return;
        };
        if !state.asking {
            state.step = state.step.max(Step::Asked);
            (state.sent, state.asking, state.again_ms) = (true, true, 0);
            self.effects.push(Effect::Ask(row));
        }
    }

    fn advance(&mut self, row: u32, percent: u8) {
        let upload = self.upload_of(row);
        let state = &mut self.rows[row as usize];
        if percent > state.percent {
            if let Some(upload) = upload {
                self.uploads[upload as usize].percents += u64::from(percent - state.percent);
            }
            state.percent = percent;
        }
    }

    /// The upload that a download belongs to.
    fn upload_of(&self, row: u32) -> Option<u32> {
        match self.layout.place(row)? {
            Place::Upload(_) => None,
            Place::Download { group, .. } => Some(self.header.groups.get(group as usize)?.upload),
        }
    }
}

#[cfg(test)]
mod tests;
