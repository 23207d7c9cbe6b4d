//! `--print-config`: the values in force as TOML, each with where it came from, and nothing in it that must stay secret.

use serde::Serialize;
use toml::{Table, Value};

use super::layers::Layers;
use super::source::join;

const MASK: &str = "***";

/// Whether the value of `key` (or of something within it) must not be shown: its name ends in `password`, `secret`, `token` or
/// `key_text`.
pub fn is_secret(key: &str) -> bool {
    key.split('.').any(|name| {
        let name = name.to_ascii_lowercase();
        ["password", "secret", "token", "key_text"]
            .iter()
            .any(|end| name.ends_with(end))
    })
}

/// `text` with the password of a URL in it (`redis://user:password@host`) replaced by `***`; as it stands if it is no such URL.
pub fn mask_url(text: &str) -> String {
    let Some(scheme_end) = text.find("://") else {
        return text.to_owned();
    };
    let authority = scheme_end + 3;
    let end = text[authority..]
        .find(['/', '?', '#'])
        .map_or(text.len(), |at| authority + at);
    // The last @ of the text that could still be the authority's: a password may hold an unescaped one.
    let Some(at) = text[authority..end].rfind('@').or_else(|| text[authority..].rfind('@')) else {
        return text.to_owned();
    };
    let at = authority + at;
    match text[authority..at].find(':') {
        Some(colon) => format!("{}:{MASK}{}", &text[..authority + colon], &text[at..]),
        None => text.to_owned(),
    }
}

/// Renders `config`.
pub(super) fn print(config: &impl Serialize, layers: &Layers) -> anyhow::Result<String> {
    let mut table = Table::try_from(config)?;
    mask_table(&mut table, "");
    let mut out = String::new();
    render(&table, "", "", layers, &mut out);
    Ok(out)
}

fn mask_table(table: &mut Table, prefix: &str) {
    for (key, value) in table.iter_mut() {
        mask(value, &join(prefix, key));
    }
}

fn mask(value: &mut Value, path: &str) {
    match value {
        Value::Table(table) => mask_table(table, path),
        Value::Array(items) => items.iter_mut().for_each(|item| mask(item, path)),
        // An empty secret is one that was not given, which is worth seeing.
        Value::String(text) if text.is_empty() => {}
        scalar if is_secret(path) => *scalar = Value::String(MASK.to_owned()),
        Value::String(text) => *text = mask_url(text),
        _ => {}
    }
}

/// `path` is the table's dotted path as the layers know it, `header` the same as TOML writes it.
fn render(table: &Table, path: &str, header: &str, layers: &Layers, out: &mut String) {
    for (key, value) in table.iter().filter(|(_, value)| !value.is_table()) {
        let origin = layers.origin(&join(path, key));
        out.push_str(&format!("{} = {}  # {origin}\n", quoted(key), inline(value)));
    }
    for (key, value) in table.iter() {
        if let Value::Table(inner) = value {
            let header = join(header, &quoted(key));
            if !out.is_empty() {
                out.push('\n');
            }
            out.push_str(&format!("[{header}]\n"));
            render(inner, &join(path, key), &header, layers, out);
        }
    }
}

/// A key as TOML wants it: bare when it can be.
fn quoted(key: &str) -> String {
    let bare = !key.is_empty()
        && key
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
    if bare {
        key.to_owned()
    } else {
        Value::String(key.to_owned()).to_string()
    }
}

/// A value on one line.
fn inline(value: &Value) -> String {
    match value {
        Value::String(text) => one_line(text),
        Value::Array(items) => format!("[{}]", items.iter().map(inline).collect::<Vec<_>>().join(", ")),
        Value::Table(table) => {
            let pairs: Vec<String> = table
                .iter()
                .map(|(key, value)| format!("{} = {}", quoted(key), inline(value)))
                .collect();
            if pairs.is_empty() {
                "{}".to_owned()
            } else {
                format!("{{ {} }}", pairs.join(", "))
            }
        }
        scalar => scalar.to_string(),
    }
}

/// A text as a basic TOML string on one line, whatever it holds.
fn one_line(text: &str) -> String {
    let mut out = String::from("\"");
    for char in text.chars() {
        match char {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            control if control.is_control() => out.push_str(&format!("\\u{:04X}", u32::from(control))),
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_of_urls_are_masked() {
        assert_eq!(mask_url("redis://:hunter2@host:1/0"), "redis://:***@host:1/0");
        assert_eq!(mask_url("redis://user:hun@ter2@host"), "redis://user:***@host");
        assert_eq!(mask_url("redis://user:hun/ter2@host/0"), "redis://user:***@host/0");
        assert_eq!(mask_url("redis://host:1/0"), "redis://host:1/0");
        assert_eq!(mask_url("plain"), "plain");
    }

    #[test]
    fn secrets_are_known_by_the_end_of_their_name() {
        for key in [
            "store.password",
            "app_secret",
            "jwt.token",
            "gateway.public_key_text",
            "x.Secret.y",
        ] {
            assert!(is_secret(key), "{key}");
        }
        for key in ["store.password_file", "tokens_max", "http.listen"] {
            assert!(!is_secret(key), "{key}");
        }
    }
}
