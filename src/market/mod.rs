//! Who may order what: job types, admission rules and typed refusals. Pure judgement over a decoded
//! request; it starts nothing and writes nothing.
