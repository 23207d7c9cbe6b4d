//! For micro-benchmarks only: the parser of requests behind a call that counts. No program needs it.

use crate::resp::parse::{Limits, Parser};

/// Whole commands in `input`, read and taken as a connection does it; 0 when it is not RESP.
#[must_use]
pub fn parse(input: &[u8]) -> usize {
    let limits = Limits {
        max_args: 1024 * 1024,
        max_bulk: 512 * 1024 * 1024,
        max_query: 1024 * 1024 * 1024,
    };
    let mut parser = Parser::default();
    parser.buf.extend_from_slice(input);
    match parser.parse(&limits, usize::MAX) {
        Ok(_) => parser.take().len(),
        Err(_) => 0,
    }
}
