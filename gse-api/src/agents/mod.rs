//! What is known of agents, read from the records that gse_task keeps in the store. Nothing is written here.
//!
//! `lookup` finds agents by id or by `cloud:ip`, `list` walks through all of them, `lost` says which of them gse_alarm
//! is missing, `rows` turns a record into the rows of the
//! contract.

mod list;
mod lookup;
mod lost;
mod rows;

pub use list::Cursor;
pub use lookup::{Agents, Known};
pub use rows::{Liveness, detail, info, state, v1_info, v1_status};
