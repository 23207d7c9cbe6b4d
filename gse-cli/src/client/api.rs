//! The calls themselves: credentials on, envelope off, and errors that say what to do.

use std::time::Duration;

use anyhow::{Context, bail};
use bytes::{Bytes, BytesMut};
use gse_core::http::{ClientConfig, ClientError, HttpClient, RawBody, forward, full};
use gse_proto::codes::Code;
use gse_proto::datalink::MAX_PAYLOAD;
use gse_proto::http::{Envelope, Route};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Request};
use http_body_util::BodyExt;
use serde::Serialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::value::RawValue;

use super::Settings;
use crate::text::one_line;

/// Most targets in one result query; platforms keep to the same number.
pub const MAX_ROWS: usize = 1000;
/// For a whole call.
const DEADLINE: Duration = Duration::from_secs(60);
/// For a connection.
const CONNECT_MS: u64 = 5_000;
/// Bodies from this size on are said to be large when a call fails over them.
const MAX_ANSWER: usize = 256 * 1024 * 1024;
/// Of an answer that is not the lines that were asked for, bytes that are looked at.
const MAX_REFUSAL: usize = 64 * 1024;
/// Longest line: a record all of whose bytes are written as six.
const MAX_LINE: usize = 6 * MAX_PAYLOAD + 1024;
/// What lines are called.
const NDJSON: &str = "application/x-ndjson";

/// Why a call has no result.
#[derive(Debug)]
pub enum CallError {
    /// The servers were not reached or did not answer.
    Unreachable {
        /// The whole message.
        message: String,
    },
    /// They refused.
    Refused {
        /// Code of the envelope.
        code: i64,
        /// The whole message.
        message: String,
    },
    /// The answer makes no sense.
    Nonsense {
        /// The whole message.
        message: String,
    },
}

impl std::fmt::Display for CallError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CallError::Unreachable { message }
            | CallError::Refused { message, .. }
            | CallError::Nonsense { message } => f.write_str(message),
        }
    }
}

impl std::error::Error for CallError {}

impl CallError {
    /// Whether the same call may well succeed a little later.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            CallError::Unreachable { .. } => true,
            CallError::Nonsense { .. } => false,
            CallError::Refused { code, .. } => [
                Code::Timeout,
                Code::Limit,
                Code::StoreUnavailable,
                Code::Draining,
                Code::ServiceUnavailable,
                Code::System,
            ]
            .iter()
            .any(|passing| passing.code() == *code),
        }
    }
}

/// The servers, as one application sees them.
pub struct Api {
    client: HttpClient,
    base: String,
    from: String,
    headers: HeaderMap,
}

