//! The connection, the sandbox, its network and its storages, against the real agent.

#![expect(clippy::unwrap_used, reason = "a test stops where it fails")]

mod common;

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use common::{Guest, deadline, refusal};
use pericarp_protocol::{
    GUEST_PROTOCOL_MAJOR,
    guest::{
        BindSource, ConfigureSandboxRequest, Directory, Empty, Interface, Neighbour, NodeLimits,
        Overlay, ResourceLimit, Route, Scratch, SetClockRequest, StatsRequest, Storage,
        UpdateNetworkRequest, storage::Source,
    },
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use ttrpc::Code;

fn storage(mount_point: &str, source: Source) -> Storage {
    Storage {
        mount_point: mount_point.to_owned(),
        source: Some(source),
        ..Default::default()
    }
}

#[tokio::test]
async fn the_hello_names_version_and_times() {
    let Some(guest) = Guest::start().await else {
        return;
    };
    assert_eq!(guest.hello.protocol_major, GUEST_PROTOCOL_MAJOR);
    assert!(guest.hello.ready_us >= guest.hello.started_us && guest.hello.started_us > 0);
    assert!(!guest.hello.kernel_release.is_empty());
}

#[tokio::test]
async fn a_sandbox_is_configured_once() {
    let Some(guest) = Guest::start().await else {
        return;
    };
    let bad = ConfigureSandboxRequest {
        sandbox_id: "a/b".to_owned(),
        ..Default::default()
    };
    let (code, text) = refusal(guest.client.configure_sandbox(deadline(), &bad).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.starts_with("sandbox_id"), "{text}");

    // A failure half-way leaves nothing behind, so the host may try again.
    let mut request = ConfigureSandboxRequest {
        sandbox_id: "sandbox".to_owned(),
        hostname: "pod".to_owned(),
        entropy: vec![7; 100],
        shm_size_bytes: 1 << 20,
        storages: vec![
            storage("/run/pericarp/a", Source::Scratch(Scratch::default())),
            storage("/etc/b", Source::Scratch(Scratch::default())),
        ],
        ..Default::default()
    };
    request
        .sysctls
        .insert("net.ipv4.ip_forward".to_owned(), "1".to_owned());
    let (code, text) = refusal(guest.client.configure_sandbox(deadline(), &request).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.starts_with("mount_point"), "{text}");
    request.storages.pop();
    guest
        .client
        .configure_sandbox(deadline(), &request)
        .await
        .unwrap();
    let (code, _) = refusal(guest.client.configure_sandbox(deadline(), &request).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);

    let root = format!("/proc/{}/root", guest.agent_pid());
    let mounts = std::fs::read_to_string(format!("{root}/proc/1/mountinfo")).unwrap();
    let shm = mounts
        .lines()
        .rfind(|line| line.contains(" /dev/shm "))
        .unwrap();
    assert!(
        shm.contains("size=1024k") && shm.contains("nosuid,nodev,noexec"),
        "{shm}"
    );
}

#[tokio::test]
async fn the_nodes_limits_are_those_of_processes() {
    let Some(guest) = Guest::start().await else {
        return;
    };
    let limit = |resource, soft, hard| ResourceLimit {
        resource,
        soft,
        hard,
        ..Default::default()
    };
    let mut request = ConfigureSandboxRequest {
        sandbox_id: "sandbox".to_owned(),
        node_limits: Some(NodeLimits {
            resources: vec![limit(7, 1024, 512)],
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let (code, text) = refusal(guest.client.configure_sandbox(deadline(), &request).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.starts_with("node_limits.resources"), "{text}");
    request.node_limits.mut_or_insert_default().resources =
        vec![limit(6, 5000, 6000), limit(7, 1024, 4096)];
    guest
        .client
        .configure_sandbox(deadline(), &request)
        .await
        .unwrap();
    let script = "grep 'processes\\|open files' /proc/self/limits | tr -s ' '";
    let spec = guest.spec(&["sh", "-c", script]);
    let (output, ..) = guest.run("c", &spec).await.unwrap();
    assert_eq!(
        output,
        "Max processes 5000 6000 processes \nMax open files 1024 4096 files \n"
    );
}

#[tokio::test]
async fn unknown_sysctls_are_refused() {
    let Some(guest) = Guest::start().await else {
        return;
    };
    for name in ["../../etc/passwd", "kernel.no_such_thing"] {
        let mut request = ConfigureSandboxRequest {
            sandbox_id: "sandbox".to_owned(),
            ..Default::default()
        };
        request.sysctls.insert(name.to_owned(), "1".to_owned());
        let (_, text) = refusal(guest.client.configure_sandbox(deadline(), &request).await);
        assert!(text.contains(name), "{text}");
    }
}

#[tokio::test]
async fn storages_nest_and_go_again() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let add = async |one: &Storage| guest.client.add_storage(deadline(), one).await;
    let disk = storage(
        "/run/pericarp/disk",
        Source::Scratch(Scratch {
            size_bytes: 8 << 20,
            mode: 0o755,
            ..Default::default()
        }),
    );
    add(&disk).await.unwrap();
    assert_eq!(refusal(add(&disk).await).0, Code::ALREADY_EXISTS);

    let root = format!("/proc/{}/root", guest.agent_pid());
    for layer in ["one", "two"] {
        let path = format!("{root}/run/pericarp/disk/{layer}");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(format!("{path}/file"), layer).unwrap();
    }
    // The root of the topmost layer is the root that the container sees.
    let top = format!("{root}/run/pericarp/disk/two");
    std::fs::set_permissions(top, std::fs::Permissions::from_mode(0o1751)).unwrap();
    let overlay = storage(
        "/run/pericarp/merged",
        Source::Overlay(Overlay {
            lower: vec![
                "/run/pericarp/disk/two".to_owned(),
                "/run/pericarp/disk/one".to_owned(),
            ],
            upper: "/run/pericarp/disk/upper".to_owned(),
            work: "/run/pericarp/disk/work".to_owned(),
            ..Default::default()
        }),
    );
    add(&overlay).await.unwrap();
    let merged = format!("{root}/run/pericarp/merged");
    let mode = std::fs::metadata(&merged).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o1751);
    let merged = format!("{merged}/file");
    assert_eq!(std::fs::read_to_string(&merged).unwrap(), "two");
    std::fs::write(&merged, "changed").unwrap();
    let upper = format!("{root}/run/pericarp/disk/upper/file");
    assert_eq!(std::fs::read_to_string(upper).unwrap(), "changed");

    let mut bind = storage(
        "/run/pericarp/bound",
        Source::Bind(BindSource {
            path: "/run/pericarp/disk/one/file".to_owned(),
            ..Default::default()
        }),
    );
    bind.options = vec!["ro".to_owned()];
    add(&bind).await.unwrap();
    let bound = format!("{root}/run/pericarp/bound");
    assert_eq!(std::fs::read_to_string(&bound).unwrap(), "one");
    assert!(std::fs::write(&bound, "x").is_err());

    let before = guest
        .client
        .diagnostics(deadline(), &Empty::new())
        .await
        .unwrap()
        .mounts;
    for one in [&bind, &overlay, &disk] {
        guest.client.remove_storage(deadline(), one).await.unwrap();
    }
    assert_eq!(
        refusal(guest.client.remove_storage(deadline(), &disk).await).0,
        Code::NOT_FOUND
    );
    let after = guest
        .client
        .diagnostics(deadline(), &Empty::new())
        .await
        .unwrap()
        .mounts;
    assert_eq!(after + 3, before);
    assert!(!std::fs::exists(format!("{root}/run/pericarp/merged")).unwrap());
}

#[tokio::test]
async fn a_volume_in_memory_is_as_asked_and_has_places_within() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let add = async |one: &Storage| guest.client.add_storage(deadline(), one).await;
    let scratch = Scratch {
        size_bytes: 4 << 20,
        ..Default::default()
    };
    let mut volume = storage("/run/pericarp/memory/0", Source::Scratch(scratch));
    let options = "nosuid,mode=2770,uid=5,gid=6,nr_inodes=100";
    volume.options = vec![options.to_owned()];
    add(&volume).await.unwrap();
    let root = format!("/proc/{}/root", guest.agent_pid());
    let path = |name: &str| format!("{root}/run/pericarp/{name}");
    let owned = |name: &str| {
        let found = std::fs::metadata(path(name)).unwrap();
        (found.mode() & 0o7777, found.uid(), found.gid())
    };
    assert_eq!(owned("memory/0"), (0o2770, 5, 6));
    let mounts = std::fs::read_to_string(format!("{root}/proc/1/mountinfo")).unwrap();
    let line = mounts.lines().rfind(|line| line.contains("/memory/0 "));
    let words = ["nosuid", "size=4096k", "nr_inodes=100"];
    assert!(words.iter().all(|word| line.unwrap().contains(word)));

    let part = |at: &str, names: &str| {
        let name = |name: &str| Directory {
            name: name.to_owned(),
            mode: 0o1755,
            owner_id: 7,
            group_id: 8,
            ..Default::default()
        };
        let source = Source::Bind(BindSource {
            path: volume.mount_point.clone(),
            beneath: names.split('/').map(name).collect(),
            ..Default::default()
        });
        storage(&format!("/run/pericarp/{at}"), source)
    };
    add(&part("new", "a/b")).await.unwrap();
    assert_eq!(owned("new"), (0o1755, 7, 8));
    std::fs::write(path("memory/0/file"), "x").unwrap();
    // What a container made is what is mounted, a file too.
    add(&part("file", "file")).await.unwrap();
    assert_eq!(std::fs::read_to_string(path("file")).unwrap(), "x");
    std::os::unix::fs::symlink("/run/pericarp/file", path("memory/0/out")).unwrap();
    for (names, reason) in [("out", "out of the volume"), ("..", "not a name")] {
        let (_, text) = refusal(add(&part("bad", names)).await);
        assert!(text.contains(reason) && text.contains(names), "{text}");
    }
}

#[tokio::test]
async fn storages_stay_beneath_their_folder() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let root = format!("/proc/{}/root", guest.agent_pid());
    std::os::unix::fs::symlink("/etc", format!("{root}/run/pericarp/link")).unwrap();
    for (bad, field) in [
        (
            storage("/run/pericarp/link/x", Source::Scratch(Scratch::default())),
            "mount_point",
        ),
        (
            storage("/run/pericarp/../x", Source::Scratch(Scratch::default())),
            "mount_point",
        ),
        (
            storage(
                "/run/pericarp/x",
                Source::Bind(BindSource {
                    path: "/run/pericarp/link".to_owned(),
                    ..Default::default()
                }),
            ),
            "bind.path",
        ),
    ] {
        let (code, text) = refusal(guest.client.add_storage(deadline(), &bad).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
        assert!(text.starts_with(field), "{text}");
    }
    let mut bad = storage("/run/pericarp/x", Source::Scratch(Scratch::default()));
    bad.options = vec!["no_such_option".to_owned()];
    let (code, text) = refusal(guest.client.add_storage(deadline(), &bad).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("no_such_option"), "{text}");
}

#[tokio::test]
async fn interfaces_are_found_by_address_renamed_and_routed() {
    let Some(guest) = Guest::start().await else {
        return;
    };
    let pid = guest.agent_pid().to_string();
    let in_guest = |arguments: &str| {
        let output = std::process::Command::new("nsenter")
            .args(["-t", &pid, "-n", "ip"])
            .args(arguments.split(' '))
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    in_guest("link add veth0 address 02:00:00:00:00:01 type veth peer name far");
    in_guest("link set far up");
    let interface = Interface {
        name: "eth0".to_owned(),
        mac_address: "02:00:00:00:00:01".to_owned(),
        mtu: 1400,
        addresses: vec!["10.88.0.5/16".to_owned(), "fd00::5/64".to_owned()],
        ..Default::default()
    };
    let route = |destination: &str, gateway: &str, flags: u32| Route {
        destination: destination.to_owned(),
        gateway: gateway.to_owned(),
        device: "eth0".to_owned(),
        flags,
        ..Default::default()
    };
    let request = ConfigureSandboxRequest {
        sandbox_id: "sandbox".to_owned(),
        interfaces: vec![interface.clone()],
        routes: vec![
            route("0.0.0.0/0", "169.254.1.1", 4),
            Route {
                scope: 253,
                metric: 7,
                mtu: 1300,
                ..route("192.0.2.0/24", "", 0)
            },
            route("::/0", "fd00::1", 0),
        ],
        ..Default::default()
    };
    guest
        .client
        .configure_sandbox(deadline(), &request)
        .await
        .unwrap();
    let addresses = in_guest("address show dev eth0");
    for part in ["mtu 1400", "10.88.0.5/16 brd 10.88.255.255", "fd00::5/64"] {
        assert!(addresses.contains(part), "{part}: {addresses}");
    }
    // The link-local address, which the kernel chose, may still be under way.
    let chosen = addresses
        .lines()
        .find(|line| line.contains("fd00::5/64"))
        .unwrap();
    assert!(!chosen.contains("tentative"), "{chosen}");
    let routes = in_guest("route show");
    for part in [
        "default via 169.254.1.1 dev eth0 proto static onlink",
        "192.0.2.0/24 dev eth0",
    ] {
        assert!(routes.contains(part), "{part}: {routes}");
    }
    assert!(routes.contains("scope link metric 7 mtu 1300"), "{routes}");
    assert!(in_guest("-6 route show").contains("default via fd00::1"));
    assert!(in_guest("link show lo").contains("LOOPBACK,UP"));

    // Again, and a second time: nothing is in the way.
    let update = UpdateNetworkRequest {
        interfaces: vec![interface],
        routes: request.routes,
        ..Default::default()
    };
    guest
        .client
        .update_network(deadline(), &update)
        .await
        .unwrap();
    taken_away(&guest, &update, in_guest).await;
    let bad = UpdateNetworkRequest {
        interfaces: vec![Interface {
            name: "eth1".to_owned(),
            mac_address: "02:00:00:00:00:99".to_owned(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let (code, text) = refusal(guest.client.update_network(deadline(), &bad).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains("02:00:00:00:00:99"), "{text}");
}

/// Takes routes, a neighbour, one address and the whole interface away, each of them twice.
async fn taken_away(guest: &Guest, made: &UpdateNetworkRequest, in_guest: impl Fn(&str) -> String) {
    let update = async |update: &UpdateNetworkRequest| {
        for _ in 0..2 {
            guest
                .client
                .update_network(deadline(), update)
                .await
                .unwrap();
        }
    };
    let neighbour = Neighbour {
        address: "10.88.0.9".to_owned(),
        mac_address: "02:00:00:00:00:09".to_owned(),
        device: "eth0".to_owned(),
        ..Default::default()
    };
    let mut neighbours = UpdateNetworkRequest {
        neighbours: vec![neighbour.clone()],
        ..Default::default()
    };
    update(&neighbours).await;
    assert!(in_guest("neighbour show").contains("10.88.0.9"));
    neighbours = UpdateNetworkRequest {
        removed_neighbours: vec![neighbour],
        ..Default::default()
    };
    update(&neighbours).await;
    assert!(!in_guest("neighbour show").contains("10.88.0.9 "));

    update(&UpdateNetworkRequest {
        removed_routes: made.routes.clone(),
        ..Default::default()
    })
    .await;
    let routes = in_guest("route show") + &in_guest("-6 route show");
    assert!(
        !routes.contains("default") && !routes.contains("192.0.2.0"),
        "{routes}"
    );

    let mut one_address = made.interfaces[0].clone();
    one_address.addresses.truncate(1);
    update(&UpdateNetworkRequest {
        removed_interfaces: vec![one_address],
        ..Default::default()
    })
    .await;
    let addresses = in_guest("address show dev eth0");
    assert!(
        !addresses.contains("10.88.0.5") && addresses.contains("fd00::5"),
        "{addresses}"
    );

    // Replaced in one request: what is taken away goes before what is added.
    let mut all = made.interfaces[0].clone();
    all.addresses.clear();
    let mut other = made.interfaces[0].clone();
    other.addresses = vec!["10.88.0.6/16".to_owned()];
    update(&UpdateNetworkRequest {
        removed_interfaces: vec![all.clone()],
        interfaces: vec![other],
        ..Default::default()
    })
    .await;
    let addresses = in_guest("address show dev eth0");
    assert!(
        addresses.contains("10.88.0.6") && !addresses.contains("fd00::5"),
        "{addresses}"
    );
    assert!(addresses.contains(",UP"), "{addresses}");
    update(&UpdateNetworkRequest {
        removed_interfaces: vec![all],
        ..Default::default()
    })
    .await;
    let addresses = in_guest("address show dev eth0");
    assert!(
        !addresses.contains("inet") && !addresses.contains(",UP"),
        "{addresses}"
    );
}

#[tokio::test]
async fn ports_of_the_pod_are_forwarded() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let pid = guest.agent_pid().to_string();
    let mut listener = std::process::Command::new("nsenter")
        .args([
            "-t", &pid, "-n", "busybox", "nc", "-l", "-p", "8080", "-e", "cat",
        ])
        .spawn()
        .unwrap();
    // The listener needs a moment to listen; each refusal is an answer, not a guess.
    let (answer, mut stream) = loop {
        let (answer, stream) = guest.connect("tcp 127.0.0.1 8080\n").await;
        if answer == "ok\n" {
            break (answer, stream);
        }
        assert!(answer.contains("refused"), "{answer}");
        assert!(listener.try_wait().unwrap().is_none(), "the listener ended");
    };
    assert_eq!(answer, "ok\n");
    stream.write_all(b"through").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut echoed = String::new();
    stream.read_to_string(&mut echoed).await.unwrap();
    assert_eq!(echoed, "through");
    listener.wait().unwrap();
    let (answer, _) = guest.connect("tcp 127.0.0.1 1\n").await;
    assert!(
        answer.starts_with("error ") && answer.contains("127.0.0.1:1"),
        "{answer}"
    );
}

#[tokio::test]
async fn bad_stream_headers_are_refused() {
    let Some(guest) = Guest::start().await else {
        return;
    };
    let long = format!("{}\n", "x".repeat(300));
    for header in ["process 0\n", "hello\n", long.as_str()] {
        let (answer, _) = guest.connect(header).await;
        assert!(answer.starts_with("error "), "{header:?}: {answer:?}");
    }
    let (answer, _first) = guest.connect("process 7\n").await;
    assert_eq!(answer, "ok\n");
    let (answer, _) = guest.connect("process 7\n").await;
    assert!(answer.contains("already waits"), "{answer}");
}

#[tokio::test]
async fn the_guest_tells_about_itself() {
    let Some(guest) = Guest::configured().await else {
        return;
    };
    let found = guest
        .client
        .diagnostics(deadline(), &Empty::new())
        .await
        .unwrap();
    assert!(found.agent_rss_bytes > 0 && found.agent_open_descriptors > 0 && found.mounts > 0);
    let stats = guest
        .client
        .stats(deadline(), &StatsRequest::default())
        .await
        .unwrap();
    assert!(stats.networks.iter().any(|network| network.name == "lo"));
    let bad = SetClockRequest {
        wall_clock_ns: -1,
        ..Default::default()
    };
    assert_eq!(
        refusal(guest.client.set_clock(deadline(), &bad).await).0,
        Code::INVALID_ARGUMENT
    );
}
