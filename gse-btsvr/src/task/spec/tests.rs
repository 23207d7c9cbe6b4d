use super::*;
use crate::task::layout::Layout;
use gse_proto::http::{FileSource, FileTarget, PushTask, TransferTask};

fn agent(id: &str) -> AgentEndpoint {
    AgentEndpoint {
        bk_agent_id: id.into(),
        user: "root".into(),
        ..AgentEndpoint::default()
    }
}

fn task(name: &str, targets: &[&str]) -> TransferTask {
    TransferTask {
        source: FileSource {
            file_name: name.into(),
            store_dir: "/data".into(),
            agent: agent("src"),
        },
        target: FileTarget {
            store_dir: "/t/".into(),
            agents: targets.iter().map(|id| agent(id)).collect(),
            ..FileTarget::default()
        },
    }
}

fn body(tasks: Vec<TransferTask>) -> TransferFile {
    TransferFile {
        timeout_seconds: 60,
        tasks,
        ..TransferFile::default()
    }
}

fn origin() -> Origin {
    Origin {
        app: "bk_job".into(),
        tenant: String::new(),
        request_id: "r".into(),
        now_ms: 1_000_000,
        node_id: "local".into(),
    }
}

fn id() -> TaskId {
    TaskId::file("20261122000000", 1, "local")
}

fn lay_out(body: TransferFile) -> Result<XferHeader, String> {
    transfer(body, &id(), origin(), &TaskConfig::default())
}

fn lay_push(tasks: Vec<PushTask>) -> Result<XferHeader, String> {
    let body = PushFile {
        timeout_seconds: 1000,
        auto_mkdir: true,
        tasks,
    };
    push(body, &id(), origin(), &TaskConfig::default())
}

#[test]
fn one_row_a_source_and_file_and_one_a_target() {
    // contract: v2-http-task#30
    let header = lay_out(body(vec![
        task("a", &["x", "y"]),
        task("b", &["x", "y"]),
        // The same again, and one target more.
        task("a", &["x", "y", "z", "z"]),
    ]))
    .unwrap();
    assert_eq!((header.uploads.len(), header.groups.len()), (2, 3));
    assert_eq!(Layout::new(&header).rows(), 2 + 2 + 2 + 1);
    // Another directory is another row.
    let mut elsewhere = task("a", &["x"]);
    elsewhere.target.store_dir = "/u/".into();
    let header = lay_out(body(vec![task("a", &["x"]), elsewhere])).unwrap();
    assert_eq!((header.uploads.len(), Layout::new(&header).rows()), (1, 3));
}

#[test]
fn speeds_are_megabytes_and_zero_is_no_limit() {
    // contract: v2-http-task#42
    let mut fast = body(vec![task("a", &["x"])]);
    (fast.upload_speed, fast.download_speed) = (0, 5);
    let header = lay_out(fast.clone()).unwrap();
    assert_eq!((header.upload_limit, header.download_limit), (0, 5 << 20));
    fast.upload_speed = -1;
    assert!(lay_out(fast).unwrap_err().contains("upload_speed"));
}

#[test]
fn decimal_digits_are_the_octal_mode() {
    for (given, meant) in [(0, 0), (644, 0o644), (755, 0o755), (4755, 0o4755)] {
        assert_eq!(mode("m", given), Ok(meant));
    }
    for wrong in [-1, 8, 648, 77_777] {
        assert!(mode("m", wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_bad_host_is_a_row_and_a_bad_request_is_an_error() {
    let mut mixed = task("a", &["x", "", "y"]);
    mixed.target.agents[2].bk_container_id = "ab12".into();
    mixed.target.agents.push(AgentEndpoint {
        user: String::new(),
        ..agent("z")
    });
    let header = lay_out(body(vec![mixed])).unwrap();
    let codes: Vec<i32> = header.lists[0].endpoints.iter().map(|e| e.refused_code).collect();
    assert_eq!(codes, [0, 117, 106, 122]);

    type Breaker = fn(&mut TransferTask);
    let breakers: [(&str, Breaker); 8] = [
        ("target.agents", |t| t.target.agents.clear()),
        ("target.store_dir", |t| t.target.store_dir.clear()),
        ("target.store_dir", |t| t.target.store_dir = "t".into()),
        ("target.store_dir", |t| t.target.store_dir = "/a/../b".into()),
        ("target.file_name", |t| t.target.file_name = "a/b".into()),
        ("source.store_dir", |t| t.source.store_dir.clear()),
        ("source.file_name", |t| t.source.file_name = "a/b".into()),
        ("target.permission", |t| t.target.permission = 9),
    ];
    for (word, breaker) in breakers {
        let mut broken = task("a", &["x"]);
        breaker(&mut broken);
        let error = lay_out(body(vec![broken])).unwrap_err();
        assert!(error.contains("tasks[0]") && error.contains(word), "{word}: {error}");
    }
    assert!(lay_out(body(vec![])).is_err());
}

#[test]
fn pushes_take_both_kinds_of_lists_and_have_no_upload_row() {
    // contract: v2-http-task#44, v2-http-task#45
    let task = PushTask {
        file_name: "hostid".into(),
        store_dir: "/var/lib/x".into(),
        file_content: "x".repeat(102_400),
        right: 644,
        agent_id_list: vec!["x".into()],
        agents: vec![agent("y"), agent("x")],
        ..PushTask::default()
    };
    let header = lay_push(vec![task.clone()]).unwrap();
    let layout = Layout::new(&header);
    assert_eq!((layout.uploads(), layout.rows(), header.groups[0].mode), (0, 2, 0o644));
    assert!(header.push && header.lists[0].endpoints.iter().all(|one| one.user == "root"));
    let single = PushTask {
        agents: vec![],
        ..task.clone()
    };
    assert_eq!(Layout::new(&lay_push(vec![single]).unwrap()).rows(), 1);

    let mut large = task.clone();
    large.file_content.push('x');
    assert!(lay_push(vec![large]).unwrap_err().contains("102400"));
    let mut nobody = task;
    (nobody.agents, nobody.agent_id_list) = (vec![], vec![]);
    assert!(lay_push(vec![nobody]).is_err());
}

#[test]
fn twenty_files_to_five_thousand_hosts_are_laid_out_at_once() {
    let targets: Vec<String> = (0..5_000).map(|n| format!("0:10.0.{}.{}", n / 250, n % 250)).collect();
    let names: Vec<&str> = targets.iter().map(String::as_str).collect();
    let tasks = (0..20).map(|n| task(&format!("f{n}"), &names)).collect();
    let begun = std::time::Instant::now();
    let header = lay_out(body(tasks)).unwrap();
    assert!(begun.elapsed() < std::time::Duration::from_secs(5));
    assert_eq!((Layout::new(&header).rows(), header.lists.len()), (100_020, 1));
    assert!(crate::task::layout::pack(&header).len() < 200_000);
}
