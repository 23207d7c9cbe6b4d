//! `micro`: instructions of single operations, counted by valgrind (callgrind): figures that do not depend on who else wants the cores.
//!
//! Each case is run by a process of its own, once with few and once with many repetitions; what lies between the two counts is that of
//! the operation, and what it takes to start a program is gone.

use std::hint::black_box;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use clap::{Args, ValueEnum};
use gse_core::store::Batch;
use gse_proto::frame::{DEFAULT_MAX_MESSAGE, Frame, HEADER_LEN, put_header};
use gse_proto::keys;
use gse_proto::session as s;
use gse_proto::state::StoredRow;
use gse_task::task::slice::encode_chunk;
use prost::Message;
use serde::Serialize;
use tokio::process::Command;

use crate::report::{self, ReportOptions, Section, whole};

const TASK: &str = "GSETASK:S:20261122233412:00000000000000FF";
/// Bytes of a script and of an output.
const SCRIPT: usize = 256;
const OUTPUT: usize = 64;
/// Commands of a pipeline.
const PIPELINE: u32 = 256;

/// Options of `micro`.
#[derive(Args)]
pub(crate) struct MicroArgs {
    /// Repetitions that are counted.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(10..))]
    times: u32,
    /// Only these.
    #[arg(long)]
    case: Vec<Case>,
    #[command(flatten)]
    report: ReportOptions,
}

/// Options of `micro-case`.
#[derive(Args)]
pub(crate) struct CaseArgs {
    case: Case,
    times: u32,
}

/// One operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Case {
    DispatchEncodeOwn,
    DispatchDecode,
    RowEncode,
    RowDecode,
    StoredEncode,
    StoredDecode,
    StoredRowEncode,
    ChunkEncode,
    RowCommands,
    RespParseRow,
    RespParsePipeline,
}

impl Case {
    fn what(self) -> &'static str {
        match self {
            Self::DispatchEncodeOwn => "frame codec: encode a Dispatch (own part; the shared one is copied)",
            Self::DispatchDecode => "frame codec: take and decode a Dispatch with a script of 256 bytes",
            Self::RowEncode => "frame codec: encode a Row with 64 bytes of output",
            Self::RowDecode => "frame codec: take and decode it",
            Self::StoredEncode => "frame codec: encode a Stored",
            Self::StoredDecode => "frame codec: take and decode it",
            Self::StoredRowEncode => "row store: the value of a terminal row",
            Self::ChunkEncode => "row store: a piece of output of 64 bytes",
            Self::RowCommands => "row store: row and output as commands of a batch, keys included",
            Self::RespParseRow => "RESP parser: the command of one row",
            Self::RespParsePipeline => "RESP parser: a command of a pipeline of 256, rows and outputs",
        }
    }

    /// Operations that one repetition consists of.
    fn operations(self) -> u32 {
        match self {
            Self::RespParsePipeline => PIPELINE,
            _ => 1,
        }
    }

    fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

#[derive(Serialize)]
struct Counted {
    case: Case,
    what: &'static str,
    instructions: f64,
}

#[derive(Serialize)]
struct Outcome {
    times: u32,
    /// Whether this program was built with optimisation: only such counts say anything.
    optimised: bool,
    counted: Vec<Counted>,
}

/// Runs it.
///
/// # Errors
/// When valgrind is not there or does not count.
pub(crate) async fn run(args: MicroArgs) -> Result<()> {
    let cases = if args.case.is_empty() {
        Case::value_variants().to_vec()
    } else {
        args.case.clone()
    };
    let mut counted = vec![];
    for case in cases {
        let few = instructions(case, args.times / 10).await?;
        let many = instructions(case, args.times).await?;
        let times = f64::from(args.times - args.times / 10) * f64::from(case.operations());
        counted.push(Counted {
            case,
            what: case.what(),
            instructions: (many as f64 - few as f64) / times,
        });
    }
    let outcome = Outcome {
        times: args.times,
        optimised: !cfg!(debug_assertions),
        counted,
    };
    let mut table = Section::new(
        format!("Instructions per operation, over {} of them", outcome.times),
        &["operation", "instructions"],
    );
    for counted in &outcome.counted {
        table.row(counted.what, [whole(counted.instructions)]);
    }
    report::print(&args.report, &outcome, &[table], &[])?;
    ensure!(
        outcome.counted.iter().all(|counted| counted.instructions > 0.0),
        "an operation without instructions"
    );
    Ok(())
}

