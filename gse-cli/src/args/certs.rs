//! The command line of `gse certs`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

pub(super) const CERTS_EXAMPLES: &str = "Examples:
  gse certs --dir /etc/gse/tls init                  the authority: gseca.crt, gseca.key
  gse certs --dir /etc/gse/tls server --name gse1    gse_server.crt, gse_server.key
  gse certs --dir /etc/gse/tls agent 0:10.0.0.1      a directory to copy to that host
  gse certs --dir /etc/gse/tls api-client            gse_api_client.crt, gse_api_client.key";

/// `gse certs`.
#[derive(Debug, Args)]
pub struct CertsArgs {
    /// Directory of the authority and of what it issues [default: tls in the data directory of gse up]
    #[arg(long, value_name = "DIR", global = true)]
    pub dir: Option<PathBuf>,
    /// Days a new certificate is valid
    #[arg(long, value_name = "N", global = true)]
    pub days: Option<u32>,
    /// Replace files that exist
    #[arg(long, global = true)]
    pub force: bool,
    /// What to make.
    #[command(subcommand)]
    pub what: CertsCommand,
}

/// What `gse certs` makes.
#[derive(Debug, Subcommand)]
pub enum CertsCommand {
    /// The authority that issues all the others
    Init,
    /// The certificate of one agent, in a directory of its own with the authority's certificate
    Agent {
        /// Id of the agent, in either form
        #[arg(required_unless_present = "shared")]
        id: Option<String>,
        /// One certificate for a whole fleet; servers take it only when told so
        #[arg(long, conflicts_with = "id")]
        shared: bool,
    },
    /// The certificate of servers
    Server {
        /// Host name or address to put into it, for HTTPS; repeatable
        #[arg(long, value_name = "NAME")]
        name: Vec<String>,
    },
    /// The certificate of a client of the internal API
    ApiClient {
        /// Name of the client
        name: Option<String>,
    },
    /// The certificate of an operator
    Operator {
        /// Name of the operator
        name: Option<String>,
    },
}
