//! The file system against the real daemon (`VIRTIOFSD` names it; without one these tests say that
//! they skip), and against peers that are no daemon.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use super::{
    super::{
        device::VirtioDevice,
        driver::{BUFFERS, Driver, EVENT_IDX, HOSTILE_CHAINS, Part},
        saved::Saved,
    },
    config::config,
    *,
};

const QUEUES: [u16; 2] = [512, 512];
// Operations and node of the FUSE protocol (`linux/fuse.h`).
const FUSE_INIT: u32 = 26;
const FUSE_GETATTR: u32 = 3;
const FUSE_LOOKUP: u32 = 1;
const FUSE_OPEN: u32 = 14;
const FUSE_READ: u32 = 15;
const ROOT: u64 = 1;

struct Daemon {
    child: Child,
    folder: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn parameters(tag: &str, request_queues: u16) -> Parameters {
    Parameters {
        tag: tag.to_owned(),
        request_queues,
    }
}

/// Starts the daemon on a folder with one file, and connects to it.
fn daemon() -> Option<(Daemon, UnixStream)> {
    let Some(program) = std::env::var_os("VIRTIOFSD").filter(|path| Path::new(path).exists())
    else {
        println!("skipped: VIRTIOFSD names no virtiofsd");
        return None;
    };
    let folder = tempfile::tempdir().unwrap();
    let shared = folder.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("greeting"), b"hello").unwrap();
    let path = folder.path().join("socket");
    let child = Command::new(program)
        .arg("--shared-dir")
        .arg(&shared)
        .arg("--socket-path")
        .arg(&path)
        .args([
            "--sandbox",
            "none",
            "--seccomp",
            "none",
            "--log-level",
            "error",
        ])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let daemon = Daemon { child, folder };
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        if let Ok(stream) = UnixStream::connect(&path) {
            return Some((daemon, stream));
        }
        std::thread::yield_now();
    }
    panic!("virtiofsd does not listen");
}

fn driver() -> Driver {
    Driver::new(&QUEUES)
}

/// The device with its thread.
fn served(socket: UnixStream) -> Fs {
    let parameters = parameters("pericarp", 1);
    let mut fs = Fs::new("share".to_owned(), parameters, Some(socket)).unwrap();
    fs.start_threads(|| Ok(())).unwrap();
    fs
}

