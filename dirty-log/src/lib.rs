// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a KVM guest wrote: dirty bitmaps, runs of pages, transactional harvests
