//! A wallet's key while it is in memory, and how it is read from a file: one line, the owner's alone. It is never
//! shown; what it opens is not known here.

use std::fmt;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::Error;

/// Longest key or connection string, bytes.
const MAX_BYTES: u64 = 4_096;

/// A text that `Debug` does not show. It has no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself: for the wallet, not for a log.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Reads the one line of a file that only its owner may read.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let shown = path.display();
        let io = |error: std::io::Error| Error::Setup(format!("the key file {shown}: {error}"));
        let file = std::fs::File::open(path).map_err(io)?;
        let mode = file.metadata().map_err(io)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(Error::Setup(format!(
                "the key file {shown} can be read by others (mode {mode:04o}); run: chmod 600 {shown}"
            )));
        }
        let mut text = String::new();
        file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(io)?;
        let line = text.trim();
        if line.is_empty() || line.lines().count() != 1 || text.len() as u64 > MAX_BYTES {
            return Err(Error::Setup(format!("the key file {shown} must hold one line, the key")));
        }
        Ok(Self(line.to_owned()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_file_is_one_line_that_only_its_owner_reads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let put = |text: &str, mode| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            Secret::from_file(&path)
        };
        assert_eq!(put("  abc\n", 0o600).unwrap().expose(), "abc");
        let error = put("abc\n", 0o640).unwrap_err().to_string();
        assert!(error.contains("chmod 600") && !error.contains("abc"), "{error}");
        for bad in ["", "\n", "two\nlines", &"x".repeat(5000)] {
            let error = put(bad, 0o600).unwrap_err().to_string();
            assert!(error.contains("one line"), "{error}");
        }
        let error = Secret::from_file(&dir.path().join("none")).unwrap_err();
        assert!(matches!(error, Error::Setup(why) if why.contains("No such file")));
    }

    #[test]
    fn a_secret_is_not_shown() {
        assert_eq!(format!("{:?}", Secret::new("abc")), "Secret(…)");
    }
}
