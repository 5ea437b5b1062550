//! Versioned JSON files: `{"version": 1, …}`.

use std::{fs::File, io, io::Read, path::Path};

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::{StoreError, atomic_write, file::keep_aside};

const VERSION: u64 = 1;
/// INVARIANT: a file longer than this is refused before it is read. Bytes.
const MAX_JSON: u64 = 16 << 20;

/// Reads a file that [`write_versioned_json`] wrote; `None` if there is none. A file that cannot be understood is kept
/// aside and reported as [`StoreError::Corrupt`]; one from a newer program is left alone.
pub fn read_versioned_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::io("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_JSON + 1).read_to_end(&mut bytes).map_err(StoreError::io("read", path))?;
    if bytes.len() as u64 > MAX_JSON {
        return Err(keep_aside(path, format!("it is larger than {} MiB", MAX_JSON >> 20)));
    }
    let mut object: Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|error| keep_aside(path, error.to_string()))?;
    match object.remove("version").as_ref().and_then(Value::as_u64) {
        Some(VERSION) => {}
        Some(found) if found > VERSION => return Err(StoreError::NewerVersion { path: path.to_owned(), found }),
        _ => return Err(keep_aside(path, "it states no version")),
    }
    serde_json::from_value(Value::Object(object)).map(Some).map_err(|error| keep_aside(path, error.to_string()))
}

/// Writes a struct as JSON for people, with a version, in one step and for its owner only (0600).
pub fn write_versioned_json<T: Serialize>(path: &Path, value: &T) -> Result<(), StoreError> {
    let invalid = |error: String| StoreError::io("write", path)(io::Error::new(io::ErrorKind::InvalidInput, error));
    let Value::Object(fields) = serde_json::to_value(value).map_err(|error| invalid(error.to_string()))? else {
        return Err(invalid("only a struct can carry a version".to_owned()));
    };
    if fields.contains_key("version") {
        return Err(invalid("the field `version` is the file's own".to_owned()));
    }
    let mut object = Map::from_iter([("version".to_owned(), Value::from(VERSION))]);
    object.extend(fields);
    let mut bytes = serde_json::to_vec_pretty(&object).map_err(|error| invalid(error.to_string()))?;
    bytes.push(b'\n');
    atomic_write(path, &bytes, 0o600)
}
