//! The gse_task server.

use std::process::ExitCode;

use gse_core::process::{self, ServiceInfo};

fn main() -> ExitCode {
    let info = ServiceInfo {
        name: "gse_task",
        version: env!("CARGO_PKG_VERSION"),
        about: "Agent sessions, script fan-out and results",
    };
    process::main(info, gse_task::run)
}
