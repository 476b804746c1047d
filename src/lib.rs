//! Softmax cross-entropy for CPU trainers: the loss and its gradient in one call, over logits in
//! the caller's own memory.
//!
//! ```
//! use xent::CrossEntropy;
//!
//! let mut logits = [0.1f32, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1]; // [rows = 2, classes = 4]
//! let targets = [0i32, 3];
//! let loss = CrossEntropy::new(2, 4).forward_backward_in_place(&mut logits, &targets)?;
//! assert!((loss - 1.5425).abs() < 1e-4);
//! assert!((logits[0] + 0.3931).abs() < 1e-4); // the gradient has replaced the logits
//! # Ok::<(), xent::Error>(())
//! ```
//!
//! - [`CrossEntropy`] computes the loss, its gradients, and what else a pass over the logits
//!   yields ([`Results`]): row losses, lse, argmax, entropy, top-k. Targets are class indices or
//!   probabilities. Options are label smoothing, class and row weights, z-loss, a logit scale and a
//!   softcap.
//! - [`Partial`] is what is known of a row after one shard of a vocabulary: calls over the shards merge, on one
//!   machine or on many, into the results and the gradient of the whole.
//! - [`Softmax`] computes softmax and log-softmax by themselves, and the gradients through them.
//! - [`Input`] and [`Output`] are slices of f32, f64, bf16 or f16 with any strides, so that any axis
//!   of a tensor can be the class axis. They are also made of pointers, of memory without values, and,
//!   with the feature `ndarray`, of arrays and their views.
//! - [`Pool`] runs a call on threads of the caller's. By default calls run on rayon's global pool.
//!
//! # Debug builds
//!
//! A debug build compiles the kernels of its dependencies without optimisation, and a call then takes
//! some 200 times as long. Two lines in the program's Cargo.toml cure that:
//!
//! ```toml
//! [profile.dev.package.xent]
//! opt-level = 3
//! ```
//!
//! # Features
//!
//! All are off by default. `ndarray`: operands from arrays and views of the crate ndarray, 0.16, whose
//! shapes the call checks ([`Error::Shape`]). Their strides may be any but negative ones
//! ([`Error::Stride`]). `capi` and `header` serve the C library.
//!
//! ```
//! # #[cfg(feature = "ndarray")]
//! # fn main() -> Result<(), xent::Error> {
//! use ndarray::{Array2, arr1};
//! use xent::CrossEntropy;
//!
//! let hidden = Array2::<f32>::ones((2, 8));
//! let logits = hidden.dot(&Array2::ones((4, 8)).t());
//! let mut grad = Array2::<f32>::zeros((2, 4));
//! let call = CrossEntropy::new(2, 4);
//! let loss = call.forward_backward(&logits, &arr1(&[0i64, 3]), &mut grad)?;
//! assert!((loss - 4f64.ln()).abs() < 1e-6);
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "ndarray"))]
//! # fn main() {}
//! ```
//!
//! # Further
//!
//! The module [`semantics`] shows docs/semantics.md: every formula, edge case and error bound, and
//! every difference from PyTorch. The module [`recipes`] shows docs/recipes.md: losses of RL, CLIP,
//! padded vocabularies, the causal shift, split batches. A row has the same bits whatever the thread count, the batch
//! around it, and the instruction set.
//!
//! C and C++ trainers call the same library through `include/xent.h` and `include/xent.hpp`.

#[cfg(not(target_pointer_width = "64"))]
compile_error!("xent addresses operands of more than 2^32 bytes and needs a 64-bit target");

mod codes;
mod cross_entropy;
mod dispatch;
mod drivers;
mod element;
mod error;
// The compiler compiles exported functions, and every kernel below them, into each build. No unit
// test calls them.
#[cfg(all(feature = "capi", not(test)))]
mod ffi;
mod kernels;
mod linear;
mod math;
mod operand;
mod parallel;
mod partial;
mod plan;
mod pool;
mod run;
#[cfg(test)]
mod sample;
mod shards;
mod simd;
mod softmax;
mod strategy;
mod validate;
mod view;
mod worker;

// This module exists in the documentation alone.
#[cfg(all(doc, not(doctest)))]
#[allow(
    rustdoc::invalid_rust_codeblocks,
    rustdoc::broken_intra_doc_links,
    reason = "the document is written for any reader of Markdown, and its examples are Python"
)]
#[doc = include_str!("../docs/semantics.md")]
pub mod semantics {}

// This module exists in the documentation alone; tests/recipes.rs runs its snippets.
#[cfg(all(doc, not(doctest)))]
#[allow(
    rustdoc::broken_intra_doc_links,
    reason = "the document is written for any reader of Markdown"
)]
#[doc = include_str!("../docs/recipes.md")]
pub mod recipes {}

pub use cross_entropy::{CrossEntropy, Reduction, Results};
#[doc(hidden)]
pub use dispatch::Isa;
pub use error::Error;
pub use half;
pub use linear::{Linear, LinearGrads};
pub use operand::{Input, Number, Output};
pub use partial::Partial;
pub use pool::{Pool, PoolError, PoolRef};
pub use softmax::Softmax;
pub use worker::stack_bytes;
