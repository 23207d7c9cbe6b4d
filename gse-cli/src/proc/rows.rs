//! What the rows of process operations mean, and what they add up to. Pure; asking and printing are left to [`super`].

use comfy_table::{Cell, CellAlignment, Table};
use gse_proto::codes::Inner;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Operation;
use crate::outcome::{EXIT_OK, EXIT_SOME_FAILED, EXIT_TIMEOUT};
use crate::route::new_table;
use crate::text::one_line;

const ALREADY_RUNNING: i64 = 828;
const NOT_RUNNING: i64 = 829;
const ALREADY_REGISTERED: i64 = 850;
const RUNNING: i64 = Inner::Running.code() as i64;

/// An entry of an answer.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Answer {
    /// 0, 115 while it is not over, or why not.
    pub error_code: i64,
    /// For people.
    #[serde(default)]
    pub error_msg: String,
    /// JSON as text.
    #[serde(default)]
    pub content: String,
}

/// A process on a host, as it says itself.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Instance {
    /// -1: does not run.
    pub pid: i64,
    /// Whether it is kept alive.
    #[serde(rename = "isAuto")]
    pub is_auto: bool,
    /// As its command prints it.
    pub version: String,
    /// As its command prints it.
    pub health: String,
    /// Per cent of the host.
    #[serde(rename = "cpuUsage")]
    pub cpu: f64,
    /// Per cent of the host.
    #[serde(rename = "phyMemUsage")]
    pub mem: f64,
    /// Seconds since it was started.
    #[serde(rename = "elapsedTime")]
    pub elapsed_s: i64,
}

/// One process on one host, and what has become of what was asked for.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    agent: String,
    namespace: String,
    name: String,
    error_code: i64,
    error_msg: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<Instance>,
}

impl Row {
    /// Nothing is known yet.
    #[must_use]
    pub fn new(agent: &str, namespace: &str, name: &str) -> Self {
        Self {
            agent: agent.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            error_code: RUNNING,
            error_msg: String::new(),
            process: None,
        }
    }

    /// Its key in answers (contract procmgr-agent-lifecycle#3).
    #[must_use]
    pub fn key(&self) -> String {
        format!("{}:{}:{}", self.agent, self.namespace, self.name)
    }

    /// Whether it will not change any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.error_code != RUNNING
    }

    /// Nobody was asked.
    pub fn refuse(&mut self, why: &str) {
        self.error_code = Inner::Unknown.code().into();
        why.clone_into(&mut self.error_msg);
    }

    /// Takes what the servers say.
    pub fn take(&mut self, answer: &Answer, operation: Operation) {
        self.error_code = answer.error_code;
        self.error_msg.clone_from(&answer.error_msg);
        if operation == Operation::Status && answer.error_code != RUNNING {
            self.process = instance(&answer.content);
        }
    }

    /// Whether it is as was asked for. What was so before is as good.
    #[must_use]
    pub fn is_fine(&self, operation: Operation) -> bool {
        match (self.error_code, operation) {
            (0, Operation::Status) => self.process.as_ref().is_some_and(|process| process.pid > 0),
            (0, _) => true,
            (ALREADY_RUNNING, Operation::Start)
            | (NOT_RUNNING, Operation::Stop | Operation::Kill)
            | (ALREADY_REGISTERED, Operation::Register) => true,
            _ => false,
        }
    }

    /// How it went, in a few words.
    #[must_use]
    pub fn result(&self, operation: Operation) -> String {
        let done = match operation {
            Operation::Start => "started",
            Operation::Stop => "stopped",
            Operation::Status => match &self.process {
                Some(process) if process.pid > 0 => "running",
                Some(_) => "not running",
                None => "unknown",
            },
            Operation::Register => "registered",
            Operation::Unregister => "unregistered",
            Operation::Restart => "restarted",
            Operation::Reload => "reloaded",
            Operation::Kill => "killed",
        };
        match self.error_code {
            0 => done.to_owned(),
            RUNNING => "not over".to_owned(),
            ALREADY_RUNNING if self.is_fine(operation) => "ran already".to_owned(),
            NOT_RUNNING if self.is_fine(operation) => "did not run".to_owned(),
            ALREADY_REGISTERED if self.is_fine(operation) => "was registered already".to_owned(),
            _ => "failed".to_owned(),
        }
    }

    /// Why it went wrong, if it did.
    #[must_use]
    pub fn remark(&self, operation: Operation) -> String {
        if self.error_code == 0 || !self.is_over() || self.is_fine(operation) {
            return String::new();
        }
        if self.error_msg.is_empty() {
            let known = Inner::ALL
                .iter()
                .find(|inner| i64::from(inner.code()) == self.error_code);
            let text = known.map_or("no message", |inner| inner.text());
            return format!("error {}: {text}", self.error_code);
        }
        format!("error {}: {}", self.error_code, one_line(&self.error_msg))
    }
}

/// The process in the content of a status entry.
fn instance(content: &str) -> Option<Instance> {
    let content: Value = serde_json::from_str(content).ok()?;
    serde_json::from_value(content.pointer("/process/0/instance/0")?.clone()).ok()
}

/// What rows add up to: 0 all is as was asked for, 124 some are not over and none has failed, 1 otherwise.
#[must_use]
pub fn exit_status(rows: &[&Row], operation: Operation) -> u8 {
    let mut late = false;
    for row in rows {
        if !row.is_over() {
            late = true;
        } else if !row.is_fine(operation) {
            return EXIT_SOME_FAILED;
        }
    }
    if late { EXIT_TIMEOUT } else { EXIT_OK }
}

