//! Meeting at a file on a file system that all ranks see: rank 0 writes there where it listens, and removes it once all are
//! there, or none will be.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::launch::group::Membership;
use crate::launch::node;
use crate::limits;

/// The first line; the number is that of the form.
const FIRST_LINE: &str = "shardlift rendezvous 1";

/// What it begins with in every form.
const FIRST_WORDS: &str = "shardlift rendezvous ";

/// What rank 0 wrote, as long as it is there.
#[derive(Debug)]
pub(super) struct Published(Token);

/// One file among those that were or will be at this path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::launch) struct Token {
    path: PathBuf,
    token: String,
}

impl Published {
    /// Writes where `listener` is reached. The file appears whole, in the place of one that an earlier run left.
    pub(super) fn new(path: &Path, listener: &TcpListener, membership: &Membership) -> Result<Published> {
        refuse_others(path)?;
        let failed = |error| Error::io("cannot write the rendezvous file", path, error);
        let port = listener.local_addr().map_err(failed)?.port();
        let token = format!("{:016x}", membership.nonce);
        let mut text =
            format!("{FIRST_LINE}\nsession {}\nnode {}\ntoken {token}\n", membership.session, membership.node);
        for address in node::addresses() {
            text.push_str(&format!("address {}\n", SocketAddr::new(address, port)));
        }
        text.push_str(&format!("host {}:{port}\n", node::hostname()));

        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{token}"));
        let temporary = path.with_file_name(name);
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().write(true).create_new(true).open(&temporary)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, path)
        };
        write().map_err(|error| {
            // Where it was not made there is nothing to remove.
            let _ = fs::remove_file(&temporary);
            failed(error)
        })?;
        Ok(Published(Token { path: path.into(), token }))
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        self.0.forget();
    }
}

impl Token {
    /// Removes the file, if it is still this one.
    pub(in crate::launch) fn forget(&self) {
        let ours = read(&self.path).is_ok_and(|text| field(&text, "token") == Some(&self.token));
        if ours {
            // Somebody else of this group may have been faster.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Where the hub of this session says that it is.
pub(super) fn candidates(path: &Path, membership: &Membership) -> io::Result<(Vec<SocketAddr>, Token)> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {what}", path.display()));
    let text = read(path).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    if text.lines().next() != Some(FIRST_LINE) {
        return Err(wrong("no rendezvous file"));
    }
    if field(&text, "session") != Some(&membership.session) {
        return Err(wrong("of another session"));
    }
    let token = field(&text, "token").ok_or_else(|| wrong("no token"))?.to_owned();
    let addresses = fields(&text, "address").filter_map(|address| address.parse::<SocketAddr>().ok());
    let mut found: Vec<SocketAddr> = addresses.collect();
    let host = field(&text, "host");
    if field(&text, "node") == Some(&membership.node)
        && let Some(port) = host.and_then(|host| host.rsplit_once(':')?.1.parse().ok())
    {
        found.insert(0, SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
    }
    // A name that means nothing here is no reason not to try the addresses.
    found.extend(host.and_then(|host| host.to_socket_addrs().ok()).into_iter().flatten());
    found.dedup();
    Ok((found, Token { path: path.into(), token }))
}

/// Refuses to take the place of what no run of ours has left, a file of the model for instance.
fn refuse_others(path: &Path) -> Result<()> {
    if !fs::metadata(path).is_ok_and(|found| found.is_file()) {
        return Ok(());
    }
    match read(path) {
        Ok(text) if text.is_empty() || text.starts_with(FIRST_WORDS) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::InvalidData => {
            Err(Error::io("cannot read the rendezvous file", path, error))
        }
        _ => Err(Error::new(ErrorKind::Usage, "the rendezvous file would take the place of another")
            .with_expected("a rendezvous file, or none", "something else")
            .with_file(path)),
    }
}

/// The file's text. A network file system may remember that there was none until its directory is opened again.
fn read(path: &Path) -> io::Result<String> {
    if let Some(parent) = path.parent() {
        drop(File::open(parent));
    }
    let mut text = String::new();
    File::open(path)?.take(limits::RENDEZVOUS_FILE_MAX).read_to_string(&mut text)?;
    Ok(text)
}

fn fields<'a>(text: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    text.lines().filter_map(move |line| line.strip_prefix(name)?.strip_prefix(' '))
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    fields(text, name).next()
}