/// A FUSE request.
fn header(operation: u32, node: u64, body: &[u8]) -> Vec<u8> {
    // struct fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, padding.
    let mut bytes = Vec::new();
    bytes.extend(u32::try_from(40 + body.len()).unwrap().to_le_bytes());
    bytes.extend(operation.to_le_bytes());
    bytes.extend(7u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

/// Waits for the next answer on the request queue and gives its length.
fn answer(driver: &mut Driver) -> u32 {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some((_, used)) = driver.queues[1].take_used() {
            return used;
        }
        assert!(Instant::now() < deadline, "the daemon does not answer");
        std::thread::yield_now();
    }
}

/// Sends a FUSE request on the request queue and waits for its answer: error and body.
fn request(
    driver: &mut Driver,
    operation: u32,
    node: u64,
    body: &[u8],
    room: u32,
) -> (i32, Vec<u8>) {
    let bytes = header(operation, node, body);
    driver.put(BUFFERS, &bytes);
    let len = u32::try_from(bytes.len()).unwrap();
    let answer_at = BUFFERS + 0x1000;
    driver.queues[1]
        .offer(&[Part::Read(BUFFERS, len), Part::Write(answer_at, 16 + room)])
        .unwrap();
    driver.kick(1).write(1).unwrap();
    let used = answer(driver);
    let answer = driver.get(answer_at, usize::try_from(used).unwrap());
    // struct fuse_out_header: len, error, unique.
    let error = i32::from_le_bytes(answer[4..8].try_into().unwrap());
    assert_eq!(answer[8..16], 7u64.to_le_bytes());
    (error, answer[16..].to_vec())
}

fn init_body() -> Vec<u8> {
    // struct fuse_init_in: major, minor, max_readahead, flags.
    let words = [7u32, 38, 0, 0];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn init(driver: &mut Driver) {
    let (error, body) = request(driver, FUSE_INIT, 0, &init_body(), 64);
    assert_eq!(error, 0);
    assert_eq!(body[..4], 7u32.to_le_bytes(), "major version");
}

#[test]
fn the_daemon_serves_the_guests_queues_also_after_a_reset() {
    let Some((_daemon, socket)) = daemon() else {
        return;
    };
    let mut fs = served(socket);
    assert!(fs.owns_kicks());
    assert_eq!(fs.queue_sizes(), QUEUES);
    for _ in 0..3 {
        let mut driver = driver();
        fs.activate(driver.activation(1 << 32)).unwrap();
        init(&mut driver);
        let (error, attributes) = request(&mut driver, FUSE_GETATTR, ROOT, &[0; 16], 104);
        assert_eq!((error, attributes.len()), (0, 104));
        // struct fuse_entry_out has 128 bytes; the size of the file is at 40 + 8.
        let (error, entry) = request(&mut driver, FUSE_LOOKUP, ROOT, b"greeting\0", 128);
        assert_eq!(error, 0);
        assert_eq!(entry[48..56], 5u64.to_le_bytes());
        let (error, _) = request(&mut driver, FUSE_LOOKUP, ROOT, b"missing\0", 128);
        assert_eq!(error, -libc::ENOENT);
        fs.reset();
        fs.reset();
    }
}

#[test]
fn a_file_system_goes_on_where_it_stood() {
    let Some((_daemon, socket)) = daemon() else {
        return;
    };
    let mut fs = served(socket);
    let mut driver = driver();
    fs.activate(driver.activation(1 << 32)).unwrap();
    init(&mut driver);
    let text = serde_json::to_string(&fs.save()).unwrap();
    let saved: Saved = serde_json::from_str(&text).unwrap();
    assert_eq!(saved.queues[1].next_used, 1);
    fs.restore(&saved.state).unwrap();
    fs.activate(driver.activation_at(1 << 32, &saved.queues))
        .unwrap();
    let (error, _) = request(&mut driver, FUSE_GETATTR, ROOT, &[0; 16], 104);
    assert_eq!(error, 0, "the next entry of the same rings");
}

#[test]
fn the_daemons_end_breaks_the_device_once_and_for_good() {
    let Some((mut daemon, socket)) = daemon() else {
        return;
    };
    let mut fs = served(socket);
    let driver = driver();
    fs.activate(driver.activation(1 << 32)).unwrap();
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    let broken = driver.turn(&mut fs, 10_000).unwrap_err();
    assert!(
        broken
            .to_string()
            .contains("virtio-fs share: the daemon has ended")
    );
    assert!(!driver.turn(&mut fs, 0).unwrap(), "told once");
    fs.reset();
    let driver = self::driver();
    let broken = fs.activate(driver.activation(1 << 32)).unwrap_err();
    assert!(broken.to_string().contains("the daemon has ended"));
}

/// A chain that breaks the rules breaks the device until it is reset; the daemon sees none of it.
#[test]
fn a_hostile_ring_breaks_the_device_until_it_is_reset() {
    let Some((_daemon, socket)) = daemon() else {
        return;
    };
    let mut fs = served(socket);
    for (what, break_queue) in HOSTILE_CHAINS {
        let mut driver = driver();
        fs.activate(driver.activation(1 << 32)).unwrap();
        break_queue(&mut driver.queues[1]);
        driver.kick(1).write(1).unwrap();
        let broken = until_broken(&driver, &mut fs);
        assert!(broken.contains("virtio-fs share: "), "{what}: {broken}");
        fs.reset();
        let mut driver = self::driver();
        fs.activate(driver.activation(1 << 32)).unwrap();
        init(&mut driver);
        fs.reset();
    }
}

fn until_broken(driver: &Driver, fs: &mut Fs) -> String {
    let deadline = Instant::now() + Duration::from_secs(20);
    while Instant::now() < deadline {
        for (token, readiness) in driver.poller.wait(100) {
            if let Err(broken) = fs.descriptor_ready(token, readiness) {
                return broken.to_string();
            }
        }
    }
    panic!("the device does not break");
}

/// Requests of all sizes, many at once, from both ends of the guest's memory.
#[test]
fn much_goes_through() {
    let Some((daemon, socket)) = daemon() else {
        return;
    };
    let path: PathBuf = daemon.folder.path().join("shared/large");
    let bytes: Vec<u8> = (0_u32..1 << 19).flat_map(u32::to_le_bytes).collect();
    std::fs::write(path, &bytes).unwrap();
    let mut fs = served(socket);
    let mut driver = driver();
    fs.activate(driver.activation(1 << 32 | EVENT_IDX)).unwrap();
    init(&mut driver);
    let (error, entry) = request(&mut driver, FUSE_LOOKUP, ROOT, b"large\0", 128);
    assert_eq!(error, 0);
    let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
    let (error, open) = request(&mut driver, FUSE_OPEN, node, &[0; 8], 16);
    assert_eq!(error, 0);
    let handle = &open[..8];
    // struct fuse_read_in: fh, offset, size, read_flags, lock_owner, flags, padding.
    for (offset, size) in [
        (0_u64, 1_u32 << 20),
        (1 << 20, 1 << 20),
        (4096, 4096),
        (5, 7),
    ] {
        let mut body = handle.to_vec();
        body.extend(offset.to_le_bytes());
        body.extend(size.to_le_bytes());
        body.extend([0; 20]);
        let (error, data) = request(&mut driver, FUSE_READ, node, &body, size);
        assert_eq!(error, 0);
        let at = usize::try_from(offset).unwrap();
        assert!(data == bytes[at..at + size as usize], "{offset} {size}");
    }
    // More at once than the daemon's queue has room for.
    let header = header(FUSE_GETATTR, ROOT, &[0; 16]);
    driver.put(BUFFERS, &header);
    let len = u32::try_from(header.len()).unwrap();
    let mut offered = 0;
    while driver.queues[1]
        .offer(&[
            Part::Read(BUFFERS, len),
            Part::Write(BUFFERS + 0x1000 + 0x100 * offered, 120),
        ])
        .is_some()
    {
        offered += 1;
    }
    driver.kick(1).write(1).unwrap();
    assert_eq!(offered, 256);
    for _ in 0..offered {
        assert_eq!(answer(&mut driver), 120);
    }
    let signals = driver.signals.queue.load(Ordering::SeqCst);
    assert!(signals > 0 && signals <= 6 + offered, "{signals}");
}

#[test]
fn without_a_daemon_requests_wait_and_the_queues_can_be_taken_over() {
    let mut fs = Fs::new("share".to_owned(), parameters("pericarp", 1), None).unwrap();
    fs.start_threads(|| Ok(())).unwrap();
    let mut driver = driver();
    fs.activate(driver.activation(1 << 32)).unwrap();
    let bytes = header(FUSE_INIT, 0, &init_body());
    driver.put(BUFFERS, &bytes);
    let parts = [
        Part::Read(BUFFERS, u32::try_from(bytes.len()).unwrap()),
        Part::Write(BUFFERS + 0x1000, 80),
    ];
    driver.queues[1].offer(&parts).unwrap();
    driver.kick(1).write(1).unwrap();
    assert!(driver.poller.wait(50).is_empty());
    assert!(driver.queues[1].take_used().is_none());
    let saved = fs.save();
    let Some((_daemon, socket)) = daemon() else {
        return;
    };
    let mut fs = served(socket);
    fs.restore(&saved.state).unwrap();
    let activation = driver.activation_at(1 << 32, &saved.queues);
    fs.activate(activation).unwrap();
    assert!(answer(&mut driver) > 16, "what waited is answered");
}

#[test]
fn parameters_out_of_range_are_refused_by_name() {
    let refuse = |tag: &str, queues| {
        let (near, _far) = UnixStream::pair().unwrap();
        let error = Fs::new("share".to_owned(), parameters(tag, queues), Some(near)).unwrap_err();
        error.to_string()
    };
    assert!(refuse("", 1).contains("tag"));
    assert!(refuse("a\0b", 1).contains("tag"));
    assert!(refuse(&"x".repeat(37), 1).contains("longer than 36 bytes"));
    assert!(refuse("x", 0).contains("request_queues is 0; give 1 to 16"));
    assert!(refuse("x", 17).contains("request_queues is 17"));
    let Some((_daemon, socket)) = daemon() else {
        return;
    };
    let error = Fs::new("share".to_owned(), parameters("x", 2), Some(socket)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("request_queues is 2; give 1 to 1"),
        "{error}"
    );
}

#[test]
fn a_peer_that_is_no_daemon_is_an_error_that_names_the_message() {
    let (near, far) = UnixStream::pair().unwrap();
    drop(far);
    let error = Fs::new("share".to_owned(), parameters("x", 1), Some(near)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("file system x: the daemon refused SET_OWNER"),
        "{error}"
    );

    let (near, mut far) = UnixStream::pair().unwrap();
    far.write_all(&[0xff; 64]).unwrap();
    let error = Fs::new("share".to_owned(), parameters("x", 1), Some(near)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the daemon refused GET_FEATURES"),
        "{error}"
    );
    let mut first = [0; 12];
    far.read_exact(&mut first).unwrap();
    assert_eq!(first[..4], 3u32.to_le_bytes(), "SET_OWNER comes first");
}

#[test]
fn the_configuration_is_tag_and_queues() {
    let bytes = config("pericarp", 1).unwrap();
    assert_eq!(&bytes[..9], b"pericarp\0");
    assert_eq!(bytes[36..], [1, 0, 0, 0]);
    assert_eq!(config(&"x".repeat(36), 2).unwrap()[35..37], [b'x', 2]);
}

/// A daemon that agrees to everything and never answers a request.
fn false_daemon() -> (UnixStream, std::thread::JoinHandle<()>) {
    let (near, mut far) = UnixStream::pair().unwrap();
    let daemon = std::thread::spawn(move || {
        let mut header = [0; 12];
        while far.read_exact(&mut header).is_ok() {
            let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
            let mut body = vec![0; usize::try_from(word(8)).unwrap()];
            far.read_exact(&mut body).unwrap();
            // GET_FEATURES and GET_PROTOCOL_FEATURES: a reply of 8 bytes; all else is ignored.
            let answer = match word(0) {
                1 => u64::MAX,
                15 => 0,
                _ => continue,
            };
            let mut reply = header.to_vec();
            reply[4..8].copy_from_slice(&5u32.to_le_bytes());
            reply[8..12].copy_from_slice(&8u32.to_le_bytes());
            reply.extend(answer.to_le_bytes());
            far.write_all(&reply).unwrap();
        }
    });
    (near, daemon)
}

/// A daemon that hangs holds up nobody but who waits for its answers.
#[test]
fn a_daemon_that_hangs_holds_nothing_up() {
    let (near, daemon) = false_daemon();
    let mut fs = served(near);
    for _ in 0..3 {
        let mut driver = driver();
        fs.activate(driver.activation(1 << 32)).unwrap();
        driver.put(BUFFERS, &header(FUSE_INIT, 0, &init_body()));
        let parts = [Part::Read(BUFFERS, 56), Part::Write(BUFFERS + 0x1000, 80)];
        driver.queues[1].offer(&parts).unwrap();
        driver.kick(1).write(1).unwrap();
        let start = Instant::now();
        fs.reset();
        assert!(start.elapsed() < Duration::from_secs(3));
        assert!(driver.queues[1].take_used().is_none());
    }
    drop(fs);
    daemon.join().unwrap();
}
