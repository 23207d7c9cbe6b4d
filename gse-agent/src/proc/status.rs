//! How one process is at this moment (contract procmgr-agent-lifecycle, 1.4), and what its version is. Looking changes nothing, and a process
//! that nobody has registered is looked for all the same.

use std::sync::Arc;
use std::time::Duration;

use gse_proto::proc::{Operation, Outcome, Policy, Process, Spec, Status, code};
use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::find::Ident;
use super::hosting::check_spec;
use super::registry::{Key, labels};
use super::stat::{self, Stat};
use super::{Entry, FINDS_AT_ONCE, Shared, unix_ms};
use crate::exec::command::{self, Leaving, Order};

/// Most output of such a command.
const OUTPUT: u64 = 4096;
/// Files looked at for the size of a directory.
const FILES: usize = 1_000;

/// Answers an operation of type 2.
pub(super) async fn answer(shared: &Arc<Shared>, key: &Key, order: &Operation) -> Result<Outcome, Leaving> {
    let start_ms = unix_ms();
    let known = {
        let entries = shared.entries.lock();
        entries
            .get(key)
            .map(|entry| (Arc::clone(&entry.kept.spec), entry.kept.ident.clone()))
    };
    // What is asked about may be told only in part; what is registered is told whole.
    let whole = order.spec.as_ref().filter(|spec| check_spec(spec, true).is_ok());
    let spec = match (&known, whole, &order.spec) {
        (Some((spec, _)), None, _) => Arc::clone(spec),
        (_, Some(spec), _) | (None, None, Some(spec)) => Arc::new(spec.clone()),
        (None, None, None) => Arc::new(Spec::default()),
    };
    let last = known.and_then(|(_, ident)| ident);
    let found = shared.find(&spec, last, None, true).await;
    let mut told = match &found {
        Some((stat, ident)) => running(shared, key, &spec, stat, ident).await,
        None => Status {
            pid: -1,
            ..Status::default()
        },
    };
    let can_run = check_spec(&spec, true).is_ok();
    if can_run && !spec.version_cmd.trim().is_empty() {
        let cached = {
            let entries = shared.entries.lock();
            let entry = entries.get(key).filter(|entry| entry.kept.spec == spec);
            let fits = |entry: &&Entry| match (&found, entry.version_of) {
                (Some((stat, _)), of) => of == Some((stat.pid, stat.started, entry.digest)),
                (None, Some((_, _, digest))) => digest == entry.digest,
                (None, None) => false,
            };
            let version = entry.filter(fits).map(|entry| entry.version.clone());
            version.filter(|version| !version.is_empty())
        };
        told.version = match cached {
            Some(version) => version,
            // One that does not run is not worth waiting for: thousands of them may be asked about together.
            None if found.is_none() && shared.finds.available_permits() < FINDS_AT_ONCE => String::new(),
            None => version_of(&ask(shared, &spec, &spec.version_cmd).await?),
        };
    }
    if can_run && found.is_some() && !spec.health_cmd.trim().is_empty() {
        told.health = ask(shared, &spec, &spec.health_cmd).await?.trim().to_owned();
    }
    times(&mut told);
    let process = {
        let mut entries = shared.entries.lock();
        match entries.get_mut(key) {
            Some(entry) => {
                if !told.version.is_empty() && entry.kept.spec == spec {
                    entry.version.clone_from(&told.version);
                    if let Some((stat, _)) = &found {
                        entry.version_of = Some((stat.pid, stat.started, entry.digest));
                    }
                }
                let mut process = shared.process(key, entry);
                process.pid = told.pid;
                process
            }
            None => unknown(key, order, &spec, &told),
        }
    };
    Ok(Outcome {
        op_id: order.op_id.clone(),
        code: code::OK,
        message: "success".to_owned(),
        process: Some(process),
        status: Some(told),
        start_ms,
        end_ms: unix_ms(),
        ..Outcome::default()
    })
}

fn unknown(key: &Key, order: &Operation, spec: &Spec, told: &Status) -> Process {
    Process {
        key: Some(key.to_wire()),
        labels: labels(&order.labels).map(|_| order.labels.clone()).unwrap_or_default(),
        pid: told.pid,
        version: told.version.clone(),
        report_time: unix_ms() / 1000,
        cpu_usage: told.cpu_usage,
        mem_usage: told.mem_usage,
        proc_name: spec.proc_name.clone(),
        setup_path: spec.setup_path.clone(),
        ..Process::default()
    }
}

async fn running(shared: &Arc<Shared>, key: &Key, spec: &Arc<Spec>, stat: &Stat, ident: &Ident) -> Status {
    let units = shared.units;
    let seconds = |ticks: u64| ticks as f64 / units.ticks as f64;
    let metered = {
        let entries = shared.entries.lock();
        let entry = entries
            .get(key)
            .filter(|entry| entry.kept.ident.as_ref() == Some(ident));
        entry.map(|entry| entry.meter.usage(units).cpu)
    };
    let (pid, spec) = (stat.pid, Arc::clone(spec));
    let looked = tokio::task::spawn_blocking(move || {
        let size = directory_size(&spec.setup_path);
        (stat::cmdline(pid).join(" "), stat::uptime(), stat::boot_time(), size)
    });
    let (cmdline, uptime, boot_time, disk_bytes) = looked.await.unwrap_or_default();
    let elapsed = (uptime - seconds(stat.started)).max(0.0);
    let busy = seconds(stat.utime + stat.stime);
    let average = if elapsed >= 0.01 {
        100.0 * busy / elapsed / units.processors as f64
    } else {
        0.0
    };
    let began = i64::try_from(boot_time + stat.started / units.ticks).unwrap_or(0);
    let mem_bytes = stat.rss * units.page;
    Status {
        pid: stat.pid,
        cmdline,
        cpu_usage: metered.unwrap_or(average),
        cpu_usage_average: average,
        mem_usage: 100.0 * mem_bytes as f64 / units.memory.max(1) as f64,
        mem_bytes,
        disk_bytes,
        start_time: text(began, &TimeZone::system()),
        stat: stat.state.to_string(),
        utime: format!("{:.2}", seconds(stat.utime)),
        stime: format!("{:.2}", seconds(stat.stime)),
        threads: stat.threads,
        elapsed_secs: elapsed as u64,
        ..Status::default()
    }
}

