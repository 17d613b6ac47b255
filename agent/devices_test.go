package agent

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rxvision/rxvision/agent/gpu"
	"github.com/rxvision/rxvision/agent/spot"
	"github.com/rxvision/rxvision/cluster"
)

// TestBrokenDevice: a fault shows on the node and in the history of the task that uses the device, outlives the agent,
// and ends when the self-test and the operator's check pass, not while the device is in use.
func TestBrokenDevice(t *testing.T) {
	s := newFleetServer(t)
	cfg := testConfig(t, s)
	checked := filepath.Join(t.TempDir(), "checked")
	cfg.HealthCheckCommand = []string{"sh", "-c", `echo $CUDA_VISIBLE_DEVICES >> ` + checked + `; test -e ` + checked + `.pass`}
	cfg.SelfTestAfter = 20 * time.Millisecond
	fake := gpu.NewFake(exampleGPUs())
	fake.SetSelfTest("GPU-1", errors.New("memory rows wait to be remapped"))
	cfg.GPUs = fake
	a := startAgent(t, cfg)
	j, alloc := service(t, shell("t", `exec sleep 600`))
	alloc.AllocatedResources.Tasks["t"].Devices = []*cluster.AllocatedDevice{{Vendor: "nvidia", Type: "gpu", DeviceIDs: []string{"GPU-1"}}}
	s.run(j, alloc)
	s.waitStatus(t, alloc.ID, cluster.AllocClientRunning)
	fake.XID("GPU-1", 31) // an application's
	fake.XID("GPU-1", 79)
	device := func(i int) *cluster.NodeDevice { return s.node.NodeResources.Devices[0].Instances[i] }
	s.wait(t, "the sick GPU", func() bool {
		return !device(1).Healthy && device(1).HealthDescription == "XID 79: GPU has fallen off the bus" && device(0).Healthy
	})
	s.waitEvent(t, alloc.ID, "t", eventDevice, "Device GPU-1 is unhealthy: XID 79")
	if fake.SelfTests() > 0 {
		t.Error("a device is tested while a task uses it")
	}
	s.halt(alloc.ID)
	s.waitStatus(t, alloc.ID, cluster.AllocClientComplete)
	waitFor(t, "a self-test to fail", func() bool { return a.log.count("has failed its self-test") > 1 })
	if _, err := os.Stat(checked); err == nil {
		t.Error("the operator's check runs although NVML speaks against the device")
	}
	a.stop()

	cfg.GPUs, cfg.DataDir = gpu.NewFake(exampleGPUs()), a.cfg.DataDir // healthy by all that it knows
	b := startAgent(t, cfg)
	halting(t, s, b)
	s.wait(t, "the new agent", func() bool { return s.hellos == 2 })
	s.wait(t, "the GPU to be sick still", func() bool { return !device(1).Healthy && strings.Contains(device(1).HealthDescription, "XID 79") })
	waitFor(t, "the operator's check to fail", func() bool { return b.log.count("has failed its self-test") > 0 })
	if err := os.WriteFile(checked+".pass", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s.wait(t, "the GPU to be readmitted", func() bool { return device(1).Healthy })
	if text, err := os.ReadFile(checked); err != nil || !strings.HasPrefix(string(text), "GPU-1\nGPU-1\n") {
		t.Errorf("the check saw %q, %v", text, err)
	}
	if faults, err := b.store.deviceFaults(); err != nil || len(faults) != 0 {
		t.Errorf("faults kept: %v, %v", faults, err)
	}
}

// TestNotice: a file that appears is a notice, also to the next agent before it looks; gone it is withdrawn.
func TestNotice(t *testing.T) {
	s := newFleetServer(t)
	cfg := testConfig(t, s)
	path := filepath.Join(t.TempDir(), "notice")
	provider, err := spot.Open(spot.Options{Provider: spot.File, Path: path, Every: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	cfg.Notices = provider
	a := startAgent(t, cfg)
	s.wait(t, "the node", func() bool {
		return s.node != nil && s.node.Attributes[cluster.AttrSpot] == "true" && s.node.Interruption == nil
	})
	at := time.Date(2040, 1, 2, 3, 4, 5, 0, time.UTC)
	text := `{"reason": "the rack is moved", "at": "` + at.Format(time.RFC3339) + `"}`
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	announced := func() bool {
		i := s.node.Interruption
		return i != nil && i.Reason == "the rack is moved" && i.At == cluster.TimeOf(at)
	}
	s.wait(t, "the notice", announced)
	a.stop()
	b, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if i := b.nodeRecord().Interruption; i == nil || i.Reason != "the rack is moved" {
		t.Errorf("the next agent begins with %+v", i)
	}
	if err := b.close(); err != nil {
		t.Fatal(err)
	}
	startAgent(t, cfg)
	s.wait(t, "the next agent", func() bool { return s.hellos == 2 && announced() })
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	s.wait(t, "the notice to be withdrawn", func() bool { return s.node.Interruption == nil })
}

// TestForeignMemory: work waits for device memory that a process of nobody holds, and begins when it is free.
func TestForeignMemory(t *testing.T) {
	s := newFleetServer(t)
	cfg := testConfig(t, s)
	fake := gpu.NewFake(exampleGPUs())
	total := int64(81559)
	used := func(mib int64) { fake.SetStats(gpu.Stats{UUID: "GPU-1", UsedMiB: &mib, MemoryMiB: &total}) }
	used(60000)
	cfg.GPUs = fake
	halting(t, s, startAgent(t, cfg))
	j, alloc := service(t, shell("t", `exec sleep 600`))
	alloc.AllocatedResources.Tasks["t"].Devices = []*cluster.AllocatedDevice{{Vendor: "nvidia", Type: "gpu", DeviceIDs: []string{"GPU-1"}}}
	s.run(j, alloc)
	s.waitEvent(t, alloc.ID, "t", eventSetup, "Waiting for device memory: device GPU-1 has 60000 MiB in use of which no allocation was given 54903")
	used(700)
	s.waitStatus(t, alloc.ID, cluster.AllocClientRunning)
}

func TestLacks(t *testing.T) {
	for _, c := range []struct {
		used, held int64
		use        cluster.DeviceUse
		fits       bool
	}{
		{900, 0, cluster.DeviceUse{Whole: 1}, true}, // the driver's own
		{1100, 0, cluster.DeviceUse{Whole: 1}, false},
		{9000, 8000, cluster.DeviceUse{Shares: 1, MiB: 8000}, true},
		{12000, 8000, cluster.DeviceUse{Shares: 1, MiB: 4000}, true},
		{14000, 8000, cluster.DeviceUse{Shares: 1, MiB: 4000}, false},
		{3000, 8000, cluster.DeviceUse{Shares: 1, MiB: 8000}, true}, // given is not used yet
	} {
		total := int64(16000)
		if got := lacks(gpu.Stats{UUID: "GPU-0", UsedMiB: &c.used, MemoryMiB: &total}, c.use, c.held); (got == "") != c.fits {
			t.Errorf("%+v: %q", c, got)
		}
	}
}
