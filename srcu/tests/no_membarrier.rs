// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where `membarrier(2)` is refused: from the start, which costs readers a fence, and later, which ends the process
//! rather than free memory under a reader. Each case is a process of its own: this program, started again.

#![cfg(all(target_os = "linux", not(loom), not(miri)))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use srcu::Published;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::thread;

const CASE: &str = "SRCU_TEST_CASE";

/// From now on `membarrier` answers `errno` in this thread and those that it starts.
fn forbid_membarrier(errno: i32) {
    let instruction = |code: u32, jump_true, jump_false, k| libc::sock_filter {
        code: code as u16,
        jt: jump_true,
        jf: jump_false,
        k,
    };
    let mut program = [
        // The number of the call is the first word of what the filter sees.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            libc::SYS_membarrier as u32,
        ),
        instruction(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | errno as u32,
        ),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: integers.
    let privileges = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: the program lives for the call, and its length is right.
    let installed =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) };
    assert_eq!((privileges, installed), (0, 0));
}

/// Runs `test` again, alone, with `case` set.
fn again(test: &str, case: i32) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CASE, case.to_string())
        .output()
        .unwrap()
}

fn case() -> Option<i32> {
    std::env::var(CASE).ok().map(|case| case.parse().unwrap())
}

fn readers_and_a_writer() {
    let published = Published::new(Box::new(0));
    thread::scope(|scope| {
        for _ in 0..2 {
            let mut reader = published.reader();
            scope.spawn(move || {
                let mut last = 0;
                while last < 2_000 {
                    let guard = reader.enter();
                    assert!(**guard >= last);
                    last = **guard;
                }
            });
        }
        for round in 1..=2_000 {
            published.publish(Box::new(round)).wait();
        }
    });
}

#[test]
fn a_refusal_from_the_start_is_answered_with_fences() {
    let Some(errno) = case() else {
        for errno in [libc::ENOSYS, libc::EPERM, libc::EINVAL] {
            let output = again("a_refusal_from_the_start_is_answered_with_fences", errno);
            assert!(output.status.success(), "errno {errno}: {output:?}");
        }
        return;
    };
    forbid_membarrier(errno);
    assert!(!srcu::prepare());
    readers_and_a_writer();
}

#[test]
fn a_refusal_later_on_stops_the_process_and_not_a_table_with_fences() {
    const TEST: &str = "a_refusal_later_on_stops_the_process_and_not_a_table_with_fences";
    let Some(fenced) = case() else {
        if !srcu::prepare() {
            println!("this host has no membarrier to refuse");
            return;
        }
        assert!(again(TEST, 1).status.success());
        let output = again(TEST, 0);
        assert_eq!(output.status.signal(), Some(libc::SIGABRT));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("membarrier(2)"), "{said}");
        return;
    };
    assert!(srcu::prepare());
    let published = if fenced == 1 {
        Published::with_fences(0)
    } else {
        Published::new(0)
    };
    forbid_membarrier(libc::EPERM);
    published.publish(1).wait();
}
