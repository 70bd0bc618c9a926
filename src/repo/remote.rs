//! Our half of git's smart protocol, versions 2 and 0: which commit a name means, and a pack of it.
//! Written here, not taken from libgit2, so that no C parses a stranger's packet lines and no library
//! opens a socket. What a pack contains is judged by others.

use std::io::{Read, Write};

use git2::Oid;

use super::Error;
use super::budget::Budget;
use super::http::Http;
use super::pkt::{self, Pkt, Reader};

/// Most refs read.
const MAX_REFS: usize = 200_000;
/// Most lines before the pack.
const MAX_PREAMBLE: usize = 100_000;

/// What to fetch.
#[derive(Debug, Clone, Default)]
pub(super) struct Want {
    pub commits: Vec<Oid>,
    /// 1: the commits alone, without their history.
    pub depth: Option<u32>,
    /// Commits whose trees are complete here; their history is taken as missing.
    pub have: Vec<Oid>,
    /// Ask for commits without trees and files.
    pub commits_only: bool,
}

/// One ref: its name, what it points to, and the commit behind an annotated tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ref {
    pub name: String,
    pub id: Oid,
    pub peeled: Option<Oid>,
}

impl Ref {
    pub fn commit(&self) -> Oid {
        self.peeled.unwrap_or(self.id)
    }
}

/// Where objects come from.
pub(super) trait Source {
    /// The refs whose name starts with one of `prefixes` (more are possible); `HEAD` is a name.
    fn refs(&mut self, prefixes: &[String]) -> Result<Vec<Ref>, Error>;
    /// Whether any commit may be asked for, not only what a ref points to.
    fn gives_any_commit(&self) -> bool;
    fn can_filter(&self) -> bool;
    /// Asks whether the server gives this commit, which is here already, and takes nothing.
    ///
    /// # Errors
    /// The server's refusal, as `fetch` would tell it.
    fn gives(&mut self, id: Oid) -> Result<(), Error>;
    /// Writes a pack. The thin packs it may contain lean only on trees of `have`.
    fn fetch(&mut self, want: &Want, pack: &mut dyn Write) -> Result<(), Error>;
}

/// A server reached over HTTP.
pub(super) struct Remote<'a> {
    http: Http<'a>,
    budget: &'a Budget,
    /// Version 0 sends all refs at once.
    refs: Option<Vec<Ref>>,
    capabilities: Vec<String>,
}

