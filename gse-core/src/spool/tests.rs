//! The spool on real files, and on a disk that fails, fills up or forgets.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use proptest::prelude::*;

use super::format::{ENTRY_HEADER, SEGMENT_HEADER};
use super::*;

fn config(dir: &Path) -> SpoolConfig {
    SpoolConfig {
        dir: dir.to_owned(),
        segment_bytes: 400,
        max_bytes: 1 << 20,
        max_entry_bytes: 4096,
        when_full: WhenFull::DropOldest,
        sync: SyncPolicy::Never,
    }
}

fn body(index: u64) -> Vec<u8> {
    let len = (index * 37 % 120) as usize;
    (0..len).map(|n| (index as usize + n) as u8).collect()
}

fn records(index: u64) -> u32 {
    (index % 5) as u32 + 1
}

fn put(spool: &mut Spool, indices: impl IntoIterator<Item = u64>) -> Appended {
    let bodies: Vec<(u64, Vec<u8>)> = indices.into_iter().map(|index| (index, body(index))).collect();
    let puts: Vec<Put<'_>> = bodies
        .iter()
        .map(|(index, body)| Put {
            index: *index,
            records: records(*index),
            body,
        })
        .collect();
    spool.append(&puts)
}

fn put_all(spool: &mut Spool, indices: impl IntoIterator<Item = u64>) {
    let appended = put(spool, indices);
    assert!(appended.failed.is_none(), "{:?}", appended.failed);
}

/// Everything after `after`, in small pieces; each entry must be as it was written.
fn all(spool: &mut Spool, mut after: u64) -> (Vec<u64>, Gone) {
    let (mut indices, mut damaged) = (Vec::new(), Gone::default());
    loop {
        let found = spool.read(after, 150).unwrap();
        damaged.add(found.damaged);
        let Some(last) = found.entries.last() else { break };
        after = last.index;
        for entry in found.entries {
            assert_eq!(entry.body, body(entry.index), "entry {}", entry.index);
            assert_eq!(entry.records, records(entry.index));
            indices.push(entry.index);
        }
    }
    (indices, damaged)
}

fn sum(indices: impl IntoIterator<Item = u64>) -> u64 {
    indices.into_iter().map(|index| u64::from(records(index))).sum()
}

#[test]
fn what_goes_in_comes_out_in_order_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (mut spool, recovery) = Spool::open(config(dir.path())).unwrap();
    assert_eq!(recovery, Recovery::default());
    put_all(&mut spool, 1..=40);
    put_all(&mut spool, (41..100).step_by(3));
    let want: Vec<u64> = (1..=40).chain((41..100).step_by(3)).collect();
    assert_eq!(all(&mut spool, 0), (want.clone(), Gone::default()));
    assert_eq!(spool.records(), sum(want.clone()));
    assert!(spool.index.segments().len() > 5);
    assert_eq!(spool.release(17).unwrap().released.records, sum(1..=17));
    assert_eq!(spool.release(17).unwrap(), Released::default());
    spool.commit(b"a note").unwrap();
    put_all(&mut spool, [500]);

    // Nothing is closed: this is what kill -9 leaves.
    std::mem::drop(spool);
    let (mut spool, recovery) = Spool::open(config(dir.path())).unwrap();
    assert!(recovery.is_clean(), "{recovery:?}");
    let want: Vec<u64> = want.into_iter().filter(|index| *index > 17).chain([500]).collect();
    assert_eq!(
        (spool.note(), spool.released(), spool.last_index()),
        (&b"a note"[..], 17, 500)
    );
    assert_eq!(recovery.found.records, sum(want.clone()));
    assert_eq!(all(&mut spool, 0).0, want);
    assert_eq!(
        all(&mut spool, 60).0,
        want.iter().copied().filter(|index| *index > 60).collect::<Vec<_>>()
    );
    assert_eq!(spool.release(1_000).unwrap().released.records, sum(want));
    spool.commit(b"").unwrap();
    assert_eq!((spool.entries(), spool.records(), spool.bytes()), (0, 0, 0));
    let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(files.len(), 1, "the mark alone is left: {files:?}");
    put_all(&mut spool, [1_001]);
    assert_eq!(all(&mut spool, 0).0, [1_001]);
    assert!(matches!(
        put(&mut spool, [1_001]).failed,
        Some(SpoolError::Order { .. })
    ));
}

