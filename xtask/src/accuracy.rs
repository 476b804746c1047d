//! `cargo xtask accuracy`: ulps of xent on every instruction set beside PyTorch's on the same inputs,
//! as the table of docs/performance.md.

use crate::peers;
use crate::tool::{Result, cargo, make_directory, root, run, target};
use std::fs;
use std::process::Command;

pub fn table() -> Result {
    let directory = target().join("accuracy");
    // Of another time, with other names perhaps.
    let _ = fs::remove_dir_all(&directory);
    make_directory(&directory)?;
    let bench = ["bench", "--package", "xent", "--bench", "accuracy", "--", "--directory"];
    run(cargo(bench).arg(&directory))?;
    let home = target().join("peers");
    make_directory(&home)?;
    let script = root().join("peers/python/accuracy.py");
    run(Command::new(peers::python(&home)?).arg(script).arg(&directory))
}
