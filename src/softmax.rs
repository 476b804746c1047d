//! The Rust surface of softmax and log-softmax: it turns operands into descriptors and calls [`run`].

use crate::dispatch::Isa;
use crate::error::Error;
use crate::operand::{Input, Output};
use crate::parallel::Team;
use crate::plan::Shape;
use crate::pool::PoolRef;
use crate::run;
use crate::validate::operand::Operand;
use crate::validate::softmax::{Function, Problem};

/// Softmax and log-softmax: the sizes. The calls take the data.
///
/// ```
/// use xent::Softmax;
///
/// let (x, mut y) = ([0.1f32, 0.2, 0.3, 0.4], [0f32; 4]);
/// let call = Softmax::new(1, 4);
/// call.softmax(&x, &mut y)?;
/// assert!((y[0] - 0.21383822).abs() < 1e-6);
/// call.log_softmax(&x, &mut y)?;
/// assert!((y[0] + 1.5425).abs() < 1e-4);
/// # Ok::<(), xent::Error>(())
/// ```
///
/// ```text
/// softmax                y_c = exp x_c / Σ exp x        grad_x_c = y_c·(grad_y_c − Σ y·grad_y)
/// log_softmax            y_c = x_c − ln Σ exp x         grad_x_c = grad_y_c − exp(y_c)·Σ grad_y
/// ```
///
/// Every operand is `[rows, classes, inner]`. With strides ([`Input::strides`]) any axis of any
/// tensor can be the class axis. All operands of one call have one dtype, f32, f64, bf16 or f16
/// ([`Error::Dtype`]). xent widens halves to f32 and rounds the result once.
///
/// A row that holds NaN or +inf, or nothing but −inf, becomes NaN, and no other row does. Any other
/// −inf becomes 0 in a softmax and stays −inf in a log-softmax.
///
/// In each backward `y` is the output of the forward, `grad_y` the gradient with respect to it, and
/// `grad_x` the result. A call checks everything before it writes a byte: a call that returns an
/// [`Error`] has written nothing.
#[derive(Clone, Copy)]
#[must_use]
pub struct Softmax<'a> {
    shape: Shape,
    threads: u32,
    pool: Option<PoolRef<'a>>,
    isa: Option<Isa>,
}

impl<'a> Softmax<'a> {
    /// `rows` rows of `classes` classes.
    pub fn new(rows: usize, classes: usize) -> Self {
        let shape = Shape { rows, classes, inner: 1 };
        Softmax { shape, threads: 0, pool: None, isa: None }
    }

    /// K inner positions: operands are `[rows, classes, inner]` and hold rows·inner distributions.
    /// Default: 1.
    ///
    /// ```
    /// # use xent::Softmax;
    /// let mut y = [0f64, 1.0, 0.0, 1.0]; // [rows = 1, classes = 2, inner = 2]
    /// Softmax::new(1, 2).inner(2).softmax_in_place(&mut y)?;
    /// assert!(y.iter().all(|y| (y - 0.5).abs() < 1e-12));
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub fn inner(mut self, positions: usize) -> Self {
        self.shape.inner = positions;
        self
    }

    /// 0 = the whole pool, 1 = the calling thread alone, n = at most n. The number changes no bit of
    /// the result. Default: 0.
    pub fn threads(mut self, threads: u32) -> Self {
        self.threads = threads;
        self
    }

    /// The pool to run on: a [`Pool`](crate::Pool) or a `rayon::ThreadPool`. Default: rayon's global
    /// pool.
    pub fn pool(mut self, pool: impl Into<PoolRef<'a>>) -> Self {
        self.pool = Some(pool.into());
        self
    }

    /// Forces an instruction set, for tests and benches. A set that the processor lacks is an
    /// [`Error::Param`].
    #[doc(hidden)]
    pub fn isa(mut self, isa: Isa) -> Self {
        self.isa = Some(isa);
        self
    }

    /// Computes `y` = softmax of `x`.
    pub fn softmax<'b, 'c>(
        &self,
        x: impl Into<Input<'b>>,
        y: impl Into<Output<'c>>,
    ) -> Result<(), Error> {
        self.forward(Function::Softmax, x.into().operand, y.into().operand)
    }

