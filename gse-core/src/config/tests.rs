//! Layering, provenance, and every kind of mistake with its place.

use std::ffi::OsString;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Sample {
    runtime: RuntimeConfig,
    log: LogConfig,
    ops: OpsConfig,
    http: Http,
    apps: Vec<App>,
    store: SampleStore,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Http {
    listen: String,
    max_body_bytes: u32,
    ratio: f64,
}

impl Default for Http {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:28863".to_owned(),
            max_body_bytes: 1024,
            ratio: 0.5,
        }
    }
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct App {
    name: String,
    app_secret: String,
}

// Does not refuse unknown keys by itself, on purpose.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct SampleStore {
    url: String,
    password: String,
    password_file: Option<PathBuf>,
    depth: u16,
    tls: Option<SampleTls>,
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct SampleTls {
    cert: String,
}

impl Config for Sample {
    fn runtime(&self) -> &RuntimeConfig {
        &self.runtime
    }
    fn log(&self) -> &LogConfig {
        &self.log
    }
    fn ops(&self) -> &OpsConfig {
        &self.ops
    }
    fn validate(&self, problems: &mut Problems) {
        problems.check_listen("http.listen", &self.http.listen);
        problems.check_range("http.max_body_bytes", self.http.max_body_bytes.into(), 1, 1 << 20);
    }
}

struct Given {
    _dir: tempfile::TempDir,
    file: PathBuf,
}

fn given(text: &str) -> Given {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("gse_task.toml");
    std::fs::write(&file, text).unwrap();
    Given { _dir: dir, file }
}

fn load_all(text: &str, env: &[(&str, &str)], sets: &[&str]) -> Result<Loaded<Sample>, Vec<String>> {
    let given = given(text);
    let env = env
        .iter()
        .map(|(name, value)| (OsString::from(name), OsString::from(value)));
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    let dir = given.file.parent().unwrap().display().to_string() + "/";
    load_with("gse_task", Some(&given.file), &sets, env)
        .map_err(|errors| errors.to_string().lines().map(|line| line.replace(&dir, "")).collect())
}

fn errors(text: &str, env: &[(&str, &str)], sets: &[&str]) -> Vec<String> {
    load_all(text, env, sets).unwrap_err()
}

#[test]
fn nothing_given_means_defaults() {
    let loaded = load_with::<Sample>("gse_task", None, &[], []).unwrap();
    assert_eq!(loaded.config, Sample::default());
    assert_eq!(loaded.origin("http.listen"), Origin::Default);
}

#[test]
fn each_layer_covers_the_one_before() {
    let text = "[http]\nlisten = \"0.0.0.0:1\"\nmax_body_bytes = 7\nratio = 1\n";
    let env = [
        ("GSE_TASK__HTTP__MAX_BODY_BYTES", "8"),
        ("GSE_TASK__HTTP__RATIO", "2.5"),
        ("GSE_API__HTTP__LISTEN", "x"),
    ];
    let loaded = load_all(text, &env, &["http.ratio=3.5", "log.format=json"]).unwrap();
    assert_eq!(
        loaded.config.http,
        Http {
            listen: "0.0.0.0:1".to_owned(),
            max_body_bytes: 8,
            ratio: 3.5
        }
    );
    assert_eq!(loaded.config.log.format, LogFormat::Json);
    assert!(matches!(loaded.origin("http.listen"), Origin::File { line: 2, .. }));
    assert_eq!(
        loaded.origin("http.max_body_bytes"),
        Origin::Env("GSE_TASK__HTTP__MAX_BODY_BYTES".to_owned())
    );
    assert_eq!(loaded.origin("http.ratio"), Origin::Set);
    assert_eq!(loaded.origin("log.level"), Origin::Default);
}

#[test]
fn text_that_looks_like_a_number_is_text_where_text_is_wanted() {
    let loaded = load_all(
        "",
        &[("GSE_TASK__STORE__PASSWORD", "12345"), ("GSE_TASK__STORE__DEPTH", "12")],
        &["store.url=true"],
    )
    .unwrap();
    assert_eq!(loaded.config.store.password, "12345");
    assert_eq!(loaded.config.store.depth, 12);
    assert_eq!(loaded.config.store.url, "true");
}

