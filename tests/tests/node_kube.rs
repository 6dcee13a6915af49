//! The baseline: a pod with runc through a real kubelet.

use pericarp_tests::node::{Builder, session};

const POD: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: baseline}
spec:
  nodeName: node1
  runtimeClassName: runc
  automountServiceAccountToken: false
  terminationGracePeriodSeconds: 1
  containers:
  - name: a
    image: docker.io/library/busybox:test
    imagePullPolicy: Never
    command: [sh, -c, "echo up; exec sleep 1000"]
    resources: {limits: {cpu: 500m, memory: 64Mi}}
  - name: b
    image: registry.k8s.io/e2e-test-images/agnhost:2.53
    args: [netexec, --http-port=8080]
    readinessProbe: {httpGet: {path: /healthz, port: 8080}}
"#;

#[test]
fn pod_with_runc_through_kubelet() {
    let builder = || Builder::default().name("kube").memory_mib(6144);
    let node = session("kubelet-runc", builder).unwrap();
    let kubernetes = node.kubernetes().unwrap();
    kubernetes.apply(&node, POD).unwrap();
    kubernetes
        .wait(&node, "pod/baseline", "condition=Ready")
        .unwrap();
    assert_eq!(
        kubernetes
            .text(&node, &["logs", "baseline", "-c", "a"])
            .unwrap(),
        "up"
    );
    let kernel = kubernetes.text(&node, &["exec", "baseline", "-c", "a", "--", "uname", "-r"]);
    assert_eq!(kernel.unwrap(), node.shell("uname -r").unwrap().trim());
    kubernetes
        .text(&node, &["delete", "pod", "baseline", "--wait=true"])
        .unwrap();
}
