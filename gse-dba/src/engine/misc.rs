//! Commands of the embedded store that touch no key.

use super::db::{Exec, Outcome, int};
use crate::args::Args;
use crate::resp::write::Writer;

pub(crate) fn ping(_: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    match a.len() {
        1 => w.simple("PONG"),
        2 => w.bulk(a.at(1)),
        _ => return Err("ERR wrong number of arguments for 'ping' command".into()),
    }
    Ok(())
}

pub(crate) fn echo(_: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    w.bulk(a.at(1));
    Ok(())
}

pub(crate) fn time(_: &mut Exec<'_>, _: Args<'_>, w: &mut Writer) -> Outcome {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    w.array(2);
    w.bulk(now.as_secs().to_string().as_bytes());
    w.bulk(now.subsec_micros().to_string().as_bytes());
    Ok(())
}

/// There are no replicas to wait for.
pub(crate) fn wait(_: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    int(a.at(1))?;
    match super::numbers::parse_int(a.at(2)) {
        None => return Err("ERR timeout is not an integer or out of range".into()),
        Some(n) if n < 0 => return Err("ERR timeout is negative".into()),
        Some(_) => {}
    }
    w.int(0);
    Ok(())
}

/// SELECT inside a transaction: there is one database.
pub(crate) fn select(_: &mut Exec<'_>, a: Args<'_>, w: &mut Writer) -> Outcome {
    if int(a.at(1))? != 0 {
        return Err("ERR DB index is out of range".into());
    }
    w.ok();
    Ok(())
}