#[test]
fn the_bound_drops_the_oldest_and_counts_it_or_refuses() {
    // contract: reliability#F8
    let dir = tempfile::tempdir().unwrap();
    let small = SpoolConfig {
        max_bytes: 2_000,
        ..config(dir.path())
    };
    let (mut spool, _) = Spool::open(small.clone()).unwrap();
    let mut dropped = Gone::default();
    for index in 1..=200 {
        let appended = put(&mut spool, [index]);
        assert!(appended.failed.is_none());
        dropped.add(appended.dropped);
        assert!(spool.bytes() <= 2_000);
    }
    assert_eq!(dropped.records + spool.records(), sum(1..=200));
    let (left, _) = all(&mut spool, 0);
    assert_eq!(left, ((dropped.entries + 1)..=200).collect::<Vec<_>>());
    assert!(matches!(
        spool
            .append(&[Put {
                index: 300,
                records: 1,
                body: &[0; 3_000]
            }])
            .failed,
        Some(SpoolError::TooLong { .. })
    ));

    let dir = tempfile::tempdir().unwrap();
    let (mut spool, _) = Spool::open(SpoolConfig {
        dir: dir.path().to_owned(),
        when_full: WhenFull::Refuse,
        ..small
    })
    .unwrap();
    let appended = put(&mut spool, 1..=200);
    assert!(matches!(appended.failed, Some(SpoolError::Bound { .. })));
    let written = appended.written as u64;
    assert_eq!(
        (all(&mut spool, 0).0, appended.dropped),
        ((1..=written).collect(), Gone::default())
    );
    let _ = spool.release(written / 2).unwrap();
    put_all(&mut spool, [written + 1]);
}

/// Copies a spool's directory.
fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Opens what damage has left; nothing that comes out may be wrong, and every record is found or missing, none twice.
fn check_damaged(dir: &Path, what: &str) -> Vec<u64> {
    let (mut spool, recovery) = Spool::open(config(dir)).unwrap_or_else(|error| panic!("{what}: {error}"));
    let (found, damaged) = all(&mut spool, 0);
    assert!(found.is_sorted(), "{what}");
    assert_eq!(spool.records(), sum(found.clone()), "{what}: {recovery:?}, {damaged:?}");
    assert_eq!(recovery.found.records, spool.records() + damaged.records, "{what}");
    // It goes on, and a second start finds nothing new.
    put_all(&mut spool, [10_000]);
    drop(spool);
    let (mut spool, again) = Spool::open(config(dir)).unwrap();
    assert!(again.is_clean(), "{what}: {again:?}");
    let (again, damaged) = all(&mut spool, 0);
    assert_eq!(
        again,
        found.iter().copied().chain([10_000]).collect::<Vec<_>>(),
        "{what}"
    );
    assert_eq!(damaged, Gone::default(), "{what}");
    assert_eq!(
        spool.release(20_000).unwrap().released.records,
        sum(found.clone()) + u64::from(records(10_000))
    );
    found
}

/// A spool of 30 entries of which five are released, and the places in each file where an entry begins or ends.
fn sample(dir: &Path) -> BTreeMap<String, Vec<u64>> {
    let (mut spool, _) = Spool::open(config(dir)).unwrap();
    put_all(&mut spool, 1..=30);
    let _ = spool.release(5).unwrap();
    spool.commit(b"note").unwrap();
    let mut places = BTreeMap::new();
    for segment in spool.index.segments() {
        let mut at = SEGMENT_HEADER as u64;
        let mut boundaries = vec![0, at];
        for index in segment.first..=segment.last {
            at += (ENTRY_HEADER + body(index).len()) as u64;
            boundaries.push(at);
        }
        assert_eq!(at, segment.bytes);
        places.insert(format::name(segment.first), boundaries);
    }
    places.insert(mark::FILE.to_owned(), vec![0, 24, 28, 508, 4096, 4120, 4608]);
    places
}

#[test]
fn a_file_cut_at_any_boundary_costs_only_what_is_behind_it() {
    // contract: reliability#F11
    let origin = tempfile::tempdir().unwrap();
    let places = sample(origin.path());
    let segments = places.len() - 1;
    assert!(segments > 4);
    for (n, (name, boundaries)) in places.iter().enumerate() {
        for boundary in boundaries {
            for at in boundary.saturating_sub(1)..=boundary + 1 {
                let dir = tempfile::tempdir().unwrap();
                copy(origin.path(), dir.path());
                let file = std::fs::File::options()
                    .write(true)
                    .open(dir.path().join(name))
                    .unwrap();
                let at = at.min(file.metadata().unwrap().len());
                file.set_len(at).unwrap();
                let found = check_damaged(dir.path(), &format!("{name} cut at {at}"));
                if n == segments {
                    assert!((6..=30).all(|index| found.contains(&index)));
                    continue;
                }
                let first = format::first_of(name).unwrap();
                let whole = boundaries.iter().skip(2).filter(|boundary| **boundary <= at).count() as u64;
                let lost = first + whole..first + boundaries.len() as u64 - 2;
                let want: Vec<u64> = (6..=30).filter(|index| !lost.contains(index)).collect();
                assert_eq!(found, want, "{name} cut at {at}");
            }
        }
    }
}

