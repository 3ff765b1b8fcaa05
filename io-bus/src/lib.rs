// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The I/O buses of a KVM virtual machine: lock-free MMIO and PIO dispatch, ioeventfd
