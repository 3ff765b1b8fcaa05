// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A disk as its driver sees it: requests, wrong requests, and a host that fails. Each is tried with io_uring, where the
//! host has it, and with threads.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/disk.rs"]
mod disk;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use disk::*;
use reference_vmm::devices::virtio::block::engine::Action;
use reference_vmm::devices::virtio::block::{BlockState, Cache, DiskConfig, Io, OpenError};
use reference_vmm::devices::virtio::fake::{Descriptor, FakeDriver};
use vm_memory::{Bytes, GuestAddress};

const RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const WCE: u64 = 1 << 11;
const MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_ZEROES: u64 = 1 << 14;

#[test]
fn what_is_written_is_read_again_and_is_in_the_image() {
    for io in engines() {
        let file = image(1 << 20);
        let mut driver = driver(config(file.path(), io).open().unwrap());
        let first = read(&mut driver, 3, 4096);
        assert_eq!((first.status, first.written), (OK, 4097));
        assert_eq!(first.data, pattern(1 << 20)[3 * 512..][..4096]);
        let new = vec![0xa5; 8192];
        assert_eq!(write(&mut driver, 100, &new), OK);
        assert_eq!(flush(&mut driver), OK);
        assert_eq!(read(&mut driver, 100, 8192).data, new);
        let mut expected = pattern(1 << 20);
        expected[100 * 512..][..8192].copy_from_slice(&new);
        assert!(std::fs::read(file.path()).unwrap() == expected);
    }
}

#[test]
fn the_configuration_space_says_what_the_disk_is() {
    let file = image(1 << 20);
    let one = DiskConfig {
        queues: 4,
        ..DiskConfig::new(file.path())
    };
    let mut driver = FakeDriver::new(one.open().unwrap());
    let offered = driver.offered();
    assert_eq!(
        offered & (RO | F_FLUSH | WCE | MQ | F_ZEROES),
        F_FLUSH | WCE | MQ | F_ZEROES
    );
    let mut space = [0; 64];
    driver.config(0, &mut space);
    let u32_at = |at: usize| u32::from_le_bytes(space[at..at + 4].try_into().unwrap());
    assert_eq!(u64::from_le_bytes(space[..8].try_into().unwrap()), 2048);
    assert_eq!((u32_at(12), u32_at(20)), (254, 512));
    assert_eq!((space[32], space[34], space[35]), (1, 4, 0));
    if offered & F_DISCARD != 0 {
        assert_eq!((u32_at(36), u32_at(40)), (1 << 21, 16));
        assert!(u32_at(44) >= 1);
    }
    assert_eq!((u32_at(48), u32_at(52)), (1 << 16, 1));
    assert_eq!(space[60..], [0; 4]);
}

#[test]
fn a_readonly_disk_shares_its_image_and_refuses_to_write() {
    for io in engines() {
        let file = image(1 << 16);
        let one = DiskConfig {
            readonly: true,
            ..config(file.path(), io)
        };
        let mut driver = driver(one.open().unwrap());
        let _other = one.open().unwrap();
        let offered = driver.offered();
        assert_eq!(offered & (RO | F_FLUSH | WCE | F_DISCARD | F_ZEROES), RO);
        assert_eq!(write(&mut driver, 0, &[1; 512]), IOERR);
        assert_eq!(flush(&mut driver), OK);
        for kind in [DISCARD, ZEROES] {
            let asked = ask(&mut driver, 0, &[&header(kind, 0), &range(0, 1, 0)], &[]);
            assert_eq!(asked.status, UNSUPP);
        }
        assert_eq!(read(&mut driver, 0, 1 << 16).data, pattern(1 << 16));
    }
}

