//! The routes as the way of a record sees them: an immutable table, made anew whenever routes change, and asked without a lock.
//!
//! [`RouteTable`] says which streams a data id goes to, under which topic or channel, and which of its records; [`StreamTo`] says
//! where a stream leads. Reading routes from the store and keeping the table fresh is [`super::watch`]'s; carrying records is the
//! router's and the sinks'. What administrators wrote stands, byte for byte, in the store; here is only what it means.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use gse_core::random::HashMap;

/// A password. Shows itself only to whoever asks for it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes it over.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The password itself; not for logs.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "none" } else { "***" })
    }
}

/// One address of a message system; `host` may be a DNS name (contract data-plane#27).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint {
    /// Address or name.
    pub host: String,
    /// Port, never 0.
    pub port: u16,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// A place that records are handed to, as an administrator described it. Equal ones need no new connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamTo {
    /// Its number, above 0.
    pub id: u64,
    /// Its name, for people.
    pub name: String,
    /// What it is.
    pub sink: SinkSpec,
}

/// Where a stream leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SinkSpec {
    /// A Kafka cluster.
    Kafka(KafkaSpec),
    /// Redis, for `PUBLISH`.
    Redis(RedisSpec),
    /// A Pulsar cluster.
    Pulsar(PulsarSpec),
    /// Files on the data server's host.
    File(FileSpec),
    /// Another gse_data, as the configuration of a proxy says; no administrator's stream leads there.
    Relay,
}

impl SinkSpec {
    /// The word of `report_mode`.
    #[must_use]
    pub fn mode(&self) -> &'static str {
        match self {
            Self::Kafka(_) => "kafka",
            Self::Redis(_) => "redis",
            Self::Pulsar(_) => "pulsar",
            Self::File(_) => "file",
            Self::Relay => "relay",
        }
    }
}

/// A Kafka cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KafkaSpec {
    /// Brokers to begin with.
    pub brokers: Vec<Endpoint>,
    /// Empty: no SASL. Both spellings of the key end here (contract data-plane#26).
    pub username: String,
    /// Its password.
    pub password: Secret,
    /// `PLAIN`, `SCRAM-SHA-256`, `SCRAM-SHA-512`; empty: `SCRAM-SHA-512` if there is a user.
    pub mechanism: String,
    /// `PLAINTEXT`, `SASL_PLAINTEXT`, `SSL`, `SASL_SSL`; empty: `SASL_PLAINTEXT` if there is a user, else `PLAINTEXT`.
    pub protocol: String,
}

/// A Redis, single or found through sentinels.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RedisSpec {
    /// The server, or the sentinels.
    pub addresses: Vec<Endpoint>,
    /// Its password.
    pub password: Secret,
    /// Name of the master that sentinels are asked for; empty: the addresses are the server (contract data-plane#28).
    pub master_name: String,
    /// Password of the sentinels.
    pub sentinel_password: Secret,
}

/// A Pulsar cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PulsarSpec {
    /// Brokers or proxies.
    pub addresses: Vec<Endpoint>,
    /// Token to show; empty: none.
    pub token: Secret,
}

/// Files.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FileSpec {
    /// Directory (`data_log_path`); empty: the default directory of the data server.
    pub directory: String,
}

/// One way of a data id: the stream, the name there, and which records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Name of the route, unique within the data id.
    pub name: String,
    /// The stream; always one of [`RouteTable::streams`].
    pub stream: u64,
    /// Topic, channel or file name at the stream.
    pub target: Arc<str>,
    /// Number of partitions that was asked for; `Some(1)` asks for order.
    pub partitions: Option<u32>,
    /// Records must match all of these …
    pub all_of: Vec<Filter>,
    /// … and, unless there are none, one of these.
    pub any_of: Vec<Filter>,
}

impl Rule {
    /// Whether this record goes this way.
    #[must_use]
    pub fn takes(&self, record: &Fields<'_>) -> bool {
        if self.takes_all() {
            return true;
        }
        self.all_of.iter().all(|filter| filter.matches(record))
            && (self.any_of.is_empty() || self.any_of.iter().any(|filter| filter.matches(record)))
    }

    /// Whether every record goes this way, so that nobody need look into them.
    #[must_use]
    pub fn takes_all(&self) -> bool {
        self.all_of.is_empty() && self.any_of.is_empty()
    }
}

/// What a filter can look at.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a> {
    /// Message type of the plugin's frame.
    pub kind: u16,
    /// Data id.
    pub data_id: u32,
    /// Time that the plugin wrote.
    pub utctime: u32,
    /// The record.
    pub payload: &'a [u8],
}

