// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The README's example of a device is the example that is compiled, and does what it says.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../examples/own_device.rs"]
#[allow(dead_code)]
mod example;

use example::Capitals;
use reference_vmm::devices::virtio::fake::{Descriptor, FakeDriver};

#[test]
fn the_example_device_gives_text_back_in_capitals() {
    let mut driver = FakeDriver::new(Capitals(5));
    driver.start(0);
    let mut config = [0xff; 6];
    driver.config(0, &mut config);
    assert_eq!(config, [5, 0, 0, 0, 0, 0]);
    driver.config(2, &mut config);
    assert_eq!(config, [0; 6]);
    for (readable, room, written) in [
        (&[&b"a"[..], b"bc"][..], &[2, 8][..], &b"ABC"[..]),
        (&[b"more than five"], &[64], b"MORE "),
        (&[b"four"], &[1, 2], b"FOU"),
        (&[b"no room"], &[], b""),
        (&[], &[9], b""),
    ] {
        let request = driver.request(0, readable, room);
        driver.notify(0);
        let used = driver.used(0);
        assert_eq!(used, (request.head, written.len() as u32));
        let room = request.writable.iter();
        let answer: Vec<u8> = room
            .flat_map(|(at, len)| driver.bytes(*at, *len as usize))
            .collect();
        assert_eq!(&answer[..written.len()], written);
    }
}

#[test]
fn the_example_device_goes_on_after_a_wrong_driver_was_reset_and_after_a_restore() {
    let mut driver = FakeDriver::new(Capitals(5));
    driver.start(0);
    let nowhere = Descriptor {
        address: 1 << 40,
        len: 1,
        ..Descriptor::default()
    };
    driver.chain(0, &[nowhere]);
    driver.notify(0);
    driver.wait_needs_reset();
    driver.reset();
    driver.start(0);
    assert!(driver.device.pause(std::time::Duration::from_secs(60)));
    let state = driver.device.state().unwrap();
    let mut driver = driver.restored(&state, Capitals(5));
    driver.device.resume();
    let request = driver.request(0, &[b"x"], &[1]);
    driver.notify(0);
    assert_eq!(driver.used(0), (request.head, 1));
    assert_eq!(driver.bytes(request.writable[0].0, 1), b"X");
}

#[test]
fn the_readme_shows_the_example_as_it_is() {
    let example = include_str!("../examples/own_device.rs");
    let (_licence, example) = example.split_once("\n\n").unwrap();
    let readme = include_str!("../README.md");
    assert!(
        readme.contains(&format!("```rust\n{example}```\n")),
        "README.md's example is not examples/own_device.rs without its licence line"
    );
}
