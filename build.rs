//! Compiles the protocol files with protox, so that no protoc needs to be installed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = [
        "mainstem/v1/types.proto",
        "mainstem/v1/publish.proto",
        "mainstem/v1/read.proto",
        "mainstem/v1/admin.proto",
        "mainstem/v1/cluster.proto",
    ];
    let public = protox::compile(files, ["proto"])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    // Served by reflection, and compared with the golden descriptor by a test.
    std::fs::write(out.join("mainstem.v1.bin"), prost::Message::encode_to_vec(&public))?;
    let mut all: Vec<String> = files.map(String::from).into();
    for entry in std::fs::read_dir("proto/mainstem/internal/v1")? {
        let name = entry?
            .file_name()
            .into_string()
            .map_err(|n| format!("{n:?} is no text"))?;
        if name.ends_with(".proto") {
            all.push(format!("mainstem/internal/v1/{name}"));
        }
    }
    all.sort();
    let all = protox::compile(all, ["proto"])?;
    tonic_prost_build::configure()
        .bytes(".")
        .btree_map(".")
        .compile_fds(all)?;
    Ok(())
}
