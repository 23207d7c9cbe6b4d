//! Running scripts on the host.
