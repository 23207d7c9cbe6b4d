//! File tasks: from a submit to the last row.
//!
//! * [`spec`]: checks a submit and lays it out (pure);
//! * [`layout`]: numbers of rows, and the header as it is stored (pure);
//! * [`run`]: what is known of each row while the task is under way, and what follows from each event (pure);
//! * [`view`]: a row as it is shown (pure);
//! * [`store`]: a task in the store;
//! * [`orders`]: what agents are told (pure);
//! * [`engine`]: tasks under way, and what touches them from outside;
//! * [`drive`]: the one task of the runtime that carries out what a run asks for;
//! * [`results`]: what callers read.

pub mod drive;
pub mod engine;
pub mod layout;
pub mod orders;
pub mod results;
pub mod run;
pub mod spec;
pub mod store;
pub mod view;
