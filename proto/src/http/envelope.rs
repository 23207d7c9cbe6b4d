//! The envelope around every answer.

use serde::{Deserialize, Serialize};

use crate::codes::Code;

/// `{"code", "message", "result", "data", "request_id"}`. `result` is there for clients of the old gateway and always equals
/// `code == 0` (contract v2-http-task#53); `data` is never null (v2-http-task#3).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Envelope<T> {
    /// 0 is success; see [`crate::codes::Code`].
    pub code: i64,
    /// For people; empty on success.
    #[serde(default)]
    pub message: String,
    /// `code == 0`.
    #[serde(default)]
    pub result: bool,
    /// In the shape of the call, on errors too.
    pub data: T,
    /// Names this request in the logs and in the audit trail.
    #[serde(default)]
    pub request_id: String,
}

impl Envelope<()> {
    /// What comes before and what comes after the JSON of `data` in an envelope.
    ///
    /// Written by hand around serde's strings, so that data that is JSON already need not be parsed.
    #[must_use]
    pub fn parts(code: i64, message: &str, request_id: &str) -> (Vec<u8>, Vec<u8>) {
        let mut head = Vec::with_capacity(message.len() + 64);
        head.extend_from_slice(b"{\"code\":");
        head.extend_from_slice(code.to_string().as_bytes());
        head.extend_from_slice(b",\"message\":");
        push_json_str(&mut head, message);
        head.extend_from_slice(if code == Code::Ok.code() {
            b",\"result\":true,\"data\":"
        } else {
            b",\"result\":false,\"data\":"
        });
        let mut tail = Vec::with_capacity(request_id.len() + 24);
        tail.extend_from_slice(b",\"request_id\":");
        push_json_str(&mut tail, request_id);
        tail.push(b'}');
        (head, tail)
    }
}

/// Puts the envelope around `data_json`, which must be valid JSON.
///
/// Copies the data; for large data that is not to be copied see [`Envelope::parts`].
#[must_use]
pub fn envelope(code: i64, message: &str, data_json: &[u8], request_id: &str) -> Vec<u8> {
    let (head, tail) = Envelope::parts(code, message, request_id);
    [&head, data_json, &tail].concat()
}

fn push_json_str(out: &mut Vec<u8>, text: &str) {
    // Writing a &str into a Vec can't fail.
    let encoded = serde_json::Value::from(text).to_string();
    out.extend_from_slice(encoded.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_equals_code_zero_and_data_is_never_null() {
        // contract: v2-http-task#3, v2-http-task#53
        for (code, ok) in [(0, true), (1_000_101, false)] {
            let text = envelope(code, "a \"quoted\"\nmessage", b"[]", "r-1");
            let back: Envelope<Vec<u8>> = serde_json::from_slice(&text).unwrap();
            assert_eq!(
                (back.code, back.result, back.data, back.message.as_str()),
                (code, ok, vec![], "a \"quoted\"\nmessage")
            );
        }
    }

    #[test]
    fn the_parts_around_data_are_the_envelope() {
        let (head, tail) = Envelope::parts(1_000_101, "a \"quoted\"\nmessage", "r-\"1");
        let whole = [&head[..], b"[1,2]", &tail[..]].concat();
        assert_eq!(whole, envelope(1_000_101, "a \"quoted\"\nmessage", b"[1,2]", "r-\"1"));
        assert_eq!(
            String::from_utf8(whole).unwrap(),
            r#"{"code":1000101,"message":"a \"quoted\"\nmessage","result":false,"data":[1,2],"request_id":"r-\"1"}"#
        );
    }
}
