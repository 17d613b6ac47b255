//go:build cgo && linux

package gpu

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// envScript is the file that the fake library reads; envLibrary makes a child process of these tests load another build of it.
const (
	envScript  = "RX_FAKE_NVML"
	envLibrary = "RX_FAKE_NVML_LIBRARY"
)

// fakeLibrary builds testdata/fake_nvml.c. It is deliberately not linked with -z now, like the real one.
func fakeLibrary(t *testing.T, flags ...string) string {
	t.Helper()
	cc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("no gcc to build the fake NVML library with: apt-get install gcc")
	}
	source, err := filepath.Abs("testdata/fake_nvml.c")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(source); err != nil {
		t.Skipf("the source of the fake NVML library is not here, run the tests in their folder: %v", err)
	}
	lib := filepath.Join(t.TempDir(), "libnvidia-ml.so.1")
	args := append([]string{"-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unused-function", "-o", lib, source}, flags...)
	if out, err := exec.Command(cc, args...).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	return lib
}

// script is what the fake library answers.
type script struct {
	t    *testing.T
	path string
	text string
}

const twoGPUs = `driver 550.54.15
cuda 12040
count 2
0.uuid GPU-00000000-0000-0000-0000-000000000000
0.name NVIDIA H100 80GB HBM3
0.mem 81559
0.used 1024
0.bar1 131072
0.pci 00000000:0A:00.0
0.minor 0
0.limit 700000
0.power 123456
0.gen 5
0.width 16
0.clock 1980
0.memclock 2619
0.display 0
0.persistence 1
0.capability 90
0.ecc 1
0.mig 0
0.gpu% 42
0.mem% 7
0.encoder 1
0.decoder 2
0.temp 55
0.ecc.0.0 3
0.ecc.0.1 4
0.ecc.0.2 5
0.ecc.1.total 1
0.processes 3
0.events 11
1.uuid GPU-11111111-1111-1111-1111-111111111111
1.name NVIDIA H100 80GB HBM3
1.mem 81559
1.mig 1
1.migmax 7
1.mig.0.uuid MIG-a
1.mig.0.name NVIDIA H100 80GB HBM3 MIG 1g.10gb
1.mig.0.mem 9856
1.mig.0.used 13
1.mig.0.gi 7
1.mig.0.ci 0
1.mig.2.uuid MIG-b
1.mig.2.name NVIDIA H100 80GB HBM3
1.mig.2.mem 40192
1.mig.2.gi 1
1.mig.2.ci 0
1.mig.2.gslices 3
1.mig.2.cslices 1
1.events 11
`

const (
	gpu0 = "GPU-00000000-0000-0000-0000-000000000000"
	gpu1 = "GPU-11111111-1111-1111-1111-111111111111"
)

func newScript(t *testing.T, text string) *script {
	t.Helper()
	s := &script{t: t, path: filepath.Join(t.TempDir(), "script"), text: text}
	s.write()
	t.Setenv(envScript, s.path) // with cgo this reaches getenv in C too
	return s
}

// write replaces the file in one step, as the library may be reading it.
func (s *script) write() {
	s.t.Helper()
	if err := os.WriteFile(s.path+".new", []byte(s.text), 0o644); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(s.path+".new", s.path); err != nil {
		s.t.Fatal(err)
	}
}

func (s *script) add(line string) { s.text += line + "\n"; s.write() }

func (s *script) remove(line string) { s.text = strings.Replace(s.text, line+"\n", "", 1); s.write() }

// sharedLibrary is one build for all tests of this process: the binding's symbols are resolved once per process.
var sharedLibrary string

func mustOpen(t *testing.T) Source {
	t.Helper()
	if sharedLibrary == "" {
		built := fakeLibrary(t)
		dir, err := os.MkdirTemp("", "fake-nvml-")
		if err != nil {
			t.Fatal(err)
		}
		sharedLibrary = filepath.Join(dir, filepath.Base(built))
		if err := os.Rename(built, sharedLibrary); err != nil {
			t.Fatal(err)
		}
		atExit = append(atExit, func() { os.RemoveAll(dir) })
	}
	src, err := Open(Options{Library: sharedLibrary, ProbeEvery: 10 * time.Millisecond, IgnoreXIDs: []uint64{63}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := src.Close(); err != nil {
			t.Error(err)
		}
	})
	return src
}

