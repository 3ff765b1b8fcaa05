// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Firecracker's hand-off goes both ways, and whatever the other side does, it ends with a reason.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use async_pf::external::{HandOffError, Mapping, Mappings, MappingsError, receive, send};
use proptest::prelude::*;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(30);

fn mapping(base: u64, size: u64, offset: u64) -> Mapping {
    Mapping {
        base,
        size,
        offset,
        page_size: 4096,
    }
}

/// Stands for a userfaultfd: what comes out must be the same file.
fn descriptor() -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"the one").unwrap();
    file
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn mappings_come_back_as_they_were(sizes in proptest::collection::vec((1u64..9, 0u64..5), 1..300)) {
        let (mut base, mut offset) = (0x7f00_0000_0000, 0);
        let mut mappings = Vec::new();
        for (pages, gap) in sizes {
            mappings.push(mapping(base, pages * 4096, offset));
            base += (pages + gap) * 4096;
            offset += pages * 4096;
        }
        match Mappings::new(mappings.clone()) {
            Ok(good) => prop_assert_eq!(Mappings::from_json(&good.to_json().unwrap()).unwrap(), good),
            Err(error) => prop_assert!(mappings.len() > 256, "{}", error),
        }
    }

    #[test]
    fn any_bytes_are_mappings_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        Mappings::from_json(&bytes).ok();
    }

    #[test]
    fn what_is_accepted_can_be_served(base: u64, size: u64, offset: u64, page_size in 0u64..5, at: u64) {
        let page_size = [4096, 2 << 20, 0, 1, 8192][page_size as usize];
        let (base, size) = (base & !0xfff, size & 0xffff_f000);
        if let Ok(good) = Mappings::new(vec![Mapping { base, size, offset, page_size }]) {
            let (_, from, page) = good.locate(base + at % size).unwrap();
            prop_assert!(page >= base && page - base + page_size <= size);
            prop_assert_eq!(from - offset, page - base);
            prop_assert!(good.locate(base + size).is_none());
        }
    }
}

#[test]
fn the_descriptor_and_the_mappings_arrive() {
    let (monitor, handler) = UnixStream::pair().unwrap();
    let mappings = Mappings::new(vec![
        mapping(0x7000_0000, 0x4000, 0),
        mapping(0x9000_0000, 0x1000, 0x4000),
    ])
    .unwrap();
    send(&monitor, descriptor(), &mappings, LONG).unwrap();
    let received = receive(&handler, LONG).unwrap();
    assert_eq!(received.mappings, mappings);
    let mut file = File::from(received.userfaultfd);
    let mut contents = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut contents).unwrap();
    assert_eq!(contents, "the one");
}

#[test]
fn older_and_newer_monitors_are_understood() {
    let old = r#"[{"base_host_virt_addr":4096,"size":8192,"offset":0}]"#;
    let kib = r#"[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size_kib":4096}]"#;
    let new =
        r#"[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size":4096,"more":[1]}]"#;
    for json in [old, kib, new] {
        let mappings = Mappings::from_json(json.as_bytes()).unwrap();
        assert_eq!(mappings.as_slice(), [mapping(4096, 8192, 0)]);
    }
}

#[test]
fn a_message_in_pieces_is_put_together() {
    let (monitor, handler) = UnixStream::pair().unwrap();
    let mappings = Mappings::new(vec![mapping(0x7000_0000, 0x4000, 0)]).unwrap();
    let json = mappings.to_json().unwrap();
    let (head, tail) = json.split_at(5);
    monitor
        .send_with_fd(head, descriptor().as_raw_fd())
        .unwrap();
    (&monitor).write_all(tail).unwrap();
    assert_eq!(receive(&handler, LONG).unwrap().mappings, mappings);
}

#[test]
fn whatever_the_monitor_does_it_ends_with_a_reason() {
    let good = br#"[{"base_host_virt_addr":4096,"size":4096,"offset":0}]"#;
    let outcome = |act: &dyn Fn(&UnixStream)| {
        let (monitor, handler) = UnixStream::pair().unwrap();
        act(&monitor);
        drop(monitor);
        receive(&handler, LONG).unwrap_err()
    };
    assert!(matches!(outcome(&|_| ()), HandOffError::Closed { got: 0 }));
    let half = |mut monitor: &UnixStream| monitor.write_all(&good[..9]).unwrap();
    assert!(matches!(outcome(&half), HandOffError::Closed { got: 9 }));
    let bare = |mut monitor: &UnixStream| monitor.write_all(good).unwrap();
    assert!(matches!(outcome(&bare), HandOffError::NoDescriptor { .. }));
    let file = descriptor();
    let two = |monitor: &UnixStream| {
        let fds = [file.as_raw_fd(), file.as_raw_fd(), file.as_raw_fd()];
        monitor.send_with_fds(&[&good[..]], &fds).unwrap();
    };
    assert!(matches!(outcome(&two), HandOffError::ManyDescriptors));
    let noise = |mut monitor: &UnixStream| monitor.write_all(b"GET / HTTP/1.1").unwrap();
    assert!(matches!(
        outcome(&noise),
        HandOffError::Mappings(MappingsError::Json(_))
    ));
    let endless = |mut monitor: &UnixStream| monitor.write_all(&[b' '; 70_000]).unwrap();
    assert!(matches!(outcome(&endless), HandOffError::TooLong));
    // One that says nothing, and stays.
    let (_monitor, handler) = UnixStream::pair().unwrap();
    assert!(matches!(
        receive(&handler, SHORT),
        Err(HandOffError::TimedOut { .. })
    ));
}

#[test]
fn mappings_that_cannot_be_are_named() {
    let refused = |mappings| Mappings::new(mappings).unwrap_err();
    assert!(matches!(refused(vec![]), MappingsError::Count(0)));
    let fine = mapping(0x1000, 0x2000, 0);
    for bad in [
        Mapping { size: 0, ..fine },
        Mapping {
            base: 0x1008,
            ..fine
        },
        Mapping {
            size: 0x1800,
            ..fine
        },
        Mapping {
            base: u64::MAX - 0xfff,
            ..fine
        },
        Mapping {
            offset: u64::MAX,
            ..fine
        },
    ] {
        assert!(
            matches!(refused(vec![bad]), MappingsError::Range { index: 0, .. }),
            "{bad:?}"
        );
    }
    let page_size = Mapping {
        page_size: 8192,
        ..fine
    };
    assert!(matches!(
        refused(vec![page_size]),
        MappingsError::PageSize { .. }
    ));
    let memory = vec![mapping(0x2000, 0x1000, 0x8000), fine];
    assert!(matches!(
        refused(memory),
        MappingsError::Overlap {
            one: 1,
            other: 0,
            place: "memory"
        }
    ));
    let in_file = vec![fine, mapping(0x8000, 0x1000, 0x1000)];
    assert!(matches!(
        refused(in_file),
        MappingsError::Overlap {
            place: "the file",
            ..
        }
    ));
    let both = r#"[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096,"page_size_kib":4}]"#;
    assert!(matches!(
        Mappings::from_json(both.as_bytes()),
        Err(MappingsError::TwoPageSizes {
            page_size_kib: 4,
            ..
        })
    ));
}
