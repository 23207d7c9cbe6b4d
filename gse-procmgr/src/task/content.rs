//! Rows as clients decode them: content of the right shape whatever has happened (contract procmgr-agent-lifecycle#10 to #13).

use gse_proto::http::{ProcContent, ProcContentReply, ProcInstance, ProcStatusContent, ProcValue};
use gse_proto::proc::{OpType, Outcome, Process, Spec, Status, code};
use gse_proto::procstore::StoredResult;
use serde::Serialize;

use super::layout::Subject;

/// What a row is made from, beside what the agent says.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// What it is about.
    pub subject: Subject<'a>,
    /// The spec that was sent.
    pub spec: Option<&'a Spec>,
    /// Address of the host; empty when it is not known.
    pub ip: &'a str,
}

impl Frame<'_> {
    fn is_status(&self) -> bool {
        self.subject.group.op_type == OpType::Status as i32
    }

    /// A row that no agent has answered.
    #[must_use]
    pub fn failed(&self, code: i32, message: &str) -> StoredResult {
        let content = if self.is_status() {
            self.status(&Status::default(), &Process::default())
        } else {
            self.control(message, &Process::default())
        };
        StoredResult {
            code,
            message: message.to_owned(),
            content,
        }
    }

    /// A row from what an agent says.
    #[must_use]
    pub fn over(&self, outcome: &Outcome) -> StoredResult {
        let unknown = Process::default();
        let process = outcome.process.as_ref().unwrap_or(&unknown);
        let message = if outcome.message.is_empty() && outcome.code == code::OK {
            "success"
        } else {
            &outcome.message
        };
        let content = if self.is_status() {
            match &outcome.status {
                Some(status) => self.status(status, process),
                None => self.status(&Status::default(), process),
            }
        } else {
            let result = match outcome.code {
                code::OK => "success",
                _ if outcome.output.is_empty() => message,
                _ => &outcome.output,
            };
            self.control(result, process)
        };
        StoredResult {
            // What is finished never looks as if it were not.
            code: if outcome.code == code::RUNNING {
                code::COMMAND_FAILED
            } else {
                outcome.code
            },
            message: message.to_owned(),
            content,
        }
    }

    // contract: procmgr-agent-lifecycle#13
    fn control(&self, result: &str, process: &Process) -> String {
        let said = |told: &str, sent: fn(&Spec) -> &str| {
            if told.is_empty() {
                self.spec.map(sent).unwrap_or_default().to_owned()
            } else {
                told.to_owned()
            }
        };
        text(&ProcContent {
            value: vec![ProcValue {
                procName: said(&process.proc_name, |spec| &spec.proc_name),
                setupPath: said(&process.setup_path, |spec| &spec.setup_path),
                result: result.to_owned(),
                isAuto: process.hosted,
                bk_agent_id: self.subject.id.to_owned(),
                ..ProcValue::default()
            }],
        })
    }

    // contract: procmgr-agent-lifecycle#10, procmgr-agent-lifecycle#11, procmgr-agent-lifecycle#12
    fn status(&self, status: &Status, process: &Process) -> String {
        let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let version = if status.version.is_empty() {
            &process.version
        } else {
            &status.version
        };
        let runs = status.pid > 0;
        text(&ProcStatusContent {
            ip: self.ip.to_owned(),
            bk_agent_id: self.subject.id.to_owned(),
            utctime: status.local_time.clone(),
            utctime2: status.utc_time.clone(),
            timezone: status.timezone,
            process: vec![ProcContentReply {
                procname: match self.spec {
                    _ if !process.proc_name.is_empty() => process.proc_name.clone(),
                    Some(spec) if !spec.proc_name.is_empty() => spec.proc_name.clone(),
                    _ => self.subject.group.name.clone(),
                },
                instance: vec![ProcInstance {
                    cmdline: status.cmdline.clone(),
                    processName: self.subject.group.name.clone(),
                    version: clean_version(version),
                    health: status.health.clone(),
                    isAuto: process.hosted,
                    cpuUsage: finite(status.cpu_usage),
                    cpuUsageAve: finite(status.cpu_usage_average),
                    phyMemUsage: finite(status.mem_usage),
                    usePhyMem: whole(status.mem_bytes),
                    diskSize: whole(status.disk_bytes),
                    pid: if runs { status.pid } else { -1 },
                    startTime: status.start_time.clone(),
                    stat: status.stat.clone(),
                    utime: status.utime.clone(),
                    stime: status.stime.clone(),
                    threadCount: i64::from(status.threads),
                    elapsedTime: whole(status.elapsed_secs),
                    register_time: whole(process.register_time),
                    last_start_time: whole(process.last_start_time),
                    report_time: whole(process.report_time),
                }],
            }],
        })
    }
}

