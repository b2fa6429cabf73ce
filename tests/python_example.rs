//! The Python program of the examples, against a real server. Needs python3 with venv, and a package index for grpcio;
//! without them the test says so and passes.
#![allow(clippy::unwrap_used)]

mod harness;

use std::path::{Path, PathBuf};
use std::process::Command;

use harness::{Node, Options};

const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/examples/python");

/// A Python with grpcio, made once; or why there is none.
fn python() -> Result<PathBuf, String> {
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python-example");
    let python = venv.join("bin/python");
    let ready = venv.join("ready");
    if !ready.exists() {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv))?;
        let requirements = format!("{EXAMPLE}/requirements.txt");
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--requirement", &requirements]))?;
        std::fs::write(ready, "").unwrap();
    }
    Ok(python)
}

fn run(command: &mut Command) -> Result<String, String> {
    let out = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if out.status.success() {
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    } else {
        Err(format!("{command:?}: {}", String::from_utf8_lossy(&out.stderr)))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_example_works() {
    let python = match python() {
        Ok(python) => python,
        Err(why) => {
            println!("skipped: no Python with grpcio: {why}");
            return;
        }
    };
    let node = Node::start(Options::plain()).await;
    let said = run(Command::new(python)
        .arg(format!("{EXAMPLE}/example.py"))
        .arg(node.client_addr()))
    .unwrap();
    println!("{said}");
    assert!(said.contains("read 2010 messages back"), "{said}");
}
