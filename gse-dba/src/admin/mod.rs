//! The operator's own command, `DBA <VERB> ...`: its verbs and how they answer. Each answers one JSON document as a bulk string, or an error. What a verb does is its
//! own module's.

mod look;
mod primary;
mod status;

use bytes::Bytes;
use serde_json::Value;

use crate::client::Client;
use crate::resp::write::Writer;
use crate::server::{Shared, Store};

/// Why a verb was not carried out, as the client reads it: a code in capitals and words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(pub(crate) String);

impl Refused {
    pub(crate) fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

pub(crate) type Answered = Result<Value, Refused>;

/// Answers one `DBA` command of a client; `words` has the command's name too.
pub(crate) async fn run(shared: &Shared, client: &Client, words: &[Bytes], out: &mut Writer) {
    if !shared.config.admin.tcp && !client.is_local() {
        out.error(b"NOPERM DBA is answered on the Unix socket alone (admin.tcp = false)");
        return;
    }
    let verb = words.get(1).map(|v| v.to_ascii_uppercase()).unwrap_or_default();
    let rest = words.get(2..).unwrap_or_default();
    match dispatch(shared, &verb, rest).await {
        Ok(value) => out.bulk(value.to_string().as_bytes()),
        Err(refused) => out.error(refused.0.as_bytes()),
    }
}

/// Verbs by name, in upper case; `rest` is what follows the verb.
async fn dispatch(shared: &Shared, verb: &[u8], rest: &[Bytes]) -> Answered {
    if let Store::Sharded(s) = &*shared.store()
        && let Some(answered) = s.topology_verb(verb, rest).await
    {
        return answered;
    }
    match verb {
        b"PROMOTE" => primary::promote(shared, rest).await,
        b"FAILOVER" => primary::failover(shared, rest).await,
        b"STATUS" => status::status(shared, rest).await,
        b"ACCEPT" => accept(shared, rest),
        b"MIGRATE" => crate::migrate::migrate(&shared.office, rest),
        b"SLOTS" => status::slots(shared, rest),
        b"CLIENTS" => look::clients(shared, rest),
        b"SLOWLOG" => look::slowlog(shared, rest),
        b"HOTKEYS" => look::hotkeys(shared, rest),
        _ => Err(Refused::new(format!(
            "ERR unknown verb '{}' of DBA: there are STATUS, ACCEPT, PROMOTE, FAILOVER, SLOTS, CLIENTS, SLOWLOG, HOTKEYS, MIGRATE",
            String::from_utf8_lossy(verb).chars().take(64).collect::<String>()
        ))),
    }
}

/// `DBA ACCEPT <group>`: a primary that came back with less than it had is served as it is.
fn accept(shared: &Shared, rest: &[Bytes]) -> Answered {
    let [name] = rest else {
        return Err(Refused::new("ERR DBA ACCEPT takes the name of a group"));
    };
    let store = shared.store();
    let crate::server::Store::Sharded(sharded) = &*store else {
        return Err(Refused::new(
            "ERR DBA ACCEPT is for groups of Redis (backend = \"sharded\")",
        ));
    };
    let table = sharded.table();
    let group = table.groups.iter().find(|g| g.seat.name.as_bytes() == name.as_ref());
    let Some(group) = group else {
        return Err(Refused::new(format!(
            "ERR there is no group '{}'",
            String::from_utf8_lossy(name).chars().take(64).collect::<String>()
        )));
    };
    let lost = group.seat.returned.lost();
    group.seat.returned.accept();
    group.seat.nudge();
    if let Some(why) = &lost {
        tracing::warn!(group = %group.seat.name, why, "an operator takes a primary as it is");
    }
    Ok(serde_json::json!({ "group": group.seat.name, "accepted": lost.is_some(), "was": lost }))
}
