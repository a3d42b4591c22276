//! Cgroups that systemd makes (`--systemd-cgroup`): a transient scope for each container, delegated to us, so that the
//! host's service manager shows and keeps what engines ask for (systemd.scope(5), "Control Group APIs and Delegation").

pub mod bus;
mod property;

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use bus::{Body, Connection, Message, Value};
use oci_spec::runtime::LinuxResources;

use crate::cgroup;
use crate::error::{Error, Result};

/// Where systemd itself listens, for root alone; it is there before a message bus is.
const SOCKET: &str = "/run/systemd/private";
const MANAGER: [&str; 3] =
    ["org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"];
const DEFAULT_SLICE: &str = "system.slice";
const DEFAULT_PREFIX: &str = "corun";
const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
/// First word of the command line of a [`Holder`].
pub const HOLDER: &str = "hold-scope";

/// The unit of a container.
#[derive(Debug)]
pub struct Scope {
    slice: String,
    unit: String,
}

impl Scope {
    /// From `linux.cgroupsPath`, which then has the form `slice:prefix:name`.
    ///
    /// # Errors
    /// When it has another form.
    pub fn of(cgroups_path: Option<&Path>, id: &str) -> Result<Self> {
        let text = cgroups_path.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
        if text.is_empty() {
            return Ok(Self { slice: DEFAULT_SLICE.into(), unit: format!("{DEFAULT_PREFIX}-{id}.scope") });
        }
        let parts: Vec<&str> = text.split(':').collect();
        let [slice, prefix, name] = parts[..] else {
            return Err(Error::config(
                "linux.cgroupsPath",
                format!("{text:?} is not of the form slice:prefix:name that --systemd-cgroup needs"),
            ));
        };
        let slice = if slice.is_empty() { DEFAULT_SLICE } else { slice };
        if name.is_empty() || text.contains('/') || !slice.ends_with(".slice") {
            return Err(Error::config("linux.cgroupsPath", format!("{text:?} does not name a scope in a slice")));
        }
        let unit = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
        Ok(Self { slice: slice.into(), unit })
    }

    /// Its name.
    pub fn unit(&self) -> &str {
        &self.unit
    }

    /// Has systemd make it, with the limits that systemd has words for, and returns the process that holds it until the
    /// container's first process is in, and the name of its cgroup.
    ///
    /// # Errors
    /// When systemd does not run, or refuses.
    pub fn start(
        &self,
        id: &str,
        resources: Option<&LinuxResources>,
        annotations: Option<&HashMap<String, String>>,
    ) -> Result<(Holder, PathBuf)> {
        let failed = failed(&self.unit);
        let holder = Holder::start().map_err(|error| failed("start its first process", error.to_string()))?;
        let mut properties: Vec<(String, Value)> = vec![
            ("Description".into(), Value::Text(format!("corun container {id}"))),
            ("Slice".into(), Value::Text(self.slice.clone())),
            ("Delegate".into(), Value::Bool(true)),
            ("DefaultDependencies".into(), Value::Bool(false)),
            ("PIDs".into(), Value::Numbers(vec![holder.0.id()])),
        ];
        let accounts = ["CPUAccounting", "IOAccounting", "MemoryAccounting", "TasksAccounting"];
        properties.extend(accounts.map(|name| (name.into(), Value::Bool(true))));
        properties.extend(limits(resources)?);
        properties.extend(property::of_annotations(annotations)?);
        let mut systemd = Systemd::connect(&self.unit)?;
        let mut body = Body::default();
        body.text(&self.unit).text("fail").properties(&properties);
        // Units that hang on the new one: none.
        body.array::<()>(8, &[], |_, ()| {});
        let mut answer = systemd.call("StartTransientUnit", "ssa(sv)a(sa(sv))", &body)?;
        if answer.error == UNIT_EXISTS {
            // One of this name has failed and is remembered.
            systemd.forget()?;
            answer = systemd.call("StartTransientUnit", "ssa(sv)a(sa(sv))", &body)?;
        }
        systemd.finish("start", answer)?;
        let cgroup = holder.cgroup().ok_or_else(|| failed("find the cgroup of", "its process ended".into()))?;
        Ok((holder, cgroup))
    }
}

fn failed(unit: &str) -> impl Fn(&'static str, String) -> Error + use<> {
    let unit = unit.to_owned();
    move |action, reason| Error::Systemd { action, unit: unit.clone(), reason }
}

fn limits(resources: Option<&LinuxResources>) -> Result<Vec<(String, Value)>> {
    let settings = resources.map(|resources| cgroup::settings(resources, |_| true)).transpose()?;
    Ok(property::of_settings(&settings.unwrap_or_default()))
}

