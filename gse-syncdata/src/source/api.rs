//! Calls of CMDB's open API: the search for identities and the watch, within the rate that CMDB allows.
//!
//! What is in an identity is not looked at here; its bytes are passed on as they came.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use governor::clock::DefaultClock;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use gse_core::http::{ClientConfig, ClientError, HttpClient};
use http::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::config::CmdbConfig;
use crate::metrics::Metrics;

/// CMDB does not know the cursor (any more).
const NO_SUCH_CURSOR: i64 = 1_103_007;
/// Longest text of CMDB that is repeated in an error.
const MAX_SAID: usize = 300;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It was not answered.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Another status than 200.
    #[error("CMDB answers with HTTP status {0}")]
    Status(u16),
    /// The answer can't be understood.
    #[error("CMDB's answer can't be understood: {0}")]
    Broken(String),
    /// CMDB has refused it.
    #[error("CMDB refuses: {message} (code {code})")]
    Refused {
        /// Its code.
        code: i64,
        /// Its words.
        message: String,
    },
}

impl CallError {
    /// Whether the watch has to begin anew.
    #[must_use]
    pub fn is_cursor_lost(&self) -> bool {
        match self {
            CallError::Refused { code, message } => {
                *code == NO_SUCH_CURSOR || message.contains(&NO_SUCH_CURSOR.to_string())
            }
            _ => false,
        }
    }

    /// Whether CMDB was reached and has said something else than an answer.
    #[must_use]
    pub fn is_said(&self) -> bool {
        matches!(self, CallError::Refused { .. } | CallError::Broken(_))
    }

    fn outcome(&self) -> &'static str {
        match self {
            CallError::Client(_) => "no_answer",
            CallError::Status(_) => "status",
            CallError::Broken(_) => "broken",
            CallError::Refused { .. } if self.is_cursor_lost() => "cursor_lost",
            CallError::Refused { .. } => "refused",
        }
    }
}

/// Some hosts.
#[derive(Debug, Default)]
pub struct Page {
    /// How many there are in all.
    pub count: u64,
    /// Their identities, as they came.
    pub hosts: Vec<String>,
}

/// What has happened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Event {
    /// Where the watch goes on after it.
    pub cursor: String,
    /// The host was removed.
    pub is_delete: bool,
    /// Its identity, as it came; empty if there is none.
    pub host: String,
}

/// What a watch brings.
#[derive(Debug, Default)]
pub struct Watched {
    /// Events, the oldest first.
    pub events: Vec<Event>,
    /// Where the watch goes on; empty: where it was.
    pub cursor: String,
}

#[derive(Deserialize)]
struct Envelope<'a> {
    #[serde(default, alias = "bk_error_code")]
    code: Option<i64>,
    #[serde(default)]
    result: Option<bool>,
    #[serde(default, alias = "bk_error_msg")]
    message: Option<Value>,
    #[serde(default, borrow)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct RawPage<'a> {
    // Has to be there: no hosts is something else than no answer.
    count: u64,
    #[serde(default, borrow)]
    info: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
struct RawWatch<'a> {
    bk_watched: bool,
    #[serde(default, borrow)]
    bk_events: Option<Vec<RawEvent<'a>>>,
}

#[derive(Deserialize)]
struct RawEvent<'a> {
    #[serde(default)]
    bk_cursor: Option<String>,
    #[serde(default)]
    bk_event_type: Option<String>,
    #[serde(default, borrow)]
    bk_detail: Option<&'a RawValue>,
}

/// The way to CMDB.
pub struct CmdbApi {
    client: HttpClient,
    headers: HeaderMap,
    config: CmdbConfig,
    limiter: RateLimiter<NotKeyed, InMemoryState, DefaultClock>,
    metrics: Metrics,
}

