//! TensorBoard event files: scalars that `tensorboard --logdir` shows.
//!
//! A file is a sequence of TFRecords (`tensorflow/core/lib/io/record_writer.h`), each an
//! `Event` message (`tensorflow/core/util/event.proto`) in protobuf's wire format. Only the
//! fields that scalars need are written.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Content of the first record of every event file.
const FILE_VERSION: &str = "brain.Event:2";

/// Files that one directory may get within one second of `wall_time`.
const MAX_FILES_PER_SECOND: u32 = 1000;

/// An event file that cannot be written.
#[derive(Debug, Error)]
#[error("cannot write the TensorBoard file {}: {cause}; check the path, the permissions and the free space", .path.display())]
pub struct TensorboardError {
    /// The file or its directory.
    pub path: PathBuf,
    /// What the operating system said.
    pub cause: io::Error,
}

/// Writes scalars into one event file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    out: BufWriter<File>,
}

impl EventWriter {
    /// Starts a new event file in `dir`, which is created when it is missing. `wall_time`
    /// is in seconds since 1970; the file's name begins with it, so that TensorBoard reads
    /// the files of a resumed run in order.
    pub fn create(dir: &Path, wall_time: f64) -> Result<Self, TensorboardError> {
        let fail = |path: &Path, cause| TensorboardError {
            path: path.to_owned(),
            cause,
        };
        std::fs::create_dir_all(dir).map_err(|cause| fail(dir, cause))?;
        let (path, file) =
            create_new_file(dir, wall_time as u64).map_err(|(path, cause)| fail(&path, cause))?;
        let mut writer = Self {
            path,
            out: BufWriter::new(file),
        };
        let mut event = Message::default();
        event.double(1, wall_time);
        event.bytes(3, FILE_VERSION.as_bytes());
        writer.record(&event.0)?;
        writer.flush()?;
        Ok(writer)
    }

    /// Writes to a file that is there, for tests of one that refuses.
    #[cfg(all(test, target_os = "linux"))]
    pub(crate) fn onto(path: &Path, file: File) -> Self {
        Self {
            path: path.to_owned(),
            out: BufWriter::new(file),
        }
    }

    /// Writes `value` as the value of `tag` at `step`; `wall_time` in seconds since 1970.
    pub fn scalar(
        &mut self,
        step: u64,
        wall_time: f64,
        tag: &str,
        value: f64,
    ) -> Result<(), TensorboardError> {
        let mut scalar = Message::default();
        scalar.bytes(1, tag.as_bytes());
        scalar.float(2, value as f32);
        let mut summary = Message::default();
        summary.bytes(1, &scalar.0);
        let mut event = Message::default();
        event.double(1, wall_time);
        event.varint(2, step);
        event.bytes(5, &summary.0);
        self.record(&event.0)
    }

    /// Hands everything to the operating system.
    pub fn flush(&mut self) -> Result<(), TensorboardError> {
        let result = self.out.flush();
        result.map_err(|cause| self.error(cause))
    }

    /// The event file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One TFRecord: length, its checksum, the data, its checksum; all little-endian.
    fn record(&mut self, data: &[u8]) -> Result<(), TensorboardError> {
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(data.len() + 16);
        record.extend_from_slice(&length);
        record.extend_from_slice(&masked_crc32c(&length).to_le_bytes());
        record.extend_from_slice(data);
        record.extend_from_slice(&masked_crc32c(data).to_le_bytes());
        let result = self.out.write_all(&record);
        result.map_err(|cause| self.error(cause))
    }

    fn error(&self, cause: io::Error) -> TensorboardError {
        TensorboardError {
            path: self.path.clone(),
            cause,
        }
    }
}

/// Creates the first file of `seconds` that does not exist yet. TensorBoard knows its files
/// by `tfevents` in the name.
fn create_new_file(dir: &Path, seconds: u64) -> Result<(PathBuf, File), (PathBuf, io::Error)> {
    let mut number = 0;
    loop {
        let path = dir.join(format!("events.out.tfevents.{seconds:010}.{number}.setun"));
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(cause)
                if cause.kind() == io::ErrorKind::AlreadyExists
                    && number + 1 < MAX_FILES_PER_SECOND =>
            {
                number += 1;
            }
            Err(cause) => return Err((path, cause)),
        }
    }
}

