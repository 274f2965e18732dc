//! What the operating system says of a file beyond its bytes: file system, alignment, page cache. Linux answers all
//! of it; elsewhere the answer is "not known".

use std::fs::File;
use std::io::Result;
use std::path::Path;

/// What kind of file system a file lies on, as far as the choice of an engine needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileSystem {
    /// A disk of this machine, with this file system name (`ext4`, `xfs`, `btrfs`, ...).
    Local(&'static str),
    /// Memory (`tmpfs`, `ramfs`): every read is a copy.
    Memory(&'static str),
    /// Another machine, or a host below this one (`nfs`, `lustre`, `virtiofs`, `fuse`, ...).
    Network(&'static str),
    /// Not known, with its magic number.
    Unknown(i64),
}

impl FileSystem {
    /// The name, `"unknown"` if it is not known.
    pub fn name(self) -> &'static str {
        match self {
            FileSystem::Local(name) | FileSystem::Memory(name) | FileSystem::Network(name) => name,
            FileSystem::Unknown(_) => "unknown",
        }
    }

    /// The file system with this magic number, as `statfs(2)` reports it.
    #[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "only Linux tells the number"))]
    fn of_magic(magic: i64) -> FileSystem {
        // linux/magic.h and the headers of file systems kept outside the kernel.
        match magic as u32 {
            0xEF53 => FileSystem::Local("ext4"),
            0x5846_5342 => FileSystem::Local("xfs"),
            0x9123_683E => FileSystem::Local("btrfs"),
            0xF2F5_2010 => FileSystem::Local("f2fs"),
            0x2FC1_2FC1 => FileSystem::Local("zfs"),
            0xCA45_1A4E => FileSystem::Local("bcachefs"),
            0x794C_7630 => FileSystem::Local("overlay"),
            0x7371_7368 => FileSystem::Local("squashfs"),
            0x5346_544E => FileSystem::Local("ntfs"),
            0x4D44 => FileSystem::Local("vfat"),
            0x2011_BAB0 => FileSystem::Local("exfat"),
            0xE0F5_E1E2 => FileSystem::Local("erofs"),
            0x0102_1994 => FileSystem::Memory("tmpfs"),
            0x8584_58F6 => FileSystem::Memory("ramfs"),
            0x9584_58F6 => FileSystem::Memory("hugetlbfs"),
            0x6969 => FileSystem::Network("nfs"),
            0x517B => FileSystem::Network("smb"),
            0xFE53_4D42 => FileSystem::Network("smb2"),
            0xFF53_4D42 => FileSystem::Network("cifs"),
            0x6573_5546 => FileSystem::Network("fuse"),
            0x6A65_6A63 => FileSystem::Network("virtiofs"),
            0x0102_1997 => FileSystem::Network("9p"),
            0x0BD0_0BD0 => FileSystem::Network("lustre"),
            0x00C3_6400 => FileSystem::Network("ceph"),
            0x4750_4653 => FileSystem::Network("gpfs"),
            0x1983_0326 => FileSystem::Network("beegfs"),
            0x0116_1970 => FileSystem::Network("gfs2"),
            0x7461_636F => FileSystem::Network("ocfs2"),
            0x5346_414F => FileSystem::Network("afs"),
            _ => FileSystem::Unknown(magic),
        }
    }
}

/// What O_DIRECT reads must be multiples of, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectAlignment {
    /// The address in memory.
    pub memory: u32,
    /// The offset in the file and the length.
    pub offset: u32,
}

/// What the system says of O_DIRECT reads of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DirectReads {
    /// Nothing, as before Linux 6.1, and of some file systems after that: the first read tells.
    Unknown,
    /// There are none.
    Refused,
    /// They must be multiples of this.
    Of(DirectAlignment),
}

