//! The gse_btsvr server.

use std::process::ExitCode;

use gse_core::process::{self, ServiceInfo};

fn main() -> ExitCode {
    let info = ServiceInfo {
        name: "gse_btsvr",
        version: env!("CARGO_PKG_VERSION"),
        about: "File transfers: from content in a call or from any agent to any number of agents",
    };
    process::main(info, gse_btsvr::run)
}
