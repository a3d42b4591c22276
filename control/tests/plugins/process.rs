//! A plugin as a process: this test program once more, in the namespaces of the test's host.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use coracle_kubelet::grpc::{Router, bind, serve};
use coracle_kubelet::plugins::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use serde_json::Value;

use crate::support::Host;

const WHICH: &str = "CORACLE_TEST_PLUGIN";
const KUBELET: &str = "CORACLE_TEST_KUBELET";

/// A plugin that runs.
pub(crate) struct Plugin {
    child: Child,
    kubelet: PathBuf,
    name: &'static str,
}

impl Plugin {
    pub(crate) fn start(host: &Host, name: &'static str) -> Self {
        let kubelet = host.path("data/kubelet");
        let this = std::env::current_exe().expect("a test program");
        let mut command = host.command(this);
        command.args(["--exact", "process::plugin", "--ignored", "--nocapture"]);
        let log = std::fs::File::options().create(true).append(true).open(host.path("plugin.txt")).expect("a log");
        command.env(WHICH, name).env(KUBELET, &kubelet).stdout(Stdio::null()).stderr(log);
        Self { child: command.spawn().expect("the plugin starts"), kubelet, name }
    }

    /// What was asked of the plugin, in order, as JSON with the name of the call in `call`.
    pub(crate) fn calls(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(journal(&self.kubelet, self.name)).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).expect("a whole line")).collect()
    }

    /// How often one call was made.
    pub(crate) fn count(&self, call: &str) -> usize {
        self.calls().iter().filter(|entry| entry["call"] == call).count()
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn journal(kubelet: &Path, name: &str) -> PathBuf {
    kubelet.join("plugins").join(name).join("journal")
}

/// What a plugin notes of each call.
#[derive(Clone)]
pub(crate) struct Journal(PathBuf);

impl Journal {
    pub(crate) fn note(&self, call: &str, mut what: Value) {
        what["call"] = call.into();
        let mut file = std::fs::File::options().create(true).append(true).open(&self.0).expect("a journal");
        file.write_all(format!("{what}\n").as_bytes()).expect("written");
    }
}

/// A plugin's own service and its registration, until the process ends.
pub(crate) async fn run(kubelet: &Path, type_: &'static str, name: &'static str, version: &str, service: Router) {
    let folder = kubelet.join("plugins").join(name);
    let endpoint = folder.join("plugin.sock");
    let listener = bind(&endpoint).await.expect("the plugin listens");
    let info = PluginInfo {
        r#type: type_.into(),
        name: name.into(),
        endpoint: endpoint.display().to_string(),
        supported_versions: vec![version.into()],
    };
    let registration = Router::default()
        .unary("/pluginregistration.Registration/GetInfo", move |_: InfoRequest| {
            let info = info.clone();
            async move { Ok(info) }
        })
        .unary("/pluginregistration.Registration/NotifyRegistrationStatus", |status: RegistrationStatus| async move {
            assert!(status.plugin_registered, "{}", status.error);
            Ok(RegistrationStatusResponse {})
        });
    let socket = kubelet.join("plugins_registry").join(format!("{name}.sock"));
    let registry = bind(&socket).await.expect("the registration listens");
    let (own, registered) = tokio::join!(serve(listener, service), serve(registry, registration));
    own.and(registered).expect("the plugin serves");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "no test but a process that tests start"]
async fn plugin() {
    let (Ok(which), Ok(kubelet)) = (std::env::var(WHICH), std::env::var(KUBELET)) else { return };
    let kubelet = PathBuf::from(kubelet);
    std::fs::create_dir_all(kubelet.join("plugins").join(&which)).expect("a folder");
    let journal = Journal(journal(&kubelet, &which));
    match which.as_str() {
        crate::csi_driver::NAME => crate::csi_driver::run(&kubelet, journal).await,
        crate::devices::PLUGIN => crate::devices::run_plugin(&kubelet, journal).await,
        crate::devices::DRIVER => crate::devices::run_driver(&kubelet, journal).await,
        other => panic!("no plugin is called {other}"),
    }
}