/// One condition. The contract leaves its meaning open; ours is: field `index` (from 0) is compared with `value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Where the field is.
    pub place: Place,
    /// Which field, from 0.
    pub index: usize,
    /// What it must equal.
    pub value: Wanted,
}

/// Where a filter's field is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In the frame's header: 0 message type, 1 data id, 2 time, 3 length of the payload.
    Protocol,
    /// In the payload, cut at every occurrence of the separator; an empty one leaves the payload whole.
    Data(Vec<u8>),
}

/// What a field must equal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// As a whole number, blanks around it ignored.
    Int(i64),
    /// As a text, blanks around it ignored.
    Text(String),
    /// Byte for byte.
    Bytes(Vec<u8>),
}

impl Filter {
    /// Whether the record has the field, and it is what is wanted.
    #[must_use]
    pub fn matches(&self, record: &Fields<'_>) -> bool {
        match &self.place {
            Place::Protocol => {
                let number = match self.index {
                    0 => u64::from(record.kind),
                    1 => u64::from(record.data_id),
                    2 => u64::from(record.utctime),
                    3 => record.payload.len() as u64,
                    _ => return false,
                };
                match &self.value {
                    Wanted::Int(wanted) => u64::try_from(*wanted).is_ok_and(|wanted| wanted == number),
                    Wanted::Text(wanted) => wanted.trim() == number.to_string(),
                    Wanted::Bytes(wanted) => wanted == number.to_string().as_bytes(),
                }
            }
            Place::Data(separator) => {
                let Some(field) = field(record.payload, separator, self.index) else {
                    return false;
                };
                match &self.value {
                    Wanted::Int(wanted) => std::str::from_utf8(field.trim_ascii())
                        .ok()
                        .and_then(|text| text.parse::<i64>().ok())
                        .is_some_and(|number| number == *wanted),
                    Wanted::Text(wanted) => field.trim_ascii() == wanted.trim_ascii().as_bytes(),
                    Wanted::Bytes(wanted) => field == wanted,
                }
            }
        }
    }
}

/// Field `index` of `payload`.
fn field<'a>(payload: &'a [u8], separator: &[u8], index: usize) -> Option<&'a [u8]> {
    let Some(first) = separator.first() else {
        return (index == 0).then_some(payload);
    };
    let mut rest = payload;
    let mut left = index;
    loop {
        let end = find(rest, separator, *first);
        if left == 0 {
            return Some(&rest[..end.unwrap_or(rest.len())]);
        }
        rest = &rest[end? + separator.len()..];
        left -= 1;
    }
}

fn find(text: &[u8], wanted: &[u8], first: u8) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = from + text[from..].iter().position(|byte| *byte == first)?;
        if text[at..].starts_with(wanted) {
            return Some(at);
        }
        from = at + 1;
    }
}

/// All routes at one moment.
#[derive(Debug, Default, Clone)]
pub struct RouteTable {
    /// Grows with every change that this instance has seen; 0: nothing read yet.
    pub version: u64,
    rules: HashMap<u32, Arc<[Rule]>>,
    streams: BTreeMap<u64, Arc<StreamTo>>,
    /// Routes that cannot be followed, and why, for people.
    pub problems: Vec<String>,
}

impl RouteTable {
    /// Puts a table together. Rules whose stream is not among `streams` are left out and named in `problems`.
    #[must_use]
    pub fn new(
        version: u64,
        channels: impl IntoIterator<Item = (u32, Vec<Rule>)>,
        streams: impl IntoIterator<Item = StreamTo>,
        mut problems: Vec<String>,
    ) -> Self {
        let streams: BTreeMap<u64, Arc<StreamTo>> = streams.into_iter().map(|one| (one.id, Arc::new(one))).collect();
        let mut rules = HashMap::default();
        for (data_id, mut ways) in channels {
            if ways.is_empty() {
                continue;
            }
            ways.retain(|rule| {
                let there = streams.contains_key(&rule.stream);
                if !there {
                    problems.push(format!(
                        "route {:?} of data id {data_id} leads to stream {}, which does not exist",
                        rule.name, rule.stream
                    ));
                }
                there
            });
            rules.insert(data_id, Arc::from(ways));
        }
        Self {
            version,
            rules,
            streams,
            problems,
        }
    }

    /// The ways of a data id. None: nobody has routed it. An empty list: it is routed, but no route of it can be followed.
    #[must_use]
    pub fn rules(&self, data_id: u32) -> Option<&Arc<[Rule]>> {
        self.rules.get(&data_id)
    }

    /// A stream by its number.
    #[must_use]
    pub fn stream(&self, id: u64) -> Option<&Arc<StreamTo>> {
        self.streams.get(&id)
    }

