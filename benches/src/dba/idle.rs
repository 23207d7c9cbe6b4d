//! Clients that are connected, have worked once and do nothing: what memory each takes.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::servers::{PASSWORD, Servers};
use crate::dial;
use crate::proc;
use crate::report::{Section, one};
use crate::swarm::raise_files;

/// After everything, before memory is read.
const SETTLE: Duration = Duration::from_secs(1);
/// Connections that are made at once.
const AT_ONCE: usize = 64;

/// Memory of idle clients.
#[derive(Debug, Serialize)]
pub(crate) struct Idle {
    pub(crate) clients: u32,
    empty_kib: u64,
    /// KiB of gse_dba for each client that has shown its password.
    pub(crate) connected_kib: f64,
    /// And after each has set and read 16 values of 64 bytes in one pipeline, and one of 64 KiB.
    pub(crate) worked_kib: f64,
    cpu_percent: f64,
}

/// Connects them to a gse_dba of their own.
pub(crate) async fn measure(servers: &mut Servers, clients: u32) -> Result<Idle> {
    raise_files(u64::from(clients))?;
    let sets = [format!("limits.max_clients={}", clients + 100)];
    let (port, program) = servers.another("gse_dba idle", &sets).await?;
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    // What the first client brings is everybody's.
    let mut first = login(address, 0).await?;
    work(&mut first, 0).await?;
    tokio::time::sleep(SETTLE).await;
    let empty_kib = proc::usage(program.pid()?)?.rss_kib;
    let mut all: Vec<TcpStream> = Vec::with_capacity(clients as usize);
    let numbers: Vec<u32> = (1..=clients).collect();
    for some in numbers.chunks(AT_ONCE) {
        let made = futures::future::try_join_all(some.iter().map(|i| login(address, *i))).await;
        all.extend(made.context("connecting the idle clients")?);
    }
    tokio::time::sleep(SETTLE).await;
    let connected = proc::usage(program.pid()?)?.rss_kib;
    for (i, stream) in all.iter_mut().enumerate() {
        work(stream, i).await?;
    }
    tokio::time::sleep(SETTLE).await;
    let before = proc::usage(program.pid()?)?;
    tokio::time::sleep(SETTLE).await;
    let worked = proc::usage(program.pid()?)?;
    let each = |kib: u64| (kib as f64 - empty_kib as f64) / f64::from(clients);
    Ok(Idle {
        clients,
        empty_kib,
        connected_kib: each(connected),
        worked_kib: each(worked.rss_kib),
        cpu_percent: (worked.cpu_us - before.cpu_us) as f64 / SETTLE.as_micros() as f64 * 100.0,
    })
}

async fn login(address: SocketAddr, index: u32) -> Result<TcpStream> {
    let mut stream = dial::from_spread(address, index).await?;
    let auth = format!("*2\r\n$4\r\nAUTH\r\n${}\r\n{PASSWORD}\r\n", PASSWORD.len());
    stream.write_all(auth.as_bytes()).await?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).await?;
    ensure!(&answer == b"+OK\r\n", "the password was not taken");
    Ok(stream)
}

/// 16 SETs and 16 GETs in a pipeline, then a large value out and back.
async fn work(stream: &mut TcpStream, i: usize) -> Result<()> {
    let value = "v".repeat(64);
    let key = |n: usize| format!("idle:{:06}:{n:02}", i % 1000);
    let mut out = String::new();
    for n in 0..16 {
        let k = key(n);
        out.push_str(&format!("*3\r\n$3\r\nSET\r\n${}\r\n{k}\r\n$64\r\n{value}\r\n", k.len()));
    }
    for n in 0..16 {
        let k = key(n);
        out.push_str(&format!("*2\r\n$3\r\nGET\r\n${}\r\n{k}\r\n", k.len()));
    }
    stream.write_all(out.as_bytes()).await?;
    let mut answer = vec![0; 16 * 5 + 16 * (5 + 64 + 2)];
    stream.read_exact(&mut answer).await?;
    ensure!(answer.ends_with(b"v\r\n"), "a value did not come back");
    let (k, large) = (key(99), "x".repeat(64 * 1024));
    let out = format!(
        "*3\r\n$3\r\nSET\r\n${}\r\n{k}\r\n${}\r\n{large}\r\n*2\r\n$3\r\nGET\r\n${}\r\n{k}\r\n",
        k.len(),
        large.len(),
        k.len()
    );
    stream.write_all(out.as_bytes()).await?;
    let mut answer = vec![0; 5 + 8 + large.len() + 2];
    stream.read_exact(&mut answer).await?;
    ensure!(answer.ends_with(b"x\r\n"), "a large value did not come back");
    Ok(())
}

impl Idle {
    pub(crate) fn section(&self) -> Section {
        let mut table = Section::new(
            format!("{} idle clients, gse_dba before one Redis", self.clients),
            &["what", "value"],
        );
        table.row("without them, KiB resident", [self.empty_kib.to_string()]);
        table.row("each, connected, KiB", [one(self.connected_kib)]);
        table.row("each, after it has worked, KiB", [one(self.worked_kib)]);
        table.row("all, % of a core", [format!("{:.2}", self.cpu_percent)]);
        table
    }
}
