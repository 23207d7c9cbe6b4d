//! Plugins written with the public clients, against the real agent: what they are told, what they send, and that they find the agent again.
//! The programs are in `tests/go`; where their modules are not to be had the tests skip and say why.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test ends by panicking

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use gse_tests::{AgentOptions, Site, StoreKind, eventually};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

const AGENT: &str = "0100005254008ed86116666614661851";
/// Directory of programs that were built before.
const PLUGINS: &str = "GSE_TESTS_PLUGINS";
const PATIENCE: Duration = Duration::from_secs(30);

/// Builds a program of `tests/go`; or why it can't be built.
async fn program(name: &str, module: &str, into: &Path) -> Result<PathBuf, String> {
    if let Some(dir) = std::env::var_os(PLUGINS) {
        return Ok(Path::new(&dir).join(name));
    }
    let dir = into.join(name);
    std::fs::create_dir_all(&dir).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("go")
        .join(name)
        .join("main.go");
    std::fs::copy(source, dir.join("main.go")).unwrap();
    let latest = format!("{module}@latest");
    for args in [
        &["mod", "init", "gse.test/plugin"][..],
        &["get", &latest],
        &["mod", "tidy"],
        &["build", "-o", "plugin", "."],
    ] {
        let mut go = Command::new("go");
        go.args(args).current_dir(&dir).kill_on_drop(true);
        let done = match tokio::time::timeout(Duration::from_secs(300), go.output()).await {
            Ok(Ok(done)) => done,
            Ok(Err(error)) => return Err(format!("go cannot be started: {error}")),
            Err(_) => return Err(format!("go {} takes too long", args[0])),
        };
        if !done.status.success() {
            let words = String::from_utf8_lossy(&done.stderr).trim().replace('\n', "; ");
            return Err(format!("go {}: {words}", args.join(" ")));
        }
    }
    Ok(dir.join("plugin"))
}

/// A running plugin.
struct Plugin {
    _child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Plugin {
    async fn start(program: &Path, args: &[&Path]) -> Self {
        let mut command = Command::new(program);
        command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().unwrap();
        let mut plugin = Self {
            stdin: child.stdin.take().unwrap(),
            lines: BufReader::new(child.stdout.take().unwrap()).lines(),
            _child: child,
        };
        plugin.expect("ready").await;
        plugin
    }

    async fn tell(&mut self, words: &str) {
        self.stdin.write_all(format!("{words}\n").as_bytes()).await.unwrap();
    }

    /// Reads lines until one begins with `word`; clients print other things too.
    async fn expect(&mut self, word: &str) -> String {
        let reading = async {
            loop {
                let line = self.lines.next_line().await.unwrap().expect("the plugin has ended");
                assert!(!line.starts_with("failed"), "{line}");
                if line.starts_with(word) {
                    return line;
                }
            }
        };
        let line = tokio::time::timeout(PATIENCE, reading).await;
        line.unwrap_or_else(|_| panic!("the plugin does not say {word:?}"))
    }

    async fn ask(&mut self, words: &str, answer: &str) -> String {
        self.tell(words).await;
        self.expect(answer).await
    }
}

fn options() -> AgentOptions {
    let mut options = AgentOptions::new(AGENT, "127.0.0.1");
    options.sets = vec!["data.socket.bizid=1".into()];
    options
}

// contract: data-plane#48, data-plane#2, data-plane#40
#[tokio::test]
async fn libgse() {
    let site = Site::start(StoreKind::Embedded).await.unwrap();
    let module = "github.com/TencentBlueKing/bkmonitor-datalink/pkg/libgse";
    let program = match program("libgse", module, site.path()).await {
        Ok(program) => program,
        Err(why) => return eprintln!("skipped: no plugin with libgse can be built: {why}"),
    };
    let mut agent = site.spawn_agent(&options(), "").unwrap();
    let socket = site.data_socket(AGENT);
    eventually("the data socket", PATIENCE, || async { socket.exists().then_some(()) }).await;
    let mut plugin = Plugin::start(&program, &[&socket]).await;
    let known = format!("info 1 0 127.0.0.1 {AGENT}");
    // By the simple client, then by the one that beats use.
    assert_eq!(plugin.ask("info", "info").await, known);
    assert_eq!(plugin.expect("info").await, known);
    for words in ["dynamic 1430 {\"a\":1}", "common 1430 {\"a\":2}", "ops 1430 {\"a\":3}"] {
        plugin.ask(words, "sent").await;
    }
    agent.kill_9();
    let _agent = site.spawn_agent(&options(), "").unwrap();
    eventually("the new agent", PATIENCE, || async {
        UnixStream::connect(&socket).await.ok()
    })
    .await;
    // It finds the agent again by itself, with records or without.
    plugin.ask("dynamic 1430 {\"a\":4}", "sent").await;
    plugin.ask("dynamic 1430 {\"a\":5}", "sent").await;
    assert_eq!(plugin.ask("info", "info").await, known);
    assert_eq!(plugin.expect("info").await, known);
}

// contract: data-plane#2, data-plane#47
#[tokio::test]
async fn the_official_sdk() {
    let mut site = Site::with_store(StoreKind::Embedded).await.unwrap();
    let module = "github.com/TencentBlueKing/bk-gse-sdk/go";
    let program = match program("sdk", module, site.path()).await {
        Ok(program) => program,
        Err(why) => return eprintln!("skipped: no plugin with the SDK can be built: {why}"),
    };
    site.task_sets
        .push("messages.slots=[{slot_id=1,token=\"a token of tests\",plugin=\"beat\"}]".into());
    site.start_task().await.unwrap();
    site.start_api().await.unwrap();
    let mut agent = site.spawn_agent(&options(), "").unwrap();
    let (data, message) = (site.data_socket(AGENT), site.message_socket(AGENT));
    eventually("the sockets", PATIENCE, || async {
        (data.exists() && message.exists()).then_some(())
    })
    .await;
    site.wait_state(AGENT, 2).await;
    let mut plugin = Plugin::start(&program, &[&data, &message]).await;
    let known = format!("info {AGENT} 0 {AGENT} 0 running=true proxy=false");
    assert_eq!(plugin.ask("info", "info").await, known);
    let dispatch = |id: &'static str| json!({"slot_id": 1, "token": "a token of tests", "message_id": id, "agent_id_list": [AGENT], "content": "content"});
    let api = site.api();
    for n in 0..2 {
        plugin.ask("report 1430 {\"a\":1}", "reported").await;
        plugin.ask("say some-id {\"b\":1}", "said").await;
        let id = ["first", "second"][n];
        // After a restart the plugin has to come back first.
        eventually("the message", PATIENCE, || async {
            let reply = api.post("/api/v2/cluster/dispatch_message", &dispatch(id)).await;
            assert_eq!(reply["code"], 0, "{reply}");
            reply["data"]["results"].as_array().unwrap().is_empty().then_some(())
        })
        .await;
        assert_eq!(plugin.expect("message").await, format!("message {id} content"));
        if n == 0 {
            agent.kill_9();
            agent = site.spawn_agent(&options(), "").unwrap();
            eventually("the new agent", PATIENCE, || async {
                UnixStream::connect(&data).await.ok()
            })
            .await;
        }
    }
}
