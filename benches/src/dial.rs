//! Connections of many simulated hosts from one machine: source addresses spread over 127.0.0.0/8.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpSocket, TcpStream};

/// Connections to one server that share a source address: far below what a range of ports holds (28,000), and below the 4,000 from
/// which on the search for a free one begins to show.
const AN_ADDRESS: u32 = 500;

/// Source address of agent `index`.
fn source(index: u32) -> Ipv4Addr {
    let [_, _, high, low] = (index / AN_ADDRESS).to_be_bytes();
    Ipv4Addr::new(127, high.saturating_add(1), low, 1)
}

/// A connection of agent `index`.
///
/// # Errors
/// When there is none.
pub(crate) async fn from_spread(server: SocketAddr, index: u32) -> Result<TcpStream> {
    let tcp = if server.ip().is_loopback() && server.is_ipv4() {
        let socket = TcpSocket::new_v4()?;
        // Without it every bind searches the whole port table, and the harness measures itself.
        setsockopt(&socket, sockopt::IpBindAddressNoPort, &true).context("IP_BIND_ADDRESS_NO_PORT")?;
        socket.bind((IpAddr::V4(source(index)), 0).into())?;
        socket.connect(server).await
    } else {
        TcpStream::connect(server).await
    };
    let tcp = tcp.with_context(|| format!("cannot connect to {server}"))?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn no_address_has_more_than_its_share() {
        let mut shares: HashMap<Ipv4Addr, u32> = HashMap::new();
        for index in 0..1_000_000 {
            let address = source(index);
            assert!(address.is_loopback());
            *shares.entry(address).or_default() += 1;
        }
        assert!(shares.values().all(|n| *n <= 4_000), "{shares:?}");
    }
}
