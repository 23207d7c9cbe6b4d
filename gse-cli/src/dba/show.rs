//! What gse_dba answers, for people. Everything is optional here: a gse_dba of another version may know more or less.

use comfy_table::Cell;
use serde_json::Value;

use crate::agents::trimmed;
use crate::route::new_table;
use crate::text::one_line;
use crate::when;

/// Slots that are shown of a group before the rest is only counted.
const RANGES: usize = 6;

/// A value as a word: `-` when there is none.
pub(super) fn word(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => one_line(text),
        other => other.to_string(),
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// A span of time in its two largest units.
pub(super) fn span(seconds: u64) -> String {
    let (d, h, m, s) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    match seconds {
        0..60 => format!("{s} s"),
        60..3600 => format!("{m} min {s} s"),
        3600..86_400 => format!("{h} h {m} min"),
        _ => format!("{d} d {h} h"),
    }
}

/// Bytes in the largest unit that leaves a number.
pub(super) fn bytes(n: u64) -> String {
    match n {
        0..1024 => format!("{n} B"),
        1024..1_048_576 => format!("{:.1} KiB", n as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", n as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", n as f64 / 1_073_741_824.0),
    }
}

fn ranges(value: &Value) -> String {
    let all = list(value);
    let mut shown: Vec<String> = all.iter().take(RANGES).map(word).collect();
    if all.len() > RANGES {
        shown.push(format!("and {} ranges", all.len() - RANGES));
    }
    if shown.is_empty() {
        "-".to_owned()
    } else {
        shown.join(",")
    }
}

/// Whether `STATUS` says that all is well.
pub(super) fn is_well(status: &Value) -> bool {
    status["health"]["ok"].as_bool().unwrap_or(true)
}

/// `STATUS`.
pub(super) fn status(v: &Value) -> String {
    let mut rows: Vec<(&str, String)> = Vec::new();
    let groups = list(&v["groups"]);
    let mut mode = word(&v["mode"]);
    if !groups.is_empty() {
        mode += &format!(", {} group{}", groups.len(), if groups.len() == 1 { "" } else { "s" });
    }
    if let (Some(w), Some(n)) = (v["acknowledged"].as_u64(), v["copies"].as_u64()) {
        mode += &format!(", a write is on {w} of {n} before it is answered");
    }
    rows.push(("mode", mode));
    rows.push(("durability", word(&v["durability"])));
    rows.push((
        "health",
        if is_well(v) {
            "ok".to_owned()
        } else {
            format!("NOT WELL: {}", word(&v["health"]["reason"]))
        },
    ));
    if !v["reads"].is_null() {
        rows.push(("reads", word(&v["reads"])));
    }
    if !v["epoch"].is_null() {
        rows.push(("topology", format!("epoch {}", word(&v["epoch"]))));
    }
    let clients = &v["clients"];
    if clients.is_object() {
        let mut text = format!("{} of {}", word(&clients["connected"]), word(&clients["max"]));
        if number(&clients["refused"]) > 0 {
            text += &format!(", {} turned away since the start", number(&clients["refused"]));
        }
        rows.push(("clients", text));
    }
    let since = &v["since_start"];
    if since.is_object() && !groups.is_empty() {
        rows.push((
            "since start",
            format!(
                "{} refused for want of copies, {} uncertain, {} crossed slots, {} changes of a primary",
                number(&since["noreplicas"]),
                number(&since["uncertain"]),
                number(&since["crossslot"]),
                number(&since["primary_switches"])
            ),
        ));
    }
    rows.push((
        "process",
        format!(
            "gse_dba {}, pid {}, up for {}",
            word(&v["version"]),
            word(&v["pid"]),
            span(number(&v["uptime_s"]))
        ),
    ));
    let mut out: String = rows.iter().map(|(name, text)| format!("{name:<12} {text}\n")).collect();
    if !groups.is_empty() {
        out.push('\n');
        out += &group_table(groups, v["copies"].as_u64().map(|n| n.saturating_sub(1)));
        for g in groups {
            for key in ["short", "waits_for_operator", "problems"] {
                let told: Vec<String> = match &g[key] {
                    Value::String(text) => vec![one_line(text)],
                    Value::Array(all) => all.iter().map(word).collect(),
                    _ => Vec::new(),
                };
                for text in told {
                    let name = word(&g["name"]);
                    let text = text
                        .strip_prefix(&format!("group '{name}' "))
                        .unwrap_or(&text)
                        .to_owned();
                    out += &format!("{name}: {text}\n");
                }
            }
        }
    }
    if list(&v["moves"]["legs"]).is_empty() {
        return out;
    }
    out + "\n" + &moves(&v["moves"])
}

/// `others` are the copies that each group should have.
fn group_table(groups: &[Value], others: Option<u64>) -> String {
    let mut table = new_table(["GROUP", "SLOTS", "PRIMARY", "STATE", "COPIES", "FURTHEST BEHIND"]);
    for g in groups {
        let followers = list(&g["followers"]);
        let behind = followers
            .iter()
            .max_by_key(|f| (number(&f["behind_bytes"]), number(&f["lag_s"])));
        table.add_row([
            Cell::new(word(&g["name"])),
            Cell::new(word(&g["slots"])),
            Cell::new(word(&g["primary"])),
            Cell::new(word(&g["state"])),
            Cell::new({
                let mut text = word(&g["copies"]);
                if let Some(others) = others {
                    text += &format!(" of {others}");
                }
                if let Some(needs) = g["needs"].as_u64() {
                    text += &format!(", needs {needs}");
                }
                text
            }),
            Cell::new(behind.map_or_else(
                || "-".to_owned(),
                |f| {
                    format!(
                        "{} by {}, heard {} s ago",
                        word(&f["address"]),
                        bytes(number(&f["behind_bytes"])),
                        number(&f["lag_s"])
                    )
                },
            )),
        ]);
    }
    trimmed(&table)
}

/// `SLOTS`.
pub(super) fn slots(v: &Value) -> String {
    if !v["slot"].is_null() {
        return format!(
            "slot {} of group {}, primary {}\n",
            word(&v["slot"]),
            word(&v["group"]),
            word(&v["primary"])
        );
    }
    let mut table = new_table(["GROUP", "SLOTS", "WHICH"]);
    for g in list(&v["groups"]) {
        table.add_row([word(&g["name"]), word(&g["slots"]), ranges(&g["ranges"])].map(Cell::new));
    }
    trimmed(&table)
}

/// `CLIENTS`.
pub(super) fn clients(v: &Value) -> String {
    let mut table = new_table([
        "ID",
        "ADDRESS",
        "NAME",
        "LIBRARY",
        "COMMANDS",
        "IDLE",
        "CONNECTED FOR",
        "OUTPUT",
    ]);
    for c in list(&v["clients"]) {
        let dash = |value: &Value| match word(value) {
            text if text.is_empty() => "-".to_owned(),
            text => text,
        };
        table.add_row(
            [
                word(&c["id"]),
                word(&c["address"]),
                dash(&c["name"]),
                dash(&c["library"]),
                word(&c["commands"]),
                span(number(&c["idle_s"])),
                span(number(&c["age_s"])),
                bytes(number(&c["output_bytes"])),
            ]
            .map(Cell::new),
        );
    }
    format!(
        "{}{} of {} connected, {} turned away since the start\n",
        trimmed(&table),
        word(&v["connected"]),
        word(&v["max"]),
        word(&v["refused"])
    )
}

/// `SLOWLOG`.
pub(super) fn slowlog(v: &Value) -> String {
    let mut table = new_table(["TIME", "TOOK", "CLIENT", "COMMAND"]);
    let now = when::now_ms();
    for e in list(&v["entries"]) {
        let command: Vec<String> = list(&e["command"]).iter().map(word).collect();
        let mut command = command.join(" ");
        if command.chars().count() > 100 {
            command = command.chars().take(97).chain("...".chars()).collect();
        }
        if number(&e["batch"]) > 1 {
            command += &format!("  (first of {} that came together)", number(&e["batch"]));
        }
        table.add_row(
            [
                when::ago(number(&e["time"]).saturating_mul(1000), now),
                format!("{:.1} ms", number(&e["took_us"]) as f64 / 1000.0),
                word(&e["client"]),
                command,
            ]
            .map(Cell::new),
        );
    }
    let limit = v["slower_than_us"].as_u64().map_or_else(
        || "none are kept".to_owned(),
        |us| format!("kept from {} ms on", us as f64 / 1000.0),
    );
    format!(
        "{}{} kept, {} seen since the start; {limit}\n",
        trimmed(&table),
        word(&v["kept"]),
        word(&v["seen"])
    )
}

/// `HOTKEYS`: the whole window before this one, or this one while there is none.
pub(super) fn hotkeys(v: &Value) -> String {
    let before = number(&v["before"]["sampled"]) > 0;
    let window = if before { &v["before"] } else { &v["now"] };
    let mut table = new_table(["KEY", "SHARE", "AT LEAST"]);
    let percent = |value: &Value| format!("{:.1} %", value.as_f64().unwrap_or_default() * 100.0);
    for k in list(&window["keys"]) {
        table.add_row([word(&k["key"]), percent(&k["share"]), percent(&k["share_at_least"])].map(Cell::new));
    }
    let which = if before {
        format!("the last whole window of {} s", word(&v["window_s"]))
    } else {
        format!("the last {} s", word(&v["now"]["age_s"]))
    };
    format!(
        "{}estimated from {} commands of {which}; one batch in {} is looked at\n",
        trimmed(&table),
        word(&window["sampled"]),
        word(&v["sampled_one_batch_in"])
    )
}

/// How far the first leg of a move is, in one line.
pub(super) fn progress(leg: &Value) -> String {
    let p = &leg["progress"];
    let mut text = format!(
        "slots {} from {} to {}: {}",
        word(&leg["slots"]),
        word(&leg["from"]),
        word(&leg["to"]),
        if p["state"].is_string() {
            word(&p["state"])
        } else {
            word(&leg["state"])
        }
    );
    if p.is_object() {
        text += &format!(
            ", {} of about {} keys, {}",
            number(&p["keys_copied"]),
            number(&p["keys_in_source"]),
            bytes(number(&p["bytes_copied"]))
        );
    }
    text
}

/// `MOVES`.
pub(super) fn moves(v: &Value) -> String {
    let legs = list(&v["legs"]);
    if legs.is_empty() {
        return "nothing is being moved\n".to_owned();
    }
    let mut out: String = legs
        .iter()
        .map(|leg| format!("job {}: {}\n", word(&leg["job"]), progress(leg)))
        .collect();
    if v["paused"].as_bool() == Some(true) {
        out += "paused: gse dba moves --resume goes on\n";
    }
    let (b, k) = (number(&v["bytes_per_s"]), number(&v["keys_per_s"]));
    if b > 0 {
        out += &format!("at most {} a second\n", bytes(b));
    }
    if k > 0 {
        out += &format!("at most {k} keys a second\n");
    }
    out
}

/// How far a migration is, in one line.
pub(super) fn migration_line(v: &Value) -> String {
    let p = &v["progress"];
    let mut text = word(&v["phase"]);
    if p.is_object() {
        text += &format!(
            ": {} of about {} keys copied ({}), {} compared",
            number(&p["keys_copied"]),
            number(&p["keys_expected"]),
            bytes(number(&p["bytes_copied"])),
            number(&p["keys_compared"])
        );
        if number(&p["mismatches"]) > 0 {
            text += &format!(", {} differed and are copied again", number(&p["mismatches"]));
        }
    }
    text
}

/// `MIGRATE STATUS`.
pub(super) fn migration(v: &Value) -> String {
    let mut rows = vec![
        ("served from", format!("{} ({})", word(&v["store"]), word(&v["mode"]))),
        ("durability", word(&v["durability"])),
    ];
    if v["to"].is_string() {
        rows.push(("from", word(&v["from"])));
        rows.push(("to", word(&v["to"])));
    }
    rows.push(("migration", migration_line(v)));
    if v["held_ms"].as_u64().is_some_and(|ms| ms > 0) {
        rows.push(("clients", format!("held for {} ms by the switch", word(&v["held_ms"]))));
    }
    if v["back_to"].is_string() {
        rows.push(("way back", word(&v["back_to"])));
    }
    if v["problem"].is_string() {
        rows.push(("problem", word(&v["problem"])));
    }
    rows.iter().map(|(name, text)| format!("{name:<12} {text}\n")).collect()
}

/// What became of a group's primary.
pub(super) fn primary(v: &Value) -> String {
    let mut out = format!("group {}: {} is the primary", word(&v["group"]), word(&v["primary"]));
    if v["changed"].as_bool() == Some(false) {
        out += ", as before";
    } else if v["from"].is_string() || v["was"].is_string() {
        let was = if v["from"].is_string() { &v["from"] } else { &v["was"] };
        out += &format!(", in place of {}", word(was));
    }
    if let Some(ms) = v["held_ms"].as_f64() {
        out += &format!("; commands waited for {ms:.0} ms");
    }
    out.push('\n');
    for note in list(&v["notes"]) {
        out += &format!("{}\n", word(note));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn spans_and_sizes_are_short() {
        assert_eq!(
            [span(59), span(61), span(7260), span(90_000)],
            ["59 s", "1 min 1 s", "2 h 1 min", "1 d 1 h"]
        );
        assert_eq!([bytes(7), bytes(1536), bytes(3 << 30)], ["7 B", "1.5 KiB", "3.0 GiB"]);
    }

    #[test]
    fn a_status_says_what_is_wrong_and_what_is_missing_does_not_break_it() {
        let v = json!({ "mode": "sharded", "copies": 3, "acknowledged": 2, "durability": "2 of 3: ...",
            "health": { "ok": false, "reason": "group 'g1' has no primary" },
            "groups": [{ "name": "g1", "slots": 16384, "primary": null, "state": "no-primary", "copies": 0, "needs": 1,
                "short": "group 'g1' has 0 of the 1 other copies that a write needs", "problems": ["bad\u{1b}[2J"],
                "followers": [{ "address": "a:1", "lag_s": 2, "behind_bytes": 2048 }] }] });
        let text = status(&v);
        for part in [
            "sharded, 1 group, a write is on 2 of 3",
            "NOT WELL: group 'g1' has no primary",
            "g1: has 0 of the 1 other copies",
            "a:1 by 2.0 KiB, heard 2 s ago",
            "g1: bad\\x1b[2J",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(!is_well(&v) && is_well(&json!({})));
        for show in [status, slots, clients, slowlog, hotkeys, moves, migration, primary] {
            assert!(!show(&json!({})).contains('\u{1b}'));
        }
    }

    #[test]
    fn moves_and_hot_keys_are_told() {
        let v = json!({ "paused": true, "bytes_per_s": 1048576, "keys_per_s": 0, "legs": [
            { "job": 4, "from": "g1", "to": "g2", "slots": "0-9", "state": "moving",
              "progress": { "state": "copying", "keys_copied": 5, "keys_in_source": 10, "bytes_copied": 100 } },
            { "job": 4, "from": "g3", "to": "g2", "slots": "20", "state": "waiting" } ] });
        assert_eq!(
            moves(&v),
            "job 4: slots 0-9 from g1 to g2: copying, 5 of about 10 keys, 100 B\njob 4: slots 20 from g3 to g2: waiting\npaused: gse dba moves --resume goes on\nat most 1.0 MiB a second\n"
        );
        let hot = json!({ "sampled_one_batch_in": 64, "window_s": 60, "before": { "sampled": 0, "keys": [] },
            "now": { "age_s": 7, "sampled": 9, "keys": [{ "key": "k", "share": 0.5, "share_at_least": 0.25 }] } });
        let text = hotkeys(&hot);
        assert!(
            text.contains("50.0 %") && text.contains("25.0 %") && text.contains("of the last 7 s"),
            "{text}"
        );
    }
}
