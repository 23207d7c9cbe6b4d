//! The process `gse_dba`.

use std::process::ExitCode;

use gse_core::process::{ServiceInfo, main as run};

// Requests and replies are many small buffers that live for a moment.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let info = ServiceInfo {
        name: "gse_dba",
        version: env!("CARGO_PKG_VERSION"),
        about: "The front of the store over RESP",
    };
    run(info, gse_dba::run)
}
