//! A histogram of times that many threads write at once without a lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::{MetricType, TypedMetric};

/// Upper bounds in microseconds; beyond the last is one more place.
const BOUNDS_US: [u64; 14] = [
    50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 25_000, 50_000, 100_000, 500_000, 1_000_000, 5_000_000,
];

#[derive(Debug, Default)]
struct Inner {
    places: [AtomicU64; BOUNDS_US.len() + 1],
    sum_us: AtomicU64,
}

/// A handle on the histogram.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timing(Arc<Inner>);

impl Timing {
    /// Takes in `n` times that were alike.
    pub(crate) fn observe(&self, took: Duration, n: u64) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let at = BOUNDS_US.partition_point(|bound| *bound < us);
        if let Some(place) = self.0.places.get(at) {
            place.fetch_add(n, Ordering::Relaxed);
        }
        self.0.sum_us.fetch_add(us.saturating_mul(n), Ordering::Relaxed);
    }
}

impl TypedMetric for Timing {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Timing {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        let places: Vec<(f64, u64)> = BOUNDS_US
            .iter()
            .map(|us| *us as f64 / 1e6)
            .chain(std::iter::once(f64::INFINITY))
            .zip(self.0.places.iter().map(|p| p.load(Ordering::Relaxed)))
            .collect();
        let count = places.iter().map(|(_, n)| n).sum();
        let sum = self.0.sum_us.load(Ordering::Relaxed) as f64 / 1e6;
        encoder.encode_histogram::<NoLabelSet>(sum, count, &places, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::family::Family;
    use prometheus_client::registry::Registry;

    #[test]
    fn times_are_in_their_places() {
        let family = Family::<Vec<(String, String)>, Timing>::default();
        let mut registry = Registry::default();
        registry.register("t", "Times", family.clone());
        let one = family.get_or_create(&vec![("class".into(), "read".into())]).clone();
        one.observe(Duration::from_micros(50), 3);
        one.observe(Duration::from_micros(51), 1);
        one.observe(Duration::from_secs(60), 2);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "t_bucket{le=\"0.00005\",class=\"read\"} 3",
            "t_bucket{le=\"0.0001\",class=\"read\"} 4",
            "t_bucket{le=\"5.0\",class=\"read\"} 4",
            "t_bucket{le=\"+Inf\",class=\"read\"} 6",
            "t_count{class=\"read\"} 6",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
