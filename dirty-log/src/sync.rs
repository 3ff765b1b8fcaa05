// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The atomics, or loom's under `--cfg loom`.

#[cfg(not(loom))]
mod imp {
    pub(crate) use std::sync::atomic::{
        AtomicU8, AtomicU32, AtomicU64, Ordering, compiler_fence, fence,
    };
}

#[cfg(loom)]
mod imp {
    pub(crate) use loom::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
    pub(crate) use std::sync::atomic::compiler_fence;
}

pub(crate) use imp::*;