impl Api {
    /// Nothing is sent yet.
    ///
    /// # Errors
    /// The address is not one, or the credentials cannot stand in a header.
    pub fn new(settings: &Settings) -> anyhow::Result<Self> {
        let base = settings.api.trim_end_matches('/').to_owned();
        let uri: http::Uri = base
            .parse()
            .with_context(|| format!("\"{}\" ({}) is not a URL", one_line(&base), settings.api_from))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") if settings.ca.is_some() => {}
            Some("https") => bail!("{base} is https: say --ca FILE with the certificate of the authority to trust"),
            _ => bail!(
                "\"{}\" ({}) is not a URL: it has to begin with http:// or https://",
                one_line(&base),
                settings.api_from
            ),
        }
        let config = ClientConfig {
            ca: settings.ca.clone(),
            connect_timeout_ms: CONNECT_MS,
            max_response_bytes: MAX_ANSWER,
            ..ClientConfig::default()
        };
        let mut headers = HeaderMap::new();
        if let Some((app, secret)) = &settings.credentials {
            let value = serde_json::json!({ "bk_app_code": app, "bk_app_secret": secret }).to_string();
            let mut value =
                HeaderValue::from_str(&value).context("application code or secret cannot stand in a header")?;
            value.set_sensitive(true);
            headers.insert("x-bkapi-authorization", value);
        }
        headers.insert("x-bk-tenant-id", HeaderValue::from_static("default"));
        Ok(Self {
            client: HttpClient::new(&config)?,
            base,
            from: settings.api_from.clone(),
            headers,
        })
    }

    /// Makes a call and gives its `data`.
    ///
    /// # Errors
    /// A [`CallError`].
    pub async fn call<T: DeserializeOwned>(&self, route: Route, body: &impl Serialize) -> anyhow::Result<T> {
        let body = Bytes::from(serde_json::to_vec(body)?);
        let url = format!("{}{}", self.base, route.path());
        let reply = self
            .client
            .post_json(&url, self.headers.clone(), body, DEADLINE)
            .await
            .map_err(|error| self.unreachable(&error))?;
        self.data(route, reply.status, &reply.body).map_err(anyhow::Error::from)
    }

    /// Makes a call whose answer is lines without an end.
    ///
    /// # Errors
    /// A [`CallError`].
    pub async fn lines(&self, route: Route, body: &impl Serialize) -> anyhow::Result<Lines> {
        let body = full(serde_json::to_vec(body)?);
        let mut request = Request::post(format!("{}{}", self.base, route.path())).body(body)?;
        *request.headers_mut() = self.headers.clone();
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let answer = self.client.request(request, DEADLINE).await;
        let answer = answer.map_err(|error| self.unreachable(&error))?;
        let status = answer.status();
        let is_lines = answer.headers().get(CONTENT_TYPE).is_some_and(|kind| kind == NDJSON);
        let mut lines = Lines {
            body: forward(answer.into_body()),
            held: BytesMut::new(),
            looked: 0,
            server: self.base.clone(),
        };
        if is_lines {
            return Ok(lines);
        }
        // An envelope, which says why there are no lines.
        while lines.held.len() < MAX_REFUSAL && lines.more(DEADLINE).await? {}
        match self.data::<IgnoredAny>(route, status, &lines.held) {
            Err(error) => Err(error.into()),
            Ok(_) => Err(anyhow::Error::from(CallError::Nonsense {
                message: one_line(&format!("{} has not answered {} with lines", self.base, route.path())),
            })),
        }
    }

    /// Whether the call that failed with this may well succeed a little later.
    #[must_use]
    pub fn may_pass(error: &anyhow::Error) -> bool {
        error.downcast_ref::<CallError>().is_some_and(CallError::may_pass)
    }

    fn unreachable(&self, error: &ClientError) -> CallError {
        let hint = match error {
            ClientError::Connect { .. } => format!("; is gse up running? (the address is from {})", self.from),
            _ => String::new(),
        };
        CallError::Unreachable {
            message: one_line(&format!("{error}{hint}")),
        }
    }

    fn data<T: DeserializeOwned>(&self, route: Route, status: http::StatusCode, body: &[u8]) -> Result<T, CallError> {
        let what = route.path();
        let nonsense = |why: &str| CallError::Nonsense {
            message: one_line(&format!(
                "the answer of {} to {what} is not one of GSE (HTTP {status}): {why}",
                self.base
            )),
        };
        let envelope: Envelope<Box<RawValue>> =
            serde_json::from_slice(body).map_err(|error| nonsense(&error.to_string()))?;
        if envelope.code != Code::Ok.code() {
            let text = Code::ALL
                .iter()
                .find(|code| code.code() == envelope.code)
                .map_or("refused", |code| code.text());
            let message = if envelope.message.is_empty() {
                text.to_owned()
            } else {
                envelope.message
            };
            let hint = if envelope.code == Code::Unauthenticated.code() {
                "; check --app and GSE_APP_SECRET, or point --data at the data directory of gse up"
            } else {
                ""
            };
            let message = one_line(&format!(
                "{message} (code {}, request {}){hint}",
                envelope.code, envelope.request_id
            ));
            return Err(CallError::Refused {
                code: envelope.code,
                message,
            });
        }
        serde_json::from_str(envelope.data.get()).map_err(|error| nonsense(&error.to_string()))
    }
}

/// An answer that comes line by line.
pub struct Lines {
    body: RawBody,
    held: BytesMut,
    /// Bytes of `held` that are known to hold no end of a line.
    looked: usize,
    server: String,
}

