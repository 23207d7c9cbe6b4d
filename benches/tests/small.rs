//! The harness against the real programs on a small scale: it completes, every row comes back and succeeds, and nothing is dispatched
//! twice. Times and costs are not judged.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Where the programs are: built before and named by `GSE_TESTS_PROGRAMS`, or built now.
fn programs() -> &'static Path {
    static DIR: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    DIR.get_or_init(|| {
        if let Some(dir) = std::env::var_os("GSE_TESTS_PROGRAMS") {
            return dir.into();
        }
        let dir = Path::new(env!("CARGO_BIN_EXE_gse-benches"))
            .parent()
            .expect("a program is in a directory");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        // The whole workspace, though four programs would do: with another set of features everything would be built again.
        build.args(["build", "--quiet", "--workspace", "--bins"]);
        build.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        if dir.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo").success(), "the programs do not build");
        dir.to_owned()
    })
}

fn bench(args: &[&str]) -> Value {
    let programs = programs().to_str().expect("a path that is text");
    run(&[args, &["--programs", programs]].concat())
}

fn run(args: &[&str]) -> Value {
    let done = Command::new(env!("CARGO_BIN_EXE_gse-benches"))
        .args(args)
        .arg("--json")
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
    assert!(result["beats"]["beats"].as_u64().unwrap() > 500, "{result}");
    for session in result["sessions"].as_array().unwrap() {
        assert!(session["user"].as_f64().unwrap() > 0.0, "{result}");
        // The kernel's memory is that of the whole machine, so with few agents its growth can be anything.
        assert!(
            session["sum"].is_number() && session["tcp_buffers"].is_number(),
            "{result}"
        );
    }
}

#[test]
fn everybody_comes_back_after_a_kill() {
    let args = ["storm", "--agents", "100", "--reconnect-max-ms", "1000"];
    let result = bench(&[&args[..], &["--reconnect-spread-ms", "500"]].concat());
    assert_eq!(result["rows_wrong"], 0, "{result}");
    assert!(result["all_ms"].as_f64() >= result["half_ms"].as_f64(), "{result}");
}

#[test]
fn as_bk_job_polls() {
    let args = ["fanout", "--agents", "100", "--rounds", "1", "--as-job"];
    let result = bench(&[&args[..], &["--delay-ms", "200"]].concat());
    assert_eq!(result["rows_wrong"], 0, "{result}");
    // Too late for the first poll, so it is the second, a second later, that finds them.
    assert_eq!(result["rounds"][0]["queries"], 2, "{result}");
    assert!(result["rounds"][0]["all_ms"].as_f64().unwrap() >= 1000.0, "{result}");
}

#[test]
fn the_dead_are_noticed_and_nobody_else() {
    // So many missing that a busy machine does not make the living look dead.
    let args = ["detect", "--agents", "100", "--heartbeat-s", "1", "--missed", "5"];
    let result = bench(&args);
    assert_eq!(result["false_positives"], 0, "{result}");
    assert_eq!(result["frozen"]["agents"], 1, "{result}");
    assert!(result["frozen"]["min"].as_f64().unwrap() >= 4_000.0, "{result}");
    assert_eq!(result["reset"]["agents"], 1, "{result}");
    assert!(result["rounds"].as_u64().unwrap() >= 1, "{result}");
}

#[test]
fn rivals_are_measured_in_the_same_run() {
    let result = bench(&["compare", "--agents", "50", "--rounds", "2", "--allow-missing"]);
    let results = result["results"].as_array().unwrap();
    if result["missing"].is_null() {
        assert_eq!(results.len(), 3, "{result}");
    } else {
        eprintln!("skipped in part: {}", result["missing"]);
        assert_eq!(results.len(), 2, "{result}");
    }
    for rival in results {
        assert!(rival["all_ms"].as_f64().unwrap() > 0.0, "{result}");
        assert!(rival["connected_kib"].as_f64().unwrap() > 0.0, "{result}");
    }
}

#[test]
fn a_real_agent_is_measured_too() {
    let result = bench(&["agent", "--window-s", "2"]);
    assert!(result["idle_kib"].as_u64().unwrap() > 1_000, "{result}");
    assert!(result["cpu_percent"].as_f64().unwrap() >= 0.0, "{result}");
}

#[test]
fn instructions_are_counted() {
    let args = [
        "micro",
        "--times",
        "50",
        "--case",
        "row-encode",
        "--case",
        "resp-parse-row",
    ];
    let result = run(&[&args[..], &["--case", "stored-row-encode"]].concat());
    let counted = result["counted"].as_array().unwrap();
    assert_eq!(counted.len(), 3, "{result}");
    for case in counted {
        let instructions = case["instructions"].as_f64().unwrap();
        // No operation of these is that cheap, and none may be that dear, however it is built.
        assert!((20.0..1_000_000.0).contains(&instructions), "{result}");
    }
}

#[test]
fn two_nodes_serve_one_fleet() {
    let args = ["fanout", "--agents", "60", "--rounds", "2", "--nodes", "2"];
    let result = bench(&args);
    assert_eq!(result["rows_wrong"], 0, "{result}");
    assert_eq!(result["swarm"]["rows_acknowledged"], 180, "{result}");
    let cpu = result["costs"]["cpu_us"].as_array().unwrap();
    let nodes = cpu
        .iter()
        .filter(|process| process[0].as_str().unwrap().starts_with("gse_task "));
    assert_eq!(nodes.count(), 2, "{result}");
}
