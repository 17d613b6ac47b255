package api_test

import (
	"strings"
	"testing"
	"time"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
)

// TestCommandLineDevices: an operator's orders about a device, and a node's interruption, as the
// nomad command line shows them.
func TestCommandLineDevices(t *testing.T) {
	c := newCLI(t)
	client, err := api.NewClient(c.url, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	list := func() []*api.Device {
		t.Helper()
		out, err := client.Devices(t.Context(), gpuNode)
		if err != nil || len(out) != 2 {
			t.Fatalf("devices %+v, %v", out, err)
		}
		return out
	}
	if d := list()[0]; d.ID != gpuID(0) || d.Group != "nvidia/gpu/Test A10" || !d.Healthy || d.Order != nil {
		t.Errorf("device %+v", d)
	}
	order := func(o api.DeviceOrder) {
		t.Helper()
		if err := client.OrderDevice(t.Context(), gpuNode, &o); err != nil {
			t.Fatal(err)
		}
	}
	order(api.DeviceOrder{Device: gpuID(0), Order: cluster.DeviceCordon, Reason: "fan"})
	if d := list()[0]; d.Healthy || d.HealthDescription != "cordoned by an operator: fan" || d.Order.Order != cluster.DeviceCordon || d.UnhealthySince == 0 {
		t.Errorf("cordoned: %+v", d)
	}
	c.run("node status "+gpuNode, "Device "+gpuID(0)+" is unhealthy: cordoned by an operator: fan")
	c.run("node status -json "+gpuNode, `"Healthy": false`, `"HealthDescription": "cordoned by an operator: fan"`)
	c.file("train.hcl", strings.ReplaceAll(trainJob, "COUNT", "1"))
	c.run("job run -detach train.hcl")
	snap := c.settled("train", 1)
	first := snap.Alloc(nil, c.running("train"))
	if got := first.AllocatedResources.Tasks["t"].Devices[0].DeviceIDs[0]; got != gpuID(1) {
		t.Fatalf("placed on %s", got)
	}
	if d := list()[1]; len(d.Allocations) != 1 || d.Allocations[0] != first.ID {
		t.Errorf("device in use: %+v", d)
	}
	order(api.DeviceOrder{Device: gpuID(0)})
	order(api.DeviceOrder{Device: gpuID(1), Order: cluster.DeviceCordon, Move: true})
	snap = c.until("the work to move", func(snap *cluster.Snapshot) bool {
		a := snap.Alloc(nil, first.ID)
		next := snap.Alloc(nil, a.NextAllocation)
		return next != nil && next.ClientStatus == cluster.AllocClientRunning && next.AllocatedResources.Tasks["t"].Devices[0].DeviceIDs[0] == gpuID(0)
	})
	c.run("alloc status -verbose "+first.ID, "moved off an unhealthy device")
	c.run("job status train", snap.Alloc(nil, first.ID).NextAllocation[:8])
	order(api.DeviceOrder{Device: gpuID(1)})
	if d := list()[1]; !d.Healthy || d.Order != nil {
		t.Errorf("given back: %+v", d)
	}
	for _, o := range []api.DeviceOrder{{Device: "GPU-none", Order: cluster.DeviceCordon}, {Device: gpuID(0), Order: "hug"}} {
		if err := client.OrderDevice(t.Context(), gpuNode, &o); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}

	if id, err := client.FindNode(t.Context(), "gpu-host"); err != nil || id != gpuNode {
		t.Errorf("found %q, %v", id, err)
	}
	if id, err := client.FindNode(t.Context(), gpuNode[:8]); err != nil || id != gpuNode {
		t.Errorf("found %q, %v", id, err)
	}
	if _, err := client.FindNode(t.Context(), "nobody"); cluster.CodeOf(err) != cluster.CodeNotFound {
		t.Errorf("found nobody: %v", err)
	}
	for _, d := range []time.Duration{0, -1, 48 * time.Hour} {
		if err := client.InterruptNode(t.Context(), gpuNode, &api.NodeInterruption{Deadline: d}); cluster.CodeOf(err) != cluster.CodeInvalid {
			t.Errorf("deadline %s: %v", d, err)
		}
	}
	if err := client.InterruptNode(t.Context(), gpuNode, &api.NodeInterruption{Deadline: 2 * time.Minute, Reason: "the rack is moved"}); err != nil {
		t.Fatal(err)
	}
	c.until("the node to be empty", func(snap *cluster.Snapshot) bool { return !snap.Node(nil, gpuNode).Drain })
	c.run("node status "+gpuNode, "Eligibility = ineligible", "Node is to be interrupted: the rack is moved")
}

const trainJob = `
job "train" {
  type = "batch"
  group "g" {
    count = COUNT
    task "t" {
      driver = "raw_exec"
      config { command = "sleep" }
      resources {
        cpu    = 100
        memory = 64
        device "nvidia/gpu" {}
      }
    }
  }
}
`
