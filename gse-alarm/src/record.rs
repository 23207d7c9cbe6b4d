//! The form of an alarm: a record of data id 1000 as monitoring reads it (contract data-plane, 5.2). No I/O.

use std::net::IpAddr;

use gse_proto::ids::split_cloud_ip;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;

/// Number of "the agent is lost".
const AGENT_LOST: u32 = 2;

/// A host as an alarm names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostRef {
    /// As gse_task knows it: an id, or `cloud:ip`.
    pub agent_id: String,
    /// The area it is in.
    pub cloud_id: i32,
}

#[derive(Serialize)]
struct Envelope<'a> {
    server: &'a str,
    time: &'a str,
    timezone: i32,
    isdst: i32,
    utctime: &'a str,
    utctime2: &'a str,
    value: [Event<'a>; 1],
}

#[derive(Serialize)]
struct Event<'a> {
    event_desc: &'static str,
    event_raw_id: u64,
    event_source_system: &'static str,
    event_time: &'a str,
    event_title: &'static str,
    event_type: &'static str,
    extra: Extra,
}

#[derive(Serialize)]
struct Extra {
    r#type: u32,
    count: usize,
    host: Vec<Host>,
}

#[derive(Serialize)]
struct Host {
    bizid: i32,
    cloudid: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    ip: Option<String>,
    agent_id: String,
}

fn host(lost: &LostRef) -> Host {
    let named = split_cloud_ip(&lost.agent_id);
    let (cloudid, ip, agent_id) = match named {
        // Readers take an id with colons apart into two; an IPv6 address would be more.
        Some((cloud, ip @ IpAddr::V6(_))) => (cloud.0, Some(ip.to_string()), String::new()),
        Some((cloud, ip)) => (cloud.0, Some(ip.to_string()), format!("{}:{ip}", cloud.0)),
        None => (lost.cloud_id, None, lost.agent_id.clone()),
    };
    Host {
        bizid: 0,
        cloudid,
        ip,
        agent_id,
    }
}

/// The record about `lost`, sent at `unix_ms` by `server`, with its number; `zone` is the server's.
///
/// # Errors
/// When the time is none, or it can't be written as JSON.
pub fn alarm(server: &str, number: u64, unix_ms: u64, zone: &TimeZone, lost: &[LostRef]) -> anyhow::Result<Vec<u8>> {
    let sent = Timestamp::from_millisecond(i64::try_from(unix_ms)?)?;
    let info = zone.to_offset_info(sent);
    let summer = info.dst().is_dst();
    let text = |zone: &TimeZone| sent.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string();
    let (local, utc) = (text(zone), text(&TimeZone::UTC));
    let record = Envelope {
        server,
        time: &local,
        timezone: info.offset().seconds() / 3600 - i32::from(summer),
        isdst: summer.into(),
        utctime: &local,
        utctime2: &utc,
        value: [Event {
            event_desc: "",
            event_raw_id: number,
            event_source_system: "",
            event_time: &local,
            event_title: "",
            event_type: "gse_basic_alarm_type",
            extra: Extra {
                r#type: AGENT_LOST,
                count: lost.len(),
                host: lost.iter().map(host).collect(),
            },
        }],
    };
    Ok(serde_json::to_vec(&record)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn lost(agent_id: &str, cloud_id: i32) -> LostRef {
        LostRef {
            agent_id: agent_id.to_owned(),
            cloud_id,
        }
    }

    // contract: data-plane#33, data-plane#34, data-plane#35
    #[test]
    fn the_form_is_what_monitoring_reads() {
        let hosts = [
            lost("02000000005254005ae3091720612442569e", 3),
            lost("5:10.0.0.1", 0),
            lost("5:fe80::1", 0),
        ];
        let zone = TimeZone::fixed(jiff::tz::offset(8));
        let bytes = alarm("10.0.0.9", 7, 1_700_000_000_123, &zone, &hosts).unwrap();
        let read: Value = serde_json::from_slice(&bytes).unwrap();
        let expected = json!({
            "server": "10.0.0.9",
            "time": "2023-11-15 06:13:20",
            "timezone": 8,
            "isdst": 0,
            "utctime": "2023-11-15 06:13:20",
            "utctime2": "2023-11-14 22:13:20",
            "value": [{
                "event_desc": "",
                "event_raw_id": 7,
                "event_source_system": "",
                "event_time": "2023-11-15 06:13:20",
                "event_title": "",
                "event_type": "gse_basic_alarm_type",
                "extra": {"type": 2, "count": 3, "host": [
                    {"bizid": 0, "cloudid": 3, "agent_id": "02000000005254005ae3091720612442569e"},
                    {"bizid": 0, "cloudid": 5, "ip": "10.0.0.1", "agent_id": "5:10.0.0.1"},
                    {"bizid": 0, "cloudid": 5, "ip": "fe80::1", "agent_id": ""},
                ]},
            }],
        });
        assert_eq!(read, expected);
    }
}
