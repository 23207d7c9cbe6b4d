//! Fetching something and putting it at its place: from content that came with the order, from this very host, or from a swarm.

use std::fs::File;
use std::io::{self, Cursor, Read};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use gse_bt::{Bitmap, Limits, OpenFiles, ResumeFile, Storage, manifest};
use gse_proto::codes::Inner;
use gse_proto::file::{Entry, EntryKind, Manifest, Phase, Placing, Source, Target};
use prost::Message;
use tokio::runtime::Handle;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep};

use super::cell::{Cell, Done};
use super::link::SwarmNews;
use super::open::{FEW, PartFiles};
use super::orders::Shared;
use super::place::{self, FileId, Place, copy, sync_each};
use super::source;
use super::swarm::{self, Member, Running, Step};
use super::worker::Failed;

/// Between two looks at whether another order has made way.
const AGAIN: Duration = Duration::from_millis(100);

/// Where the bytes of files come from, one file after the other.
enum Content {
    /// All files one behind the other.
    Inline(Bytes),
    /// The same manifest, on this host.
    Local(Box<source::Prepared>),
    /// In the files of another order.
    Neighbour(Storage, Handle),
}

/// Carries an order out that fetches something.
pub(super) async fn fetch(shared: &Arc<Shared>, cell: &Arc<Cell>, target: Target, again: bool) -> Result<Done, Failed> {
    let manifest = manifest_of(shared, cell, &target).await?;
    let size = manifest.total;
    cell.tell(|report| report.size = size);
    let placing = target.placing.clone().unwrap_or_default();
    if let Some(source) = target.same_host.clone() {
        let done = {
            let (manifest, placing) = (Arc::clone(&manifest), placing.clone());
            shared
                .blocking(cell, move |shared, cell| {
                    on_the_same_host(shared, cell, &placing, &source, &manifest)
                })
                .await
        };
        return done;
    }
    if target.inline_content.len() as u64 == size {
        let content = Content::Inline(target.inline_content);
        return shared
            .blocking(cell, move |shared, cell| {
                put_together(shared, cell, &placing, &manifest, content)
            })
            .await;
    }
    let permit = tokio::select! {
        permit = shared.fetching.acquire() => permit.map_err(|_| Failed::new(Inner::System, "the agent is being stopped"))?,
        () = cell.cancelled() => return Err(source::stopped(cell)),
    };
    let done = from_swarm(shared, cell, &target, &manifest, again).await;
    drop(permit);
    done
}

/// Part files of a target, open, and what is known of them.
struct Opened {
    place: Arc<Place>,
    /// Opens the part files when they are needed.
    files: Arc<PartFiles>,
    storage: Storage,
    map: ResumeFile,
    /// Pieces that an earlier life has written; `None`: there was none.
    have: Option<Bitmap>,
}

/// Makes or takes up the part files.
fn open(
    shared: &Shared,
    cell: &Cell,
    target: &Target,
    manifest: &Arc<Manifest>,
    again: bool,
) -> Result<Opened, Failed> {
    let placing = target.placing.clone().unwrap_or_default();
    let mut place = enter(shared, cell, &placing, manifest)?;
    if again {
        for (n, entry) in manifest.entries.iter().enumerate() {
            if entry.kind() == EntryKind::File {
                place.expect(n, &last_name(entry, &placing));
            }
        }
    }
    let opened = (|| {
        let path = shared.resume_map(&cell.key);
        if !again {
            // Of an order that was forgotten: it says nothing about these part files.
            std::fs::remove_file(&path).ok();
        }
        let mut ids = vec![FileId::default(); manifest.entries.len()];
        let mut first = Vec::new();
        let mut there = 0;
        // Part files that are not as this order left them make its map worthless.
        let mut left = again;
        for (n, entry) in manifest.entries.iter().enumerate() {
            cell.stop.check()?;
            if entry.kind() != EntryKind::File {
                continue;
            }
            let file = place.create(n, &last_name(entry, &placing), again)?;
            let failed = |e| place::writing(&place.real, &e);
            let meta = file.metadata().map_err(failed)?;
            there += meta.blocks().saturating_mul(512).min(entry.size);
            left &= meta.len() == entry.size;
            file.set_len(entry.size).map_err(failed)?;
            if let Some(id) = ids.get_mut(n) {
                *id = FileId::of(&file).map_err(failed)?;
            }
            if first.len() < FEW {
                first.push((n, file));
            }
        }
        place.check_room(manifest.total, there)?;
        Ok((path, ids, first, left))
    })();
    let place = Arc::new(place);
    let ready = opened.and_then(|(path, ids, first, left)| {
        let files = PartFiles::new(
            &shared.config,
            &cell.key,
            placing,
            Arc::clone(manifest),
            ids,
            Arc::clone(&place),
        );
        let files = Arc::new(files);
        let opener: Arc<dyn OpenFiles> = files.clone();
        let storage = Storage::pooled(Arc::clone(manifest), opener, &shared.open_files, first)
            .map_err(|e| Failed::new(Inner::System, e.to_string()))?;
        let pieces = storage.geometry().pieces();
        let (map, have) = swarm::open_map(&path, &target.manifest_id, pieces)?;
        let have = again.then(|| have.filter(|_| left).unwrap_or_else(|| Bitmap::new(pieces)));
        Ok(Opened {
            place: Arc::clone(&place),
            files,
            storage,
            map,
            have,
        })
    });
    if ready.is_err() {
        place.discard();
    }
    ready
}

