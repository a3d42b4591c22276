//! The messages of drivers of claimed devices (`k8s.io.kubelet.pkg.apis.dra.v1`), Kubernetes 1.36.

use serde::{Deserialize, Serialize};

use crate::grpc::proto;

proto! {
message NodePrepareResourcesRequest { repeated Claim claims = 1; }
message NodePrepareResourcesResponse { map<string, NodePrepareResourceResponse> claims = 1; }
message NodePrepareResourceResponse { repeated Device devices = 1; string error = 2; }
message NodeUnprepareResourcesRequest { repeated Claim claims = 1; }
message NodeUnprepareResourcesResponse { map<string, NodeUnprepareResourceResponse> claims = 1; }
message NodeUnprepareResourceResponse { string error = 1; }
message Claim { string namespace = 1; string uid = 2; string name = 3; }
}

/// A device that is prepared.
#[derive(Clone, PartialEq, Serialize, Deserialize, ::prost::Message)]
pub struct Device {
    /// Requests of the claim that it is for; none: all.
    #[prost(string, repeated, tag = "1")]
    pub request_names: Vec<String>,
    /// Its pool.
    #[prost(string, tag = "2")]
    pub pool_name: String,
    /// Its name in the pool.
    #[prost(string, tag = "3")]
    pub device_name: String,
    /// What a container that uses it needs, by CDI names.
    #[prost(string, repeated, tag = "4")]
    pub cdi_device_ids: Vec<String>,
}