/// A protobuf message under construction. Wire types: 0 varint, 1 eight bytes, 2 length and
/// bytes, 5 four bytes.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, field: u8, value: u64) {
        self.key(field, 0);
        self.raw_varint(value);
    }

    fn double(&mut self, field: u8, value: f64) {
        self.key(field, 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u8, value: &[u8]) {
        self.key(field, 2);
        self.raw_varint(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    fn float(&mut self, field: u8, value: f32) {
        self.key(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    /// Field numbers are below 16, so that the key is one byte.
    fn key(&mut self, field: u8, wire_type: u8) {
        debug_assert!(field < 16);
        self.0.push(field << 3 | wire_type);
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// TFRecord's checksum: a rotated CRC32C plus a constant, so that the checksum of data
/// which holds checksums stays strong.
fn masked_crc32c(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// CRC32C (Castagnoli; RFC 3720 B.4), one table look-up per byte.
fn crc32c(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = crc32c_table();
    !data.iter().fold(!0, |crc, &byte| {
        TABLE[usize::from(crc as u8 ^ byte)] ^ (crc >> 8)
    })
}

const fn crc32c_table() -> [u32; 256] {
    // The polynomial 0x1EDC6F41 with its bits reversed.
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (POLYNOMIAL * (crc & 1));
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An event as read back: wall time, step, file version, tag and value.
    #[derive(Debug, Default, PartialEq)]
    struct Event {
        wall_time: f64,
        step: u64,
        file_version: String,
        tag: String,
        value: f32,
    }

    #[test]
    fn crc32c_of_known_vectors() {
        // The check value of the CRC catalogue, and the vectors of RFC 3720 B.4.
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(b""), 0);
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&ascending), 0x46DD_794E);
        // The first twelve bytes of every event file that TensorFlow writes: 24 and its
        // masked checksum.
        let checksum = masked_crc32c(&24u64.to_le_bytes());
        assert_eq!(checksum.to_le_bytes(), [0xA3, 0x7F, 0x4B, 0x22]);
    }

    #[test]
    fn scalars_are_read_back() {
        let dir = test_dir("scalars");
        let mut writer = EventWriter::create(&dir, 1_700_000_000.25).unwrap();
        writer.scalar(0, 1.5, "loss/train", 7.5).unwrap();
        writer.scalar(300, 2.5, "grad_norm", f64::NAN).unwrap();
        let long = "t".repeat(200);
        writer
            .scalar(u64::from(u32::MAX) + 1, 3.5, &long, -1e-3)
            .unwrap();
        writer.flush().unwrap();

        let events = read_events(&std::fs::read(writer.path()).unwrap());
        assert_eq!(events.len(), 4);
        assert_eq!(events[0].file_version, "brain.Event:2");
        assert_eq!(events[0].wall_time, 1_700_000_000.25);
        let first = Event {
            wall_time: 1.5,
            tag: "loss/train".to_owned(),
            value: 7.5,
            ..Event::default()
        };
        assert_eq!(events[1], first);
        assert_eq!((events[2].step, events[2].value.is_nan()), (300, true));
        assert_eq!((events[3].step, events[3].tag.len()), (1 << 32, 200));
        assert_eq!(events[3].value, -1e-3);
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_second_writer_gets_its_own_file() {
        let dir = test_dir("second");
        let first = EventWriter::create(&dir, 10.0).unwrap();
        let second = EventWriter::create(&dir, 10.9).unwrap();
        assert_ne!(first.path(), second.path());
        for path in [first.path(), second.path()] {
            assert!(path.to_string_lossy().contains("tfevents.0000000010."));
            assert_eq!(read_events(&std::fs::read(path).unwrap()).len(), 1);
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn an_error_names_the_path() {
        let dir = test_dir("error");
        std::fs::write(&dir, b"a file, not a directory").unwrap();
        let error = EventWriter::create(&dir, 0.0).unwrap_err();
        assert!(
            error.to_string().contains(&dir.display().to_string()),
            "{error}"
        );
        std::fs::remove_file(&dir).unwrap();
    }

    fn test_dir(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("setun-tensorboard-{name}-{}", std::process::id()))
    }

    /// Reads a whole event file with checks of its own: the checksum goes bit by bit.
    fn read_events(mut bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            assert_eq!(bytes[8..12], bitwise_masked_crc(&bytes[..8]).to_le_bytes());
            let data = &bytes[12..12 + length];
            let crc = &bytes[12 + length..16 + length];
            assert_eq!(crc, bitwise_masked_crc(data).to_le_bytes());
            let mut event = Event::default();
            read_message(data, &[], &mut event);
            events.push(event);
            bytes = &bytes[16 + length..];
        }
        events
    }

    fn bitwise_masked_crc(data: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in data {
            for bit in 0..8 {
                let input = u32::from(byte >> bit & 1);
                let carry = (crc ^ input) & 1;
                crc >>= 1;
                if carry == 1 {
                    crc ^= 0x1EDC_6F41u32.reverse_bits();
                }
            }
        }
        let crc = crc ^ u32::MAX;
        ((crc / (1 << 15)) | crc.wrapping_mul(1 << 17)).wrapping_add(0xA282_EAD8)
    }

    /// `path`: field numbers of the enclosing messages.
    fn read_message(mut bytes: &[u8], path: &[u64], event: &mut Event) {
        while !bytes.is_empty() {
            let key = read_varint(&mut bytes);
            let field = [path, &[key >> 3]].concat();
            match (key & 7, field.as_slice()) {
                (0, [2]) => event.step = read_varint(&mut bytes),
                (1, [1]) => {
                    event.wall_time = f64::from_le_bytes(take(&mut bytes, 8).try_into().unwrap());
                }
                (5, [5, 1, 2]) => {
                    event.value = f32::from_le_bytes(take(&mut bytes, 4).try_into().unwrap());
                }
                (2, _) => {
                    let length = read_varint(&mut bytes) as usize;
                    let inner = take(&mut bytes, length);
                    match field.as_slice() {
                        [3] => event.file_version = String::from_utf8(inner.to_vec()).unwrap(),
                        [5, 1, 1] => event.tag = String::from_utf8(inner.to_vec()).unwrap(),
                        [5] | [5, 1] => read_message(inner, &field, event),
                        _ => panic!("unknown field {field:?}"),
                    }
                }
                other => panic!("unknown field {other:?}"),
            }
        }
    }

    fn read_varint(bytes: &mut &[u8]) -> u64 {
        let end = bytes.iter().position(|b| b & 0x80 == 0).unwrap();
        let digits = take(bytes, end + 1);
        digits
            .iter()
            .rev()
            .fold(0, |value, b| value << 7 | u64::from(b & 0x7F))
    }

    fn take<'a>(bytes: &mut &'a [u8], n: usize) -> &'a [u8] {
        let (head, tail) = bytes.split_at(n);
        *bytes = tail;
        head
    }
}