/// What another order of this agent fetches or offers already, once it is all here; `None` if that comes to nothing.
async fn neighbour(cell: &Cell, mut running: Running) -> Result<Option<Storage>, Failed> {
    let whole = running
        .progress
        .wait_for(|progress| progress.complete || progress.failed.is_some());
    tokio::select! {
        outcome = whole => match outcome {
            Ok(progress) if progress.complete => {}
            _ => return Ok(None),
        },
        () = cell.cancelled() => return Err(source::stopped(cell)),
    }
    Ok(Some(running.storage))
}

/// Goes on offering what was fetched until the server ends it, or for as long as the settings say.
fn offer_on(shared: &Arc<Shared>, cell: &Arc<Cell>, mut member: Member) {
    cell.seeding.store(true, Ordering::Release);
    let (owner, cell) = (Arc::clone(shared), Arc::clone(cell));
    shared.life.spawn_contained("file seed", async move {
        let until = Instant::now() + Duration::from_millis(owner.config.seed_ms);
        while Instant::now() < until {
            let step = tokio::select! {
                step = member.step() => step,
                () = owner.life.draining() => Step::Over,
            };
            if matches!(step, Step::Over) || member.progress.borrow().failed.is_some() {
                break;
            }
        }
        member.leave().await;
        cell.seeding.store(false, Ordering::Release);
        owner.changed.notify_waiters();
    });
}

/// Reads the content of a swarm that is complete, from `at` on.
struct Reader<'a> {
    storage: &'a Storage,
    handle: &'a Handle,
    at: u64,
    end: u64,
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = u64::from(self.storage.manifest().piece_length.max(1));
        let begin = self.at % length;
        let most = (self.end - self.at).min(length - begin).min(buffer.len() as u64);
        if most == 0 {
            return Ok(0);
        }
        let number = |n: u64| u32::try_from(n).map_err(io::Error::other);
        let reading = self
            .storage
            .read(number(self.at / length)?, number(begin)?, number(most)?);
        let bytes = self.handle.block_on(reading).map_err(io::Error::other)?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }
}

/// Fetches from other agents, puts it at its place, and goes on offering it.
async fn from_swarm(
    shared: &Arc<Shared>,
    cell: &Arc<Cell>,
    target: &Target,
    manifest: &Arc<Manifest>,
    again: bool,
) -> Result<Done, Failed> {
    let id = target.manifest_id.clone();
    shared.link_now(cell);
    loop {
        let begun = tokio::select! {
            begun = swarm::begin(shared, &id) => begun,
            () = cell.cancelled() => return Err(source::stopped(cell)),
        };
        let running = match begun {
            Ok(_begun) => match alone(shared, cell, target, manifest, again).await {
                // An order that offers it was faster.
                Err(failed) if failed == swarm::taken() => continue,
                done => return done,
            },
            Err(running) => running,
        };
        let Some(storage) = neighbour(cell, running).await? else {
            sleep(AGAIN).await;
            continue;
        };
        let placing = target.placing.clone().unwrap_or_default();
        let (manifest, handle) = (Arc::clone(manifest), Handle::current());
        return shared
            .blocking(cell, move |shared, cell| {
                put_together(shared, cell, &placing, &manifest, Content::Neighbour(storage, handle))
            })
            .await;
    }
}