#[test]
fn a_disk_says_its_serial_number() {
    let file = image(4096);
    let mut one = DiskConfig::new(file.path());
    for (id, expected) in [
        (None, [0; 20]),
        (
            Some("disk-7".to_owned()),
            *b"disk-7\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        ),
        (
            Some("12345678901234567890".to_owned()),
            *b"12345678901234567890",
        ),
    ] {
        one.id = id;
        let mut driver = driver(one.open().unwrap());
        let said = ask(&mut driver, 0, &[&header(GET_ID, 0)], &[20]);
        assert_eq!((said.status, said.written), (OK, 21));
        assert_eq!(said.data, expected);
        // Less room, and more: as much as there is to say and place for.
        let short = ask(&mut driver, 0, &[&header(GET_ID, 0)], &[4]);
        assert_eq!((short.status, &short.data[..]), (OK, &expected[..4]));
        let long = ask(&mut driver, 0, &[&header(GET_ID, 0)], &[30]);
        assert_eq!((long.status, long.written), (OK, 20));
    }
}

#[test]
fn wrong_requests_are_answered_with_an_error_and_the_disk_goes_on() {
    for io in engines() {
        let file = image(1 << 16);
        let sectors = (1 << 16) / 512;
        let mut driver = driver(config(file.path(), io).open().unwrap());
        let mut wrong = |readable: &[&[u8]], room: &[u32], status| {
            let said = ask(&mut driver, 0, readable, room);
            assert_eq!(said.status, status, "{readable:?} {room:?}");
            assert_eq!(read(&mut driver, 0, 512).status, OK);
        };
        wrong(&[&header(IN, sectors)], &[512], IOERR);
        wrong(&[&header(IN, u64::MAX)], &[512], IOERR);
        wrong(&[&header(IN, 0)], &[513], IOERR);
        wrong(&[&header(OUT, sectors - 1), &[0; 1024]], &[], IOERR);
        wrong(&[&header(OUT, 0), &[0; 511]], &[], IOERR);
        wrong(&[&header(2, 0)], &[], UNSUPP);
        wrong(&[&header(u32::MAX, 0)], &[512], UNSUPP);
        wrong(&[&header(IN, 0)[..15]], &[512], IOERR);
        wrong(&[], &[512], IOERR);
        wrong(&[&header(DISCARD, 0), &range(sectors, 1, 0)], &[], IOERR);
        wrong(&[&header(DISCARD, 0), &range(0, 1, 1)], &[], UNSUPP);
        wrong(&[&header(DISCARD, 0), &range(0, 1, 0)[..15]], &[], IOERR);
        wrong(&[&header(DISCARD, 0)], &[], IOERR);
        wrong(&[&header(ZEROES, 0), &range(0, 1, 4)], &[], UNSUPP);
        wrong(
            &[&header(ZEROES, 0), &range(0, (1 << 16) + 1, 0)],
            &[],
            IOERR,
        );
        wrong(&[&header(ZEROES, 0), &[0; 32]], &[], IOERR);
        // Nothing to do is no error.
        wrong(&[&header(IN, sectors)], &[], OK);
        wrong(&[&header(OUT, 0)], &[], OK);
        wrong(&[&header(ZEROES, 0), &range(0, 0, 0)], &[], OK);
        assert!(std::fs::read(file.path()).unwrap() == pattern(1 << 16));
    }
}

#[test]
fn buffers_may_be_split_anywhere() {
    for io in engines() {
        let file = image(1 << 16);
        let mut driver = driver(config(file.path(), io).open().unwrap());
        let head = header(OUT, 5);
        let data = vec![0x3c; 1024];
        // The header and the data share a buffer; the header lies in three.
        let joined = [&head[9..], &data[..100]].concat();
        let said = ask(
            &mut driver,
            0,
            &[&head[..1], &head[1..9], &joined, &data[100..]],
            &[],
        );
        assert_eq!((said.status, said.written), (OK, 1));
        // And so do the data and the status.
        let request = driver.request(0, &[&header(IN, 5)], &[1, 700, 324]);
        driver.notify(0);
        assert_eq!(driver.used(0), (request.head, 1025));
        let parts = request.writable.iter();
        let bytes: Vec<u8> = parts
            .flat_map(|(at, len)| driver.bytes(*at, *len as usize))
            .collect();
        assert_eq!((&bytes[..1024], bytes[1024]), (&data[..], OK));
    }
}

#[test]
fn a_request_of_a_thousand_buffers_is_done_as_a_whole() {
    for io in engines() {
        let len = 1000 * 512;
        let file = image(len);
        let mut driver = driver(config(file.path(), io).open().unwrap());
        let head = driver.allocate(16);
        let memory = driver.memory();
        memory.write_slice(&header(IN, 0), head).unwrap();
        let room = driver.allocate(1000 * 1024 + 1);
        let writable = |address, len| Descriptor {
            address,
            len,
            flags: 2,
            next: 0,
        };
        let mut chain = vec![Descriptor {
            address: head.0,
            len: 16,
            flags: 0,
            next: 0,
        }];
        chain.extend((0..1000).map(|at| writable(room.0 + at * 1024, 512)));
        chain.push(writable(room.0 + 1000 * 1024, 1));
        let head = driver.indirect(0, &chain);
        driver.notify(0);
        assert_eq!(driver.used(0), (head, len as u32 + 1));
        let data = (0..1000).flat_map(|at| driver.bytes(GuestAddress(room.0 + at * 1024), 512));
        assert!(data.collect::<Vec<_>>() == pattern(len));
    }
}

#[test]
fn a_request_that_cannot_be_answered_needs_a_reset_and_after_it_the_disk_goes_on() {
    for io in engines() {
        let file = image(1 << 16);
        let mut driver = driver(config(file.path(), io).open().unwrap());
        let outside = |len, flags| Descriptor {
            address: 1 << 40,
            len,
            flags,
            next: 0,
        };
        for wrong in 0..4 {
            // Others that are under way are finished all the same.
            let good = driver.request(0, &[&header(IN, 0)], &[512, 1]);
            let at = driver.allocate(512);
            driver.memory().write_slice(&header(IN, 0), at).unwrap();
            let inside = |len, flags| Descriptor {
                address: at.0,
                len,
                flags,
                next: 0,
            };
            match wrong {
                0 => driver.chain(0, &[inside(16, 0)]),
                1 => driver.chain(0, &[outside(16, 0), inside(1, 2)]),
                2 => driver.chain(0, &[inside(16, 0), outside(512, 2), inside(1, 2)]),
                _ => driver.chain(0, &[inside(16, 0), inside(512, 2), outside(1, 2)]),
            };
            driver.notify(0);
            driver.wait_needs_reset();
            driver.reset();
            let _ = good;
            driver.start(ALL);
            assert_eq!(read(&mut driver, 1, 512).data, pattern(1024)[512..]);
        }
    }
}

#[test]
fn zeros_and_discards_reach_the_image() {
    for io in engines() {
        let file = image(1 << 20);
        let mut driver = driver(config(file.path(), io).open().unwrap());
        let mut expected = pattern(1 << 20);
        for flags in [0, 1] {
            let sector = 100 * u64::from(flags) + 3;
            let said = ask(
                &mut driver,
                0,
                &[&header(ZEROES, 0), &range(sector, 77, flags)],
                &[],
            );
            assert_eq!((said.status, said.written), (OK, 1));
            expected[sector as usize * 512..][..77 * 512].fill(0);
        }
        assert!(std::fs::read(file.path()).unwrap() == expected);
        if driver.offered() & F_DISCARD == 0 {
            eprintln!("files here have no holes");
            continue;
        }
        let ranges = [range(512, 256, 0), range(1024, 256, 0)].concat();
        let before = file.as_file().metadata().unwrap();
        assert_eq!(
            ask(&mut driver, 0, &[&header(DISCARD, 0), &ranges], &[]).status,
            OK
        );
        for sector in [512, 1024] {
            expected[sector * 512..][..256 * 512].fill(0);
        }
        assert!(std::fs::read(file.path()).unwrap() == expected);
        use std::os::unix::fs::MetadataExt;
        let after = file.as_file().metadata().unwrap();
        assert_eq!(after.len(), 1 << 20);
        assert!(after.blocks() < before.blocks(), "{before:?} {after:?}");
    }
}

#[test]
fn where_the_host_has_no_holes_and_ranges_zeros_are_written_and_a_discard_is_advice() {
    for io in engines() {
        for errno in [libc::EOPNOTSUPP, libc::EINVAL] {
            let file = image(4 << 20);
            let host = Host::new(move |job| match job.action() {
                Action::Punch | Action::Zero | Action::Discard => Fate::Fail(errno),
                _ => Fate::Pass,
            });
            let mut driver = driver(host.disk(&config(file.path(), io), 8));
            let mut expected = pattern(4 << 20);
            for flags in [0, 1] {
                let sector = 1 + 4096 * u64::from(flags);
                // More than is written in one piece.
                let zeros = range(sector, 3001, flags);
                let said = ask(&mut driver, 0, &[&header(ZEROES, 0), &zeros], &[]);
                assert_eq!(said.status, OK);
                expected[sector as usize * 512..][..3001 * 512].fill(0);
            }
            if driver.offered() & F_DISCARD != 0 {
                let said = ask(
                    &mut driver,
                    0,
                    &[&header(DISCARD, 0), &range(7000, 8, 0)],
                    &[],
                );
                assert_eq!(said.status, OK);
            }
            assert!(std::fs::read(file.path()).unwrap() == expected);
        }
    }
}

/// Requests of every kind; gives their statuses.
fn mixture(driver: &mut FakeDriver<reference_vmm::devices::virtio::block::Block>) -> Vec<u8> {
    let mut statuses = vec![
        write(driver, 0, &[1; 4096]),
        read(driver, 8, 4096).status,
        flush(driver),
    ];
    let ranges = [range(16, 8, 0), range(32, 8, 0)].concat();
    for (kind, ranges) in [
        (ZEROES, &range(24, 8, 0)[..]),
        (ZEROES, &range(48, 8, 1)),
        (DISCARD, &ranges),
    ] {
        statuses.push(ask(driver, 0, &[&header(kind, 0), ranges], &[]).status);
    }
    statuses.push(read(driver, 0, 4096).status);
    statuses
}

#[test]
fn an_error_of_the_host_at_any_call_is_that_requests_alone() {
    for io in engines() {
        for errno in [libc::EIO, libc::ENOSPC, libc::EFAULT, libc::EBADF] {
            let mut calls = 1;
            let mut at = 0;
            while at < calls {
                let file = image(1 << 16);
                let counted = std::sync::Arc::new(AtomicUsize::new(0));
                let count = counted.clone();
                let host = Host::new(move |_| match count.fetch_add(1, Ordering::Relaxed) == at {
                    true => Fate::Fail(errno),
                    false => Fate::Pass,
                });
                let mut driver = driver(host.disk(&config(file.path(), io), 8));
                let statuses = mixture(&mut driver);
                let failed = statuses.iter().filter(|status| **status == IOERR).count();
                let right = statuses.iter().filter(|status| **status == OK).count();
                assert_eq!(
                    (failed, right + failed),
                    (1, statuses.len()),
                    "{errno} at {at}: {statuses:?}"
                );
                calls = counted.load(Ordering::Relaxed).max(calls);
                at += 1;
            }
            assert!(calls >= 7, "{calls}");
        }
    }
}

#[test]
fn interrupted_and_short_calls_are_continued() {
    for io in engines() {
        for (first, again) in [
            (Fate::Fail(libc::EINTR), 3),
            (Fate::Fail(libc::EAGAIN), 3),
            (Fate::Short(1), 9),
        ] {
            let file = image(1 << 16);
            let mut number = 0;
            let host = Host::new(move |_| {
                number += 1;
                match number % (again + 1) {
                    0 => Fate::Pass,
                    _ => first,
                }
            });
            let mut driver = driver(host.disk(&config(file.path(), io), 8));
            assert!(
                mixture(&mut driver).iter().all(|status| *status == OK),
                "{first:?}"
            );
            let data = pattern(5000)[..4608].to_vec();
            assert_eq!(write(&mut driver, 64, &data), OK);
            assert_eq!(read(&mut driver, 64, 4608).data, data);
        }
    }
}

#[test]
fn a_host_that_is_interrupted_for_ever_is_an_error_and_no_endless_loop() {
    for io in engines() {
        let file = image(1 << 16);
        let host = Host::new(|_| Fate::Fail(libc::EINTR));
        let mut driver = driver(host.disk(&config(file.path(), io), 8));
        assert_eq!(read(&mut driver, 0, 512).status, IOERR);
    }
}

#[test]
fn an_image_that_has_become_shorter_is_an_error_behind_its_end_alone() {
    for io in engines() {
        let file = image(1 << 16);
        let mut driver = driver(config(file.path(), io).open().unwrap());
        file.as_file().set_len(5000).unwrap();
        let said = read(&mut driver, 0, 4096);
        assert_eq!((said.status, said.written), (OK, 4097));
        let said = read(&mut driver, 8, 4096);
        // What there was has been read: 904 bytes.
        assert_eq!((said.status, said.written), (IOERR, 904));
        assert_eq!(read(&mut driver, 100, 512).status, IOERR);
        assert_eq!(write(&mut driver, 100, &[9; 512]), OK);
        assert_eq!(read(&mut driver, 100, 512).data, [9; 512]);
    }
}

#[test]
fn chains_for_which_there_is_no_room_wait_in_their_queue() {
    for io in engines() {
        let file = image(1 << 20);
        let host = Host::new(|_| Fate::Hold);
        let mut driver = driver(host.disk(&config(file.path(), io), 3));
        let requests: Vec<_> = (0..80)
            .map(|at| driver.request(0, &[&header(IN, at)], &[512, 1]))
            .collect();
        driver.notify(0);
        while host.log().len() < 3 {
            std::thread::yield_now();
        }
        driver.notify(0);
        assert_eq!((host.log().len(), driver.take_used(0)), (3, None));
        host.release();
        let mut done = Vec::new();
        for _ in 0..80 {
            let (head, written) = driver.used(0);
            assert_eq!(written, 513);
            done.push(head);
        }
        done.sort_unstable();
        let mut heads: Vec<_> = requests.iter().map(|request| request.head).collect();
        heads.sort_unstable();
        assert_eq!(done, heads);
        for (at, request) in requests.iter().enumerate() {
            let said = answer(&driver, request, 513);
            assert!(said.data == pattern(1 << 20)[at * 512..][..512] && said.status == OK);
        }
    }
}

#[test]
fn a_pause_waits_for_io_under_way_and_leaves_the_rest_to_the_resumed_disk() {
    for io in engines() {
        let file = image(1 << 20);
        let host = Host::new(|_| Fate::Hold);
        let mut driver = driver(host.disk(&config(file.path(), io), 3));
        for at in 0..10 {
            driver.request(0, &[&header(IN, at)], &[512, 1]);
        }
        driver.notify(0);
        while host.log().len() < 3 {
            std::thread::yield_now();
        }
        assert!(!driver.device.pause(Duration::from_millis(1)));
        assert!(driver.device.state().is_none());
        host.release();
        assert!(driver.device.pause(Duration::from_secs(60)));
        let state = driver.device.state().unwrap();
        let text = serde_json::to_string(&state).unwrap();
        let mut done = std::iter::from_fn(|| driver.take_used(0)).count();
        assert!((3..=10).contains(&done), "{done}");
        // A new process: the old one's lock is gone with its file.
        let path = file.path().to_owned();
        let copy = tempfile::NamedTempFile::new().unwrap();
        std::fs::copy(path, copy.path()).unwrap();
        let state = serde_json::from_str(&text).unwrap();
        let new = config(copy.path(), io);
        let mut driver = {
            let disk: &reference_vmm::devices::virtio::mmio::MmioState<_> = &state;
            driver.restored(&state, new.open_from(&disk.device, true).unwrap())
        };
        driver.device.resume();
        while done < 10 {
            assert_eq!(driver.used(0).1, 513);
            done += 1;
        }
        assert_eq!(driver.take_used(0), None);
    }
}

#[test]
fn a_state_is_of_a_disk_of_its_size_that_can_be_written_if_it_was() {
    let file = image(1 << 16);
    let mut one = DiskConfig {
        id: Some("a".into()),
        queues: 2,
        ..DiskConfig::new(file.path())
    };
    let driver = FakeDriver::new(one.open().unwrap());
    let state = driver.device.state().unwrap().device;
    drop(driver);
    // What the driver knows stays, whatever the configuration says now.
    one.queues = 1;
    one.id = None;
    let same = one.open_from(&state, false).unwrap();
    assert_eq!((same.offer(), same.offer().queues), (&state.offer, 2));
    drop(same);
    one.readonly = true;
    let error = one.open_from(&state, false).unwrap_err();
    assert!(
        matches!(&error, OpenError::State { why, .. } if why.contains("readonly")),
        "{error}"
    );
    assert!(error.is_users_fault());
    one.readonly = false;
    file.as_file().set_len(1 << 17).unwrap();
    let error = one.open_from(&state, false).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("it had 65536 bytes and has 131072"),
        "{error}"
    );
    // Without what it is known by, its size counts.
    let mut unknown = state.clone();
    unknown.image = None;
    let error = one.open_from(&unknown, false).unwrap_err().to_string();
    assert!(
        error.contains("it has 256 sectors, the guest's disk 128"),
        "{error}"
    );
    for queues in [0, 17, u16::MAX] {
        let mut wrong = unknown.clone();
        wrong.offer.queues = queues;
        wrong.offer.sectors = 256;
        assert!(one.open_from(&wrong, false).is_err());
    }
}

