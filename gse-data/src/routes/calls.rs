//! The calls of administrators (contract data-plane, section 3): eight that platforms make, and the lists for operators.
//!
//! What a call writes is kept as it was written; here is which keys a call has, what they must hold, and what is answered. Bodies hold
//! passwords and are never logged.

use std::collections::BTreeMap;
use std::sync::Arc;

use gse_core::audit::Audit;
use gse_core::http::{ApiError, ContractRequest, Reply, Service};
use gse_core::store::StoreError;
use gse_proto::codes::Code;
use gse_proto::http::{DataTailRequest, Route};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::raw::RawObject;
use super::spec::{self, Number};
use super::store::{ChangeError, Channel, KeptStream, Meta, Named, RouteStore};
use super::watch::Watch;
use crate::stats::Stats;
use crate::tail::Tails;

/// Most routes, and most filters, of one data id.
const MOST: usize = 1_000;
/// Keys of a Kafka stream that some clients look for beside it.
const BESIDE: [&str; 5] = [
    "sasl_usename",
    "sasl_username",
    "sasl_passwd",
    "sasl_mechanisms",
    "security_protocol",
];
/// Platforms, and the data ids that are given to them. Numbers of old were `plat << 20 | n`; the ranges leave those out that are given by
/// hand (1000 to 1020, 1100000 to 1199999).
const PLATS: [(&str, (u32, u32)); 5] = [
    ("bkmonitor", (1_500_000, 2_097_151)),
    ("tgdp", (10_000, 1_048_575)),
    ("iegdata", (2_107_152, 3_145_727)),
    ("tglog", (3_155_728, 4_194_303)),
    ("tdm", (4_204_304, 5_242_879)),
];

#[derive(Deserialize)]
struct Body {
    #[serde(default)]
    metadata: Option<Place>,
    #[serde(default)]
    condition: Option<Place>,
    #[serde(default)]
    operation: Option<Operation>,
    #[serde(default)]
    specification: Option<Specification>,
    #[serde(default)]
    stream_to: Option<RawObject>,
    #[serde(default)]
    route: Option<Vec<RawObject>>,
    #[serde(default)]
    stream_filters: Option<Vec<RawObject>>,
}

#[derive(Default, Deserialize)]
struct Place {
    #[serde(default)]
    plat_name: Option<String>,
    #[serde(default)]
    channel_id: Option<Number>,
    #[serde(default)]
    stream_to_id: Option<Number>,
    #[serde(default)]
    label: Option<Box<RawValue>>,
}

#[derive(Default, Deserialize)]
struct Operation {
    #[serde(default)]
    operator_name: Option<String>,
    #[serde(default)]
    method: Option<String>,
}

#[derive(Deserialize)]
struct Specification {
    #[serde(default)]
    stream_to: Option<RawObject>,
    /// Routes where routes are changed, names where they are removed.
    #[serde(default)]
    route: Option<Vec<Box<RawValue>>>,
    #[serde(default)]
    stream_filters: Option<Vec<Box<RawValue>>>,
}

/// Answers the calls.
pub struct RouteCalls {
    /// Where routes are kept.
    pub store: RouteStore,
    /// Where they are seen.
    pub watch: Arc<Watch>,
    /// Gets a line for every change.
    pub audit: Audit,
    /// What became of records.
    pub stats: Arc<Stats>,
    /// Who looks on.
    pub tails: Arc<Tails>,
}

impl Service for RouteCalls {
    fn serves(&self, route: Route) -> bool {
        route.owner() == gse_proto::http::Owner::Data
    }

