// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A KVM virtual machine, its vCPUs and their lifecycle: run loop, kick, pause, requests
