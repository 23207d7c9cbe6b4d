//! A site's own file of streams and routes, put into the store once, at the first start, so that a site can keep its routes in git.
//!
//! ```toml
//! [[streams]]
//! stream_to_id = 500
//! plat_name = "bkmonitor"
//! stream_to = { name = "mq", report_mode = "kafka", kafka = { storage_address = [{ ip = "kafka.example.org", port = 9092 }] } }
//!
//! [[routes]]
//! channel_id = 1001
//! plat_name = "bkmonitor"
//! route = [{ name = "base", stream_to = { stream_to_id = 500, kafka = { topic_name = "0bkmonitor_10010" } } }]
//! ```
//!
//! JSON of the same shape does as well. What is in the store already is left as it is.

use std::path::Path;

use anyhow::{Context, bail};
use serde::Deserialize;

use super::raw::RawObject;
use super::spec;
use super::store::{ChangeError, KeptStream, Meta, Named, RouteStore};

/// The largest file that is read, bytes.
const MAX_FILE: u64 = 32 << 20;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    streams: Vec<Stream>,
    #[serde(default)]
    routes: Vec<Routes>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stream {
    stream_to_id: u64,
    plat_name: String,
    stream_to: RawObject,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Routes {
    channel_id: u32,
    plat_name: String,
    #[serde(default)]
    route: Vec<RawObject>,
    #[serde(default)]
    stream_filters: Vec<RawObject>,
}

/// What a file holds, checked.
#[derive(Debug)]
pub struct Seed {
    streams: Vec<(u64, KeptStream)>,
    channels: Vec<(u32, Meta, Named, Named)>,
}

impl Seed {
    /// Reads and checks a file. Blocking.
    ///
    /// # Errors
    /// It cannot be read, or something in it is wrong.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let size = std::fs::metadata(path)
            .with_context(|| format!("file of routes {shown}"))?
            .len();
        if size > MAX_FILE {
            bail!("file of routes {shown}: {size} bytes, at most {MAX_FILE} are read");
        }
        let text = std::fs::read_to_string(path).with_context(|| format!("file of routes {shown}"))?;
        Self::parse(&text).with_context(|| format!("file of routes {shown}"))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        let file: File = if text.trim_start().starts_with('{') {
            serde_json::from_str(text)?
        } else {
            // By way of JSON, which is what is kept.
            let table: toml::Table = toml::from_str(text)?;
            serde_json::from_str(&serde_json::to_string(&table)?)?
        };
        let mut seed = Self {
            streams: vec![],
            channels: vec![],
        };
        for (n, one) in file.streams.into_iter().enumerate() {
            if one.stream_to_id == 0 {
                bail!("streams[{n}].stream_to_id has to be above 0");
            }
            spec::stream(one.stream_to_id, &one.stream_to).map_err(|why| anyhow::anyhow!("streams[{n}]: {why}"))?;
            let kept = KeptStream {
                plat_name: one.plat_name,
                label: None,
                stream_to: one.stream_to,
            };
            seed.streams.push((one.stream_to_id, kept));
        }
        for (n, one) in file.routes.into_iter().enumerate() {
            let why = |why: String| anyhow::anyhow!("routes[{n}]: {why}");
            if one.channel_id == 0 {
                bail!("routes[{n}].channel_id has to be above 0");
            }
            let routes = super::calls::routes(one.route).map_err(why)?;
            let filters = super::calls::filters(one.stream_filters).map_err(why)?;
            let meta = Meta {
                life: String::new(),
                plat_name: one.plat_name,
                label: None,
                operator: "file".to_owned(),
            };
            seed.channels.push((one.channel_id, meta, routes, filters));
        }
        Ok(seed)
    }

    /// Puts everything into the store, unless a file has been put in before.
    ///
    /// # Errors
    /// The store does not answer; what is missing is put in next time.
    pub async fn apply(&self, store: &RouteStore) -> Result<(), ChangeError> {
        if store.seeded().await?.is_some() {
            tracing::info!("routes.seed: the store has routes of a file already; the file is left alone");
            return Ok(());
        }
        for (id, stream) in &self.streams {
            match store.add_stream(Some(*id), stream).await {
                Ok(_) | Err(ChangeError::Exists(_)) => {}
                Err(error) => return Err(error),
            }
        }
        for (id, meta, routes, filters) in &self.channels {
            store.create(*id, meta, routes, filters).await?;
        }
        let note = format!("{} streams, {} data ids", self.streams.len(), self.channels.len());
        store.set_seeded(&note).await?;
        tracing::info!(note, "routes.seed: the routes of the file have been put in");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOML: &str = r#"
        [[streams]]
        stream_to_id = 500
        plat_name = "bkmonitor"
        stream_to = { name = "mq", report_mode = "kafka", kafka = { storage_address = [{ ip = "k", port = 9092 }] } }

        [[routes]]
        channel_id = 1001
        plat_name = "bkmonitor"
        route = [{ name = "base", stream_to = { stream_to_id = 500, kafka = { topic_name = "t" } } }]
    "#;

    #[test]
    fn files_are_read_and_their_faults_named() {
        let seed = Seed::parse(TOML).unwrap();
        assert_eq!((seed.streams.len(), seed.channels.len()), (1, 1));
        assert_eq!(seed.channels[0].2[0].0, "base");
        for (bad, word) in [
            (TOML.replace("9092", "0"), "streams[0]"),
            (TOML.replace("\"t\"", "\"\""), "routes[0]: route[0]"),
            (TOML.replace("= 1001", "= 0"), "channel_id"),
            ("{".to_owned(), "EOF"),
        ] {
            let error = format!("{:#}", Seed::parse(&bad).unwrap_err());
            assert!(error.contains(word), "{error}");
        }
    }
}
