package gpu

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// atExit is run after the last test.
var atExit []func()

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		for _, f := range atExit {
			f()
		}
		os.Exit(code)
	}))
}

// watchUntil watches until the returned function is called, which returns what Watch did.
func watchUntil(src Source, report func(Event)) (stop func() error) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- src.Watch(ctx, report) }()
	return func() error { cancel(); return <-ended }
}

// watch returns the events of src until the test ends.
func watch(t *testing.T, src Source) <-chan Event {
	t.Helper()
	if _, err := src.Inventory(); err != nil { // what the test changes from here on is a change to Watch too
		t.Fatal(err)
	}
	events := make(chan Event, 100)
	stop := watchUntil(src, func(e Event) { events <- e })
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("watch: %v", err)
		}
		close(events)
		for e := range events {
			t.Errorf("event that nobody expected: %+v", e)
		}
	})
	return events
}

func TestFake(t *testing.T) {
	f := NewFake(Inventory{Devices: []Device{{UUID: "GPU-a", Model: "Test"}, {UUID: "GPU-b", Model: "Test", Index: 1}}})
	f.XID("GPU-b", 79) // before anybody watches
	events := watch(t, f)
	if e := <-events; e.UUID != "GPU-b" || e.Healthy || e.XID != 79 {
		t.Errorf("event %+v", e)
	}
	f.XID("GPU-a", 13)
	f.XID("GPU-a", 48)
	if e := <-events; e.UUID != "GPU-a" || e.XID != 48 {
		t.Errorf("event %+v", e)
	}
	f.Readmit("GPU-a")
	if e := <-events; e.UUID != "GPU-a" || !e.Healthy {
		t.Errorf("event %+v", e)
	}
	inv, err := f.Inventory()
	if err != nil || !inv.Devices[0].Health.Healthy || inv.Devices[1].Health.Healthy {
		t.Errorf("inventory %+v, %v", inv, err)
	}
	f.SetStats(Stats{UUID: "GPU-a"})
	if all, err := f.Stats(); err != nil || len(all) != 1 {
		t.Errorf("stats %+v, %v", all, err)
	}
}

func TestNone(t *testing.T) {
	var src Source = None{}
	if inv, err := src.Inventory(); err != nil || len(inv.Groups()) != 0 {
		t.Errorf("inventory %+v, %v", inv, err)
	}
	if all, err := src.Stats(); err != nil || len(all) != 0 {
		t.Errorf("stats %+v, %v", all, err)
	}
	watch(t, src)
}

func TestGroups(t *testing.T) {
	ok := Health{Healthy: true}
	inv := Inventory{DriverVersion: "550.1", Devices: []Device{
		{UUID: "C", Index: 2, Model: "B model", MIG: Enabled, Health: ok, Slices: []Slice{
			{UUID: "C1", Profile: "1g.10gb", MemoryMiB: 9856, Health: ok}, {UUID: "C2", Profile: "3g.40gb", Health: Health{Reason: "bad"}},
		}},
		{UUID: "A", Index: 0, Model: "A model", MemoryMiB: 16384, PowerLimitW: 70, PCIBusID: "0:1", Persistence: Enabled, Health: ok},
		{UUID: "B", Index: 1, Model: "A model", MemoryMiB: 16384, Health: Health{Reason: "XID 79"}},
	}}
	var got []string
	for _, g := range inv.Groups() {
		line := g.Vendor + "/" + g.Type + "/" + g.Name + ":"
		for _, m := range g.Members {
			line += fmt.Sprintf(" %s(%s) %v %s;", m.ID, m.PCIBusID, m.Health.Healthy, m.Health.Reason)
		}
		got = append(got, line)
	}
	want := []string{
		"nvidia/gpu/A model: A(0:1) true ; B() false XID 79;",
		"nvidia/mig-1g.10gb/B model: C1() true ;",
		"nvidia/mig-3g.40gb/B model: C2() false bad;",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("groups:\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	a := inv.Groups()[0].Attributes
	if *a["memory"].Int != 16384 || a["memory"].Unit != "MiB" || *a["power"].Int != 70 || a["power"].Unit != "W" ||
		*a["persistence_mode"].String != "Enabled" || *a["driver_version"].String != "550.1" {
		t.Errorf("attributes %+v", a)
	}
	if _, told := a["bar1"]; told {
		t.Error("an unknown number became an attribute")
	}
	if m := inv.Groups()[1].Attributes; *m["memory"].Int != 9856 || *m["mig_profile"].String != "1g.10gb" {
		t.Errorf("attributes of a slice %+v", m)
	}
}

// envReal marks the child process of TestRealGPU.
const envReal = "RX_REAL_GPU"

// TestRealGPU prints what a GPU host has. Carry a binary of these tests there: go test -c, then run it with
// -test.run=TestRealGPU -test.v. The work is done in a process of its own, because the symbols of the real library and of
// the fake one that other tests load would mix.
func TestRealGPU(t *testing.T) {
	if os.Getenv(envReal) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestRealGPU$", "-test.v")
		cmd.Env = append(os.Environ(), envReal+"=1")
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		switch {
		case err != nil:
			t.Errorf("child: %v", err)
		case strings.Contains(string(out), "--- SKIP"):
			t.Skip("no GPU here, run on a host with the NVIDIA driver")
		}
		return
	}
	src, err := Open(Options{})
	if err != nil {
		t.Skipf("no GPU here, run on a host with the NVIDIA driver: %v", err)
	}
	defer func() {
		if err := src.Close(); err != nil {
			t.Error(err)
		}
	}()
	inv, err := src.Inventory()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("driver %s, CUDA %s, warnings %v", inv.DriverVersion, inv.CUDAVersion, inv.Warnings)
	if len(inv.Devices) == 0 || inv.DriverVersion == "" {
		t.Error("no device or no driver version")
	}
	for _, d := range inv.Devices {
		t.Logf("GPU %d: %+v", d.Index, d)
		if !strings.HasPrefix(d.UUID, "GPU-") || d.Model == "" || d.MemoryMiB == 0 || d.PCIBusID == "" || d.ComputeCapability == "" {
			t.Error("something that every GPU tells is missing")
		}
	}
	for _, g := range inv.Groups() {
		t.Logf("group %s/%s/%s with %d members", g.Vendor, g.Type, g.Name, len(g.Members))
		for name, a := range g.Attributes {
			if a.Int != nil {
				t.Logf("  %s = %d %s", name, *a.Int, a.Unit)
			} else {
				t.Logf("  %s = %s", name, *a.String)
			}
		}
	}
	begin := time.Now()
	all, err := src.Stats()
	if err != nil || len(all) == 0 {
		t.Errorf("stats: %d, %v", len(all), err)
	}
	t.Logf("stats took %v", time.Since(begin))
	for _, s := range all {
		t.Logf("stats of %s, processes %v", s.UUID, s.Processes)
		for name, v := range s.Values() {
			switch {
			case v.StringVal != nil:
				t.Logf("  %s = %s", name, *v.StringVal)
			case v.IntDenominatorVal != nil:
				t.Logf("  %s = %d / %d %s", name, *v.IntNumeratorVal, *v.IntDenominatorVal, v.Unit)
			default:
				t.Logf("  %s = %d %s", name, *v.IntNumeratorVal, v.Unit)
			}
		}
	}
	stop := watchUntil(src, func(e Event) { t.Logf("event %+v", e) })
	if err := stop(); err != nil {
		t.Errorf("watch: %v", err)
	}
}
