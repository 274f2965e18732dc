//! What the fuzz targets do with an input; `tests/format.rs` does it with the corpus.

use shardlift::checkpoint::Index;
use shardlift::format::Header;

/// A header either breaks a rule or its tensors fill the file.
pub(crate) fn header(file: &[u8]) {
    if let Ok(header) = Header::parse(file, file.len() as u64) {
        let mut end = header.data_start;
        for tensor in &header.tensors {
            assert_eq!(tensor.start, end);
            assert_eq!(tensor.shape.bytes(tensor.dtype), Some(tensor.bytes()));
            end = tensor.end;
        }
        assert_eq!(end, file.len() as u64);
    }
}

/// An index either breaks a rule or names files below its directory.
pub(crate) fn index(bytes: &[u8]) {
    if let Ok(index) = Index::parse(bytes) {
        assert!(index.tensors.iter().all(|&(_, file)| (file as usize) < index.files.len()));
        for file in &index.files {
            assert!(!file.starts_with('/') && file.split('/').all(|part| part != ".."));
        }
    }
}
