//! The layers a configuration is made of, in the order they cover each other, and which of them a value came from.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use figment::providers::Serialized;
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use serde::Serialize;

use super::source::{self, join};
use super::{Adopted, ConfigErrors, Origin, Problem};

/// Configuration files are read whole; nothing sensible is larger than this.
const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;

/// No key is deeper than this; what comes from outside must not recurse without a bound.
const MAX_LEVELS: usize = 32;

/// What was set, by whom. Defaults are not kept here: they come from the type.
#[derive(Debug, Default)]
pub(super) struct Layers {
    layers: Vec<Layer>,
    notes: Vec<String>,
}

/// The values one source gave.
#[derive(Debug)]
struct Layer {
    kind: Kind,
    values: Dict,
    /// For values that were given as text: that text, by key, to fall back on when text is what is wanted.
    raw: BTreeMap<String, String>,
}

#[derive(Debug)]
enum Kind {
    File {
        path: String,
        lines: BTreeMap<String, usize>,
        /// Nothing from this line on can be trusted: the syntax is wrong there.
        broken_at: Option<usize>,
    },
    Env {
        prefix: String,
    },
    Set,
}

impl Layers {
    /// See [`super::Loaded::notes`].
    pub(super) fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Adds the file at `path`: TOML, or what `adopt` takes.
    pub(super) fn read_file(
        &mut self,
        path: &Path,
        adopt: fn(&str) -> Option<Result<Adopted, String>>,
        errors: &mut ConfigErrors,
    ) {
        let name = path.display().to_string();
        let at = |line| Origin::File {
            path: name.clone(),
            line,
        };
        let text = match read_text(path) {
            Ok(text) => text,
            Err(reason) => {
                errors.push(Problem {
                    origin: at(0),
                    key: None,
                    message: reason,
                });
                return;
            }
        };
        if let Some(adopted) = adopt(&text) {
            let values = adopted.and_then(|adopted| {
                self.notes = adopted.notes;
                match Value::serialize(adopted.values) {
                    Ok(Value::Dict(_, values)) => Ok(values),
                    Ok(_) => Err("is no table".to_owned()),
                    Err(error) => Err(error.to_string()),
                }
            });
            match values {
                Ok(values) => self.layers.push(Layer {
                    kind: Kind::File {
                        path: name,
                        lines: BTreeMap::new(),
                        broken_at: None,
                    },
                    values,
                    raw: BTreeMap::new(),
                }),
                Err(message) => errors.push(Problem {
                    origin: at(0),
                    key: None,
                    message,
                }),
            }
            return;
        }
        let parsed = source::parse(&text);
        let broken_at = parsed.errors.iter().map(|(line, _)| *line).min();
        for (line, message) in parsed.errors {
            errors.push(Problem {
                origin: at(line),
                key: None,
                message: format!("not valid TOML: {message}"),
            });
        }
        let kind = Kind::File {
            path: name,
            lines: parsed.lines,
            broken_at,
        };
        self.layers.push(Layer {
            kind,
            values: parsed.values,
            raw: BTreeMap::new(),
        });
    }

    /// Adds the variables that belong to `service`.
    pub(super) fn read_env(
        &mut self,
        service: &str,
        env: impl IntoIterator<Item = (OsString, OsString)>,
        errors: &mut ConfigErrors,
    ) {
        let prefix = format!("{}__", service.to_uppercase().replace('-', "_"));
        let mut layer = Layer {
            kind: Kind::Env { prefix: prefix.clone() },
            values: Dict::new(),
            raw: BTreeMap::new(),
        };
        let mut mine: Vec<(String, OsString)> = env
            .into_iter()
            .filter_map(|(name, value)| {
                let name = name.to_string_lossy();
                name.strip_prefix(&prefix).map(|rest| (rest.to_owned(), value))
            })
            .collect();
        mine.sort();
        for (name, value) in mine {
            let origin = || Origin::Env(format!("{prefix}{name}"));
            let key = name.to_lowercase().replace("__", ".");
            let Some(text) = value.to_str() else {
                errors.push(Problem {
                    origin: origin(),
                    key: None,
                    message: "is not valid UTF-8".to_owned(),
                });
                continue;
            };
            if let Err(message) = layer.set(&key, text) {
                errors.push(Problem {
                    origin: origin(),
                    key: None,
                    message,
                });
            }
        }
        self.layers.push(layer);
    }

    /// Adds what `--set key=value` gave, later ones over earlier ones.
    pub(super) fn read_sets(&mut self, sets: &[String], errors: &mut ConfigErrors) {
        let mut layer = Layer {
            kind: Kind::Set,
            values: Dict::new(),
            raw: BTreeMap::new(),
        };
        for set in sets {
            let done = match set.split_once('=') {
                Some((key, value)) => layer.set(key.trim(), value),
                None => Err(format!("\"{set}\" is not of the form key=value")),
            };
            if let Err(message) = done {
                errors.push(Problem {
                    origin: Origin::Set,
                    key: None,
                    message,
                });
            }
        }
        self.layers.push(layer);
    }

    /// The layers over `defaults`, merged.
    pub(super) fn merged<C: Serialize + Default>(&self) -> Figment {
        self.layers
            .iter()
            .fold(Figment::from(Serialized::defaults(C::default())), |merged, layer| {
                merged.merge(layer)
            })
    }

    /// The topmost layer that has something at `key`, or at a table around it.
    fn owner(&self, key: &str) -> Option<&Layer> {
        self.layers
            .iter()
            .rev()
            .find(|layer| lookup(&layer.values, key).is_some())
    }