#[test]
fn a_flipped_bit_anywhere_is_noticed_and_costs_no_more_than_it_must() {
    // contract: reliability#F11
    let origin = tempfile::tempdir().unwrap();
    let places = sample(origin.path());
    for (name, boundaries) in &places {
        let len = std::fs::metadata(origin.path().join(name)).unwrap().len();
        let mut spots: BTreeSet<u64> = (0..len).step_by(13).collect();
        for boundary in boundaries {
            spots.extend(boundary.saturating_sub(1)..(boundary + 1).min(len));
        }
        for at in spots.into_iter().filter(|at| *at < len) {
            let dir = tempfile::tempdir().unwrap();
            copy(origin.path(), dir.path());
            let path = dir.path().join(name);
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[at as usize] ^= 1 << (at % 8);
            std::fs::write(&path, bytes).unwrap();
            let what = format!("bit in {name} at {at}");
            let found = check_damaged(dir.path(), &what);
            let Some(first) = format::first_of(name) else {
                assert!((6..=30).all(|index| found.contains(&index)), "{what}");
                continue;
            };
            let last = first + boundaries.len() as u64 - 3;
            let intact = (6..=30).filter(|index| *index < first || *index > last);
            assert!(
                intact.into_iter().all(|index| found.contains(&index)),
                "{what}: {found:?}"
            );
            // The good prefix is kept, and behind a damaged body everything.
            let hit = boundaries.iter().skip(1).filter(|boundary| **boundary <= at).count() as u64;
            if hit > 0 {
                let entry = first + hit - 1;
                let in_header = at < boundaries[hit as usize] + ENTRY_HEADER as u64;
                let expected =
                    (6..=30).filter(|index| *index != entry && (!in_header || *index < entry || *index > last));
                assert_eq!(found, expected.collect::<Vec<_>>(), "{what}");
            }
        }
    }
}

#[test]
fn damage_that_comes_while_the_spool_is_open_is_counted() {
    // contract: reliability#F11
    let dir = tempfile::tempdir().unwrap();
    let places = sample(dir.path());
    let (name, boundaries) = places.iter().nth(1).unwrap();
    for in_header in [false, true] {
        let copied = tempfile::tempdir().unwrap();
        copy(dir.path(), copied.path());
        let (mut spool, _) = Spool::open(config(copied.path())).unwrap();
        let path = copied.path().join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = boundaries[2] as usize + if in_header { 2 } else { ENTRY_HEADER };
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let before = spool.records();
        let (found, damaged) = all(&mut spool, 0);
        assert!(damaged.records > 0);
        assert_eq!(sum(found.clone()) + damaged.records, before);
        assert_eq!(spool.records(), sum(found.clone()));
        let released = spool.release(100).unwrap();
        assert_eq!(
            (released.released.records, released.damaged),
            (sum(found), Gone::default())
        );
    }
}

/// What a simulated disk has.
#[derive(Default)]
struct Platter {
    files: BTreeMap<String, Arc<Mutex<Content>>>,
    /// Names that survive a power cut, with the content they lead to.
    synced: BTreeMap<String, Arc<Mutex<Content>>>,
    /// Bytes that the disk takes.
    space: Option<usize>,
    failing: bool,
}

#[derive(Default)]
struct Content {
    now: Vec<u8>,
    synced: Vec<u8>,
}

/// A disk in memory: it can be full, fail, and lose what was not synced.
#[derive(Clone, Default)]
struct MemDisk(Arc<Mutex<Platter>>);

struct MemFile {
    disk: MemDisk,
    content: Arc<Mutex<Content>>,
}

impl MemDisk {
    fn power_cut(&self) {
        let mut platter = self.0.lock();
        for content in platter.synced.values() {
            let mut content = content.lock();
            content.now = content.synced.clone();
        }
        platter.files = platter.synced.clone();
    }

