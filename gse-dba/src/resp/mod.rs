//! The RESP wire format: requests in ([`parse`]), replies out ([`write`]), and replies of another server measured but not decoded ([`skip`]) and dealt out to those who wait for them ([`deal`]).

pub(crate) mod deal;
pub(crate) mod parse;
pub(crate) mod skip;
pub(crate) mod write;

#[cfg(test)]
mod tests;
