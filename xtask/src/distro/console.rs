// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A conversation with a system's serial console: waits for what it says, types, and reads the answers of a shell.

use std::io::{Read, Write};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::failure::{Context, Failure, Result};

/// How much of what was said is kept for whoever waits.
const KEPT: usize = 64 << 10;

/// The console's two directions.
pub(super) struct Console {
    typed: Box<dyn Write + Send>,
    said: mpsc::Receiver<Vec<u8>>,
    /// What was said and not waited for yet.
    pending: Vec<u8>,
    commands: u32,
}

impl Console {
    /// A console that is typed into by `typed` and heard from `said`, all of which goes to `shown` as well.
    pub(super) fn new(
        typed: impl Write + Send + 'static,
        mut said: impl Read + Send + 'static,
        mut shown: impl Write + Send + 'static,
    ) -> Console {
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = said.read(&mut buffer) {
                let _ = shown.write_all(&buffer[..n]).and_then(|()| shown.flush()); // a closed stdout stops nothing
                if sender.send(buffer[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Console {
            typed: Box::new(typed),
            said: receiver,
            pending: Vec::new(),
            commands: 0,
        }
    }

    /// Logs in as root and leaves a shell that neither echoes nor prompts.
    pub(super) fn log_in(&mut self, patience: Duration) -> Result<()> {
        self.wait_for("login: ", patience)?;
        self.type_in("root\n")?;
        self.wait_for("# ", patience)?;
        // A plainer shell than the login's, whose editing of lines is for people. The mark that is waited for is not
        // in what is typed, for that is still echoed.
        self.type_in("exec sh\n")?;
        self.wait_for("# ", patience)?;
        self.type_in("stty -echo; PS1=; export SYSTEMD_COLORS=0; echo logged-in-$((6 * 7))\n")?;
        self.wait_for("logged-in-42\r\n", patience)?;
        Ok(())
    }

    /// Runs a command in that shell; its exit status and what it wrote.
    pub(super) fn run(&mut self, command: &str, patience: Duration) -> Result<(i32, String)> {
        self.commands += 1;
        let mark = format!("status of {}: ", self.commands);
        // Together one line: a command that reads its stdin must not read the question.
        self.type_in(&format!("{command} </dev/null 2>&1; echo \"{mark}$?\"\n"))?;
        let answer = self.wait_for(&mark, patience)?;
        let status = self.wait_for("\r\n", patience)?;
        let status = status
            .trim()
            .parse()
            .context(|| format!("{command} ended with {status:?}"))?;
        Ok((status, answer.replace("\r\n", "\n")))
    }

    /// Powers off, and waits until the console is closed.
    pub(super) fn power_off(&mut self, patience: Duration) -> Result<()> {
        self.type_in("systemctl poweroff\n")?;
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.said.recv_timeout(left) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Failure::new(format!(
                        "the guest has not powered off within {} s",
                        patience.as_secs()
                    )));
                }
            }
        }
    }

    fn type_in(&mut self, text: &str) -> Result<()> {
        self.typed
            .write_all(text.as_bytes())
            .and_then(|()| self.typed.flush())
            .context(|| "the console takes no more".into())
    }

    /// Waits until `mark` has been said; what was said before it.
    fn wait_for(&mut self, mark: &str, patience: Duration) -> Result<String> {
        let deadline = Instant::now() + patience;
        let mark_bytes = mark.as_bytes();
        loop {
            let found = self
                .pending
                .windows(mark_bytes.len())
                .position(|window| window == mark_bytes);
            if let Some(at) = found {
                let rest = self.pending.split_off(at + mark_bytes.len());
                let mut before = std::mem::replace(&mut self.pending, rest);
                before.truncate(at);
                return Ok(String::from_utf8_lossy(&before).into_owned());
            }
            let surplus = self.pending.len().saturating_sub(KEPT);
            self.pending.drain(..surplus);
            let left = deadline.saturating_duration_since(Instant::now());
            let what = match self.said.recv_timeout(left) {
                Ok(bytes) => {
                    self.pending.extend(bytes);
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => format!("within {} s", patience.as_secs()),
                Err(RecvTimeoutError::Disconnected) => "before its end".to_owned(),
            };
            return Err(Failure::new(format!(
                "the guest's console did not say {mark:?} {what}; it said last:\n{}",
                self.last_lines()
            )));
        }
    }

    fn last_lines(&self) -> String {
        let text = String::from_utf8_lossy(&self.pending);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::os::unix::net::UnixStream;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// A console whose other end is `answers`: what is said, each once its line has been typed.
    fn console(answers: &'static [(&str, &str)]) -> Console {
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            use std::io::BufRead;
            let mut lines = io::BufReader::new(theirs.try_clone().unwrap()).lines();
            for (typed, said) in answers {
                if !typed.is_empty() {
                    assert_eq!(lines.next().unwrap().unwrap(), *typed);
                }
                (&theirs).write_all(said.as_bytes()).unwrap();
            }
        });
        Console::new(ours.try_clone().unwrap(), ours, io::sink())
    }

    #[test]
    fn a_login_and_commands_get_their_answers_and_statuses() {
        let mut console = console(&[
            (
                "",
                "[ OK ] all well\r\nDebian guest ttyS0\r\n\r\nguest login: ",
            ),
            ("root", "root\r\nroot@guest:~# "),
            ("exec sh", "exec sh\r\n# "),
            (
                "stty -echo; PS1=; export SYSTEMD_COLORS=0; echo logged-in-$((6 * 7))",
                "stty -echo; PS1=; export SYSTEMD_COLORS=0; echo logged-in-$((6 * 7))\r\nlogged-in-42\r\n",
            ),
            (
                "lsblk </dev/null 2>&1; echo \"status of 1: $?\"",
                "vda 2G\r\nvdb 1G\r\nstatus of 1: 0\r\n",
            ),
            (
                "false </dev/null 2>&1; echo \"status of 2: $?\"",
                "status of 2: 1\r\n",
            ),
            ("systemctl poweroff", "Power down\r\n"),
        ]);
        console.log_in(PATIENCE).unwrap();
        let lsblk = console.run("lsblk", PATIENCE).unwrap();
        assert_eq!(lsblk, (0, "vda 2G\nvdb 1G\n".to_owned()));
        assert_eq!(console.run("false", PATIENCE).unwrap().0, 1);
        console.power_off(PATIENCE).unwrap();
    }

    #[test]
    fn a_console_that_ends_early_is_told_with_what_it_said() {
        let mut console = console(&[("", "Kernel panic\r\n")]);
        let failure = console.log_in(PATIENCE).unwrap_err().to_string();
        assert!(
            failure.contains("login: ") && failure.contains("Kernel panic"),
            "{failure}"
        );
    }

    #[test]
    fn a_console_that_is_silent_is_given_up() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut console = Console::new(io::sink(), ours, io::sink());
        let failure = console.log_in(Duration::ZERO).unwrap_err().to_string();
        assert!(failure.contains("within 0 s"), "{failure}");
    }
}
