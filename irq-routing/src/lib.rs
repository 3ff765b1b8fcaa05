// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The interrupt routing table of a KVM virtual machine: irqchips, GSIs, MSI, irqfd