    /// As [`softmax`](Self::softmax); `y` holds x, and the result replaces it.
    pub fn softmax_in_place<'b>(&self, y: impl Into<Output<'b>>) -> Result<(), Error> {
        let y = y.into().operand;
        self.forward(Function::Softmax, y, y)
    }

    /// Computes the gradient through softmax, from its output `y`.
    ///
    /// ```
    /// # use xent::Softmax;
    /// let mut grad_x = [0f32; 2];
    /// Softmax::new(1, 2).softmax_backward(&[0.5f32, 0.5], &[1f32, 0.0], &mut grad_x)?;
    /// assert_eq!(grad_x, [0.25, -0.25]);
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub fn softmax_backward<'b, 'c, 'd>(
        &self,
        y: impl Into<Input<'b>>,
        grad_y: impl Into<Input<'c>>,
        grad_x: impl Into<Output<'d>>,
    ) -> Result<(), Error> {
        let (y, grad_y) = (y.into().operand, grad_y.into().operand);
        self.run(Function::SoftmaxBackward, y, grad_y, grad_x.into().operand)
    }

    /// As [`softmax_backward`](Self::softmax_backward); `grad` holds grad_y and becomes grad_x.
    pub fn softmax_backward_in_place<'b, 'c>(
        &self,
        y: impl Into<Input<'b>>,
        grad: impl Into<Output<'c>>,
    ) -> Result<(), Error> {
        let grad = grad.into().operand;
        self.run(Function::SoftmaxBackward, y.into().operand, grad, grad)
    }

    /// As [`softmax_backward`](Self::softmax_backward); `y` becomes grad_x.
    pub fn softmax_backward_over<'b, 'c>(
        &self,
        y: impl Into<Output<'b>>,
        grad_y: impl Into<Input<'c>>,
    ) -> Result<(), Error> {
        let y = y.into().operand;
        self.run(Function::SoftmaxBackward, y, grad_y.into().operand, y)
    }

    /// Computes `y` = log-softmax of `x`.
    pub fn log_softmax<'b, 'c>(
        &self,
        x: impl Into<Input<'b>>,
        y: impl Into<Output<'c>>,
    ) -> Result<(), Error> {
        self.forward(Function::LogSoftmax, x.into().operand, y.into().operand)
    }

    /// As [`log_softmax`](Self::log_softmax); `y` holds x, and the result replaces it.
    pub fn log_softmax_in_place<'b>(&self, y: impl Into<Output<'b>>) -> Result<(), Error> {
        let y = y.into().operand;
        self.forward(Function::LogSoftmax, y, y)
    }

    /// Computes the gradient through log-softmax, from its output `y`.
    ///
    /// ```
    /// # use xent::Softmax;
    /// let y = [0.5f64.ln(); 2];
    /// let mut grad = [1f64, 0.0];
    /// Softmax::new(1, 2).log_softmax_backward_in_place(&y, &mut grad)?;
    /// assert!((grad[0] - 0.5).abs() < 1e-12 && (grad[1] + 0.5).abs() < 1e-12);
    /// # Ok::<(), xent::Error>(())
    /// ```
    pub fn log_softmax_backward<'b, 'c, 'd>(
        &self,
        y: impl Into<Input<'b>>,
        grad_y: impl Into<Input<'c>>,
        grad_x: impl Into<Output<'d>>,
    ) -> Result<(), Error> {
        let (y, grad_y) = (y.into().operand, grad_y.into().operand);
        self.run(Function::LogSoftmaxBackward, y, grad_y, grad_x.into().operand)
    }

    /// As [`log_softmax_backward`](Self::log_softmax_backward); `grad` holds grad_y and becomes
    /// grad_x.
    pub fn log_softmax_backward_in_place<'b, 'c>(
        &self,
        y: impl Into<Input<'b>>,
        grad: impl Into<Output<'c>>,
    ) -> Result<(), Error> {
        let grad = grad.into().operand;
        self.run(Function::LogSoftmaxBackward, y.into().operand, grad, grad)
    }

    /// As [`log_softmax_backward`](Self::log_softmax_backward); `y` becomes grad_x.
    pub fn log_softmax_backward_over<'b, 'c>(
        &self,
        y: impl Into<Output<'b>>,
        grad_y: impl Into<Input<'c>>,
    ) -> Result<(), Error> {
        let y = y.into().operand;
        self.run(Function::LogSoftmaxBackward, y, grad_y.into().operand, y)
    }

    fn forward(&self, function: Function, x: Operand, y: Operand) -> Result<(), Error> {
        self.run(function, x, Operand::ABSENT, y)
    }

    fn run(
        &self,
        function: Function,
        input: Operand,
        grad: Operand,
        output: Operand,
    ) -> Result<(), Error> {
        let problem = Problem { function, shape: self.shape, input, grad, output };
        let team =
            Team { pool: self.pool.and_then(PoolRef::rayon), threads: self.threads as usize };
        // SAFETY: every operand is memory that the call borrows, mutably if it is the output. Validation
        // refuses shapes and strides that reach past the `available` elements of a slice or an array;
        // whoever made an operand of a pointer vouched for its elements. Validation also refuses to read
        // what is not initialised.
        unsafe { run::softmax(&problem, &team, self.isa) }
    }
}
