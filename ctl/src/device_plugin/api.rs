//! Messages of the kubelet's device-plugin API, version v1beta1
//! (k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1/api.proto): the fields that are used here.

use std::collections::HashMap;

/// The version of the API, as a plugin tells it.
pub(crate) const VERSION: &str = "v1beta1";

/// A device that may be given to a container.
pub(crate) const HEALTHY: &str = "Healthy";

/// A device that is there and cannot be given to anyone now.
pub(crate) const UNHEALTHY: &str = "Unhealthy";

/// Nothing to say.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct Empty {}

/// What a plugin wants to be asked for.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct DevicePluginOptions {
    #[prost(bool, tag = "1")]
    pub(crate) pre_start_required: bool,
    #[prost(bool, tag = "2")]
    pub(crate) get_preferred_allocation_available: bool,
}

/// A plugin introduces itself.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct RegisterRequest {
    #[prost(string, tag = "1")]
    pub(crate) version: String,
    /// Name of its socket in the folder of the kubelet's.
    #[prost(string, tag = "2")]
    pub(crate) endpoint: String,
    #[prost(string, tag = "3")]
    pub(crate) resource_name: String,
    #[prost(message, optional, tag = "4")]
    pub(crate) options: Option<DevicePluginOptions>,
}

/// Every device that there is now.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct ListAndWatchResponse {
    #[prost(message, repeated, tag = "1")]
    pub(crate) devices: Vec<Device>,
}

/// One device.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Device {
    #[prost(string, tag = "1")]
    pub(crate) id: String,
    #[prost(string, tag = "2")]
    pub(crate) health: String,
    #[prost(message, optional, tag = "3")]
    pub(crate) topology: Option<TopologyInfo>,
}

/// Where it is.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct TopologyInfo {
    #[prost(message, repeated, tag = "1")]
    pub(crate) nodes: Vec<NumaNode>,
}

/// A NUMA node of the host.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct NumaNode {
    #[prost(int64, tag = "1")]
    pub(crate) id: i64,
}

/// Nothing of it is read: the plugin offers no preference.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct PreferredAllocationRequest {}

/// No preference.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct PreferredAllocationResponse {}

/// Nothing of it is read: the plugin wants no such call.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct PreStartContainerRequest {}

/// The kubelet gives devices to containers of a pod.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct AllocateRequest {
    #[prost(message, repeated, tag = "1")]
    pub(crate) container_requests: Vec<ContainerAllocateRequest>,
}

/// Devices of one container.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct ContainerAllocateRequest {
    #[prost(string, repeated, tag = "1")]
    pub(crate) devices_ids: Vec<String>,
}

/// What the containers get.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct AllocateResponse {
    #[prost(message, repeated, tag = "1")]
    pub(crate) container_responses: Vec<ContainerAllocateResponse>,
}

/// What one container gets.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct ContainerAllocateResponse {
    #[prost(map = "string, string", tag = "1")]
    pub(crate) envs: HashMap<String, String>,
    #[prost(message, repeated, tag = "3")]
    pub(crate) devices: Vec<DeviceSpec>,
}

/// A node of the host.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct DeviceSpec {
    #[prost(string, tag = "1")]
    pub(crate) container_path: String,
    #[prost(string, tag = "2")]
    pub(crate) host_path: String,
    /// As cgroups write them: "rwm".
    #[prost(string, tag = "3")]
    pub(crate) permissions: String,
}
