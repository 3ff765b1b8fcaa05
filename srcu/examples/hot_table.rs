// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Two threads look names up in a table while a third replaces it and knows when nobody uses the old one any more.

use srcu::Published;
use std::collections::BTreeMap;
use std::thread;

fn main() {
    let table = Published::new(BTreeMap::from([("serial", 0x3f8)]));
    thread::scope(|scope| {
        for name in ["vcpu0", "vcpu1"] {
            let mut reader = table.reader();
            scope.spawn(move || {
                // One pass of a run loop: inside for the access, outside for the guest.
                loop {
                    let guard = reader.enter();
                    if let Some(port) = guard.get("pvpanic") {
                        println!(
                            "{name}: pvpanic is at {port:#x} in generation {}",
                            guard.generation()
                        );
                        break;
                    }
                }
            });
        }
        let mut next = BTreeMap::clone(&table.load());
        next.insert("pvpanic", 0x505);
        table.publish(next).wait();
        println!("nobody uses the old table any more");
    });
}
