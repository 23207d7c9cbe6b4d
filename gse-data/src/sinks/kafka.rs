//! Kafka, by librdkafka: each record as it is, with no key, on the topic that the route names (contract data-plane#6, #26, #27, #49).
//!
//! The producer is idempotent and never gives a record up because brokers are away: a group waits in it until they are back, everything
//! behind it in the spool. So order within a partition holds, and nothing is there twice unless this process dies. What a broker refuses
//! for good (too large, not allowed, a topic that neither exists nor is made) is counted as dropped.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use parking_lot::Mutex;
use rdkafka::ClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::DeliveryResult;
use rdkafka::producer::{BaseRecord, ProducerContext, ThreadedProducer};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use super::{Attempted, Dropped, Failure, Group, Writer};
use crate::routes::table::KafkaSpec;

/// librdkafka's queue is full: pause before the next try.
const FULL: Duration = Duration::from_millis(5);
/// A topic that was refused is not tried again for so long; its records are dropped at once.
const REFUSED: Duration = Duration::from_secs(30);

/// What delivery reports say.
#[derive(Default)]
struct Reports {
    state: Mutex<State>,
    all: Notify,
}

#[derive(Default)]
struct State {
    waiting: usize,
    refused: Vec<(usize, RDKafkaErrorCode)>,
    again: Vec<(usize, RDKafkaErrorCode)>,
    fatal: Option<String>,
}

/// librdkafka's calls to us.
#[derive(Clone)]
struct Context(Arc<Reports>);

impl ClientContext for Context {
    fn error(&self, error: KafkaError, reason: &str) {
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::Fatal) {
            self.0.state.lock().fatal = Some(reason.to_owned());
            self.0.all.notify_one();
        }
        tracing::warn!(%error, reason, "kafka");
    }
}

impl ProducerContext for Context {
    /// Place of the record in its group.
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, record: usize) {
        let mut state = self.0.state.lock();
        state.waiting = state.waiting.saturating_sub(1);
        if let Err((error, _)) = result {
            let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
            if is_final(code) {
                state.refused.push((record, code));
            } else {
                state.again.push((record, code));
            }
        }
        if state.waiting == 0 {
            self.0.all.notify_one();
        }
    }
}

/// Whether a record can never be delivered.
fn is_final(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        RDKafkaErrorCode::MessageSizeTooLarge
            | RDKafkaErrorCode::InvalidMessage
            | RDKafkaErrorCode::InvalidMessageSize
            | RDKafkaErrorCode::InvalidRecord
            | RDKafkaErrorCode::UnknownTopic
            | RDKafkaErrorCode::UnknownTopicOrPartition
            | RDKafkaErrorCode::UnknownPartition
            | RDKafkaErrorCode::InvalidTopic
            | RDKafkaErrorCode::TopicAuthorizationFailed
            | RDKafkaErrorCode::PolicyViolation
    )
}

fn reason(code: RDKafkaErrorCode) -> &'static str {
    match code {
        RDKafkaErrorCode::MessageSizeTooLarge | RDKafkaErrorCode::InvalidMessageSize => "too_large",
        RDKafkaErrorCode::TopicAuthorizationFailed => "not_allowed",
        RDKafkaErrorCode::UnknownTopic
        | RDKafkaErrorCode::UnknownTopicOrPartition
        | RDKafkaErrorCode::UnknownPartition
        | RDKafkaErrorCode::InvalidTopic => "unknown_topic",
        _ => "refused",
    }
}

/// Whether all of a topic is refused by this.
fn is_of_topic(code: RDKafkaErrorCode) -> bool {
    matches!(reason(code), "unknown_topic" | "not_allowed")
}

/// The settings that a stream means.
fn settings(spec: &KafkaSpec) -> ClientConfig {
    let brokers: Vec<String> = spec.brokers.iter().map(ToString::to_string).collect();
    let with_user = !spec.username.is_empty();
    let or = |text: &str, default: &str| {
        if text.is_empty() {
            default.to_owned()
        } else {
            text.to_ascii_uppercase()
        }
    };
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", brokers.join(","))
        .set("client.id", "gse_data")
        .set("enable.idempotence", "true")
        // Never given up: the spool is where records wait.
        .set("message.timeout.ms", "0")
        .set("linger.ms", "2")
        .set("batch.size", "1048576")
        .set("message.max.bytes", "11534336")
        .set("queue.buffering.max.kbytes", "65536")
        .set("queue.buffering.max.messages", "200000")
        .set("topic.metadata.propagation.max.ms", "10000")
        .set("topic.metadata.refresh.interval.ms", "30000")
        .set("reconnect.backoff.max.ms", "2000")
        .set("socket.keepalive.enable", "true")
        .set("log.connection.close", "false")
        .set(
            "security.protocol",
            or(&spec.protocol, if with_user { "SASL_PLAINTEXT" } else { "PLAINTEXT" }),
        );
    if with_user {
        config
            .set("sasl.mechanisms", or(&spec.mechanism, "SCRAM-SHA-512"))
            .set("sasl.username", &spec.username)
            .set("sasl.password", spec.password.reveal());
    }
    config
}

