//! The job types of a node: those built into the binary from `jobs/`, and those of the operator's folder.
//! It reads folders and reports faults with file, line and reason; it runs nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use include_dir::{Dir, include_dir};

use super::job_type::{Fault, JobType, Manifest};
use crate::config::did_you_mean;

static BUILT_IN: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/jobs");

/// Largest file of a job type, and most files in one.
const FILE_CAP_BYTES: u64 = 1024 * 1024;
const FILES_CAP: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}{}: {reason}", file.display(), line.map(|l| format!(":{l}")).unwrap_or_default())]
    BadFile { file: PathBuf, line: Option<usize>, reason: String },
    #[error("there is no job type {name:?}{hint}; known: {known}")]
    Unknown { name: String, hint: String, known: String },
}

/// Job types by name; each request kind belongs to at most one.
#[derive(Debug, Clone, Default)]
pub struct Catalog {
    types: BTreeMap<String, Arc<JobType>>,
    by_kind: BTreeMap<u16, Arc<JobType>>,
    /// The names of those in the operator's folder.
    own: BTreeSet<String>,
}

impl Catalog {
    /// The built-in types.
    ///
    /// # Errors
    /// A fault in a built-in file, which a test keeps from being shipped.
    pub fn built_in() -> Result<Catalog, Error> {
        let mut catalog = Catalog::default();
        for folder in BUILT_IN.dirs() {
            let mut files = BTreeMap::new();
            for file in folder.files() {
                if let Some(name) = file.path().file_name() {
                    files.insert(name.to_string_lossy().into_owned(), file.contents().to_vec());
                }
            }
            catalog.add(Path::new("jobs").join(folder.path()).as_path(), files)?;
        }
        Ok(catalog)
    }

    /// The built-in types and those in the sub-folders of `folder`; one of the same name replaces the
    /// built-in type.
    ///
    /// # Errors
    /// The first bad file, with its line and the reason; or a folder that holds no type.
    pub fn with_folder(folder: &Path) -> Result<Catalog, Error> {
        let mut catalog = Catalog::built_in()?;
        let astray = folder.join("job.toml");
        if astray.exists() {
            let why = "is directly in jobs_dir; each type needs its own subfolder, so name the folder above";
            return Err(bad(&astray, why));
        }
        let entries = std::fs::read_dir(folder).map_err(|e| bad(folder, e.to_string()))?;
        let mut folders = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| bad(folder, e.to_string()))?.path();
            if path.is_dir() {
                folders.push(path);
            }
        }
        if folders.is_empty() {
            return Err(bad(folder, "holds no job type: each is a sub-folder with a job.toml"));
        }
        folders.sort();
        let mut own: BTreeMap<String, PathBuf> = BTreeMap::new();
        for path in folders {
            let files = read_folder(&path)?;
            let name = catalog.add(&path, files)?;
            if let Some(other) = own.insert(name.clone(), path.clone()) {
                let why = format!("{name:?} is the name of the type in {}, too", other.display());
                return Err(bad(&path.join("job.toml"), why));
            }
        }
        catalog.own = own.into_keys().collect();
        Ok(catalog)
    }

    /// The names of the operator's own types, sorted.
    pub fn own(&self) -> impl Iterator<Item = &str> {
        self.own.iter().map(String::as_str)
    }

    /// Only the named types.
    ///
    /// # Errors
    /// A name that is not there.
    pub fn only(&self, names: &[String]) -> Result<Catalog, Error> {
        let mut chosen = Catalog::default();
        for name in names {
            let job_type = self.types.get(name).ok_or_else(|| Error::Unknown {
                name: name.clone(),
                hint: did_you_mean(name, self.types.keys().map(String::as_str)),
                known: self.types.keys().cloned().collect::<Vec<_>>().join(", "),
            })?;
            chosen.insert(Arc::clone(job_type));
        }
        Ok(chosen)
    }

    pub fn for_kind(&self, kind: u16) -> Option<&Arc<JobType>> {
        self.by_kind.get(&kind)
    }

    pub fn get(&self, name: &str) -> Option<&Arc<JobType>> {
        self.types.get(name)
    }

    /// Sorted by name.
    pub fn types(&self) -> impl Iterator<Item = &Arc<JobType>> {
        self.types.values()
    }

    /// Sorted request kinds.
    pub fn kinds(&self) -> Vec<u16> {
        self.by_kind.keys().copied().collect()
    }

    /// Puts a type in, in place of one of the same name; returns the name.
    fn add(&mut self, folder: &Path, mut files: BTreeMap<String, Vec<u8>>) -> Result<String, Error> {
        let file = folder.join("job.toml");
        let text = files.remove("job.toml").ok_or_else(|| bad(&file, "is missing"))?;
        let text = String::from_utf8(text).map_err(|_| bad(&file, "is not UTF-8"))?;
        let faulty = |Fault { line, reason }| Error::BadFile { file: file.clone(), line, reason };
        let manifest = Manifest::parse(&text).map_err(faulty)?;
        self.types.retain(|name, _| *name != manifest.name);
        self.by_kind.retain(|_, held| held.manifest.name != manifest.name);
        for kind in &manifest.kinds {
            if let Some(holder) = self.by_kind.get(kind) {
                let why = format!("kinds: {kind} is already served by {:?}", holder.manifest.name);
                return Err(faulty(Fault::at(&text, "kinds", why)));
            }
        }
        let name = manifest.name.clone();
        self.insert(Arc::new(JobType { manifest, files }));
        Ok(name)
    }

    fn insert(&mut self, job_type: Arc<JobType>) {
        for kind in &job_type.manifest.kinds {
            self.by_kind.insert(*kind, Arc::clone(&job_type));
        }
        self.types.insert(job_type.manifest.name.clone(), job_type);
    }
}

