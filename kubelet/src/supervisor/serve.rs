//! The supervisor's loop: one ring, one closed set of events, no threads.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use coracle_runtime::{Init, Stage, Stdio, exec};
use coracle_sys::packet;
use coracle_sys::ring::{Interest, Ready, Ring};

use super::container::{Container, Process, now, options, owner, read_spec};
use super::link::{Fds, Link, Received, receive};
use super::protocol::{Answer, Event, Failure, FdKind, Message, Request, Verb};
use super::stream::{Attached, Pump, Source, Turn};
use crate::cri::{ContainerState, ExitStatus};
use crate::names::ContainerId;

/// What a completed poll is about: the low bits of its token, with the number of a container, exec or connection above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Listener,
    Link,
    LinkRoom,
    Exit,
    Stdout,
    Stderr,
    Sync,
    ExecExit,
    ExecSync,
}

impl Part {
    const ALL: [Self; 9] = [
        Self::Listener,
        Self::Link,
        Self::LinkRoom,
        Self::Exit,
        Self::Stdout,
        Self::Stderr,
        Self::Sync,
        Self::ExecExit,
        Self::ExecSync,
    ];

    fn token(self, number: u32) -> u64 {
        u64::from(number) << 4 | self as u64
    }

    fn of(token: u64) -> Option<(Self, u32)> {
        let part = *Self::ALL.get(usize::try_from(token & 0xf).ok()?)?;
        Some((part, u32::try_from(token >> 4).ok()?))
    }

    fn output(index: usize) -> Self {
        if index == 0 { Self::Stdout } else { Self::Stderr }
    }
}

/// A program that runs in a container beside its first process.
struct Exec {
    name: u64,
    init: Init,
    cgroup_container: u32,
    pending: Option<u64>,
    tty: bool,
}

/// The supervisor's whole state.
pub struct Supervisor {
    ring: Ring,
    listener: UnixListener,
    link: Option<Link>,
    /// Number of the current connection, so that completions of an older one are told apart.
    link_number: u32,
    containers: HashMap<u32, Container>,
    numbers: HashMap<ContainerId, u32>,
    execs: HashMap<u32, Exec>,
    pump: Pump,
    /// Outputs with more to move after their turn.
    backlog: Vec<(u32, usize)>,
    next_number: u32,
    buffer: Vec<u8>,
    quit: bool,
}

type Outcome = Result<Option<Answer>, Failure>;

impl Supervisor {
    /// Listens at `socket`, replacing one that a dead supervisor left.
    ///
    /// # Errors
    /// When ring, buffers or socket cannot be made.
    pub fn new(socket: &Path) -> io::Result<Self> {
        // Bound aside and renamed, so that whoever sees the path can connect.
        let aside = socket.with_extension("new");
        match fs::remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::from(packet::listen_at(&aside)?);
        let mut ring = Ring::new()?;
        ring.poll(listener.as_fd(), Interest::READ, Part::Listener.token(0))?;
        let pump = Pump::new()?;
        fs::rename(&aside, socket)?;
        Ok(Self {
            ring,
            listener,
            link: None,
            link_number: 0,
            containers: HashMap::new(),
            numbers: HashMap::new(),
            execs: HashMap::new(),
            pump,
            backlog: Vec::new(),
            next_number: 1,
            buffer: Vec::new(),
            quit: false,
        })
    }

    /// Serves until told to quit.
    ///
    /// # Errors
    /// When the ring fails.
    pub fn run(mut self) -> io::Result<()> {
        let mut ready = Vec::new();
        while !self.quit {
            let timeout = (!self.backlog.is_empty()).then_some(std::time::Duration::ZERO);
            self.ring.wait(timeout, &mut ready)?;
            for event in ready.drain(..) {
                if let Some((part, number)) = Part::of(event.token) {
                    self.handle(part, number, event)?;
                }
            }
            for (number, index) in std::mem::take(&mut self.backlog) {
                self.pump(number, index)?;
            }
        }
        Ok(())
    }

