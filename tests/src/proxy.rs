//! A relay between two programs that can be told to misbehave: faults of a network or of the other side, without touching either.
//!
//! It forwards bytes and understands none of them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

/// What it does to those who connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: it passes everything on.
    None,
    /// Nobody listens, and what was connected is closed.
    Refuse,
    /// It accepts, and then nothing passes, either way, until this ends.
    Hang,
    /// Every piece is held for so long before it is passed on.
    Slow(Duration),
}

#[derive(Debug, Clone, Copy)]
struct Order {
    fault: Fault,
    /// Counts the times that everything connected was cut off.
    cuts: u64,
}

/// The relay; it ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    orders: watch::Sender<Order>,
    passed: Arc<AtomicU64>,
    task: AbortHandle,
}

impl Proxy {
    /// Starts to relay to `upstream` (`host:port`), without a fault.
    ///
    /// # Errors
    /// When it can't listen.
    pub async fn start(upstream: &str) -> Result<Self> {
        let listener = listen(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        let address = listener.local_addr()?;
        let order = Order {
            fault: Fault::None,
            cuts: 0,
        };
        let (orders, seen) = watch::channel(order);
        let passed = Arc::new(AtomicU64::new(0));
        let work = serve(listener, address, upstream.to_owned(), seen, Arc::clone(&passed));
        let task = tokio::spawn(work).abort_handle();
        Ok(Self {
            address,
            orders,
            passed,
            task,
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes that have passed so far, both ways together.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }

    /// Whether anybody is connected.
    #[must_use]
    pub fn in_use(&self) -> bool {
        // Each connection looks at the orders, and so does what accepts them.
        self.orders.receiver_count() > 1
    }

    /// From now on it does this.
    pub fn set(&self, fault: Fault) {
        self.orders.send_modify(|order| order.fault = fault);
    }

    /// Closes what is connected; whoever connects again is served.
    pub fn cut(&self) {
        self.orders.send_modify(|order| order.cuts += 1);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address).with_context(|| format!("binding {address}"))?;
    Ok(socket.listen(1024)?)
}

async fn serve(
    first: TcpListener,
    address: SocketAddr,
    upstream: String,
    mut orders: watch::Receiver<Order>,
    passed: Arc<AtomicU64>,
) {
    let mut listener = Some(first);
    // Dropped with this task, and with them their connections.
    let mut relays = JoinSet::new();
    loop {
        let refuse = orders.borrow_and_update().fault == Fault::Refuse;
        if refuse {
            listener = None;
        } else if listener.is_none() {
            match listen(address) {
                Ok(again) => listener = Some(again),
                Err(error) => {
                    eprintln!("the proxy can't listen again, trying on: {error:#}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            }
        }
        tokio::select! {
            changed = orders.changed() => if changed.is_err() { return },
            accepted = async {
                match &listener {
                    Some(listener) => listener.accept().await,
                    None => std::future::pending().await,
                }
            } => if let Ok((client, _)) = accepted {
                relays.spawn(relay(client, upstream.clone(), orders.clone(), Arc::clone(&passed)));
            },
            Some(_) = relays.join_next(), if !relays.is_empty() => {}
        }
    }
}

/// One connection, until either side or an order ends it.
async fn relay(client: TcpStream, upstream: String, mut orders: watch::Receiver<Order>, passed: Arc<AtomicU64>) {
    let cuts = orders.borrow().cuts;
    let (up, down, mut opening) = (orders.clone(), orders.clone(), orders.clone());
    let work = async {
        if opening.wait_for(|order| order.fault != Fault::Hang).await.is_err() {
            return;
        }
        let Ok(server) = TcpStream::connect(&upstream).await else {
            return;
        };
        let (client_in, client_out) = client.into_split();
        let (server_in, server_out) = server.into_split();
        tokio::select! {
            () = pump(client_in, server_out, up, &passed) => {}
            () = pump(server_in, client_out, down, &passed) => {}
        }
    };
    tokio::select! {
        () = work => {}
        _ = orders.wait_for(|order| order.cuts != cuts || order.fault == Fault::Refuse) => {}
    }
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut orders: watch::Receiver<Order>, passed: &AtomicU64) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(read) => read,
        };
        let fault = match orders.wait_for(|order| order.fault != Fault::Hang).await {
            Ok(order) => order.fault,
            Err(_) => return,
        };
        if let Fault::Slow(wait) = fault {
            tokio::time::sleep(wait).await;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
        passed.fetch_add(read as u64, Ordering::Relaxed);
    }
}
