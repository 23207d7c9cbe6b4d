//! Agent sessions, script fan-out and results
