//! The messages of the Container Storage Interface v1 (`csi.v1`) that a node sends and gets; names and numbers as in the
//! specification, version 1.12.

use crate::grpc::proto;

proto! {
message VolumeCapability { BlockVolume block = 1; MountVolume mount = 2; AccessMode access_mode = 3; }
message BlockVolume {}
message MountVolume { string fs_type = 1; repeated string mount_flags = 2; string volume_mount_group = 3; }
message AccessMode { enum Mode mode = 1; }
enum Mode {
    Unknown = 0; SingleNodeWriter = 1; SingleNodeReaderOnly = 2; MultiNodeReaderOnly = 3; MultiNodeSingleWriter = 4;
    MultiNodeMultiWriter = 5; SingleNodeSingleWriter = 6; SingleNodeMultiWriter = 7;
}
message CapacityRange { int64 required_bytes = 1; int64 limit_bytes = 2; }
message Topology { map<string, string> segments = 1; }
message NodeStageVolumeRequest {
    string volume_id = 1; map<string, string> publish_context = 2; string staging_target_path = 3;
    VolumeCapability volume_capability = 4; map<string, string> secrets = 5; map<string, string> volume_context = 6;
}
message NodeStageVolumeResponse {}
message NodeUnstageVolumeRequest { string volume_id = 1; string staging_target_path = 2; }
message NodeUnstageVolumeResponse {}
message NodePublishVolumeRequest {
    string volume_id = 1; map<string, string> publish_context = 2; string staging_target_path = 3;
    string target_path = 4; VolumeCapability volume_capability = 5; bool readonly = 6;
    map<string, string> secrets = 7; map<string, string> volume_context = 8;
}
message NodePublishVolumeResponse {}
message NodeUnpublishVolumeRequest { string volume_id = 1; string target_path = 2; }
message NodeUnpublishVolumeResponse {}
message NodeGetVolumeStatsRequest { string volume_id = 1; string volume_path = 2; string staging_target_path = 3; }
message NodeGetVolumeStatsResponse { repeated VolumeUsage usage = 1; VolumeCondition volume_condition = 2; }
message VolumeUsage { int64 available = 1; int64 total = 2; int64 used = 3; enum Unit unit = 4; }
enum Unit { Unknown = 0; Bytes = 1; Inodes = 2; }
message VolumeCondition { bool abnormal = 1; string message = 2; }
message NodeExpandVolumeRequest {
    string volume_id = 1; string volume_path = 2; CapacityRange capacity_range = 3; string staging_target_path = 4;
    VolumeCapability volume_capability = 5; map<string, string> secrets = 6;
}
message NodeExpandVolumeResponse { int64 capacity_bytes = 1; }
message NodeGetCapabilitiesRequest {}
message NodeGetCapabilitiesResponse { repeated NodeServiceCapability capabilities = 1; }
message NodeServiceCapability { Rpc rpc = 1; }
message Rpc { enum Capability r#type = 1; }
enum Capability {
    Unknown = 0; StageUnstageVolume = 1; GetVolumeStats = 2; ExpandVolume = 3; VolumeCondition = 4;
    SingleNodeMultiWriter = 5; VolumeMountGroup = 6;
}
message NodeGetInfoRequest {}
message NodeGetInfoResponse { string node_id = 1; int64 max_volumes_per_node = 2; Topology accessible_topology = 3; }
}
