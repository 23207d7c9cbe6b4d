//! The specification of a process as a call has it: from a file, from options, or from both.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use serde_json::{Map, Value, json};

use crate::args::{AutoType, SpecArgs};

/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 1024 * 1024;

/// Puts the specification together; none when nothing was said about it, so that the one that is registered holds.
///
/// # Errors
/// The file can't be read or is no JSON object.
pub fn read(args: &SpecArgs, user: &str) -> anyhow::Result<Option<Value>> {
    let text = args.spec.as_deref().map(text).transpose()?;
    of(args, text.as_deref(), user)
}

fn text(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().lock().take(MAX_FILE + 1).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_string(&mut text))
    };
    read.with_context(|| format!("cannot read the specification {}", path.display()))?;
    if text.len() as u64 > MAX_FILE {
        bail!("the specification {} has more than {MAX_FILE} bytes", path.display());
    }
    Ok(text)
}

/// The file's text with the options above it.
fn of(args: &SpecArgs, text: Option<&str>, user: &str) -> anyhow::Result<Option<Value>> {
    let mut spec = match text {
        None => Map::new(),
        Some(text) => {
            let whole: Value = serde_json::from_str(text).context("the specification is not JSON")?;
            match whole {
                // A whole element of a call is as good.
                Value::Object(mut whole) => match whole.remove("spec") {
                    Some(Value::Object(spec)) => spec,
                    Some(_) => bail!("\"spec\" in the specification is not a JSON object"),
                    None => whole,
                },
                _ => bail!("the specification is not a JSON object"),
            }
        }
    };
    let text = |value: &Option<String>| value.as_deref().map(Value::from);
    let number = |value: Option<u32>| value.map(Value::from);
    let auto_type = args.auto_type.map(|kind| match kind {
        AutoType::Periodic => json!(0),
        AutoType::Resident => json!(1),
        AutoType::Once => json!(2),
    });
    // The two names of this part mean the same.
    let policy = ["alive_monitor_policy", "monitor_policy"]
        .into_iter()
        .find(|name| spec.get(*name).is_some_and(|value| !value.is_null()))
        .unwrap_or("alive_monitor_policy");
    let parts = [
        ("identity", "proc_name", text(&args.proc_name)),
        ("identity", "setup_path", text(&args.setup_path)),
        ("identity", "pid_path", text(&args.pid_path)),
        ("identity", "user", text(&args.user)),
        ("control", "start_cmd", text(&args.start_cmd)),
        ("control", "stop_cmd", text(&args.stop_cmd)),
        ("control", "restart_cmd", text(&args.restart_cmd)),
        ("control", "reload_cmd", text(&args.reload_cmd)),
        ("control", "kill_cmd", text(&args.kill_cmd)),
        ("control", "version_cmd", text(&args.version_cmd)),
        ("control", "health_cmd", text(&args.health_cmd)),
        ("resource", "cpu", args.cpu.map(Value::from)),
        ("resource", "mem", args.mem.map(Value::from)),
        (policy, "auto_type", auto_type),
        (policy, "start_check_secs", number(args.start_check)),
        (policy, "stop_check_secs", number(args.stop_check)),
        (policy, "start_retries", number(args.start_retries)),
        (policy, "start_interval", number(args.start_interval)),
        (policy, "op_timeout", number(args.op_timeout)),
    ];
    for (part, key, value) in parts {
        if let Some(value) = value {
            part_of(&mut spec, part)?.insert(key.to_owned(), value);
        }
    }
    if spec.is_empty() {
        return Ok(None);
    }
    let identity = part_of(&mut spec, "identity")?;
    if identity.get("user").and_then(Value::as_str).is_none_or(str::is_empty) {
        identity.insert("user".to_owned(), user.into());
    }
    part_of(&mut spec, "control")?;
    Ok(Some(Value::Object(spec)))
}

fn part_of<'a>(spec: &'a mut Map<String, Value>, name: &str) -> anyhow::Result<&'a mut Map<String, Value>> {
    let part = spec.entry(name).or_insert_with(|| json!({}));
    if part.is_null() {
        *part = json!({});
    }
    match part {
        Value::Object(part) => Ok(part),
        _ => bail!("\"{name}\" in the specification is not a JSON object"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> SpecArgs {
        SpecArgs {
            proc_name: Some("nginx".into()),
            cpu: Some(12.5),
            auto_type: Some(AutoType::Once),
            start_retries: Some(0),
            ..SpecArgs::default()
        }
    }

    #[test]
    fn nothing_said_is_no_specification() {
        assert_eq!(of(&SpecArgs::default(), None, "root").unwrap(), None);
        assert_eq!(of(&SpecArgs::default(), Some("{}"), "root").unwrap(), None);
    }

    #[test]
    fn options_stand_above_the_file() {
        let file = r#"{"identity": {"proc_name": "x", "setup_path": "/opt", "user": "app"}, "control": null,
            "monitor_policy": {"auto_type": 1, "op_timeout": 9}, "other": 1}"#;
        let spec = of(&options(), Some(file), "root").unwrap().unwrap();
        let wanted = json!({
            "identity": {"proc_name": "nginx", "setup_path": "/opt", "user": "app"},
            "control": {},
            "resource": {"cpu": 12.5},
            "monitor_policy": {"auto_type": 2, "op_timeout": 9, "start_retries": 0},
            "other": 1,
        });
        assert_eq!(spec, wanted);
        let element = format!(r#"{{"meta": {{}}, "spec": {file}}}"#);
        assert_eq!(of(&options(), Some(&element), "root").unwrap().unwrap(), wanted);
        let spec = of(&options(), None, "me").unwrap().unwrap();
        assert_eq!(spec["identity"], json!({"proc_name": "nginx", "user": "me"}));
        assert_eq!(spec["alive_monitor_policy"]["auto_type"], 2);
    }

    #[test]
    fn files_that_are_none_are_refused() {
        for wrong in [
            "",
            "[]",
            "7",
            r#"{"spec": 1}"#,
            r#"{"identity": []}"#,
            r#"{"identity": "x"}"#,
        ] {
            let error = of(&options(), Some(wrong), "root").unwrap_err().to_string();
            assert!(error.contains("specification"), "{wrong}: {error}");
        }
        let error = text(Path::new("/no/such/file")).unwrap_err().to_string();
        assert!(error.contains("/no/such/file"), "{error}");
    }
}
