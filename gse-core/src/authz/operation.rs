//! The things that can be allowed, by their stable names.

use std::fmt;
use std::str::FromStr;

macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// Something an application can be allowed to do.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Operation { $($(#[$doc])* $name,)* }

        impl Operation {
            /// All of them.
            pub const ALL: &'static [Operation] = &[$(Operation::$name,)*];

            /// The name in tables and audit lines.
            pub const fn as_str(self) -> &'static str {
                match self { $(Operation::$name => $text,)* }
            }
        }
    };
}

operations! {
    /// Run scripts.
    ScriptExecute = "script.execute";
    /// Read the results of scripts.
    ScriptRead = "script.read";
    /// End scripts.
    ScriptTerminate = "script.terminate";
    /// See which tasks there are.
    TaskList = "task.list";
    /// State of agents.
    AgentState = "agent.state";
    /// Details of agents.
    AgentInfo = "agent.info";
    /// See which agents there are.
    AgentList = "agent.list";
    /// Restart agents.
    AgentOperate = "agent.operate";
    /// Distribute files.
    FileTransfer = "file.transfer";
    /// Write content to files.
    FilePush = "file.push";
    /// Read the results of file distribution.
    FileRead = "file.read";
    /// End file distribution.
    FileTerminate = "file.terminate";
    /// Open file distribution to foreign BitTorrent clients, which need no credential.
    FileOpen = "file.open";
    /// Start, stop and register processes.
    ProcessOperate = "process.operate";
    /// Read the state of processes.
    ProcessRead = "process.read";
    /// Change data routes and sinks.
    DataWrite = "data.write";
    /// Read data routes and sinks.
    DataRead = "data.read";
    /// Send messages to plugins.
    MessageDispatch = "message.dispatch";
    /// Read the identities of hosts.
    HostIdRead = "hostid.read";
    /// Say what the identities of hosts are.
    HostIdWrite = "hostid.write";
}

/// No operation has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no operation {0:?}; the names are {names} and \"*\"", names = Operation::ALL.iter().map(|op| op.as_str()).collect::<Vec<_>>().join(", "))]
pub struct UnknownOperation(pub String);

impl FromStr for Operation {
    type Err = UnknownOperation;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Operation::ALL
            .iter()
            .copied()
            .find(|operation| operation.as_str() == text)
            .ok_or_else(|| UnknownOperation(text.chars().take(64).collect()))
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_of_the_contract_has_an_operation() {
        for route in gse_proto::http::Route::ALL {
            assert!(
                route.operation_name().parse::<Operation>().is_ok(),
                "{route:?}: {}",
                route.operation_name()
            );
        }
    }

    #[test]
    fn names_are_whole() {
        for name in [
            "script",
            "script.",
            "script.exec",
            "script.executes",
            "SCRIPT.EXECUTE",
            "script.*",
            "",
        ] {
            assert!(name.parse::<Operation>().is_err(), "{name:?}");
        }
    }
}
