// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `ctl migrate-recover`: another way between two monitors of which one has the guest and the other its memory.
//!
//! A host that has another address now, a port that is not let through any more, a socket that somebody removed: connections
//! are made again by themselves, but where they were. So the source is told where to ([`Recover::To`]), and if need be the
//! destination where to listen besides ([`Recover::Listen`]).

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What to do, on one side or the other: a body of `PATCH /migrate`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recover {
    /// At the source: connections go to this address from now on.
    To {
        /// `unix:PATH` or `tcp:HOST:PORT`.
        address: String,
        /// Whom the destination's certificate is for, if not whom it was for when the migration began.
        tls_name: Option<String>,
    },
    /// At the destination: it listens there as well.
    Listen {
        /// `unix:PATH` or `tcp:HOST:PORT`.
        address: String,
    },
}

/// What a body says besides that it is this order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Said {
    /// Of [`Recover::To`].
    pub to: Option<String>,
    /// Of [`Recover::To`].
    pub tls_name: Option<String>,
    /// Of [`Recover::Listen`].
    pub listen: Option<String>,
}

impl Said {
    /// Nothing.
    pub fn is_none(&self) -> bool {
        *self == Said::default()
    }

    /// What is to be done.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn recover(self) -> Result<Recover, String> {
        match (self.to, self.listen, self.tls_name) {
            (Some(address), None, tls_name) => Ok(Recover::To { address, tls_name }),
            (None, Some(address), None) => Ok(Recover::Listen { address }),
            (None, Some(_), Some(_)) => {
                Err("a name for a certificate is of who connects: of to, not of listen".into())
            }
            (Some(_), Some(_), _) => Err(
                "to is said to the source and listen to the destination, and not both to one"
                    .into(),
            ),
            (None, None, _) => Err(
                "to (at the source) or listen (at the destination) is missing: an address".into(),
            ),
        }
    }
}

impl Recover {
    /// The body.
    pub fn body(&self) -> Value {
        match self {
            Recover::To {
                address,
                tls_name: None,
            } => json!({ "order": "Recover", "to": address }),
            Recover::To { address, tls_name } => {
                json!({ "order": "Recover", "to": address, "tls_name": tls_name })
            }
            Recover::Listen { address } => json!({ "order": "Recover", "listen": address }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_is_wanted_and_a_name_is_of_who_connects() {
        let said = |to: &str, listen: &str, name: &str| {
            let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            let said = Said {
                to: some(to),
                listen: some(listen),
                tls_name: some(name),
            };
            said.recover().map(|recover| recover.body())
        };
        let body = json!({ "order": "Recover", "to": "unix:/a", "tls_name": "b" });
        assert_eq!(said("unix:/a", "", "b"), Ok(body));
        let body = json!({ "order": "Recover", "listen": "unix:/a" });
        assert_eq!(said("", "unix:/a", ""), Ok(body));
        for (to, listen, name) in [("", "", ""), ("", "", "b"), ("a", "b", ""), ("", "a", "b")] {
            said(to, listen, name).unwrap_err();
        }
    }
}