/// Fetches as the only order of this agent that does.
async fn alone(
    shared: &Arc<Shared>,
    cell: &Arc<Cell>,
    target: &Target,
    manifest: &Arc<Manifest>,
    again: bool,
) -> Result<Done, Failed> {
    let opened = {
        let (target, manifest) = (target.clone(), Arc::clone(manifest));
        shared
            .blocking(cell, move |shared, cell| open(shared, cell, &target, &manifest, again))
            .await?
    };
    let Opened {
        place,
        files,
        storage,
        map,
        have,
    } = opened;
    let moved = move_pieces(shared, cell, target, manifest, (storage.clone(), map, have)).await;
    let member = match moved {
        Ok(member) => member,
        Err(error) => {
            if !cell.stop.is_paused() {
                // Room is made at once; a directory that hangs must not keep the row.
                let removing = shared.blocking_always(cell, move |_, _| {
                    place.discard();
                    Ok(())
                });
                // Its own failure would be that of the thread; the first one is the one to tell.
                removing.await.ok();
            }
            return Err(error);
        }
    };
    cell.tell(|report| report.phase = Phase::Verifying.into());
    let whole = Arc::clone(manifest);
    let done = shared
        .blocking_always(cell, move |shared, cell| {
            let done = complete(shared, cell, &place, &whole, &storage);
            match &done {
                Ok(()) => files.placed(),
                Err(_) if !cell.stop.is_paused() => place.discard(),
                Err(_) => {}
            }
            done
        })
        .await;
    match done {
        Ok(()) => {
            shared.metrics.bytes_in.inc_by(manifest.total);
            offer_on(shared, cell, member);
            Ok(Done::of(manifest.total))
        }
        Err(error) => {
            member.leave().await;
            Err(error)
        }
    }
}

async fn move_pieces(
    shared: &Arc<Shared>,
    cell: &Arc<Cell>,
    target: &Target,
    manifest: &Arc<Manifest>,
    (storage, map, have): (Storage, ResumeFile, Option<Bitmap>),
) -> Result<Member, Failed> {
    // What the map says was on the disk before it was written; of the rest, what got there counts, too. Whole files are verified in the
    // end anyway.
    let have = match have {
        Some(mut have) => {
            let rest = Bitmap::full(have.len()).and_not(&have);
            let more = tokio::select! {
                more = storage.verify(rest) => more.map_err(|e| Failed::new(Inner::Place, e.to_string()))?,
                () = cell.cancelled() => return Err(source::stopped(cell)),
            };
            have.union(&more);
            Some(have)
        }
        None => None,
    };
    let limits = Limits {
        up: target.upload_limit,
        down: target.download_limit,
    };
    let id = &target.manifest_id;
    let mut member = tokio::select! {
        member = swarm::join(shared, cell, id, manifest, storage, Some(have), limits) => member?,
        () = cell.cancelled() => return Err(source::stopped(cell)),
    };
    match swarm::fetch(cell, &mut member, Some(map)).await {
        Ok(()) => Ok(member),
        Err(error) => {
            member.leave().await;
            Err(error)
        }
    }
}

/// Everything is here: verifies whole files and puts them at their places.
fn complete(shared: &Shared, cell: &Cell, place: &Place, manifest: &Manifest, storage: &Storage) -> Result<(), Failed> {
    let each = sync_each(manifest::files(manifest).count());
    for (n, entry) in manifest.entries.iter().enumerate() {
        cell.stop.check()?;
        let file = storage.file(n);
        let Some(file) = file.map_err(|e| Failed::new(Inner::Place, e.to_string()))? else {
            continue;
        };
        verify(cell, entry, &file)?;
        place.settle(&file, place.mode_of(Some(entry.mode)), each)?;
    }
    finish(cell, place, manifest)?;
    match std::fs::remove_file(shared.resume_map(&cell.key)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, "a resume map that is not needed any more can't be removed");
        }
        _ => {}
    }
    Ok(())
}

