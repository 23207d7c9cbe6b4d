//! Which store serves the clients now, and how that changes while they go on. A batch of commands holds one view from its planning to its last reply; whoever
//! changes the view can wait until nobody holds the old one.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::Backend;
use crate::copy::Tracker;
use crate::server::Store;

/// One state of things for all clients.
pub(crate) struct View {
    pub(crate) store: Arc<Store>,
    /// What kind of store it is.
    pub(crate) backend: Backend,
    /// What an acknowledged write survives, in words.
    pub(crate) durability: String,
    /// Another number: another store.
    pub(crate) generation: u64,
    /// Is told of every write, when somebody copies.
    pub(crate) tracker: Option<Arc<Tracker>>,
    /// No command goes to the store.
    held: bool,
    /// Cancelled when another view has followed.
    pub(crate) ended: CancellationToken,
}

impl View {
    pub(crate) fn new(store: Arc<Store>, backend: Backend, durability: String, generation: u64) -> Self {
        Self {
            store,
            backend,
            durability,
            generation,
            tracker: None,
            held: false,
            ended: CancellationToken::new(),
        }
    }

    fn with(&self, tracker: Option<Arc<Tracker>>, held: bool) -> Self {
        Self {
            store: Arc::clone(&self.store),
            backend: self.backend,
            durability: self.durability.clone(),
            generation: self.generation,
            tracker,
            held,
            ended: CancellationToken::new(),
        }
    }

    /// The same store, and this tracker is told of what is written.
    pub(crate) fn tracked(&self, tracker: &Arc<Tracker>) -> Self {
        self.with(Some(Arc::clone(tracker)), false)
    }

    /// The same store, and nobody is told.
    pub(crate) fn plain(&self) -> Self {
        self.with(None, false)
    }

    /// The same store, and commands wait.
    pub(crate) fn held(&self) -> Self {
        self.with(self.tracker.clone(), true)
    }
}

/// The view of now.
pub(crate) struct Views(ArcSwap<View>);

/// How often it is looked whether an old view is still held.
const LOOK: Duration = Duration::from_micros(200);

impl Views {
    pub(crate) fn new(view: View) -> Self {
        Self(ArcSwap::from_pointee(view))
    }

    /// The view of now, for one batch. Waits while commands are held.
    pub(crate) async fn enter(&self) -> Guard<Arc<View>> {
        loop {
            let view = self.0.load();
            if !view.held {
                return view;
            }
            let ended = view.ended.clone();
            drop(view);
            ended.cancelled().await;
        }
    }

    /// The view of now, for a look at it.
    pub(crate) fn now(&self) -> Arc<View> {
        self.0.load_full()
    }

    /// Replaces the view. Gives the old one, which batches that are under way still hold.
    pub(crate) fn replace(&self, view: View) -> Arc<View> {
        let old = self.0.swap(Arc::new(view));
        old.ended.cancel();
        old
    }
}

/// Waits until no batch holds a view that was replaced; false when some still do at the deadline.
pub(crate) async fn quiet(old: &Arc<View>, deadline: Instant) -> bool {
    while Arc::strong_count(old) > 1 {
        if Instant::now() >= deadline {
            return false;
        }
        tokio::time::sleep(LOOK).await;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(generation: u64) -> View {
        let (inbox, _) = tokio::sync::mpsc::channel(1);
        View::new(
            Arc::new(Store::Embedded(inbox)),
            Backend::Embedded,
            String::new(),
            generation,
        )
    }

    #[tokio::test]
    async fn who_holds_the_old_view_is_waited_for_and_who_comes_is_held() {
        let views = Arc::new(Views::new(view(1)));
        let mine = views.enter().await;
        let held = views.now().held();
        let old = views.replace(held);
        assert!(
            !quiet(&old, Instant::now() + Duration::from_millis(20)).await,
            "a batch is under way"
        );
        let comes = tokio::spawn({
            let views = Arc::clone(&views);
            async move { views.enter().await.generation }
        });
        drop(mine);
        assert!(quiet(&old, Instant::now() + Duration::from_secs(5)).await);
        assert!(!comes.is_finished());
        views.replace(view(2));
        assert_eq!(comes.await.unwrap(), 2);
    }
}
