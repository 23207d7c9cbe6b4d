//! The extension handshake (BEP 10).

use bytes::Bytes;

use super::WireError;
use crate::bencode::{self, Encoder, Value};

/// Number of the extension handshake among extended messages.
pub const EXT_HANDSHAKE: u8 = 0;

/// Bytes of a client's name that are kept.
const MAX_CLIENT: usize = 64;

/// What a peer says of itself. Extended messages are not offered and none is asked for: what the swarm needs is in the
/// handshake itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExtHandshake {
    /// Requests that may be outstanding at the sender.
    pub reqq: Option<u32>,
    /// Name and version of the sender's program.
    pub client: Option<String>,
    /// Where the sender listens.
    pub port: Option<u16>,
    /// Our own dictionary, encoded: the proof of membership and what else our peers tell each other.
    pub gse: Option<Bytes>,
}

impl ExtHandshake {
    /// Reads the payload of an extension handshake. Numbers that make no sense count as not said, as do keys that are not known; `gse`
    /// has to be a dictionary.
    pub fn decode(payload: &Bytes) -> Result<Self, WireError> {
        let (value, _) = bencode::decode_prefix(payload)?;
        let root = value.dict().ok_or(WireError::ExtendedKey("payload"))?;
        let mut out = Self::default();
        for (key, value) in root.iter() {
            match key {
                b"reqq" => out.reqq = out.reqq.or_else(|| u32::try_from(value.int()?).ok()),
                b"p" => {
                    out.port = out
                        .port
                        .or_else(|| u16::try_from(value.int()?).ok().filter(|port| *port != 0))
                }
                b"v" => out.client = out.client.or_else(|| client(value)),
                b"gse" if out.gse.is_none() => {
                    let dict = value.dict().ok_or(WireError::ExtendedKey("gse"))?;
                    out.gse = Some(payload.slice_ref(dict.raw()));
                }
                _ => {}
            }
        }
        Ok(out)
    }

    /// The payload for the wire. `gse` goes out as it is.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = Encoder::new();
        out.dict(|root| {
            if let Some(gse) = &self.gse {
                root.key(b"gse").raw(gse);
            }
            root.key(b"m").dict(|_| {});
            if let Some(port) = self.port {
                root.int(b"p", i64::from(port));
            }
            if let Some(reqq) = self.reqq {
                root.int(b"reqq", i64::from(reqq));
            }
            if let Some(client) = &self.client {
                root.bytes(b"v", client.as_bytes());
            }
        });
        out.finish().into()
    }
}

/// A name that can be put into a log: text of a line, and short.
fn client(value: Value<'_>) -> Option<String> {
    let text = String::from_utf8_lossy(value.bytes()?);
    let printable: String = text
        .chars()
        .filter(|char| !char.is_control())
        .take(MAX_CLIENT)
        .collect();
    (!printable.is_empty()).then_some(printable)
}
