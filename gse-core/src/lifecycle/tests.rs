//! Drain, abort, failures, and who is waited for.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const LONG: Duration = Duration::from_secs(30);

fn flag() -> (Arc<AtomicBool>, Arc<AtomicBool>) {
    let flag = Arc::new(AtomicBool::new(false));
    (Arc::clone(&flag), flag)
}

#[tokio::test]
async fn finished_waits_for_the_drain_and_for_what_is_held() {
    let life = Lifecycle::new("test");
    let (set, done) = flag();
    let owner = life.clone();
    life.spawn("work", async move {
        owner.draining().await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        set.store(true, Ordering::SeqCst);
    });
    let early = tokio::time::timeout(Duration::from_millis(20), life.finished(LONG)).await;
    assert!(early.is_err(), "finished before a drain was asked for");
    assert_eq!(life.running().get("work"), Some(&1));
    life.drain();
    assert!(life.is_draining());
    assert!(life.finished(LONG).await);
    assert!(done.load(Ordering::SeqCst));
    assert!(life.running().is_empty());
    assert_eq!(life.failure(), None);
}

struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn what_outlasts_the_grace_is_dropped_and_told() {
    let life = Lifecycle::new("test");
    let (set, dropped) = flag();
    life.spawn("stuck", async move {
        let _guard = SetOnDrop(set);
        std::future::pending::<()>().await;
    });
    life.drain();
    assert!(!life.finished(Duration::from_millis(30)).await);
    assert!(dropped.load(Ordering::SeqCst));
}

#[tokio::test]
async fn abort_drains_and_ends_a_wait_at_once() {
    let life = Lifecycle::new("test");
    life.spawn("stuck", std::future::pending());
    let waiting = tokio::spawn({
        let life = life.clone();
        async move { life.finished(LONG).await }
    });
    life.drain();
    tokio::task::yield_now().await;
    life.abort();
    life.aborted().await;
    let in_time = tokio::time::timeout(Duration::from_secs(2), waiting)
        .await
        .unwrap()
        .unwrap();
    assert!(!in_time);
}

#[tokio::test]
async fn a_panic_is_caught_kept_and_drains() {
    let life = Lifecycle::new("test");
    life.spawn("clumsy", async { panic!("dropped {}", "everything") });
    tokio::time::timeout(LONG, life.draining()).await.unwrap();
    assert_eq!(life.failure().unwrap(), "clumsy panicked: dropped everything");
    assert!(life.finished(LONG).await);
}

#[tokio::test]
async fn a_contained_panic_ends_only_its_task() {
    let life = Lifecycle::new("test");
    let (set, went_on) = flag();
    life.spawn_contained("connection", async { panic!("bad peer") });
    while !life.running().is_empty() {
        tokio::task::yield_now().await;
    }
    life.spawn("next", async move { set.store(true, Ordering::SeqCst) });
    while !life.running().is_empty() {
        tokio::task::yield_now().await;
    }
    assert!(went_on.load(Ordering::SeqCst));
    assert!(!life.is_draining());
    assert_eq!(life.failure(), None);
}

#[tokio::test]
async fn the_first_failure_of_a_critical_task_is_kept_with_its_causes() {
    let life = Lifecycle::new("test");
    life.spawn_critical("listener", async {
        Err(anyhow::anyhow!("no descriptors").context("cannot accept"))
    });
    tokio::time::timeout(LONG, life.draining()).await.unwrap();
    life.spawn_critical("other", async { Err(anyhow::anyhow!("later")) });
    assert!(life.finished(LONG).await);
    assert_eq!(
        life.failure().unwrap(),
        "listener failed: cannot accept: no descriptors"
    );
}

#[tokio::test]
async fn late_tasks_outlive_the_owned_ones() {
    let life = Lifecycle::new("test");
    let (set, work_done) = flag();
    let (set_late, late_done) = flag();
    let owner = life.clone();
    let seen = Arc::clone(&work_done);
    life.spawn_until_closed("ops", async move {
        owner.closing().await;
        set_late.store(seen.load(Ordering::SeqCst), Ordering::SeqCst);
    });
    let owner = life.clone();
    life.spawn("work", async move {
        owner.draining().await;
        tokio::time::sleep(Duration::from_millis(30)).await;
        set.store(true, Ordering::SeqCst);
    });
    life.drain();
    assert!(life.finished(LONG).await);
    assert!(
        late_done.load(Ordering::SeqCst),
        "told to close before the owned task had ended, or not at all"
    );
}

#[tokio::test]
async fn addresses_and_readiness() {
    let life = Lifecycle::new("test");
    life.announce("http", "127.0.0.1:1".to_owned());
    assert!(
        tokio::time::timeout(Duration::from_millis(20), life.wait_ready())
            .await
            .is_err()
    );
    life.announce("agents", "127.0.0.1:2".to_owned());
    life.ready();
    let addresses = life.wait_ready().await;
    assert_eq!(addresses.get("http").map(String::as_str), Some("127.0.0.1:1"));
    assert_eq!(addresses.len(), 2);

    let failed = Lifecycle::new("test");
    failed.drain();
    assert!(failed.wait_ready().await.is_empty());
}

#[tokio::test]
async fn reloads_are_counted() {
    let life = Lifecycle::new("test");
    let mut reloads = life.reloads();
    life.reload();
    life.reload();
    reloads.changed().await.unwrap();
    assert_eq!(*reloads.borrow_and_update(), 2);
}