/// Instructions of a whole process that does one thing so many times.
async fn instructions(case: Case, times: u32) -> Result<u64> {
    let mut command = Command::new("valgrind");
    command
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().context("path of this program")?)
        .args(["micro-case", &case.name(), &times.to_string()])
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let done = command
        .output()
        .await
        .context("cannot run valgrind (Debian: apt-get install --no-install-recommends valgrind)")?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "valgrind: {}: {said}", done.status);
    let line = said.lines().find_map(|line| line.split_once("Collected :"));
    let (_, count) = line.with_context(|| format!("valgrind has not counted: {said}"))?;
    count
        .trim()
        .parse()
        .with_context(|| format!("valgrind counted {count}"))
}

/// Does one thing so many times.
///
/// # Errors
/// When what was encoded does not decode.
pub(crate) fn case(args: &CaseArgs) -> Result<()> {
    let times = args.times;
    match args.case {
        Case::DispatchEncodeOwn => {
            let shared = shared().encode_to_vec();
            repeat(times, || {
                let own = own();
                let len = own.encoded_len() + shared.len();
                let mut out = BytesMut::with_capacity(HEADER_LEN + len);
                put_header(&mut out, Frame::DISPATCH, 0, len);
                own.encode_raw(&mut out);
                out.put_slice(&shared);
                out
            });
        }
        Case::DispatchDecode => {
            let whole = s::Dispatch {
                scripts: shared().scripts,
                atomic_tasks: shared().atomic_tasks,
                not_after_ms: shared().not_after_ms,
                output_limit: shared().output_limit,
                ..own()
            };
            decode(times, &whole.into())?;
        }
        Case::RowEncode => {
            let frame = Frame::from(row());
            repeat(times, || frame.to_bytes());
        }
        Case::RowDecode => decode(times, &row().into())?,
        Case::StoredEncode => {
            let frame = Frame::from(stored());
            repeat(times, || frame.to_bytes());
        }
        Case::StoredDecode => decode(times, &stored().into())?,
        Case::StoredRowEncode => {
            let row = stored_row();
            repeat(times, || row.encode_to_vec());
        }
        Case::ChunkEncode => {
            let text = vec![b'x'; OUTPUT];
            repeat(times, || encode_chunk(300, 0, 0, &text));
        }
        Case::RowCommands => {
            let (row, text) = (stored_row(), vec![b'x'; OUTPUT]);
            // As the writer does it: many rows, one batch.
            let mut batch = Batch::new();
            for index in 0..times {
                commands(&mut batch, index % 512, &row, &text);
                if batch.len() >= 1024 {
                    black_box(std::mem::take(&mut batch));
                }
            }
            black_box(batch);
        }
        Case::RespParseRow => {
            let wire = resp(1);
            for _ in 0..times {
                ensure!(gse_dba::micro::parse(black_box(&wire)) == 1, "not one command");
            }
        }
        Case::RespParsePipeline => {
            let wire = resp(PIPELINE);
            for _ in 0..times {
                let parsed = gse_dba::micro::parse(black_box(&wire));
                ensure!(parsed == PIPELINE as usize, "{parsed} commands of {PIPELINE}");
            }
        }
    }
    Ok(())
}

fn repeat<T>(times: u32, mut work: impl FnMut() -> T) {
    for _ in 0..times {
        black_box(work());
    }
}

