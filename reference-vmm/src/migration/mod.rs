// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A machine that moves to another process while its guest runs.

mod plot;
pub mod progress;
pub mod record;
pub mod report;
pub mod units;
