//! A test's process, which a mutant may keep from ever ending.

use crate::tool::Result;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Passed,
    Failed,
    /// It did not end.
    Stuck,
}

/// What waits for something that never comes does no work for so long, while it is let to. The machine
/// may be busy otherwise.
const WAIT: Duration = Duration::from_secs(30);

/// Seconds of work so far, and whether somebody stopped it; none where that cannot be told.
fn work(child: &Child) -> Option<(f64, bool)> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).ok()?;
    // After the name in parentheses: the 12th and 13th are user and system time, in 1/100 s.
    let (_, rest) = stat.rsplit_once(')')?;
    let ticks = rest.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<f64>().ok());
    Some((ticks.sum::<f64>() / 100.0, rest.trim_start().starts_with('T')))
}

/// Runs a test that takes so many seconds of work.
pub fn run(command: &mut Command, seconds: f64) -> Result<Outcome> {
    Ok(timed(command, seconds)?.0)
}

/// The same, and what it took.
pub fn timed(command: &mut Command, seconds: f64) -> Result<(Outcome, f64)> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().map_err(
            |error| format!("cannot start {}: {error}", command.get_program().display()),
        )?;
    let most = 10.0 * seconds + 2.0;
    let mut worked = 0.0;
    // Counted by the pauses below, since all of it may be stopped for longer.
    let mut idle = Duration::ZERO;
    let mut pause = Duration::from_millis(1);
    loop {
        // Before it is waited for: what has ended has no times any more.
        let (now, is_stopped) = work(&child).unwrap_or((worked, false));
        let ended = child.try_wait().map_err(|error| format!("cannot wait: {error}"))?;
        if let Some(status) = ended {
            let outcome = if status.success() { Outcome::Passed } else { Outcome::Failed };
            return Ok((outcome, worked.max(now)));
        }
        if now > worked {
            (worked, idle) = (now, Duration::ZERO);
        }
        if worked > most || idle > WAIT {
            // Its own exit is not waited for in vain: it is killed, whatever it does.
            let _ = child.kill();
            let _ = child.wait();
            return Ok((Outcome::Stuck, worked));
        }
        std::thread::sleep(pause);
        idle += if is_stopped { Duration::ZERO } else { pause };
        pause = (pause * 5 / 4).min(Duration::from_millis(20));
    }
}
