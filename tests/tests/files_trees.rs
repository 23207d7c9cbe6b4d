//! Directories, patterns, names, links and accounts: what comes out at a target is what was meant, and nothing else.
#![allow(clippy::unwrap_used)] // a test ends by panicking

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use gse_tests::files::{codes, part_files, path_text, random_bytes, transfer_body, transfer_task};
use gse_tests::{Api, Site};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);
const NO_SOURCE: i64 = 104;
const NO_SUCH_USER: i64 = 122;
const READ: i64 = 123;
const NO_TARGET_DIR: i64 = 127;
const PLACE: i64 = 705;
const SOURCE_KIND: i64 = 706;

/// A directory that every account may enter.
fn open_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    set_mode(dir.path(), 0o755);
    dir
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn mode_of(path: &Path) -> u32 {
    path.symlink_metadata().unwrap().mode() & 0o7777
}

async fn rows_of(api: &Api, tasks: &[Value], limit: Duration) -> Vec<Value> {
    let id = api.submit_files("async_transfer_file", &transfer_body(tasks, 60)).await;
    api.files_over(&id, limit).await
}

/// What is the same of two trees: names, kinds, modes, contents, links; `extra` names are skipped.
fn assert_same_tree(one: &Path, other: &Path) {
    let names = |dir: &Path| {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(one), names(other), "{}", other.display());
    for name in names(one) {
        let (a, b) = (one.join(&name), other.join(&name));
        let (meta_a, meta_b) = (a.symlink_metadata().unwrap(), b.symlink_metadata().unwrap());
        assert_eq!(meta_a.file_type(), meta_b.file_type(), "{}", b.display());
        if meta_a.file_type().is_symlink() {
            assert_eq!(std::fs::read_link(&a).unwrap(), std::fs::read_link(&b).unwrap());
            continue;
        }
        assert_eq!(mode_of(&a), mode_of(&b), "{}", b.display());
        if meta_a.is_dir() {
            assert_same_tree(&a, &b);
        } else {
            assert!(
                std::fs::read(&a).unwrap() == std::fs::read(&b).unwrap(),
                "{}",
                b.display()
            );
        }
    }
}

#[tokio::test]
async fn a_tree_comes_out_as_it_was() {
    let (site, _agents, ids) = Site::with_file_agents(3, &[], &[]).await.unwrap();
    let api = site.api();
    let dir = open_dir();
    let source = dir.path().join("the tree");
    std::fs::create_dir_all(source.join("a b/deep/er")).unwrap();
    std::fs::create_dir(source.join("empty")).unwrap();
    std::fs::write(source.join("nothing"), b"").unwrap();
    std::fs::write(source.join("with space and 'quotes' \"$(x)\""), b"1").unwrap();
    std::fs::write(source.join("new\nline\ttab"), b"2").unwrap();
    std::fs::write(source.join(OsStr::from_bytes(b"not \xff\xfe utf-8")), b"3").unwrap();
    std::fs::create_dir(source.join(OsStr::from_bytes(b"dir \xff\n"))).unwrap();
    std::fs::write(source.join(OsStr::from_bytes(b"dir \xff\n/in it")), b"4").unwrap();
    std::fs::write(source.join("-rf"), b"5").unwrap();
    std::fs::write(source.join("n".repeat(255)), b"6").unwrap();
    std::fs::write(source.join("a b/deep/er/file"), random_bytes(70_001)).unwrap();
    symlink("../nothing", source.join("a b/up")).unwrap();
    symlink("deep/er/file", source.join("a b/down")).unwrap();
    symlink("gone", source.join("to nowhere")).unwrap();
    for (name, mode) in [("-rf", 0o600), ("nothing", 0o444), ("a b/deep/er/file", 0o751)] {
        set_mode(&source.join(name), mode);
    }
    set_mode(&source.join("empty"), 0o700);
    set_mode(&source.join("a b"), 0o550);
    let at = |n: u32| dir.path().join(format!("t{n}"));
    let to = |n: u32| path_text(&at(n)) + "/";
    // In messages. contract: p2p#25
    let task = transfer_task(&ids[0], &path_text(&source), "", &[&ids[1]], &to(1));
    // Under its name among others, and by a pattern.
    let named = transfer_task(&ids[0], &path_text(dir.path()), "the tree", &[&ids[2]], &to(2));
    let rows = rows_of(&api, &[task, named], LIMIT).await;
    assert_eq!(codes(&rows), [0; 4], "{rows:#?}");
    assert_same_tree(&source, &at(1).join("the tree"));
    assert_same_tree(&source, &at(2).join("the tree"));
    // Through a swarm, on top of what is there already.
    std::fs::write(source.join("large"), random_bytes(12 << 20)).unwrap();
    let task = transfer_task(&ids[0], &path_text(&source), "", &[&ids[1]], &to(1));
    let again = transfer_task(&ids[0], &path_text(&source), "", &[&ids[2]], &to(3));
    let rows = rows_of(&api, &[task, again], LIMIT).await;
    assert_eq!(codes(&rows), [0; 3], "{rows:#?}");
    assert_same_tree(&source, &at(1).join("the tree"));
    assert_same_tree(&source, &at(3).join("the tree"));
    // Nothing at all, each way of it.
    std::fs::create_dir(dir.path().join("bare")).unwrap();
    let bare = transfer_task(&ids[0], &path_text(&dir.path().join("bare")), "", &[&ids[1]], &to(4));
    let zero = transfer_task(&ids[0], &path_text(&source), "nothing", &[&ids[1], &ids[0]], &to(5));
    let rows = rows_of(&api, &[bare, zero], LIMIT).await;
    assert_eq!(codes(&rows), [0; 5], "{rows:#?}");
    assert!(at(4).join("bare").is_dir() && at(4).join("bare").read_dir().unwrap().next().is_none());
    assert_eq!(at(5).join("nothing").metadata().unwrap().len(), 0);
    assert_eq!(part_files(dir.path()), [] as [&Path; 0]);
}