/// A cluster.
pub struct Producer {
    settings: ClientConfig,
    reports: Arc<Reports>,
    producer: Option<ThreadedProducer<Context>>,
    refused: BTreeMap<Arc<str>, (Instant, &'static str)>,
    /// Of the group that failed last: which records are still to be sent.
    left: Option<Vec<usize>>,
}

impl Producer {
    /// Connects when there is something to send.
    #[must_use]
    pub fn new(spec: &KafkaSpec) -> Self {
        Self {
            settings: settings(spec),
            reports: Arc::default(),
            producer: None,
            refused: BTreeMap::new(),
            left: None,
        }
    }

    async fn send(&mut self, group: &Group) -> Result<Dropped, Failure> {
        let producer = match self.producer.take() {
            Some(producer) => producer,
            None => {
                self.reports = Arc::default();
                let (settings, context) = (self.settings.clone(), Context(Arc::clone(&self.reports)));
                // It starts threads and reads files of certificates.
                tokio::task::spawn_blocking(move || settings.create_with_context(context))
                    .await
                    .map_err(|error| error.to_string())?
                    .map_err(|error: KafkaError| error.to_string())?
            }
        };
        let now = Instant::now();
        self.refused.retain(|_, (until, _)| *until > now);
        *self.reports.state.lock() = State::default();
        let left = self.left.take();
        let mut dropped = Dropped::new();
        let mut number = 0;
        for load in &group.loads {
            for part in &load.parts {
                if left.is_none()
                    && let Some((_, reason)) = self.refused.get(&part.target)
                {
                    dropped.push((part.data_id, reason, part.records.into()));
                    number += part.records as usize;
                    continue;
                }
                for payload in load.payloads(part) {
                    let wanted = left.as_ref().is_none_or(|left| left.binary_search(&number).is_ok());
                    if wanted {
                        self.queue(&producer, &part.target, payload, number).await?;
                    }
                    number += 1;
                }
            }
        }
        loop {
            let all = self.reports.all.notified();
            {
                let state = self.reports.state.lock();
                if let Some(fatal) = &state.fatal {
                    // The producer is of no more use; the next one sends the group again.
                    return Err(fatal.clone());
                }
                if state.waiting == 0 {
                    break;
                }
            }
            all.await;
        }
        let State { refused, mut again, .. } = std::mem::take(&mut *self.reports.state.lock());
        self.note(group, &refused, &mut dropped);
        self.producer = Some(producer);
        if again.is_empty() {
            return Ok(dropped);
        }
        again.sort_unstable_by_key(|(record, _)| *record);
        let failure = format!("{} records were not taken: {}", again.len(), again[0].1);
        self.left = Some(again.into_iter().map(|(record, _)| record).collect());
        Err(failure)
    }

    async fn queue(
        &self,
        producer: &ThreadedProducer<Context>,
        topic: &str,
        payload: &[u8],
        number: usize,
    ) -> Result<(), Failure> {
        self.reports.state.lock().waiting += 1;
        let mut record = BaseRecord::<(), [u8], usize>::with_opaque_to(topic, number).payload(payload);
        loop {
            match producer.send(record) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                    record = back;
                    sleep(FULL).await;
                }
                Err((error, _)) => {
                    let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
                    let mut state = self.reports.state.lock();
                    state.waiting -= 1;
                    if code == RDKafkaErrorCode::Fatal {
                        return Err(error.to_string());
                    }
                    if is_final(code) {
                        state.refused.push((number, code));
                    } else {
                        state.again.push((number, code));
                    }
                    return Ok(());
                }
            }
        }
    }

    /// Notes what was refused for good.
    fn note(&mut self, group: &Group, refused: &[(usize, RDKafkaErrorCode)], dropped: &mut Dropped) {
        if refused.is_empty() {
            return;
        }
        let mut ends = Vec::new();
        let mut end = 0;
        for part in group.loads.iter().flat_map(|load| &load.parts) {
            end += part.records as usize;
            ends.push((end, part));
        }
        for (record, code) in refused {
            let at = ends.partition_point(|(end, _)| end <= record);
            let Some((_, part)) = ends.get(at) else { continue };
            dropped.push((part.data_id, reason(*code), 1));
            if is_of_topic(*code) && !self.refused.contains_key(&part.target) {
                tracing::error!(topic = &*part.target, data_id = part.data_id, %code, "a topic does not take records; they are dropped and counted");
                self.refused
                    .insert(Arc::clone(&part.target), (Instant::now() + REFUSED, reason(*code)));
            }
        }
    }
}

