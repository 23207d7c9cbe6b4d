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

/// Puts the envelope around `data_json`, which must be valid JSON.
///
/// Written by hand around serde's strings so that a 64 MiB result is copied once, not twice.
#[must_use]
pub fn envelope(code: i64, message: &str, data_json: &[u8], request_id: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(data_json.len() + message.len() + request_id.len() + 96);
    out.extend_from_slice(b"{\"code\":");
    out.extend_from_slice(code.to_string().as_bytes());
    out.extend_from_slice(b",\"message\":");
    push_json_str(&mut out, message);
    out.extend_from_slice(if code == Code::Ok.code() {
        b",\"result\":true,\"data\":"
    } else {
        b",\"result\":false,\"data\":"
    });
    out.extend_from_slice(data_json);
    out.extend_from_slice(b",\"request_id\":");
    push_json_str(&mut out, request_id);
    out.push(b'}');
    out
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
}