func TestInventory(t *testing.T) {
	newScript(t, twoGPUs)
	inv, err := mustOpen(t).Inventory()
	if err != nil {
		t.Fatal(err)
	}
	if inv.DriverVersion != "550.54.15" || inv.CUDAVersion != "12.4" || len(inv.Warnings) > 0 {
		t.Errorf("inventory %+v", inv)
	}
	ok := Health{Healthy: true}
	want := []Device{
		{
			UUID: gpu0, Index: 0, Minor: 0, Model: "NVIDIA H100 80GB HBM3", MemoryMiB: 81559, BAR1MiB: 131072,
			PCIBusID: "00000000:0A:00.0", PCIBandwidth: 63008, NUMANode: -1, ComputeCapability: "9.0", PowerLimitW: 700,
			CoreClockMHz: 1980, MemoryClockMHz: 2619, ECC: Enabled, Display: Disabled, Persistence: Enabled, MIG: Disabled, Health: ok,
		},
		{
			UUID: gpu1, Index: 1, Minor: -1, Model: "NVIDIA H100 80GB HBM3", MemoryMiB: 81559, NUMANode: -1, MIG: Enabled, Health: ok,
			Slices: []Slice{
				{UUID: "MIG-a", Profile: "1g.10gb", MemoryMiB: 9856, GPU: 7, Health: ok},
				{UUID: "MIG-b", Profile: "1c.3g.40gb", MemoryMiB: 40192, GPU: 1, Health: ok},
			},
		},
	}
	for i := range want {
		if got := inv.Devices[i]; fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want[i]) {
			t.Errorf("GPU %d:\n got %+v\nwant %+v", i, got, want[i])
		}
	}
}

func TestStats(t *testing.T) {
	newScript(t, twoGPUs)
	all, err := mustOpen(t).Stats()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 4 {
		t.Fatalf("stats of %d devices, want two GPUs and two slices", len(all))
	}
	show := func(s Stats) string {
		var out []string
		for name, v := range s.Values() {
			line := name + "="
			switch {
			case v.StringVal != nil:
				line += *v.StringVal
			case v.IntDenominatorVal != nil:
				line += fmt.Sprintf("%d/%d", *v.IntNumeratorVal, *v.IntDenominatorVal)
			default:
				line += fmt.Sprint(*v.IntNumeratorVal)
			}
			out = append(out, line+v.Unit)
		}
		slices.Sort(out)
		return strings.Join(out, ", ")
	}
	if got, want := show(all[0]), "BAR1 buffer state=1/131072MiB, Decoder utilization=2%, ECC L1 errors=3#, ECC L2 errors=4#, "+
		"ECC memory errors=5#, ECC uncorrected errors=1#, Encoder utilization=1%, GPU utilization=42%, Memory state=1024/81559MiB, "+
		"Memory utilization=7%, Power usage=123/700W, Temperature=55C"; got != want {
		t.Errorf("stats of a GPU:\n got %s\nwant %s", got, want)
	}
	if got, want := fmt.Sprint(all[0].Processes), "[{101 1} {102 2} {103 -1}]"; got != want {
		t.Errorf("processes %s, want %s", got, want)
	}
	if got, want := show(all[2]), "BAR1 buffer state=N/AMiB, Decoder utilization=N/A%, ECC L1 errors=N/A#, ECC L2 errors=N/A#, "+
		"ECC memory errors=N/A#, ECC uncorrected errors=N/A#, Encoder utilization=N/A%, GPU utilization=N/A%, Memory state=13/9856MiB, "+
		"Memory utilization=N/A%, Power usage=N/AW, Temperature=N/AC"; all[2].UUID != "MIG-a" || got != want {
		t.Errorf("stats of slice %s:\n got %s\nwant %s", all[2].UUID, got, want)
	}
}

