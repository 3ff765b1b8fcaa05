// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-rng, and with it the transport as a device sees it.

use reference_vmm::devices::virtio::fake::FakeDriver;
use reference_vmm::devices::virtio::rng::Rng;

#[test]
fn each_request_is_filled_with_random_bytes() {
    let mut driver = FakeDriver::new(Rng);
    driver.start(0);
    let mut seen = Vec::new();
    for len in [1, 64, 4096] {
        let request = driver.request(0, &[], &[len]);
        driver.notify(0);
        assert_eq!(driver.used(0), (request.head, len));
        seen.push(driver.bytes(request.writable[0].0, len as usize));
    }
    // 64 zeros in a row are as good as impossible.
    assert!(seen[1].iter().any(|byte| *byte != 0));
    assert_ne!(seen[1][..], seen[2][..64]);
}

#[test]
fn a_request_over_several_buffers_is_filled_up_to_the_most_and_the_device_says_how_far() {
    let mut driver = FakeDriver::new(Rng);
    driver.start(0);
    let request = driver.request(0, &[], &[3, 4095, 100]);
    driver.notify(0);
    assert_eq!(driver.used(0), (request.head, 4096));
    assert_eq!(driver.bytes(request.writable[2].0, 100), [0; 100]);
}

#[test]
fn it_goes_on_after_a_reset_and_after_a_restore() {
    let mut driver = FakeDriver::new(Rng);
    for _ in 0..3 {
        driver.start(0);
        for _ in 0..100 {
            driver.request(0, &[], &[8]);
            driver.notify(0);
            driver.used(0);
        }
        driver.reset();
    }
    driver.start(0);
    for _ in 0..70 {
        driver.request(0, &[], &[8]);
        driver.notify(0);
        driver.used(0);
        assert!(driver.device.pause(std::time::Duration::from_secs(60)));
        let state = driver.device.state().unwrap();
        let text = serde_json::to_string(&state).unwrap();
        let state = serde_json::from_str(&text).unwrap();
        driver = driver.restored(&state, Rng::from_state(state.device));
        driver.device.resume();
    }
}
