//! Gathers the changes of a job under a cap, the same for every backend.

pub use coinop_shim::tree::{DEPTH, PATH_BYTES};

use super::{Change, Changes, Content, Error, LeaveOut};

/// Bytes of a path that an error tells.
const SHOWN: usize = 80;

pub struct Found {
    cap_bytes: u64,
    left: u64,
    leave_out: LeaveOut,
    changes: Changes,
}

impl Found {
    pub fn new(cap_bytes: u64, leave_out: LeaveOut) -> Found {
        Found { cap_bytes, left: cap_bytes, leave_out, changes: Changes::default() }
    }

    /// Whether this path, at which the base has no file or link, is left out.
    pub fn leaves_out(&self, path: &[u8], is_folder: bool) -> bool {
        (self.leave_out)(path, is_folder)
    }

    /// Counts files and links that are left out.
    pub fn left_out(&mut self, count: u64) {
        self.changes.left_out += count;
    }

    /// Bytes of content and of paths that may still be told.
    pub fn left(&self) -> u64 {
        self.left
    }

    pub fn too_large(&self) -> Error {
        Error::TooLarge { what: "what the job changed".to_owned(), cap_bytes: self.cap_bytes }
    }

    /// # Errors
    /// `TooLarge`, when path and content together pass the cap.
    pub fn tell(&mut self, path: &[u8], to: Content) -> Result<(), Error> {
        let content = match &to {
            Content::File { bytes, .. } => bytes.len(),
            Content::Symlink { target } => target.len(),
            Content::Deleted => 0,
        };
        let all = (path.len() + content) as u64;
        self.left = self.left.checked_sub(all).ok_or_else(|| self.too_large())?;
        self.changes.delivered.push(Change { path: path.to_owned(), to });
        Ok(())
    }

    pub fn sorted(mut self) -> Changes {
        self.changes.delivered.sort_by(|a, b| a.path.cmp(&b.path));
        self.changes
    }
}

/// Refuses a path that is longer or deeper than is told.
///
/// # Errors
/// `TooDeep` or `TooLarge`.
pub fn bounded(path: &[u8], depth: usize) -> Result<(), Error> {
    if depth > DEPTH {
        let shown = path.get(..path.len().min(SHOWN)).unwrap_or_default();
        return Err(Error::TooDeep { path: String::from_utf8_lossy(shown).into_owned(), cap: DEPTH });
    }
    if path.len() > PATH_BYTES {
        let what = "the path of a change".to_owned();
        return Err(Error::TooLarge { what, cap_bytes: PATH_BYTES as u64 });
    }
    Ok(())
}
