// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory of a KVM guest that arrives later: page-fault queues, sources and scheduling
