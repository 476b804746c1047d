//! xent: softmax cross-entropy for CPU trainers, fused, vectorised, parallel, and the same bits
//! whatever the thread count, batch or instruction set.
//!
//! [`CrossEntropy`] is the Rust API; C and C++ trainers link the same through `include/xent.h`
//! and `include/xent.hpp`.
//!
//! # What is computed
//!
//! A row is one softmax distribution over logits `x_c`, c in [0, C); y is its target, w the class
//! weights (1 if absent), W their sum, r the row's weight (1 if absent), ε the label smoothing.
//! A row is kept unless `y = ignore_index` or its mask byte is 0.
//!
//! ```text
//! lse = ln Σ exp x_c      logp_c = x_c − lse      p_c = exp logp_c
//! row loss   r·[ (1−ε)·w_y·(−logp_y) + (ε/C)·Σ w_c·(−logp_c) ]      0 if not kept
//! mean       Σ row losses / Σ r·w_y over kept rows (or / normalizer)
//! gradient   r·[ (1−ε)·w_y·(p_c − [c=y]) + (ε/C)·(W·p_c − w_c) ]    times the reduction's scale
//! ```
//!
//! A term whose factor is 0 is 0, whatever it multiplies. A kept row that holds NaN or +inf, or
//! nothing but −inf, has a loss and gradient of NaN and touches no other row. A mean over no
//! rows is NaN, or 0 by option, with gradients of 0.

#[cfg(not(target_pointer_width = "64"))]
compile_error!("xent addresses operands of more than 2^32 bytes and needs a 64-bit target");

mod codes;
mod cross_entropy;
mod dispatch;
mod element;
mod error;
mod family;
mod ffi;
mod kernels;
mod math;
mod parallel;
mod plan;
mod pool;
mod problem;
#[doc(hidden)]
pub mod reference;
mod simd;

pub use cross_entropy::{CrossEntropy, Input, Number, Output, Reduction, Results};
#[doc(hidden)]
pub use dispatch::Isa;
pub use error::Error;
pub use half;
pub use pool::{Pool, PoolError};
