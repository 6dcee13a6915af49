//! Makes the two services of a kubelet's plugin that the driver in `src/bin/dra_driver` offers,
//! from their names; their messages are those of its `api.rs`.

use tonic_build::manual::{Builder, Method, Service};

fn service(name: &str, package: &str, methods: [[&str; 4]; 2]) -> Service {
    let path = |message: &str| format!("crate::api::{message}");
    let service = Service::builder().name(name).package(package);
    let methods = methods.map(|[name, route, input, output]| {
        Method::builder()
            .name(name)
            .route_name(route)
            .input_type(path(input))
            .output_type(path(output))
            .codec_path("tonic_prost::ProstCodec")
            .build()
    });
    let service = methods
        .into_iter()
        .fold(service, |all, one| all.method(one));
    service.build()
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let registration = [
        ["get_info", "GetInfo", "InfoRequest", "PluginInfo"],
        [
            "notify_registration_status",
            "NotifyRegistrationStatus",
            "RegistrationStatus",
            "RegistrationStatusResponse",
        ],
    ];
    let plugin = [
        [
            "node_prepare_resources",
            "NodePrepareResources",
            "NodePrepareResourcesRequest",
            "NodePrepareResourcesResponse",
        ],
        [
            "node_unprepare_resources",
            "NodeUnprepareResources",
            "NodeUnprepareResourcesRequest",
            "NodeUnprepareResourcesResponse",
        ],
    ];
    Builder::new().build_client(false).compile(&[
        service("Registration", "pluginregistration", registration),
        service("DRAPlugin", "k8s.io.kubelet.pkg.apis.dra.v1", plugin),
    ]);
}