impl<'a> Remote<'a> {
    pub fn open(mut http: Http<'a>, budget: &'a Budget) -> Result<Remote<'a>, Error> {
        let mut reader = Reader::new(http.advertisement()?);
        let mut remote_refs: Option<Vec<Ref>> = None;
        let mut capabilities: Vec<String> = Vec::new();
        let explain = |e| budget.explain(e);
        let mut first = true;
        let mut v2 = false;
        let mut spoke = false;
        while let Some(packet) = reader.next().map_err(explain)? {
            let Pkt::Data(data) = packet else { continue };
            let line = pkt::text(data);
            refuse_error(line)?;
            spoke = true;
            if first && line.starts_with(b"# service=") {
                continue;
            }
            if first && line == b"version 2" {
                v2 = true;
            } else if first && line == b"version 1" {
                continue;
            } else if v2 {
                if capabilities.len() >= 256 {
                    return Err(Error::TooLarge { what: "capabilities", cap: 256 });
                }
                capabilities.push(String::from_utf8_lossy(line).into_owned());
            } else {
                let refs = remote_refs.get_or_insert_with(Vec::new);
                let (line, caps) = split_once(line, 0);
                if let Some(caps) = caps.filter(|_| first) {
                    capabilities = String::from_utf8_lossy(caps).split(' ').map(str::to_string).collect();
                }
                push_v0(refs, line)?;
            }
            first = false;
        }
        if !spoke {
            return Err(Error::unreachable("the server's advertisement is empty"));
        }
        drop(reader);
        // No line of refs at all is how some servers tell of an empty repository.
        let refs = if v2 { None } else { Some(remote_refs.unwrap_or_default()) };
        let remote = Remote { http, budget, refs, capabilities };
        if let Some(format) = remote.value("object-format").filter(|f| *f != "sha1") {
            return Err(Error::refused(format!("the repository's object format is {format:?}, not sha1")));
        }
        Ok(remote)
    }

    /// `value` of a capability `name=value`.
    fn value(&self, name: &str) -> Option<&str> {
        self.capabilities.iter().find_map(|c| c.strip_prefix(name)?.strip_prefix('='))
    }

    fn has(&self, name: &str) -> bool {
        self.capabilities.iter().any(|c| c == name)
    }

    fn is_v2(&self) -> bool {
        self.refs.is_none()
    }

    fn fetch_feature(&self, name: &str) -> bool {
        self.value("fetch").is_some_and(|v| v.split(' ').any(|f| f == name))
    }

    fn shallow(&self) -> bool {
        if self.is_v2() { self.fetch_feature("shallow") } else { self.has("shallow") }
    }

    fn command(&self, name: &str) -> Vec<u8> {
        let mut out = Vec::new();
        pkt::write(&mut out, format!("command={name}\n"));
        // A capability is sent only to a server that offered it.
        if self.value("agent").is_some() {
            pkt::write(&mut out, concat!("agent=coinop/", env!("CARGO_PKG_VERSION"), "\n"));
        }
        if self.value("object-format").is_some() {
            pkt::write(&mut out, "object-format=sha1\n");
        }
        pkt::delimiter(&mut out);
        out
    }

    fn request_v2(&self, want: &Want) -> Vec<u8> {
        let mut out = self.command("fetch");
        for flag in ["no-progress", "ofs-delta"] {
            pkt::write(&mut out, flag);
        }
        if !want.have.is_empty() {
            pkt::write(&mut out, "thin-pack");
        }
        self.shallow_lines(want, &mut out);
        if want.commits_only && self.can_filter() {
            pkt::write(&mut out, "filter tree:0");
        }
        for id in &want.commits {
            pkt::write(&mut out, format!("want {id}\n"));
        }
        for id in &want.have {
            pkt::write(&mut out, format!("have {id}\n"));
        }
        pkt::write(&mut out, "done\n");
        pkt::flush(&mut out);
        out
    }

    fn request_v0(&self, want: &Want) -> Result<Vec<u8>, Error> {
        if !self.has("side-band-64k") {
            return Err(Error::unreachable("the server is too old (no side-band-64k)"));
        }
        // Some servers (dulwich) refuse a client that leaves one of the first three out, even where it changes nothing.
        let flags: Vec<&str> = ["side-band-64k", "ofs-delta", "thin-pack", "no-progress", "shallow"]
            .into_iter()
            .filter(|f| self.has(f))
            .collect();
        let mut out = Vec::new();
        for (n, id) in want.commits.iter().enumerate() {
            let caps = if n == 0 { format!(" {}", flags.join(" ")) } else { String::new() };
            pkt::write(&mut out, format!("want {id}{caps}\n"));
        }
        self.shallow_lines(want, &mut out);
        pkt::flush(&mut out);
        for id in &want.have {
            pkt::write(&mut out, format!("have {id}\n"));
        }
        pkt::write(&mut out, "done\n");
        Ok(out)
    }

    /// Saying of every commit here that it is shallow is always true enough: at worst a parent we do
    /// have comes once more.
    fn shallow_lines(&self, want: &Want, out: &mut Vec<u8>) {
        let Some(depth) = want.depth.filter(|_| self.shallow()) else { return };
        for id in &want.have {
            pkt::write(&mut *out, format!("shallow {id}\n"));
        }
        pkt::write(out, format!("deepen {depth}\n"));
    }
}

impl Source for Remote<'_> {
    fn refs(&mut self, prefixes: &[String]) -> Result<Vec<Ref>, Error> {
        if let Some(all) = &self.refs {
            return Ok(all.clone());
        }
        let mut request = self.command("ls-refs");
        pkt::write(&mut request, "peel\n");
        for prefix in prefixes {
            pkt::write(&mut request, format!("ref-prefix {prefix}\n"));
        }
        pkt::flush(&mut request);
        let mut reader = Reader::new(self.http.upload_pack(&request, true)?);
        let mut refs = Vec::new();
        while let Some(packet) = reader.next().map_err(|e| self.budget.explain(e))? {
            let Pkt::Data(data) = packet else { continue };
            let line = pkt::text(data);
            refuse_error(line)?;
            // Nobody can ask for a name that is not UTF-8; what stands in for its bytes is not its name.
            let Ok(text) = std::str::from_utf8(line) else { continue };
            let mut words = text.split(' ');
            let (Some(id), Some(name)) = (words.next(), words.next()) else { continue };
            // `unborn` stands for a HEAD without commits.
            let Some(id) = full_id(id) else { continue };
            let peeled = words.find_map(|w| w.strip_prefix("peeled:")).and_then(full_id);
            push(&mut refs, Ref { name: name.to_string(), id, peeled })?;
        }
        Ok(refs)
    }

    fn gives_any_commit(&self) -> bool {
        self.is_v2() || self.has("allow-reachable-sha1-in-want") || self.has("allow-any-sha1-in-want")
    }

    fn can_filter(&self) -> bool {
        self.is_v2() && self.fetch_feature("filter")
    }

    fn gives(&mut self, id: Oid) -> Result<(), Error> {
        let want = Want { commits: vec![id], depth: Some(1), have: vec![id], ..Want::default() };
        let mut answer = Beginning::default();
        match self.fetch(&want, &mut answer) {
            // A refusal comes in a pack's place; what would be in the pack is here.
            Err(_) if answer.is_pack() => Ok(()),
            other => other,
        }
    }

    fn fetch(&mut self, want: &Want, pack: &mut dyn Write) -> Result<(), Error> {
        let v2 = self.is_v2();
        let request = if v2 { self.request_v2(want) } else { self.request_v0(want)? };
        let body = self.http.upload_pack(&request, v2)?;
        read_pack(Reader::new(body), v2, self.budget, pack)
    }
}