#[test]
fn every_kind_of_mistake_is_reported_at_once_with_its_place() {
    let text = "\
colour = 1
[http]
lisetn = \"x\"
max_body_bytes = \"many\"
ratio = 0.1
[store]
dept = 1
depth = 70000
[log]
format = \"jsn\"
level = \"inof\"
[[apps]]
name = \"a\"
app_secret = 5
[runtime]
drain_timeout_ms = 0
";
    let found = errors(text, &[("GSE_TASK__HTTP__PORT", "1")], &["ops.listen=nowhere", "junk"]);
    let expected = [
        "gse_task.toml:1: colour is not a known key",
        "gse_task.toml:3: http.lisetn is not a known key; did you mean \"listen\"?",
        "gse_task.toml:4: http.max_body_bytes must be u32, not string \"many\"",
        "gse_task.toml:7: store.dept is not a known key; did you mean \"depth\"?",
        "gse_task.toml:8: store.depth is out of range",
        "gse_task.toml:10: log.format is \"jsn\"; it must be one of \"text\", \"json\"; did you mean \"json\"?",
        "gse_task.toml:14: apps.0.app_secret must be a string, not something else",
        "env GSE_TASK__HTTP__PORT: http.port is not a known key",
        "--set: \"junk\" is not of the form key=value",
    ];
    for expected in expected {
        assert!(
            found.iter().any(|line| line.starts_with(expected)),
            "missing {expected:?} in {found:#?}"
        );
    }
    // The malformed --set above leaves the configuration incomplete, so what it adds up to is not judged.
    assert_eq!(found.len(), expected.len(), "{found:#?}");
}

