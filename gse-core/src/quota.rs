//! How much one application may ask for: tasks under way at once and targets a minute, as the application table says.
//!
//! Counted in the store, so over all nodes, and only for applications that have a quota. A call takes its share first and looks
//! then, so that calls that come together can never have more than there is; one too many gives its share back. A share of tasks
//! carries the task's deadline: when a node dies without giving it back, it counts no longer than that. What is limited for all
//! applications together is not decided here.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

use crate::authz::{Caller, Policy, Quota};
use crate::store::{Batch, Store, StoreError, as_int, command};

/// A list that nobody adds to is forgotten after so long; no task lives longer.
const RUNNING_TTL_S: u64 = 40 * 24 * 3600;
/// A minute's count is of no use after the minute.
const MINUTE_TTL_S: u64 = 120;
const MINUTE_MS: u64 = 60_000;

/// Tasks of an application under way: sorted set, id by deadline (unix ms).
fn running_key(app: &str) -> String {
    format!("gse:quota:{{{app}}}:running")
}

/// Targets that an application has asked for in a minute (of unix time).
fn minute_key(app: &str, minute: u64) -> String {
    format!("gse:quota:{{{app}}}:targets:{minute}")
}

/// Which quota was used up.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Which {
    reason: &'static str,
}

/// Submits refused because their application has as much as it may, by quota.
pub type Refused = Family<Which, Counter>;

/// What a new task would take.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Its id.
    pub task: &'a str,
    /// Targets that it names.
    pub targets: u64,
    /// When it ends at the latest, in unix ms.
    pub deadline_ms: u64,
}

/// The quotas of all applications, which scripts and files share.
#[derive(Debug)]
pub struct Quotas {
    store: Store,
    policy: Policy,
    refused: Refused,
}

/// A share that was taken.
#[derive(Debug)]
#[must_use = "a share that is not needed after all has to be given back"]
pub struct Share {
    app: String,
    task: String,
    quota: Quota,
    targets: u64,
    minute: u64,
}

/// Why there is no share.
#[derive(Debug, thiserror::Error)]
pub enum QuotaError {
    /// The application has as much as it may; the text says what and when to try again.
    #[error("{0}")]
    Refused(String),
    /// It can't be told.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Quotas {
    /// Quotas as the table of `policy` has them, counted in `store`; `refused` counts what was too much.
    #[must_use]
    pub fn new(store: Store, policy: Policy, refused: Refused) -> Self {
        Self { store, policy, refused }
    }

    /// Takes the share of a new task; none if the caller has no quota. The store has to answer within `limit`.
    ///
    /// # Errors
    /// There is not as much left, or the store does not answer.
    pub async fn take(
        &self,
        caller: &Caller,
        wanted: Wanted<'_>,
        now_ms: u64,
        limit: Duration,
    ) -> Result<Option<Share>, QuotaError> {
        let quota = self.policy.quota(caller);
        if quota == Quota::default() {
            return Ok(None);
        }
        let share = Share {
            app: caller.app.clone(),
            task: wanted.task.to_owned(),
            quota,
            targets: wanted.targets,
            minute: now_ms / MINUTE_MS,
        };
        if let Some(most) = quota.targets_per_minute.filter(|most| share.targets > *most) {
            let text = format!(
                "application {:?} may ask for {most} targets a minute (max_targets_per_minute), and this call alone has {}: send fewer \
                 at a time",
                share.app, share.targets
            );
            return Err(self.refuse("targets_per_minute", text));
        }
        let mut replies = self
            .store
            .run_within(share.taking(wanted.deadline_ms, now_ms), limit)
            .await?
            .into_iter();
        let mut count = |nth: usize| replies.nth(nth).map_or(Ok(0), as_int);
        let running = match quota.running_tasks {
            Some(_) => u64::try_from(count(2)?).unwrap_or(0),
            None => 0,
        };
        // After the list's expiry, if there is a list.
        let targets = match quota.targets_per_minute {
            Some(_) => u64::try_from(count(usize::from(quota.running_tasks.is_some()))?).unwrap_or(0),
            None => 0,
        };
        if let Some(most) = quota.running_tasks.filter(|most| running > *most) {
            let text = format!(
                "application {:?} has {} tasks under way and may have {most} (max_running_tasks): try again when one has ended",
                share.app,
                running - 1
            );
            self.give_back(share).await;
            return Err(self.refuse("running_tasks", text));
        }
        if let Some(most) = quota.targets_per_minute.filter(|most| targets > *most) {
            let text = format!(
                "application {:?} has asked for {} targets in this minute and may ask for {most} (max_targets_per_minute), so that {} \
                 more are too many: try again in {} s",
                share.app,
                targets.saturating_sub(share.targets),
                share.targets,
                (MINUTE_MS - now_ms % MINUTE_MS).div_ceil(1000)
            );
            self.give_back(share).await;
            return Err(self.refuse("targets_per_minute", text));
        }
        Ok(Some(share))
    }

