//! Makes packs of a repository on this host: for `file://` sources and for the small server. It reads
//! objects and refs only; nothing is run, and nothing is written but the pack.

use std::collections::{HashSet, VecDeque};
use std::io::Write;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use git2::{ObjectType, Oid, Repository};
use sha1::{Digest, Sha1};

use super::remote::{Ref, Want};
use super::tree::{self, Kind};
use super::{Error, mirror};

/// A pack's contents and where its history is cut.
#[derive(Debug, Default)]
pub(super) struct Contents {
    pub objects: Vec<Oid>,
    /// Commits in the pack whose parents are left out.
    pub shallow: Vec<Oid>,
}

/// Collects what `want` needs beyond the trees of what is had already.
pub(super) fn contents(repo: &Repository, want: &Want) -> Result<Contents, Error> {
    let odb = repo.odb().map_err(Error::broken)?;
    let mut out = Contents::default();
    let mut seen: HashSet<Oid> = HashSet::new();
    for have in &want.have {
        if let Ok(tree) = mirror::tree_of(&odb, *have) {
            walk(&odb, tree, &mut seen, &mut |_| {})?;
            seen.insert(*have);
        }
    }
    let mut queue: VecDeque<(Oid, u32)> = VecDeque::new();
    for id in &want.commits {
        let mut id = *id;
        while let Ok(tag) = repo.find_tag(id) {
            if seen.insert(id) {
                out.objects.push(id);
            }
            id = tag.target_id();
        }
        queue.push_back((id, 1));
    }
    let depth = want.depth.unwrap_or(u32::MAX);
    while let Some((id, level)) = queue.pop_front() {
        let Ok(commit) = repo.find_commit(id) else {
            return Err(Error::unreachable(format!("not our ref {id}")));
        };
        let fresh = seen.insert(id);
        if level >= depth && commit.parent_count() > 0 {
            out.shallow.push(id);
        }
        if !fresh {
            // Had with its history, or visited already.
            continue;
        }
        out.objects.push(id);
        if !want.commits_only {
            walk(&odb, commit.tree_id(), &mut seen, &mut |id| out.objects.push(id))?;
        }
        if level < depth {
            queue.extend(commit.parent_ids().map(|p| (p, level + 1)));
        }
    }
    Ok(out)
}

fn walk(
    odb: &git2::Odb<'_>,
    top: Oid,
    seen: &mut HashSet<Oid>,
    add: &mut dyn FnMut(Oid),
) -> Result<(), Error> {
    let mut stack = vec![top];
    while let Some(id) = stack.pop() {
        if !seen.insert(id) {
            continue;
        }
        add(id);
        for entry in tree::read(odb, id)? {
            match entry.kind {
                Kind::Folder => stack.push(entry.id),
                Kind::Submodule => {}
                _ => {
                    if seen.insert(entry.id) {
                        add(entry.id);
                    }
                }
            }
        }
    }
    Ok(())
}

/// How a pack's objects are written. Whole in any case: looking for deltas takes libgit2's builder many times
/// longer than all the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// Not compressed, which takes half as long again and saves nothing over loopback or from folder to folder.
    Fast,
    /// Compressed a little, for a pack that stays.
    Small,
}

/// Writes the pack as it is made.
pub(super) fn write(repo: &Repository, objects: &[Oid], how: How, to: &mut dyn Write) -> Result<(), Error> {
    let odb = repo.odb().map_err(Error::broken)?;
    let mut hash = Sha1::new();
    let mut put = |bytes: &[u8]| {
        hash.update(bytes);
        to.write_all(bytes).map_err(|e| Error::from_io(e, 0))
    };
    let count = u32::try_from(objects.len()).map_err(|_| Error::broken("too many objects for a pack"))?;
    put(b"PACK\0\0\0\x02")?;
    put(&count.to_be_bytes())?;
    let mut packed = Vec::new();
    for id in objects {
        let object = odb.read(*id).map_err(Error::broken)?;
        packed.clear();
        object_header(&mut packed, object.kind(), object.len())?;
        match how {
            How::Fast => store(&mut packed, object.data()),
            How::Small => squeeze(&mut packed, object.data())?,
        }
        put(&packed)?;
    }
    let sum = hash.finalize();
    to.write_all(&sum).map_err(|e| Error::from_io(e, 0))
}

fn squeeze(out: &mut Vec<u8>, data: &[u8]) -> Result<(), Error> {
    let mut zlib = ZlibEncoder::new(out, Compression::fast());
    zlib.write_all(data).and_then(|()| zlib.finish().map(|_| ())).map_err(Error::host("compress an object"))
}

/// A zlib stream that stores and does not compress.
fn store(out: &mut Vec<u8>, data: &[u8]) {
    out.extend_from_slice(&[0x78, 0x01]);
    let mut blocks = data.chunks(usize::from(u16::MAX)).peekable();
    if data.is_empty() {
        out.extend_from_slice(&[1, 0, 0, 0xff, 0xff]);
    }
    while let Some(block) = blocks.next() {
        let length = block.len() as u16;
        out.push(u8::from(blocks.peek().is_none()));
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&(!length).to_le_bytes());
        out.extend_from_slice(block);
    }
    // Adler-32; so many bytes can be summed before 32 bits overflow.
    let (mut a, mut b) = (1u32, 0u32);
    for part in data.chunks(5552) {
        for byte in part {
            a += u32::from(*byte);
            b += a;
        }
        a %= 65_521;
        b %= 65_521;
    }
    out.extend_from_slice(&(b << 16 | a).to_be_bytes());
}

/// Kind and size, seven bits a byte after the first four.
fn object_header(out: &mut Vec<u8>, kind: ObjectType, size: usize) -> Result<(), Error> {
    let code = match kind {
        ObjectType::Commit => 1u8,
        ObjectType::Tree => 2,
        ObjectType::Blob => 3,
        ObjectType::Tag => 4,
        ObjectType::Any => return Err(Error::broken("an object without a kind")),
    };
    let more = |rest: usize| if rest > 0 { 0x80u8 } else { 0 };
    let mut rest = size >> 4;
    out.push(code << 4 | (size & 15) as u8 | more(rest));
    while rest > 0 {
        let bits = (rest & 0x7f) as u8;
        rest >>= 7;
        out.push(bits | more(rest));
    }
    Ok(())
}

/// `HEAD`, branches and tags, sorted by name.
pub(super) fn refs(repo: &Repository) -> Result<Vec<Ref>, Error> {
    let mut all = Vec::new();
    if let Ok(head) = repo.head().and_then(|h| h.peel_to_commit()) {
        all.push(Ref { name: "HEAD".to_string(), id: head.id(), peeled: None });
    }
    for found in repo.references().map_err(Error::broken)? {
        let Ok(found) = found else { continue };
        let (Ok(name), Ok(direct)) = (found.name(), found.resolve()) else { continue };
        let Some(id) = direct.target() else { continue };
        let is_tag = repo.odb().is_ok_and(|o| o.read_header(id).is_ok_and(|(_, k)| k == ObjectType::Tag));
        let peeled = if is_tag {
            direct.peel(ObjectType::Any).ok().map(|o| o.id()).filter(|p| *p != id)
        } else {
            None
        };
        all.push(Ref { name: name.to_string(), id, peeled });
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}