fn read_folder(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>, Error> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(|e| bad(folder, e.to_string()))? {
        let entry = entry.map_err(|e| bad(folder, e.to_string()))?;
        let path = entry.path();
        let meta = entry.metadata().map_err(|e| bad(&path, e.to_string()))?;
        if !meta.is_file() {
            return Err(bad(&path, "only plain files may stand in a job type's folder"));
        }
        if meta.len() > FILE_CAP_BYTES || files.len() >= FILES_CAP {
            return Err(bad(&path, format!("over {FILE_CAP_BYTES} bytes, or over {FILES_CAP} files")));
        }
        let name = entry.file_name().into_string().map_err(|_| bad(&path, "name is not UTF-8"))?;
        files.insert(name, std::fs::read(&path).map_err(|e| bad(&path, e.to_string()))?);
    }
    Ok(files)
}

fn bad(file: &Path, reason: impl Into<String>) -> Error {
    Error::BadFile { file: file.to_path_buf(), line: None, reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_type_is_good_and_the_kinds_are_those_of_the_design() {
        let catalog = Catalog::built_in().unwrap();
        let names: Vec<_> = catalog.types().map(|t| t.manifest.name.as_str()).collect();
        assert_eq!(names, ["analysis", "code", "docs", "generic"]);
        assert_eq!(catalog.kinds(), [5000, 5100, 5200, 5300, 5930, 5932, 5933, 5934]);
    }

    #[test]
    fn a_bad_file_in_the_operators_folder_is_named_with_line_and_reason() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("mine")).unwrap();
        std::fs::write(dir.path().join("mine/job.toml"), "name = \"mine\"\nkinds = 7\n").unwrap();
        let error = Catalog::with_folder(dir.path()).unwrap_err().to_string();
        assert!(error.contains("mine/job.toml:2: "), "{error}");
    }

    #[test]
    fn a_folder_that_is_a_type_itself_or_holds_none_is_refused_and_not_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let none = Catalog::with_folder(dir.path()).unwrap_err().to_string();
        assert!(none.contains("holds no job type"), "{none}");
        std::fs::write(dir.path().join("README"), "no folder").unwrap();
        assert_eq!(Catalog::with_folder(dir.path()).unwrap_err().to_string(), none);
        let itself = Path::new("config/example-jobs/lines");
        let itself = Catalog::with_folder(itself).unwrap_err().to_string();
        assert!(itself.contains("lines/job.toml: is directly in jobs_dir"), "{itself}");
    }

    #[test]
    fn a_kind_that_another_type_serves_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("mine")).unwrap();
        let text =
            "name = \"mine\"\ntitle = \"M\"\nkinds = [5930]\nagent = \"script\"\noutput = \"report\"\n";
        std::fs::write(dir.path().join("mine/job.toml"), text).unwrap();
        let error = Catalog::with_folder(dir.path()).unwrap_err().to_string();
        assert!(error.contains("mine/job.toml:3: kinds: 5930 is already served by \"generic\""), "{error}");
    }

    #[test]
    fn two_types_of_one_name_in_the_operators_folder_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (folder, kind) in [("a", 5001), ("b", 5002)] {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
            let text = format!(
                "name = \"same\"\ntitle = \"S\"\nkinds = [{kind}]\nagent = \"script\"\noutput = \"report\"\n"
            );
            std::fs::write(dir.path().join(folder).join("job.toml"), text).unwrap();
        }
        let error = Catalog::with_folder(dir.path()).unwrap_err().to_string();
        assert!(error.contains("\"same\" is the name of the type in"), "{error}");
    }

    #[test]
    fn the_example_for_operators_is_good() {
        let catalog = Catalog::with_folder(Path::new("config/example-jobs")).unwrap();
        assert_eq!(catalog.get("lines").unwrap().manifest.kinds, [5940]);
    }

    #[test]
    fn a_type_of_the_operator_replaces_the_built_in_one_of_its_name() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("g")).unwrap();
        let text =
            "name = \"generic\"\ntitle = \"Mine\"\nkinds = [5000]\nagent = \"script\"\noutput = \"report\"\n";
        std::fs::write(dir.path().join("g/job.toml"), text).unwrap();
        let catalog = Catalog::with_folder(dir.path()).unwrap();
        assert_eq!(catalog.get("generic").unwrap().manifest.title, "Mine");
        assert!(catalog.for_kind(5930).is_none());
    }
}
