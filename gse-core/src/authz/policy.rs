//! What a known caller may do.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::table::{App, Table};
use super::{Caller, Operation, OthersTasks, Quota};

/// Why something is not allowed. The text is for the caller and the audit line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The application is not in the table (any more), or disabled.
    #[error("application {app:?} is unknown or disabled")]
    App {
        /// Its code.
        app: String,
    },
    /// Not this operation.
    #[error("application {app:?} may not {operation}")]
    Operation {
        /// Its code.
        app: String,
        /// What it wanted.
        operation: Operation,
    },
    /// Not as this account.
    #[error("application {app:?} may not {operation} as account {account:?}")]
    Account {
        /// Its code.
        app: String,
        /// What it wanted.
        operation: Operation,
        /// As whom.
        account: String,
    },
    /// Not on this target.
    #[error("application {app:?} may not {operation} on {target:?}")]
    Target {
        /// Its code.
        app: String,
        /// What it wanted.
        operation: Operation,
        /// The first target that is not allowed.
        target: String,
    },
}

/// The policy of the application table. Cheap to clone; follows reloads.
#[derive(Clone)]
pub struct Policy {
    table: Arc<ArcSwap<Table>>,
}

impl std::fmt::Debug for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Policy")
            .field("applications", &self.table.load().len())
            .finish_non_exhaustive()
    }
}

impl Policy {
    pub(super) fn new(table: Arc<ArcSwap<Table>>) -> Self {
        Policy { table }
    }

    /// Whether the caller may do this at all; asked before a body is read.
    pub fn check_operation(&self, caller: &Caller, operation: Operation) -> Result<(), Denied> {
        self.check(caller, operation, std::iter::empty(), std::iter::empty())
    }

    /// Whether the caller may do this, as these accounts, on these targets: an agent's id with the number of its cloud area, if that is
    /// known. Stops at the first that is not allowed.
    pub fn check<'a>(
        &self,
        caller: &Caller,
        operation: Operation,
        accounts: impl Iterator<Item = &'a str>,
        targets: impl Iterator<Item = (&'a str, Option<i32>)>,
    ) -> Result<(), Denied> {
        if caller.is_operator() {
            return Ok(());
        }
        let table = self.table.load();
        let app = || caller.app.clone();
        let entry = enabled(&table, caller).ok_or_else(|| Denied::App { app: app() })?;
        if !entry.operations.has(&operation) {
            return Err(Denied::Operation { app: app(), operation });
        }
        for account in accounts {
            if !entry.accounts.has(account) {
                return Err(Denied::Account {
                    app: app(),
                    operation,
                    account: clip(account),
                });
            }
        }
        for (target, cloud) in targets {
            if !entry.agents.has(target) && !cloud.is_some_and(|cloud| entry.clouds.contains(&cloud)) {
                return Err(Denied::Target {
                    app: app(),
                    operation,
                    target: clip(target),
                });
            }
        }
        Ok(())
    }

    /// Whether the caller may read a task of `owner_app`. If not, the task does not exist for it: answer as for an unknown one.
    pub fn may_read(&self, caller: &Caller, owner_app: &str) -> bool {
        self.of_task(caller, owner_app, |others| {
            matches!(others, OthersTasks::Read | OthersTasks::All)
        })
    }

    /// Whether the caller may stop a task of `owner_app`.
    pub fn may_stop(&self, caller: &Caller, owner_app: &str) -> bool {
        self.of_task(caller, owner_app, |others| others == OthersTasks::All)
    }

    /// How much the caller may ask for. Operators have no quota.
    pub fn quota(&self, caller: &Caller) -> Quota {
        if caller.is_operator() {
            Quota::default()
        } else {
            self.quota_of(&caller.app)
        }
    }

    /// How much an application may ask for.
    pub fn quota_of(&self, app: &str) -> Quota {
        self.table.load().app(app).map(|app| app.quota).unwrap_or_default()
    }

    fn of_task(&self, caller: &Caller, owner_app: &str, enough: impl Fn(OthersTasks) -> bool) -> bool {
        let table = self.table.load();
        caller.is_operator()
            || enabled(&table, caller).is_some_and(|entry| caller.app == owner_app || enough(entry.others_tasks))
    }
}

fn enabled<'t>(table: &'t Table, caller: &Caller) -> Option<&'t App> {
    table.app(&caller.app).filter(|app| !app.disabled)
}

fn clip(text: &str) -> String {
    text.chars().take(64).collect()
}
