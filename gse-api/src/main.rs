//! `gse_api`.

use std::process::ExitCode;

fn main() -> ExitCode {
    gse_core::process::main(gse_api::INFO, gse_api::run)
}
