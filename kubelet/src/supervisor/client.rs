//! The daemon's side: keeps one supervisor running and every descriptor that must outlive it.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use coracle_sys::process;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::Pid;
use parking_lot::Mutex;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, broadcast, oneshot};
use tokio::task::AbortHandle;

use super::container::{now, start_ticks};
use super::link::{Fds, Link, Received, receive};
use super::protocol::{Answer, Create, Event, Failure, FdKind, Message, Report, Request, Verb};
use crate::cri::{ContainerState, ExitStatus};
use crate::names::{ContainerId, Layout};

/// Events that a slow reader may lag behind before it has to list.
const EVENT_QUEUE: usize = 4096;
/// Wait before a supervisor that could not be started is tried again.
const RESPAWN_DELAY: Duration = Duration::from_secs(1);

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The supervisor died before it answered; whether the request was carried out is seen by listing.
    #[error("the supervisor was lost before it answered")]
    Lost,
    /// The supervisor refused.
    #[error("{0:?}")]
    Refused(Failure),
    /// It answered something else.
    #[error("unexpected answer {0}")]
    Unexpected(String),
    /// The message could not be sent.
    #[error("cannot talk to the supervisor: {0}")]
    Send(#[from] io::Error),
}

/// Longest that the host's init takes to reap a process that has ended.
const INIT_REAPS_MS: u16 = 5_000;

/// How a process ended that became the child of the host's init: a daemon that was started after its supervisor is no
/// ancestor of the containers. The kernel tells once init has reaped it, which a hang-up of the pidfd announces.
fn reaped_elsewhere(pidfd: BorrowedFd<'_>) -> Option<process::Exit> {
    let mut watched = [PollFd::new(pidfd, PollFlags::empty())];
    poll(&mut watched, PollTimeout::from(INIT_REAPS_MS)).ok()?;
    coracle_sys::pidfd::exit_info(pidfd).ok().flatten()
}

/// How the supervisor is started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The executable.
    pub executable: PathBuf,
    /// Arguments before the socket's path.
    pub arguments: Vec<String>,
}

/// A handle on the supervisor; cheap to clone.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    layout: Layout,
    launch: Launch,
    state: Mutex<State>,
    queued: Notify,
    next: AtomicU64,
    events: broadcast::Sender<Event>,
    /// What keeps a supervisor running.
    keeper: OnceLock<AbortHandle>,
}

/// What the supervisor answers to a request, with the descriptors that came along.
type Reply = Result<(Answer, Fds), ClientError>;

#[derive(Default)]
struct State {
    link: Option<Link>,
    pending: HashMap<u64, oneshot::Sender<Reply>>,
    containers: HashMap<ContainerId, Held>,
    execs: HashMap<u64, oneshot::Sender<ExitStatus>>,
}

/// A container's report and our duplicates of its descriptors.
struct Held {
    report: Report,
    fds: Vec<(FdKind, Arc<OwnedFd>)>,
}

impl Held {
    fn new(report: Report, kinds: &[FdKind], mut fds: Fds) -> Self {
        let fds = kinds.iter().filter_map(|kind| Some((*kind, Arc::new(fds.take(*kind)?)))).collect();
        Self { report, fds }
    }
}

impl Client {
    /// Connects to the supervisor that runs, or starts one, and learns what containers there are. Containers that no
    /// supervisor holds any more (both processes died) are killed and noted as ended in an unknown way.
    ///
    /// # Errors
    /// When no supervisor can be started.
    pub async fn start(layout: Layout, launch: Launch) -> Result<Self, ClientError> {
        // Containers of a supervisor that dies become our children, so that their exit codes are not lost.
        nix::sys::prctl::set_child_subreaper(true).map_err(io::Error::from)?;
        fs::create_dir_all(layout.containers())?;
        let inner = Arc::new(Inner {
            layout,
            launch,
            state: Mutex::default(),
            queued: Notify::new(),
            next: AtomicU64::new(1),
            events: broadcast::Sender::new(EVENT_QUEUE),
            keeper: OnceLock::new(),
        });
        let client = Self { inner };
        let (socket, child) = match coracle_sys::packet::connect_to(&client.inner.layout.supervisor_socket()) {
            Ok(socket) => (socket, None),
            Err(_) => client.launch().await?,
        };
        let reader = client.connected(socket)?;
        let keeper = tokio::spawn(client.clone().serve(reader, child));
        client.inner.keeper.get_or_init(|| keeper.abort_handle());
        client.request(Verb::Hello, Vec::new()).await?;
        client.bury_orphans()?;
        Ok(client)
    }