    fn handle(&mut self, part: Part, number: u32, event: Ready) -> io::Result<()> {
        match part {
            Part::Listener => {
                self.accept()?;
                self.arm_again(part, number, event)
            }
            Part::Link if number == self.link_number => {
                self.read_link()?;
                self.arm_again(part, number, event)
            }
            Part::LinkRoom if number == self.link_number => {
                if let Some(link) = self.link.as_mut()
                    && link.flush().is_err()
                {
                    self.close_link()?;
                }
                self.arm_again(part, number, event)
            }
            Part::Link | Part::LinkRoom => Ok(()),
            Part::Stdout | Part::Stderr => {
                let index = usize::from(part == Part::Stderr);
                self.pump(number, index)?;
                self.arm_again(part, number, event)
            }
            Part::Sync => {
                self.progress(number)?;
                self.arm_again(part, number, event)
            }
            Part::Exit => {
                self.progress(number)?;
                self.reap(number)?;
                self.arm_again(part, number, event)
            }
            Part::ExecSync => {
                self.progress_exec(number)?;
                self.arm_again(part, number, event)
            }
            Part::ExecExit => {
                self.progress_exec(number)?;
                self.reap_exec(number)?;
                self.arm_again(part, number, event)
            }
        }
    }

    /// Queues a poll again that the kernel ended although what it was for still exists, as it does when more completes at once
    /// than the ring holds.
    fn arm_again(&mut self, part: Part, number: u32, event: Ready) -> io::Result<()> {
        if event.armed || event.error.is_some() {
            return Ok(());
        }
        let fd = match part {
            Part::Exit => self.containers.get(&number).and_then(Container::pidfd),
            Part::Stdout | Part::Stderr => {
                let index = usize::from(part == Part::Stderr);
                self.containers.get(&number).and_then(|c| c.sources[index].as_ref()).map(Source::as_fd)
            }
            Part::Sync => self.containers.get(&number).and_then(|c| match &c.process {
                Some(Process::Own(init)) if c.pending.is_some() => Some(init.sync_fd()),
                _ => None,
            }),
            Part::ExecExit => self.execs.get(&number).map(|e| e.init.pidfd()),
            Part::ExecSync => self.execs.get(&number).filter(|e| e.pending.is_some()).map(|e| e.init.sync_fd()),
            Part::Listener => Some(self.listener.as_fd()),
            Part::Link | Part::LinkRoom => {
                self.link.as_ref().filter(|_| number == self.link_number).map(|link| link.as_fd())
            }
        };
        let interest = if part == Part::LinkRoom { Interest::WRITE } else { Interest::READ };
        match fd {
            Some(fd) => self.ring.poll(fd, interest, event.token),
            None => Ok(()),
        }
    }

    // ---- the daemon -------------------------------------------------------------------------------------------------

    fn accept(&mut self) -> io::Result<()> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    // A new daemon replaces the old one: there is never more than one.
                    self.close_link()?;
                    stream.set_nonblocking(true)?;
                    let link = Link::new(stream.into());
                    self.ring.poll(link.as_fd(), Interest::READ, Part::Link.token(self.link_number))?;
                    self.ring.poll(link.as_fd(), Interest::WRITE, Part::LinkRoom.token(self.link_number))?;
                    self.link = Some(link);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn close_link(&mut self) -> io::Result<()> {
        if self.link.is_some() {
            self.ring.cancel(Part::Link.token(self.link_number))?;
            self.ring.cancel(Part::LinkRoom.token(self.link_number))?;
        }
        self.link = None;
        self.link_number += 1;
        for container in self.containers.values_mut() {
            container.pending = None;
        }
        for exec in self.execs.values_mut() {
            exec.pending = None;
        }
        Ok(())
    }

    fn read_link(&mut self) -> io::Result<()> {
        while let Some(link) = self.link.as_ref() {
            let mut buffer = std::mem::take(&mut self.buffer);
            let received = receive::<Request>(link.as_fd(), &mut buffer);
            self.buffer = buffer;
            match received {
                Ok(Received::Nothing) => return Ok(()),
                Ok(Received::Message(request, fds)) => {
                    let fds = Fds::new(request.fds, fds);
                    match self.serve(request.id, request.verb, fds)? {
                        Ok(Some(answer)) => self.reply(request.id, Ok(answer))?,
                        Ok(None) => {}
                        Err(failure) => self.reply(request.id, Err(failure))?,
                    }
                }
                Ok(Received::Closed) | Err(_) => return self.close_link(),
            }
        }
        Ok(())
    }

