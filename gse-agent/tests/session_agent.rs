//! The program `gse_agent` itself: a script's way through it, its end, and its data directory.
#![allow(clippy::unwrap_used)] // a test ends by panicking

mod session_support;

use std::process::Stdio;
use std::time::Duration;

use gse_core::tls::{Role, TlsFiles};
use gse_proto::frame::Frame;
use gse_proto::session::{AtomicTask, Dispatch, Hello, Output, Row, RowStatus, Script, Stored, TargetRef};
use session_support::{PATIENCE, Peer, Pki, Server};
use tokio::process::{Child, Command};
use tokio::time::timeout;

fn agent(data: &std::path::Path, tls: &TlsFiles, server: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gse_agent"));
    let sets = [
        format!("servers=[\"{server}\"]"),
        format!("data_dir={:?}", data.display().to_string()),
        format!("tls.ca={:?}", tls.ca.display().to_string()),
        format!("tls.cert={:?}", tls.cert.display().to_string()),
        format!("tls.key={:?}", tls.key.display().to_string()),
        "reconnect.spread_ms=10".to_owned(),
    ];
    for set in sets {
        command.arg("--set").arg(set);
    }
    command.kill_on_drop(true).stdin(Stdio::null());
    command
}

async fn let_in(server: &Server) -> (Peer, Hello) {
    let (mut peer, hello) = server.hello().await;
    peer.welcome(30_000, &[]).await;
    (peer, hello)
}

fn dispatch(hello: &Hello, dir: &std::path::Path, script: &str) -> Dispatch {
    let user = nix::unistd::User::from_uid(nix::unistd::getuid())
        .unwrap()
        .unwrap()
        .name;
    Dispatch {
        target: Some(target()),
        epoch: hello.journal_epoch.clone(),
        user,
        // The server's clock says 1,700,000,000,000 at the Welcome.
        not_after_ms: 1_700_000_060_000,
        output_limit: 1 << 20,
        scripts: vec![Script {
            name: "t.sh".into(),
            store_dir: dir.display().to_string(),
            content: script.as_bytes().to_vec().into(),
        }],
        atomic_tasks: vec![AtomicTask {
            id: 0,
            command: dir.join("t.sh").display().to_string(),
            timeout_ms: 60_000,
            after: vec![],
        }],
        asked_id: hello.agent_id.clone(),
    }
}

fn target() -> TargetRef {
    TargetRef {
        task_id: "GSETASK:S:20261122233412:00000000000000FF".into(),
        bucket: 0,
        index: 0,
    }
}

/// Takes rows and output until the terminal row, and acknowledges like a server that stores everything.
async fn result(peer: &mut Peer) -> (Row, String) {
    let mut output: Vec<u8> = Vec::new();
    loop {
        match peer.recv().await.expect("the agent stays") {
            Frame::Output(Output { offset, data, .. }) => {
                assert!(offset as usize <= output.len(), "a gap in the output");
                let fresh = (output.len() - offset as usize).min(data.len());
                output.extend_from_slice(&data[fresh..]);
                peer.send(Stored {
                    target: Some(target()),
                    atomic: 0,
                    offset: output.len() as u64,
                    terminal: false,
                })
                .await;
            }
            Frame::Row(row) if row.status > RowStatus::Running as i32 => {
                let fresh = output.len().saturating_sub(row.tail_offset as usize);
                output.extend_from_slice(row.tail.get(fresh..).unwrap_or_default());
                if (output.len() as u64) < row.output_len {
                    continue;
                }
                peer.send(Stored {
                    target: Some(target()),
                    atomic: 0,
                    offset: row.output_len,
                    terminal: true,
                })
                .await;
                return (row, String::from_utf8(output).unwrap());
            }
            _ => {}
        }
    }
}