impl CmdbApi {
    /// As configured; reads files.
    ///
    /// # Errors
    /// One of them can't be used.
    pub async fn new(config: &CmdbConfig, metrics: Metrics) -> anyhow::Result<Self> {
        let read = config.clone();
        let made = tokio::task::spawn_blocking(move || {
            let client = HttpClient::new(&ClientConfig {
                ca: read.ca.clone(),
                max_response_bytes: read.max_answer_bytes,
                ..ClientConfig::default()
            })
            .context("cmdb.ca")?;
            let secret = match &read.secret_file {
                Some(file) => std::fs::read_to_string(file)
                    .with_context(|| format!("cmdb.secret_file {}", file.display()))?
                    .trim()
                    .to_owned(),
                None => read.secret.clone(),
            };
            anyhow::Ok((client, secret))
        });
        let (client, secret) = made.await.context("reading the files of CMDB's configuration")??;
        let quota = |n: u32| std::num::NonZeroU32::new(n.max(1)).context("a rate");
        let quota = Quota::per_second(quota(config.calls_per_second)?).allow_burst(quota(config.burst)?);
        Ok(Self {
            client,
            headers: headers(config, &secret)?,
            config: config.clone(),
            limiter: RateLimiter::direct(quota),
            metrics,
        })
    }

    /// A page of all hosts, in the order of their ids.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn page(&self, start: u64) -> Result<Page, CallError> {
        let limit = self.config.page;
        let body = json!({
            "bk_supplier_account": self.config.supplier,
            "page": { "start": start, "limit": limit, "sort": "bk_host_id" },
        });
        let timeout = Duration::from_millis(self.config.page_timeout_ms);
        let read = |data: &RawValue| {
            let page: RawPage<'_> = serde_json::from_str(data.get()).map_err(|error| error.to_string())?;
            let hosts = match page.info {
                None if page.count > 0 => return Err(format!("{} hosts, and none of them is in it", page.count)),
                hosts => hosts.unwrap_or_default(),
            };
            Ok(Page {
                count: page.count,
                hosts: hosts.into_iter().map(|host| host.get().to_owned()).collect(),
            })
        };
        self.call("search", &self.config.search_path, body, timeout, read).await
    }

    /// What has happened after `cursor`, or from now on if that is empty. CMDB holds the call until something happens, for a while.
    ///
    /// # Errors
    /// Why it is not known.
    pub async fn watch(&self, cursor: &str) -> Result<Watched, CallError> {
        let mut body = json!({
            "bk_supplier_account": self.config.supplier,
            "bk_resource": "host_identifier",
            "bk_event_types": [],
        });
        if !cursor.is_empty() {
            body["bk_cursor"] = cursor.into();
        }
        let timeout = Duration::from_millis(self.config.watch_timeout_ms);
        self.call("watch", &self.config.watch_path, body, timeout, read_watch)
            .await
    }

    async fn call<T: Send + 'static>(
        &self,
        call: &'static str,
        path: &str,
        body: Value,
        timeout: Duration,
        read: impl FnOnce(&RawValue) -> Result<T, String> + Send + 'static,
    ) -> Result<T, CallError> {
        self.limiter.until_ready().await;
        let outcome = self.post(path, body, timeout, read).await;
        let label = outcome.as_ref().map_or_else(CallError::outcome, |_| "ok");
        self.metrics.call(call, label);
        outcome
    }

    async fn post<T: Send + 'static>(
        &self,
        path: &str,
        body: Value,
        timeout: Duration,
        read: impl FnOnce(&RawValue) -> Result<T, String> + Send + 'static,
    ) -> Result<T, CallError> {
        let url = format!("{}{path}", self.config.url.trim_end_matches('/'));
        let body = Bytes::from(body.to_string());
        let reply = self.client.post_json(&url, self.headers.clone(), body, timeout).await?;
        if reply.status != http::StatusCode::OK {
            return Err(CallError::Status(reply.status.as_u16()));
        }
        // A page may have some megabytes.
        let parsed = tokio::task::spawn_blocking(move || envelope(&reply.body, read)).await;
        parsed.unwrap_or_else(|error| Err(CallError::Broken(error.to_string())))
    }
}

/// Takes the envelope off.
fn envelope<T>(body: &Bytes, read: impl FnOnce(&RawValue) -> Result<T, String>) -> Result<T, CallError> {
    let envelope: Envelope<'_> = serde_json::from_slice(body).map_err(|error| CallError::Broken(error.to_string()))?;
    let code = envelope.code.unwrap_or_default();
    if code != 0 || envelope.result == Some(false) {
        let said = match envelope.message {
            Some(Value::String(text)) => text,
            Some(other) => other.to_string(),
            None => "it does not say why".to_owned(),
        };
        return Err(CallError::Refused {
            code,
            message: said.chars().take(MAX_SAID).collect(),
        });
    }
    let data = envelope
        .data
        .filter(|data| data.get().starts_with('{'))
        .ok_or_else(|| CallError::Broken("there is no data in it".to_owned()))?;
    read(data).map_err(CallError::Broken)
}

