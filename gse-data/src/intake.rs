//! Records that our own servers hand over (`proto/gse/intake.proto`): they go the way of any other record of their data id.
//!
//! A call is answered when every sink has what is meant for it, or has it in its spool on disk, so that who calls need not keep it.

use std::sync::Arc;

use anyhow::Context;
use bytes::{Bytes, BytesMut};
use gse_core::rpc::{self, RpcConfig};
use gse_proto::datalink::{MAX_BODY, MAX_PAYLOAD, RECORD_HEADER, put_record};
use gse_proto::intake::record_intake_server::{RecordIntake, RecordIntakeServer};
use gse_proto::intake::{PutReply, PutRequest};
use tokio::time::{Duration, Instant, timeout_at};
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use crate::Node;
use crate::ingest::book::{Arrived, Books, Ticket};
use crate::router;

/// Kind of record: one without an extension, as a plugin reports it.
const COMMON: u16 = 0xc01;

/// Binds the listener, if there is to be one.
///
/// # Errors
/// When the address can't be bound or the certificate files can't be used.
pub async fn serve(node: &Arc<Node>) -> anyhow::Result<()> {
    let config = &node.config.rpc;
    if config.listen.is_empty() {
        return Ok(());
    }
    let files = rpc::files(config, node.config.internal.tls.as_ref()).context("rpc.tls is not set")?;
    let intake = Intake {
        node: Arc::clone(node),
        limit: patience(config),
    };
    let service = RecordIntakeServer::new(intake)
        .max_decoding_message_size(config.max_message_bytes)
        .max_encoding_message_size(config.max_message_bytes);
    let routes = Routes::new(service);
    let life = node.life.clone();
    let bound = rpc::serve(config, &files, routes, async move { life.draining().await }, &node.life).await?;
    node.life.announce("rpc", bound.to_string());
    Ok(())
}

/// A caller gives up at the call's time-out; what has not arrived somewhat before it is said to have failed.
fn patience(config: &RpcConfig) -> Duration {
    Duration::from_millis(config.call_timeout_ms).mul_f64(0.8)
}

struct Intake {
    node: Arc<Node>,
    limit: Duration,
}

#[tonic::async_trait]
impl RecordIntake for Intake {
    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutReply>, Status> {
        let deadline = Instant::now() + self.limit;
        let request = request.into_inner();
        let body = body(&request)?;
        let taken = u32::try_from(request.records.len()).unwrap_or(u32::MAX);
        if taken == 0 {
            return Ok(Response::new(PutReply { taken }));
        }
        let node = &self.node;
        // A book of one batch: acknowledged is what has arrived everywhere.
        let book = Books::new(1).open(&request.from, &Bytes::new());
        let (link, acked) = book.take();
        if book.arrived(link, acked + 1) != Arrived::New {
            return Err(Status::internal("a new sequence does not take its first batch"));
        }
        let ticket = Ticket::new(Arc::clone(&book), acked + 1);
        let room = u32::try_from(body.len().div_ceil(1024)).unwrap_or(u32::MAX);
        let delivery = async {
            let place = Arc::clone(&node.memory).acquire_many_owned(room).await;
            ticket.hold(place.map_err(|_| Status::unavailable("gse_data is stopping"))?);
            let sorted = router::sort(&node.router.plan(), &node.stats, &node.tails, &body)
                .map_err(|error| Status::internal(error.to_string()))?;
            node.metrics.batches.inc();
            node.metrics.records.inc_by(sorted.records);
            node.metrics.bytes.inc_by(sorted.bytes);
            router::hand_over(sorted, &ticket).await;
            ticket.settle();
            match book.next(link, acked).await {
                Some(_) => Ok(()),
                None => Err(Status::unavailable(
                    "a sink was taken away; hand the records over again",
                )),
            }
        };
        match timeout_at(deadline, delivery).await {
            Ok(Ok(())) => Ok(Response::new(PutReply { taken })),
            Ok(Err(status)) => Err(status),
            Err(_) => Err(Status::deadline_exceeded(
                "a sink has neither taken the records nor put them on its disk in time",
            )),
        }
    }
}

/// The records as they stand in a batch of a link.
fn body(request: &PutRequest) -> Result<Bytes, Status> {
    let mut whole = 0_usize;
    for record in &request.records {
        if record.data_id == 0 || i32::try_from(record.data_id).is_err() {
            return Err(Status::invalid_argument(format!("{} is no data id", record.data_id)));
        }
        if record.payload.len() > MAX_PAYLOAD {
            return Err(Status::invalid_argument(format!(
                "a record of {} bytes; at most {MAX_PAYLOAD} are carried",
                record.payload.len()
            )));
        }
        whole += RECORD_HEADER + record.payload.len();
    }
    if whole > MAX_BODY {
        return Err(Status::invalid_argument(format!(
            "{whole} bytes of records in one call; at most {MAX_BODY} are taken"
        )));
    }
    let mut body = BytesMut::with_capacity(whole);
    for record in &request.records {
        put_record(&mut body, record.data_id, record.utctime, COMMON, &record.payload);
    }
    Ok(body.freeze())
}
