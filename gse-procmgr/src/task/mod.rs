//! Process tasks: from a submit to the last row.
//!
//! * [`spec`]: a task from the body of a submit;
//! * [`layout`]: how its rows are numbered, and how its header is stored;
//! * [`store`]: tasks in the store;
//! * [`content`]: rows as clients decode them;
//! * [`engine`]: tasks under way, and those of instances that are gone;
//! * [`drive`](mod@drive): one task from its first call to an agent to its last row.

pub mod content;
pub mod drive;
pub mod engine;
pub mod layout;
pub mod spec;
pub mod store;
mod unstored;
