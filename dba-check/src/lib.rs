//! Whether a store kept its word. Clients run operations and write down when each began, when it ended and what was answered; afterwards the history is
//! compared with what could have happened if every operation had taken effect once, at one moment between its begin and its end.
//!
//! What an operation's fate is, is told apart strictly: answered, certainly not executed, or unknown (`-UNCERTAIN`, a lost connection, no answer in time). An
//! unknown one may have happened at any time after its begin, or never. Starting and breaking servers is left to those who call.

pub mod client;
mod collections;
mod counter;
pub mod history;
pub mod load;
mod queue;
mod register;
mod report;

pub use history::{Clock, Event, Kind, Outcome, Recorder, Reply, Window};
pub use report::{Fault, Report, Wrong, check};

#[cfg(test)]
mod tests;
