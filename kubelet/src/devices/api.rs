//! The messages of device plugins (`v1beta1`); names and numbers as in `k8s.io/kubelet`, Kubernetes 1.36.

use crate::grpc::proto;

proto! {
message Empty {}
message DevicePluginOptions { bool pre_start_required = 1; bool get_preferred_allocation_available = 2; }
message RegisterRequest {
    string version = 1; string endpoint = 2; string resource_name = 3; DevicePluginOptions options = 4;
}
message ListAndWatchResponse { repeated Device devices = 1; }
message Device { string id = 1; string health = 2; TopologyInfo topology = 3; }
message TopologyInfo { repeated NumaNode nodes = 1; }
message NumaNode { int64 id = 1; }
message PreferredAllocationRequest { repeated ContainerPreferredAllocationRequest container_requests = 1; }
message ContainerPreferredAllocationRequest {
    repeated string available_device_ids = 1; repeated string must_include_device_ids = 2; int32 allocation_size = 3;
}
message PreferredAllocationResponse { repeated ContainerPreferredAllocationResponse container_responses = 1; }
message ContainerPreferredAllocationResponse { repeated string device_ids = 1; }
message AllocateRequest { repeated ContainerAllocateRequest container_requests = 1; }
message ContainerAllocateRequest { repeated string devices_ids = 1; }
message AllocateResponse { repeated ContainerAllocateResponse container_responses = 1; }
message ContainerAllocateResponse {
    map<string, string> envs = 1; repeated Mount mounts = 2; repeated DeviceSpec devices = 3;
    map<string, string> annotations = 4; repeated CdiDevice cdi_devices = 5;
}
message Mount { string container_path = 1; string host_path = 2; bool read_only = 3; }
message DeviceSpec { string container_path = 1; string host_path = 2; string permissions = 3; }
message CdiDevice { string name = 1; }
message PreStartContainerRequest { repeated string devices_ids = 1; }
message PreStartContainerResponse {}
}
