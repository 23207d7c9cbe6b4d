//! Which agents gse_alarm is missing: what it keeps in the store.

use gse_core::store::{Batch, StoreError, as_array, as_bytes, as_int, command};
use gse_proto::alarm::{LostHost, WatchState};
use gse_proto::http::WatchReport;
use gse_proto::keys;
use prost::Message;

use super::Agents;

impl Agents {
    /// How many alarms were sent about each of `ids` since it is not heard any more, and where gse_alarm is, if there is one.
    ///
    /// # Errors
    /// The store does not answer, or not in time.
    pub async fn lost(&self, ids: &[&str]) -> Result<(Vec<u32>, Option<WatchReport>), StoreError> {
        self.within(async {
            let mut batch = Batch::new();
            batch.push(keys::alarm_state(), redis::cmd("TIME"));
            batch.push(keys::alarm_state(), command("GET", keys::alarm_state()));
            if !ids.is_empty() {
                let mut fields = command("HMGET", keys::alarm_lost());
                fields.arg(ids);
                batch.push(keys::alarm_lost(), fields);
            }
            let mut replies = self.store.run(batch).await?.into_iter();
            let time = replies.next().map_or(Ok(vec![]), as_array)?.into_iter().next();
            let now_s = time.map_or(Ok(0), as_int)?.unsigned_abs();
            let state = replies.next().map_or(Ok(None), as_bytes)?;
            let report = state
                .and_then(|bytes| WatchState::decode(bytes).ok())
                .map(|state| WatchReport {
                    node_id: state.node_id,
                    looked_ago_s: now_s.saturating_sub(state.looked_ms / 1_000),
                    held: state.held,
                    held_why: state.held_why,
                });
            let mut alarms = Vec::with_capacity(ids.len());
            for value in replies.next().map_or(Ok(vec![]), as_array)? {
                let host = as_bytes(value)?.and_then(|bytes| LostHost::decode(bytes).ok());
                alarms.push(host.map_or(0, |host| host.sent));
            }
            alarms.resize(ids.len(), 0);
            Ok((alarms, report))
        })
        .await
    }
}
