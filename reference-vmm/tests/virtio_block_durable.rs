// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a flush and an answer are worth: the order of calls to the host, and a monitor that is killed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/disk.rs"]
mod disk;

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write as _};
use std::process::{Command, Stdio};

use disk::*;
use reference_vmm::devices::virtio::block::{DiskConfig, Image, Io, OpenError};

#[test]
fn a_flush_is_answered_after_a_sync_that_began_after_every_write_that_was_answered_before_it() {
    for io in engines() {
        let file = image(1 << 20);
        let host = Host::new(|_| Fate::Pass);
        let one = DiskConfig {
            queues: 2,
            ..config(file.path(), io)
        };
        let mut driver = driver(host.disk(&one, 8));
        for round in 0..20u64 {
            // Some on each queue, answered before the flush, and some that nobody has waited for.
            let mut answered = HashSet::new();
            for queue in 0..2u64 {
                let sector = round * 64 + queue * 8;
                let head = header(OUT, sector);
                assert_eq!(
                    ask(&mut driver, queue as usize, &[&head, &[1; 512]], &[]).status,
                    OK
                );
                answered.insert(format!("Write {{ through: false }} {}+512", sector * 512));
            }
            let late = driver.request(1, &[&header(OUT, round * 64 + 32), &[2; 512]], &[1]);
            driver.notify(1);
            let flush = driver.request(0, &[&header(FLUSH, 0)], &[1]);
            driver.notify(0);
            assert_eq!(driver.used(0).0, flush.head);
            let log = host.log();
            let begun = log
                .iter()
                .rposition(|(begun, text)| *begun && text.starts_with("Sync"))
                .unwrap();
            let done = log
                .iter()
                .rposition(|(begun, text)| !*begun && text.starts_with("Sync"))
                .unwrap();
            assert!(begun < done);
            for (at, (is_begin, text)) in log.iter().enumerate() {
                if !is_begin && answered.remove(text) {
                    assert!(at < begun, "{text} was done behind the sync");
                }
            }
            assert!(answered.is_empty(), "{answered:?} {log:?}");
            assert_eq!(driver.used(1).0, late.head);
        }
    }
}

/// In the child: writes record after record, flushes, and says so, until it is killed.
const ROLE: &str = "BLOCK_DURABLE_CHILD";

#[test]
fn each_write_that_was_flushed_before_the_monitor_was_killed_is_in_the_image() {
    if let Ok(role) = std::env::var(ROLE) {
        let (io, path) = role.split_once(' ').unwrap();
        let io = if io == "uring" {
            Io::Uring
        } else {
            Io::Threads
        };
        let mut driver = driver(config(path.as_ref(), io).open().unwrap());
        let mut out = std::io::stdout();
        for number in 0..1500u32 {
            let record = number.to_le_bytes().repeat(128);
            // Two at a time, one of them not waited for.
            let head = header(OUT, 8192 + u64::from(number));
            let other = driver.request(0, &[&head, &record], &[1]);
            let request = driver.request(0, &[&header(OUT, number.into()), &record], &[1]);
            driver.notify(0);
            let heads = [driver.used(0).0, driver.used(0).0];
            assert!(heads.contains(&other.head) && heads.contains(&request.head));
            assert_eq!(flush(&mut driver), OK);
            writeln!(out, "\nflushed {number}").unwrap();
            out.flush().unwrap();
        }
        // All said; the lock is kept until the end that was promised.
        loop {
            std::thread::park();
        }
    }
    for io in engines() {
        for enough in [1, 50, 300] {
            let file = image(16384 * 512);
            let name = if io == Io::Uring { "uring" } else { "threads" };
            let test = "each_write_that_was_flushed_before_the_monitor_was_killed_is_in_the_image";
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args([test, "--exact", "--nocapture"])
                .env(ROLE, format!("{name} {}", file.path().display()))
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let mut flushed = 0;
            let number = |line: &str| line.strip_prefix("flushed ")?.parse::<u32>().ok();
            while flushed < enough {
                let line = lines.next().expect("the child has ended").unwrap();
                if number(&line).is_some() {
                    flushed += 1;
                }
            }
            // It is alive, and has its image alone.
            let error = Image::open(file.path(), false).unwrap_err();
            assert!(matches!(error, OpenError::InUse { .. }), "{error}");
            child.kill().unwrap();
            child.wait().unwrap();
            // What it said before it died.
            let said = lines.map_while(Result::ok);
            let last = said.filter_map(|line| number(&line)).max();
            let last = last.unwrap_or(0).max(enough - 1);
            let bytes = std::fs::read(file.path()).unwrap();
            for number in 0..=last {
                let record = number.to_le_bytes().repeat(128);
                for at in [number as usize, 8192 + number as usize] {
                    assert!(
                        bytes[at * 512..][..512] == record[..],
                        "record {number} at {at}"
                    );
                }
            }
            // And its lock has died with it.
            Image::open(file.path(), false).unwrap();
        }
    }
}
