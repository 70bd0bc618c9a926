//! How the node and the shim speak over the container's stdin and stdout: frames of a kind, the number of the run
//! that they are about, and a payload. Orders are JSON, streams are bytes. It knows the format, not what is done.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Both sides speak exactly this; the node refuses another, and the shim another node.
pub const VERSION: u32 = 3;
/// Kind (1), number (4), length of the payload (4), big-endian.
pub const HEADER_BYTES: usize = 9;
/// The longest payload. A command line with its environment must fit.
pub const PAYLOAD_BYTES: usize = 160 * 1024;
/// The longest piece of a stream in one frame.
pub const PIECE_BYTES: usize = 32 * 1024;
/// What of one run may be on its way in one direction before the receiver says that it took some: bytes of input, or
/// `cost` of output.
pub const WINDOW_BYTES: usize = 256 * 1024;
/// What a frame of output counts beside its bytes, so that a window bounds the number of frames, too.
pub const FRAME_COST: usize = 64;

/// What a frame of output with so many bytes takes of its run's window.
pub fn cost(len: usize) -> usize {
    len.saturating_add(FRAME_COST)
}

/// Node → shim, about the run with the frame's number. A question has a number, too: its answer bears it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToShim {
    /// The first frame, once.
    Hello(Hello),
    Run(Run),
    /// Bytes for its stdin, or of the file to write.
    Input(Vec<u8>),
    /// Its stdin has ended.
    EndInput,
    /// The node took output of this cost.
    Took(u32),
    /// Ends the run and all that it started.
    Kill,
    /// Ends every process of the job; answered by `Killed`.
    KillAll,
    /// Answered by `Usage`.
    Usage,
}

/// Shim → node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromShim {
    /// Answers `Hello`.
    Ready(Ready),
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    /// So many bytes of the run's input have gone where they belong.
    Took(u32),
    /// The last frame of a run.
    Ended(Ended),
    /// Answers `KillAll`: nothing of the job runs. Whether the kernel ever killed a process for want of memory.
    Killed {
        starved: bool,
    },
    Usage(Usage),
    /// The shim cannot go on; it ends after this.
    Broken(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub version: u32,
    /// The user and group that the job runs as; not 0.
    pub uid: u32,
    pub gid: u32,
    pub open_files: u32,
    /// How fast what commands print is taken from them, all together.
    pub output_bytes_per_s: u64,
    /// File systems that the shim itself makes before it closes itself in, where the engine cannot make them as they
    /// must be. It needs CAP_SYS_ADMIN for that, and gives it up at once.
    pub mounts: Vec<Mount>,
}

/// Where programs look for the runtime folder of a user.
pub fn runtime_folder(uid: u32) -> String {
    format!("/run/user/{uid}")
}

/// A file system in memory, without set-uid bits and devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Absolute; a folder is there.
    pub path: String,
    /// As tmpfs takes them, `nr_inodes` among them.
    pub options: String,
    pub exec: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    pub version: u32,
    /// Whether Landlock holds here; some engines keep its calls from their containers.
    pub landlock: bool,
    /// As many files as a process here may open at most.
    pub open_files: u64,
    /// Whether its host has swap.
    pub swap: bool,
    /// Whether a limit holds for the buffers of internet sockets; the job has none otherwise.
    #[serde(default)]
    pub sockets: bool,
    /// How large the writable places really are: not every runtime keeps to what a mount asks for.
    pub rooms: Vec<Room>,
}

/// A writable place, as the kernel tells its size; 0 where it tells none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    pub path: String,
    pub bytes: u64,
    pub inodes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    Workspace,
    Job,
}

/// What is to run. All but `Command` are the shim's own work on files, one at a time: the next one ends the one before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Run {
    Command {
        argv: Vec<String>,
        env: Vec<String>,
        /// Relative to the workspace.
        cwd: String,
        stdin: bool,
        /// Whether what it leaves running may go on.
        keep_background: bool,
    },
    /// Sends one plain file as stdout, at most `cap_bytes` of it, or ends with EFBIG.
    Read { place: Place, path: String, cap_bytes: u64 },
    /// Writes its input to one plain file, making its folders.
    Write { place: Place, path: String },
    /// Its input is a tree (`tree`) for the empty workspace.
    Unpack,
    /// Sends the workspace as a tree, without `.git` at the top. A folder that is too deep is told on stderr.
    Pack,
}

/// How a run ended; exactly one of the first three is there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    /// It could not be started, or the work on files failed.
    pub errno: Option<i32>,
    /// Whether the kernel killed a process for want of memory since a command began.
    pub starved: bool,
}

