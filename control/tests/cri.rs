//! The Container Runtime Interface on the real thing: a runtime daemon, its socket, and a client that does what a kubelet does.
#![forbid(unsafe_code)]

#[allow(dead_code, reason = "each file of tests uses another part of it")]
mod support;

use std::path::Path;
use std::time::Duration;

use coracle_kubelet::cri_v1::api;
use coracle_kubelet::grpc::Client;
use coracle_testkit::{Image, assert_eventually_async};
use support::{Host, PATIENCE_S};
use tonic::{Code, Status};

const LIMIT: Duration = Duration::from_secs(PATIENCE_S as u64);
const BUSYBOX: &str = "docker.io/library/busybox:1";

/// One call by its name; question and answer say which types.
macro_rules! call {
    ($client:expr, $service:literal / $method:literal, $question:expr) => {
        $client.call(concat!("/runtime.v1.", $service, "/", $method), $question, LIMIT).await
    };
}

fn pod(uid: &str, logs: &Path) -> api::PodSandboxConfig {
    api::PodSandboxConfig {
        metadata: Some(api::PodSandboxMetadata {
            name: "p".into(),
            uid: uid.into(),
            namespace: "default".into(),
            attempt: 0,
        }),
        hostname: "inside".into(),
        log_directory: logs.display().to_string(),
        labels: [("app".to_owned(), "x".to_owned())].into(),
        dns_config: Some(api::DNSConfig { servers: vec!["10.9.8.7".into()], ..Default::default() }),
        ..Default::default()
    }
}

