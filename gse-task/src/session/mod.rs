//! Sessions of agents: accepting them, telling a returning host from a clone, moving frames, noticing silence.
//!
//! What a frame means for a task is [`crate::task`]'s business; who may be told about an agent's state is [`crate::presence`]'s.

mod accept;
mod admit;
mod conn;
pub mod outbox;
pub mod registry;
mod sweep;
mod tls;
mod wire;

pub use accept::{listen, serve};
pub use sweep::sweep;