#[test]
fn what_validate_finds_is_placed_and_comes_with_the_rest() {
    let text = "[http]\nlisten = \"nowhere\"\nmax_body_bytes = 0\nratoi = 1\n[log]\nlevel = \"inof\"\n[runtime]\ndrain_timeout_ms = 0\n";
    let found = errors(
        text,
        &[("GSE_TASK__RUNTIME__WORKER_THREADS", "0")],
        &["ops.listen=nowhere"],
    );
    let expected = [
        "gse_task.toml:2: http.listen is \"nowhere\"",
        "gse_task.toml:3: http.max_body_bytes is 0; it must be between 1 and 1048576",
        "gse_task.toml:4: http.ratoi is not a known key; did you mean \"ratio\"?",
        "gse_task.toml:6: log.level holds \"inof\"",
        "gse_task.toml:8: runtime.drain_timeout_ms is 0",
        "env GSE_TASK__RUNTIME__WORKER_THREADS: runtime.worker_threads is 0",
        "--set: ops.listen is \"nowhere\"",
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (line, expected) in found.iter().zip(expected) {
        assert!(line.starts_with(expected), "{line:?} should start with {expected:?}");
    }
}

#[test]
fn a_value_that_is_refused_is_not_reported_a_second_time_by_validate() {
    let found = errors("[http]\nmax_body_bytes = \"0\"\nlisten = 5\n", &[], &[]);
    assert_eq!(found.len(), 2, "{found:#?}");
}

#[test]
fn broken_syntax_is_placed_and_what_follows_it_is_not_guessed_at() {
    let text = "[http]\nratoi = 1\nlisten = \n[stroe\nurl = \"x\"\n[log]\nlevel = = 3\n";
    let found = errors(text, &[("GSE_TASK__NOPE", "1")], &[]);
    assert!(
        found
            .iter()
            .any(|line| line.starts_with("gse_task.toml:2: http.ratoi is not a known key")),
        "{found:#?}"
    );
    assert!(
        found
            .iter()
            .any(|line| line.starts_with("gse_task.toml:3: not valid TOML: ")),
        "{found:#?}"
    );
    assert!(
        found
            .iter()
            .any(|line| line.starts_with("gse_task.toml:4: not valid TOML: ")),
        "{found:#?}"
    );
    assert!(
        found
            .iter()
            .any(|line| line.starts_with("gse_task.toml:7: not valid TOML: ")),
        "{found:#?}"
    );
    assert!(
        found
            .iter()
            .any(|line| line.starts_with("env GSE_TASK__NOPE: nope is not a known key")),
        "{found:#?}"
    );
    let about_keys = found
        .iter()
        .filter(|line| line.starts_with("gse_task.toml") && !line.contains("not valid TOML"))
        .count();
    assert_eq!(about_keys, 1, "{found:#?}");
}

#[test]
fn a_missing_field_and_a_duplicate_key_are_placed() {
    let found = errors("[http]\nratio = 1\nratio = 2\n", &[], &[]);
    assert!(
        found[0].starts_with("gse_task.toml:3: not valid TOML: duplicate key"),
        "{found:#?}"
    );
    let found = errors("\n[[apps]]\nname = \"a\"\n", &[], &[]);
    assert_eq!(found, ["gse_task.toml:2: apps.0.app_secret is missing"]);
}

#[test]
fn keys_nobody_reads_are_refused_also_where_the_type_would_ignore_them() {
    let found = errors("[store.tls]\ncert = \"x\"\ncerts = \"y\"\n", &[], &[]);
    assert_eq!(
        found,
        ["gse_task.toml:3: store.tls.certs is not a known key; did you mean \"cert\"?"]
    );
}

#[test]
fn what_nests_without_end_is_refused() {
    let deep = vec!["A"; 5000].join("__");
    let found = errors("", &[(&format!("GSE_TASK__{deep}"), "1")], &[]);
    assert!(
        found.iter().any(|line| line.contains("more than 32 levels")),
        "{found:#?}"
    );
    let deep = format!("a = {}", "[".repeat(100_000));
    assert!(
        errors(&deep, &[], &[])
            .iter()
            .any(|line| line.contains("not valid TOML"))
    );
    let value = format!("store.url={}", "[".repeat(100_000));
    assert!(load_all("", &[], &[&value]).is_ok(), "text that is no TOML is text");
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let error = load_with::<Sample>("gse_task", Some(Path::new("/nonexistent/gse.toml")), &[], [])
        .unwrap_err()
        .to_string();
    assert!(error.starts_with("/nonexistent/gse.toml: cannot be read"), "{error}");
    let given = given("");
    let dir = given.file.parent().unwrap();
    assert!(
        load_with::<Sample>("gse_task", Some(dir), &[], [])
            .unwrap_err()
            .to_string()
            .contains("is a directory")
    );
    std::fs::write(&given.file, b"a = \"\xff\"").unwrap();
    assert!(
        load_with::<Sample>("gse_task", Some(&given.file), &[], [])
            .unwrap_err()
            .to_string()
            .contains("not UTF-8")
    );
}

#[test]
fn a_secret_is_in_no_error() {
    let found = errors(
        "[[apps]]\nname = \"a\"\napp_secret = 991234\n[store]\npassword = [\"hunter2\"]\n",
        &[],
        &[],
    )
    .join("\n");
    assert!(!found.contains("991234") && !found.contains("hunter2"), "{found}");
}

#[test]
fn print_shows_values_with_their_origin_and_masks_secrets() {
    let text = "\
[store]
url = \"redis://:hunter2@127.0.0.1:6379/0\"
password = \"hunter3\"
password_file = \"/etc/gse/store.pw\"
[[apps]]
name = \"bk_job\"
app_secret = \"hunter4\"
";
    let loaded = load_all(text, &[("GSE_TASK__HTTP__RATIO", "0.25")], &["log.level=debug"]).unwrap();
    let printed = loaded.print().unwrap();
    assert!(!printed.contains("hunter"), "{printed}");
    for (start, end) in [
        ("url = \"redis://:***@127.0.0.1:6379/0\"  # ", "gse_task.toml:2"),
        ("password = \"***\"  # ", "gse_task.toml:3"),
        ("password_file = \"/etc/gse/store.pw\"  # ", "gse_task.toml:4"),
        ("ratio = 0.25  # ", "env GSE_TASK__HTTP__RATIO"),
        ("level = \"debug\"  # ", "--set"),
        ("listen = \"127.0.0.1:28863\"  # ", "default"),
        (
            "apps = [{ app_secret = \"***\", name = \"bk_job\" }]  # ",
            "gse_task.toml:5",
        ),
    ] {
        assert!(
            printed
                .lines()
                .any(|line| line.starts_with(start) && line.ends_with(end)),
            "no line {start}…{end} in\n{printed}"
        );
    }
    // What is printed is a configuration file again.
    let again: Sample = toml::from_str(&printed).unwrap();
    assert_eq!(again.http, loaded.config.http);
}

#[test]
fn an_environment_that_contradicts_itself_is_an_error() {
    let found = errors(
        "",
        &[
            ("GSE_TASK__HTTP", "1"),
            ("GSE_TASK__HTTP__LISTEN", "x:1"),
            ("GSE_TASK____X", "1"),
        ],
        &[],
    );
    assert!(
        found
            .iter()
            .any(|line| line.contains("GSE_TASK__HTTP__LISTEN: http is set to a value")),
        "{found:#?}"
    );
    assert!(
        found
            .iter()
            .any(|line| line.contains("GSE_TASK____X: \".x\" is not a key")),
        "{found:#?}"
    );
}
