//! The gse_alarm server.

use std::process::ExitCode;

use gse_core::process::{self, ServiceInfo};

fn main() -> ExitCode {
    let info = ServiceInfo {
        name: "gse_alarm",
        version: env!("CARGO_PKG_VERSION"),
        about: "Finds agents that are not heard any more and hands alarms about them to gse_data",
    };
    process::main(info, gse_alarm::run)
}
