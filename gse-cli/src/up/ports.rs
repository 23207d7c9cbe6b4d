//! Which addresses the servers of `gse up` listen on, and whether they are free. That is looked at before anything starts, so that
//! a newcomer reads one line and not the half-start of four servers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use anyhow::bail;

use crate::args::UpArgs;

/// Where to listen. Port 0 takes any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ports {
    /// The HTTP API.
    pub(super) api_http: SocketAddr,
    /// gse_task's own HTTP port.
    pub(super) task_http: SocketAddr,
    /// Agents.
    pub(super) agents: SocketAddr,
    /// Between the servers; always loopback.
    pub(super) internal: SocketAddr,
    /// Health and metrics of gse_task; always loopback.
    pub(super) task_ops: SocketAddr,
    /// Health and metrics of gse_api; always loopback.
    pub(super) api_ops: SocketAddr,
    /// Agents that move files.
    pub(super) file_link: SocketAddr,
    /// Agents, as members of swarms that gse_btsvr is one of.
    pub(super) file_peer: SocketAddr,
    /// gse_btsvr's own HTTP port.
    pub(super) file_http: SocketAddr,
    /// Between the servers, to gse_btsvr; always loopback.
    pub(super) file_internal: SocketAddr,
    /// Health and metrics of gse_btsvr; always loopback.
    pub(super) file_ops: SocketAddr,
    /// Records of agents.
    pub(super) data_link: SocketAddr,
    /// gse_data's own HTTP port.
    pub(super) data_http: SocketAddr,
    /// Between the servers, to gse_data; always loopback.
    pub(super) data_internal: SocketAddr,
    /// Health and metrics of gse_data; always loopback.
    pub(super) data_ops: SocketAddr,
    /// gse_procmgr's own HTTP port.
    pub(super) proc_http: SocketAddr,
    /// Between the servers, to gse_procmgr; always loopback.
    pub(super) proc_internal: SocketAddr,
    /// Health and metrics of gse_procmgr; always loopback.
    pub(super) proc_ops: SocketAddr,
}

/// Where gse_btsvr has its peers: usually, and counted from `--port-base`.
const PEERS: (u16, u16) = (10020, 40);

const USUAL: [u16; 17] = [
    28808, 28863, 28668, 48329, 29403, 29405, 28925, 28864, 48330, 29404, 28625, 59702, 48331, 29402, 52030, 52031,
    29406,
];

impl Ports {
    /// The addresses that the options mean.
    #[must_use]
    pub(super) fn of(args: &UpArgs) -> Self {
        let numbers = match (args.any_port, args.port_base) {
            (true, _) => [0; 17],
            (false, Some(base)) => {
                [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16].map(|n| base.saturating_add(n))
            }
            (false, None) => USUAL,
        };
        let [
            api_http,
            task_http,
            agents,
            internal,
            task_ops,
            api_ops,
            file_link,
            file_http,
            file_internal,
            file_ops,
            data_link,
            data_http,
            data_internal,
            data_ops,
            proc_http,
            proc_internal,
            proc_ops,
        ] = numbers;
        let file_peer = match (args.any_port, args.port_base) {
            (true, _) => 0,
            (false, Some(base)) => base.saturating_add(PEERS.1),
            (false, None) => PEERS.0,
        };
        let open = |port| SocketAddr::new(args.listen, port);
        let local = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        Self {
            api_http: open(api_http),
            task_http: open(task_http),
            agents: open(agents),
            internal: local(internal),
            task_ops: local(task_ops),
            api_ops: local(api_ops),
            file_link: open(file_link),
            file_peer: open(file_peer),
            file_http: open(file_http),
            file_internal: local(file_internal),
            file_ops: local(file_ops),
            data_link: open(data_link),
            data_http: open(data_http),
            data_internal: local(data_internal),
            data_ops: local(data_ops),
            proc_http: open(proc_http),
            proc_internal: local(proc_internal),
            proc_ops: local(proc_ops),
        }
    }

    fn named(&self) -> [(&'static str, SocketAddr); 17] {
        [
            ("the HTTP API", self.api_http),
            ("gse_task's HTTP", self.task_http),
            ("agents", self.agents),
            ("internal calls", self.internal),
            ("gse_task's metrics", self.task_ops),
            ("gse_api's metrics", self.api_ops),
            ("links of agents that move files", self.file_link),
            ("gse_btsvr's HTTP", self.file_http),
            ("internal calls of gse_btsvr", self.file_internal),
            ("gse_btsvr's metrics", self.file_ops),
            ("records of agents", self.data_link),
            ("gse_data's HTTP", self.data_http),
            ("internal calls of gse_data", self.data_internal),
            ("gse_data's metrics", self.data_ops),
            ("gse_procmgr's HTTP", self.proc_http),
            ("internal calls of gse_procmgr", self.proc_internal),
            ("gse_procmgr's metrics", self.proc_ops),
        ]
    }

    /// Looks whether all of them can be had.
    ///
    /// # Errors
    /// Names the first that cannot, and what to do.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let peers = ("gse_btsvr's peers", self.file_peer);
        for (what, addr) in self.named().into_iter().chain([peers]) {
            match TcpListener::bind(addr) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => bail!(
                    "{addr}, wanted for {what}, is in use: stop what listens there, or start with --any-port or --port-base PORT"
                ),
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
                    bail!(
                        "{} is no address of this host: {error}; say --listen with one that is",
                        addr.ip()
                    )
                }
                Err(error) => bail!("cannot listen on {addr} for {what}: {error}"),
            }
        }
        Ok(())
    }
}

