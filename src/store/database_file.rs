//! The file of an embedded database: made at the first start, held by one process, and watched. SQLite itself notices neither
//! that its file was deleted nor that another one has taken its place: it goes on writing to what nobody will find again.

use std::fs;
use std::fs::File;
use std::fs::TryLockError;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;

use crate::store::open_error::OpenError;

pub(super) struct DatabaseFile {
    /// Without symbolic links: two names of one file are one.
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
    /// Locks. Closing any descriptor of the file would take SQLite's own locks away, so this one stays open.
    _held: [File; 2],
    query: String,
}

impl DatabaseFile {
    /// Makes the file if it is not there, and locks it: a second process finds it locked under whatever name.
    pub fn hold(url: &str) -> Result<Self, OpenError> {
        let (name, query) = url.split_once('?').unwrap_or((url, ""));
        let name = name.trim_start_matches("sqlite:").trim_start_matches("//");
        let failed = |cause| OpenError::Lock { path: name.to_owned(), cause };
        let file = File::options().read(true).write(true).create(true).truncate(false).open(name).map_err(failed)?;
        let path = fs::canonicalize(name).map_err(failed)?;
        lock(&file, &path)?;
        // Processes of the last release look here.
        let mut beside = path.clone().into_os_string();
        beside.push(".lock");
        let beside = PathBuf::from(beside);
        let marker = File::create(&beside).map_err(failed)?;
        lock(&marker, &beside)?;
        let identity = identity(&file.metadata().map_err(failed)?);
        let other = |pair: &&str| !pair.is_empty() && !pair.starts_with("mode=");
        let query = query.split('&').filter(other).map(|pair| format!("&{pair}")).collect();
        Ok(Self { path, identity, _held: [file, marker], query })
    }

    /// Where to connect. Nothing is made there: a file that has gone is not replaced by an empty one.
    pub fn url(&self) -> String {
        format!("sqlite://{}?mode=rw{}", self.path.display(), self.query)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn is_in_place(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|there| identity(&there) == self.identity)
    }
}

fn identity(file: &fs::Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

fn lock(file: &File, path: &Path) -> Result<(), OpenError> {
    let path = || path.display().to_string();
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => OpenError::InUse(path()),
        TryLockError::Error(cause) => OpenError::Lock { path: path(), cause: io::Error::other(cause) },
    })
}
