use super::*;
use gse_proto::file::Entry;
use sha2_of::sha256;

mod sha2_of {
    pub(super) fn sha256(bytes: &[u8]) -> Vec<u8> {
        ring::digest::digest(&ring::digest::SHA256, bytes).as_ref().to_vec()
    }
}

fn entry(kind: EntryKind, size: u64) -> Entry {
    Entry {
        kind: kind as i32,
        size,
        ..Entry::default()
    }
}

/// Three files, an empty one and a directory among them, in pieces of 16 bytes.
fn three() -> (Vec<u8>, Arc<Manifest>) {
    let content: Vec<u8> = (0..50u8).collect();
    let manifest = Manifest {
        piece_length: 16,
        total: 50,
        piece_hashes: content.chunks(16).flat_map(sha256).collect(),
        entries: vec![
            entry(EntryKind::Directory, 0),
            entry(EntryKind::File, 10),
            entry(EntryKind::File, 0),
            entry(EntryKind::File, 3),
            entry(EntryKind::File, 37),
        ],
        ..Manifest::default()
    };
    (content, Arc::new(manifest))
}

fn files() -> Vec<Option<File>> {
    let file = || Some(tempfile::tempfile().unwrap());
    vec![None, file(), None, file(), file()]
}

#[tokio::test]
async fn pieces_lie_across_files() {
    let (content, manifest) = three();
    let files = files();
    let last = files[4].as_ref().unwrap().try_clone().unwrap();
    let storage = Storage::new(manifest, files).unwrap();
    for piece in [3, 1, 0, 2] {
        let from = piece as usize * 16;
        let whole = Bytes::copy_from_slice(&content[from..(from + 16).min(50)]);
        let parts = vec![whole.slice(..1), whole.slice(1..)];
        storage.keep(piece, parts).await.unwrap();
    }
    assert_eq!(storage.read(0, 8, 8).await.unwrap(), content[8..16]);
    assert_eq!(storage.read(3, 0, 2).await.unwrap(), content[48..]);
    assert!(storage.verify(Bitmap::full(4)).await.unwrap().is_full());
    let mut tail = [0; 37];
    last.read_exact_at(&mut tail, 0).unwrap();
    assert_eq!(tail, content[13..]);
    storage.sync().await.unwrap();
}

#[tokio::test]
async fn what_is_wrong_is_not_written() {
    // contract: p2p#17
    let (content, manifest) = three();
    let storage = Storage::new(manifest, files()).unwrap();
    let good = Bytes::copy_from_slice(&content[..16]);
    storage.keep(0, vec![good.clone()]).await.unwrap();
    let mut bad = good.to_vec();
    bad[3] ^= 1;
    let refused = storage.keep(0, vec![Bytes::from(bad)]).await;
    assert!(matches!(refused, Err(StorageError::Mismatch(0))));
    assert_eq!(storage.read(0, 0, 16).await.unwrap(), good, "the good copy stays");
    for (piece, len) in [(0, 15), (0, 17), (4, 16), (u32::MAX, 1)] {
        assert!(storage.keep(piece, vec![Bytes::from(vec![0; len])]).await.is_err());
    }
    assert!(storage.read(0, u32::MAX, 1).await.is_err());
    let found = storage.verify(Bitmap::full(4)).await.unwrap();
    assert_eq!(
        found.ones().collect::<Vec<_>>(),
        [0],
        "what was never written is not there"
    );
}

#[tokio::test]
async fn a_source_that_has_changed_is_found_out() {
    let (content, manifest) = three();
    let files = files();
    for (at, range) in [(1, 0..10), (3, 10..13), (4, 13..50)] {
        files[at].as_ref().unwrap().write_all_at(&content[range], 0).unwrap();
    }
    let changed = files[4].as_ref().unwrap().try_clone().unwrap();
    let storage = Storage::new(manifest, files).unwrap();
    assert_eq!(storage.read(2, 3, 5).await.unwrap(), content[35..40]);
    changed.write_all_at(b"x", 5).unwrap();
    assert!(matches!(storage.read(1, 0, 1).await, Err(StorageError::Mismatch(1))));
    changed.set_len(20).unwrap();
    assert!(matches!(
        storage.read(3, 0, 1).await,
        Err(StorageError::Io { entry: 4, .. })
    ));
}

#[tokio::test]
async fn one_file_holds_what_many_do() {
    let (content, manifest) = three();
    let file = tempfile::tempfile().unwrap();
    let storage = Storage::flat(manifest, file.try_clone().unwrap()).unwrap();
    for piece in 0..4u32 {
        let from = piece as usize * 16;
        let whole = Bytes::copy_from_slice(&content[from..(from + 16).min(50)]);
        storage.keep(piece, vec![whole]).await.unwrap();
    }
    let mut kept = [0; 50];
    file.read_exact_at(&mut kept, 0).unwrap();
    assert_eq!(kept[..], content[..]);
    assert_eq!(storage.read(1, 4, 4).await.unwrap(), content[20..24]);
}

