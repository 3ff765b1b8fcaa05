// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bare-metal test guests, integer-only, assembled into the test binaries