/// The manifest of an order: what came with it, or what its server gives over the link.
async fn manifest_of(shared: &Arc<Shared>, cell: &Arc<Cell>, target: &Target) -> Result<Arc<Manifest>, Failed> {
    let id = &target.manifest_id;
    let encoded = if target.inline_manifest.is_empty() {
        let server = cell
            .server()
            .ok_or_else(|| Failed::new(Inner::Arguments, "an order without manifest and without server"))?;
        let mut news = shared.links.news();
        shared.links.want(&server, id);
        shared.link_now(cell);
        loop {
            match news.recv().await {
                Ok(SwarmNews::Manifest(which, data)) if which == *id => break data,
                Ok(_) => {}
                // It may have been among what was missed: asked for again, it comes again.
                Err(RecvError::Lagged(_)) => shared.links.want(&server, id),
                Err(RecvError::Closed) => return Err(Failed::new(Inner::System, "the agent's links are gone")),
            }
        }
    } else {
        target.inline_manifest.clone()
    };
    if manifest::manifest_id_of(&encoded)[..] != id[..] {
        return Err(Failed::new(
            Inner::Digest,
            "the manifest is not the one that the order names",
        ));
    }
    let manifest = Manifest::decode(encoded)
        .map_err(|e| Failed::new(Inner::Arguments, format!("the manifest can't be read: {e}")))?;
    manifest::check(&manifest, &source::bounds(&shared.config)).map_err(|error| {
        let code = match error {
            manifest::ManifestError::TooMuch { .. } => Inner::TooLarge,
            _ => Inner::Arguments,
        };
        Failed::new(code, format!("the manifest is not acceptable: {error}"))
    })?;
    Ok(Arc::new(manifest))
}

/// The name of what is put together, if it needs a stage of its own: more than one file.
fn stage_of<'a>(manifest: &'a Manifest, placing: &'a Placing) -> Option<&'a [u8]> {
    match manifest.entries.as_slice() {
        [only] if only.kind() == EntryKind::File => None,
        [first, ..] if placing.name.is_empty() => first.path.first().map(AsRef::as_ref),
        _ => Some(placing.name.as_bytes()),
    }
}

/// Whether one name can be that of everything in a manifest.
fn check_name(placing: &Placing, manifest: &Manifest) -> Result<(), Failed> {
    let tops = manifest.entries.iter().filter(|entry| entry.path.len() == 1).count();
    if tops != 1 && !placing.name.is_empty() {
        return Err(Failed::new(
            Inner::Arguments,
            format!(
                "{tops} files can't all be called {:?}; leave the target's name empty",
                placing.name
            ),
        ));
    }
    if manifest.entries.is_empty() {
        return Err(Failed::new(Inner::Arguments, "the manifest is empty"));
    }
    Ok(())
}

/// Enters the target directory.
pub(super) fn enter(shared: &Shared, cell: &Cell, placing: &Placing, manifest: &Manifest) -> Result<Place, Failed> {
    check_name(placing, manifest)?;
    Place::enter(&shared.config, placing, &cell.key, stage_of(manifest, placing))
}

fn on_the_same_host(
    shared: &Shared,
    cell: &Cell,
    placing: &Placing,
    source: &Source,
    manifest: &Manifest,
) -> Result<Done, Failed> {
    check_name(placing, manifest)?;
    // Without a stage: what is the source itself is not touched at all.
    let place = Place::enter(&shared.config, placing, &cell.key, None)?;
    if place.is_source(&source.dir, source.name.is_empty(), manifest)? {
        cell.moved.store(manifest.total, Ordering::Relaxed);
        return Ok(Done {
            size: manifest.total,
            message: "source and target are the same; nothing was touched".to_owned(),
        });
    }
    drop(place);
    let (worker, found) = source::find(&shared.config, source)?;
    let same = found.len() == manifest.entries.len()
        && found.iter().zip(&manifest.entries).all(|(found, entry)| {
            found.kind == entry.kind
                && found.size == entry.size
                && found
                    .path
                    .iter()
                    .map(Vec::as_slice)
                    .eq(entry.path.iter().map(AsRef::as_ref))
        });
    if !same {
        return Err(Failed::new(
            Inner::Changed,
            "the source on this host is not what it was when it was read",
        ));
    }
    let local = source::Prepared {
        worker,
        found,
        manifest: Manifest::default(),
        content: None,
    };
    put_together(shared, cell, placing, manifest, Content::Local(Box::new(local)))
}