// contract: reliability#S5
#[tokio::test]
async fn what_leads_out_or_is_no_file_is_not_sent() {
    let (site, _agents, ids) = Site::with_file_agents(2, &[], &[]).await.unwrap();
    let api = site.api();
    let dir = open_dir();
    std::fs::write(dir.path().join("secret"), b"outside").unwrap();
    let make = |name: &str| {
        let tree = dir.path().join(name);
        std::fs::create_dir_all(tree.join("sub")).unwrap();
        std::fs::write(tree.join("plain"), b"inside").unwrap();
        tree
    };
    symlink("../../secret", make("climbs").join("sub/link")).unwrap();
    symlink(dir.path().join("secret"), make("absolute").join("link")).unwrap();
    symlink("sub/../../secret", make("winds").join("link")).unwrap();
    let run = |program: &str, args: &[&str], path: &Path| {
        let mut command = std::process::Command::new(program);
        command.arg(path).args(args);
        assert!(command.status().unwrap().success(), "{program}");
    };
    run("mkfifo", &[], &make("pipe").join("sub/pipe"));
    run("mknod", &["c", "1", "5"], &make("device").join("zero"));
    let _listener = std::os::unix::net::UnixListener::bind(make("socket").join("socket")).unwrap();
    let names = ["climbs", "absolute", "winds", "pipe", "device", "socket"];
    let to = path_text(&dir.path().join("to"));
    let mut tasks: Vec<Value> = names
        .iter()
        .map(|name| transfer_task(&ids[0], &path_text(&dir.path().join(name)), "", &[&ids[1]], &to))
        .collect();
    // By its name, alone; and one among them that is well.
    let device = path_text(&dir.path().join("device"));
    tasks.push(transfer_task(&ids[0], &device, "zero", &[&ids[1]], &to));
    tasks.push(transfer_task(&ids[0], &device, "plain", &[&ids[1]], &to));
    let rows = rows_of(&api, &tasks, LIMIT).await;
    let expected = [
        SOURCE_KIND,
        SOURCE_KIND,
        SOURCE_KIND,
        SOURCE_KIND,
        SOURCE_KIND,
        SOURCE_KIND,
        SOURCE_KIND,
        0,
    ];
    // Uploads, then each one's download.
    assert_eq!(codes(&rows), [expected, expected].concat(), "{rows:#?}");
    for (row, name) in rows
        .iter()
        .zip(["sub/link", "link", "link", "sub/pipe", "zero", "socket", "zero"])
    {
        assert!(row["error_msg"].as_str().unwrap().contains(name), "{name}: {row:#}");
    }
    let there: Vec<_> = Path::new(&to)
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(there, ["plain"]);
}

