//! Messages between the kubelet and a driver of Dynamic Resource Allocation: the registration of
//! plugins (k8s.io/kubelet/pkg/apis/pluginregistration/v1/api.proto) and the preparation of claims
//! (k8s.io/kubelet/pkg/apis/dra/v1/api.proto); the fields that are used here.

use std::collections::HashMap;

/// What kind of plugin a driver is.
pub(crate) const TYPE: &str = "DRAPlugin";

/// The service that the kubelet finds at a driver's socket.
pub(crate) const SERVICE: &str = "v1.DRAPlugin";

/// The kubelet asks who is there.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct InfoRequest {}

/// A plugin introduces itself.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct PluginInfo {
    #[prost(string, tag = "1")]
    pub(crate) kind: String,
    #[prost(string, tag = "2")]
    pub(crate) name: String,
    /// Path of the socket that it serves.
    #[prost(string, tag = "3")]
    pub(crate) endpoint: String,
    #[prost(string, repeated, tag = "4")]
    pub(crate) supported_versions: Vec<String>,
}

/// What came of it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct RegistrationStatus {
    #[prost(bool, tag = "1")]
    pub(crate) plugin_registered: bool,
    #[prost(string, tag = "2")]
    pub(crate) error: String,
}

/// Nothing to say.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct RegistrationStatusResponse {}

/// A ResourceClaim, by its names.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Claim {
    #[prost(string, tag = "1")]
    pub(crate) namespace: String,
    #[prost(string, tag = "2")]
    pub(crate) uid: String,
    #[prost(string, tag = "3")]
    pub(crate) name: String,
}

/// Claims of a pod that is about to start.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct NodePrepareResourcesRequest {
    #[prost(message, repeated, tag = "1")]
    pub(crate) claims: Vec<Claim>,
}

/// What came of each, by the claim's UID.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct NodePrepareResourcesResponse {
    #[prost(map = "string, message", tag = "1")]
    pub(crate) claims: HashMap<String, NodePrepareResourceResponse>,
}

/// Devices of one claim, or why there are none.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct NodePrepareResourceResponse {
    #[prost(message, repeated, tag = "1")]
    pub(crate) devices: Vec<Device>,
    #[prost(string, tag = "2")]
    pub(crate) error: String,
}

/// One device of a claim.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Device {
    #[prost(string, repeated, tag = "1")]
    pub(crate) request_names: Vec<String>,
    #[prost(string, tag = "2")]
    pub(crate) pool_name: String,
    #[prost(string, tag = "3")]
    pub(crate) device_name: String,
    /// What the container runtime is asked for.
    #[prost(string, repeated, tag = "4")]
    pub(crate) cdi_device_ids: Vec<String>,
}

/// Claims that no pod of the node uses any more.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct NodeUnprepareResourcesRequest {
    #[prost(message, repeated, tag = "1")]
    pub(crate) claims: Vec<Claim>,
}

/// What came of each, by the claim's UID.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct NodeUnprepareResourcesResponse {
    #[prost(map = "string, message", tag = "1")]
    pub(crate) claims: HashMap<String, NodeUnprepareResourceResponse>,
}

/// Empty, or why a claim stays prepared.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct NodeUnprepareResourceResponse {
    #[prost(string, tag = "1")]
    pub(crate) error: String,
}
