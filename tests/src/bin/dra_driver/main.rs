//! `dra-driver`: gives functions of the node to pods by Dynamic Resource Allocation, as small as a
//! driver can be, for `tests/tests/node_device_plugin.rs`.
//!
//! ```text
//!  kubelet                              dra-driver
//!   sees <driver>-reg.sock  --GetInfo-->   who it is, and its own socket
//!   NotifyRegistrationStatus ---------->   publishes a ResourceSlice: what vfio-pci has
//!   NodePrepareResources -------------->   reads the claim's allocation, describes its functions'
//!                           <--names---    groups as CDI devices
//!   NodeUnprepareResources ------------>   removes the description
//! ```
//!
//! containerd applies the description, and the shim finds `/dev/vfio/<group>` among a container's
//! devices. With the API server it speaks through `kubectl`, which is in the node.

mod api;
mod functions;
mod service {
    #![expect(
        unreachable_pub,
        clippy::allow_attributes,
        reason = "tonic makes it from build.rs"
    )]
    include!(concat!(
        env!("OUT_DIR"),
        "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin.rs"
    ));
    include!(concat!(
        env!("OUT_DIR"),
        "/pluginregistration.Registration.rs"
    ));
}

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use futures::Stream;
use pericarp_tests::pods::claims::{self, CDI_KIND, DRIVER};
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::{Request, Response, Status};

use self::api::{
    Claim, Device, InfoRequest, NodePrepareResourceResponse, NodePrepareResourcesRequest,
    NodePrepareResourcesResponse, NodeUnprepareResourceResponse, NodeUnprepareResourcesRequest,
    NodeUnprepareResourcesResponse, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
};
use self::functions::Function;
use self::service::d_r_a_plugin_server::{DRAPlugin, DRAPluginServer};
use self::service::registration_server::{Registration, RegistrationServer};

/// Answers of the kubelet about a registration that wait to be read.
const STATUSES_MAX: usize = 4;

/// Serves claims of functions until it fails or is ended.
#[derive(Debug, Parser)]
#[command(name = "dra-driver")]
struct Cli {
    /// Name of this node, and of the pool of its devices.
    #[arg(long)]
    node: String,
    /// The kubelet's folder.
    #[arg(long, default_value = "/var/lib/kubelet")]
    folder: PathBuf,
}

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("event loop")?;
    runtime.block_on(live(Cli::parse()))
}

async fn live(cli: Cli) -> Result<()> {
    let server = tonic::transport::Server::builder;
    let mut servers = JoinSet::new();
    let endpoint = cli.folder.join("plugins").join(DRIVER).join("dra.sock");
    let driver = DRAPluginServer::new(Driver {
        pool: cli.node.clone(),
    });
    servers.spawn(server().serve_with_incoming(driver, listen(&endpoint)?));
    let (heard, mut statuses) = mpsc::channel(STATUSES_MAX);
    let introduction = RegistrationServer::new(Introduction { endpoint, heard });
    // The kubelet comes as soon as it sees this one.
    let path = cli.folder.join("plugins_registry");
    let path = path.join(format!("{DRIVER}-reg.sock"));
    servers.spawn(server().serve_with_incoming(introduction, listen(&path)?));
    loop {
        tokio::select! {
            Some(status) = statuses.recv() => {
                let RegistrationStatus { plugin_registered, error } = status;
                ensure!(plugin_registered, "the kubelet refuses the driver: {error}");
                publish(&cli.node, &functions::bound()?).await?;
                tell()?;
            }
            Some(ended) = servers.join_next() => ended.context("server")?.context("server")?,
        }
    }
}

/// Connections to a socket that is made anew.
fn listen(path: &Path) -> Result<impl Stream<Item = std::io::Result<UnixStream>> + use<>> {
    let of_path = || path.display().to_string();
    fs::create_dir_all(path.parent().unwrap_or(path)).with_context(of_path)?;
    remove(path)?;
    let listener = UnixListener::bind(path).with_context(of_path)?;
    Ok(futures::stream::unfold(listener, |listener| async move {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        Some((accepted, listener))
    }))
}

/// Removes a file that may not be there.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).context(path.display().to_string())
        }
        _ => Ok(()),
    }
}

fn say(text: impl std::fmt::Display) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

/// Says that the driver is registered, to whoever started it (sd_notify(3)).
fn tell() -> Result<()> {
    say("registered")?;
    if let Some(path) = std::env::var_os("NOTIFY_SOCKET") {
        let socket = UnixDatagram::unbound().context("NOTIFY_SOCKET")?;
        socket.send_to(b"READY=1", path).context("NOTIFY_SOCKET")?;
    }
    Ok(())
}

/// Runs `kubectl`, which must succeed; gives what it printed.
async fn kubectl(arguments: &[&str], input: String) -> Result<String> {
    let mut command = std::process::Command::new("kubectl");
    command.args(arguments);
    let line = format!("kubectl {}", arguments.join(" "));
    let run = move || -> Result<String> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn()?;
        // A small text: the pipe holds it, whether it is read or not.
        let mut stdin = child.stdin.take().context("no standard input")?;
        stdin.write_all(input.as_bytes())?;
        drop(stdin);
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {said}", output.status);
        Ok(String::from_utf8(output.stdout)?)
    };
    tokio::task::spawn_blocking(run).await?.context(line)
}