fn read_watch(data: &RawValue) -> Result<Watched, String> {
    let watch: RawWatch<'_> = serde_json::from_str(data.get()).map_err(|error| error.to_string())?;
    let raw = watch.bk_events.unwrap_or_default();
    let last = raw.iter().rev().find_map(|event| event.bk_cursor.clone());
    if watch.bk_watched && last.is_none() {
        return Err("there are events without a cursor".to_owned());
    }
    let events = raw.into_iter().filter(|_| watch.bk_watched).map(|event| Event {
        cursor: event.bk_cursor.unwrap_or_default(),
        is_delete: event.bk_event_type.as_deref() == Some("delete"),
        host: match event.bk_detail {
            Some(detail) if detail.get() != "null" => detail.get().to_owned(),
            _ => String::new(),
        },
    });
    Ok(Watched {
        events: events.collect(),
        cursor: last.unwrap_or_default(),
    })
}

fn headers(config: &CmdbConfig, secret: &str) -> anyhow::Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    if !config.app.is_empty() {
        let value = json!({
            "bk_app_code": config.app,
            "bk_app_secret": secret,
            "bk_username": config.user,
        });
        let mut value = HeaderValue::from_str(&value.to_string()).context("cmdb.app, cmdb.secret or cmdb.user")?;
        value.set_sensitive(true);
        headers.insert("x-bkapi-authorization", value);
    }
    if !config.tenant.is_empty() {
        let value = HeaderValue::from_str(&config.tenant).context("cmdb.tenant")?;
        headers.insert("x-bk-tenant-id", value);
    }
    for (name, value) in &config.headers {
        let name: HeaderName = name.parse().context("cmdb.headers")?;
        headers.insert(name, HeaderValue::from_str(value).context("cmdb.headers")?);
    }
    Ok(headers)
}

/// Shared by those that call.
pub type Api = Arc<CmdbApi>;

#[cfg(test)]
mod tests {
    use super::*;

    fn watched(data: &str) -> Result<Watched, CallError> {
        envelope(&Bytes::from(data.to_owned()), read_watch)
    }

    #[test]
    fn identities_come_through_byte_for_byte() {
        // contract: procmgr-agent-lifecycle#49
        let host = r#"{ "b":1.0,  "a":"\u00e9", "bk_host_id" : 1 }"#;
        let body = format!(
            r#"{{"result":true,"code":0,"message":"ok","data":{{"bk_watched":true,"bk_events":[
            {{"bk_cursor":"c1","bk_resource":"host_identifier","bk_event_type":"update","bk_detail":{host}}},
            {{"bk_cursor":"c2","bk_event_type":"delete","bk_detail":null}}]}}}}"#
        );
        let watched = watched(&body).unwrap();
        assert_eq!(watched.cursor, "c2");
        assert_eq!(watched.events[0].host, host);
        assert!(watched.events[1].is_delete && watched.events[1].host.is_empty());
    }

    #[test]
    fn what_cmdb_says_when_it_says_no() {
        let nothing =
            watched(r#"{"code":0,"data":{"bk_watched":false,"bk_events":[{"bk_cursor":"n","bk_detail":null}]}}"#);
        let nothing = nothing.unwrap();
        assert_eq!((nothing.events.len(), nothing.cursor.as_str()), (0, "n"));
        let lost = watched(r#"{"result":false,"code":1103007,"message":"no such node","data":null}"#).unwrap_err();
        assert!(lost.is_cursor_lost() && lost.is_said());
        let old = watched(r#"{"result":false,"bk_error_code":1199999,"bk_error_msg":"busy","data":null}"#).unwrap_err();
        assert!(matches!(&old, CallError::Refused { code: 1_199_999, message } if message == "busy"));
        assert!(!old.is_cursor_lost());
        for broken in [
            "",
            "{",
            "[]",
            r#"{"code":0}"#,
            r#"{"code":0,"data":[]}"#,
            r#"{"code":0,"data":{}}"#,
            r#"{"code":"0","data":{}}"#,
            r#"{"code":0,"data":{"bk_watched":true,"bk_events":[{}]}}"#,
        ] {
            assert!(matches!(watched(broken), Err(CallError::Broken(_))), "{broken}");
        }
    }
}
