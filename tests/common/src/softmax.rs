//! Calls of softmax, log-softmax and their gradients over operands of any dtype and layout, and the
//! bounds of their results against the oracle.

use crate::How;
use crate::bounds::close;
use crate::operand::{Dtype, Operand};
use crate::random::Rng;
use crate::reference;
use xent::Softmax;

/// Operands of a forward and a backward.
pub struct Problem {
    pub sizes: [usize; 3],
    pub log: bool,
    pub x: Operand,
    /// The forward's result, rounded to its dtype.
    pub y: Operand,
    pub grad_y: Operand,
    /// The output.
    pub to: Operand,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Forward,
    ForwardInPlace,
    Backward,
    /// The gradient replaces that with respect to y.
    BackwardInPlace,
    /// The gradient replaces y.
    BackwardOver,
}

pub const CALLS: [Call; 5] = [
    Call::Forward,
    Call::ForwardInPlace,
    Call::Backward,
    Call::BackwardInPlace,
    Call::BackwardOver,
];

impl Problem {
    pub fn relaid(&self, rng: &mut Rng) -> Problem {
        let mut relay = |operand: &Operand| operand.relaid(rng);
        Problem {
            x: relay(&self.x),
            y: relay(&self.y),
            grad_y: relay(&self.grad_y),
            to: relay(&self.to),
            ..*self
        }
    }

    pub fn single(&self, row: usize, k: usize) -> Problem {
        let single = |operand: &Operand| operand.single(row, k);
        Problem {
            sizes: [1, self.sizes[1], 1],
            log: self.log,
            x: single(&self.x),
            y: single(&self.y),
            grad_y: single(&self.grad_y),
            to: single(&self.to),
        }
    }

    pub fn run(&self, call: Call, how: &How) -> Vec<f64> {
        let [rows, classes, inner] = self.sizes;
        let mut softmax =
            Softmax::new(rows, classes).inner(inner).isa(how.isa).threads(how.threads);
        if let Some(pool) = how.pool {
            softmax = softmax.pool(pool);
        }
        let (mut x, mut y) = (self.x.place(), self.y.place());
        let (mut grad_y, mut to) = (self.grad_y.place(), self.to.place_poisoned());
        let log = self.log;
        match call {
            Call::Forward => {
                let call = if log { Softmax::log_softmax } else { Softmax::softmax };
                call(&softmax, x.input(), to.output())
            }
            Call::ForwardInPlace if log => softmax.log_softmax_in_place(x.output()),
            Call::ForwardInPlace => softmax.softmax_in_place(x.output()),
            Call::Backward => {
                let call =
                    if log { Softmax::log_softmax_backward } else { Softmax::softmax_backward };
                call(&softmax, y.input(), grad_y.input(), to.output())
            }
            Call::BackwardInPlace if log => {
                softmax.log_softmax_backward_in_place(y.input(), grad_y.output())
            }
            Call::BackwardInPlace => softmax.softmax_backward_in_place(y.input(), grad_y.output()),
            Call::BackwardOver if log => {
                softmax.log_softmax_backward_over(y.output(), grad_y.input())
            }
            Call::BackwardOver => softmax.softmax_backward_over(y.output(), grad_y.input()),
        }
        .expect("a valid problem");
        let changed = match call {
            Call::Forward | Call::Backward => &to,
            Call::ForwardInPlace => &x,
            Call::BackwardInPlace => &grad_y,
            Call::BackwardOver => &y,
        };
        for (operand, what) in [(&x, "x"), (&y, "y"), (&grad_y, "grad_y"), (&to, "result")] {
            if !std::ptr::eq(operand, changed) {
                operand.assert_untouched(what);
            }
        }
        changed.take("result")
    }

    /// The calls that the layout of x allows.
    pub fn calls(&self) -> impl Iterator<Item = Call> {
        let apart = self.x.is_apart();
        CALLS.into_iter().filter(move |&call| apart || call != Call::ForwardInPlace)
    }

    pub fn run_all(&self, how: &How) -> Vec<(Call, Vec<f64>)> {
        self.calls().map(|call| (call, self.run(call, how))).collect()
    }

    /// Compares a result with the oracle's, and returns the largest error in units of its bound.
    #[track_caller]
    pub fn judge(&self, call: Call, got: &[f64]) -> f64 {
        let [rows, classes, inner] = self.sizes;
        let dtype = self.x.dtype;
        // The relative errors of sums, of exponentials and of roundings.
        let (sum, exp, half, least) = if dtype == Dtype::F64 {
            (1e-14, 6e-15, 2f64.powi(-52), 1e-300)
        } else {
            (2e-7, 2f64.powi(-23), 2f64.powi(-24), 1e-37)
        };
        let is_forward = matches!(call, Call::Forward | Call::ForwardInPlace);
        let (x, y, g) = (&self.x.values, &self.y.values, &self.grad_y.values);
        let log_p = reference::log_softmax(x, rows, classes, inner);
        let want = match (is_forward, self.log) {
            (true, false) => reference::softmax(x, rows, classes, inner),
            (true, true) => log_p.clone(),
            (false, false) => reference::softmax_backward(y, g, rows, classes, inner),
            (false, true) => reference::log_softmax_backward(y, g, rows, classes, inner),
        };
        let mut worst = 0f64;
        for i in 0..rows * inner {
            let at = |class: usize| (i / inner * classes + class) * inner + i % inner;
            let term = |c: usize| if self.log { g[at(c)] } else { y[at(c)] * g[at(c)] };
            let largest = (0..classes).map(|c| term(c).abs()).fold(0.0, f64::max);
            let total: f64 = (0..classes).map(term).sum();
            let share = largest.max(total.abs());
            for class in 0..classes {
                let (got, want, log_p) = (got[at(class)], want[at(class)], log_p[at(class)]);
                let (y, g) = (y[at(class)], g[at(class)]);
                let bound = match (is_forward, self.log) {
                    (true, false) => want * (exp * (1.0 + log_p.abs()) + half),
                    // A log-softmax has the bound of a loss: its largest term, and the error of lse.
                    (true, true) if want > -0.1 => {
                        let log = if want < 0.0 { want.abs().ln().abs() } else { 0.0 };
                        2.0 * exp * (1.0 + log) * want.abs()
                    }
                    (true, true) if want.is_infinite() => 0.0,
                    (true, true) => sum * want.abs() + exp,
                    (false, false) => y * (sum * share + half * (g.abs() + total.abs())),
                    (false, true) => {
                        let p = y.exp();
                        p * (sum * share + exp * (1.0 + y.abs()) * total.abs()) + half * g.abs()
                    }
                };
                let bound = bound + half * want.abs() + least * (1.0 + share);
                let rounding = if dtype.is_half() {
                    1.02 * dtype.half_ulp(if want.is_finite() { want.abs() + bound } else { 0.0 })
                } else {
                    0.0
                };
                // A result past the range of f16, or a sum that is NaN.
                if want.abs() + bound >= dtype.largest() && got.is_infinite() {
                    assert!(want.signum() == got.signum(), "{got:e}, not {want:e}");
                    continue;
                }
                let what = || format!("{call:?}, row {i}, class {class} (log p {log_p:e})");
                let error = close(got, want, bound + rounding, what);
                if want.abs() > 1e3 * least && rounding == 0.0 {
                    worst = worst.max(error);
                }
            }
        }
        worst
    }
}