    /// What happens from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.inner.events.subscribe()
    }

    /// All containers.
    pub fn reports(&self) -> Vec<Report> {
        self.inner.state.lock().containers.values().map(|held| held.report.clone()).collect()
    }

    /// One container.
    pub fn report(&self, id: &ContainerId) -> Option<Report> {
        self.inner.state.lock().containers.get(id).map(|held| held.report.clone())
    }

    /// Our duplicate of one of a container's descriptors.
    pub fn descriptor(&self, id: &ContainerId, kind: FdKind) -> Option<Arc<OwnedFd>> {
        let state = self.inner.state.lock();
        state.containers.get(id)?.fds.iter().find(|(k, _)| *k == kind).map(|(_, fd)| fd.clone())
    }

    /// Creates a container from the bundle in its folder.
    ///
    /// # Errors
    /// Why it could not be made.
    pub async fn create(&self, create: Create) -> Result<Report, ClientError> {
        match self.request(Verb::Create(Box::new(create)), Vec::new()).await?.0 {
            Answer::Created(report) => Ok(*report),
            other => Err(ClientError::Unexpected(format!("{other:?}"))),
        }
    }

    /// Starts a container's program.
    ///
    /// # Errors
    /// Why it could not be started.
    pub async fn start_container(&self, id: &ContainerId) -> Result<(), ClientError> {
        match self.request(Verb::Start(id.clone()), Vec::new()).await?.0 {
            Answer::Started(at) => {
                if let Some(held) = self.inner.state.lock().containers.get_mut(id) {
                    held.report.started_at = at;
                    if held.report.exit.is_none() {
                        held.report.state = ContainerState::Running;
                    }
                }
                Ok(())
            }
            other => Err(ClientError::Unexpected(format!("{other:?}"))),
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When it could not be sent.
    pub async fn kill(&self, id: &ContainerId, signal: i32, all: bool) -> Result<(), ClientError> {
        self.done(Verb::Kill { container: id.clone(), signal, all }).await
    }

    /// Runs a program in a container; returns its process id, its terminal's master and its future exit status.
    ///
    /// # Errors
    /// Why it could not be run.
    pub async fn exec(
        &self,
        id: &ContainerId,
        tty: bool,
        fds: Vec<(FdKind, OwnedFd)>,
    ) -> Result<(i32, Option<OwnedFd>, oneshot::Receiver<ExitStatus>), ClientError> {
        let name = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let (sender, exit) = oneshot::channel();
        self.inner.state.lock().execs.insert(name, sender);
        match self.request(Verb::Exec { container: id.clone(), exec: name, tty }, fds).await {
            Ok((Answer::Executing(pid), mut fds)) => Ok((pid, fds.take(FdKind::Terminal), exit)),
            Ok((other, _)) => Err(ClientError::Unexpected(format!("{other:?}"))),
            Err(error) => {
                self.inner.state.lock().execs.remove(&name);
                Err(error)
            }
        }
    }

    /// Copies a container's output to these descriptors from now on.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn attach(&self, id: &ContainerId, fds: Vec<(FdKind, OwnedFd)>) -> Result<(), ClientError> {
        self.request(Verb::Attach(id.clone()), fds).await.map(drop)
    }

    /// Closes a container's standard input.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn close_stdin(&self, id: &ContainerId) -> Result<(), ClientError> {
        if let Some(held) = self.inner.state.lock().containers.get_mut(id) {
            held.fds.retain(|(kind, _)| *kind != FdKind::Stdin);
        }
        self.done(Verb::CloseStdin(id.clone())).await
    }

    /// Opens a container's log anew.
    ///
    /// # Errors
    /// When it could not be opened.
    pub async fn reopen_log(&self, id: &ContainerId) -> Result<(), ClientError> {
        self.done(Verb::ReopenLog(id.clone())).await
    }

    /// Forgets an ended container and removes its folder.
    ///
    /// # Errors
    /// When it still runs or the folder cannot be removed.
    pub async fn forget(&self, id: &ContainerId) -> Result<(), ClientError> {
        self.done(Verb::Forget(id.clone())).await?;
        self.inner.state.lock().containers.remove(id);
        match fs::remove_dir_all(self.inner.layout.container(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Ends the supervisor for good; it must hold no container any more.
    ///
    /// # Errors
    /// When there is none, or it cannot be killed.
    pub fn end(&self) -> io::Result<()> {
        if let Some(keeper) = self.inner.keeper.get() {
            keeper.abort();
        }
        let link = self.inner.state.lock().link.take().ok_or(io::ErrorKind::NotConnected)?;
        let peer = getsockopt(&link.as_fd(), sockopt::PeerCredentials)?;
        kill(Pid::from_raw(peer.pid()), Signal::SIGKILL)?;
        Ok(())
    }

    async fn done(&self, verb: Verb) -> Result<(), ClientError> {
        match self.request(verb, Vec::new()).await?.0 {
            Answer::Done => Ok(()),
            other => Err(ClientError::Unexpected(format!("{other:?}"))),
        }
    }

    async fn request(&self, verb: Verb, fds: Vec<(FdKind, OwnedFd)>) -> Reply {
        let (kinds, fds): (Vec<_>, Vec<_>) = fds.into_iter().unzip();
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let answer = self.send(verb, kinds, &borrowed)?;
        drop(fds);
        answer.await.unwrap_or(Err(ClientError::Lost))
    }

    fn send(
        &self,
        verb: Verb,
        fds: Vec<FdKind>,
        borrowed: &[BorrowedFd<'_>],
    ) -> Result<oneshot::Receiver<Reply>, ClientError> {
        let id = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        let mut state = self.inner.state.lock();
        let link = state.link.as_mut().ok_or(ClientError::Lost)?;
        link.send(&Request { id, verb, fds }, borrowed)?;
        state.pending.insert(id, sender);
        drop(state);
        self.inner.queued.notify_one();
        Ok(answer)
    }

    // ---- the connection ---------------------------------------------------------------------------------------------

    async fn launch(&self) -> Result<(OwnedFd, Option<Child>), ClientError> {
        let this = self.clone();
        tokio::task::spawn_blocking(move || this.launch_blocking()).await.map_err(io::Error::other)?
    }

    fn launch_blocking(&self) -> Result<(OwnedFd, Option<Child>), ClientError> {
        let socket = self.inner.layout.supervisor_socket();
        let mut child = Command::new(&self.inner.launch.executable)
            .args(&self.inner.launch.arguments)
            .arg(&socket)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        if line.trim() != super::READY_LINE {
            let status = child.wait()?;
            return Err(io::Error::other(format!("the supervisor did not start ({status})")).into());
        }
        Ok((coracle_sys::packet::connect_to(&socket)?, Some(child)))
    }

    /// Makes `socket` the connection and returns what reads it.
    fn connected(&self, socket: OwnedFd) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
        let reader = watch(Arc::new(socket.try_clone()?))?;
        self.inner.state.lock().link = Some(Link::new(socket));
        Ok(reader)
    }

    /// Reads the connection for ever; when the supervisor dies, starts another and hands everything over.
    async fn serve(self, mut reader: AsyncFd<Arc<OwnedFd>>, mut child: Option<Child>) {
        loop {
            if let Err(error) = self.read_until_closed(&reader).await {
                tracing::warn!(%error, "connection to the supervisor");
            }
            self.lost();
            if let Some(mut child) = child.take() {
                let status = tokio::task::spawn_blocking(move || child.wait()).await;
                tracing::warn!(?status, "supervisor ended; starting another");
            }
            (reader, child) = loop {
                let again = async {
                    let (socket, child) = self.launch().await?;
                    Ok::<_, ClientError>((self.connected(socket)?, child))
                };
                match again.await {
                    Ok(again) => break again,
                    Err(error) => {
                        tracing::error!(%error, "cannot start a supervisor; trying again");
                        tokio::time::sleep(RESPAWN_DELAY).await;
                    }
                }
            };
            self.hand_over();
        }
    }

    async fn read_until_closed(&self, reader: &AsyncFd<Arc<OwnedFd>>) -> io::Result<()> {
        let mut buffer = Vec::new();
        loop {
            let queued = self.inner.state.lock().link.as_ref().is_some_and(Link::has_queue);
            tokio::select! {
                ready = reader.readable() => {
                    let mut ready = ready?;
                    loop {
                        match receive::<Message>(reader.get_ref().as_fd(), &mut buffer)? {
                            Received::Message(message, fds) => self.handle(message, fds),
                            Received::Nothing => break ready.clear_ready(),
                            Received::Closed => return Ok(()),
                        }
                    }
                }
                room = reader.writable(), if queued => {
                    room?.clear_ready();
                    if let Some(link) = self.inner.state.lock().link.as_mut() {
                        link.flush()?;
                    }
                }
                () = self.inner.queued.notified() => {}
            }
        }
    }

    fn handle(&self, message: Message, fds: Vec<OwnedFd>) {
        match message {
            Message::Container { report, fds: kinds } => {
                let held = Held::new(*report, &kinds, Fds::new(kinds.clone(), fds));
                self.inner.state.lock().containers.insert(held.report.create.id.clone(), held);
            }
            Message::Reply { id, result, fds: kinds } => {
                let mut state = self.inner.state.lock();
                let mut fds = Fds::new(kinds.clone(), fds);
                if let Ok(Answer::Created(report)) = &result {
                    let held = Held::new((**report).clone(), &kinds, std::mem::take(&mut fds));
                    state.containers.insert(report.create.id.clone(), held);
                }
                if let Some(waiting) = state.pending.remove(&id) {
                    // Whoever asked may have gone away; the answer is noted above.
                    _ = waiting.send(result.map(|answer| (answer, fds)).map_err(ClientError::Refused));
                }
            }
            Message::Event(event) => {
                let mut state = self.inner.state.lock();
                match &event {
                    Event::Exited(id, exit) => {
                        if let Some(held) = state.containers.get_mut(id) {
                            held.report.exit = Some(*exit);
                            held.report.state = ContainerState::Exited;
                            held.fds.clear();
                        }
                    }
                    Event::ExecExited(name, exit) => {
                        if let Some(waiting) = state.execs.remove(name) {
                            _ = waiting.send(*exit);
                        }
                    }
                    Event::Oom(_) => {}
                    Event::LogLost(id, why) => tracing::error!(container = %id, why, "log lines are lost"),
                }
                drop(state);
                // Nobody listening is no error.
                _ = self.inner.events.send(event);
            }
        }
    }

    // ---- when a process dies ----------------------------------------------------------------------------------------

    fn lost(&self) {
        let mut state = self.inner.state.lock();
        state.link = None;
        state.pending.clear();
        state.execs.clear();
    }

    /// Gives a new supervisor all that we hold and watches for the ends of the processes, whose parent we are now.
    fn hand_over(&self) {
        let held: Vec<_> = {
            let state = self.inner.state.lock();
            state.containers.values().map(|held| (held.report.clone(), held.fds.clone())).collect()
        };
        for (report, fds) in held {
            let (kinds, fds): (Vec<_>, Vec<_>) = fds.into_iter().unzip();
            let borrowed: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
            let id = report.create.id.clone();
            let ended = report.exit.is_some();
            if let Err(error) = self.send(Verb::TakeOver(Box::new(report)), kinds.clone(), &borrowed) {
                tracing::error!(container = %id, %error, "cannot hand over");
            }
            let pidfd = kinds.iter().position(|kind| *kind == FdKind::Pidfd).map(|at| fds[at].clone());
            if let Some(pidfd) = pidfd.filter(|_| !ended) {
                tokio::spawn(self.clone().reap(id, pidfd));
            }
        }
    }

    /// Waits for the end of a process that a dead supervisor left us and tells the new one how it ended.
    async fn reap(self, id: ContainerId, pidfd: Arc<OwnedFd>) {
        let exit = match watch(pidfd.clone()) {
            Ok(watched) => match watched.readable().await {
                Ok(_) => process::wait(pidfd.as_fd(), false).ok().flatten(),
                Err(_) => None,
            },
            Err(error) => {
                tracing::error!(container = %id, %error, "cannot watch");
                None
            }
        };
        let exit = match exit {
            Some(exit) => Some(exit),
            None => tokio::task::spawn_blocking(move || reaped_elsewhere(pidfd.as_fd())).await.ok().flatten(),
        };
        let exit = exit.map(|exit| ExitStatus {
            code: exit.code(),
            signal: match exit {
                process::Exit::Signal(signal) => Some(signal),
                process::Exit::Code(_) => None,
            },
            oom_killed: false,
            finished_at: now(),
        });
        if let Err(error) = self.done(Verb::Reaped { container: id.clone(), exit }).await {
            tracing::warn!(container = %id, %error, "exit not noted by the supervisor");
        }
    }

    /// Ends what both processes' deaths have left behind: nobody reads its output nor can say how it will end.
    fn bury_orphans(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.inner.layout.containers())? {
            let folder = entry?.path();
            let Some(mut report) = read_report(&folder) else { continue };
            let mut state = self.inner.state.lock();
            if state.containers.contains_key(&report.create.id) {
                continue;
            }
            if report.exit.is_none() {
                kill_cgroup(&report.create.cgroup);
                if start_ticks(report.pid) == Some(report.start_ticks)
                    && let Ok(pidfd) = process::pidfd_open(report.pid)
                {
                    // Its cgroup may be gone already; the process itself is surely told by its start time.
                    _ = process::pidfd_send_signal(pidfd.as_fd(), Signal::SIGKILL as i32);
                }
                report.state = ContainerState::Unknown;
                report.exit = Some(ExitStatus { code: 137, signal: None, oom_killed: false, finished_at: now() });
                fs::write(folder.join("state.json"), serde_json::to_vec(&report)?)?;
            }
            state.containers.insert(report.create.id.clone(), Held { report, fds: Vec::new() });
        }
        Ok(())
    }
}

/// Watches a descriptor with tokio.
#[expect(
    deprecated,
    reason = "its successor is unsafe, for types whose descriptor may change; that of an OwnedFd cannot"
)]
fn watch(fd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    AsyncFd::new(fd)
}

fn read_report(folder: &Path) -> Option<Report> {
    serde_json::from_slice(&fs::read(folder.join("state.json")).ok()?).ok()
}

fn kill_cgroup(cgroup: &Path) {
    let folder = crate::cgroups::mount_point().join(cgroup.strip_prefix("/").unwrap_or(cgroup));
    if let Err(error) = fs::write(folder.join("cgroup.kill"), "1")
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::error!(cgroup = %folder.display(), %error, "cannot kill the processes of an orphaned container");
    }
}