/// Takes the beginning of a pack and stops there.
#[derive(Default)]
struct Beginning(Vec<u8>);

impl Beginning {
    fn is_pack(&self) -> bool {
        self.0.starts_with(b"PACK")
    }
}

impl Write for Beginning {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.extend(bytes.iter().take(4_usize.saturating_sub(self.0.len())));
        if self.0.len() < 4 { Ok(bytes.len()) } else { Err(std::io::Error::other("enough of the pack")) }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Reads past acknowledgements and shallow lines, then writes what comes in band 1.
fn read_pack<R: Read>(
    mut reader: Reader<R>,
    v2: bool,
    budget: &Budget,
    pack: &mut dyn Write,
) -> Result<(), Error> {
    let mut in_pack = false;
    let mut preamble = 0usize;
    while let Some(packet) = reader.next().map_err(|e| budget.explain(e))? {
        let data = match packet {
            Pkt::Data(data) => data,
            // In version 2 a flush ends the answer, in version 0 only after the pack has begun.
            Pkt::Flush if v2 || in_pack => break,
            _ => continue,
        };
        if !in_pack {
            let line = pkt::text(data);
            refuse_error(line)?;
            preamble += 1;
            if preamble > MAX_PREAMBLE {
                return Err(Error::TooLarge { what: "lines before the pack", cap: MAX_PREAMBLE as u64 });
            }
            if v2 {
                in_pack = line == b"packfile";
                continue;
            }
            if !matches!(data.first(), Some(1..=3)) {
                continue;
            }
            in_pack = true;
        }
        match data.split_first() {
            Some((1, bytes)) => pack.write_all(bytes).map_err(|e| Error::from_io(e, budget.cap_ms))?,
            Some((2, _)) | None => {}
            Some((3, message)) => {
                return Err(Error::unreachable(format!("the server says: {}", said(message))));
            }
            Some(_) => return Err(Error::unreachable("the server sends an unknown band")),
        }
    }
    if in_pack { Ok(()) } else { Err(Error::unreachable("the server sent no pack")) }
}

/// A server's words, made safe to show.
fn said(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.trim().chars().filter(|c| !c.is_control()).take(200).collect()
}

fn refuse_error(line: &[u8]) -> Result<(), Error> {
    match line.strip_prefix(b"ERR ") {
        Some(message) => Err(Error::unreachable(format!("the server says: {}", said(message)))),
        None => Ok(()),
    }
}

fn split_once(line: &[u8], at: u8) -> (&[u8], Option<&[u8]>) {
    let mut parts = line.splitn(2, |b| *b == at);
    (parts.next().unwrap_or(line), parts.next())
}

/// A full lower- or upper-case id, and nothing else.
pub(super) fn full_id(text: &str) -> Option<Oid> {
    let full = text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit());
    full.then(|| Oid::from_str(text).ok())?.filter(|id| !id.is_zero())
}

fn push(refs: &mut Vec<Ref>, one: Ref) -> Result<(), Error> {
    if refs.len() >= MAX_REFS {
        return Err(Error::TooLarge { what: "refs", cap: MAX_REFS as u64 });
    }
    refs.push(one);
    Ok(())
}

