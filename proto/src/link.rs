//! Frames of the link between an agent and gse_btsvr: the session's header (see [`crate::frame`]) with kinds of their own.
//!
//! The agent dials, over TLS, and expects a server. Its first frame is a LinkHello, the answer a LinkWelcome; then frames go both ways
//! until either side says Goodbye or has nothing left to do. Either side may ping; whoever hears nothing for three intervals closes.

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;

use crate::file as f;
use crate::frame::{FrameError, HEADER_LEN, RawFrame, frames, put_header, take_raw};
use crate::session as s;

/// Version of the link's protocol.
pub const PROTOCOL: u32 = 1;
/// Longest message on the link: a report with a manifest and content inside it.
pub const MAX_MESSAGE: usize = 8 << 20;
/// Manifests go over the link in parts of this size; a shorter one may stand in a report or an order.
pub const PART: usize = 256 << 10;
/// A manifest longer than this is taken from nobody.
pub const MAX_MANIFEST: u64 = 256 << 20;
/// Between two pings of the agent.
pub const PING_MS: u64 = 10_000;

frames! {
    /// A message of the link, by kind. Kinds are only added; a number is never used again.
    LinkFrame {
        1 => Hello: f::LinkHello;
        2 => Welcome: f::LinkWelcome;
        3 => Ping: s::Ping;
        4 => Pong: s::Pong;
        5 => Goodbye: s::Goodbye;
        6 => Unsupported: s::Unsupported;
        // Agent to server; the final one of an order is repeated until it is answered with ReportStored.
        16 => Report: f::Report;
        17 => ManifestWanted: f::ManifestWanted;
        // Either way: agent to server before the report that names the manifest, server to agent as the answer to ManifestWanted.
        18 => ManifestPart: f::ManifestPart;
        // Server to agent.
        24 => ReportStored: f::ReportStored;
        25 => SwarmPeers: f::SwarmPeers;
        26 => SwarmOver: f::SwarmOver;
        // Server to agent: the same as the call of that name; mostly a Cancel. The answer is a report.
        27 => Order: f::Order;
        // Between instances of gse_btsvr: from the one that controls a transfer to a relay, and back.
        32 => RelayOrder: f::RelayOrder;
        33 => RelayState: f::RelayState;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_never_change() {
        let mut kinds = String::new();
        for (kind, name) in KINDS {
            kinds.push_str(&format!("{kind} {name}\n"));
        }
        assert_eq!(kinds, include_str!("../golden/link_kinds.v1.txt"));
        let mut out = BytesMut::new();
        LinkFrame::from(s::Ping { nonce: 5 }).encode(0, &mut out);
        assert_eq!(
            LinkFrame::take(&mut out, 100).unwrap(),
            Some(LinkFrame::Ping(s::Ping { nonce: 5 }))
        );
    }
}