func TestXIDs(t *testing.T) {
	s := newScript(t, twoGPUs)
	src := mustOpen(t)
	events := watch(t, src)
	s.add("event 0 8 13 4294967295 4294967295") // an application's error
	s.add("event 0 8 63 4294967295 4294967295") // ignored by option
	s.add("event 1 8 95 7 0")                   // of one MIG slice
	if e := <-events; e.UUID != "MIG-a" || e.Healthy || e.XID != 95 || !strings.Contains(e.Reason, "uncontained") {
		t.Errorf("event %+v", e)
	}
	s.add("event 0 8 79 4294967295 4294967295")
	if e := <-events; e.UUID != gpu0 || e.Healthy || e.XID != 79 || !strings.Contains(e.Reason, "fallen off the bus") {
		t.Errorf("event %+v", e)
	}
	s.add("event 0 8 48 4294967295 4294967295") // nothing new: it is unhealthy already
	s.add("event 1 2 0 4294967295 4294967295")
	if e := <-events; e.UUID != gpu1 || !strings.Contains(e.Reason, "double bit") {
		t.Errorf("event %+v", e)
	}
	inv, err := src.Inventory()
	if err != nil {
		t.Fatal(err)
	}
	if h := inv.Devices[0].Health; h.Healthy || h.Reason != "XID 79: GPU has fallen off the bus" {
		t.Errorf("health %+v", h)
	}
	for _, g := range inv.Groups() {
		for _, m := range g.Members {
			if m.Health.Healthy {
				t.Errorf("%s of %s is healthy, its GPU is not", m.ID, g.Type)
			}
		}
	}
}

func TestLostGPU(t *testing.T) {
	s := newScript(t, twoGPUs)
	src := mustOpen(t)
	events := watch(t, src)
	s.add("0.lost 1")
	if e := <-events; e.UUID != gpu0 || e.Healthy || !strings.Contains(e.Reason, "lost") {
		t.Errorf("event %+v", e)
	}
	inv, err := src.Inventory()
	if err != nil {
		t.Fatal(err)
	}
	if d := inv.Devices[0]; d.UUID != gpu0 || d.Health.Healthy || d.MemoryMiB != 81559 || !inv.Devices[1].Health.Healthy {
		t.Errorf("devices %+v", inv.Devices)
	}
	if all, err := src.Stats(); err != nil || len(all) != 3 {
		t.Errorf("stats of %d devices, %v, want the lost one left out", len(all), err)
	}
	if err := src.SelfTest(gpu0); err == nil || !strings.Contains(err.Error(), "lost") {
		t.Errorf("self-test of a lost GPU: %v", err)
	}
	s.remove("0.lost 1")
	if err := src.SelfTest(gpu0); err != nil {
		t.Errorf("self-test: %v", err)
	}
	if inv, err = src.Inventory(); err != nil || inv.Devices[0].Health.Healthy {
		t.Errorf("it is healthy by answering alone, %v", err)
	}
	src.Readmit(gpu0)
	if e := <-events; e.UUID != gpu0 || !e.Healthy {
		t.Errorf("event %+v", e)
	}
	s.add("event 0 8 79 4294967295 4294967295")
	if e := <-events; e.Healthy || e.XID != 79 {
		t.Errorf("event %+v", e)
	}
	if inv, err = src.Inventory(); err != nil || inv.Devices[0].Health.Healthy {
		t.Errorf("health %+v, %v", inv.Devices[0].Health, err)
	}
}

func TestSelfTest(t *testing.T) {
	s := newScript(t, twoGPUs+"0.remap.pending 0\n0.remap.failed 0\n")
	src := mustOpen(t)
	events := watch(t, src)
	src.Fail(gpu0, "found by an earlier agent")
	if e := <-events; e.UUID != gpu0 || e.Healthy || e.Reason != "found by an earlier agent" {
		t.Errorf("event %+v", e)
	}
	wants := func(uuid, reason string) {
		t.Helper()
		err := src.SelfTest(uuid)
		if (err == nil) != (reason == "") || err != nil && !strings.Contains(err.Error(), reason) {
			t.Errorf("self-test of %s: %v, want %q", uuid, err, reason)
		}
	}
	wants(gpu0, "")
	wants("MIG-a", "")
	wants("GPU-x", "no such device")
	change := func(from, to string) { s.remove(from); s.add(to) }
	change("0.ecc.1.total 1", "0.ecc.1.total 4")
	wants(gpu0, "3 more uncorrected ECC errors, now 4")
	wants(gpu0, "")
	change("0.remap.pending 0", "0.remap.pending 1")
	wants(gpu0, "reset the GPU")
	change("0.remap.failed 0", "0.remap.failed 1")
	wants(gpu0, "replace the GPU")
	change("0.remap.failed 1", "0.remap.failed 0")
	change("0.remap.pending 1", "0.remap.pending 0")
	s.add("0.pages.pending 1")
	wants(gpu0, "retired")
	s.remove("0.pages.pending 1")
	s.add("0.recovery 2")
	wants(gpu0, "reboot the node")
	s.remove("0.recovery 2")
	s.remove("0.uuid " + gpu0)
	s.add("0.uuid GPU-other")
	wants(gpu0, "GPU-other has taken its place")
}

