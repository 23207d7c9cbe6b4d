//! The answer of a server on its way back: passed on as a stream, unless it is so small that it is better looked at first.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use gse_core::http::{ApiError, ClientError, Reply, forward, full};
use gse_proto::codes::Code;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use serde::Deserialize;

use super::body::Impatient;
use super::upstream::InFlight;

/// Answers up to this size are looked at: a server's word that it is stopping is one.
pub(super) const TINY: u64 = 4 * 1024;
/// Of a call that may be made again, answers up to this size are there whole before any of it is passed on.
pub(super) const SMALL: u64 = 64 * 1024;

/// What a server has answered.
pub(super) enum Answer {
    /// Something for the caller.
    Passed(Result<Reply, ApiError>),
    /// That it is stopping, and has not begun with the call.
    Stopping,
    /// Only a part.
    Broken(ClientError),
}

#[derive(Deserialize)]
struct Envelope {
    code: i64,
}

/// Takes an answer whose body may be `whole` bytes large to be waited for; the pieces of every other one may not be further apart
/// than `idle`. `held` is let go of when the answer has gone through.
pub(super) async fn take(
    service: &str,
    server: &str,
    response: Response<Incoming>,
    idle: Duration,
    whole: u64,
    held: InFlight,
) -> Answer {
    let (head, body) = response.into_parts();
    if head.status != StatusCode::OK {
        let status = head.status.as_u16();
        tracing::error!(service, server, status, "not an answer of the contract");
        return Answer::Passed(Err(ApiError::new(
            Code::ServiceUnavailable,
            format!("gse_{service} at {server} answered with HTTP status {status}; it is not known what was done"),
        )));
    }
    let body = if body.size_hint().upper().is_some_and(|size| size <= whole) {
        let bytes = match tokio::time::timeout(idle, read(body, server)).await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(error)) => return Answer::Broken(error),
            Err(_) => {
                return Answer::Broken(ClientError::Timeout {
                    server: server.to_owned(),
                    waited: idle,
                });
            }
        };
        if is_stopping(&bytes) {
            return Answer::Stopping;
        }
        full(bytes)
    } else {
        Impatient::boxed(forward(body), idle, held)
    };
    let mut response = Response::new(body);
    for name in [CONTENT_TYPE, CONTENT_LENGTH] {
        if let Some(value) = head.headers.get(&name) {
            response.headers_mut().insert(name, value.clone());
        }
    }
    Answer::Passed(Ok(Reply::Raw(response)))
}

async fn read(mut body: Incoming, server: &str) -> Result<Bytes, ClientError> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| ClientError::Failed {
            server: server.to_owned(),
            reason: error.to_string(),
        })?;
        if let Ok(data) = frame.into_data() {
            bytes.extend_from_slice(&data);
        }
    }
    Ok(bytes.freeze())
}

fn is_stopping(answer: &[u8]) -> bool {
    // What is larger has rows in it.
    answer.len() as u64 <= TINY
        && serde_json::from_slice::<Envelope>(answer).is_ok_and(|envelope| envelope.code == Code::Draining.code())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_code_says_that_a_server_is_stopping() {
        let envelope = |code: Code, text: &str| gse_proto::http::envelope(code.code(), text, b"{}", "r");
        assert!(is_stopping(&envelope(Code::Draining, "")));
        assert!(!is_stopping(&envelope(Code::Arguments, "1000914")));
        assert!(!is_stopping(b"") && !is_stopping(b"{\"code\":"));
    }
}