/// Tells Kubernetes what this node has.
async fn publish(node: &str, functions: &[Function]) -> Result<()> {
    let devices: Vec<Value> = functions.iter().map(Function::describe).collect();
    let slice = json!({
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceSlice",
        "metadata": {"name": format!("{node}-{DRIVER}")},
        "spec": {
            "driver": DRIVER,
            "nodeName": node,
            "pool": {"name": node, "generation": 1, "resourceSliceCount": 1},
            "devices": devices,
        },
    });
    kubectl(&["apply", "-f", "-"], slice.to_string()).await?;
    say(format_args!("{} functions offered", functions.len()))
}

/// Who the driver is.
#[derive(Debug)]
struct Introduction {
    endpoint: PathBuf,
    heard: mpsc::Sender<RegistrationStatus>,
}

#[tonic::async_trait]
impl Registration for Introduction {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            kind: api::TYPE.to_owned(),
            name: DRIVER.to_owned(),
            endpoint: self.endpoint.display().to_string(),
            supported_versions: vec![api::SERVICE.to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let sent = self.heard.send(request.into_inner()).await;
        sent.map_err(|_| Status::unavailable("the driver ends"))?;
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

/// What gives functions to claims. All that it knows stands in the description's file, so that a
/// claim is known after a restart too.
#[derive(Debug)]
struct Driver {
    pool: String,
}

#[tonic::async_trait]
impl DRAPlugin for Driver {
    async fn node_prepare_resources(
        &self,
        request: Request<NodePrepareResourcesRequest>,
    ) -> Result<Response<NodePrepareResourcesResponse>, Status> {
        let mut response = NodePrepareResourcesResponse::default();
        for claim in request.into_inner().claims {
            let prepared = self.prepare(&claim).await;
            let prepared = prepared.unwrap_or_else(|error| NodePrepareResourceResponse {
                devices: Vec::new(),
                error: format!("{error:#}"),
            });
            response.claims.insert(claim.uid, prepared);
        }
        Ok(Response::new(response))
    }

    async fn node_unprepare_resources(
        &self,
        request: Request<NodeUnprepareResourcesRequest>,
    ) -> Result<Response<NodeUnprepareResourcesResponse>, Status> {
        let mut response = NodeUnprepareResourcesResponse::default();
        for claim in request.into_inner().claims {
            let removed = remove(&claims::cdi_file(&claim.uid))
                .and_then(|()| say(format_args!("unprepared {}", claim.name)));
            let error = removed.map_or_else(|error| format!("{error:#}"), |()| String::new());
            let unprepared = NodeUnprepareResourceResponse { error };
            response.claims.insert(claim.uid, unprepared);
        }
        Ok(Response::new(response))
    }
}

impl Driver {
    /// Describes the functions that a claim was allocated, and names them.
    async fn prepare(&self, claim: &Claim) -> Result<NodePrepareResourceResponse> {
        let (name, namespace) = (&claim.name, format!("--namespace={}", claim.namespace));
        let get = ["get", "resourceclaim", name, &namespace, "--output=json"];
        let object: Value = serde_json::from_str(&kubectl(&get, String::new()).await?)?;
        let uid = &claim.uid;
        ensure!(
            object["metadata"]["uid"] == **uid,
            "claim {name} is another one"
        );
        let results = &object["status"]["allocation"]["devices"]["results"];
        let results = results.as_array().context("no device is allocated")?;
        let known = functions::bound()?;
        let (mut described, mut devices) = (Vec::new(), Vec::new());
        for result in results.iter().filter(|result| result["driver"] == DRIVER) {
            let word = |key: &str| result[key].as_str().unwrap_or_default().to_owned();
            let device = word("device");
            let function = known.iter().find(|function| function.name() == device);
            let function = function.with_context(|| format!("vfio-pci has no {device}"))?;
            let cdi_name = format!("{uid}-{device}");
            described.push(function.edits(&cdi_name));
            devices.push(Device {
                request_names: vec![word("request")],
                pool_name: self.pool.clone(),
                device_name: device,
                cdi_device_ids: vec![format!("{CDI_KIND}={cdi_name}")],
            });
        }
        let spec = json!({"cdiVersion": "0.6.0", "kind": CDI_KIND, "devices": described});
        write(&claims::cdi_file(uid), &spec.to_string())?;
        say(format_args!("prepared {name}: {} functions", devices.len()))?;
        Ok(NodePrepareResourceResponse {
            devices,
            error: String::new(),
        })
    }
}

/// Writes a file that others watch for, whole.
fn write(path: &Path, text: &str) -> Result<()> {
    let of_path = || path.display().to_string();
    fs::create_dir_all(path.parent().unwrap_or(path)).with_context(of_path)?;
    let begun = path.with_extension("begun");
    fs::write(&begun, text).with_context(of_path)?;
    fs::rename(&begun, path).with_context(of_path)
}