    async fn call(&self, request: ContractRequest) -> Result<Reply, ApiError> {
        match request.route {
            Route::DataRoutes => return self.overview().await,
            Route::DataTail => return self.tail(&request).await,
            Route::DataFigures => return Reply::json(&json!({ "ids": self.figures() })),
            _ => {}
        }
        let body: Body = request.decode().await?;
        let operator = operator(&body)?;
        let write = !matches!(request.route, Route::QueryRoute | Route::QueryStreamto);
        if write {
            self.note(&request, &body).await?;
        }
        let answer = match request.route {
            Route::QueryStreamto => return self.query_stream(&body).await,
            Route::QueryRoute => return self.query_route(&body).await,
            Route::AddStreamto => self.add_stream(body).await,
            Route::UpdateStreamto => self.update_stream(body).await,
            Route::DeleteStreamto => self.delete_stream(&body).await,
            Route::AddRoute => self.add_route(body, operator).await,
            Route::UpdateRoute => self.update_route(body).await,
            Route::DeleteRoute => self.delete_route(&body).await,
            _ => Err(Code::NoSuchCall.into()),
        }?;
        // So that this instance follows at once; the others do when they look.
        if let Err(error) = self.watch.refresh().await {
            tracing::debug!(%error, "a change of routes is written and not yet followed");
        }
        Reply::json(&answer)
    }
}

impl RouteCalls {
    async fn note(&self, request: &ContractRequest, body: &Body) -> Result<(), ApiError> {
        let place = body.condition.as_ref().or(body.metadata.as_ref());
        let number = |number: Option<Number>| number.map(|number| number.0.to_string());
        let about = place.and_then(|place| number(place.channel_id).or_else(|| number(place.stream_to_id)));
        self.note_target(request, about.as_deref()).await
    }

    async fn note_target(&self, request: &ContractRequest, about: Option<&str>) -> Result<(), ApiError> {
        let entry = request.audit_entry().with_targets(about.into_iter());
        self.audit.record(entry).await.map_err(|error| {
            tracing::error!(%error, "the audit trail can't be written; the call is refused");
            ApiError::new(Code::System, "the audit trail can't be written; nothing was done")
        })
    }

    /// Shows records, which may hold anything: it is written down who looks.
    async fn tail(&self, request: &ContractRequest) -> Result<Reply, ApiError> {
        let asked: DataTailRequest = request.decode().await?;
        if asked.data_id == 0 {
            return Err(ApiError::arguments("data_id has to be a number above 0"));
        }
        self.note_target(request, Some(&asked.data_id.to_string())).await?;
        let tail = self
            .tails
            .open(asked.data_id)
            .map_err(|full| ApiError::new(Code::Limit, full))?;
        Ok(tail.reply())
    }

    async fn add_stream(&self, body: Body) -> Result<Value, ApiError> {
        let place = body.metadata.ok_or_else(|| missing("metadata"))?;
        let stream_to = body.stream_to.ok_or_else(|| missing("stream_to"))?;
        let asked = match place.stream_to_id {
            None => None,
            Some(id) => Some(positive(Some(id), "metadata.stream_to_id")?),
        };
        let stream = spec::stream(asked.unwrap_or(1), &stream_to).map_err(ApiError::arguments)?;
        let kept = KeptStream {
            plat_name: plat(&place, "metadata")?,
            label: label(place.label),
            stream_to,
        };
        let id = self.store.add_stream(asked, &kept).await.map_err(change_error)?;
        tracing::info!(stream = id, mode = stream.sink.mode(), "stream added");
        Ok(json!({ "stream_to_id": id, "name": stream.name }))
    }

    async fn update_stream(&self, body: Body) -> Result<Value, ApiError> {
        let place = body.condition.ok_or_else(|| missing("condition"))?;
        let id = positive(place.stream_to_id, "condition.stream_to_id")?;
        let stream_to = body
            .specification
            .and_then(|specification| specification.stream_to)
            .ok_or_else(|| missing("specification.stream_to"))?;
        spec::stream(id, &stream_to).map_err(ApiError::arguments)?;
        let mut streams = self.store.streams().await.map_err(|error| store_error(&error))?;
        let mut kept = streams.remove(&id).ok_or_else(|| no_stream(id))?;
        kept.stream_to = stream_to;
        self.store
            .set_stream(id, &kept)
            .await
            .map_err(|error| store_error(&error))?;
        Ok(json!({}))
    }

