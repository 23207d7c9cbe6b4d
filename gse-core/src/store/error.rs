//! How asking the store can fail, in the terms a caller decides by: wait and try again, or give up.

use redis::{ErrorKind, RedisError, Value};

/// Why a batch has no replies.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum StoreError {
    /// The configuration is wrong; trying again does not help.
    #[error("{message}")]
    Config {
        /// What is wrong with it.
        message: String,
    },
    /// There is no connection. It is being made again in the background.
    #[error("the store {store} is not available: {reason}")]
    Unavailable {
        /// The store's address without its password.
        store: String,
        /// What the last attempt ended with.
        reason: String,
    },
    /// No answer in time.
    #[error("the store {store} took longer than {after_ms} ms: {why}")]
    Timeout {
        /// The store's address without its password.
        store: String,
        /// The time that was given, in milliseconds.
        after_ms: u64,
        /// What was being waited for.
        why: String,
    },
    /// The store refused a command.
    #[error("the store refused command {index} of the batch: {message}")]
    Reply {
        /// Which command, in push order, from 0.
        index: usize,
        /// The store's own words, its error code first.
        message: String,
    },
    /// A reply is of another kind than its command gives.
    #[error("the store answered with {found} where {wanted} was expected")]
    Unexpected {
        /// What the command gives.
        wanted: &'static str,
        /// What came.
        found: &'static str,
    },
}

/// Codes of refusals that pass by themselves: loading, failing over, moving slots, busy.
const PASSING: [&str; 7] = [
    "LOADING",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "READONLY",
    "BUSY",
    "NOREPLICAS",
];

impl StoreError {
    /// Whether the same batch may well succeed a little later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::Timeout { .. } => true,
            Self::Reply { message, .. } => message
                .split_whitespace()
                .next()
                .is_some_and(|code| PASSING.contains(&code)),
            Self::Config { .. } | Self::Unexpected { .. } => false,
        }
    }

    /// The kind of the error as a word, for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Config { .. } => "config",
            Self::Unavailable { .. } => "unavailable",
            Self::Timeout { .. } => "timeout",
            Self::Reply { .. } => "reply",
            Self::Unexpected { .. } => "unexpected",
        }
    }

    pub(super) fn config(message: impl Into<String>) -> Self {
        Self::Config {
            message: message.into(),
        }
    }
}

/// What an error of the client library, as opposed to a reply, means for the caller.
pub(super) fn of_redis(store: &str, error: &RedisError) -> StoreError {
    match error.kind() {
        // A cluster's refusal of a whole pipeline, after its redirections were followed.
        ErrorKind::Server(_) | ErrorKind::Extension => StoreError::Reply {
            index: 0,
            message: words(error),
        },
        _ => StoreError::Unavailable {
            store: store.to_owned(),
            reason: reason(error),
        },
    }
}

/// An error of the client library on one line.
pub(super) fn reason(error: &RedisError) -> String {
    error.to_string().lines().map(str::trim).collect::<Vec<_>>().join("; ")
}

fn words(error: &RedisError) -> String {
    match (error.code(), error.detail()) {
        (Some(code), Some(detail)) => format!("{code} {detail}"),
        (Some(code), None) => code.to_owned(),
        _ => reason(error),
    }
}

/// The error a reply is, if it is one.
pub(super) fn of_reply(index: usize, value: &Value) -> Option<StoreError> {
    match value {
        Value::ServerError(error) => {
            let message = match error.details() {
                Some(details) => format!("{} {details}", error.code()),
                None => error.code().to_owned(),
            };
            Some(StoreError::Reply { index, message })
        }
        _ => None,
    }
}
