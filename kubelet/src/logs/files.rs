//! The files of one container's log: rotated ones (`0.log.20260131-120000`, perhaps `.gz`) and the current one (`0.log`).

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Block in which files are searched backwards for newlines.
const BLOCK_BYTES: u64 = 64 << 10;
/// Rotated files of one container that are looked at.
const MAX_FILES: usize = 1000;

/// The rotated files, oldest first. Names end in a time, so they sort by age.
pub(super) fn rotated(path: &Path) -> io::Result<Vec<PathBuf>> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Ok(Vec::new());
    };
    let prefix = format!("{name}.");
    let mut files = Vec::new();
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(files),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let known = entry.file_name();
        let Some(rest) = known.to_str().and_then(|known| known.strip_prefix(&prefix)) else { continue };
        if rest.starts_with(|first: char| first.is_ascii_digit()) && !rest.ends_with(".tmp") {
            files.push(entry.path());
        }
    }
    files.sort();
    if files.len() > MAX_FILES {
        files.drain(..files.len() - MAX_FILES);
    }
    Ok(files)
}

/// Whether the file is compressed.
pub(super) fn is_compressed(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "gz")
}

/// A reader of a file of either kind.
pub(super) fn open(path: &Path, offset: u64) -> io::Result<Box<dyn Read + Send>> {
    let mut file = File::open(path)?;
    if is_compressed(path) {
        let mut reader = flate2::read::MultiGzDecoder::new(file);
        io::copy(&mut reader.by_ref().take(offset), &mut io::sink())?;
        return Ok(Box::new(reader));
    }
    file.seek(SeekFrom::Start(offset))?;
    Ok(Box::new(file))
}

/// Where the last `lines` lines of a file begin, and how many there are in it (at most `lines`).
pub(super) fn tail_start_at(path: &Path, lines: u64) -> io::Result<(u64, u64)> {
    if is_compressed(path) { tail_start_compressed(path, lines) } else { tail_start(&mut File::open(path)?, lines) }
}

/// The same of an open file that is not compressed.
pub(super) fn tail_start(file: &mut File, lines: u64) -> io::Result<(u64, u64)> {
    let end = file.metadata()?.len();
    if lines == 0 {
        return Ok((end, 0));
    }
    let mut found = 0;
    let mut at = end;
    let mut block = Vec::new();
    while at > 0 {
        let start = at.saturating_sub(BLOCK_BYTES);
        file.seek(SeekFrom::Start(start))?;
        block.clear();
        file.by_ref().take(at - start).read_to_end(&mut block)?;
        for (index, byte) in block.iter().enumerate().rev() {
            let position = start + index as u64;
            // A newline at the very end closes the last line, it does not begin another.
            if *byte == b'\n' && position + 1 < end {
                found += 1;
                if found == lines {
                    return Ok((position + 1, lines));
                }
            }
        }
        at = start;
    }
    Ok((0, if end > 0 { found + 1 } else { 0 }))
}

/// A compressed file has no way back: the starts of the last lines are kept while reading forwards.
fn tail_start_compressed(path: &Path, lines: u64) -> io::Result<(u64, u64)> {
    let keep = usize::try_from(lines).unwrap_or(usize::MAX);
    let mut starts = std::collections::VecDeque::from([0u64]);
    let mut reader = open(path, 0)?;
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0;
    loop {
        let count = reader.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        for (index, byte) in buffer[..count].iter().enumerate() {
            if *byte == b'\n' {
                starts.push_back(at + index as u64 + 1);
                if starts.len() > keep.saturating_add(1) {
                    starts.pop_front();
                }
            }
        }
        at += count as u64;
    }
    if starts.back() == Some(&at) {
        starts.pop_back();
    }
    while starts.len() > keep {
        starts.pop_front();
    }
    Ok((starts.front().copied().unwrap_or(at), starts.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Against the obvious model: split the whole text.
        #[test]
        fn tails_agree_with_splitting(lines in prop::collection::vec("[a-z]{0,200}", 0..60), wanted in 0u64..70, closed: bool, zip: bool) {
            let mut text = lines.join("\n");
            if closed && !text.is_empty() {
                text.push('\n');
            }
            let dir = tempfile::tempdir().expect("temp folder");
            let path = dir.path().join(if zip { "0.log.1.gz" } else { "0.log" });
            let file = File::create(&path).expect("create");
            if zip {
                let mut encoder = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
                encoder.write_all(text.as_bytes()).expect("write");
                encoder.finish().expect("finish");
            } else {
                (&file).write_all(text.as_bytes()).expect("write");
            }
            let all: Vec<&str> = text.split_inclusive('\n').collect();
            let expected = all[all.len().saturating_sub(usize::try_from(wanted).expect("small"))..].concat();
            let (start, found) = tail_start_at(&path, wanted).expect("tail");
            let mut rest = String::new();
            open(&path, start).expect("open").read_to_string(&mut rest).expect("read");
            prop_assert_eq!(rest, expected);
            prop_assert_eq!(found, wanted.min(all.len() as u64));
        }
    }

    #[test]
    fn rotated_files_are_found_in_order() {
        let dir = tempfile::tempdir().expect("temp folder");
        for name in
            ["0.log", "0.log.20260102-000000", "0.log.20260101-000000.gz", "1.log", "0.log.tmp", "0.log.20260103.tmp"]
        {
            fs::write(dir.path().join(name), "").expect("write");
        }
        let names: Vec<String> = rotated(&dir.path().join("0.log"))
            .expect("list")
            .iter()
            .map(|path| path.file_name().expect("name").to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, ["0.log.20260101-000000.gz", "0.log.20260102-000000"]);
    }
}
