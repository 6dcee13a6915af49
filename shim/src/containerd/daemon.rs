//! The daemon of one sandbox: serves containerd on the socket that `start` made, and ends when the
//! pod has.
//!
//! The pod boots as soon as the daemon lives, while containerd is still reading the answer of
//! `start`; calls that need it wait for it. A pod that could not boot answers every call with the
//! reason, and the daemon ends on `Shutdown` or when containerd runs `delete`.

use std::{
    env, fs, io,
    os::unix::net::UnixListener as StdListener,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::stream;
use pericarp_runtime_config::{Config, RuntimeOptions};
use tokio::{
    net::UnixListener,
    signal::unix::{SignalKind, signal},
    sync::{Notify, watch},
    time::timeout,
};
use tracing::{debug, error, info};
use ttrpc::asynchronous::{Server, transport::Listener};

use crate::{
    containerd::{
        args::Args,
        bootstrap::{LISTENER_DESCRIPTOR, TTRPC_ADDRESS},
        events, sandbox_service, task_service,
    },
    errors::CallError,
    pod::{Pod, Request, bundle::Bundle, events::Publisher},
};

/// How long events that containerd has not taken yet may hold up the end of the daemon.
const LAST_EVENTS_MS: u64 = 5_000;

/// How long answers that are under way may hold up the end of the daemon.
const LAST_ANSWERS_MS: u64 = 200;

/// Why the daemon could not serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    #[error("listening socket (descriptor {LISTENER_DESCRIPTOR}): {0}")]
    Listener(io::Error),
    #[error("{0}")]
    Setup(io::Error),
    #[error("serving: {0}")]
    Serve(#[from] ttrpc::Error),
}

/// A boot's result as many may wait for it; errors are told more than once, so they are words.
type Booted = Option<Result<Arc<Pod>, CallError>>;

/// The state of the daemon.
#[derive(Debug)]
pub(crate) struct Daemon {
    /// What the handler's options chose.
    pub(crate) options: RuntimeOptions,
    /// containerd's namespace.
    pub(crate) namespace: String,
    publisher: Publisher,
    booted: watch::Sender<Booted>,
    booting: AtomicBool,
    boot_cancelled: Notify,
    wanted_down: AtomicBool,
    ending: Notify,
}

impl Daemon {
    /// A daemon whose pod has not begun to boot.
    pub(crate) fn new(args: &Args, publisher: Publisher) -> Self {
        Self {
            options: RuntimeOptions {
                config_path: args.config.clone(),
                flavour: args.flavour.clone(),
            },
            namespace: args.namespace.clone(),
            publisher,
            booted: watch::Sender::new(None),
            booting: AtomicBool::new(false),
            boot_cancelled: Notify::new(),
            wanted_down: AtomicBool::new(false),
            ending: Notify::new(),
        }
    }

    /// A daemon whose pod boots and never has booted.
    #[cfg(test)]
    pub(crate) fn booting(args: &Args, publisher: Publisher) -> Self {
        let daemon = Self::new(args, publisher);
        daemon.booting.store(true, Ordering::SeqCst);
        daemon
    }

    /// Begins to boot the pod; a second call is refused.
    pub(crate) fn boot(self: &Arc<Self>, request: Request) -> Result<(), CallError> {
        if self.booting.swap(true, Ordering::SeqCst) {
            return Err(CallError::AlreadyExists(format!("sandbox {}", request.id)));
        }
        let daemon = Arc::clone(self);
        tokio::spawn(async move {
            let cancelled = daemon.boot_cancelled.notified();
            let booted = Pod::boot(request, daemon.publisher.clone(), cancelled).await;
            if let Err(error) = &booted {
                error!(%error, "the pod cannot boot");
            }
            daemon.booted.send_replace(Some(booted));
        });
        Ok(())
    }

    /// The pod, as soon as it has booted.
    pub(crate) async fn pod(&self) -> Result<Arc<Pod>, CallError> {
        if !self.booting.load(Ordering::SeqCst) {
            return Err(CallError::WrongState(
                "the sandbox has not been created".to_owned(),
            ));
        }
        let mut booted = self.booted.subscribe();
        let known = booted.wait_for(Option::is_some).await;
        match known.ok().and_then(|known| known.clone()) {
            Some(Ok(pod)) => Ok(pod),
            Some(Err(error)) => Err(error),
            None => Err(CallError::Gone("the daemon is ending".to_owned())),
        }
    }

    /// The pod, if it has booted.
    pub(crate) fn pod_now(&self) -> Option<Arc<Pod>> {
        match &*self.booted.borrow() {
            Some(Ok(pod)) => Some(Arc::clone(pod)),
            _ => None,
        }
    }

    /// The pod of a container that exists already. A pod that has not booted has none, and neither
    /// has one that could not: containerd is told so at once, and goes on to `Shutdown`.
    pub(crate) fn pod_of(&self, id: &str) -> Result<Arc<Pod>, CallError> {
        let unknown = |reason: &str| CallError::NotFound(format!("container {id} ({reason})"));
        match &*self.booted.borrow() {
            Some(Ok(pod)) => Ok(Arc::clone(pod)),
            Some(Err(error)) => Err(unknown(&error.to_string())),
            None => Err(unknown("its pod has not booted")),
        }
    }

    /// `Shutdown`: ends pod and daemon when no container is left, now or later. containerd calls it
    /// after each container, so a pod that goes on hears it too; but it may hang up while the last
    /// container is still being deleted, and does not call again.
    pub(crate) async fn shut_down_if_empty(&self) {
        self.wanted_down.store(true, Ordering::SeqCst);
        self.shut_down_if_wanted().await;
    }

    /// A container is gone: was it the last, of a pod that shall end?
    pub(crate) async fn shut_down_if_wanted(&self) {
        if !self.wanted_down.load(Ordering::SeqCst) {
            return;
        }
        let pod = self.booted.borrow().clone();
        match pod {
            // The sandbox service has a call of its own for this.
            Some(Ok(pod)) if pod.by_sandbox_service => {}
            Some(Ok(pod)) if !pod.containers().is_empty() => {
                debug!(
                    containers = pod.containers().len(),
                    "not yet: containers are left"
                );
            }
            _ => self.shut_down().await,
        }
    }

    /// The pod that shall end: one that still boots is given up, and none is left of it.
    pub(crate) async fn pod_to_end(&self) -> Option<Arc<Pod>> {
        if !self.booting.load(Ordering::SeqCst) {
            return None;
        }
        self.boot_cancelled.notify_one();
        self.pod().await.ok()
    }

    /// Ends pod and daemon.
    pub(crate) async fn shut_down(&self) {
        if let Some(pod) = self.pod_to_end().await {
            pod.tear_down().await;
        }
        debug!("the pod is gone, the daemon ends");
        self.ending.notify_one();
    }
}

/// Runs the daemon in the current directory, which is the sandbox's bundle.
pub(crate) fn run(args: &Args) -> Result<(), DaemonError> {
    // What is wrong with a configuration, the first call that boots the pod says.
    let configured = Config::load(args.config.as_deref(), true).unwrap_or_default();
    crate::containerd::log::to_containerd(configured.settings.log.level, args.debug);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(DaemonError::Setup)?;
    let served = runtime.block_on(serve(args));
    // A thread that hangs on a file system of the host must not keep the daemon.
    runtime.shutdown_background();
    served
}

async fn serve(args: &Args) -> Result<(), DaemonError> {
    let listener = inherited_listener().map_err(DaemonError::Listener)?;
    let socket = listener
        .local_addr()
        .ok()
        .and_then(|address| address.as_pathname().map(PathBuf::from));
    let address = env::var(TTRPC_ADDRESS).unwrap_or_default();
    let (publisher, queue) = Publisher::new(args.namespace.clone());
    tokio::spawn(events::send_all(address, queue));
    let daemon = Arc::new(Daemon::new(args, publisher));
    let bundle_path = env::current_dir().map_err(DaemonError::Setup)?;
    if let Ok(bundle) = Bundle::read(&bundle_path) {
        boot_from(&daemon, args, bundle);
    }
    let mut server = Server::new()
        .add_listener(accepting(listener))
        .register_service(task_service::services(&daemon))
        .register_service(sandbox_service::services(&daemon));
    server.start().await?;
    let mut terminated = signal(SignalKind::terminate()).map_err(DaemonError::Setup)?;
    tokio::select! {
        () = daemon.ending.notified() => {}
        // containerd's own shims ignore SIGTERM as well: a service manager stopping containerd must
        // not end pods.
        () = async { while terminated.recv().await.is_some() { info!("SIGTERM is ignored: pods \
            outlive containerd") } } => {}
    }
    if let Some(socket) = socket {
        let _ = fs::remove_file(socket);
    }
    // The answer to the call that ended the pod is still on its way; calls that wait for an end
    // that has passed are not worth the wait.
    let _ = timeout(Duration::from_millis(LAST_ANSWERS_MS), server.disconnect()).await;
    let _ = timeout(
        Duration::from_millis(LAST_EVENTS_MS),
        daemon.publisher.flush(),
    )
    .await;
    Ok(())
}

fn boot_from(daemon: &Arc<Daemon>, args: &Args, bundle: Bundle) {
    let request = Request {
        id: args.id.clone(),
        network_namespace: bundle.network_namespace(),
        annotations: bundle.annotations(),
        bundle: Some(bundle),
        files: None,
        options: daemon.options.clone(),
        namespace: args.namespace.clone(),
    };
    if let Err(error) = daemon.boot(request) {
        error!(%error, "the pod cannot boot");
    }
}

fn inherited_listener() -> io::Result<StdListener> {
    let listener = pericarp_sys::process::take_listener(LISTENER_DESCRIPTOR)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn accepting(listener: StdListener) -> Listener {
    let listener = UnixListener::from_std(listener);
    Listener::new(stream::unfold(listener, |listener| async move {
        let accepted = match &listener {
            Ok(listener) => listener.accept().await.map(|(stream, _)| stream),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        Some((accepted, listener))
    }))
}