// TestCountedErrors: what comes without an event is found by looking.
func TestCountedErrors(t *testing.T) {
	s := newScript(t, twoGPUs+"1.remap.failed 0\n")
	events := watch(t, mustOpen(t))
	s.remove("1.remap.failed 0")
	s.add("1.remap.failed 1")
	if e := <-events; e.UUID != gpu1 || e.Healthy || !strings.Contains(e.Reason, "remapping") { // so GPU 0 was counted before
		t.Errorf("event %+v", e)
	}
	s.remove("0.ecc.1.total 1")
	s.add("0.ecc.1.total 2")
	if e := <-events; e.UUID != gpu0 || e.Reason != "2 uncorrected ECC errors, 1 of them new" {
		t.Errorf("event %+v", e)
	}
}

func TestLinks(t *testing.T) {
	newScript(t, twoGPUs+"1.pci 00000000:0B:00.0\ntopology.0.1 30\ntopology.1.0 30\n")
	src := mustOpen(t)
	between := func(want int) {
		t.Helper()
		inv, err := src.Inventory()
		if err != nil || inv.Devices[0].Links[gpu1] != want || inv.Devices[1].Links[gpu0] != want {
			t.Errorf("links %v and %v, %v; want %d", inv.Devices[0].Links, inv.Devices[1].Links, err, want)
		}
	}
	between(linkHostBridge)
	s := newScript(t, twoGPUs+"1.pci 00000000:0B:00.0\ntopology.0.1 30\n0.nvlink.0 00000000:0B:00.0\n0.nvlink.1 00000000:0B:00.0\n1.nvlink.0 00000000:0A:00.0\n1.nvlink.1 00000000:0A:00.0\n")
	between(linkNVLink + 1)
	s.text = twoGPUs + "0.nvlink.0 switch\n0.nvlink.1 switch\n1.nvlink.0 switch\n"
	s.write()
	between(linkNVLink)
}

func TestLostFromTheStart(t *testing.T) {
	newScript(t, twoGPUs+"0.lost 1\n")
	inv, err := mustOpen(t).Inventory()
	if err != nil || len(inv.Devices) != 1 || len(inv.Warnings) != 1 || !strings.Contains(inv.Warnings[0], "GPU 0") {
		t.Errorf("inventory %+v, %v", inv, err)
	}
}

func TestEventsThatFailLeaveProbing(t *testing.T) {
	for _, line := range []string{"fail.nvmlEventSetCreate 3", "fail.nvmlEventSetWait_v2 999", "fail.nvmlDeviceRegisterEvents 3"} {
		t.Run(line, func(t *testing.T) {
			s := newScript(t, twoGPUs+line+"\n")
			events := watch(t, mustOpen(t))
			s.add("1.lost 1")
			if e := <-events; e.UUID != gpu1 || e.Healthy {
				t.Errorf("event %+v", e)
			}
		})
	}
}

func TestNewSlicesAreWatched(t *testing.T) {
	s := newScript(t, twoGPUs)
	src := mustOpen(t)
	events := watch(t, src)
	s.add("1.mig.3.uuid MIG-c")
	s.add("1.mig.3.gi 9")
	s.add("1.mig.3.ci 0")
	inv, err := src.Inventory()
	if err != nil || len(inv.Devices[1].Slices) != 3 {
		t.Fatalf("slices %+v, %v", inv.Devices[1].Slices, err)
	}
	s.add("event 1 8 95 9 0")
	if e := <-events; e.Healthy || e.XID != 95 || e.UUID != "MIG-c" {
		t.Errorf("event %+v", e)
	}
}

