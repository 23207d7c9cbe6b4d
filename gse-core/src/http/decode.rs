//! Bodies from JSON, with errors that say where and what.

use bytes::Bytes;
use serde::de::DeserializeOwned;

use super::ApiError;

/// Larger bodies are parsed on a thread that may block.
const LARGE: usize = 256 * 1024;
/// Messages quote what callers send; this much of it is enough.
const MAX_MESSAGE: usize = 512;

/// A value from a body. An empty body counts as `{}`. The error names the place and what was expected there; it may quote the value
/// found, so it is for the caller only, never for a log.
pub fn decode<T: DeserializeOwned>(body: &Bytes) -> Result<T, ApiError> {
    let text: &[u8] = if body.iter().all(u8::is_ascii_whitespace) {
        b"{}"
    } else {
        body
    };
    // serde would take an array for a struct, too; a body of the contract is an object.
    if matches!(text.trim_ascii_start().first(), Some(first) if *first != b'{') {
        let valid = serde_json::from_slice::<serde::de::IgnoredAny>(text);
        return Err(match valid {
            Ok(_) => ApiError::arguments("body: expected a JSON object"),
            Err(error) => describe(&format!("body is not valid JSON: {error}")),
        });
    }
    // Nearly every body is right, and keeping track of where one is costs as much as the parsing: only for those that are not.
    if let Ok(value) = serde_json::from_slice(text) {
        return Ok(value);
    }
    let mut parser = serde_json::Deserializer::from_slice(text);
    let value = serde_path_to_error::deserialize(&mut parser).map_err(|error| {
        let path = error.path().to_string();
        let place = if path == "." {
            String::new()
        } else {
            format!(" at {path}")
        };
        let kind = if error.inner().is_data() {
            "body"
        } else {
            "body is not valid JSON"
        };
        describe(&format!("{kind}{place}: {}", error.inner()))
    })?;
    parser
        .end()
        .map_err(|error| describe(&format!("body is not valid JSON: {error}")))?;
    Ok(value)
}

/// As [`decode`]; a large body is parsed off the runtime's threads.
pub async fn decode_large<T: DeserializeOwned + Send + 'static>(body: &Bytes) -> Result<T, ApiError> {
    if body.len() <= LARGE {
        return decode(body);
    }
    let body = body.clone();
    match tokio::task::spawn_blocking(move || decode(&body)).await {
        Ok(decoded) => decoded,
        Err(error) => {
            tracing::error!(%error, "parsing a body panicked");
            Err(gse_proto::codes::Code::System.into())
        }
    }
}

fn describe(message: &str) -> ApiError {
    let mut end = message.len().min(MAX_MESSAGE);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    let cut = if end < message.len() { "…" } else { "" };
    ApiError::arguments(format!("{}{cut}", &message[..end]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::codes::Code;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Deserialize)]
    struct Outer {
        #[serde(default)]
        agents: Vec<Inner>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Inner {
        id: String,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Needs {
        task_id: String,
    }

    fn message<T: DeserializeOwned + std::fmt::Debug>(body: &str) -> String {
        let error = decode::<T>(&Bytes::copy_from_slice(body.as_bytes())).unwrap_err();
        assert_eq!(error.code, Code::Arguments.code());
        error.message
    }

    #[test]
    fn errors_name_the_place_and_what_was_expected() {
        let text = message::<Outer>(r#"{"agents":[{"id":"a"},{"id":7}]}"#);
        assert!(
            text.contains("agents[1].id") && text.contains("expected a string"),
            "{text}"
        );
        let text = message::<Needs>("{}");
        assert!(text.contains("missing field `task_id`"), "{text}");
        let whole: Needs = decode(&Bytes::from_static(br#"{"task_id":"t"}"#)).unwrap();
        assert_eq!(whole.task_id, "t");
        for bad in ["{", "nonsense", "{\"agents\":[]} {}", "\u{feff}{}", "{\"agents\":[}"] {
            let text = message::<Outer>(bad);
            assert!(text.contains("not valid JSON"), "{bad}: {text}");
        }
        for other in ["null", "[]", "[[]]", "7", "\"x\""] {
            assert_eq!(message::<Outer>(other), "body: expected a JSON object");
        }
    }

    #[test]
    fn an_empty_body_is_an_empty_object() {
        // contract: v2-http-task#7
        for empty in ["", " \r\n"] {
            assert_eq!(
                decode::<Outer>(&Bytes::from_static(empty.as_bytes())).unwrap(),
                Outer { agents: vec![] }
            );
            assert!(message::<Needs>(empty).contains("task_id"));
        }
    }

    #[test]
    fn deep_nesting_is_an_error_or_ignored_but_never_a_crash() {
        for depth in [100, 100_000] {
            let nest = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
            message::<Outer>(&nest);
            message::<Outer>(&format!("{{\"agents\":{nest}}}"));
            // In a field nobody reads it does not matter.
            let ignored = Bytes::from(format!("{{\"agents\":[],\"x\":{nest}}}"));
            assert!(decode::<Outer>(&ignored).is_ok());
            message::<serde_json::Value>(&nest.replace(']', ""));
        }
        let deep = format!("{{\"x\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(message::<serde_json::Value>(&deep).contains("recursion limit"));
    }

    #[test]
    fn long_values_are_not_quoted_whole() {
        let text = message::<Outer>(&format!("{{\"agents\":\"{}\"}}", "界".repeat(100_000)));
        assert!(text.len() < 600, "{}", text.len());
    }

    #[tokio::test]
    async fn large_bodies_are_parsed_too() {
        let many: Vec<String> = (0..50_000).map(|number| format!("{{\"id\":\"{number}\"}}")).collect();
        let body = Bytes::from(format!("{{\"agents\":[{}]}}", many.join(",")));
        assert!(body.len() > LARGE);
        assert_eq!(decode_large::<Outer>(&body).await.unwrap().agents.len(), 50_000);
        let broken = body.slice(..body.len() - 2);
        assert!(decode_large::<Outer>(&broken).await.is_err());
    }
}
