//! What agents are told: orders in two parts, an agent's own and the one that all agents of a fan-out share.
//!
//! Concatenated protobuf encodings decode as their union, so the shared part is encoded once and never copied.

use bytes::Bytes;
use gse_proto::file::{self as f, order::What};
use gse_proto::xfer::{Endpoint, Group, Upload, XferHeader};
use prost::Message;
use sha2::{Digest, Sha256};

fn encode(order: &f::Order) -> Bytes {
    Bytes::from(order.encode_to_vec())
}

/// The part of every order of a task that all its agents share.
fn base(header: &XferHeader, servers: &[String]) -> f::Order {
    f::Order {
        task_id: header.task_id.clone(),
        servers: servers.to_vec(),
        not_after_ms: header.deadline_ms,
        ..f::Order::default()
    }
}

fn source(header: &XferHeader, upload: &Upload, inline_limit: u64) -> f::Source {
    f::Source {
        dir: upload.dir.clone(),
        name: upload.name.clone(),
        user: upload
            .source
            .as_ref()
            .map(|source| source.user.clone())
            .unwrap_or_default(),
        upload_limit: header.upload_limit,
        inline_limit,
    }
}

fn placing(header: &XferHeader, group: &Group, target: &Endpoint) -> f::Placing {
    f::Placing {
        dir: group.dir.clone(),
        name: group.name.clone(),
        make_dirs: header.make_dirs,
        user: target.user.clone(),
        owner: group.owner.clone(),
        mode: group.mode,
    }
}

/// Read something and offer it; content of up to `inline_limit` bytes is wanted in the report.
#[must_use]
pub fn of_upload(header: &XferHeader, servers: &[String], row: u32, upload: &Upload, inline_limit: u64) -> Bytes {
    encode(&f::Order {
        order: row,
        what: Some(What::Source(source(header, upload, inline_limit))),
        ..base(header, servers)
    })
}

/// What all targets of a pushed file share.
#[must_use]
pub fn of_push(header: &XferHeader, servers: &[String], group: &Group) -> Bytes {
    encode(&f::Order {
        what: Some(What::Push(f::Push {
            placing: None,
            content: group.content.clone(),
            sha256: Bytes::copy_from_slice(&Sha256::digest(&group.content)),
        })),
        ..base(header, servers)
    })
}

/// One target's own part of a push.
#[must_use]
pub fn own_push(header: &XferHeader, row: u32, group: &Group, target: &Endpoint) -> Bytes {
    encode(&f::Order {
        order: row,
        what: Some(What::Push(f::Push {
            placing: Some(placing(header, group, target)),
            ..f::Push::default()
        })),
        ..f::Order::default()
    })
}

/// What is known of the content of an upload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Content {
    /// SHA-256 over the encoded manifest.
    pub manifest_id: Bytes,
    /// The manifest, if it is short enough for a message.
    pub manifest: Bytes,
    /// The whole content, if it goes in messages; the manifest is then there, too.
    pub inline: Option<Bytes>,
}

/// What all targets of an upload share.
#[must_use]
pub fn of_targets(header: &XferHeader, servers: &[String], content: &Content) -> Bytes {
    encode(&f::Order {
        what: Some(What::Target(f::Target {
            manifest_id: content.manifest_id.clone(),
            inline_manifest: content.manifest.clone(),
            inline_content: content.inline.clone().unwrap_or_default(),
            download_limit: header.download_limit,
            upload_limit: header.upload_limit,
            ..f::Target::default()
        })),
        ..base(header, servers)
    })
}

/// One target's own part; `same_host`: it is where the content comes from.
#[must_use]
pub fn own_target(
    header: &XferHeader,
    row: u32,
    group: &Group,
    target: &Endpoint,
    same_host: Option<&Upload>,
) -> Bytes {
    encode(&f::Order {
        order: row,
        what: Some(What::Target(f::Target {
            placing: Some(placing(header, group, target)),
            same_host: same_host.map(|upload| source(header, upload, 0)),
            ..f::Target::default()
        })),
        ..f::Order::default()
    })
}

/// Stop whatever belongs to a row.
#[must_use]
pub fn cancel(header: &XferHeader, servers: &[String], row: u32) -> f::Order {
    f::Order {
        order: row,
        what: Some(What::Cancel(f::Cancel {})),
        ..base(header, servers)
    }
}

/// Stop what belongs to a row of a task that is over and forgotten here.
#[must_use]
pub fn cancel_forgotten(task_id: &str, servers: &[String], row: u32) -> f::Order {
    let header = XferHeader {
        task_id: task_id.to_owned(),
        ..XferHeader::default()
    };
    cancel(&header, servers, row)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::layout::tests::header;

    #[test]
    fn the_two_parts_are_one_order() {
        let mut header = header();
        (header.make_dirs, header.download_limit) = (true, 5);
        let content = Content {
            manifest_id: Bytes::from_static(b"id"),
            manifest: Bytes::from_static(b"m"),
            inline: Some(Bytes::from_static(b"content")),
        };
        let shared = of_targets(&header, &["h:1".into()], &content);
        let target = Endpoint {
            user: "app".into(),
            ..header.lists[0].endpoints[0].clone()
        };
        let own = own_target(&header, 2, &header.groups[0], &target, Some(&header.uploads[0]));
        let whole = f::Order::decode(Bytes::from([own, shared].concat())).unwrap();
        assert_eq!((whole.order, whole.task_id.as_str(), whole.servers.len()), (2, "T", 1));
        let Some(What::Target(target)) = whole.what else {
            panic!("not a target")
        };
        let placing = target.placing.unwrap();
        assert_eq!(
            (placing.dir.as_str(), placing.user.as_str(), placing.make_dirs),
            ("/t/", "app", true)
        );
        assert_eq!(target.inline_content, "content");
        assert_eq!(target.same_host.unwrap().name, "a");

        header.groups[0].content = Bytes::from_static(b"pushed");
        let shared = of_push(&header, &[], &header.groups[0]);
        let own = own_push(&header, 3, &header.groups[0], &header.lists[0].endpoints[1]);
        let whole = f::Order::decode(Bytes::from([own, shared].concat())).unwrap();
        let Some(What::Push(push)) = whole.what else {
            panic!("not a push")
        };
        assert_eq!(
            (push.content.as_ref(), push.placing.unwrap().user.as_str()),
            (&b"pushed"[..], "root")
        );
    }
}
