//! Compiles the .proto files without protoc: protox is a compiler in Rust.

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let sources = [
        "gse/session.proto",
        "gse/state.proto",
        "gse/peer.proto",
        "gse/calls.proto",
        "gse/file.proto",
        "gse/xfer.proto",
        "gse/data.proto",
        "gse/message.proto",
        "gse/proc.proto",
        "gse/procstore.proto",
        "gse/intake.proto",
        "gse/alarm.proto",
        "gse/sync.proto",
    ];
    let files = protox::compile(sources, ["proto"])?;
    let mut config = prost_build::Config::new();
    config.bytes(["."]);
    // Every method of every service, for tests that check each of them.
    let descriptors = std::path::Path::new(&std::env::var("OUT_DIR")?).join("descriptors.bin");
    std::fs::write(descriptors, files.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds_with_config(files, config)?;
    Ok(())
}
