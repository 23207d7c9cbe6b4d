//! Which way content goes: in the messages to its targets, or through a swarm. Decided by predicting both, not by a fixed size.
//!
//! In messages the servers send it once for each target; in a swarm the source sends it once and targets pass it on, which needs a
//! moment to begin and one piece's time for each doubling.

use crate::config::PathConfig;

/// The smallest piece of a swarm.
const PIECE: f64 = 65_536.0;

/// How long until the last of `targets` has `bytes`, in seconds: in messages, and through a swarm.
#[must_use]
pub fn predict(config: &PathConfig, bytes: u64, targets: usize) -> (f64, f64) {
    let (bytes, targets) = (bytes as f64, targets.max(1) as f64);
    let (host, server) = (config.host_rate as f64, config.server_rate as f64);
    // From the source to the server, and from there to everybody.
    let messages = bytes / host + targets * bytes / server;
    let piece = PIECE.min(bytes.max(1.0));
    let swarm = bytes / host + config.swarm_start_ms as f64 / 1000.0 + targets.log2().ceil() * piece / host;
    (messages, swarm)
}

/// Up to how many bytes content should go in messages to so many targets.
#[must_use]
pub fn inline_limit(config: &PathConfig, targets: usize) -> u64 {
    // The prediction is monotonic in the size: halve until it holds.
    let (mut low, mut high) = (0, config.max_inline_bytes);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        let (messages, swarm) = predict(config, middle, targets);
        if messages <= swarm {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    low
}

/// Whether content of a call, which is here already, should go to its targets through a swarm that this server is the source of.
#[must_use]
pub fn push_by_swarm(config: &PathConfig, bytes: u64, targets: usize) -> bool {
    let (bytes, targets) = (bytes as f64, targets.max(1) as f64);
    let (host, server) = (config.host_rate as f64, config.server_rate as f64);
    let messages = targets * bytes / server;
    let piece = PIECE.min(bytes.max(1.0));
    let swarm = bytes / server + config.swarm_start_ms as f64 / 1000.0 + targets.log2().ceil() * piece / host;
    bytes > 0.0 && swarm < messages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_pushes_to_many_go_through_a_swarm() {
        let config = PathConfig::default();
        assert!(!push_by_swarm(&config, 102_400, 100) && push_by_swarm(&config, 102_400, 5_000));
        assert!(!push_by_swarm(&config, 500, 5_000) && !push_by_swarm(&config, 0, 50_000));
    }

    #[test]
    fn small_files_and_few_targets_go_in_messages() {
        let config = PathConfig::default();
        assert!(inline_limit(&config, 8) >= 1 << 20);
        assert_eq!(inline_limit(&config, 1), config.max_inline_bytes);
        let many = inline_limit(&config, 5_000);
        assert!((1_000..64 << 10).contains(&many), "{many}");
        // Fewer bytes for more targets, always.
        let limits: Vec<u64> = [1, 2, 8, 24, 100, 1_000, 50_000]
            .iter()
            .map(|n| inline_limit(&config, *n))
            .collect();
        assert!(limits.windows(2).all(|pair| pair[0] >= pair[1]), "{limits:?}");
    }
}
