//! The figures of a run: printed line by line, and written to a file from which pictures are drawn.

use super::call::{Call, Shape};
use super::machine;
use super::scalar::Scalar;
use std::fs::File;
use std::io::Write;
use xent::Isa;

/// The target of a figure.
#[derive(Clone, Copy)]
pub enum Target {
    /// The figure has no target.
    None,
    AtLeast(f64),
    AtMost(f64),
    /// At least so many Gelement/s.
    Rate(f64),
}

impl Target {
    fn verdict(self, value: f64) -> [String; 2] {
        let (text, reached) = match self {
            Target::None => return [String::new(), String::new()],
            Target::AtLeast(least) => (format!(">= {least:.2}"), value >= least),
            Target::AtMost(most) => (format!("<= {most:.2}"), value <= most),
            Target::Rate(least) => (format!(">= {least:.1} G/s"), value >= least),
        };
        [text, if reached { "pass" } else { "falls short" }.to_string()]
    }
}

/// A table on the terminal and in a file.
pub struct Record {
    file: Option<File>,
    passed: usize,
    short: usize,
}

/// Of the file; the table on the terminal has the same.
const COLUMNS: [&str; 10] =
    ["what", "dtype", "shape", "classes", "set", "threads", "gelements", "ratio", "of", "target"];

impl Record {
    /// Prints the machine, and the head of the table.
    pub fn new(path: &Option<String>, threads: u32, mib: usize) -> Self {
        let mut record = Record { file: None, passed: 0, short: 0 };
        if let Some(path) = path {
            record.file = Some(File::create(path).expect("a file that can be written"));
        }
        record.comment(&format!("machine: {}, {threads} threads", machine::processor()));
        record.comment(&format!("date: {}", machine::date()));
        record.comment(&format!("logits: {mib} MiB unless the shape says otherwise"));
        record.comment("gelements: 1e9 logits a second; ratio: to the rate of what `of` names");
        record.write(&(COLUMNS.join(",") + ",verdict"));
        println!(
            "{:<17} {:<5} {:<15} {:<8} {:>7}  {:>9}  {:>6}    {:<11} {:<11}",
            "call", "dtype", "shape", "set", "threads", "Gelem/s", "ratio", "of", "target"
        );
        record
    }

    fn comment(&mut self, text: &str) {
        println!("{text}");
        self.write(&format!("# {text}"));
    }

    fn write(&mut self, line: &str) {
        if let Some(file) = &mut self.file {
            writeln!(file, "{line}").expect("a file that can be written");
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a line of the table")]
    fn line(
        &mut self,
        what: &str,
        dtype: &str,
        shape: Shape,
        isa: &str,
        threads: u32,
        rate: f64,
        ratio: f64,
        of: &str,
        [target, verdict]: [String; 2],
    ) {
        match verdict.as_str() {
            "pass" => self.passed += 1,
            "" => {}
            _ => self.short += 1,
        }
        let or_nothing = |x: f64, text: String| if x.is_finite() { text } else { String::new() };
        let rate_text = or_nothing(rate, format!("{rate:.3}"));
        let ratio_text = or_nothing(ratio, format!("{ratio:.3}"));
        let beside = if of.is_empty() { String::new() } else { format!("of {of}") };
        let line = format!(
            "{what:<17} {dtype:<5} {:<15} {isa:<8} {threads:>7}  {rate_text:>9}  {ratio_text:>6} {beside:<14} {target:<11} {verdict}",
            shape.to_string(),
        );
        println!("{}", line.trim_end());
        self.write(&format!(
            "{what},{dtype},{shape},{},{isa},{threads},{rate_text},{ratio_text},{of},{target},{verdict}",
            shape.classes
        ));
    }

    /// A limit of the machine.
    pub fn limit(&mut self, name: &str, shape: Shape, threads: u32, rate: f64) {
        let none = Target::None.verdict(0.0);
        self.line(&format!("limit-{name}"), "f32", shape, "", threads, rate, f64::NAN, "", none);
    }

    /// A call's rate, as a ratio to another's.
    #[expect(clippy::too_many_arguments, reason = "a line of the table")]
    pub fn ratio<T: Scalar>(
        &mut self,
        call: Call,
        shape: Shape,
        isa: Isa,
        threads: u32,
        rate: f64,
        ratio: f64,
        of: &str,
        target: Target,
    ) {
        let verdict = target.verdict(ratio);
        self.line(call.name(), T::NAME, shape, isa.name(), threads, rate, ratio, of, verdict);
    }

    /// A call's rate by itself.
    pub fn rate<T: Scalar>(
        &mut self,
        call: Call,
        shape: Shape,
        isa: Isa,
        threads: u32,
        rate: f64,
        target: Target,
    ) {
        let verdict = target.verdict(rate);
        self.line(call.name(), T::NAME, shape, isa.name(), threads, rate, f64::NAN, "", verdict);
    }

    /// The slowest element of several sizes by the fastest.
    pub fn growth<T: Scalar>(
        &mut self,
        call: Call,
        largest: Shape,
        isa: Isa,
        threads: u32,
        ratio: f64,
        target: Target,
    ) {
        let (what, verdict) = (format!("growth-{}", call.name()), target.verdict(ratio));
        let of = "its fastest";
        self.line(&what, T::NAME, largest, isa.name(), threads, f64::NAN, ratio, of, verdict);
    }

    /// Bytes on the heap during a call: rayon's queues, at most, whatever the size.
    pub fn heap(&mut self, call: Call, shape: Shape, isa: Isa, threads: u32, bytes: usize) {
        let what = format!("heap-{}", call.name());
        let verdict = if bytes <= 64 << 10 { "pass" } else { "falls short" };
        let verdict = ["<= 65536 B".to_string(), verdict.to_string()];
        let of = format!("{bytes} B");
        self.line(&what, "f32", shape, isa.name(), threads, f64::NAN, f64::NAN, &of, verdict);
    }

    /// Says how many targets were reached.
    pub fn close(self) {
        println!("{} pass, {} fall short", self.passed, self.short);
    }
}
