//! Bindings of include/xent.h, as a caller would write them.

use std::ffi::{c_char, c_void};

pub const OK: i32 = 0;
pub const NULL: i32 = 1;
pub const STRUCT: i32 = 2;
pub const SHAPE: i32 = 3;
pub const STRIDE: i32 = 4;
pub const DTYPE: i32 = 5;
pub const ALIGN: i32 = 6;
pub const OVERLAP: i32 = 7;
pub const TARGET: i32 = 8;
pub const PARAM: i32 = 9;

pub const LOG_PROBS: u32 = 1;
pub const EMPTY_IS_ZERO: u32 = 2;
pub const ACCUMULATE: u32 = 4;
pub const ZERO_PADDING: u32 = 8;

pub const F64: u32 = 1;
pub const I64: u32 = 16;
pub const U8: u32 = 18;

/// `xent_input` and `xent_output`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct View {
    pub data: *mut c_void,
    pub dtype: u32,
    pub strides: [i64; 3],
}

impl View {
    pub const ABSENT: View = View { data: std::ptr::null_mut(), dtype: 0, strides: [0; 3] };
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    pub struct_size: u32,
    pub flags: u32,
    pub rows: usize,
    pub classes: usize,
    pub inner: usize,
    pub logits: View,
    pub targets: View,
    pub class_weights: View,
    pub row_weights: View,
    pub row_mask: View,
    pub ignore_index: i64,
    pub label_smoothing: f64,
    pub z_loss: f64,
    pub softcap: f64,
    pub logit_scale: f64,
    pub normalizer: f64,
    pub z_normalizer: f64,
    pub reduction: u32,
    pub threads: u32,
    pub pool: *const c_void,
    pub target_classes: View,
    pub target_count: usize,
    pub target_scale: f64,
    pub entropy_bonus: f64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Results {
    pub struct_size: u32,
    pub loss: *mut c_void,
    pub row_losses: View,
    pub lse: *mut c_void,
    pub z_loss: *mut c_void,
    pub normalizer: *mut c_void,
    pub z_normalizer: *mut c_void,
    pub kept_rows: *mut c_void,
    pub argmax: *mut c_void,
    pub correct: *mut c_void,
    pub entropy: View,
    pub kl: View,
    pub entropy_bonus: *mut c_void,
    pub top_classes: *mut c_void,
    pub top_log_probs: View,
    pub top_count: usize,
    pub target_ranks: *mut c_void,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    pub struct_size: u32,
    pub flags: u32,
    pub features: usize,
    pub hidden: View,
    pub weight: View,
    pub bias: View,
    pub workspace: usize,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LinearGrads {
    pub struct_size: u32,
    pub hidden: View,
    pub weight: View,
    pub bias: View,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub struct_size: u32,
    pub flags: u32,
    pub rows: usize,
    pub classes: usize,
    pub inner: usize,
    pub threads: u32,
    pub pool: *const c_void,
}

// The sizes of the first release.
/// The size of a problem in the first release.
pub const FIRST_PROBLEM: usize = 304;
/// That of the results.
pub const FIRST_RESULTS: usize = 152;

const _: () = assert!(size_of::<Problem>() == 368);
const _: () = assert!(size_of::<Results>() == 264);
const _: () = assert!(size_of::<Shape>() == 48);
const _: () = assert!(size_of::<Linear>() == 144);
const _: () = assert!(size_of::<LinearGrads>() == 128);

/// The numbers of an `xent_partial`, 8 bytes each.
pub const MEMBERS: usize = 6;

unsafe extern "C" {
    pub fn xent_forward(problem: *const c_void, results: *const c_void) -> i32;
    pub fn xent_backward(
        problem: *const c_void,
        lse: *const c_void,
        grad_output: *const c_void,
        grad_scale: f64,
        grad_logits: *const c_void,
    ) -> i32;
    pub fn xent_backward_targets(
        problem: *const c_void,
        lse: *const c_void,
        grad_output: *const c_void,
        grad_scale: f64,
        grad_targets: *const c_void,
    ) -> i32;
    pub fn xent_forward_backward(
        problem: *const c_void,
        grad_output: *const c_void,
        grad_scale: f64,
        results: *const c_void,
        grad_logits: *const c_void,
    ) -> i32;
    pub fn xent_log_softmax(shape: *const c_void, x: *const c_void, y: *const c_void) -> i32;
    pub fn xent_log_softmax_backward(
        shape: *const c_void,
        y: *const c_void,
        grad_y: *const c_void,
        grad_x: *const c_void,
    ) -> i32;
    pub fn xent_softmax(shape: *const c_void, x: *const c_void, y: *const c_void) -> i32;
    pub fn xent_softmax_backward(
        shape: *const c_void,
        y: *const c_void,
        grad_y: *const c_void,
        grad_x: *const c_void,
    ) -> i32;
    pub fn xent_partial_forward(
        problem: *const c_void,
        class_offset: usize,
        total_classes: usize,
        partials: *mut c_void,
    ) -> i32;
    pub fn xent_partial_merge(into: *mut c_void, from: *const c_void, count: usize);
    pub fn xent_partial_finish(
        problem: *const c_void,
        total_classes: usize,
        merged: *const c_void,
        results: *const c_void,
    ) -> i32;
    pub fn xent_partial_backward(
        problem: *const c_void,
        class_offset: usize,
        total_classes: usize,
        merged: *const c_void,
        grad_output: *const c_void,
        grad_scale: f64,
        grad_logits: *const c_void,
    ) -> i32;
    pub fn xent_linear_forward(
        problem: *const c_void,
        linear: *const c_void,
        results: *const c_void,
    ) -> i32;
    pub fn xent_linear_backward(
        problem: *const c_void,
        linear: *const c_void,
        lse: *const c_void,
        grad_output: *const c_void,
        grad_scale: f64,
        grads: *const c_void,
    ) -> i32;
    pub fn xent_linear_forward_backward(
        problem: *const c_void,
        linear: *const c_void,
        grad_output: *const c_void,
        grad_scale: f64,
        results: *const c_void,
        grads: *const c_void,
    ) -> i32;
    pub fn xent_linear_partial_forward(
        problem: *const c_void,
        linear: *const c_void,
        class_offset: usize,
        total_classes: usize,
        partials: *mut c_void,
    ) -> i32;
    pub fn xent_linear_partial_backward(
        problem: *const c_void,
        linear: *const c_void,
        class_offset: usize,
        total_classes: usize,
        merged: *const c_void,
        grad_output: *const c_void,
        grad_scale: f64,
        grads: *const c_void,
    ) -> i32;
    pub safe fn xent_status_name(status: i32) -> *const c_char;
    pub safe fn xent_last_error() -> *const c_char;
    pub safe fn xent_pool_new(threads: u32) -> *mut c_void;
}
