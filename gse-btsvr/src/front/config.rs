//! Settings of the front for foreign clients.

use gse_core::config::Problems;
use serde::{Deserialize, Serialize};

/// Foreign BitTorrent clients, for tasks that are opened to them. Whoever reaches these addresses has the content of such a task.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FrontConfig {
    /// Whether tasks can be opened at all. It needs a cache.
    pub enabled: bool,
    /// Address and port of the tracker over HTTP, which has the `.torrent` files too.
    pub http_listen: String,
    /// Address and port of the tracker over UDP; empty: none.
    pub udp_listen: String,
    /// Address and port for peers, without TLS.
    pub peer_listen: String,
    /// Host name or address under which clients reach all three; empty: the address that is listened on.
    pub advertise: String,
    /// Applications whose tasks are opened as soon as they are made; `*`: all.
    pub open_apps: Vec<String>,
    /// How long a task is open if the call does not say, and at most.
    pub expire_s: u64,
    /// Open tasks at most.
    pub max_open: usize,
    /// Sources, or pushed files, of an opened task at most.
    pub max_parts: usize,
    /// How long the content of a task that has ended is waited for.
    pub fetch_wait_s: u64,
    /// Connections of peers at most.
    pub max_connections: usize,
    /// Connections of one swarm at most.
    pub max_peers: usize,
    /// Sent to peers at most, bytes per second; 0: no limit.
    pub upload_bytes_per_s: u64,
    /// Seconds between two announces of a client, as it is told.
    pub interval_s: u32,
    /// Peers that the tracker knows at most.
    pub max_tracked_peers: usize,
    /// Requests to the tracker over HTTP at once.
    pub max_requests: usize,
    /// How long such a request may take, its answer included.
    pub request_timeout_ms: u64,
}

impl Default for FrontConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            http_listen: "127.0.0.1:10030".into(),
            udp_listen: "127.0.0.1:10030".into(),
            peer_listen: "127.0.0.1:10021".into(),
            advertise: String::new(),
            open_apps: vec![],
            expire_s: 86_400,
            max_open: 1_000,
            max_parts: 256,
            fetch_wait_s: 300,
            max_connections: 1_000,
            max_peers: 64,
            upload_bytes_per_s: 0,
            interval_s: 30,
            max_tracked_peers: 100_000,
            max_requests: 256,
            request_timeout_ms: 30_000,
        }
    }
}

impl FrontConfig {
    /// Notes what is wrong with it; `has_cache`: whether there is one.
    pub fn validate(&self, has_cache: bool, problems: &mut Problems) {
        if !self.enabled {
            return;
        }
        if !has_cache {
            problems.push(
                "front.enabled",
                "needs a cache: what foreign clients get is offered from there, so set cache.dir",
            );
        }
        problems.check_listen("front.http_listen", &self.http_listen);
        problems.check_listen("front.peer_listen", &self.peer_listen);
        if !self.udp_listen.is_empty() {
            problems.check_listen("front.udp_listen", &self.udp_listen);
        }
        let everywhere = |listen: &String| listen.starts_with("0.0.0.0:") || listen.starts_with("[::]:");
        let listens = [&self.http_listen, &self.udp_listen, &self.peer_listen];
        if self.advertise.is_empty() && listens.into_iter().any(everywhere) {
            problems.push(
                "front.advertise",
                "missing: a listener of front is all addresses of the host, so say which one clients are to use",
            );
        }
        for (key, value, least, most) in [
            ("front.expire_s", self.expire_s, 1, 30 * 86_400),
            ("front.max_open", self.max_open as u64, 1, 10_000),
            ("front.max_parts", self.max_parts as u64, 1, 10_000),
            ("front.fetch_wait_s", self.fetch_wait_s, 1, 86_400),
            ("front.max_connections", self.max_connections as u64, 1, 1 << 20),
            ("front.max_peers", self.max_peers as u64, 1, 10_000),
            ("front.interval_s", self.interval_s.into(), 5, 3_600),
            ("front.max_tracked_peers", self.max_tracked_peers as u64, 1, 2_000_000),
            ("front.max_requests", self.max_requests as u64, 1, 1 << 16),
            ("front.request_timeout_ms", self.request_timeout_ms, 100, 600_000),
        ] {
            problems.check_range(key, value, least, most);
        }
    }
}
