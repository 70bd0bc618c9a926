//! NIP-44 and NIP-04 both ways, answered in the request's scheme. Keys come in as values; nothing is stored.

use nostr_sdk::prelude::{Keys, PublicKey, nip04, nip44};

/// How a request's inputs, and therefore our answer, are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    Nip44,
    /// Deprecated upstream, still sent; recognised by `?iv=`.
    Nip04,
}

/// Most that NIP-44 can hold, in bytes of plain text. NIP-04 gets the same limit, so that a job does not
/// depend on the scheme.
pub const MAX_PLAIN_BYTES: usize = 65_408;
/// Most ciphertext that is looked at, in bytes.
pub const MAX_CIPHER_BYTES: usize = 128 * 1024;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Not encrypted to this key, damaged, or not text.
    #[error("the content cannot be decrypted as {scheme}: {why}")]
    Undecryptable { scheme: Scheme, why: String },
    #[error("the text to encrypt takes {bytes} bytes, {scheme} holds {cap_bytes}")]
    TooLarge { scheme: Scheme, bytes: usize, cap_bytes: usize },
    #[error("the text cannot be encrypted as {scheme}: {why}")]
    Unencryptable { scheme: Scheme, why: String },
}

impl Scheme {
    /// The scheme of a ciphertext, by its shape.
    pub fn of(ciphertext: &str) -> Self {
        if ciphertext.contains("?iv=") { Self::Nip04 } else { Self::Nip44 }
    }
}

impl std::fmt::Display for Scheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Nip44 => "NIP-44",
            Self::Nip04 => "NIP-04",
        })
    }
}

/// Decrypts what `from` encrypted to `keys`. In both schemes the two sides share one key, so a sender
/// reads its own message by naming its receiver here.
pub fn decrypt(keys: &Keys, from: &PublicKey, ciphertext: &str) -> Result<(String, Scheme), Error> {
    let scheme = Scheme::of(ciphertext);
    let undecryptable = |why: String| Error::Undecryptable { scheme, why };
    if ciphertext.len() > MAX_CIPHER_BYTES {
        return Err(undecryptable(format!("longer than {MAX_CIPHER_BYTES} bytes")));
    }
    let ciphertext = ciphertext.trim();
    let plain = match scheme {
        Scheme::Nip44 => {
            nip44::decrypt(keys.secret_key(), from, ciphertext).map_err(|e| undecryptable(e.to_string()))
        }
        Scheme::Nip04 => {
            nip04::decrypt(keys.secret_key(), from, ciphertext).map_err(|e| undecryptable(e.to_string()))
        }
    }?;
    Ok((plain, scheme))
}

/// Encrypts 1 to [`MAX_PLAIN_BYTES`] bytes of text to `to`. The nonce is the one randomness of this room.
pub fn encrypt(scheme: Scheme, keys: &Keys, to: &PublicKey, plain: &str) -> Result<String, Error> {
    if plain.len() > MAX_PLAIN_BYTES {
        return Err(Error::TooLarge { scheme, bytes: plain.len(), cap_bytes: MAX_PLAIN_BYTES });
    }
    let unencryptable = |why: String| Error::Unencryptable { scheme, why };
    match scheme {
        Scheme::Nip44 => nip44::encrypt(keys.secret_key(), to, plain, nip44::Version::V2)
            .map_err(|e| unencryptable(e.to_string())),
        Scheme::Nip04 => {
            nip04::encrypt(keys.secret_key(), to, plain).map_err(|e| unencryptable(e.to_string()))
        }
    }
}