    async fn delete_stream(&self, body: &Body) -> Result<Value, ApiError> {
        let place = body.condition.as_ref().ok_or_else(|| missing("condition"))?;
        let id = positive(place.stream_to_id, "condition.stream_to_id")?;
        if self
            .store
            .delete_stream(id)
            .await
            .map_err(|error| store_error(&error))?
        {
            Ok(json!({}))
        } else {
            Err(no_stream(id))
        }
    }

    async fn query_stream(&self, body: &Body) -> Result<Reply, ApiError> {
        let place = body.condition.as_ref().ok_or_else(|| missing("condition"))?;
        let streams = self.store.streams().await.map_err(|error| store_error(&error))?;
        if let Some(id) = place.stream_to_id {
            let id = positive(Some(id), "condition.stream_to_id")?;
            let kept = streams.get(&id).ok_or_else(|| no_stream(id))?;
            let item = stream_item(id, kept).map_err(|error| unwritten(&error))?;
            return Reply::json(&[item]);
        }
        let plat = place.plat_name.as_deref().unwrap_or_default();
        let of_plat = streams
            .iter()
            .filter(|(_, kept)| plat.is_empty() || kept.plat_name == plat);
        let items: serde_json::Result<Vec<RawObject>> = of_plat.map(|(id, kept)| stream_item(*id, kept)).collect();
        Reply::json(&items.map_err(|error| unwritten(&error))?)
    }

    async fn add_route(&self, body: Body, operator: String) -> Result<Value, ApiError> {
        let place = body.metadata.ok_or_else(|| missing("metadata"))?;
        let routes = routes(body.route.unwrap_or_default()).map_err(ApiError::arguments)?;
        let filters = filters(body.stream_filters.unwrap_or_default()).map_err(ApiError::arguments)?;
        check_names(&routes, |name| filters.iter().any(|(known, _)| known == name))?;
        let meta = Meta {
            life: String::new(),
            plat_name: plat(&place, "metadata")?,
            label: label(place.label),
            operator,
        };
        // Some clients send 0 or -1 for one that they do not have.
        let id = match place.channel_id.filter(|id| id.0 > 0) {
            Some(id) => {
                let id = channel_id(Some(id), "metadata.channel_id")?;
                let made = self.store.create(id, &meta, &routes, &filters).await;
                if !made.map_err(|error| store_error(&error))? && !self.is_same(id, &routes).await? {
                    return Err(ApiError::new(
                        Code::Exists,
                        format!("channel_id {id} exists already; change its routes with update_route"),
                    ));
                }
                id
            }
            None => {
                let range = PLATS
                    .iter()
                    .find(|(name, _)| *name == meta.plat_name)
                    .map(|(_, range)| *range);
                let range = range.ok_or_else(|| {
                    let names: Vec<&str> = PLATS.iter().map(|(name, _)| *name).collect();
                    ApiError::arguments(format!(
                        "metadata.plat_name: no data ids are set aside for {:?}; say which in metadata.channel_id, or use one of {}",
                        meta.plat_name,
                        names.join(", ")
                    ))
                })?;
                let minted = self.store.mint(&meta, range, &routes, &filters).await;
                minted.map_err(change_error)?
            }
        };
        tracing::info!(data_id = id, routes = routes.len(), "data id added");
        Ok(json!({ "channel_id": id, "proofing_id": 0 }))
    }

    /// Whether a data id has just these routes, as when a call that was answered too late is made again.
    async fn is_same(&self, id: u32, routes: &Named) -> Result<bool, ApiError> {
        let Some(channel) = self.channel(id).await? else {
            return Ok(false);
        };
        let text = |route: &RawObject| serde_json::to_string(route).unwrap_or_default();
        Ok(!routes.is_empty()
            && channel.routes.len() == routes.len()
            && channel
                .routes
                .iter()
                .zip(routes)
                .all(|(old, (_, new))| text(old) == text(new)))
    }

