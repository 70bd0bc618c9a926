//! NIP-44 and NIP-04 both ways, answered in the request's scheme. Keys come in as values; nothing is stored.

/// How a request's inputs, and therefore our answer, are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    Nip44,
    /// Deprecated upstream, still sent; recognised by `?iv=`.
    Nip04,
}
