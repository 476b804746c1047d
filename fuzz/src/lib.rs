//! What the fuzz targets do with their inputs. README.md says how to run them.

// Problems, the calls that they make, and their bounds are those of the project's own tests.
#[path = "../../tests/common/mod.rs"]
mod common;

mod bytes;
pub mod c_abi;
mod draw;
pub mod partition;
pub mod problem;
mod source;
mod values;