/// Counted by the kernel for the container's cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    pub cpu_us: Option<u64>,
    pub peak_memory_bytes: Option<u64>,
    /// In the job's writable places now.
    pub disk_bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("a frame of unknown kind {0}")]
    Kind(u8),
    #[error("a frame of {0} bytes; at most {PAYLOAD_BYTES} are taken")]
    TooLong(usize),
    #[error("a frame that cannot be read: {0}")]
    Payload(String),
}

/// A message that can travel in a frame.
pub trait Message: Sized {
    /// Its kind and payload.
    fn to_frame(&self) -> (u8, Vec<u8>);
    /// # Errors
    /// When there is no such kind, or the payload is not its.
    fn from_frame(kind: u8, payload: &[u8]) -> Result<Self, Error>;
}

/// One frame, whole.
///
/// # Errors
/// When the payload is longer than a frame takes.
pub fn encode(n: u32, message: &impl Message) -> Result<Vec<u8>, Error> {
    let (kind, payload) = message.to_frame();
    if payload.len() > PAYLOAD_BYTES {
        return Err(Error::TooLong(payload.len()));
    }
    let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len());
    frame.push(kind);
    frame.extend(n.to_be_bytes());
    frame.extend((payload.len() as u32).to_be_bytes());
    frame.extend(payload);
    Ok(frame)
}

/// Puts frames together from bytes as they come.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    /// Bytes at the front that have been handed out.
    taken: usize,
}

