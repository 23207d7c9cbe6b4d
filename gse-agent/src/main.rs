//! `gse_agent`.

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::current_exe() {
        Ok(exe) => gse_agent::main(std::env::args_os(), vec![exe.into_os_string()]),
        Err(error) => {
            eprintln!("gse_agent: cannot find its own executable: {error}");
            ExitCode::FAILURE
        }
    }
}
