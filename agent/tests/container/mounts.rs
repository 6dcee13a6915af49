//! `mounts`, `root`, `linux.devices`, masked and read-only paths.

use std::{
    fs,
    os::unix::fs::{MetadataExt, chown, symlink},
};

use serde_json::json;

use crate::harness::*;

#[test]
fn the_usual_mounts_have_their_options() {
    let mut place = Place::new();
    let outcome = place.sh("cat /proc/self/mountinfo | cut -d' ' -f5-");
    let line = |at: &str| {
        let start = format!("{at} ");
        outcome
            .stdout
            .lines()
            .find(|line| line.starts_with(&start))
            .unwrap()
            .to_owned()
    };
    assert!(
        line("/proc").contains("nosuid,nodev,noexec,relatime"),
        "{outcome:?}"
    );
    assert!(
        line("/dev").contains(" rw,nosuid ") && line("/dev").contains("size=65536k,mode=755"),
        "{}",
        line("/dev")
    );
    assert!(line("/dev/shm").contains("size=64k"));
    assert!(line("/dev/pts").contains("gid=5,mode=620,ptmxmode=666"));
    assert!(line("/dev/mqueue").contains("mqueue"));
    assert!(line("/sys").contains(" ro,nosuid,nodev,noexec"));
    assert!(
        line("/sys/fs/cgroup").contains(" ro,nosuid,nodev,noexec")
            && line("/sys/fs/cgroup").contains("cgroup2")
    );
}

#[test]
fn the_cgroup_mount_shows_the_container_alone() {
    let outcome = Place::new().sh(
        "cat /sys/fs/cgroup/cgroup.procs; cat /proc/self/cgroup; echo x \
        > /sys/fs/cgroup/cgroup.procs || echo denied",
    );
    assert!(outcome.stdout.starts_with("1\n"), "{outcome:?}");
    assert!(
        outcome.stdout.contains("0::/\n") && outcome.stdout.contains("denied"),
        "{outcome:?}"
    );
}

#[test]
fn devices_and_links() {
    let mut place = Place::new();
    place.spec["linux"]["devices"] = json!([
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640,
         "uid": 5, "gid": 6},
        {"path": "/dev/sub/disk", "type": "b", "major": 7, "minor": 0, "fileMode": 0o600},
        {"path": "/dev/fifo", "type": "p", "major": 0, "minor": 0},
    ]);
    let outcome = place.sh(
        "for d in null zero full random urandom tty fuse sub/disk fifo; do stat -c '%n %F %t:%T \
            %a %u:%g' /dev/$d; done; \
         for l in fd stdin stdout stderr core ptmx; do readlink /dev/$l; done; \
         head -c 4 /dev/zero | od -An -tx1; echo hi > /dev/null && echo ok",
    );
    let expected = "/dev/null character special file 1:3 666 0:0\n\
        /dev/zero character special file 1:5 666 0:0\n\
        /dev/full character special file 1:7 666 0:0\n\
        /dev/random character special file 1:8 666 0:0\n\
        /dev/urandom character special file 1:9 666 0:0\n\
        /dev/tty character special file 5:0 666 0:0\n\
        /dev/fuse character special file a:e5 640 5:6\n\
        /dev/sub/disk block special file 7:0 600 0:0\n\
        /dev/fifo fifo 0:0 666 0:0\n\
        /proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\n/proc/kcore\npts/ptmx\n\
        \x20000 00 00 00\nok\n";
    let normal = |text: &str| {
        text.replace(" 000 00 00 00", "")
            .replace(" 00 00 00 00", "")
    };
    assert_eq!(normal(&outcome.stdout), normal(expected));
}

#[test]
fn device_rules_refuse_what_is_not_allowed() {
    let mut place = Place::new();
    let full = json!([
        {"path": "/dev/loop-control", "type": "c", "major": 10, "minor": 237},
        {"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11},
    ]);
    place.spec["linux"]["devices"] = full;
    place.spec["linux"]["resources"]["devices"] = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 11, "access": "w"},
    ]);
    let outcome = place.sh(
        "head -c 1 /dev/zero | wc -c; (: >> /dev/kmsg) && echo kmsg-write; (: < /dev/kmsg) \
            2>/dev/null || echo kmsg-no-read; \
         mknod /dev/mem2 c 1 1 && (: < /dev/mem2) 2>/dev/null || echo mem-no-read",
    );
    assert_eq!(outcome.stdout, "1\nkmsg-write\nkmsg-no-read\nmem-no-read\n");
    // A privileged container: everything.
    place.spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    assert_eq!(place.sh("(: >> /dev/kmsg) && echo all").stdout, "all\n");
}

