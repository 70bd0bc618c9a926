//! The secret key on disk: made on first use, read with care, never printed.
//!
//! A key file is one line, mode 0600, the owner's: `nsec1…`, 64 hex digits, or NIP-49 `ncryptsec1…`.
//! What is signed with the key, and by whom, is not decided here.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nostr_sdk::prelude::{EncryptedSecretKey, FromBech32, Keys, PublicKey, SecretKey, ToBech32};

/// Where a password may come from instead of a terminal.
pub const PASSWORD_VAR: &str = "COINOP_KEY_PASSWORD";
const MAX_FILE_BYTES: u64 = 4_096;

/// A secret key with its redacted face: `Debug` shows the public half only; there is no `Display`.
#[derive(Clone)]
pub struct NodeKey {
    keys: Keys,
    protected: bool,
}

impl std::fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NodeKey({})", self.npub())
    }
}

impl NodeKey {
    /// For signing and encryption.
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    pub fn public_key(&self) -> PublicKey {
        self.keys.public_key()
    }

    pub fn npub(&self) -> String {
        npub(&self.public_key())
    }

    /// Whether the file holds it under a password.
    pub fn is_protected(&self) -> bool {
        self.protected
    }

    /// A key that is kept nowhere, for one request.
    pub fn ephemeral() -> NodeKey {
        NodeKey { keys: Keys::generate(), protected: false }
    }
}

/// The key's `npub1…` form.
pub fn npub(key: &PublicKey) -> String {
    key.to_bech32().unwrap_or_else(|_| key.to_hex())
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no key at {path}; make one with `coinop keys new --key {path}`", path = .0.display())]
    Missing(PathBuf),
    #[error("a key already exists at {}; use --replace to rename it and make a new one", .0.display())]
    Exists(PathBuf),
    #[error(
        "the key file {path} can be read by others (mode {mode:04o}); run: chmod 600 {path}",
        path = path.display()
    )]
    LooseMode { path: PathBuf, mode: u32 },
    #[error(
        "the key file {path} belongs to user {owner}, not to you ({me}); run: chown {me} {path}",
        path = path.display()
    )]
    WrongOwner { path: PathBuf, owner: u32, me: u32 },
    /// Never says what stands there instead.
    #[error("{0} contains no key: expected one line with nsec1…, 64 hex digits or ncryptsec1…")]
    NotAKey(String),
    #[error("the key is encrypted: set {PASSWORD_VAR}, or start from a terminal")]
    NeedsPassword,
    #[error("the password does not open the key")]
    WrongPassword,
    #[error("an empty password protects nothing")]
    EmptyPassword,
    #[error("the two passwords differ")]
    PasswordsDiffer,
    #[error("the key could not be encrypted")]
    Encryption,
    #[error("cannot {doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: std::io::Error },
}

/// Where a password is asked for; a closure, so that tests need no terminal.
pub type AskPassword<'a> = &'a dyn Fn(&str) -> Result<String, Error>;

/// Reads the key, or makes one if there is no file. The flag says whether it was made now. Two
/// processes at once end with the same key.
pub fn load_or_create(path: &Path, ask: AskPassword<'_>) -> Result<(NodeKey, bool), Error> {
    match load(path, ask) {
        Err(Error::Missing(_)) => {}
        other => return other.map(|key| (key, false)),
    }
    match create(path, &Keys::generate(), None) {
        Ok(key) => Ok((key, true)),
        Err(Error::Exists(_)) => load(path, ask).map(|key| (key, false)),
        Err(error) => Err(error),
    }
}

/// Reads a key file. Refuses one that others can read.
pub fn load(path: &Path, ask: AskPassword<'_>) -> Result<NodeKey, Error> {
    let io = |doing| move |source| Error::Io { doing, path: path.to_path_buf(), source };
    let file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::Missing(path.to_path_buf()));
        }
        other => other.map_err(io("open the key file"))?,
    };
    // Of the open file, not of the name: nothing can be swapped in between.
    let meta = file.metadata().map_err(io("look at the key file"))?;
    let (mode, owner, me) = (meta.mode() & 0o7777, meta.uid(), nix::unistd::geteuid().as_raw());
    if !meta.is_file() {
        return Err(Error::NotAKey(path.display().to_string()));
    }
    if mode & 0o077 != 0 {
        return Err(Error::LooseMode { path: path.to_path_buf(), mode });
    }
    if owner != me && me != 0 {
        return Err(Error::WrongOwner { path: path.to_path_buf(), owner, me });
    }
    let mut text = String::new();
    file.take(MAX_FILE_BYTES)
        .read_to_string(&mut text)
        .map_err(|_| Error::NotAKey(path.display().to_string()))?;
    read(&text, &path.display().to_string(), ask).map(|(key, _)| key)
}

