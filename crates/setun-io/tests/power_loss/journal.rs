//! A journal of file operations, and the states that a loss of power can leave behind.
//!
//! The model is harsher than any file system promises to be (Pillai et al., "All file
//! systems are not created equal", OSDI 2014): data are durable only behind a sync of
//! their file, a name only behind a sync of its directory, and of the operations that are
//! not, every one survives or not on its own. So later ones may be there without earlier
//! ones, and a write may be torn or leave zeros.

use setun_io::{FileOps, OutputFile, RealOps};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Number of a file or directory, whatever its name.
pub type Node = usize;

/// The directory that is durable from the beginning.
pub const ROOT: Node = 0;

/// One operation.
#[derive(Clone, Debug)]
pub enum Op {
    /// A new directory or file under a name.
    Create {
        parent: Node,
        name: String,
        node: Node,
        is_dir: bool,
    },
    /// Bytes at the end of a file.
    Write { file: Node, bytes: Vec<u8> },
    /// A file or directory becomes durable.
    Sync { node: Node },
    /// A name moves within its directory.
    Rename {
        parent: Node,
        from: String,
        to: String,
        node: Node,
    },
    /// A name goes.
    Remove { parent: Node, name: String },
    /// The caller was told that this step (or version) is committed.
    Reported { what: &'static str, number: u64 },
}

#[derive(Default)]
struct Journal {
    ops: Vec<Op>,
    nodes: BTreeMap<PathBuf, Node>,
    next: Node,
}

impl Journal {
    fn place(&self, path: &Path) -> (Node, String) {
        let parent = path.parent().expect("a path with a parent");
        let name = path.file_name().and_then(|name| name.to_str());
        let parent = *self.nodes.get(parent).expect("a parent in the journal");
        (parent, name.expect("a UTF-8 name").to_owned())
    }

    fn create(&mut self, path: &Path, is_dir: bool) -> Node {
        let (parent, name) = self.place(path);
        self.next += 1;
        let node = self.next;
        self.nodes.insert(path.to_owned(), node);
        self.ops.push(Op::Create {
            parent,
            name,
            node,
            is_dir,
        });
        node
    }

    fn rename(&mut self, from: &Path, to: &Path) {
        let (parent, old) = self.place(from);
        let (to_parent, new) = self.place(to);
        assert_eq!(parent, to_parent, "renames stay in their directory");
        let below = |path: &&PathBuf| path.starts_with(from);
        let moved: Vec<PathBuf> = self.nodes.keys().filter(below).cloned().collect();
        let node = self.nodes[from];
        for path in moved {
            let node = self.nodes.remove(&path).expect("a key of the map");
            let rest = path.strip_prefix(from).expect("filtered by it");
            let target = match rest.as_os_str().is_empty() {
                true => to.to_owned(),
                false => to.join(rest),
            };
            self.nodes.insert(target, node);
        }
        self.ops.push(Op::Rename {
            parent,
            from: old,
            to: new,
            node,
        });
    }

    /// Every name below `path`, deepest first, then `path` itself.
    fn remove(&mut self, path: &Path) {
        let below = |other: &&PathBuf| other.starts_with(path);
        let all: Vec<PathBuf> = self.nodes.keys().filter(below).cloned().collect();
        for path in all.iter().rev() {
            let (parent, name) = self.place(path);
            self.ops.push(Op::Remove { parent, name });
        }
        for path in &all {
            self.nodes.remove(path);
        }
    }
}

/// The operating system with a journal of what was asked of it.
#[derive(Clone)]
pub struct JournalOps(Arc<Mutex<Journal>>);

impl JournalOps {
    /// Records what happens below `root`.
    pub fn new(root: &Path) -> Self {
        let mut journal = Journal::default();
        journal.nodes.insert(root.to_owned(), ROOT);
        Self(Arc::new(Mutex::new(journal)))
    }

    /// Notes what the caller knows to be committed.
    pub fn report(&self, what: &'static str, number: u64) {
        self.with(|journal| journal.ops.push(Op::Reported { what, number }));
    }

    /// Everything so far.
    pub fn ops(&self) -> Vec<Op> {
        self.with(|journal| journal.ops.clone())
    }

    fn with<T>(&self, act: impl FnOnce(&mut Journal) -> T) -> T {
        act(&mut self.0.lock().expect("no panic under the lock"))
    }
}

impl FileOps for JournalOps {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        RealOps.create_dir(path)?;
        self.with(|journal| journal.create(path, true));
        Ok(())
    }

    fn create_file(&self, path: &Path) -> io::Result<Box<dyn OutputFile>> {
        let file = RealOps.create_file(path)?;
        let node = self.with(|journal| journal.create(path, false));
        let journal = self.clone();
        Ok(Box::new(JournalFile {
            journal,
            node,
            file,
        }))
    }

