//! The session to the servers.
