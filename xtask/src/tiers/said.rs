// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the tests that failed said, taken out of a harness's output as it comes: the panic's text of each, so that the end
//! of a long run says why, and not only that.

use std::collections::VecDeque;

/// So many lines of what a test said are kept: from its first panic on, or its last.
pub(crate) const LINES: usize = 20;

/// A longer line (two big values that are not equal) is cut here, in characters.
const WIDTH: usize = 400;

/// What one test said.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Said {
    pub(crate) test: String,
    pub(crate) lines: Vec<String>,
}

/// Reads a harness's output line by line.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// Behind `failures:`; what tests that passed said (`--show-output`) is not behind that.
    failures: bool,
    /// Whether the block that is read has come to a panic.
    panicked: bool,
    found: Vec<(String, VecDeque<String>)>,
    /// In a block of `found`'s last.
    inside: bool,
    last: VecDeque<String>,
}

impl Reader {
    /// Takes in a line.
    pub(crate) fn line(&mut self, line: &str) {
        let line = cut(line.trim_end());
        push(&mut self.last, line.clone());
        match line.as_str() {
            "failures:" => (self.failures, self.inside) = (true, false),
            "successes:" => (self.failures, self.inside) = (false, false),
            line if line.starts_with("test result: ") => {
                (self.failures, self.inside) = (false, false);
            }
            _ if !self.failures => {}
            line => match head(line) {
                Some(test) => {
                    self.found.push((test.to_owned(), VecDeque::new()));
                    (self.inside, self.panicked) = (true, false);
                }
                None if self.inside => self.inside(line),
                None => {}
            },
        }
    }

    fn inside(&mut self, line: &str) {
        let Some((_, lines)) = self.found.last_mut() else {
            return;
        };
        if !self.panicked && line.starts_with("thread '") && line.contains(" panicked at ") {
            // The first is the cause: others panic because of it.
            self.panicked = true;
            lines.clear();
        }
        match self.panicked {
            true if is_noise(line) => {}
            true if lines.len() < LINES => lines.push_back(line.to_owned()),
            true => {}
            false => push(lines, line.to_owned()),
        }
    }

    /// What was said by each that failed; and by a program that was ended before it could tell, its last lines.
    pub(crate) fn end(self, ended: bool) -> Vec<Said> {
        let mut found = self.found;
        if ended {
            found.push(("its last lines".to_owned(), self.last));
        }
        found
            .into_iter()
            .map(|(test, lines)| {
                let mut lines = Vec::from(lines);
                while lines.last().is_some_and(|line| line.is_empty()) {
                    lines.pop();
                }
                Said { test, lines }
            })
            .collect()
    }
}

/// The test of which a block's first line is this.
fn head(line: &str) -> Option<&str> {
    let name = line.strip_prefix("---- ")?;
    name.strip_suffix(" stdout ----")
}

/// Of a backtrace (`RUST_BACKTRACE`) what is the library's, by which a panic comes about.
fn is_noise(line: &str) -> bool {
    let line = line.trim_start();
    let library = [
        "core::", "std::", "alloc::", "test::", "__rust", "<core::", "<alloc::",
    ];
    let frame = line.split_once(": ").filter(|(number, _)| {
        !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
    });
    match frame {
        Some((_, name)) => library.iter().any(|of| name.starts_with(of)),
        None => line.starts_with("at /rustc/") || line == "stack backtrace:",
    }
}

fn push(lines: &mut VecDeque<String>, line: String) {
    if lines.len() == LINES {
        lines.pop_front();
    }
    lines.push_back(line);
}

fn cut(line: &str) -> String {
    match line.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or_default()),
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Reader {
        let mut reader = Reader::default();
        text.lines().for_each(|line| reader.line(line));
        reader
    }

    #[test]
    fn of_each_test_that_failed_the_panic_is_kept_and_nothing_of_those_that_passed() {
        let text = "\
test a ... ok
test b ... FAILED
test m::c ... FAILED

successes:

---- a stdout ----
thread 'a' (7) panicked at src/lib.rs:1:2:
which was wanted

successes:
    a

failures:

---- b stdout ----
a guest that was started again
thread 'b' (8) panicked at src/lib.rs:9:9:
assertion `left == right` failed
  left: 1
 right: 2
stack backtrace:
   0: __rustc::rust_begin_unwind
             at /rustc/5980/library/std/src/panicking.rs:689:5
   3: core::panicking::assert_failed::<i32, i32>
  11: m::helper
             at ./src/lib.rs:9:9
thread 'b' (8) panicked at src/lib.rs:10:9:
and its follower

---- m::c stdout ----
Error: \"no panic\"


failures:
    b
    m::c

test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        let said = read(text).end(false);
        let of = |test: &str, lines: &[&str]| Said {
            test: test.into(),
            lines: lines.iter().map(|line| (*line).to_owned()).collect(),
        };
        let b = [
            "thread 'b' (8) panicked at src/lib.rs:9:9:",
            "assertion `left == right` failed",
            "  left: 1",
            " right: 2",
            "  11: m::helper",
            "             at ./src/lib.rs:9:9",
            "thread 'b' (8) panicked at src/lib.rs:10:9:",
            "and its follower",
        ];
        assert_eq!(said, [of("b", &b), of("m::c", &["Error: \"no panic\""])]);
    }

    #[test]
    fn so_many_lines_are_kept_from_the_panic_on_or_the_last_ones_and_none_is_endless() {
        let many: String = (0..50).map(|n| format!("line {n}\n")).collect();
        let panic = "thread 'x' (1) panicked at a.rs:1:1:\n";
        let block = |inside: &str| {
            let text = format!("failures:\n\n---- x stdout ----\n{inside}");
            read(&text).end(false).remove(0).lines
        };
        let lines = block(&format!("{many}{panic}{many}"));
        assert_eq!((lines.len(), lines[1].as_str()), (LINES, "line 0"));
        let lines = block(&many);
        assert_eq!((lines.len(), lines[LINES - 1].as_str()), (LINES, "line 49"));
        let long = block(&"ä".repeat(10_000)).remove(0);
        assert_eq!(long.chars().count(), WIDTH + 1);
        // A program that is ended says nothing of its tests; what it was at is in its last lines.
        let said = read(&format!("{many}test hangs ... ")).end(true);
        assert_eq!(said.len(), 1);
        assert_eq!(said[0].lines.len(), LINES);
        assert_eq!(said[0].lines.last().unwrap(), "test hangs ...");
    }
}
