//! Every error code in one table: the contract's inner codes (rows) and envelope codes (whole answers).
//!
//! An envelope code is 1,000,000 plus an inner one. Codes marked "ours" are not in any public table; they lie in ranges that the
//! public ones leave free.

macro_rules! inner_codes {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        /// Inner code of a row.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(i32)]
        pub enum Inner { $($(#[$doc])* $name = $value,)* }

        impl Inner {
            /// All of them, for documentation and tests.
            pub const ALL: &'static [Inner] = &[$(Inner::$name,)*];

            /// The number on the wire.
            #[must_use]
            pub const fn code(self) -> i32 { self as i32 }

            /// A few words for people.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Inner::$name => $text,)* }
            }

            /// The same as an envelope code.
            #[must_use]
            pub const fn lifted(self) -> i64 { 1_000_000 + self as i64 }
        }
    };
}

inner_codes! {
    /// Done, or for scripts: look at `status`.
    Ok = 0, "done";
    /// It can't be known whether it ran, or how it ended.
    Unknown = -1, "unknown outcome";
    /// A failure inside the control plane or the agent.
    System = 101, "internal failure";
    /// The source is not there, or nothing matches the pattern.
    NoSource = 104, "no such source file";
    /// Arguments that can't be carried out.
    Arguments = 106, "invalid arguments";
    /// A file or directory can't be written.
    Write = 111, "write failure";
    /// Content beyond what the agent or the servers move.
    TooLarge = 119, "size limit exceeded";
    /// Not finished yet.
    Running = 115, "in progress";
    /// The agent is unknown, offline, or did not come back.
    AgentOffline = 117, "agent offline or unknown";
    /// Not started or not finished in time.
    Timeout = 120, "time-out";
    /// A limit of the agent or of the servers is reached.
    Limit = 121, "limit reached";
    /// The OS account does not exist.
    NoSuchUser = 122, "no such OS account";
    /// The source can't be read by its account.
    Read = 123, "source file can't be read";
    /// Ended on request.
    Terminated = 126, "terminated on request";
    /// The target directory is missing, or something on the way is no directory.
    NoTargetDir = 127, "no such target directory";
    /// Content could not be fetched: nobody who has it could be reached.
    Fetch = 701, "content could not be fetched";
    /// What was fetched is not what the manifest says.
    Digest = 702, "content does not match its digest";
    /// The target can't be written by its account.
    Place = 705, "target can't be written";
    /// A device, a socket, or a link that leads out of what is sent.
    SourceKind = 706, "not a kind of file that is transferred";
    /// The target's file system has no room.
    NoSpace = 708, "no space left at the target";
    /// The source was written to while it was read.
    Changed = 709, "source changed during the transfer";
    /// No plugin of that name is connected to the agent.
    NoPlugin = 710, "plugin not connected to its agent";
    /// A Windows password that can't be used.
    WindowsPassword = 1326, "Windows account password not usable";
}

macro_rules! outer_codes {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        /// Code of a whole answer.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(i64)]
        pub enum Code { $($(#[$doc])* $name = $value,)* }

        impl Code {
            /// All of them, for documentation and tests.
            pub const ALL: &'static [Code] = &[$(Code::$name,)*];

            /// The number on the wire.
            #[must_use]
            pub const fn code(self) -> i64 { self as i64 }

            /// A few words for people.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Code::$name => $text,)* }
            }
        }
    };
}

outer_codes! {
    /// Success.
    Ok = 0, "ok";
    /// A failure inside the control plane.
    System = 1000101, "internal failure";
    /// The body or one of its fields is not acceptable.
    Arguments = 1000106, "invalid arguments";
    /// No such task, or its results have expired.
    NoSuchTask = 1000116, "no such task";
    /// The call took longer than it may.
    Timeout = 1000120, "time-out";
    /// A limit is reached; try again later.
    Limit = 1000121, "limit reached, try again later";
    /// The state store does not answer; try again later (ours).
    StoreUnavailable = 1000190, "state store unavailable, try again later";
    /// No or wrong credentials (ours).
    Unauthenticated = 1000901, "not authenticated";
    /// The application may not do this (ours).
    Forbidden = 1000903, "not allowed";
    /// No call at this path (ours).
    NoSuchCall = 1000904, "no such call";
    /// Wrong HTTP method (ours).
    Method = 1000905, "method not allowed";
    /// The body is larger than allowed (ours).
    BodyTooLarge = 1000913, "body too large";
    /// The process is stopping; another instance will take the call (ours).
    Draining = 1000914, "stopping, try another instance";
    /// The service that owns this call is not reachable or not installed (ours).
    ServiceUnavailable = 1000915, "service not reachable";
    /// A route, or a stream that routes lead to, with this number exists already (ours).
    Exists = 1000909, "already exists";
    /// There is no such route or stream; clients look for this code and for these two words.
    NoSuchRoute = 1014505, "not found";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_code_is_given_twice_and_reserved_ones_mean_what_the_contract_says() {
        // contract: v2-http-task#52
        let mut inner: Vec<i32> = Inner::ALL.iter().map(|c| c.code()).collect();
        inner.sort_unstable();
        inner.dedup();
        assert_eq!(inner.len(), Inner::ALL.len());
        let mut outer: Vec<i64> = Code::ALL.iter().map(|c| c.code()).collect();
        outer.sort_unstable();
        outer.dedup();
        assert_eq!(outer.len(), Code::ALL.len());
        assert_eq!(
            (
                Inner::Running.code(),
                Inner::Terminated.code(),
                Inner::AgentOffline.code()
            ),
            (115, 126, 117)
        );
        // 1000115 and 1011003 have meanings of their own for clients and must never be used for anything else.
        assert!(!outer.contains(&1_000_115) && !outer.contains(&1_011_003));
        assert_eq!(Inner::System.lifted(), Code::System.code());
    }
}
