//! The gse_data server.

use std::process::ExitCode;

use gse_core::process::{self, ServiceInfo};

// Memory of many threads and sizes, given back soon after a burst; see `.cargo/config.toml` for how soon.
#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let info = ServiceInfo {
        name: "gse_data",
        version: env!("CARGO_PKG_VERSION"),
        about: "Records of plugins: taken from agents, routed by data id, handed to sinks",
    };
    process::main(info, gse_data::run)
}
