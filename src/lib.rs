//! xent: softmax cross-entropy for CPU trainers, fused, vectorised, parallel, and the same bits
//! whatever the thread count, batch or instruction set.
//!
//! [`CrossEntropy`] is the loss and its gradients, [`Softmax`] softmax and log-softmax by
//! themselves. C and C++ trainers link the same through `include/xent.h` and `include/xent.hpp`.
//!
//! # What is computed
//!
//! A row is one softmax distribution over logits `z_c`, c in [0, C); there are N rows, times K
//! inner positions. w are the class weights (1 if absent), W their sum, r the row's weight (1 if
//! absent), ε the label smoothing, λ the z-loss. A row is kept unless its target index is
//! `ignore_index` or its mask byte is 0.
//!
//! ```text
//! x_c = scale·z_c, then x_c = cap·tanh(x_c/cap) if there is a cap
//! lse = ln Σ exp x_c      logp_c = x_c − lse      p_c = exp logp_c
//! ```
//!
//! With a class index y for target:
//!
//! ```text
//! row loss   r·[ (1−ε)·w_y·(−logp_y) + (ε/C)·Σ w_c·(−logp_c) + λ·lse² ]      0 if not kept
//! mean       Σ of the first two parts / Σ r·w_y + Σ of the third / Σ r, over kept rows
//! ∂/∂x_c     r·[ (1−ε)·w_y·(p_c − [c=y]) + (ε/C)·(W·p_c − w_c) + 2λ·lse·p_c ]
//! ```
//!
//! With probabilities t for targets, `t'_c = (1−ε)·t_c + ε/C` and `T = Σ w_c·t'_c`, which need not
//! be 1:
//!
//! ```text
//! row loss   r·[ Σ w_c·t'_c·(−logp_c) + λ·lse² ]      0 if not kept
//! mean       Σ row losses / Σ r over kept rows
//! ∂/∂x_c     r·[ T·p_c − w_c·t'_c + 2λ·lse·p_c ]
//! ∂/∂t_c     r·(1−ε)·w_c·(−logp_c)
//! ```
//!
//! `∂/∂z_c` is `∂/∂x_c` times scale, and times `1 − tanh²` under a cap. Gradients have the mean's
//! divisors too, `grad_output` and `grad_scale`. `normalizer` and `z_normalizer` replace those
//! divisors. With `log_probs` the logits are `logp` themselves: there is no lse, and the gradient
//! is minus the factor of `−logp_c`.
//!
//! A term whose factor is 0 is 0, whatever it multiplies. A kept row in which some `x_c` is NaN or
//! +inf, or every one is −inf, has a loss and gradient of NaN and touches no other row. A mean over
//! no rows is NaN, or 0 by option, with gradients of 0.

#[cfg(not(target_pointer_width = "64"))]
compile_error!("xent addresses operands of more than 2^32 bytes and needs a 64-bit target");

mod codes;
mod cross_entropy;
mod dispatch;
mod element;
mod error;
mod family;
// Unit tests leave the exported functions out: rustc would compile every kernel for them, and no unit test calls one.
#[cfg(all(feature = "capi", not(test)))]
mod ffi;
mod kernels;
mod math;
mod parallel;
mod plan;
mod pool;
mod problem;
#[doc(hidden)]
pub mod reference;
#[cfg(test)]
mod sample;
mod simd;
mod softmax;

pub use cross_entropy::{CrossEntropy, Input, Number, Output, Reduction, Results};
#[doc(hidden)]
pub use dispatch::Isa;
pub use error::Error;
pub use half;
pub use pool::{Pool, PoolError};
pub use softmax::Softmax;
