//! The node's server: reads requests from standard input, answers on standard output.
//!
//! One thread reads frames and never waits for a command; each request has a thread of its own;
//! all write through one lock, frame by frame.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

use super::{process, setup};
use crate::node::channel::{
    Exit, FRAME_PAYLOAD_BYTES_MAX, Frame, Kind, Request, STDIN_WINDOW_BYTES,
};

/// Frames of standard input that can wait for one command: the window, in frames that may be as
/// short as one byte are still limited by the sender's credit, and a cancel needs a place too.
const INPUT_FRAMES_MAX: usize = STDIN_WINDOW_BYTES + 2;

/// What a running command is sent.
#[derive(Debug)]
pub(super) enum Input {
    /// Bytes for its standard input; empty is the end.
    Bytes(Vec<u8>),
    /// Kill it.
    Cancel,
}

/// The writing end, shared by all requests.
#[derive(Debug, Clone)]
pub(super) struct Answers {
    output: Arc<Mutex<File>>,
}

impl Answers {
    /// Sends a frame. That the test is gone is no error of the command.
    pub(super) fn send(&self, frame: &Frame) {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = frame.write(&mut *output) {
            eprintln!("node: {error:#}");
        }
    }

    /// Sends bytes in as many frames as they need.
    pub(super) fn bytes(&self, id: u32, kind: Kind, bytes: &[u8]) {
        for chunk in bytes.chunks(FRAME_PAYLOAD_BYTES_MAX) {
            self.send(&Frame {
                id,
                kind,
                payload: chunk.to_vec(),
            });
        }
    }

    fn done(&self, id: u32, exit: &Exit) {
        match Frame::json(id, Kind::Done, exit) {
            Ok(frame) => self.send(&frame),
            Err(error) => eprintln!("node: {error:#}"),
        }
    }
}

type Running = Arc<Mutex<HashMap<u32, SyncSender<Input>>>>;

/// Serves until the test is gone or asks to power off.
pub fn run() -> Result<()> {
    let input = duplicate(std::io::stdin().as_fd())?;
    let output = duplicate(std::io::stdout().as_fd())?;
    let answers = Answers {
        output: Arc::new(Mutex::new(output)),
    };
    answers.send(&Frame {
        id: 0,
        kind: Kind::Hello,
        payload: Vec::new(),
    });
    serve(input, &answers)
}

fn duplicate(fd: std::os::fd::BorrowedFd<'_>) -> Result<File> {
    let owned = fd
        .try_clone_to_owned()
        .context("cannot share the control channel")?;
    Ok(File::from(owned))
}

fn serve(mut input: impl Read, answers: &Answers) -> Result<()> {
    let running = Running::default();
    let mut path = String::new();
    while let Some(frame) = Frame::read(&mut input)? {
        match frame.kind {
            Kind::Request => {
                let request: Request = serde_json::from_slice(&frame.payload)
                    .context("the test sent a request that is none")?;
                if let Request::SetUp(set_up) = &request {
                    path.clone_from(&set_up.path);
                }
                if matches!(request, Request::PowerOff) {
                    answers.done(frame.id, &Exit::Code(0));
                    return Ok(());
                }
                start(frame.id, request, &path, answers, &running);
            }
            Kind::Stdin => forward(&running, frame.id, Input::Bytes(frame.payload)),
            Kind::Cancel => forward(&running, frame.id, Input::Cancel),
            _ => eprintln!("node: a frame {:?} that only the node sends", frame.kind),
        }
    }
    Ok(())
}

fn forward(running: &Running, id: u32, input: Input) {
    let running = running.lock().unwrap_or_else(PoisonError::into_inner);
    // A command that has ended meanwhile needs no input.
    if let Some(sender) = running.get(&id) {
        let _full_or_gone = sender.try_send(input);
    }
}

fn start(id: u32, request: Request, path: &str, answers: &Answers, running: &Running) {
    let (sender, receiver) = sync_channel(INPUT_FRAMES_MAX);
    running
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .insert(id, sender);
    let (path, answers, running) = (path.to_owned(), answers.clone(), Arc::clone(running));
    std::thread::spawn(move || {
        let result = carry_out(id, request, &path, &answers, receiver);
        let exit = result.unwrap_or_else(|error| Exit::Failed(format!("{error:#}")));
        running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id);
        answers.done(id, &exit);
    });
}

fn carry_out(
    id: u32,
    request: Request,
    path: &str,
    answers: &Answers,
    input: Receiver<Input>,
) -> Result<Exit> {
    match request {
        Request::SetUp(set_up) => setup::run(&set_up).map(|()| Exit::Code(0)),
        Request::Write { path, text } => setup::write(&path, &text).map(|()| Exit::Code(0)),
        Request::Run(command) => process::run(id, &command, path, answers, input),
        Request::Start(service) => process::start_service(&service, path),
        Request::PowerOff => Ok(Exit::Code(0)),
    }
}
