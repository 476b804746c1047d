//! `cargo xtask accuracy`: ulps of xent on every instruction set beside PyTorch's on the same inputs,
//! as the table of docs/performance.md.

use crate::peers;
use crate::tool::{Result, directory, shell, target};
use xshell::cmd;

pub fn table() -> Result {
    let sh = shell()?;
    // An earlier run may have written files of other names.
    sh.remove_path(target().join("accuracy"))?;
    let results = directory("accuracy")?;
    cmd!(sh, "cargo bench --package xent --bench accuracy -- --directory {results}").run()?;
    let python = peers::python(&sh)?;
    Ok(cmd!(sh, "{python} peers/python/accuracy.py {results}").run()?)
}