fn container(name: &str, command: &[&str]) -> api::ContainerConfig {
    api::ContainerConfig {
        metadata: Some(api::ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(api::ImageSpec { image: BUSYBOX.into(), ..Default::default() }),
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        log_path: format!("{name}.log"),
        ..Default::default()
    }
}

async fn create(client: &Client, sandbox: &str, config: api::ContainerConfig) -> Result<String, Status> {
    let question =
        api::CreateContainerRequest { pod_sandbox_id: sandbox.into(), config: Some(config), sandbox_config: None };
    let made: api::CreateContainerResponse = call!(client, "RuntimeService" / "CreateContainer", question)?;
    Ok(made.container_id)
}

async fn start(client: &Client, id: &str) {
    let question = api::StartContainerRequest { container_id: id.into() };
    let _: api::StartContainerResponse = call!(client, "RuntimeService" / "StartContainer", question).expect("starts");
}

async fn status(client: &Client, id: &str) -> Result<api::ContainerStatus, Status> {
    let question = api::ContainerStatusRequest { container_id: id.into(), verbose: false };
    let told: api::ContainerStatusResponse = call!(client, "RuntimeService" / "ContainerStatus", question)?;
    Ok(told.status.expect("a status"))
}

async fn exec(client: &Client, id: &str, command: &[&str], timeout: i64) -> Result<(String, i32), Status> {
    let cmd = command.iter().map(|word| (*word).to_owned()).collect();
    let question = api::ExecSyncRequest { container_id: id.into(), cmd, timeout };
    let told: api::ExecSyncResponse = call!(client, "RuntimeService" / "ExecSync", question)?;
    Ok((String::from_utf8_lossy(&told.stdout).into_owned(), told.exit_code))
}

async fn remove_pod(client: &Client, sandbox: &str) {
    let question = api::StopPodSandboxRequest { pod_sandbox_id: sandbox.into() };
    let _: api::StopPodSandboxResponse = call!(client, "RuntimeService" / "StopPodSandbox", question).expect("stops");
    let question = api::RemovePodSandboxRequest { pod_sandbox_id: sandbox.into() };
    let _: api::RemovePodSandboxResponse =
        call!(client, "RuntimeService" / "RemovePodSandbox", question).expect("is removed");
}

async fn run_pod(client: &Client, config: api::PodSandboxConfig) -> Result<String, Status> {
    let question = api::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
    let made: api::RunPodSandboxResponse = call!(client, "RuntimeService" / "RunPodSandbox", question)?;
    Ok(made.pod_sandbox_id)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubelet_of_somebody_else_can_run_pods_and_a_killed_daemon_loses_none() {
    let mut host = Host::new("cri");
    let socket = host.start_cri();
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&socket).expect("a socket").permissions());
    assert_eq!(mode & 0o777, 0o600, "others may talk to the runtime");
    host.import(&Image::busybox(BUSYBOX));
    let client = Client::connect(&socket).await.expect("connects");

    let version: api::VersionResponse =
        call!(client, "RuntimeService" / "Version", api::VersionRequest::default()).expect("answers");
    assert_eq!((version.runtime_name.as_str(), version.runtime_api_version.as_str()), ("coracle", "v1"));
    let told: api::StatusResponse =
        call!(client, "RuntimeService" / "Status", api::StatusRequest::default()).expect("answers");
    let conditions = told.status.expect("a status").conditions;
    assert!(conditions.iter().all(|condition| condition.status), "{conditions:?}");
    let question = api::ImageStatusRequest {
        image: Some(api::ImageSpec { image: BUSYBOX.into(), ..Default::default() }),
        verbose: false,
    };
    let image: api::ImageStatusResponse = call!(client, "ImageService" / "ImageStatus", question).expect("answers");
    let image_id = image.image.expect("the image is known").id;

    // One pod with a shared PID namespace, which is what the interface's zero value asks for.
    let logs = host.path("logs");
    let mut events = client
        .stream::<_, api::ContainerEventResponse>(
            "/runtime.v1.RuntimeService/GetContainerEvents",
            api::GetEventsRequest::default(),
        )
        .await
        .expect("events");
    let sandbox = run_pod(&client, pod("u1", &logs)).await.expect("a sandbox");
    let first = events.message().await.expect("the stream goes on").expect("an event");
    assert_eq!((first.container_id.as_str(), first.container_event_type), (sandbox.as_str(), 0));
    assert_eq!(run_pod(&client, pod("u1", &logs)).await.expect_err("twice").code(), Code::AlreadyExists);

    let mut config = container("main", &["sh", "-c", "echo out; echo err >&2; sleep 1000"]);
    config.linux = Some(api::LinuxContainerConfig {
        resources: None,
        security_context: Some(api::LinuxContainerSecurityContext {
            run_as_user: Some(api::Int64Value { value: 1000 }),
            supplemental_groups: vec![2000],
            masked_paths: vec!["/proc/keys".into()],
            seccomp: Some(api::SecurityProfile::default()),
            no_new_privs: true,
            ..Default::default()
        }),
    });
    let main = create(&client, &sandbox, config.clone()).await.expect("a container");
    assert_eq!(create(&client, &sandbox, config).await.expect_err("twice").code(), Code::AlreadyExists);
    assert_eq!(status(&client, &main).await.expect("known").state, api::ContainerState::Created as i32);
    start(&client, &main).await;
    let seen = status(&client, &main[..12]).await.expect("a shortened id is enough");
    assert_eq!((seen.state, seen.image_id.as_str()), (api::ContainerState::Running as i32, image_id.as_str()));
    let user = seen.user.and_then(|user| user.linux).expect("a user");
    assert_eq!((user.uid, user.supplemental_groups), (1000, vec![0, 2000]));

    // The pod's own process is the first one, and reaps what loses its parent.
    let inside = exec(&client, &main, &["sh", "-c", "cat /proc/1/cmdline; hostname; cat /etc/resolv.conf"], 30).await;
    let (inside, _) = inside.expect("runs");
    assert!(inside.starts_with("/pause\0inside\n") && inside.contains("nameserver 10.9.8.7"), "{inside:?}");
    assert_eq!(exec(&client, &main, &["sh", "-c", "exit 7"], 30).await.expect("runs").1, 7);
    exec(&client, &main, &["sh", "-c", "(sleep 0.01 &) ; true"], 30).await.expect("runs");
    assert_eventually_async!(
        PATIENCE_S,
        !exec(&client, &main, &["sh", "-c", "grep -l 'State:.Z' /proc/[0-9]*/status || true"], 30)
            .await
            .expect("runs")
            .0
            .contains("status"),
        "a zombie stays"
    );
    assert_eq!(exec(&client, &main, &["sleep", "1000"], 1).await.expect_err("too long").code(), Code::DeadlineExceeded);
    let log = || std::fs::read_to_string(logs.join("main.log")).unwrap_or_default();
    assert_eventually_async!(
        PATIENCE_S,
        log().contains(" stdout F out\n") && log().contains(" stderr F err\n"),
        "{}",
        log()
    );

    // The log is moved and opened anew.
    std::fs::rename(logs.join("main.log"), logs.join("old.log")).expect("the log is moved");
    let question = api::ReopenContainerLogRequest { container_id: main.clone() };
    let _: api::ReopenContainerLogResponse =
        call!(client, "RuntimeService" / "ReopenContainerLog", question).expect("opens");
    assert!(logs.join("main.log").exists(), "no new log");

    let question = api::ContainerStatsRequest { container_id: main.clone() };
    let stats: api::ContainerStatsResponse =
        call!(client, "RuntimeService" / "ContainerStats", question).expect("stats");
    let memory = stats.stats.and_then(|stats| stats.memory).and_then(|memory| memory.working_set_bytes);
    assert!(memory.is_some_and(|memory| memory.value > 0), "no memory is used");

    // An image as a volume, and what cannot be.
    let mut config = container("reader", &["cat", "/image/bin/busybox"]);
    let mount = api::Mount {
        container_path: "/image".into(),
        readonly: true,
        image: Some(api::ImageSpec { image: BUSYBOX.into(), ..Default::default() }),
        ..Default::default()
    };
    config.log_path = String::new();
    config.mounts = vec![mount.clone()];
    let reader = create(&client, &sandbox, config.clone()).await.expect("a container with an image");
    start(&client, &reader).await;
    let ended = async || status(&client, &reader).await.expect("known");
    assert_eventually_async!(PATIENCE_S, ended().await.state == api::ContainerState::Exited as i32, "it does not end");
    assert_eq!((ended().await.exit_code, ended().await.reason.as_str()), (0, "Completed"));
    config.metadata = Some(api::ContainerMetadata { name: "missing".into(), attempt: 0 });
    config.mounts = vec![api::Mount { image_sub_path: "nowhere".into(), ..mount }];
    assert_eq!(create(&client, &sandbox, config).await.expect_err("no such folder").code(), Code::InvalidArgument);

    // A container that was never started can be removed.
    let idle = create(&client, &sandbox, container("idle", &["sleep", "1000"])).await.expect("a container");
    let question = api::RemoveContainerRequest { container_id: idle.clone() };
    let _: api::RemoveContainerResponse =
        call!(client, "RuntimeService" / "RemoveContainer", question).expect("removed");
    assert_eq!(status(&client, &idle).await.expect_err("removed").code(), Code::NotFound);

    // The daemon dies and comes back: the pod has run on.
    host.kill_server();
    host.start_cri();
    let client = Client::connect(&socket).await.expect("connects");
    assert_eq!(status(&client, &main).await.expect("known").state, api::ContainerState::Running as i32);
    assert_eq!(exec(&client, &main, &["echo", "still here"], 30).await.expect("runs").0, "still here\n");
    let question = api::StopContainerRequest { container_id: main.clone(), timeout: 0 };
    let _: api::StopContainerResponse = call!(client, "RuntimeService" / "StopContainer", question).expect("stops");
    assert_eq!(status(&client, &main).await.expect("known").exit_code, 137);

    remove_pod(&client, &sandbox).await;
    // Removing what is gone is no error.
    remove_pod(&client, &sandbox).await;
    let question = api::ListContainersRequest::default();
    let rest: api::ListContainersResponse =
        call!(client, "RuntimeService" / "ListContainers", question).expect("lists");
    assert!(rest.containers.is_empty(), "{rest:?}");
    drop(client);
    let left: Vec<_> = host.take_down().into_iter().filter(|line| !line.contains("cri.sock")).collect();
    assert!(left.is_empty(), "left behind: {left:?}");
}
