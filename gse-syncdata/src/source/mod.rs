//! Where identities come from. A source follows whatever it is for as long as this instance is the active one, and hands what it finds to
//! the [`Desk`].
//!
//! * [`cmdb`]: CMDB's open API, through [`api`];
//! * [`directory`]: one file for each host;
//! * [`inbox`]: what was handed over by calls, to any instance.

pub mod api;
pub mod cmdb;
pub mod directory;
pub mod inbox;

use std::sync::Arc;

use crate::config::SourceKind;
use crate::desk::Desk;
use crate::{Node, http};

/// A place that identities come from.
pub trait Source {
    /// Follows it, and does not end by itself.
    fn follow(&self, desk: &Desk) -> impl Future<Output = ()> + Send;
}

/// The source of a site.
pub enum Configured {
    /// CMDB.
    Cmdb(cmdb::Cmdb),
    /// A directory.
    Directory(directory::Directory),
    /// Calls; the inbox is looked at in any case.
    Push,
}

impl Configured {
    /// As it is configured.
    ///
    /// # Errors
    /// A file of the configuration is not usable.
    pub async fn new(node: &Arc<Node>) -> anyhow::Result<Self> {
        Ok(match node.config.source {
            SourceKind::Cmdb => Configured::Cmdb(cmdb::Cmdb::new(node).await?),
            SourceKind::Directory => Configured::Directory(directory::Directory::new(&node.config.directory)),
            SourceKind::Push => Configured::Push,
        })
    }
}

impl Source for Configured {
    async fn follow(&self, desk: &Desk) {
        match self {
            Configured::Cmdb(cmdb) => cmdb.follow(desk).await,
            Configured::Directory(directory) => directory.follow(desk).await,
            Configured::Push => std::future::pending().await,
        }
    }
}

/// What a site's source is called, for people.
#[must_use]
pub fn name(node: &Node) -> String {
    let config = &node.config;
    match config.source {
        SourceKind::Cmdb => format!("CMDB at {}", http::shown(&config.cmdb.url)),
        SourceKind::Directory => format!("the directory {}", config.directory.path.display()),
        SourceKind::Push => "calls".to_owned(),
    }
}
