//! What the tests of swarms share: content, engines, and waiting.
#![allow(dead_code, clippy::unwrap_used)] // each test program uses its part; what fails here fails the test

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use gse_bt::manifest::ManifestBuilder;
use gse_bt::{ALPN, Bitmap, Engine, EngineConfig, Metrics, PeerTls, Storage, Swarm, SwarmSpec};
use gse_core::certs::{Authority, LEAF_DAYS};
use gse_core::tls::{Role, TlsFiles, peer_configs};
use gse_proto::file::{Manifest, PeerAddress};
use tempfile::TempDir;

pub(crate) const KEY: [u8; 32] = [42; 32];

/// Bytes that look like nothing, the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// What is to be moved.
pub(crate) struct Content {
    pub(crate) manifest: Arc<Manifest>,
    pub(crate) files: Vec<Vec<u8>>,
}

impl Content {
    pub(crate) fn of_one(len: usize) -> Self {
        Self::of_many(&[len])
    }

    pub(crate) fn of_many(lens: &[usize]) -> Self {
        let files: Vec<Vec<u8>> = lens.iter().zip(1u64..).map(|(len, seed)| noise(seed, *len)).collect();
        let total: usize = lens.iter().sum();
        let mut builder = ManifestBuilder::new("content.bin", total as u64).unwrap();
        for (at, file) in files.iter().enumerate() {
            let path = if lens.len() == 1 {
                "content.bin".to_owned()
            } else {
                format!("file {at}")
            };
            builder
                .begin_file(vec![Bytes::from(path)], file.len() as u64, 0o644, 1_700_000_000_000)
                .unwrap();
            builder.data(file).unwrap();
            builder.end_file().unwrap();
        }
        Self {
            manifest: Arc::new(builder.finish().unwrap()),
            files,
        }
    }

    pub(crate) fn total(&self) -> u64 {
        self.files.iter().map(|file| file.len() as u64).sum()
    }
}

/// A place where engines run and trust each other.
pub(crate) struct Site {
    pub(crate) dir: TempDir,
    authority: Option<Authority>,
}

impl Site {
    pub(crate) fn tls() -> Self {
        let dir = TempDir::new().unwrap();
        let authority = Some(Authority::create(dir.path().join("ca")).unwrap());
        Self { dir, authority }
    }

    pub(crate) fn plain() -> Self {
        Self {
            dir: TempDir::new().unwrap(),
            authority: None,
        }
    }

    /// TLS of an agent of this name.
    pub(crate) fn tls_of(&self, id: &str) -> Option<PeerTls> {
        let authority = self.authority.as_ref()?;
        let at = |suffix: &str| self.dir.path().join(format!("{id}.{suffix}"));
        let files = TlsFiles {
            ca: authority.ca_path(),
            cert: at("crt"),
            key: at("key"),
        };
        if !files.cert.exists() {
            authority
                .issue(Role::Agent, Some(id), &[], &files.cert, &files.key, LEAF_DAYS)
                .unwrap();
        }
        let (server, client) = peer_configs(&files, &[Role::Agent, Role::Server], &[ALPN]).unwrap();
        Some(PeerTls { server, client })
    }

    pub(crate) fn config(&self, id: &str) -> EngineConfig {
        EngineConfig {
            listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 0))],
            tls: self.tls_of(id),
            ..EngineConfig::default()
        }
    }

    pub(crate) async fn engine(&self, id: &str) -> Engine {
        Engine::start(self.config(id), Metrics::default()).await.unwrap()
    }

    pub(crate) async fn seed(&self, id: &str, content: &Content) -> Node {
        self.seed_with(id, content, self.config(id), false).await
    }

    pub(crate) async fn seed_with(&self, id: &str, content: &Content, config: EngineConfig, foreign: bool) -> Node {
        let engine = Engine::start(config, Metrics::default()).await.unwrap();
        let node = Node::files(self, id, content);
        for (path, bytes) in node.iter().zip(&content.files) {
            File::create(path).unwrap().write_all(bytes).unwrap();
        }
        let swarm = engine
            .seed(spec(id, content, foreign), storage(content, &node))
            .unwrap();
        Node {
            id: id.to_owned(),
            engine,
            swarm,
            paths: node,
        }
    }

    pub(crate) async fn target(&self, id: &str, content: &Content) -> Node {
        self.target_with(id, content, self.config(id), false, None).await
    }

    pub(crate) async fn target_with(
        &self,
        id: &str,
        content: &Content,
        config: EngineConfig,
        foreign: bool,
        resume: Option<Bitmap>,
    ) -> Node {
        let engine = Engine::start(config, Metrics::default()).await.unwrap();
        let paths = Node::files(self, id, content);
        let storage = storage(content, &paths);
        let swarm = engine.fetch(spec(id, content, foreign), storage, resume).unwrap();
        Node {
            id: id.to_owned(),
            engine,
            swarm,
            paths,
        }
    }
}

pub(crate) fn spec(id: &str, content: &Content, foreign: bool) -> SwarmSpec {
    SwarmSpec {
        manifest: Arc::clone(&content.manifest),
        swarm_key: KEY,
        own_id: id.to_owned(),
        foreign,
    }
}

/// The files, made if they are not there.
pub(crate) fn storage(content: &Content, paths: &[PathBuf]) -> Storage {
    let open = |path: &PathBuf| {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        Some(file.unwrap())
    };
    Storage::new(Arc::clone(&content.manifest), paths.iter().map(open).collect()).unwrap()
}

/// An engine with one swarm.
pub(crate) struct Node {
    pub(crate) id: String,
    pub(crate) engine: Engine,
    pub(crate) swarm: Swarm,
    pub(crate) paths: Vec<PathBuf>,
}

impl Node {
    fn files(site: &Site, id: &str, content: &Content) -> Vec<PathBuf> {
        let dir = site.dir.path().join(format!("of {id}"));
        std::fs::create_dir_all(&dir).unwrap();
        (0..content.files.len()).map(|at| dir.join(at.to_string())).collect()
    }

    pub(crate) fn address(&self, seed: bool) -> PeerAddress {
        PeerAddress {
            address: self.engine.listening()[0].to_string(),
            agent_id: self.id.clone(),
            seed,
            ..PeerAddress::default()
        }
    }

    pub(crate) async fn finished(&self, within: Duration) {
        let mut progress = self.swarm.progress();
        let done = tokio::time::timeout(within, progress.wait_for(|progress| progress.complete)).await;
        if !matches!(done, Ok(Ok(_))) {
            panic!("{} is not done: {:?}", self.id, self.swarm.progress().borrow());
        }
    }

    pub(crate) fn check(&self, content: &Content) {
        for (at, (path, bytes)) in self.paths.iter().zip(&content.files).enumerate() {
            let mut got = Vec::new();
            File::open(path).unwrap().read_to_end(&mut got).unwrap();
            assert!(got == *bytes, "{}: file {at} is not what it should be", self.id);
        }
    }
}

/// A peer of no id, at an address: foreign.
pub(crate) fn foreign(ip: IpAddr, port: u16) -> PeerAddress {
    PeerAddress {
        address: SocketAddr::new(ip, port).to_string(),
        ..PeerAddress::default()
    }
}

pub(crate) async fn wait_for(what: &str, mut is: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !is() {
        assert!(Instant::now() < until, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
