//! The components of the node: what, at which version, with which checksum, for which purpose.

/// What a component is needed for: a group is built only when something asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// containerd 2.3, runc, CNI, crictl, virtiofsd: enough for a pod through crictl.
    Demo,
    /// containerd 1.7.
    Older,
    /// etcd, API server, kubelet, kubectl, kube-proxy, metrics-server, agnhost, the driver of
    /// functions.
    Kube,
    /// critest and containerd's own CRI tests.
    Conformance,
}

impl Group {
    /// Every group.
    pub const ALL: [Self; 4] = [Self::Demo, Self::Older, Self::Kube, Self::Conformance];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Demo => "demo",
            Self::Older => "older",
            Self::Kube => "kube",
            Self::Conformance => "conformance",
        }
    }
}

/// One component.
#[derive(Debug)]
pub struct Component {
    /// Its name, and that of its cache folder.
    pub name: &'static str,
    /// What needs it.
    pub group: Group,
    /// How long it takes cold on two cores, for the progress line.
    pub seconds: u32,
    /// How it is built; the hash of this is its key in the cache.
    pub recipe: Recipe,
}

impl Component {
    /// Its pinned version.
    #[must_use]
    pub fn version(&self) -> &'static str {
        match &self.recipe {
            Recipe::Go(recipe) => recipe.version,
            Recipe::OwnGo(_) => "of this checkout",
            Recipe::Cargo(recipe) => recipe.version,
        }
    }
}

/// How a component is built.
#[derive(Debug)]
pub enum Recipe {
    /// From a Go module.
    Go(GoRecipe),
    /// From a Go program of ours.
    OwnGo(OwnGoRecipe),
    /// From a published crate.
    Cargo(CargoRecipe),
}

/// A build from a Go module. The checksum is the one that Go's own go.sum would hold.
#[derive(Debug)]
pub struct GoRecipe {
    /// Module path.
    pub module: &'static str,
    /// Its version.
    pub version: &'static str,
    /// Its `h1:` checksum.
    pub sum: &'static str,
    /// Packages below the module that become programs.
    pub programs: &'static [&'static str],
    /// Packages below the module whose tests become a program: package, program.
    pub tests: &'static [(&'static str, &'static str)],
    /// Packages that must be required but are not built.
    pub imports: &'static [&'static str],
    /// Build tags.
    pub tags: &'static str,
    /// Linker flags besides `-s -w`.
    pub linker: &'static str,
    /// Whether C is linked.
    pub cgo: bool,
    /// Kubernetes replaces its own modules by folders: use the published ones of this version.
    pub staging: Option<&'static str>,
}

/// A build of a Go program whose whole source is here. What it uses has its checksums in `go_sum`.
#[derive(Debug)]
pub struct OwnGoRecipe {
    /// The text of `go.mod`.
    pub go_mod: &'static str,
    /// The text of `go.sum`.
    pub go_sum: &'static str,
    /// The text of `main.go`.
    pub main: &'static str,
}

/// A build from a published crate.
#[derive(Debug)]
pub struct CargoRecipe {
    /// Crate name.
    pub package: &'static str,
    /// Its version.
    pub version: &'static str,
    /// The program it brings.
    pub program: &'static str,
}

const GO: GoRecipe = GoRecipe {
    module: "",
    version: "",
    sum: "",
    programs: &[],
    tests: &[],
    imports: &[],
    tags: "",
    linker: "",
    cgo: false,
    staging: None,
};

const CONTAINERD: GoRecipe = GoRecipe {
    module: "github.com/containerd/containerd/v2",
    version: "v2.3.4",
    sum: "h1:c2PJo/9UGVdiiw8SwrxuLxWGY+9b3jQ6Xp9zntneIvI=",
    cgo: true,
    ..GO
};

const CRI_TOOLS: GoRecipe = GoRecipe {
    module: "sigs.k8s.io/cri-tools",
    version: "v1.36.0",
    sum: "h1:Xt+LLvBVH1Fnp/AR2EyHApyWS/88y2KlWjlDc2HR+aw=",
    imports: &["pkg/validate", "pkg/benchmark"],
    ..GO
};

const KUBERNETES: GoRecipe = GoRecipe {
    module: "k8s.io/kubernetes",
    version: "v1.36.0",
    sum: "h1:JKaAkgSzI4+ZvNWrNJg56jAkUaOiqgBaJstmi6ycyoU=",
    linker: "-X k8s.io/component-base/version.gitVersion=v1.36.0 \
             -X k8s.io/component-base/version.gitMajor=1 \
             -X k8s.io/component-base/version.gitMinor=36",
    staging: Some("v0.36.0"),
    ..GO
};

/// Snapshotters that need C libraries or kernel parts that the node has not.
const CONTAINERD_TAGS: &str = "no_btrfs,no_devmapper,no_zfs";

