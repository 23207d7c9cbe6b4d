//! Asking the servers: where they are ([`Settings`]) and the calls themselves ([`Api`]).

mod api;
mod settings;

pub use api::{Api, CallError, MAX_ROWS};
pub use settings::{CliFile, FILE, SECRET_VARIABLE, Settings, data_dir, write_private};