    /// All streams, by their numbers.
    #[must_use]
    pub fn streams(&self) -> &BTreeMap<u64, Arc<StreamTo>> {
        &self.streams
    }

    /// How many data ids are routed.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(payload: &[u8]) -> Fields<'_> {
        Fields {
            kind: 9,
            data_id: 1001,
            utctime: 7,
            payload,
        }
    }

    fn data(separator: &[u8], index: usize, value: Wanted) -> Filter {
        Filter {
            place: Place::Data(separator.to_vec()),
            index,
            value,
        }
    }

    fn rule(name: &str, stream: u64, all_of: Vec<Filter>, any_of: Vec<Filter>) -> Rule {
        Rule {
            name: name.into(),
            stream,
            target: "t".into(),
            partitions: None,
            all_of,
            any_of,
        }
    }

    #[test]
    fn fields_are_cut_at_the_separator() {
        for (payload, separator, index, wanted) in [
            (&b"a|b|c"[..], &b"|"[..], 0, Some(&b"a"[..])),
            (b"a|b|c", b"|", 2, Some(b"c")),
            (b"a|b|c", b"|", 3, None),
            (b"a||c", b"|", 1, Some(b"")),
            (b"a:::b", b"::", 1, Some(b":b")),
            (b"a", b"", 0, Some(b"a")),
            (b"a", b"", 1, None),
            (b"", b"|", 0, Some(b"")),
            (b"", b"|", 1, None),
        ] {
            assert_eq!(
                field(payload, separator, index),
                wanted,
                "{payload:?} {separator:?} {index}"
            );
        }
    }

    #[test]
    fn filters_compare_as_they_say() {
        assert!(data(b",", 1, Wanted::Int(7)).matches(&record(b"x, 7 ,y")));
        assert!(!data(b",", 1, Wanted::Int(7)).matches(&record(b"x,seven,y")));
        assert!(data(b",", 1, Wanted::Text("7".into())).matches(&record(b"x, 7 ,y")));
        assert!(!data(b",", 1, Wanted::Bytes(b"7".to_vec())).matches(&record(b"x, 7 ,y")));
        assert!(data(b",", 1, Wanted::Bytes(b"\xff".to_vec())).matches(&record(b"x,\xff,y")));
        let protocol = |index, value| Filter {
            place: Place::Protocol,
            index,
            value,
        };
        assert!(protocol(0, Wanted::Int(9)).matches(&record(b"")));
        assert!(protocol(1, Wanted::Text("1001".into())).matches(&record(b"")));
        assert!(protocol(3, Wanted::Int(2)).matches(&record(b"ab")));
        assert!(!protocol(0, Wanted::Int(-9)).matches(&record(b"")));
        assert!(!protocol(4, Wanted::Int(0)).matches(&record(b"")));
    }

    #[test]
    fn all_of_the_ones_and_one_of_the_others() {
        let is = |index, text: &str| data(b"|", index, Wanted::Text(text.into()));
        assert!(rule("r", 1, vec![], vec![]).takes(&record(b"")));
        let both = rule("r", 1, vec![is(0, "a"), is(1, "b")], vec![is(2, "c"), is(2, "d")]);
        assert!(both.takes(&record(b"a|b|d")));
        assert!(!both.takes(&record(b"a|b|e")));
        assert!(!both.takes(&record(b"a|x|c")));
        assert!(rule("r", 1, vec![], vec![is(0, "a"), is(0, "b")]).takes(&record(b"b")));
        assert!(!rule("r", 1, vec![], vec![is(0, "a")]).takes(&record(b"b")));
    }

    #[test]
    fn a_route_to_nowhere_is_named_and_its_id_is_not_unrouted() {
        // contract: data-plane#13
        let stream = StreamTo {
            id: 500,
            name: "mq".into(),
            sink: SinkSpec::File(FileSpec::default()),
        };
        let two = vec![rule("one", 500, vec![], vec![]), rule("two", 500, vec![], vec![])];
        let lost = vec![rule("lost", 7, vec![], vec![])];
        let table = RouteTable::new(3, [(1001, two), (1002, lost), (1003, vec![])], [stream], vec![]);
        assert_eq!(table.rules(1001).map(|rules| rules.len()), Some(2));
        assert_eq!(table.rules(1002).map(|rules| rules.len()), Some(0));
        assert!(table.rules(1003).is_none());
        assert!(table.problems[0].contains("\"lost\" of data id 1002") && table.problems[0].contains("stream 7"));
        assert_eq!(table.len(), 2);
    }

    #[test]
    fn passwords_do_not_show() {
        let spec = KafkaSpec {
            password: Secret::new("hunter2"),
            ..KafkaSpec::default()
        };
        assert!(!format!("{spec:?}").contains("hunter2"));
    }
}
