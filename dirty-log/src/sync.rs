// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The atomics and a lock, or loom's under `--cfg loom`.

#[cfg(not(loom))]
mod imp {
    pub(crate) use std::sync::atomic::{
        AtomicU8, AtomicU32, AtomicU64, Ordering, compiler_fence, fence,
    };
    pub(crate) use std::sync::{Mutex, MutexGuard};
}

#[cfg(loom)]
mod imp {
    pub(crate) use loom::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
    pub(crate) use loom::sync::{Mutex, MutexGuard};
    pub(crate) use std::sync::atomic::compiler_fence;
}

pub(crate) use imp::*;