fn text(seconds: i64, zone: &TimeZone) -> String {
    let at = Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH);
    at.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

fn times(told: &mut Status) {
    let seconds = i64::try_from(unix_ms() / 1000).unwrap_or(0);
    let zone = TimeZone::system();
    let at = Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH);
    told.timezone = zone.to_offset(at).seconds() / 3600;
    told.local_time = text(seconds, &zone);
    told.utc_time = text(seconds, &TimeZone::UTC);
}

/// Bytes of the files directly in a directory.
fn directory_size(dir: &str) -> u64 {
    if dir.is_empty() {
        return 0;
    }
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let sizes = entries.flatten().take(FILES).filter_map(|entry| entry.metadata().ok());
    sizes.filter(|meta| meta.is_file()).map(|meta| meta.len()).sum()
}

/// Runs a command that only tells something; nothing when it fails.
async fn ask(shared: &Arc<Shared>, spec: &Spec, command: &str) -> Result<String, Leaving> {
    if !shared.accounts.allows(&spec.user) {
        return Ok(String::new());
    }
    let _slot = tokio::select! {
        slot = shared.versions.acquire() => slot.map_err(|_| Leaving)?,
        () = shared.life.draining() => return Err(Leaving),
    };
    let longest = Duration::from_millis(shared.config.status_timeout_ms);
    let order = Order {
        user: spec.user.clone(),
        work_dir: spec.setup_path.clone(),
        command: command.to_owned(),
        timeout: longest.min(Duration::from_secs(Policy::of(spec).op_timeout.into())),
        output_limit: OUTPUT,
    };
    let dir = shared.ops.scratch();
    let end = command::carry_out(dir.clone(), order, &shared.config.self_exec, &shared.life).await;
    let removed = tokio::task::spawn_blocking(move || super::journal::remove(&dir)).await;
    if let Err(error) = removed {
        tracing::error!(%error, "what a command has left cannot be removed");
    }
    let end = end?;
    Ok(if end.ok { end.output } else { String::new() })
}

/// A version as clients take it, out of what a command has printed: of several words the first that looks like one.
fn version_of(output: &str) -> String {
    let plain = |word: &&str| word.chars().all(|c| c.is_ascii_alphanumeric() || c == '.' || c == '-');
    let numbered = |word: &&str| {
        word.trim_start_matches(['v', 'V'])
            .starts_with(|c: char| c.is_ascii_digit())
    };
    let mut words = output.split_whitespace().filter(plain);
    let first = words.clone().find(numbered).or_else(|| words.next());
    first.unwrap_or_default().chars().take(64).collect()
}

fn version_key(entry: &Entry) -> Option<(i32, u64, u64)> {
    let ident = entry.kept.ident.as_ref()?;
    Some((ident.pid, ident.started, entry.digest))
}

/// Whether the version is to be asked for: of another process, or by another command.
pub(super) fn version_due(entry: &Entry) -> bool {
    let key = version_key(entry);
    key.is_some() && entry.version_asked != key && !entry.kept.spec.version_cmd.trim().is_empty()
}

/// Asks for it in the background.
pub(super) fn refresh_version(shared: &Arc<Shared>, key: &Arc<Key>) {
    let asked = {
        let mut entries = shared.entries.lock();
        let Some(entry) = entries.get_mut(key.as_ref()) else {
            return;
        };
        entry.version_asked = version_key(entry);
        (entry.version_asked, Arc::clone(&entry.kept.spec))
    };
    let (task, key) = (Arc::clone(shared), Arc::clone(key));
    shared.life.spawn_contained("process version", async move {
        let (of, spec) = asked;
        let Ok(output) = ask(&task, &spec, &spec.version_cmd).await else {
            return;
        };
        let version = version_of(&output);
        let mut entries = task.entries.lock();
        let Some(entry) = entries.get_mut(key.as_ref()).filter(|entry| entry.version_asked == of) else {
            return;
        };
        entry.version_of = of;
        if entry.version != version {
            entry.version = version;
            task.reporter.changed(&key);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_clients_take_them() {
        // contract: procmgr-agent-lifecycle#32
        for (output, version) in [
            ("3.1.0\n", "3.1.0"),
            ("bkmonitorbeat version 3.1.0-beta.2 (abc)\n", "3.1.0-beta.2"),
            ("v1.2\n", "v1.2"),
            ("unknown\n", "unknown"),
            ("  \n", ""),
            ("\u{4e2d}_x !!", ""),
        ] {
            assert_eq!(version_of(output), version, "{output:?}");
        }
    }
}
