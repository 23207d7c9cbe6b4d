//! The operator's command
