//! The socket by which the command line asks a running node.
