//! What is wrong with a configuration, collected so that a person sees all of it at once.

use std::fmt;

use super::Origin;

/// Collects what [`super::Config::validate`] finds wrong.
#[derive(Debug, Default)]
pub struct Problems {
    found: Vec<(String, String)>,
}

impl Problems {
    /// Adds a problem of the value at `key` (`http.listen`); the message goes on from the key's name ("must be above 0").
    pub fn push(&mut self, key: impl Into<String>, message: impl Into<String>) {
        self.found.push((key.into(), message.into()));
    }

    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Adds a problem unless `listen` has the form `host:port`. Names are not resolved here.
    pub fn check_listen(&mut self, key: &str, listen: &str) {
        let well_formed = listen.rsplit_once(':').is_some_and(|(host, port)| {
            let bare_v6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
            !host.is_empty() && !bare_v6 && port.parse::<u16>().is_ok()
        });
        if !well_formed {
            self.push(
                key,
                format!(
                    "is \"{listen}\"; it must be an address and a port, such as \"127.0.0.1:8080\" or \"[::]:8080\""
                ),
            );
        }
    }

    /// Adds a problem unless `min <= value <= max`.
    pub fn check_range(&mut self, key: &str, value: u64, min: u64, max: u64) {
        if !(min..=max).contains(&value) {
            self.push(key, format!("is {value}; it must be between {min} and {max}"));
        }
    }

    /// What was found, as (key, message).
    pub fn into_inner(self) -> Vec<(String, String)> {
        self.found
    }
}

/// One thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// Where the value stands.
    pub origin: Origin,
    /// The key, when it is a key that is wrong.
    pub key: Option<String>,
    /// What is wrong with it.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.origin != Origin::Default {
            write!(f, "{}: ", self.origin)?;
        }
        match &self.key {
            Some(key) => write!(f, "{key} {}", self.message),
            None => f.write_str(&self.message),
        }
    }
}

/// Everything that is wrong with a configuration; displayed as one line per problem.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ConfigErrors {
    problems: Vec<Problem>,
}

impl ConfigErrors {
    /// The problems, in the order of the file.
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    pub(super) fn push(&mut self, problem: Problem) {
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.problems.is_empty()
    }

    /// Whether `key`, or a table it is in, is known to be wrong.
    pub(super) fn has_key(&self, key: &str) -> bool {
        self.problems
            .iter()
            .filter_map(|problem| problem.key.as_deref())
            .any(|known| key == known || key.strip_prefix(known).is_some_and(|rest| rest.starts_with('.')))
    }

    pub(super) fn sort(&mut self) {
        self.problems
            .sort_by(|a, b| (&a.origin, &a.key).cmp(&(&b.origin, &b.key)));
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