    fn send(&mut self, message: &Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        match self.link.as_mut().map(|link| link.send(message, fds)) {
            Some(Err(_)) => self.close_link(),
            _ => Ok(()),
        }
    }

    fn reply(&mut self, id: u64, result: Result<Answer, Failure>) -> io::Result<()> {
        self.send(&Message::Reply { id, result, fds: Vec::new() }, &[])
    }

    /// Carries a request out. `Ok(None)`: the answer comes later.
    fn serve(&mut self, request: u64, verb: Verb, mut fds: Fds) -> io::Result<Outcome> {
        Ok(match verb {
            Verb::Hello => {
                self.tell_all()?;
                Ok(Some(Answer::Done))
            }
            Verb::Create(create) => match Container::create(*create) {
                Ok(mut container) => {
                    container.pending = Some(request);
                    self.insert(container)?;
                    Ok(None)
                }
                Err(error) => Err(Failure::Create(error.to_string())),
            },
            Verb::Start(id) => self.start(request, &id),
            Verb::Kill { container, signal, all } => self.kill(&container, signal, all),
            Verb::Exec { container, exec, tty } => self.exec(request, &container, exec, tty, fds)?,
            Verb::Attach(id) => self.find(&id).map(|number| {
                let client = Attached {
                    stdout: fds.take(FdKind::Stdout).map(Into::into),
                    stderr: fds.take(FdKind::Stderr).map(Into::into),
                };
                if let Some(container) = self.containers.get_mut(&number)
                    && container.sources.iter().any(Option::is_some)
                {
                    container.attached.push(client);
                }
                Some(Answer::Done)
            }),
            Verb::CloseStdin(id) => self.change(&id, |container| {
                container.stdin = None;
                Ok(())
            }),
            Verb::ReopenLog(id) => self.change(&id, Container::reopen_log),
            Verb::Forget(id) => self.forget(&id)?,
            Verb::TakeOver(report) => match Container::take_over(*report, fds, &mut self.pump) {
                Ok(container) => {
                    self.insert(container)?;
                    Ok(Some(Answer::Done))
                }
                Err(error) => Err(Failure::Other(error.to_string())),
            },
            Verb::Reaped { container, exit } => match self.find(&container) {
                Ok(number) => {
                    self.ended(number, exit)?;
                    Ok(Some(Answer::Done))
                }
                Err(failure) => Err(failure),
            },
            Verb::Quit => {
                self.quit = self.containers.values().all(|c| c.report.exit.is_some());
                if self.quit { Ok(Some(Answer::Done)) } else { Err(Failure::Other("containers are running".into())) }
            }
        })
    }

    fn tell_all(&mut self) -> io::Result<()> {
        let mut numbers: Vec<u32> = self.containers.keys().copied().collect();
        numbers.sort_unstable();
        for number in numbers {
            let (Some(container), Some(link)) = (self.containers.get(&number), self.link.as_mut()) else { continue };
            let (kinds, fds) = container.descriptors();
            let message = Message::Container { report: Box::new(container.report.clone()), fds: kinds };
            if link.send(&message, &fds).is_err() {
                return self.close_link();
            }
        }
        Ok(())
    }

    // ---- containers -------------------------------------------------------------------------------------------------

    fn find(&self, id: &ContainerId) -> Result<u32, Failure> {
        self.numbers.get(id).copied().ok_or(Failure::NotFound)
    }

    fn change(&mut self, id: &ContainerId, change: impl FnOnce(&mut Container) -> io::Result<()>) -> Outcome {
        let container = self.find(id).map(|number| self.containers.get_mut(&number))?.ok_or(Failure::NotFound)?;
        change(container).map(|()| Some(Answer::Done)).map_err(|e| Failure::Other(e.to_string()))
    }

    fn insert(&mut self, container: Container) -> io::Result<()> {
        let number = self.next_number;
        self.next_number += 1;
        if let Some(pidfd) = container.pidfd() {
            self.ring.poll(pidfd, Interest::READ, Part::Exit.token(number))?;
        }
        if let Some(Process::Own(init)) = &container.process {
            self.ring.poll(init.sync_fd(), Interest::READ, Part::Sync.token(number))?;
        }
        for (index, source) in container.sources.iter().enumerate() {
            if let Some(source) = source {
                self.ring.poll(source.as_fd(), Interest::READ, Part::output(index).token(number))?;
                self.backlog.push((number, index));
            }
        }
        self.numbers.insert(container.report.create.id.clone(), number);
        self.containers.insert(number, container);
        Ok(())
    }

