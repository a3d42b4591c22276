//! The messages of the Container Runtime Interface v1 (`runtime.v1`), names and numbers as in `k8s.io/cri-api`, Kubernetes
//! 1.36. What is for Windows alone is left out: unknown fields are skipped.

use crate::grpc::proto;

proto! {
enum ProfileType { RuntimeDefault = 0; Unconfined = 1; Localhost = 2; }
message VersionRequest { string version = 1; }
message VersionResponse {
    string version = 1; string runtime_name = 2; string runtime_version = 3; string runtime_api_version = 4;
}
message DNSConfig { repeated string servers = 1; repeated string searches = 2; repeated string options = 3; }
enum Protocol { Tcp = 0; Udp = 1; Sctp = 2; }
message PortMapping {
    enum Protocol protocol = 1; int32 container_port = 2; int32 host_port = 3; string host_ip = 4;
}
enum MountPropagation { Private = 0; HostToContainer = 1; Bidirectional = 2; }
message Mount {
    string container_path = 1; string host_path = 2; bool readonly = 3; bool selinux_relabel = 4;
    enum MountPropagation propagation = 5; repeated IDMapping uid_mappings = 6;
    repeated IDMapping gid_mappings = 7; bool recursive_read_only = 8; ImageSpec image = 9;
    string image_sub_path = 10;
}
message IDMapping { uint32 host_id = 1; uint32 container_id = 2; uint32 length = 3; }
enum NamespaceMode { Pod = 0; Container = 1; Node = 2; Target = 3; }
message UserNamespace { enum NamespaceMode mode = 1; repeated IDMapping uids = 2; repeated IDMapping gids = 3; }
message NamespaceOption {
    enum NamespaceMode network = 1; enum NamespaceMode pid = 2; enum NamespaceMode ipc = 3; string target_id = 4;
    UserNamespace userns_options = 5;
}
enum SupplementalGroupsPolicy { Merge = 0; Strict = 1; }
message Int64Value { int64 value = 1; }
message LinuxSandboxSecurityContext {
    NamespaceOption namespace_options = 1; SELinuxOption selinux_options = 2; Int64Value run_as_user = 3;
    Int64Value run_as_group = 8; bool readonly_rootfs = 4; repeated int64 supplemental_groups = 5;
    enum SupplementalGroupsPolicy supplemental_groups_policy = 11; bool privileged = 6;
    SecurityProfile seccomp = 9; SecurityProfile apparmor = 10; string seccomp_profile_path = 7;
}
message SecurityProfile { enum ProfileType profile_type = 1; string localhost_ref = 2; }
message LinuxPodSandboxConfig {
    string cgroup_parent = 1; LinuxSandboxSecurityContext security_context = 2; map<string, string> sysctls = 3;
    LinuxContainerResources overhead = 4; LinuxContainerResources resources = 5;
}
message PodSandboxMetadata { string name = 1; string uid = 2; string namespace = 3; uint32 attempt = 4; }
message PodSandboxConfig {
    PodSandboxMetadata metadata = 1; string hostname = 2; string log_directory = 3; DNSConfig dns_config = 4;
    repeated PortMapping port_mappings = 5; map<string, string> labels = 6; map<string, string> annotations = 7;
    LinuxPodSandboxConfig linux = 8;
}
message RunPodSandboxRequest { PodSandboxConfig config = 1; string runtime_handler = 2; }
message RunPodSandboxResponse { string pod_sandbox_id = 1; }
message StopPodSandboxRequest { string pod_sandbox_id = 1; }
message StopPodSandboxResponse {}
message RemovePodSandboxRequest { string pod_sandbox_id = 1; }
message RemovePodSandboxResponse {}
message PodSandboxStatusRequest { string pod_sandbox_id = 1; bool verbose = 2; }
message PodIP { string ip = 1; }
message PodSandboxNetworkStatus { string ip = 1; repeated PodIP additional_ips = 2; }
message Namespace { NamespaceOption options = 2; }
message LinuxPodSandboxStatus { Namespace namespaces = 1; }
enum PodSandboxState { Ready = 0; NotReady = 1; }
message PodSandboxStatus {
    string id = 1; PodSandboxMetadata metadata = 2; enum PodSandboxState state = 3; int64 created_at = 4;
    PodSandboxNetworkStatus network = 5; LinuxPodSandboxStatus linux = 6; map<string, string> labels = 7;
    map<string, string> annotations = 8; string runtime_handler = 9;
}
message PodSandboxStatusResponse {
    PodSandboxStatus status = 1; map<string, string> info = 2; repeated ContainerStatus containers_statuses = 3;
    int64 timestamp = 4;
}
message PodSandboxStateValue { enum PodSandboxState state = 1; }
message PodSandboxFilter {
    string id = 1; PodSandboxStateValue state = 2; map<string, string> label_selector = 3;
}
message ListPodSandboxRequest { PodSandboxFilter filter = 1; }
message PodSandbox {
    string id = 1; PodSandboxMetadata metadata = 2; enum PodSandboxState state = 3; int64 created_at = 4;
    map<string, string> labels = 5; map<string, string> annotations = 6; string runtime_handler = 7;
}
message ListPodSandboxResponse { repeated PodSandbox items = 1; }
message StreamPodSandboxesRequest { PodSandboxFilter filter = 1; }
message StreamPodSandboxesResponse { repeated PodSandbox pod_sandboxes = 1; }
message PodSandboxStatsRequest { string pod_sandbox_id = 1; }
message PodSandboxStatsResponse { PodSandboxStats stats = 1; }
message PodSandboxStatsFilter { string id = 1; map<string, string> label_selector = 2; }
message ListPodSandboxStatsRequest { PodSandboxStatsFilter filter = 1; }
message ListPodSandboxStatsResponse { repeated PodSandboxStats stats = 1; }
message StreamPodSandboxStatsRequest { PodSandboxStatsFilter filter = 1; }
message StreamPodSandboxStatsResponse { repeated PodSandboxStats pod_sandbox_stats = 1; }
message PodSandboxAttributes {
    string id = 1; PodSandboxMetadata metadata = 2; map<string, string> labels = 3;
    map<string, string> annotations = 4;
}
message PodSandboxStats { PodSandboxAttributes attributes = 1; LinuxPodSandboxStats linux = 2; }
message LinuxPodSandboxStats {
    CpuUsage cpu = 1; MemoryUsage memory = 2; NetworkUsage network = 3; ProcessUsage process = 4;
    repeated ContainerStats containers = 5; IoUsage io = 6;
}
message NetworkUsage {
    int64 timestamp = 1; NetworkInterfaceUsage default_interface = 2;
    repeated NetworkInterfaceUsage interfaces = 3;
}
message NetworkInterfaceUsage {
    string name = 1; UInt64Value rx_bytes = 2; UInt64Value rx_errors = 3; UInt64Value tx_bytes = 4;
    UInt64Value tx_errors = 5;
}
message ProcessUsage { int64 timestamp = 1; UInt64Value process_count = 2; }
message ImageSpec {
    string image = 1; map<string, string> annotations = 2; string user_specified_image = 18;
    string runtime_handler = 19; string image_ref = 20;
}
message KeyValue { string key = 1; bytes value = 2; }
message LinuxContainerResources {
    int64 cpu_period = 1; int64 cpu_quota = 2; int64 cpu_shares = 3; int64 memory_limit_in_bytes = 4;
    int64 oom_score_adj = 5; string cpuset_cpus = 6; string cpuset_mems = 7;
    repeated HugepageLimit hugepage_limits = 8; map<string, string> unified = 9;
    int64 memory_swap_limit_in_bytes = 10;
}
message HugepageLimit { string page_size = 1; uint64 limit = 2; }
message SELinuxOption { string user = 1; string role = 2; string r#type = 3; string level = 4; }
message Capability {
    repeated string add_capabilities = 1; repeated string drop_capabilities = 2;
    repeated string add_ambient_capabilities = 3;
}
message LinuxContainerSecurityContext {
    Capability capabilities = 1; bool privileged = 2; NamespaceOption namespace_options = 3;
    SELinuxOption selinux_options = 4; Int64Value run_as_user = 5; Int64Value run_as_group = 12;
    string run_as_username = 6; bool readonly_rootfs = 7; repeated int64 supplemental_groups = 8;
    enum SupplementalGroupsPolicy supplemental_groups_policy = 17; bool no_new_privs = 11;
    repeated string masked_paths = 13; repeated string readonly_paths = 14; SecurityProfile seccomp = 15;
    SecurityProfile apparmor = 16; string apparmor_profile = 9; string seccomp_profile_path = 10;
}
message LinuxContainerConfig {
    LinuxContainerResources resources = 1; LinuxContainerSecurityContext security_context = 2;
}
message LinuxContainerUser { int64 uid = 1; int64 gid = 2; repeated int64 supplemental_groups = 3; }
message ContainerMetadata { string name = 1; uint32 attempt = 2; }
message Device { string container_path = 1; string host_path = 2; string permissions = 3; }
message CDIDevice { string name = 1; }
message ContainerConfig {
    ContainerMetadata metadata = 1; ImageSpec image = 2; repeated string command = 3; repeated string args = 4;
    string working_dir = 5; repeated KeyValue envs = 6; repeated Mount mounts = 7; repeated Device devices = 8;
    map<string, string> labels = 9; map<string, string> annotations = 10; string log_path = 11; bool stdin = 12;
    bool stdin_once = 13; bool tty = 14; LinuxContainerConfig linux = 15; repeated CDIDevice cdi_devices = 17;
    enum Signal stop_signal = 18;
}
message CreateContainerRequest {
    string pod_sandbox_id = 1; ContainerConfig config = 2; PodSandboxConfig sandbox_config = 3;
}
message CreateContainerResponse { string container_id = 1; }
message StartContainerRequest { string container_id = 1; }
message StartContainerResponse {}
message StopContainerRequest { string container_id = 1; int64 timeout = 2; }
message StopContainerResponse {}
message RemoveContainerRequest { string container_id = 1; }
message RemoveContainerResponse {}
enum ContainerState { Created = 0; Running = 1; Exited = 2; Unknown = 3; }
message ContainerStateValue { enum ContainerState state = 1; }
message ContainerFilter {
    string id = 1; ContainerStateValue state = 2; string pod_sandbox_id = 3;
    map<string, string> label_selector = 4;
}
message ListContainersRequest { ContainerFilter filter = 1; }
message Container {
    string id = 1; string pod_sandbox_id = 2; ContainerMetadata metadata = 3; ImageSpec image = 4;
    string image_ref = 5; enum ContainerState state = 6; int64 created_at = 7; map<string, string> labels = 8;
    map<string, string> annotations = 9; string image_id = 10;
}
message ListContainersResponse { repeated Container containers = 1; }
message StreamContainersRequest { ContainerFilter filter = 1; }
message StreamContainersResponse { repeated Container containers = 1; }
message ContainerStatusRequest { string container_id = 1; bool verbose = 2; }
message ContainerStatus {
    string id = 1; ContainerMetadata metadata = 2; enum ContainerState state = 3; int64 created_at = 4;
    int64 started_at = 5; int64 finished_at = 6; int32 exit_code = 7; ImageSpec image = 8; string image_ref = 9;
    string reason = 10; string message = 11; map<string, string> labels = 12;
    map<string, string> annotations = 13; repeated Mount mounts = 14; string log_path = 15;
    ContainerResources resources = 16; string image_id = 17; ContainerUser user = 18;
    enum Signal stop_signal = 19;
}
message ContainerStatusResponse { ContainerStatus status = 1; map<string, string> info = 2; }
message ContainerResources { LinuxContainerResources linux = 1; }
message ContainerUser { LinuxContainerUser linux = 1; }
message UpdateContainerResourcesRequest {
    string container_id = 1; LinuxContainerResources linux = 2; map<string, string> annotations = 4;
}
message UpdateContainerResourcesResponse {}
message ExecSyncRequest { string container_id = 1; repeated string cmd = 2; int64 timeout = 3; }
message ExecSyncResponse { bytes stdout = 1; bytes stderr = 2; int32 exit_code = 3; }
message ExecRequest {
    string container_id = 1; repeated string cmd = 2; bool tty = 3; bool stdin = 4; bool stdout = 5;
    bool stderr = 6;
}
message ExecResponse { string url = 1; }
message AttachRequest { string container_id = 1; bool stdin = 2; bool tty = 3; bool stdout = 4; bool stderr = 5; }
message AttachResponse { string url = 1; }
message PortForwardRequest { string pod_sandbox_id = 1; repeated int32 port = 2; }
message PortForwardResponse { string url = 1; }
message ImageFilter { ImageSpec image = 1; }
message ListImagesRequest { ImageFilter filter = 1; }
message Image {
    string id = 1; repeated string repo_tags = 2; repeated string repo_digests = 3; uint64 size = 4;
    Int64Value uid = 5; string username = 6; ImageSpec spec = 7; bool pinned = 8;
}
message ListImagesResponse { repeated Image images = 1; }
message StreamImagesRequest { ImageFilter filter = 1; }
message StreamImagesResponse { repeated Image images = 1; }
message ImageStatusRequest { ImageSpec image = 1; bool verbose = 2; }
message ImageStatusResponse { Image image = 1; map<string, string> info = 2; }
message AuthConfig {
    string username = 1; string password = 2; string auth = 3; string server_address = 4;
    string identity_token = 5; string registry_token = 6;
}
message PullImageRequest { ImageSpec image = 1; AuthConfig auth = 2; PodSandboxConfig sandbox_config = 3; }
message PullImageResponse { string image_ref = 1; }
message RemoveImageRequest { ImageSpec image = 1; }
message RemoveImageResponse {}
message NetworkConfig { string pod_cidr = 1; }
message RuntimeConfig { NetworkConfig network_config = 1; }
message UpdateRuntimeConfigRequest { RuntimeConfig runtime_config = 1; }
message UpdateRuntimeConfigResponse {}
message RuntimeCondition { string r#type = 1; bool status = 2; string reason = 3; string message = 4; }
message RuntimeStatus { repeated RuntimeCondition conditions = 1; }
message StatusRequest { bool verbose = 1; }
message RuntimeHandlerFeatures { bool recursive_read_only_mounts = 1; bool user_namespaces = 2; }
message RuntimeHandler { string name = 1; RuntimeHandlerFeatures features = 2; }
message RuntimeFeatures { bool supplemental_groups_policy = 1; bool user_namespaces_host_network = 2; }
message StatusResponse {
    RuntimeStatus status = 1; map<string, string> info = 2; repeated RuntimeHandler runtime_handlers = 3;
    RuntimeFeatures features = 4;
}
message ImageFsInfoRequest {}
message UInt64Value { uint64 value = 1; }
message FilesystemIdentifier { string mountpoint = 1; }
message FilesystemUsage {
    int64 timestamp = 1; FilesystemIdentifier fs_id = 2; UInt64Value used_bytes = 3; UInt64Value inodes_used = 4;
}
message ImageFsInfoResponse {
    repeated FilesystemUsage image_filesystems = 1; repeated FilesystemUsage container_filesystems = 2;
}
message ContainerStatsRequest { string container_id = 1; }
message ContainerStatsResponse { ContainerStats stats = 1; }
message ListContainerStatsRequest { ContainerStatsFilter filter = 1; }
message ContainerStatsFilter { string id = 1; string pod_sandbox_id = 2; map<string, string> label_selector = 3; }
message ListContainerStatsResponse { repeated ContainerStats stats = 1; }
message StreamContainerStatsRequest { ContainerStatsFilter filter = 1; }
message StreamContainerStatsResponse { repeated ContainerStats container_stats = 1; }
message ContainerAttributes {
    string id = 1; ContainerMetadata metadata = 2; map<string, string> labels = 3;
    map<string, string> annotations = 4;
}
message ContainerStats {
    ContainerAttributes attributes = 1; CpuUsage cpu = 2; MemoryUsage memory = 3;
    FilesystemUsage writable_layer = 4; SwapUsage swap = 5; IoUsage io = 6;
}
message PsiStats { PsiData full = 1; PsiData some = 2; }
message PsiData { uint64 total = 1; double avg10 = 2; double avg60 = 3; double avg300 = 4; }
message CpuUsage {
    int64 timestamp = 1; UInt64Value usage_core_nano_seconds = 2; UInt64Value usage_nano_cores = 3;
    PsiStats psi = 4;
}
message MemoryUsage {
    int64 timestamp = 1; UInt64Value working_set_bytes = 2; UInt64Value available_bytes = 3;
    UInt64Value usage_bytes = 4; UInt64Value rss_bytes = 5; UInt64Value page_faults = 6;
    UInt64Value major_page_faults = 7; PsiStats psi = 8;
}
message IoUsage { int64 timestamp = 1; PsiStats psi = 2; }
message SwapUsage { int64 timestamp = 1; UInt64Value swap_available_bytes = 2; UInt64Value swap_usage_bytes = 3; }
message ReopenContainerLogRequest { string container_id = 1; }
message ReopenContainerLogResponse {}
message CheckpointContainerRequest { string container_id = 1; string location = 2; int64 timeout = 3; }
message CheckpointContainerResponse {}
message GetEventsRequest {}
message ContainerEventResponse {
    string container_id = 1; enum ContainerEventType container_event_type = 2; int64 created_at = 3;
    PodSandboxStatus pod_sandbox_status = 4; repeated ContainerStatus containers_statuses = 5;
}
enum ContainerEventType { Created = 0; Started = 1; Stopped = 2; Deleted = 3; }
message ListMetricDescriptorsRequest {}
message ListMetricDescriptorsResponse { repeated MetricDescriptor descriptors = 1; }
message MetricDescriptor { string name = 1; string help = 2; repeated string label_keys = 3; }
message ListPodSandboxMetricsRequest {}
message ListPodSandboxMetricsResponse { repeated PodSandboxMetrics pod_metrics = 1; }
message StreamPodSandboxMetricsRequest {}
message StreamPodSandboxMetricsResponse { repeated PodSandboxMetrics pod_sandbox_metrics = 1; }
message PodSandboxMetrics {
    string pod_sandbox_id = 1; repeated Metric metrics = 2; repeated ContainerMetrics container_metrics = 3;
}
message ContainerMetrics { string container_id = 1; repeated Metric metrics = 2; }
message Metric {
    string name = 1; int64 timestamp = 2; enum MetricType metric_type = 3; repeated string label_values = 4;
    UInt64Value value = 5;
}
enum MetricType { Counter = 0; Gauge = 1; }
message RuntimeConfigRequest {}
message RuntimeConfigResponse { LinuxRuntimeConfiguration linux = 1; }
message LinuxRuntimeConfiguration { enum CgroupDriver cgroup_driver = 1; }
enum CgroupDriver { Systemd = 0; Cgroupfs = 1; }
message UpdatePodSandboxResourcesRequest {
    string pod_sandbox_id = 1; LinuxContainerResources overhead = 2; LinuxContainerResources resources = 3;
}
message UpdatePodSandboxResourcesResponse {}}

/// The words of `enum Signal`, by their numbers; 0 leaves the signal to the runtime.
pub const SIGNALS: [&str; 35] = [
    "",
    "SIGABRT",
    "SIGALRM",
    "SIGBUS",
    "SIGCHLD",
    "SIGCLD",
    "SIGCONT",
    "SIGFPE",
    "SIGHUP",
    "SIGILL",
    "SIGINT",
    "SIGIO",
    "SIGIOT",
    "SIGKILL",
    "SIGPIPE",
    "SIGPOLL",
    "SIGPROF",
    "SIGPWR",
    "SIGQUIT",
    "SIGSEGV",
    "SIGSTKFLT",
    "SIGSTOP",
    "SIGSYS",
    "SIGTERM",
    "SIGTRAP",
    "SIGTSTP",
    "SIGTTIN",
    "SIGTTOU",
    "SIGURG",
    "SIGUSR1",
    "SIGUSR2",
    "SIGVTALRM",
    "SIGWINCH",
    "SIGXCPU",
    "SIGXFSZ",
];
/// `SIGRTMIN` is number 35 there, then come `SIGRTMIN+1` to `SIGRTMIN+15`, `SIGRTMAX-14` to `SIGRTMAX`: signals 34 to 64 in order.
const FIRST_REAL_TIME: i32 = 35;
/// The first real-time signal that programs see.
const SIGRTMIN: i32 = 34;

/// A signal's number in words that [`signal_of`] reads; `None` if there is no such signal.
pub fn signal_word(number: i32) -> Option<String> {
    match usize::try_from(number).ok().and_then(|at| SIGNALS.get(at)) {
        Some(word) => Some((*word).to_owned()),
        None if number <= FIRST_REAL_TIME + 30 && number > 0 => Some((number - FIRST_REAL_TIME + SIGRTMIN).to_string()),
        None => None,
    }
}

/// The number of a signal in words, such as `SIGTERM`, `SIGRTMIN+3` or `37`; 0 for none of them.
pub fn signal_of(word: &str) -> i32 {
    let upper = word.to_uppercase();
    let full = if upper.starts_with("SIG") || upper.is_empty() { upper } else { format!("SIG{upper}") };
    if let Some(at) = SIGNALS.iter().position(|name| *name == full) {
        return i32::try_from(at).unwrap_or(0);
    }
    match crate::native::signal_number(word) {
        Some(number) if number >= SIGRTMIN => number - SIGRTMIN + FIRST_REAL_TIME,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_numbered_as_the_interface_does() {
        assert_eq!(SIGNALS[23], "SIGTERM");
        assert_eq!(SIGNALS[34], "SIGXFSZ");
        assert_eq!((signal_word(23).as_deref(), signal_word(35).as_deref()), (Some("SIGTERM"), Some("34")));
        assert_eq!((signal_word(65).as_deref(), signal_word(66), signal_word(-1)), (Some("64"), None, None));
        for number in 0..=65 {
            assert_eq!(signal_of(&signal_word(number).expect("a signal")), number);
        }
        assert_eq!((signal_of("term"), signal_of("SIGRTMIN+3"), signal_of("nonsense")), (23, 38, 0));
    }
}
