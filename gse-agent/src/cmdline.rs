//! `gsecmdline`: hands one record to the agent of this host from a script (contract data-plane, 1.7), and the function behind it for other
//! programs.
//!
//! The record is followed by a question who the agent is on the same connection, and what is asked later is answered later: the exit status
//! 0 means that the agent has read the record, whatever then becomes of it.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use bytes::{BufMut, BytesMut};
use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command, value_parser};
use gse_core::process::{EXIT_FAILED, EXIT_USAGE};
use gse_proto::datalink::MAX_PAYLOAD;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::data::socket::{COMPILED_IN, HEADER, kind};

/// What the program is called when it is only this.
pub const NAME: &str = "gsecmdline";
/// The word that makes the agent's own program this.
pub const WORD: &str = "cmdline";

/// Where an agent may be found, in this order.
const PLACES: [&str; 4] = [
    "/var/run/ipc.state.report",
    "/usr/local/gse/agent/data/ipc.state.report",
    COMPILED_IN,
    "/var/lib/gse-agent/ipc.state.report",
];
/// So long the agent has for each step.
const PATIENCE: Duration = Duration::from_secs(5);
/// No answer of an agent is longer.
const LONGEST_ANSWER: usize = 64 << 10;

/// What an agent says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct AgentInfo {
    /// Supplier.
    pub bizid: i64,
    /// The area its host is in.
    pub cloudid: i64,
    /// The host's address.
    pub ip: String,
    /// Its id.
    pub bk_agent_id: String,
}

/// A connection with the agent of this host. Blocking.
#[derive(Debug)]
pub struct Sender {
    stream: UnixStream,
}

impl Sender {
    /// Connects to the agent's data socket.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path) -> anyhow::Result<Self> {
        let stream =
            UnixStream::connect(path).with_context(|| format!("no agent can be reached at {}", path.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { stream })
    }

    /// Asks the agent who it is. When it answers it has read everything that was sent before.
    ///
    /// # Errors
    /// When it does not answer in time, or with something else.
    pub fn ask(&mut self) -> anyhow::Result<AgentInfo> {
        self.write(&header(kind::GET_CONF, 0, 0, 0))?;
        let mut head = [0_u8; 8];
        self.read(&mut head)?;
        let length = u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize;
        if head[..4] != kind::GET_CONF.to_be_bytes() || length > LONGEST_ANSWER {
            bail!("what answers is no agent");
        }
        let mut body = vec![0; length];
        self.read(&mut body)?;
        serde_json::from_slice(&body).context("the agent's answer does not decode")
    }

    /// Hands one record over.
    ///
    /// # Errors
    /// When it is too long, or the agent does not take it.
    pub fn send(&mut self, data_id: u32, payload: &[u8]) -> anyhow::Result<()> {
        if payload.len() > MAX_PAYLOAD {
            bail!(
                "a record of {} bytes; no more than {MAX_PAYLOAD} are carried",
                payload.len()
            );
        }
        if data_id == 0 || i32::try_from(data_id).is_err() {
            bail!("{data_id} is no data id; they are 1 to {}", i32::MAX);
        }
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .context("the host's clock stands before 1970; set it")?;
        let mut frame = header(kind::COMMON, data_id, now.as_secs() as u32, payload.len() as u32);
        frame.put_slice(payload);
        self.write(&frame)
    }

    fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.stream
            .write_all(bytes)
            .map_err(late)
            .context("the agent does not take it")
    }

    fn read(&mut self, bytes: &mut [u8]) -> anyhow::Result<()> {
        self.stream
            .read_exact(bytes)
            .map_err(late)
            .context("the agent does not answer")
    }
}

/// The system's word for a time that is up means something else to people.
fn late(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::Error::new(io::ErrorKind::TimedOut, format!("not within {PATIENCE:?}")),
        _ => error,
    }
}

fn header(kind: u32, data_id: u32, utctime: u32, length: u32) -> BytesMut {
    let mut frame = BytesMut::with_capacity(HEADER + length as usize);
    for number in [kind, data_id, utctime, length, 0, 0] {
        frame.put_u32(number);
    }
    frame
}

/// Hands one record to the agent at `path` and waits until it has read it. Blocking, for ten seconds at most.
///
/// # Errors
/// When the agent can't be reached or does not take it.
pub fn send(path: &Path, data_id: u32, payload: &[u8]) -> anyhow::Result<AgentInfo> {
    let mut sender = Sender::connect(path)?;
    sender.send(data_id, payload)?;
    sender.ask()
}

fn command() -> Command {
    let text = |name: &'static str, short: char, help: &'static str| {
        Arg::new(name)
            .short(short)
            .value_name("TEXT")
            .value_parser(value_parser!(OsString))
            .allow_hyphen_values(true)
            .help(help)
    };
    Command::new(NAME)
        .version(env!("CARGO_PKG_VERSION"))
        .about("Hands one record to the agent of this host. Exit status 0: the agent has read it")
        .arg(
            Arg::new("data-id")
                .short('d')
                .value_name("ID")
                .required(true)
                .value_parser(value_parser!(u32).range(1..=i64::from(i32::MAX)))
                .help("Data id that the record is routed by"),
        )
        .arg(text("line", 'l', "A line of text, wrapped as a custom event"))
        .arg(
            text(
                "json",
                'J',
                "A JSON object; address and time of the host are added to it",
            )
            .value_name("JSON"),
        )
        .arg(text("string", 's', "Sent as it is"))
        .group(ArgGroup::new("what").args(["line", "json", "string"]).required(true))
        .arg(
            Arg::new("socket")
                .short('S')
                .value_name("PATH")
                .value_parser(value_parser!(PathBuf))
                .help("The agent's data socket; the usual places are tried without it"),
        )
        .arg(
            Arg::new("debug")
                .short('D')
                .action(ArgAction::SetTrue)
                .help("Say what is done"),
        )
}

