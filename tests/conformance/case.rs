//! What a case is and how it ends. The cases themselves stand in the files named after what they are about.

use std::future::Future;
use std::pin::Pin;

use serde::{Deserialize, Serialize};

use crate::fixtures::Fixture;

/// How a case ended on a backend, other than by a panic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    Held,
    /// The backend refused the clause that the case is about, by its name.
    Refused {
        clause: String,
        why: String,
    },
    /// Not tried, and why.
    Skipped {
        why: String,
    },
}

/// Why a case did not come to its end, without being wrong.
#[derive(Debug)]
pub enum Unmet {
    Refused { clause: &'static str, why: String },
    Skipped(String),
}

/// For cases that may meet a refusal.
pub type Outcome = Result<(), Unmet>;

/// What a case may return: nothing, or an `Outcome`.
pub trait Ends {
    fn verdict(self) -> Verdict;
}

impl Ends for () {
    fn verdict(self) -> Verdict {
        Verdict::Held
    }
}

impl Ends for Outcome {
    fn verdict(self) -> Verdict {
        match self {
            Ok(()) => Verdict::Held,
            Err(Unmet::Refused { clause, why }) => Verdict::Refused { clause: clause.to_owned(), why },
            Err(Unmet::Skipped(why)) => Verdict::Skipped { why },
        }
    }
}

pub type Running<'a> = Pin<Box<dyn Future<Output = Verdict> + 'a>>;

/// One clause of the trait.
#[derive(Clone, Copy)]
pub struct Case {
    pub name: &'static str,
    /// Whether it runs real programs; a scripted backend skips it.
    pub programs: bool,
    pub run: for<'a> fn(&'a Fixture) -> Running<'a>,
}

/// The cases of a file: `everywhere` are those that a scripted backend can play as well. One that is written and not
/// listed is an unused function, which the compiler tells.
macro_rules! cases {
    (everywhere: [$($here:ident),* $(,)?], programs: [$($real:ident),* $(,)?] $(,)?) => {
        pub fn cases() -> Vec<$crate::case::Case> {
            use $crate::case::{Case, Ends};
            vec![
                $(Case {
                    name: stringify!($here),
                    programs: false,
                    run: |on| Box::pin(async move { Ends::verdict($here(on).await) }),
                },)*
                $(Case {
                    name: stringify!($real),
                    programs: true,
                    run: |on| Box::pin(async move { Ends::verdict($real(on).await) }),
                },)*
            ]
        }
    };
}
pub(crate) use cases;
