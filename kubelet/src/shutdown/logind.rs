//! logind: the lock that delays the host's end, and the word that it comes (org.freedesktop.login1(5), "Inhibitor Locks").

use std::fs;
use std::io::{self, Error};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_runtime::systemd::bus::{Body, Connection, Message};
use tokio::sync::mpsc;

/// Where a host's bus listens unless `DBUS_SYSTEM_BUS_ADDRESS` says otherwise.
const BUS: &str = "/run/dbus/system_bus_socket";
const MANAGER: [&str; 3] = ["org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"];
const PROPERTIES: [&str; 3] = [MANAGER[0], MANAGER[1], "org.freedesktop.DBus.Properties"];
const SYSTEMD: [&str; 3] =
    ["org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"];
const RULE: &str = "type='signal',interface='org.freedesktop.login1.Manager',member='PrepareForShutdown',path='/org/freedesktop/login1'";
/// Setting of logind's for as long as the host runs.
const DROP_IN: &str = "/run/systemd/logind.conf.d/99-coracle.conf";
/// Pause before a bus that was lost, or is not there, is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// How often, and how far apart, logind is looked at until it has read a new setting.
const LOOKS: (u32, Duration) = (50, Duration::from_millis(100));

/// While this is held, the host waits with its end; it is let go with the value.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "what counts is that it is open")] OwnedFd);

/// What logind says.
#[derive(Debug)]
pub(super) enum Word {
    /// From now on it waits for us.
    Held(Lock),
    /// The host is about to end, or after all is not.
    Ending(bool),
    /// It cannot be heard; another attempt follows.
    Lost(Error),
}

/// Follows logind in a thread of its own until nobody listens; `needed` is how long an end must be delayed.
pub(super) fn follow(needed: Duration) -> io::Result<mpsc::Receiver<Word>> {
    let (sender, receiver) = mpsc::channel(4);
    std::thread::Builder::new().name("logind".into()).spawn(move || {
        while let Err(error) = listen(needed, &sender) {
            if sender.blocking_send(Word::Lost(error)).is_err() {
                return;
            }
            std::thread::sleep(RETRY);
        }
    })?;
    Ok(receiver)
}

fn bus() -> PathBuf {
    let address = std::env::var("DBUS_SYSTEM_BUS_ADDRESS").unwrap_or_default();
    address.strip_prefix("unix:path=").map_or_else(|| BUS.into(), |path| path.split(',').next().unwrap_or(path).into())
}

/// Returns when nobody listens.
fn listen(needed: Duration, sender: &mpsc::Sender<Word>) -> io::Result<()> {
    let path = bus();
    let mut bus = Connection::on_bus(&path)
        .map_err(|error| Error::new(error.kind(), format!("the bus at {}: {error}", path.display())))?;
    bus.subscribe(RULE)?;
    let delay = delay(&mut bus)?;
    if delay < needed {
        raise(&mut bus, needed)?;
    }
    // It may have been announced before this program started.
    let mut word = if property(&mut bus, "PreparingForShutdown")? == 0 {
        Word::Held(inhibit(&mut bus)?)
    } else {
        Word::Ending(true)
    };
    loop {
        let ending = !matches!(word, Word::Ending(false));
        if sender.blocking_send(word).is_err() {
            return Ok(());
        }
        word = if ending { next(&mut bus)? } else { Word::Held(inhibit(&mut bus)?) };
    }
}

fn next(bus: &mut Connection) -> io::Result<Word> {
    loop {
        let signal = bus.signal_some_day()?;
        if let ("PrepareForShutdown", Some(ending)) = (signal.member.as_str(), signal.bool()) {
            return Ok(Word::Ending(ending));
        }
    }
}

fn accepted(answer: Message, asked: &str) -> io::Result<Message> {
    if answer.error.is_empty() {
        return Ok(answer);
    }
    let words = answer.texts(0).into_iter().next().unwrap_or_default();
    Err(Error::other(format!("{asked}: {words} ({})", answer.error)))
}

fn property(bus: &mut Connection, name: &str) -> io::Result<u64> {
    let mut body = Body::default();
    body.text(MANAGER[2]).text(name);
    let answer = accepted(bus.call(PROPERTIES, "Get", "ss", &body)?, "ask logind")?;
    answer.property().ok_or_else(|| Error::other(format!("logind does not tell {name}")))
}

fn delay(bus: &mut Connection) -> io::Result<Duration> {
    property(bus, "InhibitDelayMaxUSec").map(Duration::from_micros)
}

fn inhibit(bus: &mut Connection) -> io::Result<Lock> {
    let mut body = Body::default();
    body.text("shutdown").text("coracle").text("pods get their time to end").text("delay");
    let answer = accepted(bus.call(MANAGER, "Inhibit", "ssss", &body)?, "take a lock of logind's")?;
    answer.descriptor().map(Lock).ok_or_else(|| Error::other("logind gave no lock"))
}

/// Has logind wait as long as the pods may take.
fn raise(bus: &mut Connection, needed: Duration) -> io::Result<()> {
    let path = Path::new(DROP_IN);
    let text = format!("[Login]\nInhibitDelayMaxSec={}\n", needed.as_secs());
    let written = fs::create_dir_all(path.parent().unwrap_or(path)).and_then(|()| fs::write(path, text));
    written.map_err(|error| Error::new(error.kind(), format!("write {DROP_IN}: {error}")))?;
    let mut body = Body::default();
    body.text("systemd-logind.service").text("all").i32(nix::libc::SIGHUP);
    accepted(bus.call(SYSTEMD, "KillUnit", "ssi", &body)?, "have logind read its settings again")?;
    let (times, pause) = LOOKS;
    let mut has = Duration::ZERO;
    for _ in 0..times {
        has = delay(bus)?;
        if has >= needed {
            return Ok(());
        }
        std::thread::sleep(pause);
    }
    Err(Error::other(format!(
        "logind waits {} s at most and the pods may take {}: does another file set InhibitDelayMaxSec after {DROP_IN}?",
        has.as_secs(),
        needed.as_secs()
    )))
}