    fn open_file(&self, path: &Path) -> io::Result<Box<dyn Read>> {
        RealOps.open_file(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.with(|journal| {
            let node = journal.nodes[path];
            journal.ops.push(Op::Sync { node });
        });
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealOps.rename(from, to)?;
        self.with(|journal| journal.rename(from, to));
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        RealOps.remove_file(path)?;
        self.with(|journal| journal.remove(path));
        Ok(())
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        RealOps.remove_dir_all(path)?;
        self.with(|journal| journal.remove(path));
        Ok(())
    }

    fn available_bytes(&self, path: &Path) -> io::Result<Option<u64>> {
        RealOps.available_bytes(path)
    }
}

struct JournalFile {
    journal: JournalOps,
    node: Node,
    file: Box<dyn OutputFile>,
}

impl Write for JournalFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        let (file, bytes) = (self.node, bytes[..written].to_vec());
        self.journal
            .with(|journal| journal.ops.push(Op::Write { file, bytes }));
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl OutputFile for JournalFile {
    fn sync(&mut self) -> io::Result<()> {
        let node = self.node;
        self.journal
            .with(|journal| journal.ops.push(Op::Sync { node }));
        Ok(())
    }
}

/// A pseudo-random sequence (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end
    }
}

/// What is on the disk.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Entry {
    /// A file with its contents.
    File(Vec<u8>),
    /// A directory with its names.
    Dir(BTreeMap<String, Entry>),
}

impl Entry {
    /// Puts the contents of a directory below `path`, which exists.
    pub fn write_below(&self, path: &Path) -> io::Result<()> {
        let Self::Dir(names) = self else {
            return fs::write(path, []);
        };
        for (name, entry) in names {
            let path = path.join(name);
            match entry {
                Self::File(bytes) => fs::write(path, bytes)?,
                Self::Dir(_) => {
                    fs::create_dir(&path)?;
                    entry.write_below(&path)?;
                }
            }
        }
        Ok(())
    }
}

/// A state that a loss of power behind the operations `ops` can leave.
pub fn state_after(ops: &[Op], random: &mut Random) -> Entry {
    // All lost, all there, or each on its own.
    let mood = random.below(6);
    let mut files: BTreeMap<Node, Vec<u8>> = BTreeMap::new();
    let mut dirs: BTreeMap<Node, BTreeMap<String, Node>> =
        BTreeMap::from([(ROOT, BTreeMap::new())]);
    for (i, op) in ops.iter().enumerate() {
        let durable = |node: Node| {
            let later = ops[i..].iter();
            later
                .clone()
                .any(|op| matches!(op, Op::Sync { node: synced } if *synced == node))
        };
        let mut survives = |node| durable(node) || mood == 1 || mood > 1 && random.below(2) == 0;
        match op {
            Op::Create {
                parent,
                name,
                node,
                is_dir,
            } => {
                // The node is there if a name leads to it, this one or a later one.
                match is_dir {
                    true => drop(dirs.entry(*node).or_default()),
                    false => drop(files.entry(*node).or_default()),
                }
                if survives(*parent) {
                    dirs.entry(*parent).or_default().insert(name.clone(), *node);
                }
            }
            Op::Rename {
                parent,
                from,
                to,
                node,
            } => {
                if survives(*parent) {
                    let names = dirs.entry(*parent).or_default();
                    names.remove(from);
                    names.insert(to.clone(), *node);
                }
            }
            Op::Remove { parent, name } => {
                if survives(*parent) {
                    dirs.entry(*parent).or_default().remove(name);
                }
            }
            Op::Write { file, bytes } => {
                let kept = match durable(*file) || mood == 1 {
                    true => bytes.len(),
                    false if mood == 0 => 0,
                    false => [0, random.below(bytes.len() + 1), bytes.len()][random.below(3)],
                };
                let contents = files.entry(*file).or_default();
                contents.extend(&bytes[..kept]);
                if kept < bytes.len() && random.below(2) == 0 {
                    // The length was durable, the data were not.
                    contents.resize(contents.len() + bytes.len() - kept, 0);
                }
            }
            Op::Sync { .. } | Op::Reported { .. } => {}
        }
    }
    tree(ROOT, &files, &dirs)
}

fn tree(
    node: Node,
    files: &BTreeMap<Node, Vec<u8>>,
    dirs: &BTreeMap<Node, BTreeMap<String, Node>>,
) -> Entry {
    if let Some(bytes) = files.get(&node) {
        return Entry::File(bytes.clone());
    }
    let names = dirs.get(&node).into_iter().flatten();
    Entry::Dir(
        names
            .map(|(name, node)| (name.clone(), tree(*node, files, dirs)))
            .collect(),
    )
}
