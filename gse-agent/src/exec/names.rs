//! Which script files are in use. Two runs that want different contents under one name in one directory would take each other's file
//! away, so the second waits until the first is over; the same content for the same account may be shared. Writing the files is
//! left to [`super::scripts`].

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use gse_proto::session::Dispatch;
use parking_lot::Mutex;
use tokio::sync::watch;

/// What a path is used with.
#[derive(Debug)]
struct Use {
    user: String,
    content: Bytes,
    runs: usize,
}

/// The files in use, by path.
#[derive(Debug)]
pub(super) struct Names {
    used: Mutex<HashMap<String, Use>>,
    /// Counts the runs that have given their files up.
    freed: watch::Sender<u64>,
}

impl Default for Names {
    fn default() -> Self {
        Self {
            used: Mutex::default(),
            freed: watch::Sender::new(0),
        }
    }
}

/// The files of one run; they are free again when this is dropped.
#[derive(Debug)]
pub(super) struct Claim {
    names: Arc<Names>,
    paths: Vec<String>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut used = self.names.used.lock();
        for path in &self.paths {
            if let Some(entry) = used.get_mut(path) {
                entry.runs -= 1;
                if entry.runs == 0 {
                    used.remove(path);
                }
            }
        }
        drop(used);
        if !self.paths.is_empty() {
            self.names.freed.send_modify(|count| *count += 1);
        }
    }
}

/// The same for all spellings of a path that differ in slashes and dots only. Links are not followed: the account may change them.
fn path_of(dir: &str, name: &str) -> String {
    let mut path = String::with_capacity(dir.len() + name.len() + 2);
    for part in dir.split('/').filter(|part| !part.is_empty() && *part != ".") {
        path.push('/');
        path.push_str(part);
    }
    path.push('/');
    path.push_str(name);
    path
}

impl Names {
    /// Takes all files of a dispatch, or none.
    ///
    /// # Errors
    /// The path that another run has with another content or for another account.
    pub(super) fn try_claim(self: &Arc<Self>, dispatch: &Dispatch) -> Result<Claim, String> {
        let mut used = self.used.lock();
        let mut paths = Vec::with_capacity(dispatch.scripts.len());
        for script in &dispatch.scripts {
            let path = path_of(&script.store_dir, &script.name);
            let taken = used
                .get(&path)
                .is_some_and(|other| other.user != dispatch.user || other.content != script.content);
            if taken {
                return Err(path);
            }
            paths.push(path);
        }
        // Twice in one dispatch: the later one is what is left in the end, as when they are written.
        for (path, script) in paths.iter().zip(&dispatch.scripts) {
            let entry = used.entry(path.clone()).or_insert_with(|| Use {
                user: dispatch.user.clone(),
                content: script.content.clone(),
                runs: 0,
            });
            entry.content = script.content.clone();
            entry.runs += 1;
        }
        Ok(Claim {
            names: Arc::clone(self),
            paths,
        })
    }

    /// Waits until all files of a dispatch are free, for as long as the caller polls.
    pub(super) async fn claim(self: &Arc<Self>, dispatch: &Dispatch) -> Claim {
        let mut freed = self.freed.subscribe();
        loop {
            // Before the look, so that what is freed in between is not missed.
            freed.mark_unchanged();
            if let Ok(claim) = self.try_claim(dispatch) {
                return claim;
            }
            if freed.changed().await.is_err() {
                // The sender is `self`.
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::session::Script;

    fn order(user: &str, files: &[(&str, &str, &str)]) -> Dispatch {
        Dispatch {
            user: user.to_owned(),
            scripts: files
                .iter()
                .map(|(dir, name, content)| Script {
                    name: (*name).to_owned(),
                    store_dir: (*dir).to_owned(),
                    content: Bytes::copy_from_slice(content.as_bytes()),
                })
                .collect(),
            ..Dispatch::default()
        }
    }

    #[test]
    fn only_what_is_the_same_is_shared() {
        let names = Arc::new(Names::default());
        let first = names
            .try_claim(&order("a", &[("/d/", "x", "1"), ("/d", "y", "1")]))
            .expect("free");
        let same = names
            .try_claim(&order("a", &[("//d/.", "x", "1")]))
            .expect("the same file");
        for other in [order("a", &[("/d", "x", "2")]), order("b", &[("/d", "x", "1")])] {
            assert_eq!(names.try_claim(&other).expect_err("taken"), "/d/x");
        }
        // All or none.
        names
            .try_claim(&order("a", &[("/d", "z", "1"), ("/d", "y", "2")]))
            .expect_err("taken");
        let free = names
            .try_claim(&order("b", &[("/d", "z", "9"), ("/e", "x", "9")]))
            .expect("free");
        drop((first, free));
        names
            .try_claim(&order("a", &[("/d", "x", "2")]))
            .expect_err("the other one still has it");
        drop(same);
        drop(
            names
                .try_claim(&order("a", &[("/d", "x", "2"), ("/d", "x", "3")]))
                .expect("free"),
        );
        assert!(names.used.lock().is_empty());
    }

    #[tokio::test]
    async fn the_second_gets_it_when_the_first_is_done() {
        let names = Arc::new(Names::default());
        let first = names.try_claim(&order("a", &[("/d", "x", "1")])).expect("free");
        let waiting = tokio::spawn({
            let names = Arc::clone(&names);
            async move { names.claim(&order("a", &[("/d", "x", "2")])).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(first);
        let second = waiting.await.expect("a claim");
        names.try_claim(&order("a", &[("/d", "x", "1")])).expect_err("taken");
        drop(second);
        assert!(names.used.lock().is_empty());
    }
}
