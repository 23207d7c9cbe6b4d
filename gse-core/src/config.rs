//! How every process comes by its settings: defaults, then a TOML file, then the environment, then `--set`, each over the one
//! before.
//!
//! Everything that is wrong is reported together, with file and line, the environment variable or the option it came from. Keys
//! nobody knows are errors. What a setting means, and which values make sense, is said by each [`Config`] in its `validate`. The
//! command line itself is read by [`crate::process`].
//!
//! Environment: service `gse_task` reads `GSE_TASK__HTTP__LISTEN` as `http.listen`; two underscores separate levels, names are
//! lower-cased. Values of the environment and of `--set` are read as TOML when they can be (`8`, `true`, `["a"]`), else as text.

mod common;
mod layers;
mod print;
mod problems;
mod repair;
mod source;

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use common::{OpsConfig, RuntimeConfig};
pub use print::{is_secret, mask_url};
pub use problems::{ConfigErrors, Problem, Problems};
pub use source::Origin;

pub use crate::log::{LogConfig, LogFormat};

/// The configuration of one process. `Default` gives every key its default value; a key without one is an `Option` or is refused
/// by `validate` while it is empty.
pub trait Config: Serialize + DeserializeOwned + Default + Send + 'static {
    /// The `[runtime]` table.
    fn runtime(&self) -> &RuntimeConfig;
    /// The `[log]` table.
    fn log(&self) -> &LogConfig;
    /// The `[ops]` table.
    fn ops(&self) -> &OpsConfig;
    /// Takes a file that is no TOML but was written for another program, if this is such a one and its layout is known: what it says under
    /// the keys of this configuration. `None`: it is read as TOML.
    fn adopt(text: &str) -> Option<Result<Adopted, String>> {
        let _ = text;
        None
    }
    /// Says what is wrong with the values, under the key each belongs to. The three common tables are checked already.
    fn validate(&self, problems: &mut Problems);
}

/// What a file of another layout says (see [`Config::adopt`]).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Adopted {
    /// Its values, by this configuration's keys.
    pub values: toml::Table,
    /// What was made of each of its keys, for people.
    pub notes: Vec<String>,
}

/// A configuration that is in force, and where each of its values came from.
#[derive(Debug)]
pub struct Loaded<C> {
    /// The values.
    pub config: C,
    origins: layers::Layers,
}

impl<C: Config> Loaded<C> {
    /// Where the value of `key` (`http.listen`) came from.
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.origin(key)
    }

    /// What was made of a file of another layout, line by line; empty when the file is of ours.
    pub fn notes(&self) -> &[String] {
        self.origins.notes()
    }

    /// The values in force as TOML, each with a comment saying where it came from; secrets are masked.
    ///
    /// # Errors
    /// The configuration holds something TOML cannot express (a number above 2^63 - 1, say), which is a mistake of the program.
    pub fn print(&self) -> anyhow::Result<String> {
        print::print(&self.config, &self.origins)
    }
}

/// Loads the configuration of `service` from `file` (TOML), the process's environment and `sets` (`key=value`).
///
/// # Errors
/// All problems that were found, never only the first.
pub fn load<C: Config>(service: &str, file: Option<&Path>, sets: &[String]) -> Result<Loaded<C>, ConfigErrors> {
    load_with(service, file, sets, std::env::vars_os())
}

/// [`load`] with the environment passed in.
///
/// # Errors
/// As [`load`].
pub fn load_with<C: Config>(
    service: &str,
    file: Option<&Path>,
    sets: &[String],
    env: impl IntoIterator<Item = (std::ffi::OsString, std::ffi::OsString)>,
) -> Result<Loaded<C>, ConfigErrors> {
    let mut errors = ConfigErrors::default();
    let mut origins = layers::Layers::default();
    if let Some(path) = file {
        origins.read_file(path, C::adopt, &mut errors);
    }
    origins.read_env(service, env, &mut errors);
    origins.read_sets(sets, &mut errors);
    // Once the syntax is wrong the file's values are incomplete, and what they add up to says nothing.
    let whole = errors.is_empty();

    let config = repair::extract::<C>(&mut origins, &mut errors);
    if let Some(config) = config {
        if whole {
            let mut problems = Problems::default();
            common::validate(&config, &mut problems);
            config.validate(&mut problems);
            for (key, message) in problems.into_inner() {
                if !errors.has_key(&key) {
                    let origin = origins.origin(&key);
                    errors.push(Problem {
                        origin,
                        key: Some(key),
                        message,
                    });
                }
            }
        }
        if errors.is_empty() {
            return Ok(Loaded { config, origins });
        }
    }
    errors.sort();
    Err(errors)
}

#[cfg(test)]
mod tests;
