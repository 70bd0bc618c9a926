//! Which names may stand in a tree. Pure.

/// Longest file name, in bytes.
pub(super) const MAX_NAME: usize = 255;

/// Why a tree entry of this name is not put on this host; `None` if it may be.
pub(super) fn problem(name: &[u8]) -> Option<&'static str> {
    if name.is_empty() {
        return Some("an empty name");
    }
    if name == b"." || name == b".." {
        return Some("a name that is a way up");
    }
    if name.contains(&b'/') || name.contains(&0) {
        return Some("a name with a slash or a NUL in it");
    }
    if name.len() > MAX_NAME {
        return Some("a name longer than 255 bytes");
    }
    // On other systems a backslash parts folders; such a name is judged in parts.
    if name.split(|b| *b == b'\\').any(is_dot_git) {
        return Some("a name that some system takes for .git");
    }
    if name.contains(&b'\\') && name.split(|b| *b == b'\\').any(|part| part == b"..") {
        return Some("a name that is a way up");
    }
    None
}

/// `.git` in any case, as HFS+ folds it (ignored code points), and as NTFS does (`git~1`, dots, blanks
/// and streams at the end).
pub(super) fn is_dot_git(name: &[u8]) -> bool {
    let folded: String = String::from_utf8_lossy(name)
        .chars()
        .filter(|c| !hfs_ignores(*c))
        .map(|c| c.to_ascii_lowercase())
        .collect();
    let stem = folded.split(':').next().unwrap_or("").trim_end_matches(['.', ' ']);
    stem == ".git" || stem == "git~1"
}

fn hfs_ignores(c: char) -> bool {
    matches!(c, '\u{200c}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{206a}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_dot_git_is_seen() {
        for name in [
            ".git",
            ".GIT",
            ".Git",
            ".gi\u{200c}t",
            "\u{feff}.git",
            ".git ",
            ".git...",
            ".git::$INDEX_ALLOCATION",
            "GIT~1",
            "git~1.",
            "a\\.git",
            ".git\\hooks",
        ] {
            assert_eq!(problem(name.as_bytes()), Some("a name that some system takes for .git"), "{name:?}");
        }
    }

    #[test]
    fn ways_out_are_seen() {
        for name in ["..", ".", "", "a/b", "/etc", "a\0b", "..\\x"] {
            assert!(problem(name.as_bytes()).is_some(), "{name:?}");
        }
        assert!(problem(&[b'a'; 256]).is_some());
    }

    #[test]
    fn ordinary_and_odd_names_pass() {
        for name in
            [".gitignore", ".github", "git", "...", "a b", "Icon\r", "\u{e9}", "a\\b", "-x", ".gitmodules"]
        {
            assert_eq!(problem(name.as_bytes()), None, "{name:?}");
        }
        assert_eq!(problem(b"\xff\xfe"), None);
    }
}
