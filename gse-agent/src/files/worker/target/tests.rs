use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use proptest::prelude::*;

use super::*;

/// Parts of paths and names, most of which somebody with bad intentions would send or plant.
const NAMES: [&[u8]; 14] = [
    b"..", b".", b"", b"/", b"../x", b"a", b"b", b"out", b"fifo", b"hard", b"/etc", b"a\0b", b"\xff\n", b"file",
];

fn name() -> impl Strategy<Value = Vec<u8>> {
    proptest::sample::select(NAMES.to_vec()).prop_map(<[u8]>::to_vec)
}

fn path() -> impl Strategy<Value = Vec<Vec<u8>>> {
    proptest::collection::vec(name(), 0..4)
}

#[derive(Debug, Clone)]
enum Step {
    Create(Create),
    Again(Again),
    Put(Put),
    Discard(Vec<u8>),
    Sweep(Vec<u8>),
    Finish(Vec<Vec<u8>>),
    /// Somebody puts a link that leads out where a directory or a file may be.
    Plant(&'static str),
}

fn step() -> impl Strategy<Value = Step> {
    let link = || {
        proptest::sample::select(vec![
            "../../outside",
            "/",
            "../outside/kept",
            "a",
            "..",
            "a/../../outside",
        ])
    };
    prop_oneof![
        (name(), any::<bool>()).prop_map(|(part, again)| Step::Create(Create { part, again })),
        (name(), path()).prop_map(|(part, path)| Step::Again(Again { part, path })),
        (0..4, path(), name(), link()).prop_map(|(kind, path, part, link)| Step::Put(Put {
            kind,
            path,
            part,
            mode: 0o777,
            link: link.as_bytes().to_vec(),
        })),
        name().prop_map(Step::Discard),
        name().prop_map(Step::Sweep),
        path().prop_map(Step::Finish),
        proptest::sample::select(vec!["to/a", "to/b", "to/file", "to/.stage/a"]).prop_map(Step::Plant),
    ]
}

/// Everything about a directory that may not change.
fn state(dir: &Path) -> Vec<(std::ffi::OsString, Vec<u8>, u32)> {
    use std::os::unix::fs::MetadataExt;
    let mut all: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (
                entry.file_name(),
                fs::read(entry.path()).unwrap(),
                entry.metadata().unwrap().mode(),
            )
        })
        .collect();
    all.sort();
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever is asked for, and whatever is planted meanwhile: nothing outside is opened to be written, made, changed or removed.
    // contract: reliability#S5
    #[test]
    fn nothing_leads_out(staged in any::<bool>(), steps in proptest::collection::vec(step(), 1..24)) {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("outside")).unwrap();
        fs::write(at("outside/kept"), b"of somebody else").unwrap();
        fs::create_dir(at("to")).unwrap();
        fs::hard_link(at("outside/kept"), at("to/hard")).unwrap();
        symlink("../outside", at("to/out")).unwrap();
        nix::unistd::mkfifo(&at("to/fifo"), Mode::S_IRWXU).unwrap();
        let before = (state(&at("outside")), state_of_tops(dir.path()));
        let ask = Enter {
            dir: at("to").to_str().unwrap().to_owned(),
            make_dirs: false,
            roots: vec![],
            stage: if staged { b".stage".to_vec() } else { vec![] },
        };
        let (mut target, _) = Target::enter(&ask).unwrap();
        for step in steps {
            // Most of it is refused; what is not may only have happened inside.
            let opened = match step {
                Step::Create(ask) => target.create(&ask).ok().map(|file| (file, true)),
                Step::Again(ask) => target.again(&ask).ok(),
                Step::Put(ask) => { let _refused = target.put(&ask); None }
                Step::Discard(part) => { let _refused = target.discard(&[part]); None }
                Step::Sweep(ending) => { let _refused = target.sweep(&ending); None }
                Step::Finish(path) => {
                    let put = Put { path, mode: 0o700, ..Put::default() };
                    let _refused = target.finish(&[put]);
                    None
                }
                Step::Plant(name) => {
                    // Where there is something already, or no directory for it, nothing is planted.
                    let _there = symlink("../outside", at(name));
                    None
                }
            };
            if let Some((file, _)) = opened {
                let real = names::real_path(&file).unwrap();
                let below = format!("{}/", at("to").display());
                prop_assert!(real.starts_with(&below), "{real} was opened");
            }
        }
        drop(target);
        prop_assert_eq!((state(&at("outside")), state_of_tops(dir.path())), before);
    }
}

fn state_of_tops(dir: &Path) -> Vec<std::ffi::OsString> {
    let mut all: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    all.sort();
    all
}

#[test]
fn a_file_that_was_put_is_opened_again_at_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let ask = Enter {
        dir: dir.path().to_str().unwrap().to_owned(),
        stage: b".stage".to_vec(),
        ..Enter::default()
    };
    let (mut target, _) = Target::enter(&ask).unwrap();
    let ino = |file: &OwnedFd| fstat(file).unwrap().st_ino;
    let part = Create {
        part: b"0".to_vec(),
        again: false,
    };
    let made = ino(&target.create(&part).unwrap());
    let again = Again {
        part: b"0".to_vec(),
        path: vec![b"name".to_vec()],
    };
    assert_eq!(ino(&target.again(&again).unwrap().0), made);
    let put = Put {
        kind: EntryKind::File.into(),
        path: vec![b"name".to_vec()],
        part: b"0".to_vec(),
        ..Put::default()
    };
    target.put(&put).unwrap();
    assert_eq!(ino(&target.again(&again).unwrap().0), made);
    target.finish(&[]).unwrap();
    // Somebody's own file that is called like a part file was.
    fs::write(dir.path().join("0"), b"other").unwrap();
    assert_eq!(ino(&target.again(&again).unwrap().0), made);
    fs::remove_file(dir.path().join("name")).unwrap();
    assert!(target.again(&again).is_err());
}