#[test]
fn masked_and_read_only_paths() {
    let mut place = Place::new();
    place.spec["linux"]["maskedPaths"]
        .as_array_mut()
        .unwrap()
        .push(json!("/proc/cpuinfo"));
    let outcome = place.sh(
        "cat /proc/cpuinfo /proc/timer_list | wc -c; ls /sys/firmware | wc -l; \
         echo 1 > /proc/sys/kernel/domainname || echo locked; touch /sys/firmware/x || echo locked",
    );
    assert_eq!(
        outcome
            .stdout
            .replace(
                "sh: can't create /proc/sys/kernel/domainname: Read-only file system\n",
                ""
            )
            .replace("touch: /sys/firmware/x: Read-only file system\n", ""),
        "0\n0\nlocked\nlocked\n"
    );
}

#[test]
fn bind_mounts_of_directories_and_files() {
    let mut place = Place::new();
    let outside = place.outside("volume");
    fs::write(outside.join("file"), "from outside\n").unwrap();
    place.mount(
        json!({"destination": "/volume", "type": "bind", "source": outside,
        "options": ["rbind", "rprivate", "ro"]}),
    );
    place.mount(json!({"destination": "/writable/deep", "type": "bind",
        "source": outside, "options": ["rbind", "rw", "nosuid", "noexec", "nodev"]}));
    place.mount(
        json!({"destination": "/etc/one", "source": outside.join("file"),
        "options": ["bind", "ro"]}),
    );
    let outcome = place.sh(
        "cat /volume/file /etc/one; touch /volume/x 2>/dev/null || echo ro; touch \
            /writable/deep/made; \
         grep ' /writable/deep ' /proc/self/mountinfo | cut -d' ' -f6",
    );
    assert_eq!(
        outcome.stdout,
        "from outside\nfrom outside\nro\nrw,nosuid,nodev,noexec,relatime\n"
    );
    assert!(outside.join("made").exists());
}

#[test]
fn recursive_read_only_reaches_mounts_beneath() {
    for (option, expected) in [("ro", "lower ok\n"), ("rro", "")] {
        let mut place = Place::new();
        let outside = place.outside("volume");
        fs::create_dir(outside.join("lower")).unwrap();
        let none: Option<&str> = None;
        nix::mount::mount(
            Some("tmpfs"),
            &outside.join("lower"),
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            none,
        )
        .unwrap();
        place.mount(
            json!({"destination": "/volume", "type": "bind", "source": outside,
            "options": ["rbind", option]}),
        );
        let outcome = place.sh("touch /volume/x 2>/dev/null && echo upper ok; touch \
            /volume/lower/x 2>/dev/null && echo lower ok");
        nix::mount::umount(&outside.join("lower")).unwrap();
        assert_eq!(outcome.stdout, expected, "{option}");
    }
}

#[test]
fn id_mapped_mounts_show_mapped_owners() {
    let mut place = Place::new();
    let outside = place.outside("volume");
    chown(&outside, Some(0), Some(0)).unwrap();
    fs::write(outside.join("file"), "").unwrap();
    chown(outside.join("file"), Some(1000), Some(1000)).unwrap();
    let map = json!([{"containerID": 0, "hostID": 20_000, "size": 5000}]);
    place.mount(
        json!({"destination": "/mapped", "type": "bind", "source": outside,
        "options": ["bind", "idmap"],
        "uidMappings": map, "gidMappings": map}),
    );
    assert_eq!(
        place.sh("stat -c %u /mapped /mapped/file").stdout,
        "20000\n21000\n"
    );
    // In a user namespace, mapped as that: ids are the same inside as on the disk.
    place.spec["mounts"].as_array_mut().unwrap().pop();
    place.user_namespace();
    place.mount(
        json!({"destination": "/mapped", "type": "bind", "source": outside,
        "options": ["rbind", "ridmap"]}),
    );
    let outcome =
        place.sh("stat -c %u /mapped /mapped/file; touch /mapped/new && stat -c %u /mapped/new");
    assert_eq!(outcome.stdout, "0\n1000\n0\n");
    assert_eq!(fs::metadata(outside.join("new")).unwrap().uid(), 0);
}

