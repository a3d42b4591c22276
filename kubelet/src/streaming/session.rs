//! Joining a client's channels with the streams of a container.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use super::fd::Pipe;
use super::status;
use crate::cri::{ExitStatus, Streams};

/// Messages under way in one direction; with the buffer size below it bounds what a session holds in memory.
pub(super) const MESSAGES_BUFFERED: usize = 16;
/// Bytes of one message of output.
const READ_BYTES: usize = 32 << 10;
/// After the program has ended, how long a silent stream is still listened to: a child of it may hold the pipe open for
/// ever.
const DRAIN_SILENCE: Duration = Duration::from_millis(500);

/// What a client sends.
#[derive(Debug)]
pub(super) enum Input {
    Stdin(Bytes),
    StdinClosed,
    Resize(Size),
}

/// The size of a terminal, as kubectl sends it.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Size {
    pub(super) width: u16,
    pub(super) height: u16,
}

/// What a client gets.
#[derive(Debug)]
pub(super) enum Output {
    Stdout(Bytes),
    Stderr(Bytes),
    /// The last message.
    Status(Value),
}

/// A client, whatever it speaks.
pub(super) struct Remote {
    /// Ends when the client is gone.
    pub(super) input: mpsc::Receiver<Input>,
    pub(super) output: mpsc::Sender<Output>,
}

/// How the program's end is learned.
pub(crate) enum Exit {
    /// From the supervisor, with its exit code.
    Code(oneshot::Receiver<ExitStatus>),
    /// The container's own program: its end is told, its code is in the pod's status.
    Told(oneshot::Receiver<()>),
}

/// What a session is about.
pub(crate) struct Job {
    pub(crate) streams: Streams,
    pub(crate) exit: Exit,
    /// Killed when the client goes away: a program run for a client that is gone would run unseen.
    pub(crate) pid: Option<i32>,
    /// Dropped when no more input will come from this client.
    pub(crate) input: Option<oneshot::Sender<()>>,
}

/// Runs a session to its end.
pub(super) async fn run(job: Job, remote: Remote) {
    let Remote { input, output } = remote;
    let Job { streams, exit, pid, input: more_input } = job;
    let ended = join(streams, exit, input, more_input, &output).await;
    let last = match ended {
        Ok(Ended::Program(status)) => status,
        Ok(Ended::ClientGone) => {
            if let Some(pid) = pid {
                // The exit has not been told, so the process has not been reaped and the number is still its own.
                let killed = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
                tracing::debug!(pid, ?killed, "client of exec is gone");
            }
            return;
        }
        Err(error) => status::failed(&error.to_string()),
    };
    if output.send(Output::Status(last)).await.is_err() {
        tracing::debug!("client left before the status of its session");
    }
}

enum Ended {
    Program(Value),
    ClientGone,
}

async fn join(
    streams: Streams,
    exit: Exit,
    mut input: mpsc::Receiver<Input>,
    mut more_input: Option<oneshot::Sender<()>>,
    output: &mpsc::Sender<Output>,
) -> std::io::Result<Ended> {
    let pipe = |fd| -> std::io::Result<Option<Arc<Pipe>>> {
        match fd {
            Some(fd) => Ok(Some(Arc::new(Pipe::new(fd)?))),
            None => Ok(None),
        }
    };
    let terminal = pipe(streams.terminal)?;
    let (mut stdin, stdout) = match &terminal {
        Some(terminal) => (Some(terminal.clone()), Some(terminal.clone())),
        None => (pipe(streams.stdin)?, pipe(streams.stdout)?),
    };
    let stderr = pipe(streams.stderr)?;
    let (alive, mut heartbeat) = mpsc::channel::<()>(1);
    let readers = [(stdout, Output::Stdout as fn(Bytes) -> Output), (stderr, Output::Stderr)];
    let mut tasks = tokio::task::JoinSet::new();
    for (pipe, wrap) in readers {
        let Some(pipe) = pipe else { continue };
        let (output, alive) = (output.clone(), alive.clone());
        tasks.spawn(async move {
            let mut buffer = vec![0; READ_BYTES];
            loop {
                let count = pipe.read(&mut buffer).await?;
                if count == 0 || output.send(wrap(Bytes::copy_from_slice(&buffer[..count]))).await.is_err() {
                    return Ok::<(), std::io::Error>(());
                }
                // Full means that it was heard already.
                let _heard = alive.try_send(());
            }
        });
    }
    drop(alive);
    let (mut result, mut readers_done) = (None, tasks.is_empty());
    let told = async {
        match exit {
            Exit::Code(receiver) => match receiver.await {
                Ok(exit) => status::exited(exit.code),
                Err(_) => status::failed("the supervisor was lost before the command ended"),
            },
            // A sender that is gone means the same.
            Exit::Told(receiver) => receiver.await.map_or_else(|_| status::success(), |()| status::success()),
        }
    };
    tokio::pin!(told);
    loop {
        if let Some(status) = result.take() {
            if readers_done {
                return Ok(Ended::Program(status));
            }
            tokio::select! {
                finished = tasks.join_next() => readers_done = finish(finished)?,
                Some(()) = heartbeat.recv() => {}
                () = tokio::time::sleep(DRAIN_SILENCE) => return Ok(Ended::Program(status)),
            }
            result = Some(status);
            continue;
        }
        tokio::select! {
            status = &mut told => result = Some(status),
            finished = tasks.join_next(), if !readers_done => readers_done = finish(finished)?,
            message = input.recv() => match message {
                Some(Input::Stdin(bytes)) => {
                    if let Some(pipe) = &stdin
                        && let Err(error) = pipe.write_all(&bytes).await
                    {
                        // The program closed its input; what it does besides goes on.
                        tracing::debug!(%error, "standard input of a session is closed");
                        stdin = None;
                    }
                }
                // A terminal has no end of input of its own: ^D is the client's to send.
                Some(Input::StdinClosed) => {
                    if terminal.is_none() {
                        (stdin, more_input) = (None, None);
                    }
                }
                Some(Input::Resize(size)) => {
                    if let Some(terminal) = &terminal
                        && let Err(error) = coracle_sys::tty::set_size(terminal.fd(), size.height, size.width)
                    {
                        tracing::debug!(%error, "cannot set the size of a terminal");
                    }
                }
                None => {
                    drop(more_input);
                    return Ok(Ended::ClientGone);
                }
            },
            () = output.closed() => return Ok(Ended::ClientGone),
        }
    }
}

/// Whether all readers have ended.
fn finish(finished: Option<Result<std::io::Result<()>, tokio::task::JoinError>>) -> std::io::Result<bool> {
    match finished {
        None => Ok(true),
        Some(Ok(Ok(()))) => Ok(false),
        Some(Ok(Err(error))) => Err(error),
        Some(Err(error)) => Err(std::io::Error::other(error)),
    }
}
