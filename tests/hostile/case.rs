//! What a case is: an attack, how it is shown to succeed with its defence off, and how a backend is held against it.
//! The cases stand in the files named after what they attack.

use std::pin::Pin;

use crate::ground::Ground;
use crate::plain::Plain;

/// What was seen, in a few words for the table; or why there was nothing to see. A case that fails panics.
pub type Outcome = Result<String, String>;

/// How the reason begins where showing an attack without its defence would do harm.
pub const NOT_SHOWN: &str = "not shown: ";

pub type Running<'a> = Pin<Box<dyn Future<Output = Outcome> + 'a>>;

#[derive(Clone, Copy)]
pub struct Case {
    pub name: &'static str,
    /// Which kind of attack: its number among those that have happened, or the resource it is after.
    pub class: &'static str,
    /// The attack, run plainly with its one defence missing, succeeds.
    pub off: fn(&Plain) -> Outcome,
    pub on: for<'a> fn(&'a Ground) -> Running<'a>,
}

/// `name: class, off;` for each: the name is that of the function that holds a backend against it.
macro_rules! cases {
    ($($name:ident: $class:expr, $off:expr;)*) => {
        pub fn cases() -> Vec<$crate::case::Case> {
            vec![$($crate::case::Case {
                name: stringify!($name),
                class: $class,
                off: $off,
                on: |ground| Box::pin($name(ground)),
            }),*]
        }
    };
}
pub(crate) use cases;