#[test]
fn tmpfs_options_mode_and_copy_up() {
    let mut place = Place::new();
    let data = place.rootfs().join("data");
    fs::create_dir(data.join("sub")).unwrap();
    fs::write(data.join("sub/file"), "copied\n").unwrap();
    chown(data.join("sub/file"), Some(7), Some(8)).unwrap();
    symlink("sub/file", data.join("link")).unwrap();
    fs::set_permissions(&data, std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    place.mount(
        json!({"destination": "/data", "type": "tmpfs", "source": "tmpfs",
        "options": ["tmpcopyup", "size=1m", "ro"]}),
    );
    let outcome = place.sh(
        "cat /data/link; stat -c %u:%g /data/sub/file; stat -c %a /data; touch \
        /data/x 2>/dev/null || echo ro",
    );
    assert_eq!(outcome.stdout, "copied\n7:8\n711\nro\n");
}

#[test]
fn links_of_an_image_lead_no_further_than_its_root() {
    let mut place = Place::new();
    let outside = place.outside("volume");
    fs::write(outside.join("file"), "mounted\n").unwrap();
    let target = place.outside("target");
    // Absolute, to where the guest has something; and dangling, as many images' resolv.conf.
    symlink(&target, place.rootfs().join("link")).unwrap();
    symlink(
        "../run/resolve/resolv.conf",
        place.rootfs().join("etc/resolv.conf"),
    )
    .unwrap();
    place.mount(
        json!({"destination": "/link/inner", "type": "bind", "source": outside,
        "options": ["bind"]}),
    );
    place.mount(json!({"destination": "/etc/resolv.conf", "type": "bind",
        "source": outside.join("file"), "options": ["bind", "ro"]}));
    let script = format!("cat /etc/resolv.conf {}/inner/file", target.display());
    assert_eq!(place.sh(&script).stdout, "mounted\nmounted\n");
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
}

#[test]
fn the_root_can_be_read_only_and_its_propagation_set() {
    let mut place = Place::new();
    assert_eq!(
        place.sh("touch /data/x && echo written").stdout,
        "written\n"
    );
    place.spec["root"]["readonly"] = json!(true);
    assert_eq!(
        place
            .sh("touch /data/x 2>/dev/null || echo ro; touch /dev/x && echo dev")
            .stdout,
        "ro\ndev\n"
    );
    for (propagation, shared) in [("rshared", true), ("rprivate", false), ("rslave", false)] {
        place.spec["linux"]["rootfsPropagation"] = json!(propagation);
        let outcome = place.sh("grep ' / r[wo]' /proc/self/mountinfo");
        assert_eq!(
            outcome.stdout.contains("shared:"),
            shared,
            "{propagation}: {outcome:?}"
        );
    }
    place.spec["linux"]["rootfsPropagation"] = json!("sideways");
    assert!(place.error().starts_with("linux.rootfsPropagation: "));
}

#[test]
fn a_shared_volume_propagates_out() {
    let mut place = Place::new();
    let outside = place.outside("volume");
    let none: Option<&str> = None;
    let bind = nix::mount::MsFlags::MS_BIND;
    nix::mount::mount(Some(&outside), &outside, none, bind, none).unwrap();
    nix::mount::mount(none, &outside, none, nix::mount::MsFlags::MS_SHARED, none).unwrap();
    fs::create_dir(outside.join("in")).unwrap();
    place.mount(
        json!({"destination": "/volume", "type": "bind", "source": outside,
        "options": ["rbind", "rshared"]}),
    );
    place.spec["linux"]["rootfsPropagation"] = json!("rshared");
    let mut admin = capabilities();
    for set in ["bounding", "effective", "permitted"] {
        admin[set]
            .as_array_mut()
            .unwrap()
            .push(json!("CAP_SYS_ADMIN"));
    }
    place.spec["process"]["capabilities"] = admin;
    let outcome = place.sh("mount -t tmpfs inner /volume/in && touch /volume/in/seen && echo done");
    let seen = outside.join("in/seen").exists();
    let _ = nix::mount::umount(&outside.join("in"));
    let _ = nix::mount::umount(&outside);
    assert_eq!((outcome.stdout.as_str(), seen), ("done\n", true));
}

#[test]
fn mistakes_are_named() {
    let mut place = Place::new();
    let count = place.spec["mounts"].as_array().unwrap().len();
    let mut with = |mount| {
        place.spec["mounts"].as_array_mut().unwrap().truncate(count);
        place.mount(mount);
        place.error()
    };
    let error = with(
        json!({"destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"]}),
    );
    assert_eq!(
        error,
        "open mounts[7].source /no/such: No such file or directory (os error 2)"
    );
    let error =
        with(json!({"destination": "/x", "type": "tmpfs", "source": "x", "options": ["sise=1"]}));
    assert!(
        error.starts_with("mount mounts[7] (tmpfs) at /x") && error.contains("sise"),
        "{error}"
    );
    let error = with(json!({"destination": "/x", "type": "nosuchfs", "source": "x"}));
    assert!(
        error.contains("nosuchfs") && error.contains("No such device"),
        "{error}"
    );
    let error = with(json!({"destination": "/a/../../b", "type": "tmpfs"}));
    assert_eq!(error, "mounts[7].destination: \"/a/../../b\" climbs");
    place.spec["mounts"].as_array_mut().unwrap().truncate(count);
    place.spec["root"]["path"] = json!("/no/such/root");
    assert_eq!(
        place.error(),
        "open root.path /no/such/root: No such file or directory (os error 2)"
    );
}

