//! `linux.seccomp`, in the kernel.

use serde_json::json;

use crate::harness::*;

fn refuse(name: &str, action: &str) -> serde_json::Value {
    json!({"defaultAction": "SCMP_ACT_ALLOW",
           "syscalls": [{"names": [name], "action": action, "errnoRet": 99}]})
}

#[test]
fn a_filter_refuses_with_its_errno() {
    for no_new_privileges in [false, true] {
        let mut place = Place::new();
        place.spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        place.spec["linux"]["seccomp"] = refuse("mkdir", "SCMP_ACT_ERRNO");
        let outcome = place.sh("grep ^Seccomp: /proc/self/status | cut -f2; mkdir /data/x \
            2>/dev/null || echo refused; grep CapEff /proc/self/status | cut -f2");
        assert!(outcome.stdout.starts_with("2\n"), "{outcome:?}");
        assert!(outcome.stdout.contains("refused\n"), "{outcome:?}");
        // CAP_SYS_ADMIN, needed for the filter, is not left behind.
        assert!(
            outcome.stdout.ends_with("00000000a80425fb\n"),
            "{outcome:?}"
        );
    }
}

#[test]
fn a_filter_kills() {
    let mut place = Place::new();
    place.spec["linux"]["seccomp"] = refuse("mkdir", "SCMP_ACT_KILL_PROCESS");
    place.spec["linux"]["seccomp"]["syscalls"][0]
        .as_object_mut()
        .unwrap()
        .remove("errnoRet");
    let outcome = place.sh("mkdir /data/x; echo status $?");
    // 128 + SIGSYS.
    assert!(outcome.stdout.ends_with("status 159\n"), "{outcome:?}");
}

#[test]
fn further_processes_have_the_filter_too() {
    let mut place = Place::new();
    place.spec["linux"]["seccomp"] = refuse("mkdir", "SCMP_ACT_ERRNO");
    let running = place.sleeping();
    let outcome = running.sh(
        "grep ^Seccomp: /proc/self/status | cut -f2; mkdir /data/x 2>/dev/null || echo refused",
    );
    assert!(
        outcome.stdout.starts_with("2\n") && outcome.stdout.ends_with("refused\n"),
        "{outcome:?}"
    );
}

#[test]
fn a_default_of_refusal_lets_a_shell_run() {
    // The calls that busybox's shell needs, in the manner of containerd's default profile.
    let mut place = Place::new();
    let names: Vec<_> = [
        "read",
        "write",
        "open",
        "openat",
        "close",
        "stat",
        "fstat",
        "lstat",
        "newfstatat",
        "statx",
        "poll",
        "lseek",
        "mmap",
        "mprotect",
        "munmap",
        "brk",
        "rt_sigaction",
        "rt_sigprocmask",
        "rt_sigreturn",
        "ioctl",
        "access",
        "pipe",
        "pipe2",
        "dup",
        "dup2",
        "dup3",
        "getpid",
        "clone",
        "fork",
        "vfork",
        "execve",
        "exit",
        "exit_group",
        "wait4",
        "fcntl",
        "getcwd",
        "chdir",
        "readlink",
        "readlinkat",
        "getuid",
        "geteuid",
        "getgid",
        "getegid",
        "getppid",
        "arch_prctl",
        "set_tid_address",
        "set_robust_list",
        "rseq",
        "prlimit64",
        "getrandom",
        "prctl",
        "capset",
        "sendmsg",
        "umask",
        "uname",
        "sendfile",
        "futex",
        "faccessat",
        "faccessat2",
        "getdents64",
        "writev",
    ]
    .into();
    place.spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}],
    });
    let outcome = place.sh("echo fine; mkdir /data/x 2>/dev/null || echo refused");
    assert_eq!(outcome.stdout, "fine\nrefused\n");
}

#[test]
fn notification_is_refused() {
    let mut place = Place::new();
    place.spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_NOTIFY"});
    assert!(
        place
            .error()
            .starts_with("linux.seccomp.defaultAction: SCMP_ACT_NOTIFY")
    );
}
