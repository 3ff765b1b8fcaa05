// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest physical memory of a KVM virtual machine: memory slots, layout, translation, access