async fn terminate(child: &mut Child) -> std::process::ExitStatus {
    let pid = nix::unistd::Pid::from_raw(child.id().unwrap() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    timeout(PATIENCE, child.wait()).await.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_script_runs_and_its_result_comes_back() {
    let pki = Pki::new();
    let server = Server::start(&pki.issue("server", Role::Server, None)).await;
    let data = tempfile::tempdir().unwrap();
    let scripts = tempfile::tempdir().unwrap();
    let tls = pki.issue("agent", Role::Agent, Some("agent-7"));
    let mut child = agent(data.path(), &tls, &server.address).spawn().unwrap();
    let (mut peer, hello) = let_in(&server).await;
    // The id of the certificate, and the host's own facts.
    assert_eq!(hello.agent_id, "agent-7");
    assert!(!hello.machine_id.is_empty() && !hello.boot_id.is_empty() && hello.instance.len() == 16);
    assert!(!hello.addresses.is_empty() && !hello.hostname.is_empty() && hello.held.is_empty());
    assert_eq!(
        (hello.os.as_str(), hello.arch.as_str()),
        ("linux", std::env::consts::ARCH)
    );
    assert!(hello.cpu_num > 0 && hello.mem_size_mb > 0 && hello.started_at_ms > 1_700_000_000_000);
    assert!(!hello.journal_epoch.is_empty());

    let order = dispatch(&hello, scripts.path(), "#!/bin/sh\nseq 1 20000\nexit 3\n");
    peer.send(order).await;
    let (row, output) = result(&mut peer).await;
    assert_eq!(
        (row.status, row.error_code, row.exit_code),
        (RowStatus::Failed as i32, 0, 3)
    );
    let expected: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    assert_eq!(output, expected);

    let status = terminate(&mut child).await;
    assert!(status.success(), "{status}");
    let goodbye = peer
        .until(|frame| {
            if let Frame::Goodbye(goodbye) = frame {
                Some(goodbye)
            } else {
                None
            }
        })
        .await;
    assert!(goodbye.stopping);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_script_outlives_its_agent_and_the_next_one_reports_it() {
    let pki = Pki::new();
    let server = Server::start(&pki.issue("server", Role::Server, None)).await;
    let data = tempfile::tempdir().unwrap();
    let scripts = tempfile::tempdir().unwrap();
    let tls = pki.issue("agent", Role::Agent, None);
    let mut child = agent(data.path(), &tls, &server.address).spawn().unwrap();
    let (mut peer, hello) = let_in(&server).await;
    let ran = scripts.path().join("ran");
    let script = format!("#!/bin/sh\necho started >> {}\nsleep 2\necho done\n", ran.display());
    peer.send(dispatch(&hello, scripts.path(), &script)).await;
    while !ran.exists() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(terminate(&mut child).await.success());
    drop(peer);

    let mut child = agent(data.path(), &tls, &server.address).spawn().unwrap();
    let (mut peer, again) = let_in(&server).await;
    assert_eq!(again.held, [target()]);
    assert_eq!(again.journal_epoch, hello.journal_epoch);
    assert_ne!(again.instance, hello.instance);
    let (row, output) = result(&mut peer).await;
    assert_eq!(
        (row.status, row.error_code, row.exit_code),
        (RowStatus::Succeeded as i32, 0, 0)
    );
    assert_eq!(output, "done\n");
    assert_eq!(std::fs::read_to_string(ran).unwrap(), "started\n", "it ran once");
    assert!(terminate(&mut child).await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_agent_per_data_directory_and_a_configuration_that_is_wrong_is_said() {
    let pki = Pki::new();
    let server = Server::start(&pki.issue("server", Role::Server, None)).await;
    let data = tempfile::tempdir().unwrap();
    let tls = pki.issue("agent", Role::Agent, None);
    let mut first = agent(data.path(), &tls, &server.address).spawn().unwrap();
    let _session = let_in(&server).await;
    let second = agent(data.path(), &tls, &server.address)
        .stderr(Stdio::piped())
        .output();
    let second = timeout(PATIENCE, second).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(1), "{said}");
    assert!(said.contains("another agent uses"), "{said}");
    assert!(terminate(&mut first).await.success());

    let wrong = Command::new(env!("CARGO_BIN_EXE_gse_agent"))
        .args([
            "--check",
            "--set",
            "agent_id=\"a b\"",
            "--set",
            "servers=[\"nowhere\"]",
            "--set",
            "exec.concurrency=0",
        ])
        .output();
    let wrong = timeout(PATIENCE, wrong).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&wrong.stderr).into_owned();
    assert_eq!(wrong.status.code(), Some(64), "{said}");
    for key in ["agent_id", "servers", "tls.ca", "exec.concurrency"] {
        assert!(said.contains(key), "{key} is missing in: {said}");
    }
}