    async fn channel(&self, id: u32) -> Result<Option<Channel>, ApiError> {
        self.store.channel(id).await.map_err(|error| store_error(&error))
    }

    async fn update_route(&self, body: Body) -> Result<Value, ApiError> {
        let place = body.condition.ok_or_else(|| missing("condition"))?;
        let id = channel_id(place.channel_id, "condition.channel_id")?;
        let given = body.specification.ok_or_else(|| missing("specification"))?;
        let routes = routes(objects(given.route, "route")?).map_err(ApiError::arguments)?;
        let filters = filters(objects(given.stream_filters, "stream_filters")?).map_err(ApiError::arguments)?;
        let channel = self.channel(id).await?.ok_or_else(|| no_channel(id))?;
        let old: Vec<String> = channel
            .filters
            .iter()
            .filter_map(|filter| filter.read("name"))
            .collect();
        check_names(&routes, |name| {
            filters.iter().any(|(known, _)| known == name) || old.iter().any(|known| known == name)
        })?;
        if channel.routes.len() + routes.len() > 2 * MOST {
            let text = format!("channel_id {id} has {} routes; remove some first", channel.routes.len());
            return Err(ApiError::new(Code::Limit, text));
        }
        self.store
            .upsert(id, &channel, &routes, &filters)
            .await
            .map_err(|error| store_error(&error))?;
        Ok(json!({ "channel_id": id }))
    }

    async fn delete_route(&self, body: &Body) -> Result<Value, ApiError> {
        let place = body.condition.as_ref().ok_or_else(|| missing("condition"))?;
        let id = channel_id(place.channel_id, "condition.channel_id")?;
        let channel = self.channel(id).await?.ok_or_else(|| no_channel(id))?;
        let method = body
            .operation
            .as_ref()
            .and_then(|operation| operation.method.as_deref());
        match method {
            Some("all") => self.store.delete(id).await,
            Some("specification") => {
                let given = body.specification.as_ref().ok_or_else(|| missing("specification"))?;
                let routes = names(given.route.as_deref(), "route")?;
                let filters = names(given.stream_filters.as_deref(), "stream_filters")?;
                self.store.remove(id, &channel, &routes, &filters).await
            }
            _ => {
                return Err(ApiError::arguments(
                    "operation.method has to be \"all\" or \"specification\"",
                ));
            }
        }
        .map_err(|error| store_error(&error))?;
        Ok(json!({}))
    }

    async fn query_route(&self, body: &Body) -> Result<Reply, ApiError> {
        let place = body.condition.as_ref().ok_or_else(|| missing("condition"))?;
        let id = channel_id(place.channel_id, "condition.channel_id")?;
        let channel = self.channel(id).await?.ok_or_else(|| no_channel(id))?;
        let item = channel_item(id, &channel).map_err(|error| unwritten(&error))?;
        Reply::json(&[item])
    }

    /// Counts of data ids, with whether each has a route.
    fn figures(&self) -> Vec<Value> {
        let table = self.watch.table().load_full();
        let all = self.stats.all().into_iter();
        all.map(|(id, counts)| {
            let mut row = json!(counts);
            row["data_id"] = id.into();
            row["routed"] = table.rules(id).is_some().into();
            row
        })
        .collect()
    }

