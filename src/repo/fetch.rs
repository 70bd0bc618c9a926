//! From a customer's name for a commit to the commit, complete, in the mirror: with as little of the
//! repository as the server lets us take. It decides what to ask for; `remote` and `local` know how.

use std::collections::HashSet;
use std::path::Path;

use git2::{Odb, Oid};

use super::budget::Budget;
use super::http::Http;
use super::local::Local;
use super::mirror::{self, Mirror};
use super::remote::{Ref, Remote, Source, Want, full_id};
use super::{Error, Limits, Location, Options};

/// Commits told to the server as present.
const MAX_HAVE: usize = 16;
/// Fewest digits of an abbreviated commit.
const MIN_DIGITS: usize = 7;
/// Longest ref name, in bytes.
const MAX_REF: usize = 255;

/// A customer's name for a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Name {
    /// What the server calls `HEAD`.
    Head,
    /// A full commit id: never taken for a branch of that name.
    Commit(Oid),
    /// A branch, a tag, a full ref name, or the first digits of a commit.
    Ref(String),
}

/// Whether this can be the name of a branch, a tag or a commit.
///
/// # Errors
/// Why not.
pub fn check_ref(git_ref: &str) -> Result<(), Error> {
    Name::parse(Some(git_ref)).map(drop)
}

impl Name {
    /// `None`, an empty text and `HEAD` are the default branch.
    pub fn parse(git_ref: Option<&str>) -> Result<Name, Error> {
        let text = git_ref.unwrap_or("");
        if text.is_empty() || text == "HEAD" {
            return Ok(Name::Head);
        }
        if let Some(id) = full_id(text) {
            return Ok(Name::Commit(id));
        }
        // git's own rules for ref names, so that nothing can be smuggled into a request line.
        let bad_char = |c: char| c.is_control() || " ~^:?*[\\".contains(c);
        let bad_part = |p: &str| p.is_empty() || p.starts_with('.') || p.ends_with(".lock");
        if text.len() > MAX_REF
            || text.starts_with('-')
            || text.ends_with('.')
            || text.contains("..")
            || text.contains("@{")
            || text.chars().any(bad_char)
            || text.split('/').any(bad_part)
        {
            return Err(Error::refused("the git ref is not a name git allows"));
        }
        Ok(Name::Ref(text.to_string()))
    }

    fn digits(&self) -> Option<&str> {
        let Name::Ref(text) = self else { return None };
        let hex = text.len() >= MIN_DIGITS && text.len() < 40 && text.bytes().all(|b| b.is_ascii_hexdigit());
        hex.then_some(text)
    }

    fn text(&self) -> String {
        match self {
            Name::Head => "HEAD".to_string(),
            Name::Commit(id) => id.to_string(),
            Name::Ref(text) => text.clone(),
        }
    }

    /// Full ref names in the order in which they are tried; a branch goes before a tag, as in `git clone`.
    fn candidates(&self) -> Vec<String> {
        match self {
            Name::Head | Name::Commit(_) => vec!["HEAD".to_string()],
            Name::Ref(text) if text.starts_with("refs/") => vec![text.clone()],
            Name::Ref(text) => {
                vec![format!("refs/heads/{text}"), format!("refs/tags/{text}"), format!("refs/{text}")]
            }
        }
    }

    fn not_found(&self) -> Error {
        Error::RefNotFound { git_ref: self.text() }
    }
}

/// One fetch into one mirror. The caller holds the repository's lock.
pub(super) struct Fetch<'a> {
    pub mirror: &'a Mirror,
    pub limits: &'a Limits,
    pub budget: &'a Budget,
    /// An empty folder for a throw-away mirror; removed by the caller.
    pub scratch: &'a Path,
    /// Called before anything is put into the mirror, which may be another one afterwards, in the same place.
    pub room: &'a dyn Fn() -> Result<(), Error>,
}

