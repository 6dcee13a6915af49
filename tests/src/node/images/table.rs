//! The images: which content, which configuration, which names.

/// What an image's file system holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// busybox with all its applets.
    Busybox,
    /// busybox, and a page for its web server.
    Web,
    /// busybox, and a user that the image puts into a group.
    PredefinedGroup,
    /// busybox and agnhost.
    Agnhost,
    /// busybox, and a set-user-ID program that prints as whom it runs.
    Setuid,
}

/// One image.
#[derive(Debug)]
pub(super) struct Image {
    /// Distinguishes images that are otherwise equal: a label.
    pub label: &'static str,
    /// File system.
    pub content: Content,
    /// `Env` of the configuration, after PATH.
    pub variables: &'static [&'static str],
    /// `User` of the configuration.
    pub user: &'static str,
    /// `Entrypoint` of the configuration.
    pub entrypoint: &'static [&'static str],
    /// `Cmd` of the configuration.
    pub command: &'static [&'static str],
    /// Last part of the repository's name and tag (`*`: any) for the registry.
    pub names: &'static [(&'static str, &'static str)],
    /// Full name in the archive; empty when it is only in the registry.
    pub archive: &'static str,
}

const BUSYBOX: Image = Image {
    label: "busybox",
    content: Content::Busybox,
    variables: &[],
    user: "",
    entrypoint: &[],
    command: &["sh"],
    names: &[],
    archive: "",
};

/// Every image. The names beyond busybox, pause and agnhost are those that critest 1.36 pulls.
pub(super) const IMAGES: &[Image] = &[
    Image {
        names: &[("busybox", "*")],
        archive: super::BUSYBOX,
        ..BUSYBOX
    },
    // Another image than the pods' own, as the real one is: critest counts an image's tags.
    Image {
        label: "pause 3.9",
        command: &["sleep", "inf"],
        names: &[("pause", "3.9")],
        ..BUSYBOX
    },
    Image {
        label: "pause",
        command: &["sleep", "inf"],
        names: &[("pause", "*")],
        archive: super::PAUSE,
        ..BUSYBOX
    },
    Image {
        label: "agnhost",
        content: Content::Agnhost,
        entrypoint: &["/agnhost"],
        command: &["pause"],
        names: &[("agnhost", "*")],
        ..BUSYBOX
    },
    Image {
        label: "web server on port 80",
        content: Content::Web,
        // critest looks for the server's name in its log, and for the words by which nginx calls
        // its first process.
        command: &[
            "sh",
            "-c",
            "echo httpd starts; httpd -f -p 80 -h /www; : master process",
        ],
        names: &[("nginx", "*"), ("httpd", "*")],
        ..BUSYBOX
    },
    Image {
        label: "web server on port 12003, for host networks",
        content: Content::Web,
        command: &["httpd", "-f", "-p", "12003", "-h", "/www"],
        names: &[("hostnet-nginx-amd64", "*")],
        ..BUSYBOX
    },
    Image {
        label: "user by number",
        user: "1002",
        names: &[("test-image-user-uid", "*")],
        ..BUSYBOX
    },
    Image {
        label: "user by name",
        user: "www-data",
        names: &[("test-image-user-username", "*")],
        ..BUSYBOX
    },
    Image {
        label: "user and group by number",
        user: "1003:1003",
        names: &[("test-image-user-uid-group", "*")],
        ..BUSYBOX
    },
    Image {
        label: "user and group by name",
        user: "www-data:www-data",
        names: &[("test-image-user-username-group", "*")],
        ..BUSYBOX
    },
    Image {
        label: "user in a group of the image",
        content: Content::PredefinedGroup,
        user: "1000",
        names: &[("test-image-predefined-group", "*")],
        ..BUSYBOX
    },
    Image {
        label: "set-user-ID program",
        content: Content::Setuid,
        command: &["/effective-uid"],
        names: &[("nonewprivs", "*")],
        ..BUSYBOX
    },
    Image {
        label: "variables",
        variables: &["ORIGIN=image", "ONLY_IMAGE=yes", "EMPTY=", "EQUALS=a=b"],
        names: &[("variables", "*")],
        ..BUSYBOX
    },
    Image {
        label: "latest",
        names: &[("test-image-latest", "latest")],
        ..BUSYBOX
    },
    Image {
        label: "tag test",
        names: &[("test-image-tag", "test")],
        ..BUSYBOX
    },
    Image {
        label: "tag all",
        names: &[("test-image-tag", "all")],
        ..BUSYBOX
    },
    Image {
        label: "one",
        names: &[("test-image-1", "latest")],
        ..BUSYBOX
    },
    Image {
        label: "two",
        names: &[("test-image-2", "latest")],
        ..BUSYBOX
    },
    Image {
        label: "three",
        names: &[("test-image-3", "latest")],
        ..BUSYBOX
    },
    Image {
        label: "three tags",
        names: &[
            ("test-image-tags", "1"),
            ("test-image-tags", "2"),
            ("test-image-tags", "3"),
        ],
        ..BUSYBOX
    },
];
