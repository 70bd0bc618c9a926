//! What stands inside a sandbox, shared by the local jail and by the shim that is process 1 in containers: the last
//! steps down to the job, starting and ending commands, and how the shim and the node speak. It knows no engine and
//! makes no namespaces.

pub mod beneath;
pub mod confine;
pub mod launch;
pub mod pace;
pub mod probe;
pub mod processes;
pub mod seccomp;
pub mod sys;
pub mod tree;
pub mod wire;
