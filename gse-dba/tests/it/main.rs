//! The server over real sockets: against a real Redis, against a killed process, against broken files and against odd clients.

mod durability;
mod rig;
mod same_as_redis;
mod serving;
mod single;