    /// Where the value at `key` came from.
    pub(super) fn origin(&self, key: &str) -> Origin {
        match self.owner(key) {
            Some(layer) => layer.kind.origin(key),
            None => Origin::Default,
        }
    }

    /// Whether the value at `key` stands in a part of the file where the syntax is broken.
    pub(super) fn is_doubtful(&self, key: &str) -> bool {
        match self.owner(key).map(|layer| &layer.kind) {
            Some(Kind::File {
                broken_at: Some(broken),
                lines,
                ..
            }) => line_of(lines, key) >= *broken,
            _ => false,
        }
    }

    /// Takes the value at `key` out of the topmost layer that has it. False if no layer has it.
    pub(super) fn remove(&mut self, key: &str) -> bool {
        self.layers.iter_mut().rev().any(|layer| remove(&mut layer.values, key))
    }

    /// Makes the value at `key` the text it was given as, when the environment or `--set` gave it. False if it is text already.
    pub(super) fn as_text(&mut self, key: &str) -> bool {
        let Some(layer) = self
            .layers
            .iter_mut()
            .rev()
            .find(|layer| lookup(&layer.values, key).is_some())
        else {
            return false;
        };
        let Some(text) = layer.raw.remove(key) else {
            return false;
        };
        insert(&mut layer.values, key, Value::from(text)).is_ok()
    }
}

impl Layer {
    /// Sets a dotted key from text.
    fn set(&mut self, key: &str, text: &str) -> Result<(), String> {
        if key.split('.').any(str::is_empty) {
            return Err(format!("\"{key}\" is not a key; write names separated by dots"));
        }
        if key.split('.').count() > MAX_LEVELS {
            return Err(format!("the key has more than {MAX_LEVELS} levels"));
        }
        insert(&mut self.values, key, source::parse_value(text))?;
        self.raw.insert(key.to_owned(), text.to_owned());
        Ok(())
    }
}

impl Kind {
    fn origin(&self, key: &str) -> Origin {
        match self {
            Self::File { path, lines, .. } => Origin::File {
                path: path.clone(),
                line: line_of(lines, key),
            },
            Self::Env { prefix } => Origin::Env(format!("{prefix}{}", key.to_uppercase().replace('.', "__"))),
            Self::Set => Origin::Set,
        }
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::default()
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

/// The line of `key`, or of the nearest thing around it that has one.
fn line_of(lines: &BTreeMap<String, usize>, key: &str) -> usize {
    let mut path = key;
    loop {
        if let Some(line) = lines.get(path) {
            return *line;
        }
        match path.rsplit_once('.') {
            Some((parent, _)) => path = parent,
            None => return 0,
        }
    }
}

/// The value at `key`; an array on the way answers for its elements.
fn lookup<'v>(values: &'v Dict, key: &str) -> Option<&'v Value> {
    match key.split_once('.') {
        None => values.get(key),
        Some((first, rest)) => match values.get(first)? {
            Value::Dict(_, inner) => lookup(inner, rest),
            other => Some(other),
        },
    }
}

fn insert(values: &mut Dict, key: &str, value: Value) -> Result<(), String> {
    match key.split_once('.') {
        None => {
            values.insert(key.to_owned(), value);
            Ok(())
        }
        Some((first, rest)) => {
            let inner = values
                .entry(first.to_owned())
                .or_insert_with(|| Value::from(Dict::new()));
            match inner {
                Value::Dict(_, inner) => insert(inner, rest, value),
                _ => Err(format!("{first} is set to a value and, with {rest}, used as a table")),
            }
        }
    }
}

/// Removes the value at `key`. Elements of an array go with the whole array, for the others would change their index.
fn remove(values: &mut Dict, key: &str) -> bool {
    match key.split_once('.') {
        None => values.remove(key).is_some(),
        Some((first, rest)) => {
            let found = match values.get_mut(first) {
                None => return false,
                Some(Value::Dict(_, inner)) => remove(inner, rest),
                Some(Value::Array(_, items)) => return remove_in_array(items, rest) || values.remove(first).is_some(),
                Some(_) => return values.remove(first).is_some(),
            };
            if matches!(values.get(first), Some(Value::Dict(_, inner)) if inner.is_empty()) {
                values.remove(first);
            }
            found
        }
    }
}

fn remove_in_array(items: &mut [Value], key: &str) -> bool {
    let Some((index, rest)) = key.split_once('.') else {
        return false;
    };
    match index.parse::<usize>().ok().and_then(|index| items.get_mut(index)) {
        Some(Value::Dict(_, inner)) => remove(inner, rest),
        Some(Value::Array(_, inner)) => remove_in_array(inner, rest),
        _ => false,
    }
}

fn read_text(path: &Path) -> Result<String, String> {
    let size = std::fs::metadata(path).map_err(|error| format!("cannot be read: {error}"))?;
    if size.is_dir() {
        return Err("is a directory, not a configuration file".to_owned());
    }
    if size.len() > MAX_FILE_BYTES {
        return Err(format!(
            "is larger than {MAX_FILE_BYTES} bytes, which no configuration is"
        ));
    }
    let bytes = std::fs::read(path).map_err(|error| format!("cannot be read: {error}"))?;
    String::from_utf8(bytes).map_err(|error| format!("is not UTF-8 text (byte {})", error.utf8_error().valid_up_to()))
}

/// The dotted path of `keys`.
pub(super) fn dotted(keys: &[String]) -> String {
    keys.iter().fold(String::new(), |path, key| join(&path, key))
}