/// The address by which this host itself reaches a listener: one that is bound to every address is reached over loopback.
#[must_use]
pub(super) fn reachable(bound: &str) -> String {
    match bound.parse::<SocketAddr>() {
        Ok(addr) if addr.ip().is_unspecified() => {
            let ip = if addr.is_ipv4() {
                IpAddr::V4(Ipv4Addr::LOCALHOST)
            } else {
                std::net::Ipv6Addr::LOCALHOST.into()
            };
            SocketAddr::new(ip, addr.port()).to_string()
        }
        _ => bound.to_owned(),
    }
}

/// Where agents on other hosts reach a listener that is bound to every address: the address this host has on the way out. `None`
/// when the listener's own address says it.
///
/// # Errors
/// No port is free.
pub(super) fn advertised(agents: SocketAddr) -> io::Result<Option<SocketAddr>> {
    if !agents.ip().is_unspecified() {
        return Ok(None);
    }
    // Nothing is sent by this: connecting a datagram socket only looks up the route (to addresses kept for documentation).
    let (any, out) = if agents.is_ipv4() {
        ("0.0.0.0:0", "192.0.2.1:9")
    } else {
        ("[::]:0", "[2001:db8::1]:9")
    };
    let looked = UdpSocket::bind(any).and_then(|socket| socket.connect(out).and_then(|()| socket.local_addr()));
    let ip = looked.map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |local| local.ip());
    let port = match agents.port() {
        0 => TcpListener::bind(agents)?.local_addr()?.port(),
        port => port,
    };
    Ok(Some(SocketAddr::new(ip, port)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    fn ports(args: &[&str]) -> Ports {
        let all = ["gse", "up"].iter().chain(args).copied();
        let Command::Up(up) = Cli::try_parse_from(all).unwrap().command else {
            panic!("not up")
        };
        Ports::of(&up)
    }

    #[test]
    fn usual_based_and_any() {
        let usual = ports(&[]);
        assert_eq!(usual.api_http.to_string(), "127.0.0.1:28808");
        assert_eq!(usual.internal.to_string(), "127.0.0.1:48329");
        let based = ports(&["--port-base", "4000", "--listen", "0.0.0.0"]);
        assert_eq!(based.api_http.to_string(), "0.0.0.0:4000");
        assert_eq!(based.internal.to_string(), "127.0.0.1:4003");
        assert_eq!(based.api_ops.to_string(), "127.0.0.1:4005");
        assert_eq!(ports(&["--any-port"]).agents.to_string(), "127.0.0.1:0");
        assert_eq!(based.file_ops.to_string(), "127.0.0.1:4009");
        assert_eq!(based.file_peer.to_string(), "0.0.0.0:4040");
        assert_eq!(usual.file_peer.to_string(), "127.0.0.1:10020");
        assert_eq!(based.data_ops.to_string(), "127.0.0.1:4013");
        assert_eq!(based.proc_ops.to_string(), "127.0.0.1:4016");
        assert!(Cli::try_parse_from(["gse", "up", "--port-base", "65496"]).is_err());
    }

    #[test]
    fn a_taken_port_is_named_with_the_way_out() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ports = ports(&["--any-port"]);
        ports.check().unwrap();
        ports.agents = taken.local_addr().unwrap();
        let error = ports.check().unwrap_err().to_string();
        assert!(
            error.contains(&ports.agents.to_string()) && error.contains("--any-port"),
            "{error}"
        );
    }

    #[test]
    fn agents_are_told_an_address_that_is_one() {
        assert_eq!(advertised("10.0.0.5:28668".parse().unwrap()).unwrap(), None);
        let told = advertised("0.0.0.0:28668".parse().unwrap()).unwrap().unwrap();
        assert!(!told.ip().is_unspecified() && told.port() == 28668, "{told}");
        let told = advertised("0.0.0.0:0".parse().unwrap()).unwrap().unwrap();
        assert!(!told.ip().is_unspecified() && told.port() != 0, "{told}");
    }

    #[test]
    fn a_wildcard_is_reached_over_loopback() {
        assert_eq!(reachable("0.0.0.0:1"), "127.0.0.1:1");
        assert_eq!(reachable("[::]:1"), "[::1]:1");
        assert_eq!(reachable("10.0.0.1:1"), "10.0.0.1:1");
        assert_eq!(reachable("unix:/x"), "unix:/x");
    }
}
