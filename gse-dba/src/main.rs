//! The process `gse_dba`.

use std::process::ExitCode;

use gse_core::process::{ServiceInfo, main as run};

fn main() -> ExitCode {
    let info = ServiceInfo {
        name: "gse_dba",
        version: env!("CARGO_PKG_VERSION"),
        about: "The front of the store over RESP",
    };
    run(info, gse_dba::run)
}
