//! The gse_syncdata server.

use std::process::ExitCode;

use gse_core::process::{self, ServiceInfo};

fn main() -> ExitCode {
    let info = ServiceInfo {
        name: "gse_syncdata",
        version: env!("CARGO_PKG_VERSION"),
        about: "Host identity: from CMDB, a directory or a call to a file on each host",
    };
    process::main(info, gse_syncdata::run)
}