impl Decoder {
    pub fn push(&mut self, bytes: &[u8]) {
        if self.taken > 0 {
            self.bytes.drain(..self.taken);
            self.taken = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame's number and message, when it is there.
    ///
    /// # Errors
    /// What is not a frame; nothing after it can be read.
    pub fn take<M: Message>(&mut self) -> Result<Option<(u32, M)>, Error> {
        let rest = self.bytes.get(self.taken..).unwrap_or_default();
        let Some((header, rest)) = rest.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let [kind, n0, n1, n2, n3, l0, l1, l2, l3] = *header;
        let len = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        if len > PAYLOAD_BYTES {
            return Err(Error::TooLong(len));
        }
        let Some(payload) = rest.get(..len) else { return Ok(None) };
        let message = M::from_frame(kind, payload)?;
        self.taken += HEADER_BYTES + len;
        Ok(Some((u32::from_be_bytes([n0, n1, n2, n3]), message)))
    }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    // Numbers, words and lists only: writing them to memory cannot fail.
    serde_json::to_vec(value).unwrap_or_default()
}

fn read<T: DeserializeOwned>(payload: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(payload).map_err(|why| Error::Payload(why.to_string()))
}

fn number(payload: &[u8]) -> Result<u32, Error> {
    let bytes = payload.try_into().map_err(|_| Error::Payload("not a number".to_owned()))?;
    Ok(u32::from_be_bytes(bytes))
}

impl Message for ToShim {
    fn to_frame(&self) -> (u8, Vec<u8>) {
        match self {
            ToShim::Hello(hello) => (0, json(hello)),
            ToShim::Run(run) => (1, json(run)),
            ToShim::Input(bytes) => (2, bytes.clone()),
            ToShim::EndInput => (3, Vec::new()),
            ToShim::Took(bytes) => (4, bytes.to_be_bytes().to_vec()),
            ToShim::Kill => (5, Vec::new()),
            ToShim::KillAll => (6, Vec::new()),
            ToShim::Usage => (7, Vec::new()),
        }
    }

    fn from_frame(kind: u8, payload: &[u8]) -> Result<ToShim, Error> {
        Ok(match kind {
            0 => ToShim::Hello(read(payload)?),
            1 => ToShim::Run(read(payload)?),
            2 => ToShim::Input(payload.to_vec()),
            3 => ToShim::EndInput,
            4 => ToShim::Took(number(payload)?),
            5 => ToShim::Kill,
            6 => ToShim::KillAll,
            7 => ToShim::Usage,
            other => return Err(Error::Kind(other)),
        })
    }
}

impl Message for FromShim {
    fn to_frame(&self) -> (u8, Vec<u8>) {
        match self {
            FromShim::Ready(ready) => (0, json(ready)),
            FromShim::Stdout(bytes) => (1, bytes.clone()),
            FromShim::Stderr(bytes) => (2, bytes.clone()),
            FromShim::Took(bytes) => (3, bytes.to_be_bytes().to_vec()),
            FromShim::Ended(ended) => (4, json(ended)),
            FromShim::Killed { starved } => (5, vec![u8::from(*starved)]),
            FromShim::Usage(usage) => (6, json(usage)),
            FromShim::Broken(why) => (7, why.clone().into_bytes()),
        }
    }

    fn from_frame(kind: u8, payload: &[u8]) -> Result<FromShim, Error> {
        Ok(match kind {
            0 => FromShim::Ready(read(payload)?),
            1 => FromShim::Stdout(payload.to_vec()),
            2 => FromShim::Stderr(payload.to_vec()),
            3 => FromShim::Took(number(payload)?),
            4 => FromShim::Ended(read(payload)?),
            5 => FromShim::Killed { starved: payload != [0] },
            6 => FromShim::Usage(read(payload)?),
            7 => FromShim::Broken(String::from_utf8_lossy(payload).into_owned()),
            other => return Err(Error::Kind(other)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_at_once_and_byte_by_byte<M: Message + PartialEq + std::fmt::Debug>(messages: &[M]) {
        let mut bytes = Vec::new();
        for (n, message) in messages.iter().enumerate() {
            bytes.extend(encode(n as u32, message).unwrap());
        }
        for step in [1, 7, bytes.len()] {
            let (mut decoder, mut at) = (Decoder::default(), 0);
            for piece in bytes.chunks(step) {
                decoder.push(piece);
                while let Some((n, message)) = decoder.take::<M>().unwrap() {
                    assert_eq!((n as usize, &message), (at, &messages[at]));
                    at += 1;
                }
            }
            assert_eq!(at, messages.len(), "in pieces of {step}");
        }
    }

    #[test]
    fn every_message_comes_out_as_it_went_in_whatever_the_pieces() {
        let argv = vec!["sh".to_owned(), "-c".to_owned(), "echo \u{e9}\n".to_owned()];
        all_at_once_and_byte_by_byte(&[
            ToShim::Hello(Hello {
                version: VERSION,
                uid: 1000,
                gid: 1000,
                open_files: 64,
                output_bytes_per_s: u64::MAX,
                mounts: vec![Mount { path: "/tmp".to_owned(), options: "size=1".to_owned(), exec: true }],
            }),
            ToShim::Run(Run::Command {
                argv,
                env: vec!["A=b".to_owned()],
                cwd: "a/b".to_owned(),
                stdin: true,
                keep_background: true,
            }),
            ToShim::Run(Run::Read { place: Place::Job, path: "x".to_owned(), cap_bytes: u64::MAX }),
            ToShim::Run(Run::Write { place: Place::Workspace, path: "y".to_owned() }),
            ToShim::Run(Run::Unpack),
            ToShim::Run(Run::Pack),
            ToShim::Input(vec![0, 255, 10]),
            ToShim::EndInput,
            ToShim::Took(u32::MAX),
            ToShim::Kill,
            ToShim::KillAll,
            ToShim::Usage,
        ]);
        all_at_once_and_byte_by_byte(&[
            FromShim::Ready(Ready {
                version: VERSION,
                landlock: true,
                open_files: 1024,
                swap: true,
                sockets: true,
                rooms: vec![Room { path: "/tmp".to_owned(), bytes: 4096, inodes: 0 }],
            }),
            FromShim::Stdout(Vec::new()),
            FromShim::Stderr(vec![7; 40_000]),
            FromShim::Took(1),
            FromShim::Ended(Ended { signal: Some(9), starved: true, ..Ended::default() }),
            FromShim::Killed { starved: false },
            FromShim::Killed { starved: true },
            FromShim::Usage(Usage { cpu_us: Some(1), ..Usage::default() }),
            FromShim::Broken("why".to_owned()),
        ]);
    }

    #[test]
    fn what_is_no_frame_is_refused_before_it_is_kept() {
        let mut decoder = Decoder::default();
        decoder.push(&[1, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        assert!(matches!(decoder.take::<ToShim>(), Err(Error::TooLong(0xffff_ffff))));
        for (frame, expected) in [
            (vec![9, 0, 0, 0, 0, 0, 0, 0, 0], "a frame of unknown kind 9"),
            (vec![4, 0, 0, 0, 0, 0, 0, 0, 1, 5], "a frame that cannot be read: not a number"),
        ] {
            let mut decoder = Decoder::default();
            decoder.push(&frame);
            assert_eq!(decoder.take::<ToShim>().unwrap_err().to_string(), expected);
        }
        let long = ToShim::Input(vec![0; PAYLOAD_BYTES + 1]);
        assert!(matches!(encode(0, &long), Err(Error::TooLong(_))));
    }
}
