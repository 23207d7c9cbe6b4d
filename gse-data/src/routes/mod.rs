//! Routes: which data id goes where. The calls that change them, their place in the store, and the table that records are routed by.
//!
//! * [`table`]: the routes as the way of a record sees them.

pub mod table;
