//! Sockets for programs on this host: where they are bound and stay bound, who connects, how many may. What is said on a connection is
//! left to those who listen: [`crate::data::socket`] and [`crate::message`].

mod bind;
mod gate;
mod listen;
mod stream;

pub use bind::{Binding, Place};
pub use gate::{Gate, Pass};
pub use listen::{Listener, Status};
pub use stream::{Peer, Stream};
