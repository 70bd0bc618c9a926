//! The life of a job as records in the store: intake, the runner, its terminal answer. It decides when; rooms below do the work.