/// JSON has no other numbers.
pub(crate) fn finite(number: f64) -> f64 {
    if number.is_finite() { number } else { 0.0 }
}

/// A version as clients keep it: letters, digits, dots and dashes, or nothing (contract procmgr-agent-lifecycle#32).
#[must_use]
pub fn clean_version(version: &str) -> String {
    let dense: String = version.chars().filter(|c| !c.is_whitespace()).collect();
    if dense
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-'))
    {
        return dense;
    }
    // "x version v1.2.3 (abc)": the part that looks like one.
    let parts = version.split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '-')));
    parts
        .filter(|part| part.contains('.') && part.bytes().any(|b| b.is_ascii_digit()))
        .max_by_key(|part| part.len())
        .unwrap_or_default()
        .to_owned()
}

fn text<T: Serialize>(value: &T) -> String {
    // Plain texts and numbers can always be written.
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use gse_proto::procstore::ProcGroup;
    use serde_json::Value;

    fn group(op_type: i32) -> ProcGroup {
        ProcGroup {
            namespace: "n".into(),
            name: "p_1".into(),
            op_type,
            ..ProcGroup::default()
        }
    }

    fn content(result: &StoredResult) -> Value {
        serde_json::from_str(&result.content).unwrap()
    }

    #[test]
    fn status_has_one_process_with_one_instance_whatever_happens() {
        // contract: procmgr-agent-lifecycle#10, procmgr-agent-lifecycle#11, procmgr-agent-lifecycle#12
        let group = group(2);
        let frame = Frame {
            subject: Subject {
                group: &group,
                id: "0:10.0.0.1",
            },
            spec: None,
            ip: "10.0.0.1",
        };
        for row in [
            frame.failed(117, "away"),
            frame.over(&Outcome::default()),
            frame.over(&Outcome {
                status: Some(Status {
                    pid: 77,
                    cpu_usage: 1.0,
                    ..Status::default()
                }),
                ..Outcome::default()
            }),
        ] {
            let content = content(&row);
            assert_eq!(content["process"].as_array().unwrap().len(), 1);
            let instances = content["process"][0]["instance"].as_array().unwrap();
            assert_eq!(instances.len(), 1);
            let instance = &instances[0];
            assert_eq!(instance["processName"], "p_1");
            for key in ["startTime", "utime", "stime", "cmdline", "version", "health", "stat"] {
                assert!(instance[key].is_string(), "{key}");
            }
            for key in [
                "pid",
                "usePhyMem",
                "diskSize",
                "threadCount",
                "elapsedTime",
                "register_time",
                "last_start_time",
                "report_time",
            ] {
                assert!(instance[key].is_i64(), "{key}");
            }
            for key in ["cpuUsage", "cpuUsageAve", "phyMemUsage"] {
                assert!(instance[key].is_number(), "{key}");
            }
            assert!(instance["isAuto"].is_boolean());
            assert!(instance["pid"] == -1 || instance["pid"] == 77);
            assert!(content["timezone"].is_i64());
        }
    }

    #[test]
    fn control_has_one_value_on_errors_too() {
        // contract: procmgr-agent-lifecycle#6, procmgr-agent-lifecycle#13
        let group = group(0);
        let frame = Frame {
            subject: Subject { group: &group, id: "a" },
            spec: None,
            ip: "",
        };
        let failed = Outcome {
            code: 65_535,
            message: "exit 3".into(),
            output: "boom".into(),
            ..Outcome::default()
        };
        for (row, result) in [
            (frame.failed(117, "away"), "away"),
            (frame.over(&Outcome::default()), "success"),
            (frame.over(&failed), "boom"),
        ] {
            let content = content(&row);
            assert_eq!(content["value"].as_array().unwrap().len(), 1);
            assert_eq!(content["value"][0]["result"], result);
            assert_eq!(content["value"][0]["bk_agent_id"], "a");
            assert!(content["value"][0]["isAuto"].is_boolean());
        }
        let odd = Outcome {
            code: 115,
            ..Outcome::default()
        };
        assert_ne!(frame.over(&odd).code, 115);
    }

    #[test]
    fn versions_that_clients_keep() {
        // contract: procmgr-agent-lifecycle#32
        for (version, clean) in [
            (" 1.2.3\n", "1.2.3"),
            ("v2.0.1-rc1", "v2.0.1-rc1"),
            ("bkmonitorbeat version 3.67.2 (libbeat 7.1.1), built 2026", "3.67.2"),
            ("no idea!", ""),
            ("", ""),
        ] {
            assert_eq!(clean_version(version), clean, "{version:?}");
        }
    }
}