    fn start(&mut self, request: u64, id: &ContainerId) -> Outcome {
        let container = self.find(id).map(|number| self.containers.get_mut(&number))?.ok_or(Failure::NotFound)?;
        let state = container.report.state;
        match container.process.as_mut() {
            Some(Process::Own(init)) if state == ContainerState::Created && container.pending.is_none() => {
                init.send_start().map_err(|e| Failure::Start(e.to_string()))?;
                container.pending = Some(request);
                Ok(None)
            }
            _ => Err(Failure::WrongState(state)),
        }
    }

    /// Follows a container's set-up and start as far as it has come.
    fn progress(&mut self, number: u32) -> io::Result<()> {
        let Some(container) = self.containers.get_mut(&number) else { return Ok(()) };
        let Some(Process::Own(init)) = container.process.as_mut() else { return Ok(()) };
        if container.report.started_at != 0 {
            return Ok(());
        }
        let created_before = container.pending.is_none();
        match init.advance() {
            Ok(Stage::SettingUp) => Ok(()),
            Ok(Stage::Created) => {
                if created_before {
                    return Ok(());
                }
                self.created(number)
            }
            Ok(Stage::Running) => {
                container.report.state = ContainerState::Running;
                container.report.started_at = now();
                let (started, pending) = (container.report.started_at, container.pending.take());
                self.save(number);
                self.ring.cancel(Part::Sync.token(number))?;
                match pending {
                    Some(id) => self.reply(id, Ok(Answer::Started(started))),
                    None => Ok(()),
                }
            }
            Err(error) => {
                let created = container.bundle_saved();
                let pending = container.pending.take();
                self.ring.cancel(Part::Sync.token(number))?;
                if let Some(id) = pending {
                    let text = error.to_string();
                    self.reply(id, Err(if created { Failure::Start(text) } else { Failure::Create(text) }))?;
                }
                if !created {
                    // Nobody knows of it: nothing may stay of it.
                    self.destroy(number)?;
                }
                Ok(())
            }
        }
    }

    fn created(&mut self, number: u32) -> io::Result<()> {
        let Some(container) = self.containers.get_mut(&number) else { return Ok(()) };
        if container.bundle_saved() {
            // Asked to start, not yet started.
            return Ok(());
        }
        if let Some(Process::Own(init)) = container.process.as_mut()
            && let Some(master) = init.take_console()
        {
            set_nonblocking(&master)?;
            let source = Source::terminal(master);
            self.ring.poll(source.as_fd(), Interest::READ, Part::Stdout.token(number))?;
            container.sources[0] = Some(source);
        }
        self.save(number);
        let Some(container) = self.containers.get_mut(&number) else { return Ok(()) };
        let Some(id) = container.pending.take() else { return Ok(()) };
        let (kinds, fds) = container.descriptors();
        let result = Ok(Answer::Created(Box::new(container.report.clone())));
        let message = Message::Reply { id, result, fds: kinds };
        match self.link.as_mut().map(|link| link.send(&message, &fds)) {
            Some(Err(_)) => self.close_link(),
            _ => Ok(()),
        }
    }

    fn kill(&mut self, id: &ContainerId, signal: i32, all: bool) -> Outcome {
        let container = self.find(id).map(|number| self.containers.get(&number))?.ok_or(Failure::NotFound)?;
        if all && let Some(cgroup) = &container.cgroup {
            cgroup.kill().map_err(|e| Failure::Other(e.to_string()))?;
            return Ok(Some(Answer::Done));
        }
        let Some(pidfd) = container.pidfd() else { return Ok(Some(Answer::Done)) };
        match coracle_sys::process::pidfd_send_signal(pidfd, signal) {
            // It has ended, which is no worse than what was asked for.
            Ok(()) | Err(coracle_sys::Errno::ESRCH) => Ok(Some(Answer::Done)),
            Err(errno) => Err(Failure::Other(errno.desc().to_owned())),
        }
    }

