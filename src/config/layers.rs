//! The layers and their merging: where each value came from, down to the line. It knows four shapes of
//! value and the names of the keys; whether a value is within bounds is `settings`' business.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::settings::{self, Kind, Setting, Value};
use super::{DEFAULT_TOML, Error, Fault, Problem, Row, Sources};
use crate::keys::PASSWORD_VAR;
use crate::units::Unit;

pub(super) const CONFIG_VAR: &str = "COINOP_CONFIG";
const PREFIX: &str = "COINOP_";
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Which layer gave a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Default,
    File { path: PathBuf, line: usize },
    Env { name: String },
    Flag { name: String },
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Origin::Default => write!(f, "default"),
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Env { name } => write!(f, "environment variable {name}"),
            Origin::Flag { name } => write!(f, "{name}"),
        }
    }
}

/// A flag's word on one setting.
#[derive(Debug, Clone)]
pub struct Override {
    pub key: String,
    pub value: Raw,
    /// As the user typed it: `--relay`.
    pub flag: String,
}

/// What a flag says: already typed, or text still to be read by the setting's type.
#[derive(Debug, Clone)]
pub enum Raw {
    Typed(Value),
    Text(String),
}

/// All layers so far, merged.
#[derive(Debug, Default)]
pub(super) struct Stack {
    values: BTreeMap<&'static str, (Value, Origin)>,
    pub(super) problems: Vec<Problem>,
}

impl Stack {
    pub(super) fn defaults() -> Result<Stack, Error> {
        let mut stack = Stack::default();
        stack.add_toml(DEFAULT_TOML, &|_| Origin::Default);
        if stack.problems.is_empty() { Ok(stack) } else { Err(Error::Bad(stack.problems)) }
    }

    pub(super) fn add_file(&mut self, path: &Path, text: &str) {
        self.add_toml(text, &|line| Origin::File { path: path.to_path_buf(), line });
    }

    fn add_toml(&mut self, text: &str, origin: &dyn Fn(usize) -> Origin) {
        let line_at = |offset: usize| text.bytes().take(offset).filter(|b| *b == b'\n').count() + 1;
        let table = match DeTable::parse(text) {
            Ok(table) => table.into_inner(),
            Err(error) => {
                let line = error.span().map_or(1, |span| line_at(span.start));
                let fault = Fault::Syntax(error.message().to_string());
                return self.problems.push(Problem { place: origin(line).to_string(), fault });
            }
        };
        let mut found = Vec::new();
        flatten(&table, "", &mut found);
        found.sort_by_key(|(_, _, offset)| *offset);
        for (key, value, offset) in found {
            let origin = origin(line_at(offset));
            let fault = match (settings::find(&key), value) {
                (None, _) => unknown(&key),
                (Some(setting), Some(value)) => match shape(setting, value) {
                    Ok(value) => {
                        self.values.insert(setting.key, (value, origin));
                        continue;
                    }
                    Err(fault) => fault,
                },
                (Some(setting), None) => wrong_type(setting, "a table"),
            };
            self.problems.push(Problem { place: origin.to_string(), fault });
        }
    }

    pub(super) fn add_env(&mut self, env: &[(String, String)]) {
        for (name, text) in env {
            if !name.starts_with(PREFIX) || name == CONFIG_VAR || name == PASSWORD_VAR {
                continue;
            }
            let origin = Origin::Env { name: name.clone() };
            match settings::SETTINGS.iter().find(|setting| env_name(setting.key) == *name) {
                Some(setting) => self.put(setting, read(setting, text), origin),
                None => {
                    let fault = Fault::UnknownKey { key: name.clone(), nearest: nearest_var(name) };
                    self.problems.push(Problem { place: "environment".into(), fault });
                }
            }
        }
    }

    pub(super) fn add_flag(&mut self, flag: &Override) {
        let origin = Origin::Flag { name: flag.flag.clone() };
        let Some(setting) = settings::find(&flag.key) else {
            let fault = unknown(&flag.key);
            return self.problems.push(Problem { place: origin.to_string(), fault });
        };
        let value = match &flag.value {
            Raw::Typed(value) => Ok(value.clone()),
            Raw::Text(text) => read(setting, text),
        };
        self.put(setting, value, origin);
    }

