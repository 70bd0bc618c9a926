//! The NIP-89 handler announcement (kind 31990) and its withdrawal.
