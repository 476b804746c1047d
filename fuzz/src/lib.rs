//! The bodies of the fuzz targets. README.md says how to run them.

mod bytes;
pub mod c_abi;
mod draw;
pub mod linear;
pub mod partition;
pub mod problem;
pub mod shards;
mod source;
mod values;
