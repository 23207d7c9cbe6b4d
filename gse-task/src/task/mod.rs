//! Script tasks: from a submit to the last row.
//!
//! * [`spec`]: checks a submit and lays it out (pure);
//! * [`run`]: what is known of each target while the task is under way, and what to do when its agent appears (pure);
//! * [`cell`]: one task under way, shared by everything that touches it;
//! * [`budget`]: how much output may be kept;
//! * `fan_out`: from targets to agents;
//! * [`engine`]: tasks under way: returning agents, termination, deadlines;
//! * [`remote`]: targets whose agents are connected to other nodes;
//! * [`stop`]: ending what was given up;
//! * [`ingest`]: results of agents on their way to the store, and the acknowledgements back;
//! * [`store`]: a task in the store, and [`layout`] of its values;
//! * [`results`]: what callers read;
//! * [`slice`](mod@slice): putting output together and cutting it (pure);
//! * [`recover`]: taking up unfinished tasks after a restart.

pub mod budget;
pub mod cell;
pub mod engine;
mod fan_out;
pub mod ingest;
mod lately;
pub mod layout;
pub mod recover;
pub mod remote;
pub mod results;
pub mod run;
pub mod slice;
pub mod spec;
pub mod stop;
pub mod store;
pub mod summary;