#[test]
fn a_disk_that_another_has_is_looked_at_and_found_as_wrong_as_when_it_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let make = |path: &Path, len| std::fs::File::create(path).unwrap().set_len(len).unwrap();
    make(&path, 1 << 16);
    let mut one = DiskConfig::new(&path);
    let driver = FakeDriver::new(one.open().unwrap());
    let mut state = driver.device.state().unwrap().device;
    // It is written, and its times are others.
    std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(std::time::UNIX_EPOCH)
        .unwrap();
    for copy in [false, true] {
        one.look_for(&state, copy).unwrap();
    }
    // Who has it has it still.
    assert!(matches!(one.open(), Err(OpenError::InUse { .. })));
    drop(driver);
    // Of one that nobody has, both say the same.
    let refused = |one: &DiskConfig, state: &BlockState, copy, needle: &str| {
        let looked = one.look_for(state, copy).unwrap_err().to_string();
        let opened = one.open_from(state, copy).unwrap_err().to_string();
        assert!(looked.contains(needle), "{looked}");
        assert_eq!(looked, opened);
    };
    let other = folder.path().join("other");
    make(&other, 1 << 16);
    one.path = other.clone();
    one.look_for(&state, true).unwrap();
    one.readonly = true;
    refused(&one, &state, true, "readonly");
    one.readonly = false;
    // That it was written at another time says less.
    let now = one.open().unwrap();
    let now = FakeDriver::new(now).device.state().unwrap().device;
    let (was, is) = (state.image.as_mut().unwrap(), now.image.unwrap());
    (was.modified, was.changed) = (is.modified, is.changed);
    refused(&one, &state, false, "it is another file: inode");
    make(&other, 1 << 17);
    refused(
        &one,
        &state,
        true,
        "it has 256 sectors, the guest's disk 128",
    );
    make(&other, 100);
    refused(&one, &state, true, "100 bytes");
    one.path = folder.path().to_owned();
    refused(&one, &state, true, "is a directory");
    one.path = folder.path().join("nothere");
    refused(&one, &state, true, "cannot open");
    one.path = other;
    one.queues = 99;
    refused(&one, &state, true, "queues");
}