/// Writes a new key file, atomically and with mode 0600; never over another. Under a password when one
/// is given.
pub fn create(path: &Path, keys: &Keys, password: Option<&str>) -> Result<NodeKey, Error> {
    let line = match password {
        Some("") => return Err(Error::EmptyPassword),
        Some(password) => {
            let locked = keys.secret_key().encrypt(password).map_err(|_| Error::Encryption)?;
            locked.to_bech32().map_err(|_| Error::Encryption)?
        }
        None => keys.secret_key().to_bech32().map_err(|_| Error::Encryption)?,
    };
    write_new(path, &line)?;
    Ok(NodeKey { keys: keys.clone(), protected: password.is_some() })
}

/// Takes a key as text (nsec, hex or ncryptsec) into a new file. An ncryptsec stays under its password.
pub fn import(path: &Path, text: &str, ask: AskPassword<'_>) -> Result<NodeKey, Error> {
    let (key, line) = read(text, "the input", ask)?;
    write_new(path, &line)?;
    Ok(key)
}

/// Whether a text holds a key that can be opened; writes nothing.
pub fn check(text: &str, ask: AskPassword<'_>) -> Result<PublicKey, Error> {
    read(text, "the input", ask).map(|(key, _)| key.public_key())
}

/// Renames the key file, so that another can take its place; returns the new name. A key is never deleted.
pub fn set_aside(path: &Path, now_s: u64) -> Result<Option<PathBuf>, Error> {
    if !path.exists() {
        return Ok(None);
    }
    let io = |source| Error::Io { doing: "set aside", path: path.to_path_buf(), source };
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".until-{now_s}"));
    let aside = PathBuf::from(aside);
    // A link and not a rename: it fails where a name is taken.
    std::fs::hard_link(path, &aside).and_then(|()| std::fs::remove_file(path)).map_err(io)?;
    Ok(Some(aside))
}

/// The key in a text, and the line to keep it as.
fn read(text: &str, whence: &str, ask: AskPassword<'_>) -> Result<(NodeKey, String), Error> {
    let text = text.trim();
    let not_a_key = || Error::NotAKey(whence.to_string());
    if text.starts_with("ncryptsec1") {
        let locked = EncryptedSecretKey::from_bech32(text).map_err(|_| not_a_key())?;
        let secret = locked.decrypt(&ask("Password of the key: ")?).map_err(|_| Error::WrongPassword)?;
        return Ok((NodeKey { keys: Keys::new(secret), protected: true }, text.to_string()));
    }
    let secret = SecretKey::parse(text).map_err(|_| not_a_key())?;
    let line = secret.to_bech32().map_err(|_| not_a_key())?;
    Ok((NodeKey { keys: Keys::new(secret), protected: false }, line))
}

/// Temporary file in the same folder, fsync, link under the name (fails when taken), fsync of the folder.
fn write_new(path: &Path, line: &str) -> Result<(), Error> {
    let io = |doing| move |source| Error::Io { doing, path: path.to_path_buf(), source };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.exists() {
        let mut make = std::fs::DirBuilder::new();
        make.recursive(true).mode(0o700).create(folder).map_err(io("make the folder of"))?;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = folder.join(format!(".{name}.{}", Keys::generate().public_key().to_hex()));
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| {
            writeln!(file, "{line}")?;
            file.sync_all()
        })
        .and_then(|()| std::fs::hard_link(&temporary, path));
    let removed = std::fs::remove_file(&temporary);
    match written {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(Error::Exists(path.to_path_buf()));
        }
        other => other.map_err(io("write"))?,
    }
    removed.map_err(io("remove the temporary copy of"))?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io("make durable"))
}

/// `COINOP_KEY_PASSWORD`, or a question on the terminal with the echo off.
pub fn password_from_env_or_terminal(prompt: &str) -> Result<String, Error> {
    if let Ok(password) = std::env::var(PASSWORD_VAR) {
        return Ok(password);
    }
    ask_hidden(prompt)
}

/// Asks on the controlling terminal, without echo.
pub fn ask_hidden(prompt: &str) -> Result<String, Error> {
    use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};

    let path = PathBuf::from("/dev/tty");
    let Ok(mut tty) = OpenOptions::new().read(true).write(true).open(&path) else {
        return Err(Error::NeedsPassword);
    };
    if !tty.is_terminal() {
        return Err(Error::NeedsPassword);
    }
    let io = |source: std::io::Error| Error::Io { doing: "ask on", path: path.clone(), source };
    let before = tcgetattr(&tty).map_err(|errno| io(errno.into()))?;
    let mut quiet = before.clone();
    quiet.local_flags.remove(LocalFlags::ECHO);
    write!(tty, "{prompt}").map_err(io)?;
    tcsetattr(&tty, SetArg::TCSAFLUSH, &quiet).map_err(|errno| io(errno.into()))?;
    let line = read_line(&mut tty);
    // Whatever happened, the terminal gets its echo back before we say so.
    tcsetattr(&tty, SetArg::TCSAFLUSH, &before).map_err(|errno| io(errno.into()))?;
    writeln!(tty).map_err(io)?;
    line.map_err(io)
}