    /// The task of a share does not come about.
    pub async fn give_back(&self, share: Share) {
        let mut batch = Batch::new();
        if share.quota.running_tasks.is_some() {
            batch.push(
                running_key(&share.app),
                command_with("ZREM", &running_key(&share.app), &[&share.task]),
            );
        }
        if share.quota.targets_per_minute.is_some() {
            let key = minute_key(&share.app, share.minute);
            batch.push(key.clone(), command_with("DECRBY", &key, &[&share.targets.to_string()]));
            // When the minute was over it has made a new key.
            batch.push(key.clone(), command_with("EXPIRE", &key, &[&MINUTE_TTL_S.to_string()]));
        }
        if let Err(error) = self.store.run(batch).await {
            tracing::warn!(app = share.app, task = share.task, %error,
                "a share of a quota is not given back; it counts until the minute or the task's deadline is over");
        }
    }

    /// Whether places of tasks under way are counted for an application, so that [`Quotas::ended`] has something to do.
    #[must_use]
    pub fn counts_running(&self, app: &str) -> bool {
        self.policy.quota_of(app).running_tasks.is_some()
    }

    /// A task has ended: its place is free.
    pub async fn ended(&self, app: &str, task: &str) {
        let key = running_key(app);
        let mut batch = Batch::new();
        batch.push(key.clone(), command_with("ZREM", &key, &[task]));
        if let Err(error) = self.store.run(batch).await {
            tracing::warn!(task, %error, "an ended task counts for its application's quota until its deadline");
        }
    }

    fn refuse(&self, quota: &'static str, text: String) -> QuotaError {
        self.refused.get_or_create(&Which { reason: quota }).inc();
        QuotaError::Refused(text)
    }
}

impl Share {
    fn taking(&self, deadline_ms: u64, now_ms: u64) -> Batch {
        let mut batch = Batch::new();
        let mut push = |key: &str, name: &str, args: &[&str]| batch.push(key, command_with(name, key, args));
        if self.quota.running_tasks.is_some() {
            let key = running_key(&self.app);
            push(&key, "ZREMRANGEBYSCORE", &["-inf", &now_ms.to_string()]);
            push(&key, "ZADD", &[&deadline_ms.to_string(), &self.task]);
            push(&key, "ZCARD", &[]);
            push(&key, "EXPIRE", &[&RUNNING_TTL_S.to_string()]);
        }
        if self.quota.targets_per_minute.is_some() {
            let key = minute_key(&self.app, self.minute);
            push(&key, "INCRBY", &[&self.targets.to_string()]);
            push(&key, "EXPIRE", &[&MINUTE_TTL_S.to_string()]);
        }
        batch
    }
}