    fn pump(&mut self, number: u32, index: usize) -> io::Result<()> {
        let Some(container) = self.containers.get_mut(&number) else { return Ok(()) };
        if container.sources[index].is_none() {
            return Ok(());
        }
        let (turn, lost) = container.pump(index, &mut self.pump);
        let id = lost.is_some().then(|| container.report.create.id.clone());
        match turn {
            Turn::Drained => {}
            Turn::More => self.backlog.push((number, index)),
            Turn::Ended => self.ring.cancel(Part::output(index).token(number))?,
        }
        if let (Some(id), Some(text)) = (id, lost) {
            self.send(&Message::Event(Event::LogLost(id, text)), &[])?;
        }
        Ok(())
    }

    fn reap(&mut self, number: u32) -> io::Result<()> {
        match self.containers.get_mut(&number).and_then(Container::try_wait) {
            Some(exit) => self.ended(number, Some(exit)),
            None => Ok(()),
        }
    }

    /// The first process has ended: completes the log, notes the exit, tells it.
    fn ended(&mut self, number: u32, exit: Option<ExitStatus>) -> io::Result<()> {
        for index in 0..2 {
            // What was written before the end stands in the log before the end is known. Processes that outlive the first one
            // may go on writing; they get their turns as before.
            self.pump(number, index)?;
        }
        let Some(container) = self.containers.get_mut(&number) else { return Ok(()) };
        if container.report.exit.is_some() {
            return Ok(());
        }
        let known = container.bundle_saved();
        let status = exit.unwrap_or(ExitStatus { code: 137, signal: None, oom_killed: false, finished_at: now() });
        container.report.exit = Some(status);
        container.report.state = if exit.is_some() { ContainerState::Exited } else { ContainerState::Unknown };
        container.process = None;
        container.stdin = None;
        let (id, pending) = (container.report.create.id.clone(), container.pending.take());
        self.ring.cancel(Part::Exit.token(number))?;
        self.ring.cancel(Part::Sync.token(number))?;
        if let Some(request) = pending {
            let text = "the container's first process ended before its program started".to_owned();
            self.reply(request, Err(if known { Failure::Start(text) } else { Failure::Create(text) }))?;
        }
        if !known {
            return self.destroy(number);
        }
        self.save(number);
        self.send(&Message::Event(Event::Exited(id, status)), &[])
    }

    fn save(&mut self, number: u32) {
        if let Some(container) = self.containers.get(&number)
            && let Err(error) = container.save()
        {
            tracing::error!(container = %container.report.create.id, %error, "state.json not written");
        }
    }

    fn forget(&mut self, id: &ContainerId) -> io::Result<Outcome> {
        let Some(number) = self.numbers.get(id).copied() else { return Ok(Ok(Some(Answer::Done))) };
        if self.containers.get(&number).is_some_and(|c| c.report.exit.is_none()) {
            return Ok(Err(Failure::WrongState(ContainerState::Running)));
        }
        self.destroy(number)?;
        Ok(Ok(Some(Answer::Done)))
    }

    /// Drops a container with whatever still runs in its cgroup.
    fn destroy(&mut self, number: u32) -> io::Result<()> {
        for part in [Part::Exit, Part::Stdout, Part::Stderr, Part::Sync] {
            self.ring.cancel(part.token(number))?;
        }
        let Some(mut container) = self.containers.remove(&number) else { return Ok(()) };
        self.numbers.remove(&container.report.create.id);
        if let Some(cgroup) = container.cgroup.take()
            && let Err(error) = cgroup.kill().and_then(|()| cgroup.remove())
        {
            tracing::warn!(container = %container.report.create.id, %error, "cgroup stays");
        }
        Ok(())
    }

    // ---- exec -------------------------------------------------------------------------------------------------------