// contract: reliability#S5
#[tokio::test]
async fn links_at_the_target_lead_nowhere() {
    let (site, _agents, ids) = Site::with_file_agents(2, &[], &[]).await.unwrap();
    let api = site.api();
    let dir = open_dir();
    let source = dir.path().join("tree");
    std::fs::create_dir_all(source.join("sub")).unwrap();
    std::fs::write(source.join("sub/file"), b"new").unwrap();
    std::fs::write(source.join("top"), b"new").unwrap();
    let outside = dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("file"), b"old").unwrap();
    std::fs::write(outside.join("kept"), b"old").unwrap();
    // The directory of the tree, one inside of it, and a file are links that somebody has put there before.
    let at = |n: u32| dir.path().join(format!("t{n}"));
    (1..4).for_each(|n| std::fs::create_dir(at(n)).unwrap());
    symlink(&outside, at(1).join("tree")).unwrap();
    std::fs::create_dir(at(2).join("tree")).unwrap();
    symlink("../../outside", at(2).join("tree/sub")).unwrap();
    symlink(outside.join("kept"), at(3).join("top")).unwrap();
    // A target directory that is a link is meant.
    let real = dir.path().join("data1");
    std::fs::create_dir(&real).unwrap();
    symlink("data1", at(4)).unwrap();
    let tree = |n: u32| transfer_task(&ids[0], &path_text(&source), "", &[&ids[1]], &path_text(&at(n)));
    let file = |n: u32| transfer_task(&ids[0], &path_text(&source), "top", &[&ids[1]], &path_text(&at(n)));
    // contract: p2p#25
    let rows = rows_of(&api, &[tree(1), tree(2), file(3), tree(4)], LIMIT).await;
    // Two uploads: the tree for three, the file for one.
    assert_eq!(codes(&rows), [0, 0, PLACE, PLACE, 0, 0], "{rows:#?}");
    assert_eq!(std::fs::read(outside.join("file")).unwrap(), b"old");
    assert_eq!(std::fs::read(outside.join("kept")).unwrap(), b"old");
    assert_eq!(outside.read_dir().unwrap().count(), 2);
    // The link itself was replaced, not what it led to.
    assert!(at(3).join("top").symlink_metadata().unwrap().is_file());
    assert_eq!(std::fs::read(real.join("tree/sub/file")).unwrap(), b"new");
    assert!(at(4).symlink_metadata().unwrap().is_symlink());
    assert_eq!(part_files(dir.path()), [] as [&Path; 0]);
}