fn command_with(name: &str, key: &str, args: &[&str]) -> redis::Cmd {
    let mut cmd = command(name, key);
    cmd.arg(args);
    cmd
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};
    use std::sync::Arc;

    use tempfile::TempDir;

    use super::*;
    use crate::authz::{AppEntry, Authenticator, AuthzConfig, Via};
    use crate::store::StoreConfig;

    /// A Redis of its own.
    struct Site {
        redis: Child,
        quotas: Arc<Quotas>,
        _dir: TempDir,
    }

    impl Drop for Site {
        fn drop(&mut self) {
            self.redis.kill().unwrap();
            self.redis.wait().unwrap();
        }
    }

    async fn site(running: Option<u64>, targets: Option<u64>) -> Site {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("redis.sock");
        let redis = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--unixsocket"])
            .arg(&socket)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let store = Store::connect(&StoreConfig {
            url: format!("redis+unix://{}", socket.display()),
            ..StoreConfig::default()
        })
        .await
        .unwrap();
        for _ in 0..200 {
            if store.ping().await.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let app = |code: &str| AppEntry {
            code: code.into(),
            ..AppEntry::default()
        };
        let config = AuthzConfig {
            apps: vec![
                AppEntry {
                    max_running_tasks: running,
                    max_targets_per_minute: targets,
                    ..app("limited")
                },
                app("free"),
            ],
            ..AuthzConfig::default()
        };
        let policy = Authenticator::new(&config).unwrap().policy();
        let quotas = Arc::new(Quotas::new(store, policy, Family::default()));
        Site {
            redis,
            quotas,
            _dir: dir,
        }
    }

    fn caller(app: &str) -> Caller {
        Caller {
            app: app.into(),
            username: None,
            via: Via::Secret,
        }
    }

    fn task(task: &str, deadline_ms: u64, targets: u64) -> Wanted<'_> {
        Wanted {
            task,
            targets,
            deadline_ms,
        }
    }

    const WAIT: Duration = Duration::from_secs(5);
    const NOW: u64 = 1_700_000_000_000;

    #[tokio::test]
    async fn tasks_at_once_are_counted_and_a_dead_node_takes_no_place_for_ever() {
        let site = site(Some(2), None).await;
        let take = async |id: &str, deadline: u64, now: u64| {
            site.quotas
                .take(&caller("limited"), task(id, deadline, 1), now, WAIT)
                .await
        };
        let first = take("a", NOW + 10_000, NOW).await.unwrap().unwrap();
        drop(take("b", NOW + 60_000, NOW).await.unwrap().unwrap());
        for _ in 0..3 {
            let error = take("c", NOW + 60_000, NOW).await.unwrap_err().to_string();
            assert!(
                error.contains("2 tasks under way") && error.contains("max_running_tasks"),
                "{error}"
            );
        }
        site.quotas.give_back(first).await;
        drop(take("c", NOW + 60_000, NOW).await.unwrap().unwrap());
        assert!(take("d", NOW + 60_000, NOW).await.is_err());
        // Nobody gives these back; past their deadlines they count no more.
        drop(take("e", NOW + 90_000, NOW + 60_001).await.unwrap().unwrap());
        // Others are not touched.
        let free = site
            .quotas
            .take(&caller("free"), task("x", NOW, 1_000_000), NOW, WAIT)
            .await;
        assert!(free.unwrap().is_none());
    }

    #[tokio::test]
    async fn targets_of_a_minute_are_counted_and_refused_calls_do_not_count() {
        let site = site(Some(100), Some(10)).await;
        let take = async |targets: u64, now: u64| {
            site.quotas
                .take(&caller("limited"), task("t", now + 60_000, targets), now, WAIT)
                .await
        };
        let minute = NOW / MINUTE_MS * MINUTE_MS;
        drop(take(6, minute + 15_000).await.unwrap().unwrap());
        let error = take(5, minute + 15_000).await.unwrap_err().to_string();
        assert!(
            error.contains("asked for 6 targets") && error.contains("in 45 s"),
            "{error}"
        );
        drop(take(4, minute + 16_000).await.unwrap().unwrap());
        assert!(take(1, minute + 59_999).await.is_err());
        drop(take(10, minute + 60_000).await.unwrap().unwrap());
        let error = take(11, minute + 120_000).await.unwrap_err().to_string();
        assert!(error.contains("this call alone has 11"), "{error}");
        assert_eq!(
            site.quotas
                .refused
                .get_or_create(&Which {
                    reason: "targets_per_minute"
                })
                .get(),
            3
        );
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn calls_that_come_together_never_have_more_than_there_is() {
        let site = site(Some(5), Some(1_000)).await;
        let calls: Vec<_> = (0..60)
            .map(|n| {
                let quotas = Arc::clone(&site.quotas);
                tokio::spawn(async move {
                    let share = quotas
                        .take(&caller("limited"), task(&format!("t{n}"), NOW + 60_000, 1), NOW, WAIT)
                        .await;
                    share.is_ok()
                })
            })
            .collect();
        let mut taken = 0;
        for call in calls {
            taken += usize::from(call.await.unwrap());
        }
        assert!(taken <= 5, "{taken}");
        // All that were refused gave back what they had taken.
        for n in taken..5 {
            let share = site
                .quotas
                .take(&caller("limited"), task(&format!("u{n}"), NOW + 60_000, 1), NOW, WAIT)
                .await;
            drop(share.unwrap().unwrap());
        }
        assert!(
            site.quotas
                .take(&caller("limited"), task("v", NOW + 60_000, 1), NOW, WAIT)
                .await
                .is_err()
        );
    }
}