impl DirectReads {
    /// What is told with these numbers, of which 0 says that there are none.
    #[cfg_attr(not(target_os = "linux"), allow(dead_code, reason = "only Linux tells the numbers"))]
    fn told(memory: u32, offset: u32) -> DirectReads {
        match memory == 0 || offset == 0 {
            true => DirectReads::Refused,
            false => DirectReads::Of(DirectAlignment { memory, offset }),
        }
    }

    /// Whether there may be some whose offsets, lengths and addresses are multiples of `alignment`.
    pub(super) fn may_be(self, alignment: u64) -> bool {
        match self {
            DirectReads::Unknown => true,
            DirectReads::Refused => false,
            DirectReads::Of(needed) => {
                [needed.memory, needed.offset].iter().all(|&bytes| alignment.is_multiple_of(u64::from(bytes)))
            }
        }
    }
}

pub(super) use platform::{direct_reads, file_system, forget_pages, is_resident, open_direct};

#[cfg(target_os = "linux")]
mod platform {
    use std::fs::OpenOptions;
    use std::os::unix::fs::OpenOptionsExt;

    use rustix::fs::{Advice, AtFlags, OFlags, StatxFlags};

    use super::*;

    pub(in crate::source) use crate::source::resident::is_resident;

    pub(in crate::source) fn file_system(file: &File) -> Result<FileSystem> {
        #[allow(clippy::unnecessary_cast, reason = "the field's type differs between targets")]
        let magic = rustix::fs::fstatfs(file)?.f_type as i64;
        Ok(FileSystem::of_magic(magic))
    }

    pub(in crate::source) fn direct_reads(file: &File) -> DirectReads {
        let asked = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
        let told = |mask: u32| StatxFlags::from_bits_retain(mask).contains(StatxFlags::DIOALIGN);
        match asked {
            Ok(stat) if told(stat.stx_mask) => DirectReads::told(stat.stx_dio_mem_align, stat.stx_dio_offset_align),
            _ => DirectReads::Unknown,
        }
    }

    pub(in crate::source) fn open_direct(path: &Path) -> Result<File> {
        OpenOptions::new().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path)
    }

    pub(in crate::source) fn forget_pages(file: &File) -> Result<()> {
        Ok(rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?)
    }
}

#[cfg(not(target_os = "linux"))]
mod platform {
    use std::io::{Error, ErrorKind};

    use super::*;

    pub(in crate::source) fn file_system(_file: &File) -> Result<FileSystem> {
        Ok(FileSystem::Unknown(0))
    }

    pub(in crate::source) fn direct_reads(_file: &File) -> DirectReads {
        DirectReads::Unknown
    }

    pub(in crate::source) fn open_direct(_path: &Path) -> Result<File> {
        Err(Error::from(ErrorKind::Unsupported))
    }

    pub(in crate::source) fn is_resident(_file: &File, _offset: u64) -> Option<bool> {
        None
    }

    pub(in crate::source) fn forget_pages(_file: &File) -> Result<()> {
        Err(Error::from(ErrorKind::Unsupported))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magic_numbers() {
        assert_eq!(FileSystem::of_magic(0xEF53), FileSystem::Local("ext4"));
        assert_eq!(FileSystem::of_magic(0x9123_683E_u32 as i32 as i64), FileSystem::Local("btrfs"));
        assert_eq!(FileSystem::of_magic(1), FileSystem::Unknown(1));
    }

    #[test]
    fn a_file_that_refuses_direct_reads_is_none_that_does_not_say() {
        assert!(DirectReads::Unknown.may_be(4096));
        for (memory, offset) in [(0, 0), (0, 512), (512, 0)] {
            assert_eq!(DirectReads::told(memory, offset), DirectReads::Refused);
        }
        assert!(!DirectReads::Refused.may_be(4096));
        for (memory, offset, may_be) in [(4, 512, true), (4096, 4096, true), (8192, 512, false), (4, 65536, false)] {
            assert_eq!(DirectReads::told(memory, offset).may_be(4096), may_be, "{memory} {offset}");
        }
    }
}
