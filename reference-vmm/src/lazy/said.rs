// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What somebody said of how memory comes, where what nobody said is as it was: a command line's flags, and a client's load
//! over them.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::{LazyRequest, OnLoss, PageServerAt};

/// What was said of memory that comes later. Each part of it means that it does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LazySaid {
    /// The guest runs before its memory is read.
    pub lazy: bool,
    /// What becomes of it if a page does not come.
    pub on_loss: Option<OnLoss>,
    /// How long who touches a page waits for it at most.
    pub deadline: Option<Duration>,
    /// For so long what the guest touches is recorded.
    pub record: Option<Duration>,
    /// The Unix socket of a page-fault handler in another process.
    pub handler: Option<PathBuf>,
    /// Who has the memory.
    pub page_server: Option<Box<PageServerAt>>,
}

impl LazySaid {
    /// How long a page is waited for, and how long is recorded: seconds.
    pub const SECONDS: RangeInclusive<u32> = 1..=86_400;

    /// Whether anything was said.
    pub fn any(&self) -> bool {
        *self != Self::default()
    }

    /// Lays what was said over `request`. Where nothing was, it stays as it is.
    pub fn over(&self, request: &mut Option<LazyRequest>) {
        if !self.any() {
            return;
        }
        let request = request.get_or_insert_default();
        request.on_loss = self.on_loss.unwrap_or(request.on_loss);
        request.deadline = self.deadline.unwrap_or(request.deadline);
        request.record = self.record.or(request.record);
        if self.handler.is_some() {
            request.handler.clone_from(&self.handler);
        }
        if self.page_server.is_some() {
            request.page_server.clone_from(&self.page_server);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_means_lazy_and_what_is_not_said_stays() {
        let mut request = None;
        LazySaid::default().over(&mut request);
        assert_eq!(request, None);
        let said = LazySaid {
            lazy: true,
            ..LazySaid::default()
        };
        said.over(&mut request);
        assert_eq!(request, Some(LazyRequest::default()));
        let second = Duration::from_secs(1);
        let first = LazyRequest {
            on_loss: OnLoss::Poison,
            deadline: second,
            record: Some(second),
            handler: Some("/h".into()),
            page_server: Some(Box::new(PageServerAt {
                address: "tcp:h:1".parse().unwrap(),
                tls: None,
            })),
            ..LazyRequest::default()
        };
        let mut request = Some(first.clone());
        said.over(&mut request);
        assert_eq!(request, Some(first.clone()));
        let parts = LazySaid {
            lazy: false,
            on_loss: Some(first.on_loss),
            deadline: Some(second),
            record: Some(second),
            handler: first.handler.clone(),
            page_server: first.page_server.clone(),
        };
        let mut request = None;
        parts.over(&mut request);
        assert_eq!(request, Some(first));
    }
}
