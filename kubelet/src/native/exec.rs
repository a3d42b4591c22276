//! Programs run in containers beside their own: exec, exec with collected output, attach.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::pipe2;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::{Native, refused};
use crate::cri::{EXEC_SYNC_OUTPUT_LIMIT_BYTES, ExecOutput, ExecRequest, ExecSession, Result, RuntimeError, Streams};
use crate::names::ContainerId;
use crate::supervisor::protocol::FdKind;

/// Capacity of the pipe to an attached client: what it may lag behind before it loses its place.
const ATTACH_BUFFER_BYTES: i32 = 1 << 20;
/// How long a command that was killed is waited for.
const KILLED_PATIENCE: Duration = Duration::from_secs(2);

impl Native {
    pub(super) async fn exec_with_streams(&self, id: &ContainerId, request: ExecRequest) -> Result<ExecSession> {
        self.record(id)?;
        let process = self
            .process(id, &request.command, request.tty)
            .map_err(RuntimeError::io("read the process of", id.as_str()))?;
        let mut fds = vec![(FdKind::Process, process)];
        let mut streams = Streams::default();
        if !request.tty {
            if request.stdin {
                let (read, write) = make_pipe()?;
                fds.push((FdKind::Stdin, read));
                streams.stdin = Some(write);
            }
            for (wanted, kind, place) in [
                (request.stdout, FdKind::Stdout, &mut streams.stdout),
                (request.stderr, FdKind::Stderr, &mut streams.stderr),
            ] {
                if wanted {
                    let (read, write) = make_pipe()?;
                    fds.push((kind, write));
                    *place = Some(read);
                }
            }
        }
        let (pid, terminal, exit) =
            self.inner.supervisor.exec(id, request.tty, fds).await.map_err(refused(id, "running"))?;
        streams.terminal = terminal;
        Ok(ExecSession { streams, exit, pid })
    }

    /// The container's own process with another command, in a memory file.
    fn process(&self, id: &ContainerId, command: &[String], tty: bool) -> io::Result<OwnedFd> {
        let config = std::fs::read(self.inner.layout.container(id).join("config.json"))?;
        let mut config: Value = serde_json::from_slice(&config)?;
        let mut process = config["process"].take();
        process["args"] = json!(command);
        process["terminal"] = json!(tty);
        if tty
            && let Some(env) = process["env"].as_array_mut()
            && !env.iter().any(|e| e.as_str().is_some_and(|e| e.starts_with("TERM=")))
        {
            env.push(json!("TERM=xterm"));
        }
        let mut file = File::from(memfd_create(c"process", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(&serde_json::to_vec(&process)?)?;
        file.rewind()?;
        Ok(file.into())
    }

    pub(super) async fn exec_and_collect(
        &self,
        id: &ContainerId,
        command: &[String],
        timeout: Option<Duration>,
    ) -> Result<ExecOutput> {
        let request = ExecRequest { command: command.to_vec(), stdout: true, stderr: true, ..ExecRequest::default() };
        let ExecSession { streams, mut exit, pid } = self.exec_with_streams(id, request).await?;
        let collected = async {
            let (stdout, stderr) = tokio::join!(collect(streams.stdout), collect(streams.stderr));
            let exit =
                (&mut exit).await.map_err(|_| RuntimeError::Supervisor("lost before the command ended".into()))?;
            Ok(ExecOutput { stdout: stdout?, stderr: stderr?, exit_code: exit.code })
        };
        let Some(limit) = timeout else { return collected.await };
        match tokio::time::timeout(limit, collected).await {
            Ok(output) => output,
            Err(_) => {
                if let Ok(pidfd) = coracle_sys::process::pidfd_open(pid)
                    && let Err(errno) =
                        coracle_sys::process::pidfd_send_signal(pidfd.as_fd(), nix::sys::signal::Signal::SIGKILL as i32)
                {
                    tracing::debug!(container = %id, %errno, "command ended as it timed out");
                }
                // Whoever is told that it timed out finds it gone, unless the kernel cannot end it.
                drop(tokio::time::timeout(KILLED_PATIENCE, exit).await);
                Err(RuntimeError::DeadlineExceeded { command: command.to_vec(), timeout: limit })
            }
        }
    }

    pub(super) async fn attach_streams(&self, id: &ContainerId, stdin: bool) -> Result<Streams> {
        let record = self.record(id)?;
        let mut streams = Streams::default();
        let mut fds = Vec::new();
        let kinds: &[FdKind] =
            if record.config.stdio.tty { &[FdKind::Stdout] } else { &[FdKind::Stdout, FdKind::Stderr] };
        for kind in kinds {
            let (read, write) = make_pipe()?;
            // The supervisor must never wait for a client.
            nix::fcntl::fcntl(&write, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
                .map_err(|e| os("set up a pipe")(e.into()))?;
            if let Err(errno) = nix::fcntl::fcntl(&write, nix::fcntl::FcntlArg::F_SETPIPE_SZ(ATTACH_BUFFER_BYTES)) {
                tracing::debug!(%errno, "attach goes with a pipe of the default size");
            }
            fds.push((*kind, write));
            match kind {
                FdKind::Stdout => streams.stdout = Some(read),
                _ => streams.stderr = Some(read),
            }
        }
        let duplicate = |kind| {
            self.inner
                .supervisor
                .descriptor(id, kind)
                .map(|fd| fd.try_clone())
                .transpose()
                .map_err(os("duplicate a descriptor"))
        };
        streams.terminal = duplicate(FdKind::Terminal)?;
        if stdin && record.config.stdio.stdin && streams.terminal.is_none() {
            streams.stdin = duplicate(FdKind::Stdin)?;
        }
        self.inner.supervisor.attach(id, fds).await.map_err(refused(id, "running"))?;
        Ok(streams)
    }
}

fn os(step: &'static str) -> impl FnOnce(io::Error) -> RuntimeError {
    move |source| RuntimeError::Io { step, path: None, source }
}

fn make_pipe() -> Result<(OwnedFd, OwnedFd)> {
    pipe2(OFlag::O_CLOEXEC).map_err(|e| os("make a pipe")(e.into()))
}

/// Everything that comes out of a pipe; beyond the limit it is read and dropped, so the program does not block.
async fn collect(fd: Option<OwnedFd>) -> Result<Vec<u8>> {
    let mut kept = Vec::new();
    let Some(fd) = fd else { return Ok(kept) };
    let mut receiver = pipe::Receiver::from_owned_fd(fd).map_err(os("watch a pipe"))?;
    let mut chunk = [0; 8192];
    loop {
        let length = receiver.read(&mut chunk).await.map_err(os("read a command's output"))?;
        if length == 0 {
            return Ok(kept);
        }
        let room = EXEC_SYNC_OUTPUT_LIMIT_BYTES - kept.len();
        kept.extend_from_slice(&chunk[..length.min(room)]);
    }
}
