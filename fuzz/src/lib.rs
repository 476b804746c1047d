//! What the fuzz targets do with their inputs. README.md says how to run them.

mod bytes;
pub mod c_abi;
mod draw;
pub mod partition;
pub mod problem;
mod source;
mod values;
