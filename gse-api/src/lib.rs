//! The front door: every HTTP path at one address