func TestOpenWithoutNVML(t *testing.T) {
	s := newScript(t, twoGPUs)
	notLibrary := filepath.Join(t.TempDir(), "libnvidia-ml.so.1")
	if err := os.WriteFile(notLibrary, []byte("text"), 0o644); err != nil {
		t.Fatal(err)
	}
	check := func(what, library, want string) {
		t.Helper()
		src, err := Open(Options{Library: library})
		if !errors.Is(err, ErrNoNVML) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", what, err)
		}
		if inv, err := src.Inventory(); err != nil || len(inv.Devices) > 0 {
			t.Errorf("%s: the source is not empty", what)
		}
	}
	check("no file", "/nowhere/libnvidia-ml.so.1", "No such file")
	check("no library", notLibrary, "libnvidia-ml.so.1")
	check("another library", fakeLibrary(t, "-DEMPTY"), "is not NVML")
	mustOpen(t)
	s.add("fail.nvmlInit_v2 9")
	check("no driver", sharedLibrary, "driver is not loaded")
	s.remove("fail.nvmlInit_v2 9")
	s.add("fail.nvmlInit_v2 18")
	check("driver upgraded", sharedLibrary, "reboot")
}

// TestLibraryLacksFunctions runs in a process of its own, because a call of a missing function would end it.
func TestLibraryLacksFunctions(t *testing.T) {
	newScript(t, twoGPUs)
	for _, build := range []string{"-DMINIMAL", "-DNEW"} {
		t.Run(build, func(t *testing.T) {
			cmd := exec.Command("/proc/self/exe", "-test.run=^TestInOtherLibrary$", "-test.v")
			cmd.Env = append(os.Environ(), envLibrary+"="+fakeLibrary(t, build))
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), "--- PASS: TestInOtherLibrary") {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

func TestInOtherLibrary(t *testing.T) {
	library := os.Getenv(envLibrary)
	if library == "" {
		t.Skip("started by TestLibraryLacksFunctions only")
	}
	src, err := Open(Options{Library: library, ProbeEvery: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	inv, err := src.Inventory()
	if err != nil || len(inv.Devices) != 2 || inv.Devices[0].UUID != gpu0 {
		t.Fatalf("inventory %+v, %v", inv, err)
	}
	all, err := src.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if modern := inv.Devices[0].MemoryMiB > 0; modern && (all[0].TemperatureC == nil || *all[0].TemperatureC != 55) {
		t.Errorf("temperature %v", all[0].TemperatureC)
	}
	stop := watchUntil(src, func(Event) {})
	if err := stop(); err != nil {
		t.Error(err)
	}
	if err := src.Close(); err != nil {
		t.Error(err)
	}
}

func TestNUMANodeFromKernel(t *testing.T) {
	sys := t.TempDir()
	dir := filepath.Join(sys, "bus/pci/devices/0000:0a:00.0")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "numa_node"), []byte("1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string]int{"00000000:0A:00.0": 1, "00000000:0B:00.0": -1, "": -1, "x:y": -1} {
		if got := numaNode(sys, id); got != want {
			t.Errorf("node of %q is %d, want %d", id, got, want)
		}
	}
}

func TestProfileOf(t *testing.T) {
	for _, c := range []struct {
		compute, gpu int
		slice, total int64
		want         string
	}{
		{1, 1, 4864, 40960, "1g.5gb"},
		{2, 2, 9856, 40960, "2g.10gb"},
		{1, 1, 9856, 81559, "1g.10gb"},
		{7, 7, 81153, 81559, "7g.80gb"},
		{1, 3, 40192, 81559, "1c.3g.40gb"},
		{1, 1, 16384, 0, "1g.16gb"},
	} {
		if got := profileOf(c.compute, c.gpu, c.slice, c.total); got != c.want {
			t.Errorf("%+v gives %s", c, got)
		}
	}
}