/// What `--output json` prints.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    task_ids: Vec<&'a str>,
    exit_status: u8,
    rows: &'a [&'a Row],
}

impl<'a> Report<'a> {
    /// Of all rows.
    #[must_use]
    pub fn new(task_ids: Vec<&'a str>, exit_status: u8, rows: &'a [&'a Row]) -> Self {
        Self {
            task_ids,
            exit_status,
            rows,
        }
    }
}

/// The rows for people.
#[must_use]
pub fn table(rows: &[&Row], operation: Operation) -> Table {
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    if operation != Operation::Status {
        let mut table = new_table(["AGENT", "NAMESPACE", "NAME", "RESULT", "REMARK"]);
        for row in rows {
            table.add_row([
                Cell::new(one_line(&row.agent)),
                Cell::new(one_line(&row.namespace)),
                Cell::new(one_line(&row.name)),
                Cell::new(row.result(operation)),
                Cell::new(row.remark(operation)),
            ]);
        }
        return table;
    }
    let mut table = new_table([
        "AGENT",
        "NAMESPACE",
        "NAME",
        "STATE",
        "KEPT",
        "PID",
        "CPU%",
        "MEM%",
        "VERSION",
        "FOR",
        "REMARK",
    ]);
    for row in rows {
        let process = row.process.clone().unwrap_or_default();
        let runs = process.pid > 0;
        let if_runs = |text: String| if runs { text } else { String::new() };
        let remark = match row.remark(operation) {
            none if none.is_empty() => one_line(&process.health),
            remark => remark,
        };
        table.add_row([
            Cell::new(one_line(&row.agent)),
            Cell::new(one_line(&row.namespace)),
            Cell::new(one_line(&row.name)),
            Cell::new(row.result(operation)),
            Cell::new(if process.is_auto { "yes" } else { "no" }),
            right(if_runs(process.pid.to_string())),
            right(if_runs(format!("{:.1}", process.cpu))),
            right(if_runs(format!("{:.1}", process.mem))),
            Cell::new(one_line(&process.version)),
            right(if_runs(crate::xfer::board::time(
                u64::try_from(process.elapsed_s).unwrap_or_default(),
            ))),
            Cell::new(remark),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(code: i64, message: &str, content: &str, operation: Operation) -> Row {
        let mut row = Row::new("0:10.0.0.1", "gse", "web");
        let answer = Answer {
            error_code: code,
            error_msg: message.into(),
            content: content.into(),
        };
        row.take(&answer, operation);
        row
    }

    fn status(pid: i64) -> String {
        let instance =
            json!({"pid": pid, "isAuto": true, "version": "1.2\u{1b}[2J", "cpuUsage": 1.25, "elapsedTime": 61});
        json!({"process": [{"procname": "web", "instance": [instance]}]}).to_string()
    }

    #[test]
    fn what_was_so_before_is_as_good() {
        // contract: procmgr-agent-lifecycle#14
        for (code, operation, fine, words) in [
            (0, Operation::Start, true, "started"),
            (828, Operation::Start, true, "ran already"),
            (828, Operation::Restart, false, "failed"),
            (829, Operation::Stop, true, "did not run"),
            (829, Operation::Kill, true, "did not run"),
            (829, Operation::Start, false, "failed"),
            (850, Operation::Register, true, "was registered already"),
            (836, Operation::Start, false, "failed"),
            (117, Operation::Unregister, false, "failed"),
        ] {
            let row = row(code, "", "", operation);
            assert_eq!(
                (row.is_fine(operation), row.result(operation).as_str()),
                (fine, words),
                "{code} {operation:?}"
            );
            assert_eq!(row.remark(operation).is_empty(), fine);
        }
    }

    #[test]
    fn a_status_is_fine_only_when_the_process_runs() {
        // contract: procmgr-agent-lifecycle#10
        for (content, fine, words) in [
            (status(4711), true, "running"),
            (status(-1), false, "not running"),
            (String::new(), false, "unknown"),
            ("[]".to_owned(), false, "unknown"),
        ] {
            let row = row(0, "", &content, Operation::Status);
            let got = (row.is_fine(Operation::Status), row.result(Operation::Status));
            assert_eq!(got, (fine, words.to_owned()), "{content}");
        }
    }

    #[test]
    fn what_rows_add_up_to() {
        let fine = row(0, "", "", Operation::Stop);
        let late = row(115, "handling", "", Operation::Stop);
        let wrong = row(65535, "no\nsuch\u{1b} file", "", Operation::Stop);
        assert_eq!(exit_status(&[&fine], Operation::Stop), 0);
        assert_eq!(exit_status(&[&fine, &late], Operation::Stop), 124);
        assert_eq!(exit_status(&[&late, &wrong], Operation::Stop), 1);
        assert_eq!(wrong.remark(Operation::Stop), "error 65535: no; such\\x1b file");
    }

    #[test]
    fn hosts_cannot_speak_to_the_terminal() {
        let row = row(0, "", &status(7), Operation::Status);
        let text = table(&[&row], Operation::Status).to_string();
        assert!(!text.contains('\u{1b}') && text.contains("1 min 1 s"), "{text}");
        let report = serde_json::to_value(Report::new(vec!["t"], 0, &[&row])).unwrap();
        assert_eq!(report["rows"][0]["process"]["pid"], 7);
        assert_eq!(report["rows"][0]["agent"], "0:10.0.0.1");
    }
}
