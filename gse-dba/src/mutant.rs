//! `gse_dba` with the faults that tests must find (feature `mutants`). Never installed.

use std::process::ExitCode;

use gse_core::process::{ServiceInfo, main as run};

fn main() -> ExitCode {
    let info = ServiceInfo {
        name: "gse_dba",
        version: env!("CARGO_PKG_VERSION"),
        about: "The front of the store over RESP, with faults on purpose",
    };
    run(info, gse_dba::run)
}
