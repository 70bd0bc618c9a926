//! Repositories of strangers, through git2 only: a bare mirror a repository, a read-only base tree a
//! commit, a unified diff of what a job changed. It runs no program, no hook, no filter and no submodule,
//! and reads nothing that a job wrote except as `Change` values that it is handed.