#[test]
fn each_queue_is_served_by_itself() {
    for io in engines() {
        let file = image(1 << 20);
        // The first queue's I/O does not end.
        let host = Host::new(|job| match job.offset() < 512 {
            true => Fate::Hold,
            false => Fate::Pass,
        });
        let one = DiskConfig {
            queues: 16,
            ..config(file.path(), io)
        };
        let mut driver = driver(host.disk(&one, 8));
        assert_ne!(driver.offered() & MQ, 0);
        let held = driver.request(0, &[&header(IN, 0)], &[512, 1]);
        driver.notify(0);
        for round in 0..3 {
            let requests: Vec<_> = (1..16)
                .map(|queue| {
                    let sector = queue as u64 * 16 + round;
                    let request = driver.request(queue, &[&header(IN, sector)], &[512, 1]);
                    driver.notify(queue);
                    (queue, sector, request)
                })
                .collect();
            for (queue, sector, request) in requests {
                assert_eq!(driver.used(queue), (request.head, 513));
                let said = answer(&driver, &request, 513);
                assert_eq!(said.data, pattern(1 << 20)[sector as usize * 512..][..512]);
            }
        }
        assert_eq!(driver.take_used(0), None);
        host.release();
        assert_eq!(driver.used(0), (held.head, 513));
    }
}