#[tokio::test]
async fn the_source_among_its_targets_is_not_touched() {
    let (site, _agents, ids) = Site::with_file_agents(2, &[], &[]).await.unwrap();
    let api = site.api();
    let dir = open_dir();
    let source = dir.path().join("src");
    std::fs::create_dir_all(source.join("tree/sub")).unwrap();
    std::fs::write(source.join("small"), random_bytes(5_000)).unwrap();
    std::fs::write(source.join("large"), random_bytes(9 << 20)).unwrap();
    std::fs::write(source.join("tree/sub/file"), b"content").unwrap();
    set_mode(&source.join("small"), 0o640);
    // The same directory by another way.
    symlink(&source, dir.path().join("alias")).unwrap();
    let state = |name: &str| {
        let meta = source.join(name).metadata().unwrap();
        (
            meta.ino(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime_nsec(),
            meta.len(),
            meta.mode(),
        )
    };
    let names = ["small", "large", "tree/sub/file", "tree/sub", "tree", "."];
    let before = names.map(state);
    let from = path_text(&source);
    let all = [ids[0].as_str(), ids[1].as_str()];
    let alias = path_text(&dir.path().join("alias")) + "/";
    let other = path_text(&dir.path().join("other"));
    // Both agents are on this host; only one of them is the source.
    let tasks = [
        transfer_task(&ids[0], &from, "small", &all[..1], &from),
        transfer_task(&ids[0], &from, "large", &all[..1], &alias),
        transfer_task(&ids[0], &path_text(&source.join("tree")), "", &all[..1], &from),
        transfer_task(&ids[0], &from, "small", &all[..1], &other),
        transfer_task(&ids[0], &from, "large", &all[..1], &other),
        transfer_task(&ids[0], &path_text(&source.join("tree")), "", &all[..1], &other),
    ];
    // contract: p2p#29
    let rows = rows_of(&api, &tasks, LIMIT).await;
    assert!(codes(&rows).iter().all(|code| *code == 0), "{rows:#?}");
    assert_eq!(names.map(state), before);
    for name in ["small", "large", "tree/sub/file"] {
        let copy = Path::new(&other).join(name);
        assert!(
            std::fs::read(&copy).unwrap() == std::fs::read(source.join(name)).unwrap(),
            "{name}"
        );
        assert_ne!(copy.metadata().unwrap().ino(), state(name).0, "{name}");
    }
    assert_eq!(mode_of(&Path::new(&other).join("small")), 0o640);
    assert_eq!(part_files(dir.path()), [] as [&Path; 0]);
}

#[tokio::test]
async fn accounts_read_and_write_only_what_they_may() {
    let (site, _agents, ids) = Site::with_file_agents(2, &[], &[]).await.unwrap();
    let api = site.api();
    let dir = open_dir();
    std::fs::write(dir.path().join("public"), b"for all").unwrap();
    std::fs::write(dir.path().join("private"), b"of root").unwrap();
    set_mode(&dir.path().join("private"), 0o600);
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("a"), b"a").unwrap();
    std::fs::write(tree.join("hidden"), b"of root").unwrap();
    set_mode(&tree.join("hidden"), 0o600);
    let at = |name: &str| path_text(&dir.path().join(name));
    for (name, mode) in [("roots", 0o755), ("all", 0o777)] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        set_mode(&dir.path().join(name), mode);
    }
    let from = path_text(dir.path());
    let task = |name: &str, reader: &str, writer: &str, to: &str| {
        let mut task = transfer_task(&ids[0], &from, name, &[&ids[1]], &at(to));
        task["source"]["agent"]["user"] = json!(reader);
        task["target"]["agents"][0]["user"] = json!(writer);
        task
    };
    let cases = [
        (task("private", "nobody", "root", "all/1"), READ, READ),
        (task("tree", "nobody", "root", "all/2"), READ, READ),
        (task("public", "nobody", "nobody", "roots"), 0, PLACE),
        (task("public", "nobody", "nobody", "roots/made"), 0, PLACE),
        (
            task("public", "no-such-account", "root", "all/3"),
            NO_SUCH_USER,
            NO_SUCH_USER,
        ),
        (task("public", "root", "no-such-account", "all/4"), 0, NO_SUCH_USER),
        (task("public", "root", "nobody", "all/5"), 0, 0),
        (task("private", "root", "nobody", "all/6"), 0, 0),
    ];
    // Each its own task: what one source may not do is no matter of the others, but uploads are shared by their sources.
    for (task, upload, download) in cases {
        let rows = rows_of(&api, std::slice::from_ref(&task), LIMIT).await;
        assert_eq!(codes(&rows), [upload, download], "{task:#} {rows:#?}");
        for row in &rows {
            assert!(
                row["error_code"] == 0 || !row["error_msg"].as_str().unwrap().is_empty(),
                "{row:#}"
            );
        }
    }
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap().uid.as_raw();
    for made in ["all/5", "all/5/public", "all/6/private"] {
        assert_eq!(dir.path().join(made).metadata().unwrap().uid(), nobody, "{made}");
    }
    assert_eq!(mode_of(&dir.path().join("all/6/private")), 0o600);
    for absent in [
        "all/1/private",
        "all/2/tree",
        "roots/public",
        "roots/made",
        "all/3",
        "all/4",
    ] {
        assert!(dir.path().join(absent).symlink_metadata().is_err(), "{absent}");
    }
    assert_eq!(part_files(dir.path()), [] as [&Path; 0]);
}

#[tokio::test]
async fn a_missing_directory_is_made_or_an_error_at_once() {
    let (site, _agents, ids) = Site::with_file_agents(3, &[], &[]).await.unwrap();
    let api = site.api();
    let dir = open_dir();
    std::fs::write(dir.path().join("small"), b"small").unwrap();
    std::fs::write(dir.path().join("large"), random_bytes(8 << 20)).unwrap();
    std::fs::write(dir.path().join("a file"), b"in the way").unwrap();
    std::fs::create_dir(dir.path().join("there")).unwrap();
    let at = |name: &str| path_text(&dir.path().join(name));
    let (from, targets) = (path_text(dir.path()), [ids[1].as_str()]);
    // contract: p2p#27, v2-http-task#43
    let tasks = [
        transfer_task(&ids[0], &from, "small", &targets, &at("missing/1")),
        transfer_task(&ids[0], &from, "large", &targets, &at("missing/2")),
        transfer_task(&ids[0], &from, "large", &[&ids[2]], &at("there")),
        transfer_task(&ids[0], &from, "small", &targets, &at("a file/below")),
    ];
    let mut body = transfer_body(&tasks, 60);
    body["auto_mkdir"] = json!(false);
    let begun = Instant::now();
    let id = api.submit_files("async_transfer_file", &body).await;
    let rows = api.files_over(&id, LIMIT).await;
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    let mut by_dir: Vec<(String, i64)> = rows[2..]
        .iter()
        .map(|row| {
            let dir = row["content"]["dest_file_dir"].as_str().unwrap();
            (dir.to_owned(), row["error_code"].as_i64().unwrap())
        })
        .collect();
    by_dir.sort();
    let mut expected = vec![
        (at("a file/below"), NO_TARGET_DIR),
        (at("missing/1"), NO_TARGET_DIR),
        (at("missing/2"), NO_TARGET_DIR),
        (at("there"), 0),
    ];
    expected.sort();
    assert_eq!(by_dir, expected, "{rows:#?}");
    assert_eq!(codes(&rows)[..2], [0, 0], "{rows:#?}");
    assert!(!dir.path().join("missing").exists());
    assert!(dir.path().join("there/large").exists());
    // An empty path is refused before anything happens.
    let body = transfer_body(&[transfer_task(&ids[0], &from, "small", &targets, "")], 60);
    let reply = api
        .post(&format!("{}/async_transfer_file", gse_tests::api::EXT), &body)
        .await;
    assert_ne!(reply["code"], 0, "{reply}");
}

