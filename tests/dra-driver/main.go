// Command dra-driver gives functions of its node to pods by Dynamic Resource Allocation, as small
// as a driver can be, for tests/tests/node_device_plugin.rs.
//
// It offers what vfio-pci has when it starts. A claim that is prepared has a CDI specification with
// a device for each of its functions: the node of the function's IOMMU group. The specification is
// all that the driver remembers, and goes when the claim is unprepared. It says READY=1 (sd_notify)
// once the kubelet knows it and its ResourceSlice can be read.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"google.golang.org/grpc"
	resourceapi "k8s.io/api/resource/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/dynamic-resource-allocation/deviceattribute"
	"k8s.io/dynamic-resource-allocation/kubeletplugin"
	"k8s.io/dynamic-resource-allocation/resourceslice"
)

const (
	driverName = "functions.tests.pericarp.dev"
	cdiVendor  = "tests.pericarp.dev"
	cdiKind    = cdiVendor + "/function"
	// Of containerd's two folders for CDI the one that a boot empties.
	cdiFolder = "/var/run/cdi"
	// Holds a link for each function that the driver of the host has.
	bound = "/sys/bus/pci/drivers/vfio-pci/*:*"
	// The kubelet's last call when it takes a driver.
	registered = "/pluginregistration.Registration/NotifyRegistrationStatus"
)

func main() {
	node := flag.String("node", "", "name of this node")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := live(ctx, *node); err != nil {
		log.Fatal(err)
	}
}

// live serves the kubelet until the context ends.
func live(ctx context.Context, node string) error {
	config, err := clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	folder := filepath.Join(kubeletplugin.KubeletPluginsDir, driverName)
	if err := os.MkdirAll(folder, 0o750); err != nil {
		return err
	}
	taken := make(chan struct{}, 1)
	hear := func(
		ctx context.Context, request any, call *grpc.UnaryServerInfo, next grpc.UnaryHandler,
	) (any, error) {
		answer, err := next(ctx, request)
		if call.FullMethod == registered && err == nil {
			select {
			case taken <- struct{}{}:
			default: // It was heard of before.
			}
		}
		return answer, err
	}
	helper, err := kubeletplugin.Start(ctx, driver{pool: node},
		kubeletplugin.DriverName(driverName),
		kubeletplugin.NodeName(node),
		kubeletplugin.KubeClient(client),
		kubeletplugin.GRPCInterceptor(hear),
	)
	if err != nil {
		return err
	}
	defer helper.Stop()
	if err := offer(ctx, client, helper, node); err != nil {
		return err
	}
	select {
	case <-taken:
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := ready(); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// offer publishes the functions of the node, and returns when they can be read.
func offer(
	ctx context.Context, client kubernetes.Interface, helper *kubeletplugin.Helper, node string,
) error {
	links, err := filepath.Glob(bound)
	if err != nil {
		return err
	}
	var devices []resourceapi.Device
	for _, link := range links {
		address := filepath.Base(link)
		devices = append(devices, resourceapi.Device{
			Name: deviceName(address),
			Attributes: map[resourceapi.QualifiedName]resourceapi.DeviceAttribute{
				deviceattribute.StandardDeviceAttributePCIBusID: {StringValue: &address},
			},
		})
	}
	pool := resourceslice.Pool{Slices: []resourceslice.Slice{{Devices: devices}}}
	resources := resourceslice.DriverResources{Pools: map[string]resourceslice.Pool{node: pool}}
	if err := helper.PublishResources(ctx, resources); err != nil {
		return err
	}
	ours := resourceapi.ResourceSliceSelectorDriver + "=" + driverName
	options := metav1.ListOptions{FieldSelector: ours}
	watch, err := client.ResourceV1().ResourceSlices().Watch(ctx, options)
	if err != nil {
		return err
	}
	defer watch.Stop()
	if _, is := <-watch.ResultChan(); !is {
		return errors.New("the watch for the ResourceSlice ended")
	}
	fmt.Println("offered", len(devices))
	return nil
}

// ready tells whoever started the driver that it can be used.
func ready() error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	socket, err := net.Dial("unixgram", path)
	if err != nil {
		return err
	}
	defer socket.Close()
	_, err = socket.Write([]byte("READY=1"))
	return err
}

// deviceName is what the function at an address is called: letters, digits and hyphens.
func deviceName(address string) string {
	return "pci-" + strings.NewReplacer(":", "-", ".", "-").Replace(address)
}

// specification is where the devices of a claim are described.
func specification(claim types.UID) string {
	return filepath.Join(cdiFolder, cdiVendor+"-"+string(claim)+".json")
}

type driver struct{ pool string }

func (d driver) PrepareResourceClaims(
	_ context.Context, claims []*resourceapi.ResourceClaim,
) (map[types.UID]kubeletplugin.PrepareResult, error) {
	results := map[types.UID]kubeletplugin.PrepareResult{}
	for _, claim := range claims {
		devices, err := d.prepare(claim)
		fmt.Println("prepared", claim.Name, len(devices), err)
		results[claim.UID] = kubeletplugin.PrepareResult{Devices: devices, Err: err}
	}
	return results, nil
}

// prepare describes the functions that were allocated to a claim.
func (d driver) prepare(claim *resourceapi.ResourceClaim) ([]kubeletplugin.Device, error) {
	type object = map[string]any
	var devices []kubeletplugin.Device
	var described []object
	for _, result := range claim.Status.Allocation.Devices.Results {
		if result.Driver != driverName {
			continue
		}
		group, err := groupOf(result.Device)
		if err != nil {
			return nil, err
		}
		name := string(claim.UID) + "-" + result.Device
		node := object{"path": "/dev/vfio/" + group}
		edits := object{"deviceNodes": []object{node}}
		described = append(described, object{"name": name, "containerEdits": edits})
		devices = append(devices, kubeletplugin.Device{
			Requests:     []string{result.Request},
			PoolName:     d.pool,
			DeviceName:   result.Device,
			CDIDeviceIDs: []string{cdiKind + "=" + name},
		})
	}
	text, err := json.Marshal(object{"cdiVersion": "0.6.0", "kind": cdiKind, "devices": described})
	if err != nil {
		return nil, err
	}
	return devices, write(specification(claim.UID), text)
}

// groupOf gives the IOMMU group of the function with a name, if vfio-pci has it.
func groupOf(name string) (string, error) {
	links, err := filepath.Glob(bound)
	if err != nil {
		return "", err
	}
	for _, link := range links {
		if deviceName(filepath.Base(link)) == name {
			group, err := os.Readlink(filepath.Join(link, "iommu_group"))
			return filepath.Base(group), err
		}
	}
	return "", fmt.Errorf("vfio-pci has no %s", name)
}

// write makes a file that others watch for, whole.
func write(path string, text []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(path+".begun", text, 0o644); err != nil {
		return err
	}
	return os.Rename(path+".begun", path)
}

func (d driver) UnprepareResourceClaims(
	_ context.Context, claims []kubeletplugin.NamespacedObject,
) (map[types.UID]error, error) {
	results := map[types.UID]error{}
	for _, claim := range claims {
		err := os.Remove(specification(claim.UID))
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		fmt.Println("unprepared", claim.Name, err)
		results[claim.UID] = err
	}
	return results, nil
}

func (d driver) HandleError(_ context.Context, err error, what string) {
	log.Println(what, err)
	if !errors.Is(err, kubeletplugin.ErrRecoverable) {
		os.Exit(1)
	}
}