impl Fetch<'_> {
    /// Asks the server for the commit, whether it is here or not; makes sure that it is, and says which it is.
    pub fn pin(&self, location: &Location, name: &Name, options: &Options) -> Result<Oid, Error> {
        match location {
            Location::Http(url) => {
                let http = Http::new(url.clone(), options.allow_private, self.budget);
                self.from(&mut Remote::open(http, self.budget)?, name)
            }
            Location::File(path) => self.from(&mut Local::open(path)?, name),
        }
    }

    fn from(&self, source: &mut dyn Source, name: &Name) -> Result<Oid, Error> {
        if let Name::Commit(id) = name {
            return self.commit(source, *id, name);
        }
        let candidates = name.candidates();
        let refs = source.refs(&candidates)?;
        if let Some(found) = candidates.iter().find_map(|c| refs.iter().find(|r| r.name == *c)) {
            return self.tip(source, found);
        }
        match name.digits() {
            Some(digits) => self.abbreviated(source, digits, name),
            None => Err(name.not_found()),
        }
    }

    /// What a ref points to.
    fn tip(&self, source: &mut dyn Source, found: &Ref) -> Result<Oid, Error> {
        if self.mirror.has(found.commit()) {
            return Ok(found.commit());
        }
        // A strict server gives only what a ref points to, and that is the tag.
        let ask = if source.gives_any_commit() { found.commit() } else { found.id };
        self.shallow(source, ask)
    }

    /// The commit alone, without history.
    fn shallow(&self, source: &mut dyn Source, ask: Oid) -> Result<Oid, Error> {
        (self.room)()?;
        let want =
            Want { commits: vec![ask], depth: Some(1), have: self.mirror.pins(MAX_HAVE), ..Want::default() };
        self.mirror.receive(source, &want, self.limits, self.budget)?;
        self.keep(ask)
    }

    fn keep(&self, id: Oid) -> Result<Oid, Error> {
        let odb = self.mirror.odb()?;
        let commit = mirror::peel(&odb, id)?;
        mirror::tree_of(&odb, commit)?;
        self.mirror.pin(commit)?;
        Ok(commit)
    }

    /// The commit by its id: from the server, or from here once the server has said that it gives it.
    fn commit(&self, source: &mut dyn Source, id: Oid, name: &Name) -> Result<Oid, Error> {
        let tips = if source.gives_any_commit() { None } else { Some(source.refs(&all_prefixes())?) };
        if let Some(tip) = tips.iter().flatten().find(|r| r.id == id || r.commit() == id) {
            // A strict server gives only what a ref points to, and that may be a tag.
            return if self.mirror.has(id) { Ok(id) } else { self.shallow(source, tip.id) };
        }
        if tips.as_ref().is_some_and(Vec::is_empty) {
            return Err(name.not_found());
        }
        // Many servers give more than they promise.
        let given =
            if self.mirror.has(id) { source.gives(id).map(|()| id) } else { self.shallow(source, id) };
        let Some(tips) = tips else {
            return match given {
                Err(Error::Unreachable { why }) if is_refusal(&why) => Err(name.not_found()),
                other => other,
            };
        };
        match given {
            Err(Error::Unreachable { .. }) => {}
            other => return other,
        }
        // The commit is somewhere behind the tips.
        self.everything(source, &tips)?;
        if !history(&self.mirror.odb()?, &tips).contains(&id) {
            return Err(name.not_found());
        }
        self.keep(id)
    }

    /// All branches and tags with their history.
    fn everything(&self, source: &mut dyn Source, tips: &[Ref]) -> Result<(), Error> {
        let commits = wanted(tips);
        if commits.is_empty() {
            return Ok(());
        }
        (self.room)()?;
        self.mirror.receive(source, &Want { commits, ..Want::default() }, self.limits, self.budget)
    }

    /// The one commit that begins with these digits: among the tips, else in all history. What else is here is not
    /// looked at: it may be another customer's, and the answer must not depend on it.
    fn abbreviated(&self, source: &mut dyn Source, digits: &str, name: &Name) -> Result<Oid, Error> {
        let digits = digits.to_ascii_lowercase();
        let tips = source.refs(&all_prefixes())?;
        if let Some(id) = only(tips.iter().map(Ref::commit).collect(), &digits, name)? {
            return if self.mirror.has(id) { Ok(id) } else { self.commit(source, id, name) };
        }
        if source.can_filter() {
            // Commits without trees are small; they go into a mirror that is thrown away.
            let history = Mirror::open(self.scratch)?;
            let want = Want { commits: wanted(&tips), commits_only: true, ..Want::default() };
            history.receive(source, &want, self.limits, self.budget)?;
            let found = self::history(&history.odb()?, &tips).into_iter().collect();
            let id = only(found, &digits, name)?.ok_or_else(|| name.not_found())?;
            // The server has just told of it.
            return if self.mirror.has(id) { Ok(id) } else { self.commit(source, id, name) };
        }
        self.everything(source, &tips)?;
        let found = history(&self.mirror.odb()?, &tips).into_iter().collect();
        let id = only(found, &digits, name)?.ok_or_else(|| name.not_found())?;
        self.keep(id)
    }
}

