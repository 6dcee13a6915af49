//! Makes the kubelet's two device-plugin services from their names; their messages are those of
//! `src/device_plugin/api.rs`.

use tonic_build::manual::{Builder, Method, Service};

fn method(name: &str, route: &str, input: &str, output: &str, streams: bool) -> Method {
    let path = |message: &str| format!("crate::device_plugin::api::{message}");
    let method = Method::builder()
        .name(name)
        .route_name(route)
        .input_type(path(input))
        .output_type(path(output))
        .codec_path("tonic_prost::ProstCodec");
    if streams {
        method.server_streaming().build()
    } else {
        method.build()
    }
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let registration = Service::builder().name("Registration").package("v1beta1");
    let registration = registration
        .method(method(
            "register",
            "Register",
            "RegisterRequest",
            "Empty",
            false,
        ))
        .build();
    let plugin = Service::builder().name("DevicePlugin").package("v1beta1");
    let plugin = [
        (
            "get_device_plugin_options",
            "GetDevicePluginOptions",
            "Empty",
            "DevicePluginOptions",
        ),
        (
            "list_and_watch",
            "ListAndWatch",
            "Empty",
            "ListAndWatchResponse",
        ),
        (
            "get_preferred_allocation",
            "GetPreferredAllocation",
            "PreferredAllocationRequest",
            "PreferredAllocationResponse",
        ),
        (
            "allocate",
            "Allocate",
            "AllocateRequest",
            "AllocateResponse",
        ),
        (
            "pre_start_container",
            "PreStartContainer",
            "PreStartContainerRequest",
            "Empty",
        ),
    ]
    .into_iter()
    .fold(plugin, |plugin, (name, route, input, output)| {
        plugin.method(method(name, route, input, output, route == "ListAndWatch"))
    })
    .build();
    Builder::new().compile(&[registration, plugin]);
}
