//! The gse_procmgr server.

use std::process::ExitCode;

use gse_core::process::{self, ServiceInfo};

fn main() -> ExitCode {
    let info = ServiceInfo {
        name: "gse_procmgr",
        version: env!("CARGO_PKG_VERSION"),
        about: "Processes: what is registered on which host, operations on them, their last known states",
    };
    process::main(info, gse_procmgr::run)
}