/// Whether a server's words mean that it does not give what was asked for.
fn is_refusal(why: &str) -> bool {
    why.contains("not our ref") || (why.contains("want ") && why.contains("not valid"))
}

fn all_prefixes() -> Vec<String> {
    vec!["refs/heads/".to_string(), "refs/tags/".to_string()]
}

/// What to ask for to have all branches and tags.
fn wanted(tips: &[Ref]) -> Vec<Oid> {
    let ours = |r: &&Ref| r.name.starts_with("refs/heads/") || r.name.starts_with("refs/tags/");
    let mut ids: Vec<Oid> = tips.iter().filter(ours).map(|r| r.id).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// The only id that begins with `digits`; more than one is an error.
fn only(mut ids: Vec<Oid>, digits: &str, name: &Name) -> Result<Option<Oid>, Error> {
    ids.retain(|id| id.to_string().starts_with(digits));
    ids.sort_unstable();
    ids.dedup();
    match ids.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(*one)),
        _ => Err(Error::RefAmbiguous { git_ref: name.text() }),
    }
}

/// The commits that lead to the tips, as far as they are here. What is here besides does not count.
fn history(odb: &Odb<'_>, tips: &[Ref]) -> HashSet<Oid> {
    let mut found = HashSet::new();
    let mut open: Vec<Oid> = wanted(tips).into_iter().filter_map(|id| mirror::peel(odb, id).ok()).collect();
    while let Some(id) = open.pop() {
        // A parent that is not here lies behind what the server has of its history.
        if !found.contains(&id)
            && let Ok(parents) = mirror::parents(odb, id)
        {
            found.insert(id);
            open.extend(parents);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_id_is_a_commit_even_if_a_branch_is_called_so() {
        let id = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(Name::parse(Some(id)).unwrap(), Name::Commit(Oid::from_str(id).unwrap()));
        assert_eq!(Name::parse(None).unwrap(), Name::Head);
        assert_eq!(Name::parse(Some("0123456")).unwrap().digits(), Some("0123456"));
        assert_eq!(Name::parse(Some("012345")).unwrap().digits(), None);
    }

    #[test]
    fn a_refusal_is_known_in_the_words_of_git_and_of_jgit() {
        assert!(is_refusal("the server says: upload-pack: not our ref 1234"));
        assert!(is_refusal("the server says: want 1234 not valid"));
        assert!(!is_refusal("the server says: out of memory"));
    }

    #[test]
    fn names_that_git_forbids_are_refused() {
        for text in [
            "--upload-pack=x",
            "a b",
            "a\n",
            "a..b",
            "a~1",
            "a^{}",
            "a:b",
            ".a",
            "a/.b",
            "a//b",
            "a.lock",
            "a@{1}",
            "a.",
        ] {
            assert!(matches!(Name::parse(Some(text)), Err(Error::Refused { .. })), "{text:?}");
        }
        assert!(Name::parse(Some(&"a".repeat(300))).is_err());
    }
}