    /// Everything, without passwords.
    async fn overview(&self) -> Result<Reply, ApiError> {
        let table = self.watch.table().load_full();
        let streams: Vec<Value> = table
            .streams()
            .values()
            .map(|stream| json!({ "stream_to_id": stream.id, "name": stream.name, "report_mode": stream.sink.mode() }))
            .collect();
        let versions = self.store.versions().await.map_err(|error| store_error(&error))?;
        let ids: Vec<u32> = versions.into_keys().collect();
        let channels = self.store.channels(&ids).await.map_err(|error| store_error(&error))?;
        let mut rows = Vec::new();
        for (id, channel) in ids.into_iter().zip(channels) {
            let Some(channel) = channel else { continue };
            let rules: BTreeMap<&str, _> = table
                .rules(id)
                .map(|rules| rules.iter().map(|rule| (rule.name.as_str(), rule)).collect())
                .unwrap_or_default();
            let routes: Vec<Value> = channel
                .routes
                .iter()
                .filter_map(|route| route.read::<String>("name"))
                .map(|name| {
                    let rule = rules.get(name.as_str());
                    json!({
                        "name": name,
                        "stream_to_id": rule.map(|rule| rule.stream),
                        "target": rule.map(|rule| rule.target.to_string()),
                        "filtered": rule.is_some_and(|rule| !rule.takes_all()),
                    })
                })
                .collect();
            rows.push(json!({ "channel_id": id, "plat_name": channel.meta.plat_name, "routes": routes }));
        }
        Reply::json(&json!({ "channels": rows, "streams": streams, "problems": table.problems }))
    }
}

/// Checks routes and finds their names.
///
/// # Errors
/// What is wrong with one of them.
pub fn routes(list: Vec<RawObject>) -> Result<Named, String> {
    named(list, "route", |route, at| {
        // A null is what some clients write for an empty list; others stumble over reading one.
        route.drop_null("filter_name_and");
        route.drop_null("filter_name_or");
        spec::route(route, at).map(|spec| spec.name)
    })
}

/// The same of filters.
///
/// # Errors
/// What is wrong with one of them.
pub fn filters(list: Vec<RawObject>) -> Result<Named, String> {
    named(list, "stream_filters", |filter, at| {
        spec::filter(filter, at).map(|(name, _)| name)
    })
}

fn named(
    list: Vec<RawObject>,
    key: &str,
    name: impl Fn(&mut RawObject, &str) -> Result<String, String>,
) -> Result<Named, String> {
    if list.len() > MOST {
        return Err(format!("{key} has {} entries, {MOST} are allowed", list.len()));
    }
    let mut found = Named::with_capacity(list.len());
    for (n, mut one) in list.into_iter().enumerate() {
        let name = name(&mut one, &format!("{key}[{n}]"))?;
        if found.iter().any(|(known, _)| *known == name) {
            return Err(format!("{key}[{n}].name: {name:?} is there twice"));
        }
        found.push((name, one));
    }
    Ok(found)
}

/// Filters that routes name have to be there.
fn check_names(routes: &Named, known: impl Fn(&str) -> bool) -> Result<(), ApiError> {
    for (name, route) in routes {
        for key in ["filter_name_and", "filter_name_or"] {
            for filter in route.read::<Vec<String>>(key).unwrap_or_default() {
                if !known(&filter) {
                    let text = format!("route {name:?}: {key} names {filter:?}, which is not among stream_filters");
                    return Err(ApiError::arguments(text));
                }
            }
        }
    }
    Ok(())
}

fn objects(list: Option<Vec<Box<RawValue>>>, key: &str) -> Result<Vec<RawObject>, ApiError> {
    let objects = list.unwrap_or_default().into_iter().enumerate().map(|(n, one)| {
        serde_json::from_str(one.get())
            .map_err(|_| ApiError::arguments(format!("specification.{key}[{n}] has to be an object")))
    });
    objects.collect()
}

fn names(list: Option<&[Box<RawValue>]>, key: &str) -> Result<Vec<String>, ApiError> {
    let names = list.unwrap_or_default().iter().enumerate().map(|(n, one)| {
        serde_json::from_str(one.get())
            .map_err(|_| ApiError::arguments(format!("specification.{key}[{n}] has to be a name")))
    });
    names.collect()
}

