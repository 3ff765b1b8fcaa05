// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What registering for `membarrier(2)` takes: in a process of one thread, or with `late` in one of two.
//! `cargo run -p srcu --example prepare`, and the same with `-- late`

use std::thread;
use std::time::Instant;

fn main() {
    let late = std::env::args().nth(1).is_some_and(|word| word == "late");
    if late {
        // Its end is the process's.
        thread::spawn(thread::park);
    }
    let begun = Instant::now();
    let asymmetric = srcu::prepare();
    let took = begun.elapsed();
    let threads = if late { "two threads" } else { "one thread" };
    let barrier = if asymmetric {
        "readers execute no fence"
    } else {
        "no membarrier here: readers execute a fence"
    };
    println!("{took:?} in a process of {threads}; {barrier}");
}
