//! What a result says to prove itself: the tags, their reading, and the checks that need only the event.

/// The facts a result is signed with. In a plain result one tag each; in an encrypted one a single
/// encrypted tag, so that nothing leaks (R18).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// Full object id of the commit that the job ran on; absent when no repository was named.
    pub commit: Option<String>,
    pub backend: String,
    pub image: String,
    /// sha256 (hex) of the policy's canonical JSON.
    pub policy_sha256: String,
    /// sha256 (hex) of the plain content.
    pub output_sha256: String,
    pub wall_ms: u64,
    pub cpu_ms: u64,
    pub peak_memory_bytes: u64,
    pub price_msat: u64,
}