/// A container that writes a volume makes links of what the host names later.
#[test]
fn sources_in_the_pods_files_are_reached_without_links() {
    let mut place = Place::new();
    let volume = place.outside("pod/shared/volume-1");
    let secret = place.outside("guest");
    fs::write(secret.join("file"), "secret").unwrap();
    fs::create_dir(place.outside("pod/shared/volume-2").join("d")).unwrap();
    fs::create_dir_all(volume.join("sub/d")).unwrap();
    fs::write(volume.join("sub/d/file"), "own").unwrap();
    symlink(&secret, volume.join("absolute")).unwrap();
    symlink("../../../guest", volume.join("out")).unwrap();
    symlink("../volume-2", volume.join("other")).unwrap();
    symlink("sub", volume.join("within")).unwrap();
    symlink("/proc/self/root", volume.join("magic")).unwrap();
    for path in [
        "absolute",
        "absolute/file",
        "out/file",
        "other",
        "other/d",
        "within/d",
        "magic/etc",
        "sub/../../../../guest",
    ] {
        let mut place = Place::with_files_of(&place);
        let source = volume.join(path);
        place.mount(json!({"destination": "/data", "source": source, "options": ["bind"]}));
        let error = place.error();
        assert!(error.contains("mounts[7].source"), "{path}: {error}");
        place.spec["mounts"].as_array_mut().unwrap().pop();
        place.spec["root"]["path"] = json!(source);
        let error = place.error();
        assert!(error.contains("root.path"), "{path}: {error}");
    }
    // A mount on the way, as virtio-fs makes for each file system of the host.
    let tmpfs = Mounted::tmpfs(&volume.join("sub/d"));
    fs::write(volume.join("sub/d/file"), "mounted").unwrap();
    for source in ["sub/d/file", "sub/./d/file"] {
        let mut place = Place::with_files_of(&place);
        let source = volume.join(source);
        place.mount(json!({"destination": "/data/file", "source": source, "options": ["bind"]}));
        assert_eq!(place.sh("cat /data/file").stdout, "mounted");
    }
    drop(tmpfs);
    // Elsewhere in the guest nobody but the agent makes links.
    let link = place.outside("elsewhere").join("link");
    symlink(&secret, &link).unwrap();
    place.mount(json!({"destination": "/data", "source": link, "options": ["bind"]}));
    assert_eq!(place.sh("cat /data/file").stdout, "secret");
}
