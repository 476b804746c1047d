//! The bodies of the fuzz targets. README.md says how to run them.

mod bytes;
pub mod c_abi;
mod draw;
pub mod partition;
pub mod problem;
mod source;
mod values;