    fn ready(&self, more: usize) -> io::Result<()> {
        let platter = self.0.lock();
        if platter.failing {
            return Err(io::Error::other("the disk is broken"));
        }
        let used: usize = platter.files.values().map(|content| content.lock().now.len()).sum();
        match platter.space {
            Some(space) if more > 0 && used + more > space => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }
}

impl Disk for MemDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().files.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        self.ready(0)?;
        let content = Arc::default();
        self.0.lock().files.insert(name.to_owned(), Arc::clone(&content));
        Ok(Box::new(MemFile {
            disk: self.clone(),
            content,
        }))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let content = self.0.lock().files.get(name).cloned().ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(MemFile {
            disk: self.clone(),
            content,
        }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let removed = self.0.lock().files.remove(name);
        removed.map(drop).ok_or(io::ErrorKind::NotFound.into())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut platter = self.0.lock();
        let content = platter.files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        platter.files.insert(to.to_owned(), content);
        Ok(())
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.ready(0)?;
        let mut platter = self.0.lock();
        platter.synced = platter.files.clone();
        Ok(())
    }
}

impl DiskFile for MemFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.content.lock().now.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<usize> {
        let content = self.content.lock();
        let from = content.now.get(at as usize..).unwrap_or_default();
        let len = from.len().min(buffer.len());
        buffer[..len].copy_from_slice(&from[..len]);
        Ok(len)
    }

    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let end = at as usize + bytes.len();
        let more = end.saturating_sub(self.content.lock().now.len());
        if let Err(error) = self.disk.ready(more) {
            // Half of it gets through, as on a real disk.
            let half = at as usize + bytes.len() / 2;
            let len = self.content.lock().now.len();
            if self.disk.ready(half.saturating_sub(len)).is_ok() && len < half {
                let mut content = self.content.lock();
                content.now.resize(half, 0);
                content.now[at as usize..half].copy_from_slice(&bytes[..bytes.len() / 2]);
            }
            return Err(error);
        }
        let mut content = self.content.lock();
        if content.now.len() < end {
            content.now.resize(end, 0);
        }
        content.now[at as usize..end].copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.content.lock().now.resize(len as usize, 0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.disk.ready(0)?;
        let mut content = self.content.lock();
        content.synced = content.now.clone();
        Ok(())
    }
}

fn open_on(disk: &MemDisk, change: impl FnOnce(&mut SpoolConfig)) -> (Spool, Recovery) {
    let mut config = config(Path::new("memory"));
    change(&mut config);
    Spool::open_on(config, Box::new(disk.clone())).unwrap()
}

#[test]
fn a_full_disk_is_said_and_costs_nothing_that_was_written() {
    // contract: reliability#F8
    let disk = MemDisk::default();
    let (mut spool, _) = open_on(&disk, |_| ());
    spool.commit(b"").unwrap();
    disk.0.lock().space = Some(8_000);
    let mut written = 0;
    for index in 1..=200 {
        let appended = put(&mut spool, [index]);
        match appended.failed {
            None => written = index,
            Some(SpoolError::NoSpace { .. }) => break,
            Some(error) => panic!("{error}"),
        }
    }
    assert!((20..200).contains(&written));
    // Another one that fails does no harm either; reading, releasing and the note go on.
    assert!(matches!(
        put(&mut spool, [written + 1]).failed,
        Some(SpoolError::NoSpace { .. })
    ));
    assert_eq!(all(&mut spool, 0).0, (1..=written).collect::<Vec<_>>());
    let _ = spool.release(10).unwrap();
    spool.commit(b"full").unwrap();
    put_all(&mut spool, [written + 2, written + 3]);
    let want: Vec<u64> = (11..=written).chain([written + 2, written + 3]).collect();
    assert_eq!(all(&mut spool, 0).0, want);
    drop(spool);
    let (mut spool, recovery) = open_on(&disk, |_| ());
    assert!(recovery.is_clean(), "{recovery:?}");
    assert_eq!((all(&mut spool, 0).0, spool.note()), (want, &b"full"[..]));
}

#[test]
fn a_disk_that_fails_for_a_while_loses_nothing() {
    // contract: reliability#F8
    let disk = MemDisk::default();
    let (mut spool, _) = open_on(&disk, |_| ());
    put_all(&mut spool, 1..=3);
    disk.0.lock().failing = true;
    assert!(matches!(put(&mut spool, [4]).failed, Some(SpoolError::Io { .. })));
    assert!(spool.commit(b"x").is_err());
    disk.0.lock().failing = false;
    put_all(&mut spool, [4, 5]);
    assert_eq!(all(&mut spool, 0).0, [1, 2, 3, 4, 5]);
    drop(spool);
    let (mut spool, recovery) = open_on(&disk, |_| ());
    assert!(recovery.is_clean(), "{recovery:?}");
    assert_eq!(all(&mut spool, 0).0, [1, 2, 3, 4, 5]);
}

