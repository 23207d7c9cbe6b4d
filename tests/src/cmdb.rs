//! A CMDB over real HTTP, as far as host identities go: the search in pages, the watch with cursors that expire, and everything that can be
//! wrong with either. It answers as the published calls do; what it is asked, and with which headers, is noted.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::BytesMut;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};

/// Path of the search.
pub const SEARCH: &str = "/api/v3/identifier/host/search";
/// Path of the watch.
pub const WATCH: &str = "/api/v3/event/watch/resource/host_identifier";
/// Events of one answer at most.
const MOST_EVENTS: usize = 200;

/// What is wrong with an answer.
#[derive(Debug, Clone)]
pub enum CmdbFault {
    /// Another status than 200.
    Status(u16),
    /// This text in place of JSON.
    Broken(&'static str),
    /// An envelope with this code.
    Refuse(i64),
    /// It comes late.
    Slow(Duration),
    /// The connection is closed.
    Close,
}

/// One call, as it came.
#[derive(Debug, Clone)]
pub struct CmdbCall {
    /// When.
    pub at: Instant,
    /// Its path.
    pub path: String,
    /// Its headers, names in lower case.
    pub headers: HashMap<String, String>,
    /// Its body.
    pub body: Value,
}

#[derive(Debug, Default)]
struct World {
    hosts: BTreeMap<u64, String>,
    /// Number, type, detail.
    events: VecDeque<(u64, &'static str, String)>,
    last: u64,
    /// Cursors before it are not known any more.
    oldest: u64,
    faults: HashMap<&'static str, VecDeque<CmdbFault>>,
    calls: Vec<CmdbCall>,
}

#[derive(Debug)]
struct Shared {
    world: Mutex<World>,
    news: Notify,
    hold: Duration,
}

/// The CMDB. Gone, with its connections, when dropped.
#[derive(Debug)]
pub struct Cmdb {
    /// Where it listens.
    pub address: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

impl Drop for Cmdb {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A host's identity, spelt in a way of its own, so that whoever reads and writes it again is noticed.
#[must_use]
pub fn identity(host_id: u64, agent: &str, address: &str, note: &str) -> String {
    format!(
        "{{ \"bk_host_id\":{host_id},  \"bk_cloud_id\" : 0, \"bk_host_innerip\":\"{address}\",\n \"bk_os_type\":\"1\",\
         \"bk_supplier_account\":\"0\", \"bk_agent_id\":\"{agent}\", \"bk_addressing\":\"static\", \"associations\":{{\"155\":\
         {{\"bk_biz_id\":11,\"bk_set_id\":4760,\"bk_module_id\":155,\"layer\":null}}}}, \"process\":[{{\"bk_process_id\":90908,\
         \"bk_process_name\":\"{note} \\u00e9\\/é\", \"bind_ip\":\"1.1.1.1\",\"port\":\"8080\",\"protocol\":\"1\",\"big\":1.0}}] }}"
    )
}

impl Cmdb {
    /// Listens on a free port; a watch without events is held for `hold`.
    ///
    /// # Errors
    /// When there is none.
    pub async fn start(hold: Duration) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("a port for CMDB")?;
        let address = listener.local_addr()?.to_string();
        let shared = Arc::new(Shared {
            world: Mutex::default(),
            news: Notify::new(),
            hold,
        });
        let served = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let shared = Arc::clone(&served);
                connections.spawn(async move {
                    // Clients are killed while they ask.
                    let _ = connection(stream, &shared).await;
                });
            }
        });
        Ok(Self { address, shared, task })
    }

    /// What stands before the paths.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.shared.world.lock().expect("no panic")
    }

    /// A host is so from now on.
    ///
    /// # Panics
    /// After a panic of its own.
    pub fn set(&self, host_id: u64, identity: &str) {
        let mut world = self.world();
        world.hosts.insert(host_id, identity.to_owned());
        world.event("update", identity.to_owned());
        drop(world);
        self.shared.news.notify_waiters();
    }

    /// The same, but no event tells of it.
    pub fn set_silently(&self, host_id: u64, identity: &str) {
        self.world().hosts.insert(host_id, identity.to_owned());
    }

    /// A host is gone; no event tells of it.
    pub fn remove_silently(&self, host_id: u64) {
        self.world().hosts.remove(&host_id);
    }

    /// An event as it is, whatever that is.
    pub fn event(&self, kind: &'static str, detail: &str) {
        self.world().event(kind, detail.to_owned());
        self.shared.news.notify_waiters();
    }

    /// No cursor that was given so far is known any more.
    pub fn expire_cursors(&self) {
        let mut world = self.world();
        world.last += 1;
        world.oldest = world.last;
        world.events.clear();
        drop(world);
        self.shared.news.notify_waiters();
    }

    /// The next calls of this path go wrong, each in one of these ways.
    pub fn fail(&self, path: &'static str, faults: &[CmdbFault]) {
        self.world()
            .faults
            .entry(path)
            .or_default()
            .extend(faults.iter().cloned());
    }

    /// Whether all of them have.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.world().faults.values().all(VecDeque::is_empty)
    }

    /// What it was asked.
    #[must_use]
    pub fn calls(&self, path: &str) -> Vec<CmdbCall> {
        let world = self.world();
        world.calls.iter().filter(|call| call.path == path).cloned().collect()
    }
}

