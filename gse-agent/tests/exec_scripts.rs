//! What a script's row says: exit codes, output, tags, limits of time, accounts, script files, dependencies.

mod exec_support;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, Instant};

use exec_support::*;
use gse_proto::session::Script;

// contract: v2-http-task#15
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exit_codes_are_the_scripts_own() {
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    assert_eq!(host.sh("ok", "echo out; echo err >&2").await.codes(), (0, SUCCEEDED, 0));
    let both = host.done("ok", 0).await;
    assert_eq!(both.text(), "out\nerr\n");
    assert_eq!(host.sh("one", "exit 1").await.codes(), (0, FAILED, 1));
    assert_eq!(host.sh("most", "exit 255").await.codes(), (0, FAILED, 255));
    assert_eq!(host.sh("signal", "kill -9 $$").await.codes(), (0, FAILED, 137));
    assert_eq!(host.sh("none", "/nonexistent/command").await.codes(), (0, FAILED, 127));
    host.until("everything is forgotten", {
        let executor = host.executor.clone();
        move || executor.held().is_empty()
    })
    .await;
    assert_eq!(host.executor.counts(), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_is_valid_text_and_cut_with_a_marker() {
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    let done = host.sh("bytes", r"printf 'a\377\360\237b\342\202'").await;
    assert_eq!(done.text(), "a\u{fffd}\u{fffd}b\u{fffd}");

    let mut order = host.order(
        "flood",
        &["head -c 3000000 /dev/zero | tr '\\0' x; echo; echo 'job_fail:[at the end]'"],
    );
    order.output_limit = 200_000;
    let done = host.run(order).await;
    assert_eq!(done.codes(), (0, SUCCEEDED, 0));
    assert_eq!(done.row.tag, "at the end");
    assert!(done.output.len() <= 200_000);
    let (head, mark) = done.text().split_once('\n').expect("a marker");
    // The x, a line break, the tag's line.
    let written = 3_000_000 + 1 + "job_fail:[at the end]\n".len();
    assert_eq!(
        mark,
        format!("[output cut at {} bytes, {written} were written]\n", head.len())
    );
    assert!(head.len() > 199_000 && head.bytes().all(|b| b == b'x'));

    let done = host.sh("large", "seq 1 300000").await;
    let expected: String = (1..=300_000).map(|n| format!("{n}\n")).collect();
    assert_eq!(done.text(), expected);
}

// contract: v2-http-task#16
// contract: reliability#F9
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_timeout_ends_the_whole_tree() {
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    let mark = format!("{}.4711", 100_000 + std::process::id());
    // Traps the polite signals, leaves its session twice, closes its output, and has a child that does the same.
    let command = format!(
        "trap '' TERM INT HUP; (setsid sh -c \"trap '' TERM; (setsid sh -c \\\"trap '' TERM; exec >/dev/null 2>&1; while :; do sleep {mark}; done\\\" &) ; sleep {mark}\" &); \
         exec 2>/dev/null; echo started; while :; do sleep {mark}; done"
    );
    let mut order = host.order("long", &[&command]);
    order.atomic_tasks[0].timeout_ms = 1000;
    let began = Instant::now();
    let done = host.run(order).await;
    assert_eq!(done.codes(), (0, TIMED_OUT, 124));
    assert_eq!(done.text(), "started\n");
    assert!(done.row.error_msg.contains("1 s"), "{}", done.row.error_msg);
    assert!(began.elapsed() >= Duration::from_millis(1000));
    assert!(
        began.elapsed() < Duration::from_millis(1000 + 300 + 1500),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(processes_with(&mark), Vec::<i32>::new());
    assert!(host.running.contains(&("long".to_owned(), 0)));
}

// contract: v2-http-task#17
// contract: reliability#F9
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn terminate_ends_even_what_forks_without_end() {
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    let mark = format!("{}.4712", 200_000 + std::process::id());
    let command = format!(
        "f() {{ trap '' TERM; sleep 0.02; if [ $1 -gt 0 ]; then (f $(($1 - 1)) &) ; (setsid sleep {mark} &); exec sleep {mark}; fi; while :; do (sleep 0.01 &); sleep 0.02; done; }}; f 10; sleep {mark}"
    );
    let order = host.order("stop", &[&command, "echo never"]);
    host.executor.dispatch(order).await;
    let wanted = mark.clone();
    host.until("the script has forked", move || processes_with(&wanted).len() > 8)
        .await;
    host.executor.terminate(target("stop")).await;
    host.executor.terminate(target("stop")).await;
    assert_eq!(host.done("stop", 0).await.codes(), (126, STOPPED, 143));
    assert_eq!(host.done("stop", 1).await.codes(), (126, STOPPED, 143));
    assert_eq!(processes_with(&mark), Vec::<i32>::new());
    // Unknown and finished targets: nothing happens.
    host.executor.terminate(target("stop")).await;
    host.executor.terminate(target("nobody")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_survives_success_and_does_not_hold_up_the_row() {
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    let mark = format!("{}.4713", 300_000 + std::process::id());
    let alive = data.path().join("alive");
    let command = format!(
        "(setsid sh -c 'trap \"\" HUP; sleep 1; echo late; echo {mark} > {}; exec sleep {mark}' &); echo up",
        alive.display()
    );
    let began = Instant::now();
    let done = host.sh("daemon", &command).await;
    assert_eq!(done.codes(), (0, SUCCEEDED, 0));
    assert_eq!(done.text(), "up\n");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    // It writes to the pipe of a script that is over, and lives.
    host.until("the daemon has gone on", move || alive.exists()).await;
    let daemons = processes_with(&format!("sleep {mark}"));
    assert!(!daemons.is_empty());
    for pid in daemons {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).expect("kill");
    }
    host.until("its runner has gone", || {
        processes_with(data.path().to_str().expect("a path")).is_empty()
    })
    .await;
}

// contract: v2-http-task#26
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dependents_run_after_success_only() {
    let data = tempfile::tempdir().expect("a directory");
    let dir = open_dir();
    let mut host = Host::start(config(data.path())).await;
    let mut order = host.order(
        "chain",
        &[
            &format!("cat {0}/state; echo one >> {0}/state; exit 3", dir.path().display()),
            &format!("cat {}/state; exit 4", dir.path().display()),
            "echo never",
        ],
    );
    order.scripts = vec![script(dir.path(), "state", "fresh\n")];
    order.atomic_tasks[0].after = vec![1];
    order.atomic_tasks[0].id = 40;
    order.atomic_tasks[1].after = vec![];
    order.atomic_tasks[1].id = 41;
    order.atomic_tasks[2].after = vec![1, 0];
    order.atomic_tasks[2].id = 42;
    host.executor.dispatch(order.clone()).await;
    assert_eq!(host.done("chain", 1).await.codes(), (0, FAILED, 4));
    assert_eq!(host.done("chain", 1).await.text(), "fresh\n");
    for atomic in [0, 2] {
        let skipped = host.done("chain", atomic).await;
        assert_eq!(skipped.codes(), (101, FAILED, 1));
        assert!(
            skipped.row.error_msg.contains("atomic task 41"),
            "{}",
            skipped.row.error_msg
        );
    }
    // All is well: each has its own output from offset 0, and the second finds the files as the first left them.
    let mut order = host.order(
        "chain2",
        &[
            &format!("echo first; echo changed > {}/state", dir.path().display()),
            &format!("cat {}/state; exit 9", dir.path().display()),
        ],
    );
    order.scripts = vec![script(dir.path(), "state", "fresh\n")];
    host.executor.dispatch(order).await;
    assert_eq!(host.done("chain2", 0).await.text(), "first\n");
    assert_eq!(host.done("chain2", 1).await.text(), "changed\n");
    assert_eq!(host.done("chain2", 1).await.codes(), (0, FAILED, 9));
    // Relations that cannot be met are said so.
    let mut order = host.order("circle", &["echo x", "echo y"]);
    order.atomic_tasks[0].after = vec![1];
    let done = host.run(order).await;
    assert_eq!(done.codes(), (101, FAILED, 1));
    assert!(done.row.error_msg.contains("circle"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripts_run_in_the_accounts_own_environment() {
    if !is_root() {
        return;
    }
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    let mut order = host.order("who", &["id -un; id -gn; id -Gn; umask; pwd; ulimit -n; ulimit -u; env | sort; cat; echo end; ls -l /proc/self/fd | wc -l; grep -E 'Sig(Blk|Ign)' /proc/self/status"]);
    order.user = "nobody".to_owned();
    let done = host.run(order).await;
    assert_eq!(done.codes(), (0, SUCCEEDED, 0), "{}", done.text());
    let lines: Vec<&str> = done.text().lines().collect();
    assert_eq!(&lines[..5], ["nobody", "nogroup", "nogroup", "0022", "/"], "{lines:?}");
    let first = std::fs::read_to_string("/proc/1/limits").expect("limits");
    let of = |title: &str| {
        let line = first.lines().find(|l| l.starts_with(title)).expect("a limit");
        line[title.len()..]
            .split_whitespace()
            .next()
            .expect("a value")
            .to_owned()
    };
    // Where even root may not raise a limit (in some containers), it is as high as it may be.
    let most = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
        .expect("a limit")
        .1;
    let files: u64 = of("Max open files").parse().expect("a number");
    assert!(
        [files, files.min(most)].contains(&lines[5].parse().expect("a number")),
        "{lines:?}"
    );
    assert_eq!(lines[6], of("Max processes"));
    for wanted in ["HOME=/nonexistent", "USER=nobody", "LOGNAME=nobody", "LANG=C.UTF-8"] {
        assert!(lines.contains(&wanted), "{wanted} in {lines:?}");
    }
    assert!(lines.iter().any(|l| l.starts_with("PATH=/usr/local/bin")), "{lines:?}");
    assert!(!done.text().contains("CARGO"), "nothing of the agent's own: {lines:?}");
    assert!(lines.contains(&"end"), "standard input is empty");
    // Only the three streams, the directory itself, and the heading line of ls.
    assert!(lines.contains(&"5"), "no descriptor leaks: {lines:?}");
    for line in lines.iter().filter(|l| l.starts_with("Sig")) {
        let mask = u64::from_str_radix(line.split_whitespace().last().expect("a mask"), 16).expect("a number");
        // 32 and 33 belong to the C library and cannot be changed by a program.
        assert_eq!(mask & 0x7fff_ffff, 0, "{line}");
    }
    // No way back to root.
    let mut order = host.order("back", &["kill -0 1 2>/dev/null && echo may; head -c1 /etc/shadow"]);
    order.user = "nobody".to_owned();
    let done = host.run(order).await;
    assert_eq!(done.codes().1, FAILED);
    assert!(!done.text().contains("may"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signals_that_the_agent_was_started_without_reach_scripts() {
    let data = tempfile::tempdir().expect("a directory");
    let lead = data.path().join("lead");
    let program = format!(
        "#!/bin/sh\nexec env --ignore-signal=HUP,USR1,34,40,64 {} \"$@\"\n",
        env!("CARGO_BIN_EXE_gse_agent")
    );
    std::fs::write(&lead, program).expect("write");
    std::fs::set_permissions(&lead, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let mut settings = config(data.path());
    settings.self_exec[0] = lead.into();
    let mut host = Host::start(settings).await;
    let runner = host.sh("runner", "grep SigIgn /proc/$PPID/status").await;
    let script = host.sh("script", "grep SigIgn /proc/self/status").await;
    let [runner, script] = [runner, script].map(|done| {
        let word = done.text().split_whitespace().last().expect("a mask").to_owned();
        u64::from_str_radix(&word, 16).expect("a number")
    });
    let bit = |signal: u32| 1u64 << (signal - 1);
    let all = [1, 10, 34, 40, 64].map(bit).into_iter().sum::<u64>();
    assert_eq!(runner & all, all, "{runner:x}: the test itself works");
    assert_eq!(script & !(bit(32) | bit(33)), 0, "{script:x}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accounts_that_cannot_be_are_clear_rows() {
    let data = tempfile::tempdir().expect("a directory");
    let mut settings = config(data.path());
    settings.allowed_accounts = vec!["root".into(), "no-such-user".into(), "nobody".into()];
    let mut host = Host::start(settings).await;
    let mut order = host.order("unknown", &["echo x"]);
    order.user = "no-such-user".to_owned();
    let done = host.run(order).await;
    assert_eq!(done.codes(), (122, FAILED, 1));
    assert!(done.row.error_msg.contains("no-such-user"));
    let mut order = host.order("forbidden", &["echo x"]);
    order.user = "daemon".to_owned();
    let done = host.run(order).await;
    assert_eq!(done.codes(), (101, FAILED, 1));
    assert!(done.row.error_msg.contains("allowed_accounts"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn script_files_are_written_by_the_account_and_run() {
    let data = tempfile::tempdir().expect("a directory");
    let place = open_dir();
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o1777)).expect("chmod");
    let mut host = Host::start(config(data.path())).await;
    let user = if is_root() { "nobody" } else { "root" };
    let shared = place.path().join("bkjob");
    let own = shared.join(user);
    let dir = own.to_str().expect("a path").to_owned();
    for (name, content, expected) in [
        (
            "bk_gse_script_1.sh",
            "echo \"$0 $1\"\n",
            format!("{dir}/bk_gse_script_1.sh two words\n"),
        ),
        (
            "bk_gse_script_2.pl",
            "print 'perl ' . $ARGV[0]",
            "perl two words".to_owned(),
        ),
        (
            "bk_gse_script_3.sh",
            "#!/usr/bin/perl\nprint 'own line'",
            "own line".to_owned(),
        ),
    ] {
        let mut order = host.order(name, &[&format!("{dir}/{name} 'two words'")]);
        order.user = user.to_owned();
        order.scripts = vec![Script {
            name: name.into(),
            store_dir: dir.clone(),
            content: content.as_bytes().to_vec().into(),
        }];
        let done = host.run(order).await;
        assert_eq!(
            done.codes(),
            (0, SUCCEEDED, 0),
            "{name}: {} {}",
            done.row.error_msg,
            done.text()
        );
        assert_eq!(done.text(), expected, "{name}");
        let meta = std::fs::metadata(own.join(name)).expect("the file");
        assert_eq!(
            (meta.uid(), meta.mode() & 0o7777),
            (if is_root() { 65534 } else { meta.uid() }, 0o700)
        );
    }
    if is_root() {
        let meta = std::fs::metadata(&shared).expect("the shared parent");
        assert_eq!((meta.uid(), meta.mode() & 0o7777), (0, 0o1777));
        let meta = std::fs::metadata(&own).expect("the account's directory");
        assert_eq!((meta.uid(), meta.mode() & 0o7777), (65534, 0o755));
    }
}

/// A script directory right below `/tmp`, as one node manager uses it, serves every account.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn accounts_share_a_directory_right_below_tmp() {
    if !is_root() {
        return;
    }
    let data = tempfile::tempdir().expect("a directory");
    let mut host = Host::start(config(data.path())).await;
    let dir = format!("/tmp/gse-exec-shared-{}", std::process::id());
    for user in ["nobody", "daemon", "root"] {
        let name = format!("bk_gse_script_{user}.sh");
        let mut order = host.order(user, &[&format!("{dir}/{name}")]);
        order.user = user.to_owned();
        order.scripts = vec![Script {
            name: name.clone(),
            store_dir: format!("{dir}/"),
            content: b"#!/bin/sh\nid -un\n".as_slice().into(),
        }];
        let done = host.run(order).await;
        assert_eq!(done.codes(), (0, SUCCEEDED, 0), "{user}: {}", done.row.error_msg);
        assert_eq!(done.text(), format!("{user}\n"));
    }
    let meta = std::fs::metadata(&dir).expect("the directory");
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (0, 0o1777));
    std::fs::remove_dir_all(&dir).expect("it is removed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn script_files_are_not_led_astray() {
    if !is_root() {
        return;
    }
    let data = tempfile::tempdir().expect("a directory");
    let place = open_dir();
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o1777)).expect("chmod");
    let victim = place.path().join("victim");
    std::fs::create_dir(&victim).expect("mkdir");
    std::os::unix::fs::symlink(&victim, place.path().join("link")).expect("symlink");
    let foreign = place.path().join("foreign");
    std::fs::create_dir(&foreign).expect("mkdir");
    nix::unistd::chown(&foreign, Some(65534.into()), None).expect("chown");
    let mut host = Host::start(config(data.path())).await;
    for (task, dir, name, hint) in [
        ("link", place.path().join("link"), "a.sh", "symbolic link"),
        (
            "below a link",
            place.path().join("link/deeper"),
            "a.sh",
            "symbolic link",
        ),
        ("foreign", foreign.clone(), "a.sh", "belongs to uid 65534"),
        ("dots", place.path().join("x/../victim"), "a.sh", "\"..\""),
        ("name", victim.clone(), "../a.sh", "plain file name"),
        ("relative", "relative/dir".into(), "a.sh", "absolute"),
        ("a file", "/etc/passwd".into(), "a.sh", "not a directory"),
    ] {
        let mut order = host.order(task, &["echo ran"]);
        order.scripts = vec![script(&dir, name, "echo x")];
        let done = host.run(order).await;
        assert_eq!(done.codes(), (111, FAILED, 1), "{task}");
        assert!(done.row.error_msg.contains(hint), "{task}: {}", done.row.error_msg);
        assert!(done.text().is_empty());
    }
    // A link in the file's own place is replaced, not followed.
    let secret = data.path().join("secret");
    std::fs::write(&secret, "untouched").expect("write");
    std::os::unix::fs::symlink(&secret, victim.join("a.sh")).expect("symlink");
    let mut order = host.order("replaced", &[&format!("{}/a.sh", victim.display())]);
    order.scripts = vec![script(&victim, "a.sh", "echo mine")];
    assert_eq!(host.run(order).await.text(), "mine\n");
    assert_eq!(std::fs::read_to_string(&secret).expect("read"), "untouched");
    // An account cannot write where it may not.
    let mut order = host.order("denied", &["echo ran"]);
    order.user = "nobody".to_owned();
    order.scripts = vec![script(&victim.join("sub"), "a.sh", "echo x")];
    let done = host.run(order).await;
    assert_eq!(done.codes(), (111, FAILED, 1));
    assert!(
        done.row.error_msg.contains("Permission denied"),
        "{}",
        done.row.error_msg
    );
}

// contract: v2-http-task#55
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_script_files_are_removed() {
    let data = tempfile::tempdir().expect("a directory");
    let place = open_dir();
    let dir = place.path().join("scripts");
    let mut settings = config(data.path());
    settings.script_clean_interval_ms = 100;
    settings.script_clean_batch = 3;
    let mut host = Host::start(settings).await;
    let mut order = host.order("use", &["true"]);
    order.scripts = vec![script(&dir, "bk_gse_script_new.sh", "echo")];
    assert_eq!(host.run(order).await.codes(), (0, SUCCEEDED, 0));
    let old = std::time::SystemTime::now() - Duration::from_secs(73 * 3600);
    let aged = |name: &str| {
        let file = std::fs::File::create(dir.join(name)).expect("create");
        file.set_modified(old).expect("set the time");
    };
    (0..10).for_each(|n| aged(&format!("bk_gse_script_{n}.sh")));
    aged("something_else.sh");
    std::fs::create_dir(dir.join("bk_gse_script_dir")).expect("mkdir");
    let watched = dir.clone();
    let count = move || std::fs::read_dir(&watched).expect("list").count();
    host.until("the old ones are gone", move || count() == 3).await;
    let kept = ["bk_gse_script_new.sh", "something_else.sh", "bk_gse_script_dir"];
    for kept in kept {
        assert!(dir.join(kept).exists(), "{kept}");
    }
    // The directory is remembered by the next agent, which runs nothing there itself.
    let settings = host.config.clone();
    host.stop().await;
    aged("bk_gse_script_later.sh");
    std::os::unix::fs::symlink("something_else.sh", dir.join("bk_gse_script_link")).expect("a link");
    let mut host = Host::start(settings).await;
    let gone = dir.join("bk_gse_script_later.sh");
    host.until("the one from before is gone too", move || !gone.exists())
        .await;
    for kept in kept.iter().chain(&["bk_gse_script_link"]) {
        assert!(dir.join(kept).symlink_metadata().is_ok(), "{kept}");
    }
}
