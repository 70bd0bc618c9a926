//! File, environment and flags into one typed value; an unknown key is an error. It reads configuration and nothing else.
