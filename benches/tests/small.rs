//! The harness against the real programs on a small scale: it completes, every row comes back and succeeds, and nothing is dispatched
//! twice. Times and costs are not judged.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn programs() -> &'static Path {
    static BUILT: std::sync::Once = std::sync::Once::new();
    let dir = Path::new(env!("CARGO_BIN_EXE_gse-benches"))
        .parent()
        .expect("a program is in a directory");
    BUILT.call_once(|| {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        build.args([
            "build", "--quiet", "--bins", "-p", "gse-task", "-p", "gse-dba", "-p", "gse-api",
        ]);
        build.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        if dir.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo").success(), "the programs do not build");
    });
    dir
}

fn bench(args: &[&str]) -> Value {
    let done = Command::new(env!("CARGO_BIN_EXE_gse-benches"))
        .args(args)
        .args(["--json", "--programs"])
        .arg(programs())
        .output()
        .expect("gse-benches");
    let (out, err) = (
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr),
    );
    assert!(done.status.success(), "{args:?}: {err}\n{out}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
}

#[test]
fn every_row_of_a_fan_out_succeeds() {
    let result = bench(&["fanout", "--agents", "200", "--rounds", "2", "--output-bytes", "300"]);
    assert_eq!(result["rows_wrong"], 0, "{result}");
    assert_eq!(result["rounds"].as_array().unwrap().len(), 2);
    // The round before the measurement counts here.
    assert_eq!(result["swarm"]["dispatches"], 600, "{result}");
    assert_eq!(result["swarm"]["rows_acknowledged"], 600, "{result}");
    assert_eq!(result["swarm"]["repeated"], 0);
    assert_eq!(result["swarm"]["connects"], 200);
    // The output was really carried: to the server, and to the client.
    assert!(result["costs"]["wire_up"].as_f64().unwrap() > 300.0, "{result}");
    assert!(result["costs"]["http_bytes"].as_f64().unwrap() > 300.0, "{result}");
}

#[test]
fn a_redis_and_a_shared_certificate_do_as_well() {
    let args = ["fanout", "--agents", "50", "--rounds", "1", "--delay-ms", "50"];
    let result = bench(&[&args[..], &["--redis", "--shared-certificate"]].concat());
    assert_eq!(result["rows_wrong"], 0, "{result}");
    assert_eq!(result["swarm"]["rows_acknowledged"], 100, "{result}");
    assert!(result["rounds"][0]["p50_ms"].as_f64().unwrap() >= 50.0, "{result}");
}

#[test]
fn idle_agents_stay_and_beat() {
    let args = ["idle", "--agents", "100", "--rounds", "2", "--window-s", "2"];
    let result = bench(&[&args[..], &["--beats-per-s", "500"]].concat());
    assert_eq!(result["rows_wrong"], 0, "{result}");
    assert!(result["beats"].as_u64().unwrap() > 500, "{result}");
}

#[test]
fn everybody_comes_back_after_a_kill() {
    let args = ["storm", "--agents", "100", "--reconnect-max-ms", "1000"];
    let result = bench(&args);
    assert_eq!(result["rows_wrong"], 0, "{result}");
    assert!(result["all_ms"].as_f64() >= result["half_ms"].as_f64(), "{result}");
}
