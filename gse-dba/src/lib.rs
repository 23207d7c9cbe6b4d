//! The front of the store over RESP
