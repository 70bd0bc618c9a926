//! Encoding and reading job results (kind 6xxx), within size limits.
