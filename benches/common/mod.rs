//! What the benches share: inputs, calls by name, and the limits of the machine that kernels are
//! held against.
#![allow(dead_code, reason = "compiled into each bench, and none needs all of it")]

pub mod aligned;
pub mod call;
pub mod limits;
pub mod machine;
pub mod record;
pub mod scalar;
pub mod timing;