#[derive(Debug, Clone)]
enum Step {
    Append(u64),
    Release(u64),
    Commit,
    Sync,
    Full(bool),
    Kill,
    PowerCut,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (1u64..6).prop_map(Step::Append),
        2 => (0u64..40).prop_map(Step::Release),
        2 => Just(Step::Commit),
        1 => Just(Step::Sync),
        1 => any::<bool>().prop_map(Step::Full),
        1 => Just(Step::Kill),
        1 => Just(Step::PowerCut),
    ]
}

fn run(steps: Vec<Step>, sync: SyncPolicy, when_full: WhenFull) {
    let disk = MemDisk::default();
    let change = |config: &mut SpoolConfig| {
        config.sync = sync;
        config.when_full = when_full;
        config.max_bytes = 3_000;
    };
    let (mut spool, _) = open_on(&disk, change);
    let mut held: BTreeSet<u64> = BTreeSet::new();
    let (mut released, mut committed) = (0, 0);
    let mut next = 1;
    for step in steps {
        match step {
            Step::Append(count) => {
                let appended = put(&mut spool, next..next + count);
                held.extend(next..next + appended.written as u64);
                next += count;
                let gone: Vec<u64> = held.iter().copied().take(appended.dropped.entries as usize).collect();
                assert_eq!(appended.dropped.records, sum(gone.clone()));
                held.retain(|index| !gone.contains(index));
                if appended.failed.is_none() {
                    assert!(spool.bytes() <= 3_000);
                }
            }
            Step::Release(back) => {
                let upto = next.saturating_sub(back);
                let answer = spool.release(upto).unwrap();
                assert_eq!(
                    answer.released.records,
                    sum(held.iter().copied().filter(|index| *index <= upto))
                );
                held.retain(|index| *index > upto);
                released = released.max(upto);
            }
            Step::Commit => {
                if spool.commit(&released.to_be_bytes()).is_ok() {
                    committed = released;
                }
            }
            Step::Sync => spool.sync().unwrap(),
            Step::Full(full) => {
                let used = 2_500;
                disk.0.lock().space = full.then_some(used);
            }
            Step::Kill | Step::PowerCut => {
                drop(spool);
                if matches!(step, Step::PowerCut) {
                    disk.power_cut();
                }
                let (opened, recovery) = open_on(&disk, change);
                spool = opened;
                let (found, damaged) = all(&mut spool, 0);
                assert_eq!(damaged, Gone::default());
                assert!(!recovery.mark_lost);
                let found: BTreeSet<u64> = found.into_iter().collect();
                // Nothing is lost: with every write synced not even by a power cut.
                if sync == SyncPolicy::Always || matches!(step, Step::Kill) {
                    assert!(found.is_superset(&held), "{held:?} became {found:?}");
                    assert_eq!(spool.released(), committed);
                }
                held = found;
                released = spool.released();
                committed = released;
                next = next.max(spool.last_index() + 1);
            }
        }
        assert_eq!(spool.records(), sum(held.iter().copied()));
        assert_eq!(spool.entries(), held.len() as u64);
    }
    assert_eq!(all(&mut spool, 0).0, held.into_iter().collect::<Vec<_>>());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever is asked of it, in whatever order, with kills, full disks and power cuts between: the spool has what a list would have.
    #[test]
    fn it_is_a_list_on_disk(steps in prop::collection::vec(step(), 0..60), synced in any::<bool>(), refuse in any::<bool>()) {
        // contract: reliability#F12
        let sync = if synced { SyncPolicy::Always } else { SyncPolicy::Never };
        run(steps, sync, if refuse { WhenFull::Refuse } else { WhenFull::DropOldest });
    }
}

#[test]
fn what_was_synced_survives_a_power_cut_and_nothing_wrong_comes_back() {
    // contract: reliability#F12
    let disk = MemDisk::default();
    let (mut spool, _) = open_on(&disk, |config| {
        config.sync = SyncPolicy::Interval(Duration::from_secs(3600))
    });
    put_all(&mut spool, 1..=5);
    spool.sync().unwrap();
    put_all(&mut spool, [6]);
    drop(spool);
    disk.power_cut();
    let (mut spool, _) = open_on(&disk, |_| ());
    let (found, damaged) = all(&mut spool, 0);
    assert_eq!((found, damaged), ((1..=5).collect(), Gone::default()));

    let disk = MemDisk::default();
    let (mut spool, _) = open_on(&disk, |config| config.sync = SyncPolicy::Always);
    put_all(&mut spool, 1..=50);
    let _ = spool.release(7).unwrap();
    spool.commit(b"n").unwrap();
    drop(spool);
    disk.power_cut();
    let (mut spool, _) = open_on(&disk, |_| ());
    assert_eq!((all(&mut spool, 0).0, spool.note()), ((8..=50).collect(), &b"n"[..]));
}
