//! The calls themselves: credentials on, envelope off, and errors that say what to do.

use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use gse_core::http::{ClientConfig, ClientError, HttpClient};
use gse_proto::codes::Code;
use gse_proto::http::{Envelope, Route};
use http::{HeaderMap, HeaderValue};
use serde::Serialize;
use serde::de::DeserializeOwned;
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