#[test]
fn a_driver_without_flushes_has_its_writes_durable_when_they_are_answered() {
    for io in engines() {
        for (features, through) in [
            (ALL & !(F_FLUSH | WCE), true),
            (ALL & !WCE, false),
            (ALL & !F_FLUSH, true),
            (ALL, false),
        ] {
            let file = image(1 << 16);
            let host = Host::new(|_| Fate::Pass);
            let mut driver = FakeDriver::new(host.disk(&config(file.path(), io), 8));
            driver.start(features);
            assert_eq!(write(&mut driver, 0, &[1; 512]), OK);
            let said = ask(&mut driver, 0, &[&header(ZEROES, 0), &range(8, 8, 0)], &[]);
            assert_eq!(said.status, OK);
            let log: Vec<_> = host.log().into_iter().map(|(_, text)| text).collect();
            let written = format!("Write {{ through: {through} }} 0+512");
            assert!(log.contains(&written), "{log:?}");
            assert_eq!(
                log.iter().any(|text| text.starts_with("Sync")),
                through,
                "{log:?}"
            );
        }
    }
}

#[test]
fn a_driver_turns_the_cache_off_and_on_and_a_reset_turns_it_on() {
    let file = image(1 << 16);
    let host = Host::new(|_| Fate::Pass);
    let mut driver = driver(host.disk(&config(file.path(), Io::Threads), 8));
    let mut expected = true;
    for on in [0, 1, 0] {
        driver.write_config(32, &[on]);
        expected = on == 1;
        let mut said = [9];
        driver.config(32, &mut said);
        assert_eq!(said, [on]);
        assert_eq!(write(&mut driver, 0, &[1; 512]), OK);
        let text = host.log().last().unwrap().1.clone();
        assert!(text.contains(&format!("through: {}", !expected)), "{text}");
        // It is the same after a pause.
        assert!(driver.device.pause(Duration::from_secs(60)));
        let state = driver.device.state().unwrap();
        assert_eq!(state.device.writeback, expected);
        driver.device.resume();
        driver.config(32, &mut said);
        assert_eq!(said, [on]);
    }
    assert!(!expected);
    driver.reset();
    driver.start(ALL);
    let mut said = [9];
    driver.config(32, &mut said);
    assert_eq!(said, [1]);
}