/// Every component, in the order in which they are built.
pub const COMPONENTS: &[Component] = &[
    Component {
        name: "containerd",
        group: Group::Demo,
        seconds: 60,
        recipe: Recipe::Go(GoRecipe {
            programs: &["cmd/containerd", "cmd/ctr", "cmd/containerd-shim-runc-v2"],
            tags: CONTAINERD_TAGS,
            ..CONTAINERD
        }),
    },
    Component {
        name: "runc",
        group: Group::Demo,
        seconds: 10,
        recipe: Recipe::Go(GoRecipe {
            module: "github.com/opencontainers/runc",
            version: "v1.5.2",
            sum: "h1:eUUowc2WJCnFYzI87C1WqRcu356Dk/wsoi90y+2wEfE=",
            programs: &[""],
            tags: "seccomp",
            cgo: true,
            ..GO
        }),
    },
    Component {
        name: "cni",
        group: Group::Demo,
        seconds: 10,
        recipe: Recipe::Go(GoRecipe {
            module: "github.com/containernetworking/plugins",
            version: "v1.9.1",
            sum: "h1:8oU6WsIsU3bpnNZuvHp74a6cE1MJwbj2P7s4/yTUNlA=",
            programs: &[
                "plugins/main/bridge",
                "plugins/main/loopback",
                "plugins/main/ptp",
                "plugins/ipam/host-local",
                "plugins/meta/portmap",
                "plugins/meta/bandwidth",
                "plugins/meta/tuning",
            ],
            ..GO
        }),
    },
    Component {
        name: "crictl",
        group: Group::Demo,
        seconds: 60,
        recipe: Recipe::Go(GoRecipe {
            programs: &["cmd/crictl"],
            ..CRI_TOOLS
        }),
    },
    Component {
        name: "virtiofsd",
        group: Group::Demo,
        seconds: 80,
        recipe: Recipe::Cargo(CargoRecipe {
            package: "virtiofsd",
            version: "1.14.0",
            program: "virtiofsd",
        }),
    },
    Component {
        name: "containerd-1.7",
        group: Group::Older,
        seconds: 60,
        recipe: Recipe::Go(GoRecipe {
            module: "github.com/containerd/containerd",
            version: "v1.7.35",
            sum: "h1:7AU2T1qI2OdNBmKkreWZ7kASHUNFItN5Hgejd9sY938=",
            programs: &["cmd/containerd", "cmd/ctr", "cmd/containerd-shim-runc-v2"],
            tags: CONTAINERD_TAGS,
            cgo: true,
            ..GO
        }),
    },
    Component {
        name: "etcd",
        group: Group::Kube,
        seconds: 30,
        recipe: Recipe::Go(GoRecipe {
            module: "go.etcd.io/etcd/server/v3",
            version: "v3.7.3",
            sum: "h1:KcTZ/aEZrOiQe0/kdr7iYYcvyfbEoOwDOacHkz8xwZc=",
            programs: &[""],
            ..GO
        }),
    },
    Component {
        name: "kubernetes",
        group: Group::Kube,
        seconds: 290,
        recipe: Recipe::Go(GoRecipe {
            programs: &["cmd/kubelet", "cmd/kube-apiserver", "cmd/kubectl"],
            ..KUBERNETES
        }),
    },
    Component {
        name: "kube-proxy",
        group: Group::Kube,
        seconds: 40,
        recipe: Recipe::Go(GoRecipe {
            programs: &["cmd/kube-proxy"],
            ..KUBERNETES
        }),
    },
    Component {
        name: "metrics-server",
        group: Group::Kube,
        seconds: 40,
        recipe: Recipe::Go(GoRecipe {
            module: "sigs.k8s.io/metrics-server",
            version: "v0.9.0",
            sum: "h1:nlqqZ2H0Xfko8eJC/1qaNVVT17hu4rxndkOi22KTZ4w=",
            programs: &["cmd/metrics-server"],
            ..GO
        }),
    },
    Component {
        name: "agnhost",
        group: Group::Kube,
        seconds: 40,
        recipe: Recipe::Go(GoRecipe {
            programs: &["test/images/agnhost"],
            ..KUBERNETES
        }),
    },
    Component {
        name: "dra-driver",
        group: Group::Kube,
        seconds: 40,
        recipe: Recipe::OwnGo(OwnGoRecipe {
            go_mod: include_str!("../../../dra-driver/go.mod"),
            go_sum: include_str!("../../../dra-driver/go.sum"),
            main: include_str!("../../../dra-driver/main.go"),
        }),
    },
    Component {
        name: "critest",
        group: Group::Conformance,
        seconds: 30,
        recipe: Recipe::Go(GoRecipe {
            tests: &[("cmd/critest", "critest")],
            imports: &["cmd/crictl", "pkg/validate", "pkg/benchmark"],
            ..CRI_TOOLS
        }),
    },
    Component {
        name: "cri-integration",
        group: Group::Conformance,
        seconds: 40,
        recipe: Recipe::Go(GoRecipe {
            imports: &["cmd/containerd", "cmd/ctr", "cmd/containerd-shim-runc-v2"],
            tests: &[("integration", "cri-integration.test")],
            ..CONTAINERD
        }),
    },
];