/// The whole program; `args` begin with its name.
#[must_use]
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let matches = match command().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) => {
            // Nobody is left to tell when the terminal is gone.
            let _ = error.print();
            return if error.use_stderr() {
                EXIT_USAGE.into()
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match run(&matches) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{NAME}: {error:#}");
            EXIT_FAILED.into()
        }
    }
}

fn run(matches: &ArgMatches) -> anyhow::Result<()> {
    let debug = matches.get_flag("debug");
    let say = |text: String| {
        if debug {
            let _ = writeln!(io::stderr(), "{NAME}: {text}");
        }
    };
    let data_id = matches.get_one::<u32>("data-id").copied().unwrap_or_default();
    let bytes = |name: &str| matches.get_one::<OsString>(name).map(|text| text.clone().into_vec());
    let mut sender = match matches.get_one::<PathBuf>("socket") {
        Some(path) => Sender::connect(path)?,
        None => anywhere(&say)?,
    };
    let payload = if let Some(raw) = bytes("string") {
        raw
    } else {
        let agent = sender.ask()?;
        say(format!("the agent is {} at {}", agent.bk_agent_id, agent.ip));
        let made = match (bytes("line"), bytes("json")) {
            (Some(line), _) => event(&agent, &String::from_utf8_lossy(&line)),
            (None, Some(text)) => merged(&agent, &text)?,
            (None, None) => bail!("nothing to send"),
        };
        serde_json::to_vec(&made)?
    };
    say(format!(
        "{} bytes on data id {data_id}: {}",
        payload.len(),
        String::from_utf8_lossy(&payload)
    ));
    sender.send(data_id, &payload)?;
    sender.ask()?;
    say("the agent has it".to_owned());
    Ok(())
}

/// The first of the usual places where an agent listens.
fn anywhere(say: &impl Fn(String)) -> anyhow::Result<Sender> {
    for place in PLACES {
        match Sender::connect(Path::new(place)) {
            Ok(sender) => {
                say(format!("connected to {place}"));
                return Ok(sender);
            }
            Err(error) => say(format!("{error:#}")),
        }
    }
    bail!(
        "no agent listens at any of {}; name its socket with -S",
        PLACES.join(", ")
    )
}

/// Local time and UTC, as events carry them.
fn times() -> (String, String) {
    let now = jiff::Timestamp::now();
    let layout = "%Y-%m-%d %H:%M:%S";
    let local = now.to_zoned(jiff::tz::TimeZone::system()).strftime(layout).to_string();
    (local, now.strftime(layout).to_string())
}

/// A custom event with one line (contract data-plane, 5.3).
fn event(agent: &AgentInfo, line: &str) -> Value {
    let (local, utc) = times();
    json!({
        "_bizid_": agent.bizid, "_cloudid_": agent.cloudid, "_server_": agent.ip,
        "_time_": local, "_utctime_": utc, "_value_": [line],
    })
}

/// An object with the host and the time added.
fn merged(agent: &AgentInfo, text: &[u8]) -> anyhow::Result<Value> {
    let mut object: Map<String, Value> = serde_json::from_slice(text).context("-J takes a JSON object")?;
    let (local, utc) = times();
    for (key, value) in [
        ("_company_id_", json!(agent.bizid)),
        ("_plat_id_", json!(agent.cloudid)),
        ("_server_", json!(agent.ip)),
        ("_time_", json!(local)),
        ("_utctime_", json!(utc)),
    ] {
        object.insert(key.to_owned(), value);
    }
    Ok(Value::Object(object))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shapes_that_scripts_use() {
        for (line, good) in [
            ("gsecmdline -d 1430 -s test", true),
            ("gsecmdline -d1430 -l -text", true),
            ("gsecmdline -D -d 1100000 -J {} -S /tmp/ipc", true),
            ("gsecmdline -s test", false),
            ("gsecmdline -d 0 -s test", false),
            ("gsecmdline -d 1430", false),
            ("gsecmdline -d 1430 -s a -l b", false),
        ] {
            let parsed = command().try_get_matches_from(line.split(' '));
            assert_eq!(parsed.is_ok(), good, "{line}: {parsed:?}");
        }
    }

    #[test]
    fn records_are_made_as_documented() {
        let agent = AgentInfo {
            bizid: 0,
            cloudid: 2,
            ip: "10.0.0.1".to_owned(),
            bk_agent_id: String::new(),
        };
        let made = event(&agent, "text");
        assert_eq!((&made["_cloudid_"], &made["_server_"]), (&json!(2), &json!("10.0.0.1")));
        assert_eq!(made["_value_"], json!(["text"]));
        assert_eq!(made["_utctime_"].as_str().unwrap().len(), 19);
        let made = merged(&agent, b"{\"a\": 1}").unwrap();
        assert_eq!(
            (&made["a"], &made["_plat_id_"], &made["_company_id_"]),
            (&json!(1), &json!(2), &json!(0))
        );
        assert!(merged(&agent, b"[]").is_err());
    }
}