#[test]
fn an_unsafe_cache_answers_flushes_and_does_nothing() {
    let file = image(1 << 16);
    let one = DiskConfig {
        cache: Cache::Unsafe,
        ..config(file.path(), Io::Threads)
    };
    for features in [ALL, ALL & !F_FLUSH] {
        let host = Host::new(|_| Fate::Pass);
        let mut driver = FakeDriver::new(host.disk(&one, 8));
        assert_eq!(driver.offered() & (F_FLUSH | WCE), F_FLUSH);
        driver.start(features);
        assert_eq!(write(&mut driver, 0, &[1; 512]), OK);
        assert_eq!(flush(&mut driver), OK);
        let log = host.log();
        assert_eq!(log.len(), 2, "{log:?}");
        assert!(log[0].1.contains("through: false"), "{log:?}");
    }
}

#[test]
fn an_engine_that_the_host_does_not_give_any_more_needs_a_reset() {
    let file = image(1 << 16);
    let image = reference_vmm::devices::virtio::block::Image::open(file.path(), false).unwrap();
    let one = DiskConfig::new(file.path());
    let refused = std::sync::atomic::AtomicBool::new(true);
    let disk =
        reference_vmm::devices::virtio::block::Block::with_engines(image, &one, move |image, _| {
            match refused.swap(false, Ordering::Relaxed) {
                true => Err(std::io::Error::from_raw_os_error(libc::EMFILE)),
                false => engine(image, Io::Threads),
            }
        });
    let mut driver = driver(disk);
    driver.wait_needs_reset();
    driver.reset();
    driver.start(ALL);
    assert_eq!(read(&mut driver, 0, 512).status, OK);
}

/// A read-only block device with an image in it; none where this user or host makes none.
struct LoopDevice(String);

impl LoopDevice {
    fn readonly(image: &std::path::Path) -> Option<Self> {
        let made = std::process::Command::new("losetup")
            .args(["--read-only", "--find", "--show"])
            .arg(image)
            .output();
        let made = made.ok().filter(|made| made.status.success())?;
        let name = String::from_utf8(made.stdout).ok()?;
        Some(LoopDevice(name.trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detach = ["--detach", &self.0];
        let _ = std::process::Command::new("losetup").args(detach).status();
    }
}

#[test]
fn a_block_device_that_cannot_be_written_is_refused_as_a_disk_to_write() {
    let file = image(1 << 20);
    let Some(device) = LoopDevice::readonly(file.path()) else {
        eprintln!("no loop device can be had here: not tried");
        return;
    };
    let mut config = DiskConfig::new(&device.0);
    let error = config.open().unwrap_err();
    assert!(error.is_users_fault());
    assert!(error.to_string().contains("readonly"), "{error}");
    config.readonly = true;
    config.open().unwrap();
}
