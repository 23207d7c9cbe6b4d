//! Turning the layers into the typed configuration and finding every mistake on the way: the type's decoder stops at the first
//! one, so each value it refuses is noted, taken out, and the rest is tried again.

use figment::error::{Actual, Kind};
use figment::value::Value;

use super::layers::{Layers, dotted};
use super::source::join;
use super::{Config, ConfigErrors, Problem, is_secret};

/// No file has more mistakes than this worth telling at once.
const MAX_PROBLEMS: usize = 100;

/// The configuration with every refused value left out, or none if nothing can be made of it; the refused ones are in `errors`.
pub(super) fn extract<C: Config>(layers: &mut Layers, errors: &mut ConfigErrors) -> Option<C> {
    for _ in 0..MAX_PROBLEMS {
        let merged = match layers.merged::<C>().find_value("") {
            Ok(merged) => merged,
            Err(error) => {
                errors.push(Problem {
                    origin: super::Origin::Default,
                    key: None,
                    message: error.to_string(),
                });
                return None;
            }
        };
        let mut ignored = Vec::new();
        let outcome = serde_ignored::deserialize::<_, _, C>(&merged, |path| {
            // An optional table is shown with a step of its own.
            ignored.push(path.to_string().replace(".?", ""));
        });
        match outcome {
            Ok(config) => {
                // Types that do not refuse unknown keys by themselves have them refused here.
                for key in ignored {
                    note(layers, errors, &key, unknown_key(&key, &siblings(&merged, &key)));
                }
                return Some(config);
            }
            Err(error) => {
                if !step(layers, errors, &error) {
                    return None;
                }
            }
        }
    }
    None
}

/// Notes one refusal and takes the refused value out. False when there is nothing left to take out.
fn step(layers: &mut Layers, errors: &mut ConfigErrors, error: &figment::Error) -> bool {
    let key = dotted(&error.path);
    if let Kind::InvalidType(_, wanted) = &error.kind
        && wanted.contains("string")
        && layers.as_text(&key)
    {
        return true;
    }
    if let Kind::MissingField(field) = &error.kind {
        let missing = join(&key, field);
        // A value that was refused and taken out leaves a gap that is no news.
        if !errors.has_key(&missing) {
            note(layers, errors, &missing, "is missing".to_owned());
        }
        return layers.remove(&key);
    }
    let message = describe(&key, &error.kind);
    note(layers, errors, &key, message);
    layers.remove(&key)
}

fn note(layers: &Layers, errors: &mut ConfigErrors, key: &str, message: String) {
    if !layers.is_doubtful(key) {
        errors.push(Problem {
            origin: layers.origin(key),
            key: (!key.is_empty()).then(|| key.to_owned()),
            message,
        });
    }
}

fn describe(key: &str, kind: &Kind) -> String {
    // The value itself is not for the log when it is a secret.
    let shown = |actual: &Actual| {
        if is_secret(key) {
            "something else".to_owned()
        } else {
            actual.to_string()
        }
    };
    match kind {
        Kind::UnknownField(_, known) => unknown_key(key, known),
        Kind::InvalidType(actual, wanted) => format!("must be {wanted}, not {}", shown(actual)),
        Kind::InvalidValue(actual, wanted) => format!("is out of range: must be {wanted}, not {}", shown(actual)),
        Kind::InvalidLength(len, wanted) => format!("has {len} elements; must be {wanted}"),
        Kind::UnknownVariant(given, known) => {
            let list: Vec<String> = known.iter().map(|name| format!("\"{name}\"")).collect();
            format!(
                "is \"{given}\"; it must be one of {}{}",
                list.join(", "),
                did_you_mean(given, known)
            )
        }
        other => other.to_string(),
    }
}

fn unknown_key<S: AsRef<str>>(key: &str, known: &[S]) -> String {
    let name = key.rsplit('.').next().unwrap_or(key);
    let hint = did_you_mean(name, known);
    if hint.is_empty() && !known.is_empty() && known.len() <= 12 {
        let names: Vec<&str> = known.iter().map(AsRef::as_ref).collect();
        return format!("is not a known key; known here: {}", names.join(", "));
    }
    format!("is not a known key{hint}")
}

/// The names that stand beside `key` in `values`.
fn siblings(values: &Value, key: &str) -> Vec<String> {
    let (parent, name) = key.rsplit_once('.').unwrap_or(("", key));
    match values.find_ref(parent) {
        Some(Value::Dict(_, dict)) => dict.keys().filter(|other| *other != name).cloned().collect(),
        _ => Vec::new(),
    }
}

/// `; did you mean "x"?` for the closest of `known`, if one is close.
fn did_you_mean<S: AsRef<str>>(given: &str, known: &[S]) -> String {
    let limit = 1 + given.chars().count() / 4;
    known
        .iter()
        .map(|name| (distance(given, name.as_ref()), name.as_ref()))
        .min()
        .filter(|(distance, _)| *distance <= limit)
        .map_or_else(String::new, |(_, name)| format!("; did you mean \"{name}\"?"))
}

/// How many characters have to be added, dropped, replaced or swapped with their neighbour to make `b` of `a`.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let cost = usize::from(a[i - 1] != b[j - 1]);
            let mut best = (last[j] + 1).min(row[j - 1] + 1).min(last[j - 1] + cost);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(before[j - 2] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_counts_edits_and_swaps() {
        assert_eq!(distance("listen", "listen"), 0);
        assert_eq!(distance("lisetn", "listen"), 1);
        assert_eq!(distance("listn", "listen"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(did_you_mean("lsiten", &["listen", "tls"]), "; did you mean \"listen\"?");
        assert_eq!(did_you_mean("colour", &["listen", "tls"]), "");
    }
}
