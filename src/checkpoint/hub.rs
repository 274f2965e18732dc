//! The local Hugging Face cache: refs, snapshots, blobs. No network.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// Where the local Hugging Face cache lies.
#[derive(Debug, Clone)]
pub struct HubCache {
    path: PathBuf,
}

impl HubCache {
    /// The cache in this directory (the folder with `models--org--name` in it).
    pub fn new(path: impl Into<PathBuf>) -> HubCache {
        HubCache { path: path.into() }
    }

    /// The cache that the environment names: `HF_HUB_CACHE`, else `HF_HOME/hub`, else
    /// `XDG_CACHE_HOME/huggingface/hub`, else `~/.cache/huggingface/hub`. It need not exist.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if none of these variables nor `HOME` is set.
    pub fn from_env() -> Result<HubCache> {
        #[expect(clippy::disallowed_methods, reason = "the one function that reads the environment")]
        HubCache::from_variables(|name| std::env::var_os(name))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory with the files of `org/name` or `org/name@revision`.
    pub(super) fn snapshot(&self, id: &str) -> Result<PathBuf> {
        let (name, revision) = id.split_once('@').unwrap_or((id, "main"));
        let parts: Vec<&str> = name.split('/').collect();
        if parts.len() > 2 || !parts.iter().copied().all(is_plain) || !revision.split('/').all(is_plain) {
            return Err(Error::new(ErrorKind::Usage, "not a model id").with_expected("org/name[@revision]", id));
        }
        let model = self.path.join(format!("models--{}", parts.join("--")));
        if !model.is_dir() {
            return Err(Error::new(ErrorKind::NotFound, format!("{name} is not in the cache")).with_file(model));
        }
        let snapshots = model.join("snapshots");
        if let Ok(commit) = std::fs::read_to_string(model.join("refs").join(revision)) {
            let commit = commit.trim();
            let snapshot = snapshots.join(commit);
            return match is_plain(commit) && snapshot.is_dir() {
                true => Ok(snapshot),
                false => Err(Error::new(ErrorKind::NotFound, format!("{id} has a ref but no snapshot in the cache"))
                    .with_expected(format!("snapshot {commit:?}"), "none")
                    .with_file(snapshots)),
            };
        }
        let snapshot = snapshots.join(revision);
        if snapshot.is_dir() {
            return Ok(snapshot);
        }
        Err(Error::new(ErrorKind::NotFound, format!("revision {revision} of {name} is not in the cache"))
            .with_file(model))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<HubCache> {
        let set = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = set("HOME");
        let expand = |path: PathBuf| match (path.strip_prefix("~"), &home) {
            (Ok(rest), Some(home)) => home.join(rest),
            _ => path,
        };
        let path = set("HF_HUB_CACHE")
            .or_else(|| set("HF_HOME").map(|path| path.join("hub")))
            .or_else(|| set("XDG_CACHE_HOME").map(|path| path.join("huggingface/hub")))
            .or_else(|| home.as_ref().map(|path| path.join(".cache/huggingface/hub")));
        match path {
            Some(path) => Ok(HubCache::new(expand(path))),
            None => {
                Err(Error::new(ErrorKind::NotFound, "cannot tell where the Hugging Face cache is: HOME is not set"))
            }
        }
    }
}

/// One path component that goes nowhere else.
fn is_plain(part: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'+');
    !matches!(part, "" | "." | "..") && part.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path_with(variables: &[(&str, &str)]) -> Option<String> {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into());
        HubCache::from_variables(find).ok().map(|cache| cache.path().to_str().unwrap().to_owned())
    }

    #[test]
    fn variables_in_their_order() {
        let all = [("HF_HUB_CACHE", "/a"), ("HF_HOME", "/b"), ("XDG_CACHE_HOME", "/c"), ("HOME", "/d")];
        let wanted = ["/a", "/b/hub", "/c/huggingface/hub", "/d/.cache/huggingface/hub"];
        for (from, wanted) in wanted.iter().enumerate() {
            assert_eq!(path_with(&all[from..]).as_deref(), Some(*wanted));
        }
        assert_eq!(path_with(&[]), None);
        assert_eq!(path_with(&[("HF_HOME", "~/x"), ("HOME", "/d")]).as_deref(), Some("/d/x/hub"));
    }
}