#[test]
fn files_and_manifest_have_to_fit() {
    let (_, manifest) = three();
    assert!(matches!(
        Storage::new(Arc::clone(&manifest), vec![]),
        Err(StorageError::Unfit(_))
    ));
    for change in [
        |manifest: &mut Manifest| manifest.total = 49,
        |manifest: &mut Manifest| manifest.total = u64::MAX,
        |manifest: &mut Manifest| manifest.piece_length = 0,
        |manifest: &mut Manifest| manifest.piece_hashes.truncate(127),
        |manifest: &mut Manifest| manifest.entries[4].size = u64::MAX,
    ] {
        let mut other = Manifest::clone(&manifest);
        change(&mut other);
        assert!(matches!(
            Storage::new(Arc::new(other), files()),
            Err(StorageError::Unfit(_))
        ));
    }
}

/// Opens files in a directory again and again, and says how often it did and how many are open.
#[derive(Debug)]
struct Dir {
    dir: tempfile::TempDir,
    opened: std::sync::atomic::AtomicUsize,
    synced: std::sync::atomic::AtomicUsize,
}

impl Dir {
    fn of(manifest: &Manifest) -> Arc<Self> {
        let dir = tempfile::tempdir().unwrap();
        for (n, entry) in manifest.entries.iter().enumerate() {
            if entry.kind() == EntryKind::File {
                let file = File::create(dir.path().join(n.to_string())).unwrap();
                file.set_len(entry.size).unwrap();
            }
        }
        Arc::new(Self {
            dir,
            opened: Default::default(),
            synced: Default::default(),
        })
    }

    fn open_now(&self) -> usize {
        let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        links
            .filter(|link| std::fs::read_link(link.path()).is_ok_and(|path| path.starts_with(self.dir.path())))
            .count()
    }
}

impl OpenFiles for Dir {
    fn open(&self, entry: usize) -> io::Result<File> {
        self.opened.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .open(self.dir.path().join(entry.to_string()))
    }

    fn sync_all(&self) -> io::Result<()> {
        self.synced.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }
}

#[tokio::test]
async fn many_files_need_few_descriptors() {
    const FILES: usize = 300;
    let content: Vec<u8> = (0..FILES * 7).map(|n| n as u8 ^ (n >> 8) as u8).collect();
    let manifest = Arc::new(Manifest {
        piece_length: 64,
        total: content.len() as u64,
        piece_hashes: content.chunks(64).flat_map(sha256).collect(),
        entries: (0..FILES).map(|_| entry(EntryKind::File, 7)).collect(),
        ..Manifest::default()
    });
    let (one, two) = (Dir::of(&manifest), Dir::of(&manifest));
    let gauge = prometheus_client::metrics::gauge::Gauge::default();
    let pool = FilePool::new(20, gauge.clone());
    let storage = |dir: &Arc<Dir>| Storage::pooled(Arc::clone(&manifest), dir.clone(), &pool, vec![]).unwrap();
    let (first, second) = (storage(&one), storage(&two));
    let pieces = first.geometry().pieces();
    for piece in (0..pieces).rev() {
        let from = piece as usize * 64;
        let whole = Bytes::copy_from_slice(&content[from..(from + 64).min(content.len())]);
        first.keep(piece, vec![whole.clone()]).await.unwrap();
        second.keep(piece, vec![whole]).await.unwrap();
        assert!(one.open_now() + two.open_now() <= 20);
    }
    assert_eq!(gauge.get(), 20);
    // All of them have been written to: in one go, and then there is nothing left to do.
    first.sync().await.unwrap();
    first.sync().await.unwrap();
    assert_eq!(one.synced.load(std::sync::atomic::Ordering::Relaxed), 1);
    assert!(first.verify(Bitmap::full(pieces)).await.unwrap().is_full());
    assert_eq!(first.read(3, 1, 40).await.unwrap(), content[193..233]);
    // What was used just now is not opened again.
    let opened = one.opened.load(std::sync::atomic::Ordering::Relaxed);
    first.read(3, 1, 40).await.unwrap();
    assert_eq!(one.opened.load(std::sync::atomic::Ordering::Relaxed), opened);
    assert!(first.file(FILES - 1).unwrap().is_some() && first.file(FILES).unwrap().is_none());
    drop(first);
    assert_eq!(one.open_now(), 0, "what nobody needs any more is closed");
    assert!(second.verify(Bitmap::full(pieces)).await.unwrap().is_full());
    // A file that is gone is an error of its own, and says which.
    std::fs::remove_file(two.dir.path().join("0")).unwrap();
    second.verify(Bitmap::full(pieces)).await.unwrap_err();
    let gone = second.read(0, 0, 1).await.unwrap_err();
    assert!(gone.to_string().contains("open file 0"), "{gone}");
    drop(second);
    assert_eq!((gauge.get(), two.open_now()), (0, 0));
}
