//! `gse dba`: operates the store's front through its own command, `DBA`. What is to change is shown first, as a plan made from what gse_dba says of itself.

mod change;
mod link;
mod show;

use serde_json::Value;

use self::link::{Link, Trouble};
use crate::args::{DbaArgs, DbaCommand, DbaMovesArgs, DbaPlace, ListFormat};
use crate::out;
use crate::outcome::{EXIT_OK, EXIT_SOME_FAILED};

/// File in the data directory of `gse up` with the address of its gse_dba.
pub const URL_FILE: &str = "store/gse_dba.url";
/// Exit status when gse_dba does not answer.
const EXIT_UNREACHABLE: u8 = 3;

/// `gse dba`; gives the exit status.
///
/// # Errors
/// Wrong usage.
pub async fn run(args: &DbaArgs) -> anyhow::Result<u8> {
    let done = match &args.what {
        DbaCommand::Status(a) => status(&a.place).await,
        DbaCommand::Slots(a) => match &a.key {
            Some(key) => look(&a.place, &["SLOTS", "KEY", key], show::slots).await,
            None => look(&a.place, &["SLOTS"], show::slots).await,
        },
        DbaCommand::Clients(a) => look(&a.place, &["CLIENTS", &a.count.to_string()], show::clients).await,
        DbaCommand::Hotkeys(a) => look(&a.place, &["HOTKEYS", &a.count.to_string()], show::hotkeys).await,
        DbaCommand::Slowlog(a) if a.reset => look(&a.place, &["SLOWLOG", "RESET"], |_| String::new()).await,
        DbaCommand::Slowlog(a) => look(&a.place, &["SLOWLOG", "GET", &a.count.to_string()], show::slowlog).await,
        DbaCommand::Moves(a) => moves(a).await,
        DbaCommand::Move(a) => change::shift(a).await,
        DbaCommand::Add(a) => change::add(a).await,
        DbaCommand::Drain(a) => change::drain(a).await,
        DbaCommand::Abort(a) => change::abort(a).await,
        DbaCommand::Promote(a) => change::promote(a).await,
        DbaCommand::Accept(a) => change::accept(a).await,
        DbaCommand::Failover(a) => change::failover(a).await,
        DbaCommand::Migrate(a) => change::migrate(a).await,
    };
    match done {
        Ok(status) => Ok(status),
        Err(error) => match error.downcast_ref::<Trouble>() {
            Some(trouble) => {
                out::note(&format!("gse: {}", crate::text::one_line(&trouble.to_string())));
                Ok(match trouble {
                    Trouble::Refused(_) => EXIT_SOME_FAILED,
                    Trouble::Unreachable(_) => EXIT_UNREACHABLE,
                })
            }
            None => Err(error),
        },
    }
}

/// Prints an answer in the form asked for.
fn print(place: &DbaPlace, answer: &Value, text: impl FnOnce(&Value) -> String) -> anyhow::Result<()> {
    if place.json || place.output == ListFormat::Json {
        out::print_json(answer)
    } else {
        Ok(out::print(&text(answer))?)
    }
}

async fn look(place: &DbaPlace, words: &[&str], text: impl FnOnce(&Value) -> String) -> anyhow::Result<u8> {
    let answer = Link::open(place).await?.ask(words).await?;
    print(place, &answer, text)?;
    Ok(EXIT_OK)
}

async fn status(place: &DbaPlace) -> anyhow::Result<u8> {
    let mut link = Link::open(place).await?;
    let mut answer = link.ask(&["STATUS"]).await?;
    // A mode without groups has no moves, and says so.
    if answer["groups"].is_array()
        && answer["moves"].is_null()
        && let Ok(moves) = link.ask(&["MOVES"]).await
    {
        answer["moves"] = moves;
    }
    print(place, &answer, show::status)?;
    Ok(if show::is_well(&answer) {
        EXIT_OK
    } else {
        EXIT_SOME_FAILED
    })
}

async fn moves(a: &DbaMovesArgs) -> anyhow::Result<u8> {
    let mut link = Link::open(&a.place).await?;
    match a.rate.as_slice() {
        [bytes, keys] => {
            link.ask(&["RATE", &bytes.to_string(), &keys.to_string()]).await?;
        }
        _ if a.pause => {
            link.ask(&["PAUSE"]).await?;
        }
        _ if a.resume => {
            link.ask(&["RESUME"]).await?;
        }
        _ => {}
    }
    let answer = link.ask(&["MOVES"]).await?;
    print(&a.place, &answer, show::moves)?;
    Ok(EXIT_OK)
}