fn read_line(tty: &mut File) -> std::io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0u8; 1];
    while line.len() < MAX_FILE_BYTES as usize && tty.read(&mut byte)? == 1 && byte != *b"\n" {
        line.extend_from_slice(&byte);
    }
    String::from_utf8(line).map_err(|_| std::io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn no_password(_: &str) -> Result<String, Error> {
        Err(Error::NeedsPassword)
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn the_first_use_makes_a_key_that_only_the_owner_can_read_and_the_second_finds_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state/key");
        let (made, new) = load_or_create(&path, &no_password).unwrap();
        assert!(new);
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        let (found, new) = load_or_create(&path, &no_password).unwrap();
        assert!(!new);
        assert_eq!(made.public_key(), found.public_key());
        let left: Vec<_> = std::fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(left.len(), 1, "no temporary file stays behind");
    }

    #[test]
    fn a_key_that_others_can_read_is_refused_with_the_mend() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        load_or_create(&path, &no_password).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = load(&path, &no_password).unwrap_err();
        assert!(matches!(error, Error::LooseMode { mode: 0o640, .. }));
        assert!(error.to_string().contains(&format!("chmod 600 {}", path.display())));
    }

    /// As other programs write it, with a scrypt cost that a test can afford.
    fn locked(keys: &Keys, password: &str) -> String {
        use nostr_sdk::prelude::KeySecurity;
        let locked = EncryptedSecretKey::new(keys.secret_key(), password, 4, KeySecurity::Medium);
        locked.unwrap().to_bech32().unwrap()
    }

    #[test]
    fn a_key_made_under_a_password_is_kept_encrypted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let keys = Keys::generate();
        create(&path, &keys, Some("right")).unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("ncryptsec1"));
        assert!(matches!(create(&dir.path().join("b"), &keys, Some("")), Err(Error::EmptyPassword)));
    }

    #[test]
    fn an_encrypted_key_opens_with_its_password_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let keys = Keys::generate();
        write_new(&path, &locked(&keys, "right")).unwrap();
        let opened = load(&path, &|_: &str| Ok("right".into())).unwrap();
        assert_eq!(opened.public_key(), keys.public_key());
        assert!(opened.is_protected());
        assert!(matches!(load(&path, &|_: &str| Ok("wrong".into())), Err(Error::WrongPassword)));
        assert!(matches!(load(&path, &no_password), Err(Error::NeedsPassword)));
    }

    #[test]
    fn nsec_hex_and_ncryptsec_are_imported_and_nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::generate();
        let secret = keys.secret_key();
        let texts = [secret.to_bech32().unwrap(), secret.to_secret_hex(), locked(&keys, "pw")];
        for (n, text) in texts.iter().enumerate() {
            let path = dir.path().join(format!("key{n}"));
            let key = import(&path, &format!("  {text}\n"), &|_: &str| Ok("pw".into())).unwrap();
            assert_eq!(key.public_key(), keys.public_key());
            assert_eq!(mode(&path), 0o600);
            assert!(matches!(import(&path, text, &|_: &str| Ok("pw".into())), Err(Error::Exists(_))));
        }
    }

    #[test]
    fn a_key_set_aside_stays_readable_under_its_new_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let (first, _) = load_or_create(&path, &no_password).unwrap();
        let aside = set_aside(&path, 1_700_000_000).unwrap().unwrap();
        let (second, new) = load_or_create(&path, &no_password).unwrap();
        assert!(new && first.public_key() != second.public_key());
        assert_eq!(load(&aside, &no_password).unwrap().public_key(), first.public_key());
    }

    #[test]
    fn nothing_said_about_a_key_contains_it() {
        let key = NodeKey::ephemeral();
        let shown = format!("{key:?} {:?}", key.keys());
        assert!(shown.contains("npub1"));
        assert!(!shown.contains(&key.keys().secret_key().to_secret_hex()));
        assert!(!shown.contains("nsec"));
        let dir = tempfile::tempdir().unwrap();
        let junk = format!("{}x", key.keys().secret_key().to_secret_hex());
        let error = import(&dir.path().join("key"), &junk, &no_password).unwrap_err();
        assert!(!error.to_string().contains(&junk), "an error must not repeat the secret");
    }
}
