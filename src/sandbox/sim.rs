//! A scripted backend with the whole trait, for tests of the control path without a kernel's help.