impl Lines {
    /// The next line, without its end; none when there is no more. A last line without an end is none.
    ///
    /// # Errors
    /// A [`CallError`]: nothing has come for `patience`, the connection is lost, or the line is longer than any record.
    pub async fn next(&mut self, patience: Duration) -> Result<Option<Bytes>, CallError> {
        loop {
            let end = self.held[self.looked..].iter().position(|byte| *byte == b'\n');
            if let Some(end) = end {
                let line = self.held.split_to(self.looked + end + 1).freeze();
                self.looked = 0;
                return Ok(Some(line.slice(..line.len() - 1)));
            }
            self.looked = self.held.len();
            if self.looked > MAX_LINE {
                return Err(CallError::Nonsense {
                    message: one_line(&format!("{} sends a line of more than {MAX_LINE} bytes", self.server)),
                });
            }
            if !self.more(patience).await? {
                return Ok(None);
            }
        }
    }

    /// Whether there was more.
    async fn more(&mut self, patience: Duration) -> Result<bool, CallError> {
        let lost = |why: String| CallError::Unreachable {
            message: one_line(&format!("{}: {why}", self.server)),
        };
        match tokio::time::timeout(patience, self.body.frame()).await {
            Err(_) => Err(lost(format!("nothing has come for {patience:?}"))),
            Ok(None) => Ok(false),
            Ok(Some(Err(error))) => Err(lost(error.to_string())),
            Ok(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    self.held.extend_from_slice(&data);
                }
                Ok(true)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::http::TaskIdReply;
    use http::StatusCode;

    fn settings(api: &str) -> Settings {
        Settings {
            api: api.into(),
            api_from: "a test".into(),
            credentials: Some(("app".into(), "s3cret".into())),
            user: "root".into(),
            ca: None,
        }
    }

    fn read(body: &str) -> Result<TaskIdReply, CallError> {
        Api::new(&settings("http://127.0.0.1:1/"))
            .unwrap()
            .data(Route::ExecuteScript, StatusCode::OK, body.as_bytes())
    }

    #[test]
    fn addresses_that_are_none_are_refused_with_where_they_came_from() {
        for bad in ["127.0.0.1:28808", "ftp://x", "http://", "https://x", "http://a b"] {
            let error = format!("{:#}", Api::new(&settings(bad)).err().unwrap());
            assert!(error.contains("a test") || error.contains("--ca"), "{bad}: {error}");
        }
    }

    #[test]
    fn an_answer_is_data_or_a_clear_error() {
        let good = r#"{"code":0,"message":"","result":true,"data":{"result":{"task_id":"t"}},"request_id":"r"}"#;
        assert_eq!(read(good).unwrap().result.task_id, "t");
        let refused = r#"{"code":1000901,"message":"no\u001b credentials","data":{"result":{}},"request_id":"r9"}"#;
        let error = read(refused).unwrap_err();
        assert!(matches!(error, CallError::Refused { code: 1_000_901, .. }) && !error.may_pass());
        let text = error.to_string();
        assert!(
            text.contains("no\\x1b credentials") && text.contains("r9") && text.contains("--app"),
            "{text}"
        );
        let busy = read(r#"{"code":1000190,"data":{}}"#).unwrap_err();
        assert!(
            busy.may_pass() && busy.to_string().contains("state store unavailable"),
            "{busy}"
        );
        for nonsense in ["", "<html>", r#"{"code":"0","data":{}}"#, r#"{"code":0,"data":[]}"#] {
            assert!(matches!(read(nonsense), Err(CallError::Nonsense { .. })), "{nonsense}");
        }
    }

    #[tokio::test]
    async fn servers_that_are_not_there_are_named_with_what_to_do() {
        let free = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let api = Api::new(&settings(&format!("http://{free}"))).unwrap();
        let error = api
            .call::<TaskIdReply>(Route::ExecuteScript, &serde_json::json!({}))
            .await
            .unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains(&free.to_string()) && text.contains("gse up") && text.contains("a test"),
            "{text}"
        );
        assert!(!text.contains("s3cret") && Api::may_pass(&error), "{text}");
    }
}
