//! Asking the servers: where they are ([`Settings`]) the calls themselves ([`Api`]), and answers that go on ([`Lines`]), and servers that are away for a
//! while ([`Patience`]).

mod api;
mod patience;
mod settings;

pub use api::{Api, CallError, Lines, MAX_ROWS};
pub use patience::Patience;
pub use settings::{CliFile, FILE, SECRET_VARIABLE, Settings, data_dir, write_private};