    fn put(&mut self, setting: &'static Setting, value: Result<Value, Fault>, origin: Origin) {
        match value {
            Ok(value) => {
                self.values.insert(setting.key, (value, origin));
            }
            Err(fault) => self.problems.push(Problem { place: origin.to_string(), fault }),
        }
    }

    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        self.values.get(key).map(|(value, _)| value)
    }

    pub(super) fn text(&self, key: &str) -> &str {
        match self.value(key) {
            Some(Value::Text(text)) => text,
            _ => "",
        }
    }

    pub(super) fn number(&self, key: &str) -> u64 {
        match self.value(key) {
            Some(Value::Number(number)) => *number,
            _ => 0,
        }
    }

    /// Judges every value; what is wrong is complained about.
    pub(super) fn check(&mut self) {
        for setting in settings::SETTINGS {
            let Some(value) = self.value(setting.key) else { continue };
            match settings::judge(setting, value) {
                Ok(kept) => self.fill(setting.key, kept),
                Err(fault) => self.complain(setting.key, fault),
            }
        }
    }

    /// Changes a value in place; its origin stays.
    pub(super) fn fill(&mut self, key: &str, value: Value) {
        if let Some(slot) = self.values.get_mut(key) {
            slot.0 = value;
        }
    }

    pub(super) fn complain(&mut self, key: &str, fault: Fault) {
        let place = self.place(key);
        self.problems.push(Problem { place, fault });
    }

    pub(super) fn place(&self, key: &str) -> String {
        self.values.get(key).map_or("configuration".into(), |(_, origin)| origin.to_string())
    }

    /// A path of a file starts at the file's folder, others at the working folder; `~/` is the home.
    pub(super) fn make_absolute(&mut self, key: &str, sources: &Sources) {
        let Some((Value::Text(text), origin)) = self.values.get(key) else { return };
        if text.is_empty() {
            return;
        }
        let start = match origin {
            Origin::File { path, .. } => path.parent().unwrap_or(Path::new("/")),
            _ => &sources.cwd,
        };
        let path = match (text.strip_prefix("~/"), sources.home()) {
            (Some(rest), Some(home)) => home.join(rest),
            _ => start.join(text),
        };
        self.fill(key, Value::Text(path.to_string_lossy().into_owned()));
    }

    /// The nested form that `Config` is read from.
    pub(super) fn to_json(&self) -> serde_json::Value {
        let mut root = serde_json::Map::new();
        for (key, (value, _)) in &self.values {
            let value = serde_json::json!(value);
            match key.split_once('.') {
                None => {
                    root.insert((*key).into(), value);
                }
                Some((table, name)) => {
                    let table = root.entry(table).or_insert_with(|| serde_json::json!({}));
                    if let Some(table) = table.as_object_mut() {
                        table.insert(name.into(), value);
                    }
                }
            }
        }
        root.into()
    }

    pub(super) fn rows(&self) -> Vec<Row> {
        let row = |setting: &Setting| {
            let (value, origin) = self.values.get(setting.key)?.clone();
            Some(Row { key: setting.key, value, origin })
        };
        settings::SETTINGS.iter().filter_map(row).collect()
    }
}

/// `limits.wall_ms` → `COINOP_LIMITS_WALL_MS`.
pub fn env_name(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "_").to_uppercase())
}

fn nearest_var(name: &str) -> Option<String> {
    let mut names: Vec<String> = settings::SETTINGS.iter().map(|setting| env_name(setting.key)).collect();
    names.extend([CONFIG_VAR.to_string(), PASSWORD_VAR.to_string()]);
    let name = name.strip_prefix(PREFIX).unwrap_or(name);
    let score = |known: &str| {
        strsim::normalized_damerau_levenshtein(name, known.strip_prefix(PREFIX).unwrap_or(known))
    };
    let best = names.into_iter().max_by(|a, b| score(a).total_cmp(&score(b)))?;
    (score(&best) > 0.6).then_some(best)
}

fn unknown(key: &str) -> Fault {
    Fault::UnknownKey { key: key.to_string(), nearest: settings::nearest(key).map(str::to_string) }
}