fn decode(times: u32, frame: &Frame) -> Result<()> {
    let wire = frame.to_bytes();
    let mut buffer = BytesMut::with_capacity(wire.len());
    for _ in 0..times {
        buffer.extend_from_slice(&wire);
        let taken = Frame::take(&mut buffer, DEFAULT_MAX_MESSAGE)?;
        ensure!(black_box(&taken).as_ref() == Some(frame), "not what was encoded");
    }
    Ok(())
}

fn target(index: u32) -> s::TargetRef {
    s::TargetRef {
        task_id: TASK.into(),
        bucket: 3,
        index,
    }
}

fn own() -> s::Dispatch {
    s::Dispatch {
        target: Some(target(300)),
        epoch: Bytes::from_static(b"0123456789abcdef"),
        user: "root".into(),
        asked_id: "bench-000300".into(),
        ..Default::default()
    }
}

fn shared() -> s::Dispatch {
    s::Dispatch {
        not_after_ms: 1_700_000_000_000,
        output_limit: 5 << 20,
        scripts: vec![s::Script {
            name: "bk_gse_script_0123456789abcdef.sh".into(),
            store_dir: "/tmp/bkjob/root".into(),
            content: Bytes::from(vec![b'#'; SCRIPT]),
        }],
        atomic_tasks: vec![s::AtomicTask {
            id: 0,
            command: "/tmp/bkjob/root/bk_gse_script_0123456789abcdef.sh".into(),
            timeout_ms: 60_000,
            after: vec![],
        }],
        ..Default::default()
    }
}

fn row() -> s::Row {
    s::Row {
        target: Some(target(300)),
        status: s::RowStatus::Succeeded.into(),
        start_ms: 1_700_000_000_000,
        end_ms: 1_700_000_000_010,
        output_len: OUTPUT as u64,
        tail: Bytes::from(vec![b'x'; OUTPUT]),
        ..Default::default()
    }
}

fn stored() -> s::Stored {
    s::Stored {
        target: Some(target(300)),
        atomic: 0,
        offset: OUTPUT as u64,
        terminal: true,
    }
}

fn stored_row() -> StoredRow {
    StoredRow {
        status: 2,
        start_ms: 1_700_000_000_000,
        end_ms: 1_700_000_000_010,
        output_len: OUTPUT as u64,
        ..Default::default()
    }
}

/// What one row with output becomes.
fn commands(batch: &mut Batch, index: u32, row: &StoredRow, text: &[u8]) {
    let key = keys::task_output(TASK, 3);
    let member = encode_chunk(index, 0, 0, text);
    let mut cmd = redis::cmd("ZADD");
    cmd.arg(&key).arg(keys::output_score(index, 0, 0)).arg(&member[..]);
    batch.push(&key, cmd);
    let key = keys::task_rows(TASK, 3);
    let mut cmd = redis::cmd("HSETNX");
    cmd.arg(&key)
        .arg(keys::terminal_field(index, 0))
        .arg(row.encode_to_vec());
    batch.push(&key, cmd);
}

/// So many commands as they come over the wire.
fn resp(commands: u32) -> Vec<u8> {
    let mut wire = vec![];
    for n in 0..commands {
        let index = n / 2;
        let command = if n % 2 == 0 {
            let mut cmd = redis::cmd("HSETNX");
            cmd.arg(keys::task_rows(TASK, 3));
            cmd.arg(keys::terminal_field(index, 0))
                .arg(stored_row().encode_to_vec());
            cmd
        } else {
            let mut cmd = redis::cmd("ZADD");
            cmd.arg(keys::task_output(TASK, 3)).arg(keys::output_score(index, 0, 0));
            cmd.arg(&encode_chunk(index, 0, 0, &[b'x'; OUTPUT])[..]);
            cmd
        };
        wire.extend_from_slice(&command.get_packed_command());
    }
    wire
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_does_its_work() {
        for case_ in Case::value_variants() {
            let args = CaseArgs { case: *case_, times: 5 };
            case(&args).unwrap_or_else(|error| panic!("{}: {error:#}", case_.name()));
        }
    }
}
