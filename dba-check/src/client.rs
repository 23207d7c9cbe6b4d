//! One client: an operation becomes a command, and what comes back becomes an outcome.

use std::net::SocketAddr;
use std::time::Duration;

use redis::{Client as Opener, Cmd, Connection, ConnectionAddr, IntoConnectionInfo as _, RedisConnectionInfo, Value};

use crate::history::{Kind, Outcome, Reply};

/// Writes `ARGV[2]` if `ARGV[1]` is there ("" for nothing).
const SWAP: &str = "local v = redis.call('GET', KEYS[1]) or '' \
    if v ~= ARGV[1] then return 0 end \
    redis.call('SET', KEYS[1], ARGV[2]) return 1";

/// How a store is reached.
#[derive(Clone, Debug)]
pub struct Login {
    pub addr: SocketAddr,
    pub password: String,
    /// What is not answered by then is unknown.
    pub timeout: Duration,
}

/// A connection that is made again when it was lost.
pub struct Client {
    login: Login,
    conn: Option<Connection>,
    /// Errors that a client should never have been shown.
    pub strange: Vec<String>,
}

impl Client {
    #[must_use]
    pub fn new(login: Login) -> Self {
        Self {
            login,
            conn: None,
            strange: Vec::new(),
        }
    }

    fn connect(&self) -> redis::RedisResult<Connection> {
        let settings = RedisConnectionInfo::default()
            .set_password(&self.login.password)
            .set_skip_set_lib_name();
        let info = ConnectionAddr::Tcp(self.login.addr.ip().to_string(), self.login.addr.port())
            .into_connection_info()?
            .set_redis_settings(settings);
        let conn = Opener::open(info)?.get_connection_with_timeout(self.login.timeout.min(Duration::from_secs(2)))?;
        conn.set_read_timeout(Some(self.login.timeout))?;
        conn.set_write_timeout(Some(self.login.timeout))?;
        Ok(conn)
    }

    /// Sends a command; `Err` with what is known of its fate.
    ///
    /// # Errors
    /// `Failed` or `Unknown`.
    pub fn call(&mut self, command: &Cmd) -> Result<Value, Outcome> {
        let conn = match &mut self.conn {
            Some(conn) => conn,
            None => match self.connect() {
                Ok(conn) => self.conn.insert(conn),
                // Nothing was sent.
                Err(_) => return Err(Outcome::Failed),
            },
        };
        match command.query::<Value>(conn) {
            Ok(Value::ServerError(e)) => Err(self.judge(e.code(), e.details().unwrap_or_default())),
            Ok(value) => Ok(value),
            Err(e) => match e.code() {
                Some(code) => {
                    let (code, detail) = (code.to_owned(), e.detail().unwrap_or_default().to_owned());
                    Err(self.judge(&code, &detail))
                }
                None => {
                    self.conn = None;
                    Err(Outcome::Unknown)
                }
            },
        }
    }

    fn judge(&mut self, code: &str, detail: &str) -> Outcome {
        match code {
            // Both promise that nothing was changed.
            "NOREPLICAS" | "UNAVAILABLE" => Outcome::Failed,
            "UNCERTAIN" => Outcome::Unknown,
            _ => {
                self.strange.push(format!("{code} {detail}"));
                Outcome::Unknown
            }
        }
    }

    /// Runs an operation.
    pub fn perform(&mut self, key: &str, kind: &Kind) -> Outcome {
        let mut c = Cmd::new();
        match kind {
            Kind::Read | Kind::ReadCounter => c.arg("GET").arg(key),
            Kind::Write(v) => c.arg("SET").arg(key).arg(*v),
            Kind::Swap { from, to } => c
                .arg("EVAL")
                .arg(SWAP)
                .arg(1)
                .arg(key)
                .arg(from.map_or(String::new(), |v| v.to_string()))
                .arg(*to),
            Kind::Incr => c.arg("INCR").arg(key),
            Kind::Append(v) => c.arg("RPUSH").arg(key).arg(*v),
            Kind::ReadList => c.arg("LRANGE").arg(key).arg(0).arg(-1),
            Kind::Add(v) => c.arg("SADD").arg(key).arg(*v),
            Kind::Members => c.arg("SMEMBERS").arg(key),
            Kind::Push(v) => c.arg("LPUSH").arg(key).arg(*v),
            Kind::Pop => c.arg("RPOP").arg(key),
        };
        let value = match self.call(&c) {
            Ok(value) => value,
            Err(outcome) => return outcome,
        };
        match reply(kind, &value) {
            Some(reply) => Outcome::Ok(reply),
            None => {
                self.strange.push(format!("{kind:?} of {key} answered {value:?}"));
                Outcome::Unknown
            }
        }
    }
}

fn number(v: &Value) -> Option<i64> {
    match v {
        Value::Int(n) => Some(*n),
        Value::BulkString(b) => std::str::from_utf8(b).ok()?.parse().ok(),
        _ => None,
    }
}

fn reply(kind: &Kind, value: &Value) -> Option<Reply> {
    Some(match (kind, value) {
        (Kind::Read | Kind::ReadCounter | Kind::Pop, Value::Nil) => Reply::Value(None),
        (Kind::Read | Kind::ReadCounter | Kind::Pop, v) => Reply::Value(Some(number(v)?)),
        (Kind::Write(_), Value::Okay) => Reply::Done,
        (Kind::Swap { .. }, Value::Int(n)) => Reply::Swapped(*n == 1),
        (Kind::Incr | Kind::Append(_) | Kind::Add(_) | Kind::Push(_), Value::Int(n)) => Reply::Number(*n),
        (Kind::ReadList | Kind::Members, Value::Array(v) | Value::Set(v)) => {
            Reply::Many(v.iter().map(number).collect::<Option<_>>()?)
        }
        _ => return None,
    })
}