impl Writer for Producer {
    fn write<'a>(&'a mut self, group: &'a Group) -> Attempted<'a> {
        self.send(group).boxed()
    }

    fn patient(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routes::table::{Endpoint, Secret};

    // contract: data-plane#27
    #[test]
    fn a_user_means_scram_unless_something_else_is_said() {
        let mut spec = KafkaSpec {
            brokers: vec![Endpoint {
                host: "kafka.service.consul".into(),
                port: 9092,
            }],
            ..KafkaSpec::default()
        };
        let plain = settings(&spec);
        assert_eq!(plain.get("bootstrap.servers"), Some("kafka.service.consul:9092"));
        assert_eq!(plain.get("security.protocol"), Some("PLAINTEXT"));
        assert_eq!(plain.get("sasl.mechanisms"), None);
        spec.username = "u".into();
        spec.password = Secret::new("p");
        let scram = settings(&spec);
        assert_eq!(scram.get("security.protocol"), Some("SASL_PLAINTEXT"));
        assert_eq!(scram.get("sasl.mechanisms"), Some("SCRAM-SHA-512"));
        spec.mechanism = "scram-sha-256".into();
        spec.protocol = "SASL_SSL".into();
        let other = settings(&spec);
        assert_eq!(other.get("sasl.mechanisms"), Some("SCRAM-SHA-256"));
        assert_eq!(other.get("security.protocol"), Some("SASL_SSL"));
    }

    // contract: data-plane#6
    #[tokio::test(flavor = "multi_thread")]
    async fn records_arrive_as_they_are_also_when_the_broker_was_away() {
        use rdkafka::Message;
        use rdkafka::consumer::{BaseConsumer, Consumer};
        use rdkafka::mocking::MockCluster;

        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("snapshot2", 1, 1).unwrap();
        let address = cluster.bootstrap_servers();
        let (host, port) = address.rsplit_once(':').unwrap();
        let mut writer = Producer::new(&KafkaSpec {
            brokers: vec![Endpoint {
                host: host.into(),
                port: port.parse().unwrap(),
            }],
            ..KafkaSpec::default()
        });
        let group = |payloads: &[&[u8]]| {
            let mut body = bytes::BytesMut::new();
            for payload in payloads {
                gse_proto::datalink::put_record(&mut body, 1001, 0, 9, payload);
            }
            let (to, records) = (body.len(), payloads.len() as u32);
            let mut load = crate::sinks::Load::new(body.freeze());
            load.push(crate::sinks::Part {
                data_id: 1001,
                target: "snapshot2".into(),
                from: 0,
                to,
                records,
            });
            Group { loads: vec![load] }
        };
        let first = group(&[b"\xff\x00raw", b"{}"]);
        assert_eq!(writer.write(&first).await, Ok(vec![]));
        cluster.broker_down(1).unwrap();
        let second = group(&[b"later"]);
        {
            let mut writing = writer.write(&second);
            let early = tokio::time::timeout(Duration::from_secs(2), &mut writing).await;
            assert!(early.is_err(), "nobody is there to take it");
            cluster.broker_up(1).unwrap();
            let late = tokio::time::timeout(Duration::from_secs(20), writing).await;
            assert_eq!(late.unwrap(), Ok(vec![]));
        }
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &address)
            .set("group.id", "test")
            .set("auto.offset.reset", "earliest")
            .create()
            .unwrap();
        consumer.subscribe(&["snapshot2"]).unwrap();
        let begun = Instant::now();
        let mut seen = Vec::new();
        while seen.len() < 3 && begun.elapsed() < Duration::from_secs(20) {
            if let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) {
                assert_eq!(message.key(), None);
                seen.push(message.payload().unwrap().to_vec());
            }
        }
        assert_eq!(seen, [&b"\xff\x00raw"[..], b"{}", b"later"]);
    }
}
