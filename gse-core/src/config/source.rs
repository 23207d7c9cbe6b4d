//! Reading one TOML text: its values, and the line each key stands on.

use std::collections::BTreeMap;
use std::fmt;

use figment::value::{Dict, Value};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Where a value came from. Ordered by precedence, then by line.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// The configuration file; the line counts from 1, 0 when it is about the file as a whole.
    File {
        /// The file's name as it was given.
        path: String,
        /// The line, from 1.
        line: usize,
    },
    /// This environment variable.
    Env(String),
    /// The `--set` option.
    Set,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line: 0 } => f.write_str(path),
            Self::File { path, line } => write!(f, "{path}:{line}"),
            Self::Env(name) => write!(f, "env {name}"),
            Self::Set => f.write_str("--set"),
        }
    }
}

/// What a TOML text holds.
#[derive(Debug, Default)]
pub(super) struct Parsed {
    pub(super) values: Dict,
    /// The line of every key, by its dotted path; elements of arrays by their index.
    pub(super) lines: BTreeMap<String, usize>,
    /// Line and message of what does not parse.
    pub(super) errors: Vec<(usize, String)>,
}

/// Parses `text`, as much of it as can be.
pub(super) fn parse(text: &str) -> Parsed {
    let starts = LineStarts::of(text);
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut parsed = Parsed::default();
    for error in &errors {
        let line = error.span().map_or(0, |span| starts.line(span.start));
        parsed.errors.push((line, error.message().to_owned()));
    }
    parsed.values = dict(table.get_ref(), "", &starts, &mut parsed.lines, &mut parsed.errors);
    parsed
}

/// Reads the text of an environment variable or of `--set`: as a TOML value when it is one, else as it stands.
pub(super) fn parse_value(text: &str) -> Value {
    let as_text = || Value::from(text);
    match DeValue::parse(text.trim()) {
        Ok(value) => {
            let mut errors = Vec::new();
            let value = convert(&value, "", &LineStarts::of(text), &mut BTreeMap::new(), &mut errors);
            if errors.is_empty() { value } else { as_text() }
        }
        Err(_) => as_text(),
    }
}

fn dict(
    table: &DeTable<'_>,
    prefix: &str,
    starts: &LineStarts,
    lines: &mut BTreeMap<String, usize>,
    errors: &mut Vec<(usize, String)>,
) -> Dict {
    let mut dict = Dict::new();
    for (key, value) in table {
        let path = join(prefix, key.get_ref());
        lines.insert(path.clone(), starts.line(key.span().start));
        dict.insert(
            key.get_ref().clone().into_owned(),
            convert(value, &path, starts, lines, errors),
        );
    }
    dict
}

fn convert(
    value: &Spanned<DeValue<'_>>,
    path: &str,
    starts: &LineStarts,
    lines: &mut BTreeMap<String, usize>,
    errors: &mut Vec<(usize, String)>,
) -> Value {
    match value.get_ref() {
        DeValue::String(text) => Value::from(text.as_ref()),
        DeValue::Boolean(flag) => Value::from(*flag),
        DeValue::Datetime(time) => Value::from(time.to_string()),
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Value::from(number),
            Err(_) => {
                errors.push((
                    starts.line(value.span().start),
                    format!("{number} does not fit into 64 bits"),
                ));
                Value::from(0)
            }
        },
        DeValue::Float(number) => match number.as_str().parse::<f64>() {
            Ok(number) => Value::from(number),
            Err(_) => {
                errors.push((starts.line(value.span().start), format!("{number} is not a number")));
                Value::from(0.0)
            }
        },
        DeValue::Array(items) => {
            let mut list = Vec::new();
            for (index, item) in items.iter().enumerate() {
                let path = join(path, &index.to_string());
                lines.insert(path.clone(), starts.line(item.span().start));
                list.push(convert(item, &path, starts, lines, errors));
            }
            Value::from(list)
        }
        DeValue::Table(table) => Value::from(dict(table, path, starts, lines, errors)),
    }
}

/// `a` and `b` as `a.b`.
pub(super) fn join(prefix: &str, key: &str) -> String {
    if prefix.is_empty() {
        key.to_owned()
    } else {
        format!("{prefix}.{key}")
    }
}

struct LineStarts(Vec<usize>);

impl LineStarts {
    fn of(text: &str) -> Self {
        Self(
            std::iter::once(0)
                .chain(text.match_indices('\n').map(|(at, _)| at + 1))
                .collect(),
        )
    }

    /// The line, from 1, that the byte at `offset` stands on.
    fn line(&self, offset: usize) -> usize {
        self.0.partition_point(|start| *start <= offset)
    }
}
