//! Every call of a valid problem on every instruction set, against the oracle.

use crate::bytes::Bytes;
use crate::draw::{self, Limits};
use crate::source;
use arbitrary::{Arbitrary, Result, Unstructured};
use common::task::{Answer, Task, assert_all_same};
use common::task_bounds::{Judge, check_answers};
use common::{How, isas};
use std::fmt;

/// A problem, and its number of threads.
pub struct Input {
    task: Task,
    threads: u32,
}

const LIMITS: Limits = Limits { usual: 400, many: 6000 };

impl<'a> Arbitrary<'a> for Input {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let data = u.bytes(u.len())?;
        let bytes = &mut Bytes::new(data);
        let threads = 1 + bytes.below(3) as u32;
        Ok(Input { task: draw::task(bytes, LIMITS), threads })
    }
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        source::task(f, &self.task)
    }
}

impl Input {
    /// Every result of a call is within its bound of the oracle's, the call writes nothing else, and all
    /// sets give the same bits.
    pub fn check(&self) {
        let judge = Judge::new(&self.task);
        let mut others: Option<Vec<(&str, Answer)>> = None;
        for isa in isas() {
            let how = How { threads: self.threads, ..How::on(isa) };
            let answers = self.task.run_all(&how);
            check_answers(&judge, &answers);
            match &others {
                None => others = Some(answers),
                Some(others) => assert_all_same(&answers, others, isa.name()),
            }
        }
    }
}