#[tokio::test]
async fn patterns_are_matched_at_the_source() {
    let (site, _agents, ids) = Site::with_file_agents(2, &[], &[]).await.unwrap();
    let api = site.api();
    let dir = open_dir();
    let source = dir.path().join("src");
    std::fs::create_dir_all(source.join("d.log")).unwrap();
    for name in [
        "a.log",
        "b.log",
        "c.txt",
        ".hidden.log",
        "app-1.jar",
        "app-22.jar",
        "app-x.jar",
        "[1].log",
    ] {
        std::fs::write(source.join(name), name).unwrap();
    }
    let at = |n: usize| dir.path().join(format!("t{n}"));
    // contract: p2p#26, v2-http-task#34
    let cases: [(&str, &[&str]); 7] = [
        ("*.log", &["[1].log", "a.log", "b.log"]),
        ("?.*", &["a.log", "b.log", "c.txt"]),
        ("[ab].log", &["a.log", "b.log"]),
        ("REGEX:app-[0-9]+\\.jar", &["app-1.jar", "app-22.jar"]),
        ("app-\\d{2}\\.jar", &["app-22.jar"]),
        ("[1].log", &["[1].log"]),
        ("*.none", &[]),
    ];
    let tasks: Vec<Value> = (0..)
        .zip(&cases)
        .map(|(n, (pattern, _))| {
            let to = path_text(&at(n));
            transfer_task(&ids[0], &path_text(&source), pattern, &[&ids[1]], &to)
        })
        .collect();
    let rows = rows_of(&api, &tasks, LIMIT).await;
    let expected = [0, 0, 0, 0, 0, 0, NO_SOURCE];
    assert_eq!(codes(&rows), [expected, expected].concat(), "{rows:#?}");
    for (n, (pattern, names)) in cases.iter().enumerate() {
        // What was asked for is told, not what was found.
        assert_eq!(rows[n]["content"]["source_file_name"], *pattern);
        let Ok(list) = at(n).read_dir() else {
            assert!(names.is_empty(), "{pattern}");
            continue;
        };
        let mut list: Vec<_> = list.map(|entry| entry.unwrap().file_name()).collect();
        list.sort();
        assert_eq!(list, *names, "{pattern}");
    }
    for row in [&rows[6], &rows[13]] {
        assert!(row["error_msg"].as_str().unwrap().contains("*.none"), "{row:#}");
    }
}

#[tokio::test]
#[ignore = "full tier: makes, compares and removes 30,000 files"]
async fn ten_thousand_files_go_as_one() {
    let (site, _agents, ids) = Site::with_file_agents(3, &[], &[]).await.unwrap();
    let api = site.api();
    let dir = open_dir();
    let source = dir.path().join("many");
    for d in 0..100 {
        let sub = source.join(format!("d{d:02}"));
        std::fs::create_dir_all(&sub).unwrap();
        for f in 0..100 {
            std::fs::write(sub.join(format!("f{f:02}")), &random_bytes(1024 + d + f)[..1024]).unwrap();
        }
    }
    let at = |n: usize| dir.path().join(format!("t{n}"));
    let tasks: Vec<Value> = (1..3)
        .map(|n| transfer_task(&ids[0], &path_text(&source), "", &[&ids[n]], &path_text(&at(n))))
        .collect();
    // contract: p2p#25
    let begun = Instant::now();
    let rows = rows_of(&api, &tasks, Duration::from_secs(55)).await;
    eprintln!("10,000 files to two targets: {:?}", begun.elapsed());
    assert_eq!(codes(&rows), [0; 3], "{rows:#?}");
    assert_eq!(rows[0]["content"]["size"], 10_000 * 1024);
    for n in 1..3 {
        assert_same_tree(&source, &at(n).join("many"));
    }
    assert_eq!(part_files(dir.path()), [] as [&Path; 0]);
}
