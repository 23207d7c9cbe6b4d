//! What one sink gets of one batch, and how it stands in a spool.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::ingest::book::Ticket;
use crate::router;

/// A stretch of a body: records of one id, for one topic.
#[derive(Debug, Clone)]
pub struct Part {
    /// Id of all of them.
    pub data_id: u32,
    /// Topic, channel or file name.
    pub target: Arc<str>,
    /// Where the first begins.
    pub from: usize,
    /// Where the last ends.
    pub to: usize,
    /// How many.
    pub records: u32,
}

/// The part of one batch that goes to one sink.
#[derive(Debug, Clone)]
pub struct Load {
    /// Records as in [`gse_proto::datalink`].
    pub body: Bytes,
    /// Which of them, in order.
    pub parts: Vec<Part>,
    /// How many.
    pub records: u64,
    /// Bytes of them, headers included.
    pub size: usize,
}

/// A load, and who waits for it.
#[derive(Debug)]
pub struct Chunk {
    /// What.
    pub load: Load,
    /// Who.
    pub ticket: Ticket,
}

impl Load {
    /// Nothing of `body` yet.
    #[must_use]
    pub fn new(body: Bytes) -> Self {
        Self {
            body,
            parts: vec![],
            records: 0,
            size: 0,
        }
    }

    /// Adds a stretch.
    pub fn push(&mut self, part: Part) {
        self.records += u64::from(part.records);
        self.size += part.to - part.from;
        match self.parts.last_mut() {
            Some(last)
                if last.to == part.from && last.data_id == part.data_id && Arc::ptr_eq(&last.target, &part.target) =>
            {
                last.to = part.to;
                last.records += part.records;
            }
            _ => self.parts.push(part),
        }
    }

    /// Payloads of a part.
    pub fn payloads<'a>(&'a self, part: &Part) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        router::records(&self.body, part.from, part.to)
    }

    /// As bytes for a spool.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.size + 4 + self.parts.len() * 64);
        out.put_u32(self.parts.len() as u32);
        for part in &self.parts {
            out.put_u32(part.data_id);
            out.put_u32(part.records);
            out.put_u32(part.target.len() as u32);
            out.put_slice(part.target.as_bytes());
            out.put_u32((part.to - part.from) as u32);
            out.put_slice(&self.body[part.from..part.to]);
        }
        out.freeze()
    }

    /// As it was written; `None` if it is not such a thing.
    #[must_use]
    pub fn decode(entry: &Bytes) -> Option<Self> {
        let mut rest: &[u8] = entry;
        let mut load = Self::new(entry.clone());
        let number = |rest: &mut &[u8]| (rest.len() >= 4).then(|| rest.get_u32());
        for _ in 0..number(&mut rest)? {
            let (data_id, records) = (number(&mut rest)?, number(&mut rest)?);
            let length = number(&mut rest)? as usize;
            let target = Arc::from(std::str::from_utf8(rest.get(..length)?).ok()?);
            rest.advance(length);
            let length = number(&mut rest)? as usize;
            let from = entry.len() - rest.len();
            rest.get(..length)?;
            rest.advance(length);
            load.push(Part {
                data_id,
                target,
                from,
                to: from + length,
                records,
            });
        }
        Some(load)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::datalink::put_record;

    #[test]
    fn a_load_comes_out_of_a_spool_as_it_went_in() {
        let mut body = BytesMut::new();
        put_record(&mut body, 1, 0, 9, b"one\xff");
        let middle = body.len();
        put_record(&mut body, 2, 0, 9, b"two");
        let mut load = Load::new(body.clone().freeze());
        for (data_id, target, from, to) in [(2, "b", middle, body.len()), (1, "a", 0, middle)] {
            load.push(Part {
                data_id,
                target: target.into(),
                from,
                to,
                records: 1,
            });
        }
        let read = Load::decode(&load.encode()).unwrap();
        let seen: Vec<_> = read
            .parts
            .iter()
            .map(|part| (part.data_id, &*part.target, read.payloads(part).collect::<Vec<_>>()))
            .collect();
        assert_eq!(seen, [(2, "b", vec![&b"two"[..]]), (1, "a", vec![&b"one\xff"[..]])]);
        assert_eq!((read.records, read.size), (load.records, load.size));
        let bytes = load.encode();
        for cut in 0..bytes.len() {
            assert!(Load::decode(&bytes.slice(..cut)).is_none(), "{cut}");
        }
    }
}