    fn exec(&mut self, request: u64, id: &ContainerId, name: u64, tty: bool, mut fds: Fds) -> io::Result<Outcome> {
        let number = match self.find(id) {
            Ok(number) => number,
            Err(failure) => return Ok(Err(failure)),
        };
        let Some(container) = self.containers.get(&number) else { return Ok(Err(Failure::NotFound)) };
        let (Some(pidfd), ContainerState::Running) = (container.pidfd(), container.report.state) else {
            return Ok(Err(Failure::WrongState(container.report.state)));
        };
        let spawned = (|| {
            let process = fds.take(FdKind::Process).ok_or("no process to execute")?;
            let process: oci_spec::runtime::Process =
                serde_json::from_reader(io::BufReader::new(fs::File::from(process))).map_err(|e| e.to_string())?;
            let spec = read_spec(&container.report.create.bundle).map_err(|e| e.to_string())?;
            let null = fs::File::options().read(true).write(true).open("/dev/null").map_err(|e| e.to_string())?;
            let [stdin, stdout, stderr] = [FdKind::Stdin, FdKind::Stdout, FdKind::Stderr].map(|kind| fds.take(kind));
            let (uid, gid) = owner(&spec, Some(&process));
            for stream in [&stdin, &stdout, &stderr].into_iter().flatten() {
                nix::unistd::fchown(stream, Some(uid), Some(gid)).map_err(|e| e.to_string())?;
            }
            let or_null = |fd: &Option<OwnedFd>| -> io::Result<OwnedFd> {
                fd.as_ref().map_or_else(|| null.as_fd().try_clone_to_owned(), OwnedFd::try_clone)
            };
            let [stdin, stdout, stderr] = [or_null(&stdin), or_null(&stdout), or_null(&stderr)];
            let (stdin, stdout, stderr) = (
                stdin.map_err(|e| e.to_string())?,
                stdout.map_err(|e| e.to_string())?,
                stderr.map_err(|e| e.to_string())?,
            );
            let stdio = Stdio { stdin: stdin.as_fd(), stdout: stdout.as_fd(), stderr: stderr.as_fd() };
            let target =
                exec::Target { pidfd, pid: container.report.pid, spec: &spec, bundle: &container.report.create.bundle };
            exec::spawn(&target, &process, container.cgroup.as_ref(), stdio, &options(&container.report.create))
                .map_err(|e| e.to_string())
        })();
        let init = match spawned {
            Ok(init) => init,
            Err(text) => return Ok(Err(Failure::Start(text))),
        };
        let number_of_exec = self.next_number;
        self.next_number += 1;
        self.ring.poll(init.pidfd(), Interest::READ, Part::ExecExit.token(number_of_exec))?;
        self.ring.poll(init.sync_fd(), Interest::READ, Part::ExecSync.token(number_of_exec))?;
        let exec = Exec { name, init, cgroup_container: number, pending: Some(request), tty };
        self.execs.insert(number_of_exec, exec);
        Ok(Ok(None))
    }

    fn progress_exec(&mut self, number: u32) -> io::Result<()> {
        let Some(exec) = self.execs.get_mut(&number) else { return Ok(()) };
        let Some(id) = exec.pending else { return Ok(()) };
        match exec.init.advance() {
            Ok(Stage::SettingUp | Stage::Created) => Ok(()),
            Ok(Stage::Running) => {
                exec.pending = None;
                let console = if exec.tty { exec.init.take_console() } else { None };
                let kinds = if console.is_some() { vec![FdKind::Terminal] } else { Vec::new() };
                let fds: Vec<_> = console.iter().map(AsFd::as_fd).collect();
                let message = Message::Reply { id, result: Ok(Answer::Executing(exec.init.pid())), fds: kinds };
                self.ring.cancel(Part::ExecSync.token(number))?;
                self.send(&message, &fds)
            }
            Err(error) => {
                exec.pending = None;
                self.ring.cancel(Part::ExecSync.token(number))?;
                self.reply(id, Err(Failure::Start(error.to_string())))
            }
        }
    }

    fn reap_exec(&mut self, number: u32) -> io::Result<()> {
        let Some(exec) = self.execs.get_mut(&number) else { return Ok(()) };
        let Ok(Some(exit)) = exec.init.try_wait() else { return Ok(()) };
        let name = exec.name;
        let status = match self.containers.get(&exec.cgroup_container) {
            Some(container) => container.exit_status(exit),
            None => ExitStatus { code: exit.code(), signal: None, oom_killed: false, finished_at: now() },
        };
        self.ring.cancel(Part::ExecExit.token(number))?;
        self.ring.cancel(Part::ExecSync.token(number))?;
        if let Some(exec) = self.execs.remove(&number)
            && let Some(id) = exec.pending
        {
            self.reply(id, Err(Failure::Start("the process ended before its program started".into())))?;
        }
        self.send(&Message::Event(Event::ExecExited(name, status)), &[])
    }
}

impl Container {
    /// Whether the daemon has been told of it (or had handed it over).
    fn bundle_saved(&self) -> bool {
        self.report.create.bundle.join("state.json").exists()
    }
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