impl World {
    fn event(&mut self, kind: &'static str, detail: String) {
        self.last += 1;
        self.events.push_back((self.last, kind, detail));
    }
}

fn cursor(number: u64) -> String {
    format!("MQ0y-{number}")
}

async fn connection(mut stream: TcpStream, shared: &Shared) -> Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        let Some((path, headers, body)) = request(&mut stream, &mut buffer).await? else {
            return Ok(());
        };
        let fault = {
            let mut world = shared.world.lock().expect("no panic");
            world.calls.push(CmdbCall {
                at: Instant::now(),
                path: path.clone(),
                headers,
                body: body.clone(),
            });
            world.faults.get_mut(path.as_str()).and_then(VecDeque::pop_front)
        };
        let mut status = 200;
        let text = match fault {
            Some(CmdbFault::Close) => return Ok(()),
            Some(CmdbFault::Status(other)) => {
                status = other;
                "<html>not now</html>".to_owned()
            }
            Some(CmdbFault::Broken(text)) => text.to_owned(),
            Some(CmdbFault::Refuse(code)) => refusal(code),
            Some(CmdbFault::Slow(time)) => {
                tokio::time::sleep(time).await;
                answer(&path, &body, shared).await
            }
            None => answer(&path, &body, shared).await,
        };
        let head = format!(
            "HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            text.len()
        );
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(text.as_bytes()).await?;
    }
}

fn refusal(code: i64) -> String {
    json!({"result": false, "code": code, "message": "it is refused", "permission": null, "data": null}).to_string()
}

fn envelope(data: &str) -> String {
    format!(r#"{{"result":true,"code":0,"message":"success","permission":null,"request_id":"r","data":{data}}}"#)
}

async fn answer(path: &str, body: &Value, shared: &Shared) -> String {
    match path {
        SEARCH => {
            let world = shared.world.lock().expect("no panic");
            let (start, limit) = (body["page"]["start"].as_u64(), body["page"]["limit"].as_u64());
            let (Some(start), Some(limit @ 1..=500)) = (start, limit) else {
                return refusal(1_199_006);
            };
            let (start, limit) = (
                usize::try_from(start).expect("small"),
                usize::try_from(limit).expect("small"),
            );
            let info: Vec<&str> = world
                .hosts
                .values()
                .skip(start)
                .take(limit)
                .map(String::as_str)
                .collect();
            envelope(&format!(
                r#"{{"count":{},"info":[{}]}}"#,
                world.hosts.len(),
                info.join(",")
            ))
        }
        WATCH if body["bk_resource"] == "host_identifier" => watch(body["bk_cursor"].as_str(), shared).await,
        _ => refusal(1_199_999),
    }
}

async fn watch(from: Option<&str>, shared: &Shared) -> String {
    let nothing = |number| {
        envelope(&format!(
            r#"{{"bk_watched":false,"bk_events":[{{"bk_cursor":"{}","bk_resource":"host_identifier","bk_event_type":"","bk_detail":null}}]}}"#,
            cursor(number)
        ))
    };
    let until = tokio::time::Instant::now() + shared.hold;
    loop {
        let news = shared.news.notified();
        tokio::pin!(news);
        // From here on nothing is missed.
        news.as_mut().enable();
        let last = {
            let world = shared.world.lock().expect("no panic");
            let Some(from) = from else { return nothing(world.last) };
            let number = from.strip_prefix("MQ0y-").and_then(|text| text.parse::<u64>().ok());
            let Some(number) = number.filter(|number| *number >= world.oldest) else {
                return refusal(1_103_007);
            };
            let events: Vec<String> = world
                .events
                .iter()
                .filter(|(n, ..)| *n > number)
                .take(MOST_EVENTS)
                .map(|(n, kind, detail)| {
                    format!(
                        r#"{{"bk_cursor":"{}","bk_resource":"host_identifier","bk_event_type":"{kind}","bk_detail":{detail}}}"#,
                        cursor(*n)
                    )
                })
                .collect();
            if !events.is_empty() {
                return envelope(&format!(r#"{{"bk_watched":true,"bk_events":[{}]}}"#, events.join(",")));
            }
            number
        };
        if tokio::time::timeout_at(until, news).await.is_err() {
            return nothing(last);
        }
    }
}

type Request = (String, HashMap<String, String>, Value);

async fn request(stream: &mut TcpStream, buffer: &mut BytesMut) -> Result<Option<Request>> {
    let end = loop {
        if let Some(at) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
            break at;
        }
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    };
    let head = String::from_utf8(buffer.split_to(end + 4).to_vec())?;
    let mut lines = head.lines();
    let path = lines
        .next()
        .and_then(|line| line.split(' ').nth(1))
        .unwrap_or_default()
        .to_owned();
    let headers: HashMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length: usize = headers.get("content-length").map_or(Ok(0), |text| text.parse())?;
    while buffer.len() < length {
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
    let body = serde_json::from_slice(&buffer.split_to(length)).unwrap_or_default();
    Ok(Some((path, headers, body)))
}
