//! Removes old script files from the directories that tasks have used. Which file may be removed is decided in [`super::scripts`].

use std::sync::Arc;
use std::time::Duration;

use gse_proto::session::Dispatch;

use super::executor::Shared;
use super::job::now_ms;
use super::scripts::{self, Cleaned};

/// Directories that were used, the latest last; bounded.
#[derive(Debug)]
pub(super) struct Cleaner {
    dirs: Vec<String>,
    most: usize,
}

impl Cleaner {
    /// Begins with what was remembered.
    pub(super) fn new(mut dirs: Vec<String>, most: usize) -> Self {
        dirs.drain(..dirs.len().saturating_sub(most));
        Self { dirs, most }
    }

    /// Adds directories; the whole list when that changed it.
    pub(super) fn remember<'a>(&mut self, dirs: impl Iterator<Item = &'a str>) -> Option<Vec<String>> {
        let mut changed = false;
        for dir in dirs {
            if self.most > 0 && !self.dirs.iter().any(|known| known == dir) {
                if self.dirs.len() >= self.most {
                    self.dirs.remove(0);
                }
                self.dirs.push(dir.to_owned());
                changed = true;
            }
        }
        changed.then(|| self.dirs.clone())
    }

    fn forget(&mut self, dir: &str) {
        self.dirs.retain(|known| known != dir);
    }
}

/// Notes down the directories of a target. Before it runs, so that a crash does not leave files that nobody knows of; and when it is
/// over, because a directory that was not there yet may have been taken for one that is gone.
pub(super) async fn remember(shared: &Arc<Shared>, dispatch: &Dispatch) {
    let dirs = shared
        .cleaner
        .lock()
        .remember(dispatch.scripts.iter().map(|s| s.store_dir.as_str()));
    let Some(dirs) = dirs else { return };
    let task = Arc::clone(shared);
    let kept = tokio::task::spawn_blocking(move || task.journal.keep_script_dirs(&dirs)).await;
    if let Err(error) = kept.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
        tracing::warn!(%error, "the list of script directories cannot be kept; old scripts may stay");
    }
}

/// Looks at the directories at once and then again and again.
pub(super) async fn run(shared: Arc<Shared>) {
    loop {
        tokio::select! {
            () = pass(&shared) => {}
            () = shared.life.draining() => return,
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(shared.cfg.script_clean_interval_ms)) => {}
            () = shared.life.draining() => return,
        }
    }
}

async fn pass(shared: &Arc<Shared>) {
    let dirs = shared.cleaner.lock().dirs.clone();
    let age = shared.cfg.script_expire_hours.saturating_mul(3600);
    let before = i64::try_from((now_ms() / 1000).saturating_sub(age)).unwrap_or(0);
    let mut forgotten = Vec::new();
    for dir in dirs {
        loop {
            let (shared, path) = (Arc::clone(shared), dir.clone());
            let batch = tokio::task::spawn_blocking(move || {
                scripts::clean(&path, &shared.cfg.script_prefix, before, shared.cfg.script_clean_batch)
            });
            match batch.await.unwrap_or_else(|error| Err(error.to_string())) {
                Ok(Cleaned { removed, more, gone }) => {
                    if removed > 0 {
                        tracing::info!(dir, removed, "old script files removed");
                    }
                    if gone {
                        forgotten.push(dir.clone());
                    }
                    if !more {
                        break;
                    }
                }
                Err(reason) => {
                    tracing::warn!(dir, reason, "old script files cannot be removed");
                    break;
                }
            }
        }
    }
    let mut cleaner = shared.cleaner.lock();
    forgotten.iter().for_each(|dir| cleaner.forget(dir));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_bounded_and_has_no_doubles() {
        let mut cleaner = Cleaner::new(vec!["/z".into(), "/a".into(), "/b".into()], 2);
        assert_eq!(cleaner.remember(["/a", "/b"].into_iter()), None);
        assert_eq!(
            cleaner.remember(["/c"].into_iter()),
            Some(vec!["/b".to_owned(), "/c".to_owned()])
        );
        cleaner.forget("/b");
        assert_eq!(cleaner.dirs, ["/c"]);
    }
}