/// One item for all readers: nested, flat, and with the keys of SASL at the top (contract data-plane#25).
fn stream_item(id: u64, kept: &KeptStream) -> serde_json::Result<RawObject> {
    let metadata = RawObject::default()
        .with("plat_name", &kept.plat_name)?
        .with("stream_to_id", &id)?;
    let mut item = RawObject::default()
        .with("metadata", &labelled(metadata, kept.label.as_deref())?)?
        .with("stream_to", &kept.stream_to)?;
    if let Some((mode, part)) = spec::mode_of(&kept.stream_to) {
        item = item.with(mode, &part)?;
        for key in BESIDE {
            if let Some(value) = part.get(key) {
                item = item.with(key, value)?;
            }
        }
    }
    Ok(item)
}

/// What is kept of a data id, letter for letter; keys that nobody has written stay away (contract data-plane#19).
fn channel_item(id: u32, channel: &Channel) -> serde_json::Result<RawObject> {
    let metadata = RawObject::default()
        .with("version", "v2")?
        .with("channel_id", &id)?
        .with("plat_name", &channel.meta.plat_name)?;
    let item = RawObject::default()
        .with("metadata", &labelled(metadata, channel.meta.label.as_deref())?)?
        .with("route", &channel.routes)?;
    if channel.filters.is_empty() {
        Ok(item)
    } else {
        item.with("stream_filters", &channel.filters)
    }
}

fn labelled(metadata: RawObject, label: Option<&RawValue>) -> serde_json::Result<RawObject> {
    match label {
        Some(label) => metadata.with("label", label),
        None => Ok(metadata),
    }
}

fn unwritten(error: &serde_json::Error) -> ApiError {
    tracing::error!(%error, "what is kept of a route cannot be written as JSON");
    Code::System.into()
}

fn operator(body: &Body) -> Result<String, ApiError> {
    let name = body
        .operation
        .as_ref()
        .and_then(|operation| operation.operator_name.clone());
    name.filter(|name| !name.is_empty() && name.len() <= 255)
        .ok_or_else(|| ApiError::arguments("operation.operator_name is missing: say who asks, such as \"admin\""))
}

fn plat(place: &Place, at: &str) -> Result<String, ApiError> {
    let name = place.plat_name.clone().unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
        return Err(ApiError::arguments(format!(
            "{at}.plat_name has to have 1 to 64 letters, digits, '_', '-' and '.', such as \"bkmonitor\""
        )));
    }
    Ok(name)
}

/// A label is an object or is not there; some clients can read nothing else.
fn label(label: Option<Box<RawValue>>) -> Option<Box<RawValue>> {
    label.filter(|label| label.get().trim_start().starts_with('{'))
}

fn positive(number: Option<Number>, at: &str) -> Result<u64, ApiError> {
    number
        .and_then(|number| u64::try_from(number.0).ok())
        .filter(|number| *number > 0)
        .ok_or_else(|| ApiError::arguments(format!("{at} has to be a number above 0")))
}

fn channel_id(number: Option<Number>, at: &str) -> Result<u32, ApiError> {
    let id = positive(number, at)?;
    u32::try_from(id).map_err(|_| ApiError::arguments(format!("{at} has to be at most {}", u32::MAX)))
}

fn missing(key: &str) -> ApiError {
    ApiError::arguments(format!("{key} is missing"))
}

fn no_channel(id: u32) -> ApiError {
    ApiError::new(Code::NoSuchRoute, format!("channel_id {id} not found"))
}

fn no_stream(id: u64) -> ApiError {
    ApiError::new(Code::NoSuchRoute, format!("stream_to_id {id} not found"))
}

fn change_error(error: ChangeError) -> ApiError {
    match error {
        ChangeError::Store(error) => store_error(&error),
        ChangeError::Exists(text) => ApiError::new(Code::Exists, text),
        ChangeError::Full(text) => ApiError::new(Code::Limit, text),
    }
}

fn store_error(error: &StoreError) -> ApiError {
    tracing::warn!(%error, "a call about routes failed for want of the store");
    ApiError::from(Code::StoreUnavailable)
}
