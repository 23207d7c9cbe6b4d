//! The answer to plugins that ask who the agent is.

use bytes::{BufMut, Bytes, BytesMut};
use serde::Serialize;

use super::SocketConfig;
use super::frame::kind;

/// Who the agent is to its plugins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its id.
    pub agent_id: String,
    /// The area its host is in.
    pub cloud_id: i32,
    /// The host's address; may be empty.
    pub ip: String,
}

/// Every key that any client reads (contract data-plane, 1.4), and no other: some clients take a key of another type for a fault.
#[derive(Serialize)]
struct Body<'a> {
    bizid: i32,
    cloudid: i32,
    cloud_id: i32,
    ip: &'a str,
    bk_agent_id: &'a str,
    bk_biz_id: i32,
    bk_tenant_id: &'a str,
    static_dataid: i32,
}

/// Header and body, to be sent in one write: some clients read each with a single read.
///
/// # Errors
/// When it cannot be written as JSON, which no identity brings about.
pub(super) fn reply(identity: &Identity, config: &SocketConfig) -> anyhow::Result<Bytes> {
    let body = serde_json::to_vec(&Body {
        bizid: config.bizid,
        cloudid: identity.cloud_id,
        cloud_id: identity.cloud_id,
        ip: &identity.ip,
        bk_agent_id: &identity.agent_id,
        bk_biz_id: config.bk_biz_id,
        bk_tenant_id: &config.bk_tenant_id,
        static_dataid: config.static_dataid,
    })?;
    let mut reply = BytesMut::with_capacity(8 + body.len());
    reply.put_u32(kind::GET_CONF);
    reply.put_u32(u32::try_from(body.len())?);
    reply.put_slice(&body);
    Ok(reply.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_that_a_client_reads() {
        // contract: data-plane#2
        let identity = Identity {
            agent_id: "2:127.0.0.1".to_owned(),
            cloud_id: 2,
            ip: "127.0.0.1".to_owned(),
        };
        let config = SocketConfig {
            bizid: 1,
            ..SocketConfig::default()
        };
        let reply = reply(&identity, &config).unwrap();
        assert_eq!(reply[..4], [0, 0, 0, 10]);
        let length = u32::from_be_bytes(reply[4..8].try_into().unwrap()) as usize;
        assert_eq!(length, reply.len() - 8);
        let body: serde_json::Value = serde_json::from_slice(&reply[8..]).unwrap();
        assert_eq!(
            body,
            serde_json::json!({"bizid": 1, "cloudid": 2, "cloud_id": 2, "ip": "127.0.0.1", "bk_agent_id": "2:127.0.0.1",
                "bk_biz_id": 0, "bk_tenant_id": "", "static_dataid": 0})
        );
    }
}