/// One line of a version 0 advertisement; `name^{}` peels the ref before it.
fn push_v0(refs: &mut Vec<Ref>, line: &[u8]) -> Result<(), Error> {
    let Ok(text) = std::str::from_utf8(line) else { return Ok(()) };
    let Some((id, name)) = text.split_once(' ') else { return Ok(()) };
    let Some(id) = full_id(id) else { return Ok(()) };
    if let Some(tag) = name.strip_suffix("^{}") {
        if let Some(before) = refs.last_mut().filter(|r| r.name == tag) {
            before.peeled = Some(id);
        }
        return Ok(());
    }
    push(refs, Ref { name: name.to_string(), id, peeled: None })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn budget() -> Budget {
        Budget::new(1_000, 1_000, 1 << 20, Instant::now())
    }

    #[test]
    fn a_version_0_advertisement_gives_refs_and_what_tags_peel_to() {
        let mut refs = Vec::new();
        let (a, b) = ("a".repeat(40), "b".repeat(40));
        for line in
            [format!("{a} refs/tags/v1"), format!("{b} refs/tags/v1^{{}}"), format!("{b} refs/tags/v2^{{}}")]
        {
            push_v0(&mut refs, line.as_bytes()).unwrap();
        }
        assert_eq!(refs.len(), 1);
        assert_eq!(refs[0].commit().to_string(), b);
        push_v0(&mut refs, b"nonsense").unwrap();
        push_v0(&mut refs, b"\xff\xff refs/x").unwrap();
        push_v0(&mut refs, &[a.as_bytes(), b" refs/heads/\xff"].concat()).unwrap();
        assert_eq!(refs.len(), 1, "nobody can ask for such a name, least of all by what stands in for it");
    }

    fn remote<'a>(budget: &'a Budget, refs: Option<Vec<Ref>>, capabilities: &[&str]) -> Remote<'a> {
        let http = Http::new("http://h.example/a".parse().unwrap(), false, budget);
        let capabilities = capabilities.iter().map(|c| c.to_string()).collect();
        Remote { http, budget, refs, capabilities }
    }

    #[test]
    fn a_capability_is_sent_only_to_a_server_that_offered_it() {
        let budget = budget();
        let want =
            Want { commits: vec![full_id(&"a".repeat(40)).unwrap()], depth: Some(1), ..Want::default() };
        let sent = |refs: Option<Vec<Ref>>, capabilities: &[&str]| {
            let remote = remote(&budget, refs, capabilities);
            let bytes =
                if remote.is_v2() { remote.request_v2(&want) } else { remote.request_v0(&want).unwrap() };
            String::from_utf8(bytes).unwrap()
        };
        let bare = sent(None, &["ls-refs", "fetch"]);
        for name in ["agent", "object-format", "deepen", "filter"] {
            assert!(!bare.contains(name), "{name}: {bare}");
        }
        let rich = sent(None, &["agent=git/2.39", "ls-refs", "fetch=shallow filter", "object-format=sha1"]);
        for line in ["agent=coinop/", "object-format=sha1", "deepen 1"] {
            assert!(rich.contains(line), "{line}: {rich}");
        }
        let old = sent(Some(Vec::new()), &["side-band-64k"]);
        assert!(old.contains(" side-band-64k\n") && !old.contains("agent"), "{old}");
        // Even where nothing is here that a thin pack could lean on.
        let dulwich = sent(Some(Vec::new()), &["side-band-64k", "thin-pack", "ofs-delta", "agent=dulwich/1"]);
        assert!(dulwich.contains(" side-band-64k ofs-delta thin-pack\n"), "{dulwich}");
    }

    #[test]
    fn the_pack_is_what_comes_in_band_one() {
        let mut bytes = Vec::new();
        pkt::write(&mut bytes, "shallow aaaa\n");
        pkt::flush(&mut bytes);
        pkt::write(&mut bytes, "NAK\n");
        pkt::write(&mut bytes, b"\x02counting");
        pkt::write(&mut bytes, b"\x01PA");
        pkt::write(&mut bytes, b"\x01CK");
        pkt::flush(&mut bytes);
        let mut pack = Vec::new();
        read_pack(Reader::new(&bytes[..]), false, &budget(), &mut pack).unwrap();
        assert_eq!(pack, b"PACK");
    }

    #[test]
    fn a_servers_complaint_is_told_without_its_control_characters() {
        let mut bytes = Vec::new();
        pkt::write(&mut bytes, "packfile\n");
        pkt::write(&mut bytes, b"\x03no \x1b[31mway\n");
        let error = read_pack(Reader::new(&bytes[..]), true, &budget(), &mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "the repository cannot be reached: the server says: no [31mway");
        let mut bytes = Vec::new();
        pkt::write(&mut bytes, "ERR not our ref\n");
        let error = read_pack(Reader::new(&bytes[..]), true, &budget(), &mut Vec::new()).unwrap_err();
        assert!(error.to_string().ends_with("the server says: not our ref"));
    }
}