fn wrong_type(setting: &Setting, got: &str) -> Fault {
    Fault::WrongType { key: setting.key.into(), expected: setting.kind.name(), got: got.into() }
}

/// Every leaf with its dotted key and the offset of its key. A table under a known leaf's name comes out
/// as that key without a value; an unknown table comes out leaf by leaf.
fn flatten<'t, 'i>(
    table: &'t DeTable<'i>,
    prefix: &str,
    found: &mut Vec<(String, Option<&'t DeValue<'i>>, usize)>,
) {
    for (name, value) in table.iter() {
        let key = if prefix.is_empty() {
            name.get_ref().to_string()
        } else {
            format!("{prefix}.{}", name.get_ref())
        };
        match value.get_ref() {
            DeValue::Table(_) if settings::find(&key).is_some() => found.push((key, None, name.span().start)),
            DeValue::Table(inner) if inner.is_empty() && !is_table(&key) => {
                found.push((key, None, name.span().start));
            }
            DeValue::Table(inner) => flatten(inner, &key, found),
            leaf => found.push((key, Some(leaf), name.span().start)),
        }
    }
}

fn is_table(key: &str) -> bool {
    settings::SETTINGS.iter().any(|s| s.key.strip_prefix(key).is_some_and(|rest| rest.starts_with('.')))
}

/// A TOML value in the shape of its setting.
fn shape(setting: &Setting, value: &DeValue<'_>) -> Result<Value, Fault> {
    let text = |value: &DeValue<'_>| value.as_str().map(str::to_string);
    let shaped = match (setting.kind, value) {
        (Kind::Flag, DeValue::Boolean(flag)) => Some(Value::Flag(*flag)),
        (Kind::Number { .. }, DeValue::Integer(number)) => {
            let read = u64::from_str_radix(number.as_str(), number.radix());
            return read.map(Value::Number).map_err(|_| wrong_type(setting, number.as_str()));
        }
        (Kind::Number { .. }, DeValue::String(text)) if Unit::of_key(setting.key).is_some() => {
            return figure(setting, text).map(Value::Number);
        }
        (Kind::List(_), DeValue::Array(items)) => {
            let items: Option<Vec<_>> = items.iter().map(|item| text(item.get_ref())).collect();
            items.map(Value::List)
        }
        (Kind::Flag | Kind::Number { .. } | Kind::List(_), _) => None,
        (_, other) => text(other).map(Value::Text),
    };
    shaped.ok_or_else(|| wrong_type(setting, &format!("a {}", value.type_str())))
}

/// A number as text; where the key says what it counts, with a unit or without.
fn figure(setting: &Setting, text: &str) -> Result<u64, Fault> {
    match Unit::of_key(setting.key) {
        Some(unit) => {
            unit.read(text, 1).map_err(|error| Fault::Bad { key: setting.key.into(), why: error.to_string() })
        }
        None => {
            let plain = text.trim().replace('_', "");
            plain.parse().map_err(|_| wrong_type(setting, &format!("{text:?}")))
        }
    }
}

/// The text of a variable or of `--set`, in the shape of its setting. A list is separated by commas.
fn read(setting: &Setting, text: &str) -> Result<Value, Fault> {
    match setting.kind {
        Kind::Flag => match text.trim() {
            "true" | "1" | "yes" => Ok(Value::Flag(true)),
            "false" | "0" | "no" => Ok(Value::Flag(false)),
            other => Err(wrong_type(setting, &format!("{other:?}"))),
        },
        Kind::Number { .. } => figure(setting, text).map(Value::Number),
        Kind::List(_) => {
            let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
            Ok(Value::List(items.map(str::to_string).collect()))
        }
        _ => Ok(Value::Text(text.to_string())),
    }
}

pub(super) fn read_capped(path: &Path) -> Result<String, Error> {
    let unreadable = |source| Error::Unreadable { path: path.to_path_buf(), source };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let why = format!("larger than {MAX_FILE_BYTES} bytes");
        return Err(unreadable(std::io::Error::new(std::io::ErrorKind::InvalidData, why)));
    }
    String::from_utf8(bytes)
        .map_err(|_| unreadable(std::io::Error::new(std::io::ErrorKind::InvalidData, "not UTF-8 text")))
}
