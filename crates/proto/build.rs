//! Compiles the repository's `proto/` without `protoc`, and keeps the descriptors for gRPC reflection and for `ctl --json`.

use std::env;
use std::error::Error;
use std::fs;
use std::path::PathBuf;

/// Where the files stand, for readers of every language.
const PROTO: &str = "../../proto";
const FILES: [&str; 4] = ["mpim/presence.proto", "mpim/gateway.proto", "mpim/admin.proto", "mpim/node.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    let mut compiler = protox::Compiler::new([PROTO])?;
    compiler.include_imports(true).include_source_info(true).open_files(FILES)?;
    let descriptors = PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(descriptors, compiler.encode_file_descriptor_set())?;
    let generator = tonic_prost_build::configure().generate_default_stubs(true).bytes(".").codec_path("crate::codec::Codec");
    generator.compile_fds(compiler.file_descriptor_set())?;
    println!("cargo::rerun-if-changed={PROTO}");
    Ok(())
}
