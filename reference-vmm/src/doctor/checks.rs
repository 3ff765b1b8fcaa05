// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Running the trials: each on a thread of its own, with a limit, for a verdict.

use std::error::Error;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::trials::{TRIALS, Trial};

/// What a check may take at most; what takes longer is left behind.
pub(super) const LIMIT: Duration = Duration::from_secs(20);

/// What came of a check.
#[derive(Debug)]
pub enum Verdict {
    /// It does what it should.
    Ok {
        /// What it took, in microseconds.
        micros: f64,
    },
    /// It does not; why.
    Failed(String),
    /// It could not be tried; why.
    Unavailable(String),
}

impl Verdict {
    /// One word for programs.
    pub fn name(&self) -> &'static str {
        match self {
            Verdict::Ok { .. } => "ok",
            Verdict::Failed(_) => "failed",
            Verdict::Unavailable(_) => "unavailable",
        }
    }
}

/// One check.
#[derive(Debug)]
pub struct Check {
    /// The crate that it goes through.
    pub tries: &'static str,
    /// Its name.
    pub name: &'static str,
    /// What its time is the time of.
    pub measured: &'static str,
    /// What came of it.
    pub verdict: Verdict,
}

/// Why a check has no time to show.
pub(super) enum Trouble {
    Failed(String),
    Unavailable(String),
}

/// Any error is a failure, with its causes.
impl<E: Error> From<E> for Trouble {
    fn from(error: E) -> Self {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let cause_text = cause.to_string();
            if !text.ends_with(&cause_text) {
                text = format!("{text}: {cause_text}");
            }
            source = cause.source();
        }
        Trouble::Failed(text)
    }
}

pub(super) type Checked = Result<Duration, Trouble>;

pub(super) fn run_all(kvm_path: &Path) -> Vec<Check> {
    let mut hung = false;
    let mut check = |trial: &Trial| {
        let verdict = if hung {
            Verdict::Unavailable("not tried: an earlier check hangs".into())
        } else {
            limited(kvm_path, LIMIT, trial.run).unwrap_or_else(|| {
                hung = true;
                Verdict::Failed(format!("it did not come back in {LIMIT:?}"))
            })
        };
        let (tries, name, measured) = (trial.tries, trial.name, trial.measured);
        Check {
            tries,
            name,
            measured,
            verdict,
        }
    };
    TRIALS.iter().map(&mut check).collect()
}

/// Runs a check on a thread of its own; `None` where it does not come back in time.
fn limited(kvm_path: &Path, limit: Duration, check: fn(&Path) -> Checked) -> Option<Verdict> {
    let (send, done) = mpsc::channel();
    let path = kvm_path.to_owned();
    let spawned = thread::Builder::new().name("doctor".into()).spawn(move || {
        // Nobody listens where it took too long.
        let _ = send.send(check(&path));
    });
    if let Err(error) = spawned {
        return Some(Verdict::Failed(format!("no thread for it: {error}")));
    }
    Some(match done.recv_timeout(limit) {
        Ok(Ok(time)) => Verdict::Ok {
            micros: time.as_nanos() as f64 / 1000.0,
        },
        Ok(Err(Trouble::Failed(why))) => Verdict::Failed(why),
        Ok(Err(Trouble::Unavailable(why))) => Verdict::Unavailable(why),
        Err(mpsc::RecvTimeoutError::Timeout) => return None,
        Err(mpsc::RecvTimeoutError::Disconnected) => Verdict::Failed("the check panicked".into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_that_does_not_come_back_is_left_behind() {
        let (path, limit) = (Path::new("/"), Duration::from_millis(20));
        let hang = |_: &Path| -> Checked {
            thread::park();
            Ok(Duration::ZERO)
        };
        assert!(limited(path, limit, hang).is_none());
        let panic = |_: &Path| -> Checked { panic!("on purpose") };
        let verdict = limited(path, Duration::from_secs(10), panic);
        assert!(matches!(verdict, Some(Verdict::Failed(why)) if why.contains("panicked")));
    }

    #[test]
    fn without_kvm_every_check_fails_with_the_reason_and_none_hangs() {
        for check in run_all(Path::new("/no/such/kvm")) {
            match check.verdict {
                Verdict::Failed(why) => assert!(why.contains("/no/such/kvm"), "{why}"),
                other => panic!("{}: {other:?}", check.name),
            }
        }
    }
}
