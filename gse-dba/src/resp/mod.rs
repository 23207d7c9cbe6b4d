//! The RESP wire format: requests in ([`parse`]), replies out ([`write`]), and replies of another server measured but not decoded ([`skip`]).

pub(crate) mod parse;
pub(crate) mod skip;
pub(crate) mod write;

#[cfg(test)]
mod tests;
