//! What a stream has beside its entries.

use bytes::Bytes;

use super::big::{MOST, failed};
use super::engine::{Copier, Side};
use super::values::cmd;
use super::{Reply, Trouble, Words};

impl Copier {
    /// What a stream has beside its entries: its last id, groups, consumers, and what is pending.
    pub(super) async fn stream_rest(&self, key: &Bytes, temp: &Bytes, refused: &str) -> Result<(), Trouble> {
        let got = self
            .ask(
                Side::Source,
                &[cmd(&[b"XINFO", b"STREAM", key]), cmd(&[b"XINFO", b"GROUPS", key])],
            )
            .await?;
        let [info, groups] = got.as_slice() else { return Ok(()) };
        let Some(groups) = groups.list() else { return Ok(()) };
        let mut write = Vec::new();
        for g in groups {
            let (Some(name), Some(last)) = (field(g, "name"), field(g, "last-delivered-id")) else {
                continue;
            };
            let mut create = cmd(&[b"XGROUP", b"CREATE", temp, &name, &last, b"MKSTREAM"]);
            if let Some(read) = field(g, "entries-read") {
                create.extend([Bytes::from_static(b"ENTRIESREAD"), read]);
            }
            write.push(create);
        }
        if let Some(last) = field(info, "last-generated-id") {
            // A stream with no entries and no groups has to be made first.
            if write.is_empty() && field_int(info, "length") == Some(0) {
                write.push(cmd(&[b"XGROUP", b"CREATE", temp, b"gse_dba", b"0", b"MKSTREAM"]));
                write.push(cmd(&[b"XGROUP", b"DESTROY", temp, b"gse_dba"]));
            }
            match (field(info, "entries-added"), field(info, "max-deleted-entry-id")) {
                (Some(added), Some(deleted)) => write.push(cmd(&[
                    b"XSETID",
                    temp,
                    &last,
                    b"ENTRIESADDED",
                    &added,
                    b"MAXDELETEDID",
                    &deleted,
                ])),
                _ => write.push(cmd(&[b"XSETID", temp, &last])),
            }
        }
        failed(&self.ask(Side::Target, &write).await?, refused)?;
        for g in groups {
            let Some(name) = field(g, "name") else { continue };
            self.stream_group(key, temp, &name, refused).await?;
        }
        Ok(())
    }

    async fn stream_group(&self, key: &Bytes, temp: &Bytes, group: &Bytes, refused: &str) -> Result<(), Trouble> {
        let got = self
            .ask(Side::Source, &[cmd(&[b"XINFO", b"CONSUMERS", key, group])])
            .await?;
        let consumers = got.first().and_then(Reply::list).unwrap_or_default();
        let create: Vec<Words> = consumers
            .iter()
            .filter_map(|c| field(c, "name"))
            .map(|c| cmd(&[b"XGROUP", b"CREATECONSUMER", temp, group, &c]))
            .collect();
        failed(&self.ask(Side::Target, &create).await?, refused)?;
        let mut from = Bytes::from_static(b"-");
        loop {
            let asked = cmd(&[b"XPENDING", key, group, &from, b"+", MOST.to_string().as_bytes()]);
            let got = self.ask(Side::Source, &[asked]).await?;
            let page = got.first().and_then(Reply::list).unwrap_or_default();
            let mut claim = Vec::new();
            for p in page {
                let Some([id, consumer, idle, times]) = p.list() else {
                    continue;
                };
                if let (Some(id), Some(consumer), Some(idle), Some(times)) =
                    (id.bytes(), consumer.bytes(), idle.int(), times.int())
                {
                    from = Bytes::from([b"(".as_slice(), id].concat());
                    claim.push(cmd(&[
                        b"XCLAIM",
                        temp,
                        group,
                        consumer,
                        b"0",
                        id,
                        b"IDLE",
                        idle.to_string().as_bytes(),
                        b"RETRYCOUNT",
                        times.to_string().as_bytes(),
                        b"FORCE",
                        b"JUSTID",
                    ]));
                }
            }
            let last = (page.len() as u64) < MOST || claim.is_empty();
            failed(&self.ask(Side::Target, &claim).await?, refused)?;
            if last {
                return Ok(());
            }
        }
    }
}

/// A field of a reply that is a flat list of names and values.
fn raw<'r>(reply: &'r Reply, name: &str) -> Option<&'r Reply> {
    reply
        .list()?
        .chunks(2)
        .find(|p| p.first().and_then(Reply::bytes).is_some_and(|b| b == name.as_bytes()))?
        .get(1)
}

pub(super) fn field(reply: &Reply, name: &str) -> Option<Bytes> {
    match raw(reply, name)? {
        Reply::Int(n) => Some(Bytes::from(n.to_string())),
        r => r.bytes().cloned(),
    }
}

pub(super) fn field_int(reply: &Reply, name: &str) -> Option<i64> {
    raw(reply, name)?.int()
}
