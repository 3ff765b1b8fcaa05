// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A limit for what could wait for ever.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Fails a test that hangs, instead of hanging with it.
pub fn within<T: Send + 'static>(limit: Duration, test: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, finished) = mpsc::channel();
    let worker = thread::spawn(move || {
        let result = test();
        let _ = done.send(());
        result
    });
    match finished.recv_timeout(limit) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("hangs"),
        _ => worker
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
    }
}