/// Writes all files, verifies them, puts everything in its place.
fn put_together(
    shared: &Shared,
    cell: &Cell,
    placing: &Placing,
    manifest: &Manifest,
    content: Content,
) -> Result<Done, Failed> {
    let mut place = enter(shared, cell, placing, manifest)?;
    let done = (|| {
        place.check_room(manifest.total, 0)?;
        let files = manifest::files(manifest).count();
        let mut offset = 0;
        for (n, entry) in manifest.entries.iter().enumerate() {
            cell.stop.check()?;
            if entry.kind() != EntryKind::File {
                continue;
            }
            let mut file = place.create(n, &last_name(entry, placing), false)?;
            fill(cell, &content, n, entry, offset, &mut file)?;
            offset += entry.size;
            place.settle(&file, place.mode_of(Some(entry.mode)), sync_each(files))?;
        }
        finish(cell, &place, manifest)
    })();
    if done.is_err() {
        place.discard();
    }
    let written = done.map(|()| Done::of(manifest.total));
    if written.is_ok() {
        shared.metrics.bytes_in.inc_by(manifest.total);
    }
    written
}

/// Everything is complete beside its place: puts it there.
pub(super) fn finish(cell: &Cell, place: &Place, manifest: &Manifest) -> Result<(), Failed> {
    let files = manifest::files(manifest).count();
    if !sync_each(files) {
        place.sync_all()?;
    }
    place.put_all(manifest, &cell.stop)
}

/// The name that a file gets.
pub(super) fn last_name(entry: &Entry, placing: &Placing) -> Vec<u8> {
    if entry.path.len() == 1 && !placing.name.is_empty() {
        return placing.name.as_bytes().to_vec();
    }
    entry.path.last().map(|name| name.to_vec()).unwrap_or_default()
}

fn fill(cell: &Cell, content: &Content, n: usize, entry: &Entry, offset: u64, file: &mut File) -> Result<(), Failed> {
    let what = String::from_utf8_lossy(entry.path.last().map_or(&[], AsRef::as_ref)).into_owned();
    let moved = |bytes| {
        cell.moved.fetch_add(bytes, Ordering::Relaxed);
    };
    let (size, digest) = match content {
        Content::Inline(bytes) => {
            let slice = usize::try_from(offset)
                .ok()
                .zip(usize::try_from(entry.size).ok())
                .and_then(|(from, len)| bytes.get(from..from.checked_add(len)?))
                .ok_or_else(|| Failed::new(Inner::Digest, "the content is shorter than the manifest says"))?;
            copy(Cursor::new(slice), file, &cell.stop, &what, moved)?
        }
        Content::Neighbour(storage, handle) => {
            let reader = Reader {
                storage,
                handle,
                at: offset,
                end: offset + entry.size,
            };
            copy(reader, file, &cell.stop, &what, moved)?
        }
        Content::Local(local) => {
            let found = local
                .found
                .get(n)
                .ok_or_else(|| Failed::new(Inner::System, "there is no such entry"))?;
            let from = source::open(&local.worker, n, found)?;
            copy(from, file, &cell.stop, &what, moved)?
        }
    };
    if size != entry.size || digest[..] != entry.sha256[..] {
        let code = match content {
            Content::Inline(_) | Content::Neighbour(..) => Inner::Digest,
            Content::Local(_) => Inner::Changed,
        };
        return Err(Failed::new(code, format!("{what} is not what the manifest says")));
    }
    Ok(())
}

/// Verifies a file that is complete.
pub(super) fn verify(cell: &Cell, entry: &Entry, file: &File) -> Result<(), Failed> {
    let what = String::from_utf8_lossy(entry.path.last().map_or(&[], AsRef::as_ref)).into_owned();
    if place::digest(file, &cell.stop, &what)?[..] != entry.sha256[..] {
        return Err(Failed::new(
            Inner::Digest,
            format!("{what} is not what the manifest says"),
        ));
    }
    Ok(())
}
