//! The protocol of peers/README.md, for peers in Rust, and their inputs.

use std::io::{BufRead, Write};
use std::time::Instant;

/// One problem.
#[derive(Clone, Copy, PartialEq)]
pub struct Task {
    pub rows: usize,
    pub classes: usize,
    pub bf16: bool,
    pub backward: bool,
}

impl Task {
    /// The logits that every peer has.
    pub fn logits(&self) -> Vec<f32> {
        let logit = |i: usize| {
            let mut h = (i as u32).wrapping_mul(2_654_435_761).wrapping_add(12_345);
            h ^= h >> 15;
            h = h.wrapping_mul(2_246_822_519);
            h ^= h >> 13;
            (f64::from(h) * (12.0 / 4_294_967_296.0) - 6.0) as f32
        };
        (0..self.rows * self.classes).map(logit).collect()
    }

    pub fn targets(&self) -> Vec<i64> {
        (0..self.rows).map(|row| (row * 7919 % self.classes) as i64).collect()
    }
}

/// A step that computes the loss; it is timed.
pub type Step = Box<dyn FnMut() -> Result<f64, String>>;

/// Answers requests until standard input ends.
pub fn serve(version: &str, prepare: impl Fn(Task) -> Result<Step, String>) {
    let say = |text: String| {
        println!("{text}");
        std::io::stdout().flush().expect("somebody listens");
    };
    say(format!("ready {version}"));
    // Of one problem, with and without backward.
    let mut prepared: Vec<(Task, Step)> = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("text");
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, rows, classes, dtype, kind, budget] = words[..] else {
            return say(format!("absent not understood: {line}"));
        };
        if kind == "in-place" {
            say("absent nothing in place".to_string());
            continue;
        }
        let number = |text: &str| text.parse::<usize>().expect("a number");
        let budget: f64 = budget.parse().expect("seconds");
        let task = Task {
            rows: number(rows),
            classes: number(classes),
            bf16: dtype == "bf16",
            backward: kind == "both",
        };
        let outcome = (|| {
            prepared.retain(|(known, _)| Task { backward: known.backward, ..task } == *known);
            if !prepared.iter().any(|(known, _)| *known == task) {
                let mut step = prepare(task)?;
                step()?;
                prepared.push((task, step));
            }
            let found = prepared.iter_mut().find(|(known, _)| *known == task);
            let (_, step) = found.expect("just prepared");
            let (begin, mut best, mut loss) = (Instant::now(), f64::INFINITY, 0.0);
            while best.is_infinite() || begin.elapsed().as_secs_f64() < budget {
                let start = Instant::now();
                loss = step()?;
                best = best.min(start.elapsed().as_secs_f64());
            }
            Ok::<String, String>(format!("{best:e} {loss:e}"))
        })();
        say(outcome.unwrap_or_else(|error| format!("absent {}", error.replace('\n', " "))));
    }
}