/// Tells systemd of new limits of a unit, until the next boot.
///
/// # Errors
/// When it does not run, or refuses.
pub fn set(unit: &str, resources: &LinuxResources) -> Result<()> {
    let properties = limits(Some(resources))?;
    if properties.is_empty() {
        return Ok(());
    }
    let mut systemd = Systemd::connect(unit)?;
    let mut body = Body::default();
    body.text(unit).bool(true).properties(&properties);
    let answer = systemd.call("SetUnitProperties", "sba(sv)", &body)?;
    systemd.done("set the limits of", &answer)
}

/// Ends a unit and what is left in it, and has it forgotten.
///
/// # Errors
/// When systemd does not run, or refuses.
pub fn stop(unit: &str) -> Result<()> {
    let mut systemd = Systemd::connect(unit)?;
    let mut body = Body::default();
    body.text(unit).text("replace");
    let answer = systemd.call("StopUnit", "ss", &body)?;
    // A scope whose last process ended is gone by itself.
    if answer.error != NO_SUCH_UNIT {
        systemd.finish("stop", answer)?;
    }
    systemd.forget()
}

/// systemd, about one unit.
struct Systemd<'unit> {
    connection: Connection,
    unit: &'unit str,
}

impl<'unit> Systemd<'unit> {
    fn connect(unit: &'unit str) -> Result<Self> {
        let mut connection = Connection::open(Path::new(SOCKET)).map_err(|error| {
            let advice = "leave --systemd-cgroup out where systemd does not run, or run as root";
            failed(unit)("ask for", format!("{SOCKET}: {error}; {advice}"))
        })?;
        // Of jobs that end it tells those who asked for it.
        let told = connection.call(MANAGER, "Subscribe", "", &Body::default());
        told.map_err(|error| failed(unit)("hear of", error.to_string()))?;
        Ok(Self { connection, unit })
    }

    fn call(&mut self, member: &'static str, signature: &str, body: &Body) -> Result<Message> {
        let answer = self.connection.call(MANAGER, member, signature, body);
        answer.map_err(|error| failed(self.unit)(member, error.to_string()))
    }

    fn done(&self, action: &'static str, answer: &Message) -> Result<()> {
        if answer.error.is_empty() {
            return Ok(());
        }
        let words = answer.texts(0).into_iter().next().unwrap_or_default();
        Err(failed(self.unit)(action, format!("{words} ({})", answer.error)))
    }

    /// Waits for the end of the job that an answer names.
    fn finish(&mut self, action: &'static str, answer: Message) -> Result<()> {
        self.done(action, &answer)?;
        let job = answer.texts(0);
        loop {
            let signal = self.connection.signal().map_err(|error| failed(self.unit)(action, error.to_string()))?;
            // JobRemoved: number, job, unit, result.
            let words = signal.texts(1);
            if signal.member != "JobRemoved" || words.first() != job.first() {
                continue;
            }
            return match words.get(2).map(String::as_str) {
                Some("done" | "skipped") => Ok(()),
                result => Err(failed(self.unit)(action, format!("its job ended as {}", result.unwrap_or("nothing")))),
            };
        }
    }

    fn forget(&mut self) -> Result<()> {
        let mut body = Body::default();
        body.text(self.unit);
        let answer = self.call("ResetFailedUnit", "s", &body)?;
        if answer.error == NO_SUCH_UNIT { Ok(()) } else { self.done("reset", &answer) }
    }
}

/// A process that keeps a scope from being empty until the container's first process, which is cloned straight into its
/// cgroup, is there. It ends with the value, and with this process.
#[derive(Debug)]
pub struct Holder(Child);

impl Holder {
    fn start() -> std::io::Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg(HOLDER).stdin(Stdio::piped()).stdout(Stdio::null());
        command.spawn().map(Self)
    }

    fn cgroup(&self) -> Option<PathBuf> {
        let text = std::fs::read_to_string(format!("/proc/{}/cgroup", self.0.id())).ok()?;
        text.lines().find_map(|line| line.strip_prefix("0::")).map(PathBuf::from)
    }

    /// What the process does: waits until nobody holds the other end of its standard input.
    ///
    /// # Errors
    /// When its standard input cannot be read.
    pub fn run() -> std::io::Result<()> {
        let mut nothing = [0];
        while std::io::stdin().read(&mut nothing)? > 0 {}
        Ok(())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        if let Err(error) = self.0.wait() {
            eprintln!("corun: cannot wait for the process that held the scope: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_scopes_in_slices() {
        let of = |text: &str| Scope::of(Some(Path::new(text)), "id").map(|scope| (scope.slice, scope.unit));
        assert_eq!(of("").expect("default"), ("system.slice".into(), "corun-id.scope".into()));
        assert_eq!(of("machine.slice:libpod:x").expect("a scope"), ("machine.slice".into(), "libpod-x.scope".into()));
        assert_eq!(of("::x").expect("a scope"), ("system.slice".into(), "x.scope".into()));
        for wrong in ["/a/b", "a:b", "a.slice:b:", "a:b:c", "a.slice:b/c:d", "a.slice:b:c:d"] {
            assert!(of(wrong).is_err(), "{wrong:?}");
        }
    }
}
