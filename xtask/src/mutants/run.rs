//! Puts each mutant to the tests that meet it.

use super::Site;
use super::process::Outcome;
use super::programs::Test;
use super::results::{Results, Verdict};
use crate::tool::Result;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

pub fn all(tree: &Path, sites: &[Site], results: &Results, tests: &[Test], budget: f64) -> Result {
    let all: f64 = tests.iter().map(|test| test.seconds).sum();
    println!("{} tests, {all:.1} s without a mutant", tests.len());
    let mut slowest: Vec<&Test> = tests.iter().collect();
    slowest.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    for test in &slowest[..slowest.len().min(8)] {
        println!("  {:5.1} s {}", test.seconds, test.name);
    }
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(Ok(()));
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get().min(2));
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(site) = sites.get(index) else { return };
                    let own = site.unit_tests();
                    let done = verdict(tree, tests, index + 1, &own, budget).and_then(|verdict| {
                        println!("{}: {}:{}: {}", verdict.text(), site.file, site.line, site.what);
                        results.add(site, verdict)
                    });
                    if done.is_err() {
                        *failure.lock().expect("not poisoned") = done;
                        return;
                    }
                }
            });
        }
    });
    failure.into_inner().expect("not poisoned")
}

fn verdict(tree: &Path, tests: &[Test], number: usize, own: &str, budget: f64) -> Result<Verdict> {
    let mut meeting: Vec<&Test> = tests.iter().filter(|test| test.met.contains(&number)).collect();
    if meeting.is_empty() {
        return Ok(Verdict::NotMet);
    }
    // The file's own unit tests first.
    let key = |test: &Test| (!test.name.contains(own), test.price());
    meeting.sort_by(|a, b| {
        let ((a_is_other, a), (b_is_other, b)) = (key(a), key(b));
        a_is_other.cmp(&b_is_other).then(a.total_cmp(&b))
    });
    let mut seconds = 0.0;
    for test in meeting {
        // What is too long for the rest may leave time for others.
        if seconds + test.seconds > budget {
            continue;
        }
        seconds += test.seconds;
        let name = match test.outcome(tree, number)? {
            Outcome::Passed => continue,
            Outcome::Failed => test.name.clone(),
            Outcome::Stuck => format!("{}, which does not end", test.name),
        };
        test.caught.fetch_add(1, Ordering::Relaxed);
        return Ok(Verdict::Caught(name));
    }
    Ok(Verdict::Survives)
}
