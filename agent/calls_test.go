package agent

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rxvision/rxvision/agent/gpu"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

func TestLogsFollow(t *testing.T) {
	s := newFleetServer(t)
	a := startAgent(t, testConfig(t, s))
	halting(t, s, a)
	start := filepath.Join(t.TempDir(), "go")
	j, alloc := service(t, shell("t", `echo first; while [ ! -e `+start+` ]; do sleep 0.05; done; echo second`))
	j.Type = cluster.JobTypeBatch
	s.run(j, alloc)
	waitLog(t, s, "t", "first\n")
	ch := s.call(t, logsCall("t", true))
	var got strings.Builder
	var last *pb.AnswerChunk
	for c := range ch {
		if c.Error != nil {
			t.Fatal(c.Error)
		}
		got.Write(c.Data)
		if len(c.Data) > 0 {
			last = c
		}
		if got.String() == "first\n" {
			if err := os.WriteFile(start, nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got.String() != "first\nsecond\n" || last.File != "alloc/logs/t.stdout.0" || last.Offset != 13 {
		t.Errorf("got %q, last %+v", got.String(), last)
	}
}

func TestLogsOfManyFiles(t *testing.T) {
	s := newFleetServer(t)
	a := startAgent(t, testConfig(t, s))
	halting(t, s, a)
	// 2.5 MiB in files of 1 MiB: three files, lines of 64 bytes.
	j, alloc := service(t, shell("t", `i=0; while [ $i -lt 40960 ]; do printf '%063d\n' $i; i=$((i+1)); done`))
	j.Type = cluster.JobTypeBatch
	s.run(j, alloc)
	s.waitStatus(t, allocID, cluster.AllocClientComplete)
	logs := func(origin string, offset int64) ([]byte, []*pb.AnswerChunk) {
		b, chunks, err := s.ask(t, &pb.Call{Request: &pb.Call_Logs{Logs: &pb.LogsRequest{AllocId: allocID, Task: "t", Type: "stdout", Origin: origin, Offset: offset}}})
		if err != nil {
			t.Fatal(err)
		}
		return b, chunks
	}
	all, chunks := logs("start", 0)
	if len(all) != 40960*64 {
		t.Fatalf("%d bytes, want %d", len(all), 40960*64)
	}
	files := map[string]bool{}
	for _, c := range chunks {
		if len(c.Data) > maxFrame {
			t.Errorf("a frame of %d bytes", len(c.Data))
		}
		files[c.File] = true
	}
	if len(files) != 3 {
		t.Errorf("files %v", files)
	}
	for i := range 40960 {
		if want := fmt.Sprintf("%063d\n", i); string(all[i*64:(i+1)*64]) != want {
			t.Fatalf("line %d is %q", i, all[i*64:(i+1)*64])
		}
	}
	for _, c := range []struct {
		origin string
		offset int64
		want   int
	}{{"start", 64, 40959 * 64}, {"end", 128, 128}, {"end", 2 << 20, 2 << 20}, {"end", 1 << 40, 40960 * 64}, {"start", 1 << 40, 0}} {
		if b, _ := logs(c.origin, c.offset); len(b) != c.want || string(b) != string(all[len(all)-c.want:]) {
			t.Errorf("%s %d: %d bytes, want %d", c.origin, c.offset, len(b), c.want)
		}
	}
}

func TestLogFaults(t *testing.T) {
	s := newFleetServer(t)
	a := startAgent(t, testConfig(t, s))
	halting(t, s, a)
	j, alloc := service(t, shell("t", "exec sleep 600"))
	s.run(j, alloc)
	s.waitStatus(t, allocID, cluster.AllocClientRunning)
	for _, c := range []struct {
		q    *pb.LogsRequest
		code cluster.Code
		text string
	}{
		{&pb.LogsRequest{AllocId: "ffffffff-ffff-ffff-ffff-ffffffffffff", Task: "t", Type: "stdout"}, cluster.CodeNotFound, `Unknown allocation "ffffffff-ffff-ffff-ffff-ffffffffffff"`},
		{&pb.LogsRequest{AllocId: allocID, Type: "stdout"}, cluster.CodeInvalid, "must provide task name"},
		{&pb.LogsRequest{AllocId: allocID, Task: "x", Type: "stdout"}, cluster.CodeNotFound, `unknown task name "x"`},
		{&pb.LogsRequest{AllocId: allocID, Task: "t", Type: "all"}, cluster.CodeInvalid, `log type "all"`},
		{&pb.LogsRequest{AllocId: allocID, Task: "t", Type: "stdout", Origin: "middle"}, cluster.CodeInvalid, `origin "middle"`},
	} {
		_, _, err := s.ask(t, &pb.Call{Request: &pb.Call_Logs{Logs: c.q}})
		if cluster.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%+v: %v (%s)", c.q, err, cluster.CodeOf(err))
		}
	}
}

func TestFiles(t *testing.T) {
	s := newFleetServer(t)
	a := startAgent(t, testConfig(t, s))
	halting(t, s, a)
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, []byte("outside"), 0o644); err != nil {
		t.Fatal(err)
	}
	x := shell("t", `printf 0123456789 > local/f; echo s > secrets/key; ln -s `+outside+` local/out; ln -s ../secrets/key local/key; ln -s f local/same; mkfifo local/pipe; ln -s /proc/self/environ local/env; echo up; exec sleep 600`)
	j, alloc := service(t, x)
	s.run(j, alloc)
	waitLog(t, s, "t", "up\n")
	ask := func(op, path string, more ...func(*pb.FileRequest)) ([]byte, error) {
		q := &pb.FileRequest{AllocId: allocID, Op: op, Path: path}
		for _, f := range more {
			f(q)
		}
		b, _, err := s.ask(t, &pb.Call{Request: &pb.Call_File{File: q}})
		return b, err
	}
	must := func(b []byte, err error) string {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	var info fileInfo
	if err := json.Unmarshal([]byte(must(ask("stat", "/"))), &info); err != nil || !info.IsDir || info.Name != allocID {
		t.Errorf("stat /: %+v %v", info, err)
	}
	if err := json.Unmarshal([]byte(must(ask("stat", "t/local/f"))), &info); err != nil || info.Size != 10 || info.FileMode != "-rw-r--r--" || !strings.HasPrefix(info.ContentType, "text/plain") {
		t.Errorf("stat f: %+v %v", info, err)
	}
	var entries []fileInfo
	if err := json.Unmarshal([]byte(must(ask("ls", ""))), &entries); err != nil || len(entries) != 2 {
		t.Errorf("ls /: %+v %v", entries, err)
	}
	at := func(offset, limit int64) func(*pb.FileRequest) {
		return func(q *pb.FileRequest) { q.Offset, q.Limit = offset, limit }
	}
	fromEnd := func(q *pb.FileRequest) { q.Origin = "end" }
	for _, c := range []struct{ got, want string }{
		{must(ask("read", "t/local/f")), "0123456789"},
		{must(ask("read", "/t/local/../local/same", at(3, 4))), "3456"},
		{must(ask("read", "t/local/f", at(8, -1))), "89"},
		{must(ask("read", "t/local/f", at(99, 0))), ""},
		{must(ask("stream", "t/local/f", at(4, 0), fromEnd)), "6789"},
	} {
		if c.got != c.want {
			t.Errorf("got %q, want %q", c.got, c.want)
		}
	}
	for _, c := range []struct {
		op, path string
		code     cluster.Code
	}{
		{"read", "t/local/out", cluster.CodeForbidden},        // leads out
		{"read", "t/local/env", cluster.CodeForbidden},        // … to the agent's environment
		{"read", "t/secrets/key", cluster.CodeForbidden},      // secret
		{"ls", "t/secrets", cluster.CodeForbidden},            // …
		{"read", "t/local/key", cluster.CodeForbidden},        // … by another name
		{"read", "../../../etc/passwd", cluster.CodeNotFound}, // below the directory
		{"read", "t/local/none", cluster.CodeNotFound},
		{"read", "t/local", cluster.CodeInvalid},
		{"read", "t/local/pipe", cluster.CodeInvalid},
		{"ls", "t/local/f", cluster.CodeInvalid},
		{"write", "t/local/f", cluster.CodeUnsupported},
	} {
		if b, err := ask(c.op, c.path); cluster.CodeOf(err) != c.code {
			t.Errorf("%s %s: %q, %v (%s), want %s", c.op, c.path, b, err, cluster.CodeOf(err), c.code)
		} else if strings.Contains(err.Error(), a.cfg.DataDir) {
			t.Errorf("%s %s tells where the agent keeps its data: %v", c.op, c.path, err)
		}
	}
}

func TestFileStreamFollows(t *testing.T) {
	s := newFleetServer(t)
	a := startAgent(t, testConfig(t, s))
	halting(t, s, a)
	j, alloc := service(t, shell("t", "exec sleep 600"))
	s.run(j, alloc)
	s.waitStatus(t, allocID, cluster.AllocClientRunning)
	file := filepath.Join(a.allocRoot, allocID, "t", "local", "f")
	write := func(text string, flag int) {
		f, err := os.OpenFile(file, flag|os.O_CREATE|os.O_WRONLY, 0o644)
		if err == nil {
			_, err = f.WriteString(text)
			f.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	write("one", 0)
	ch := s.call(t, &pb.Call{Request: &pb.Call_File{File: &pb.FileRequest{AllocId: allocID, Op: "stream", Path: "t/local/f", Follow: true}}})
	next := func() *pb.AnswerChunk {
		for c := range ch {
			if len(c.Data) > 0 || c.FileEvent != "" || c.Error != nil {
				return c
			}
		}
		t.Fatal("the stream ended")
		return nil
	}
	if c := next(); string(c.Data) != "one" || c.Offset != 3 || c.File != "t/local/f" {
		t.Errorf("got %+v", c)
	}
	write("two", os.O_APPEND)
	if c := next(); string(c.Data) != "two" || c.Offset != 6 {
		t.Errorf("got %+v", c)
	}
	write("3", os.O_TRUNC)
	if c := next(); c.FileEvent != "file truncated" {
		t.Errorf("got %+v", c)
	}
	if c := next(); string(c.Data) != "3" || c.Offset != 1 {
		t.Errorf("got %+v", c)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if c := next(); c.FileEvent != "file deleted" {
		t.Errorf("got %+v", c)
	}
}

func exampleGPUs() gpu.Inventory {
	device := func(i int) gpu.Device {
		return gpu.Device{
			UUID: fmt.Sprintf("GPU-%d", i), Index: i, Model: "NVIDIA H100 80GB HBM3", MemoryMiB: 81559, PCIBusID: fmt.Sprintf("0000:0%d:00.0", i),
			NUMANode: -1, Health: gpu.Health{Healthy: true},
		}
	}
	return gpu.Inventory{DriverVersion: "550.54.15", CUDAVersion: "12.4", Devices: []gpu.Device{device(0), device(1)}}
}

func TestGPUs(t *testing.T) {
	s := newFleetServer(t)
	cfg := testConfig(t, s)
	fake := gpu.NewFake(exampleGPUs())
	used, total, busy := int64(1000), int64(81559), int64(40)
	stat := func(id string) gpu.Stats {
		return gpu.Stats{UUID: id, UsedMiB: &used, MemoryMiB: &total, GPUPercent: &busy}
	}
	fake.SetStats(stat("GPU-0"), stat("GPU-1"))
	cfg.GPUs = fake
	a := startAgent(t, cfg)
	halting(t, s, a)
	s.wait(t, "the node", func() bool { return s.node != nil })
	d := s.node.NodeResources.Devices
	if len(d) != 1 || d[0].ID() != "nvidia/gpu/NVIDIA H100 80GB HBM3" || len(d[0].Instances) != 2 || d[0].Instances[0].ID != "GPU-0" ||
		!d[0].Instances[0].Healthy || d[0].Instances[0].Locality.PciBusID != "0000:00:00.0" || *d[0].Attributes["memory"].Int != 81559 {
		t.Errorf("devices %+v", d)
	}
	if s.node.Attributes["nvidia.driver_version"] != "550.54.15" {
		t.Errorf("attributes %v", s.node.Attributes)
	}
	healthy := func(want bool) func() bool {
		return func() bool { return s.node.NodeResources.Devices[0].Instances[1].Healthy == want }
	}
	var before uint64
	s.change(func() { before = s.node.Revision })
	fake.XID("GPU-1", 79)
	s.wait(t, "the sick GPU", healthy(false))
	if after := s.node.Revision; before == 0 || after <= before {
		t.Errorf("the sick GPU came with revision %x after %x: the servers would take it for an older word", after, before)
	}
	if got := s.node.NodeResources.Devices[0].Instances[1].HealthDescription; !strings.Contains(got, "79") {
		t.Errorf("reason %q", got)
	}
	fake.Readmit("GPU-1")
	s.wait(t, "the healed GPU", healthy(true))

	j, alloc := service(t, shell("t", `echo $NVIDIA_VISIBLE_DEVICES $CUDA_VISIBLE_DEVICES; exec sleep 600`))
	alloc.AllocatedResources.Tasks["t"].Devices = []*cluster.AllocatedDevice{{Vendor: "nvidia", Type: "gpu", Name: d[0].Name, DeviceIDs: []string{"GPU-1"}}}
	s.run(j, alloc)
	waitLog(t, s, "t", "GPU-1 GPU-1\n")

	var node hostStats
	b, _, err := s.ask(t, &pb.Call{Request: &pb.Call_NodeStats{NodeStats: &pb.NodeStatsRequest{}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &node); err != nil || len(node.DeviceStats) != 1 || len(node.DeviceStats[0].InstanceStats) != 2 {
		t.Errorf("node statistics %s, %v", b, err)
	}
	if got := node.DeviceStats[0].InstanceStats["GPU-0"].Summary; *got.IntNumeratorVal != 1000 || *got.IntDenominatorVal != 81559 || got.Unit != "MiB" {
		t.Errorf("summary %+v", got)
	}
	var use allocUsage
	b, _, err = s.ask(t, &pb.Call{Request: &pb.Call_AllocStats{AllocStats: &pb.AllocStatsRequest{AllocId: allocID}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &use); err != nil {
		t.Fatal(err)
	}
	ds := use.Tasks["t"].ResourceUsage.DeviceStats
	if len(ds) != 1 || len(ds[0].InstanceStats) != 1 || ds[0].InstanceStats["GPU-1"] == nil {
		t.Errorf("a task's statistics show other devices: %s", b)
	}
}

func TestStatistics(t *testing.T) {
	s := newFleetServer(t)
	a := startAgent(t, testConfig(t, s))
	halting(t, s, a)
	j, alloc := service(t, shell("t", `echo up; while :; do :; done`))
	s.run(j, alloc)
	waitLog(t, s, "t", "up\n")
	var use allocUsage
	waitFor(t, "the task's use", func() bool {
		b, _, err := s.ask(t, &pb.Call{Request: &pb.Call_AllocStats{AllocStats: &pb.AllocStatsRequest{AllocId: allocID}}})
		if err != nil || json.Unmarshal(b, &use) != nil {
			t.Fatal(err)
		}
		u := use.Tasks["t"]
		return u != nil && u.ResourceUsage.MemoryStats.RSS > 0 && u.ResourceUsage.CpuStats.TotalTicks > 0
	})
	if use.ResourceUsage.MemoryStats.RSS == 0 || use.ResourceUsage.CpuStats.Percent == 0 || use.Timestamp == 0 {
		t.Errorf("the sum %+v", use.ResourceUsage)
	}
	b, _, err := s.ask(t, &pb.Call{Request: &pb.Call_NodeStats{NodeStats: &pb.NodeStatsRequest{}}})
	if err != nil {
		t.Fatal(err)
	}
	var node hostStats
	if err := json.Unmarshal(b, &node); err != nil {
		t.Fatal(err)
	}
	if node.Memory.Total == 0 || node.Memory.Used == 0 || node.Uptime == 0 || len(node.CPU) == 0 || node.AllocDirStats.Size == 0 || node.DiskStats[0].Mountpoint == "" {
		t.Errorf("node statistics %s", b)
	}
	_, _, err = s.ask(t, &pb.Call{Request: &pb.Call_AllocStats{AllocStats: &pb.AllocStatsRequest{AllocId: "x"}}})
	if cluster.CodeOf(err) != cluster.CodeNotFound {
		t.Errorf("statistics of nothing: %v", err)
	}
}

func TestNodeRecord(t *testing.T) {
	s := newFleetServer(t)
	cfg := testConfig(t, s)
	cfg.GPUs, cfg.Meta, cfg.NodeClass, cfg.ReservedMemoryMB = nil, map[string]string{"rack": "r1"}, "big", 64
	a := startAgent(t, cfg)
	s.wait(t, "the node", func() bool { return s.node != nil })
	n := s.node
	if n.ID != a.NodeID() || len(n.ID) != 36 || n.Name != "here" || n.Datacenter != "dc1" || n.NodePool != "default" || n.NodeClass != "big" || n.Meta["rack"] != "r1" {
		t.Errorf("node %+v", n)
	}
	r := n.NodeResources
	if r.Cpu.CpuShares <= 0 || r.Memory.MemoryMB <= 0 || r.Disk.DiskMB <= 0 || r.MinDynamicPort != 20000 || r.MaxDynamicPort != 32000 ||
		len(r.Networks) != 1 || r.Networks[0].IP != "127.0.0.1" || n.ReservedResources.Memory.MemoryMB != 64 {
		t.Errorf("resources %+v", r)
	}
	for _, k := range []string{
		"kernel.name", "kernel.version", "cpu.arch", "cpu.numcores", "cpu.totalcompute", "memory.totalbytes", "os.name", "unique.hostname",
		"unique.storage.volume", "os.cgroups.version", "driver.raw_exec", "driver.onnx", "rx.reattach", "rx.limits",
	} {
		if n.Attributes[k] == "" {
			t.Errorf("no attribute %s", k)
		}
	}
	if d := n.Drivers["raw_exec"]; d == nil || !d.Healthy || d.UpdateTime == 0 {
		t.Errorf("raw_exec %+v", d)
	}
	if len(n.NodeResources.Devices) == 0 {
		if got := a.log.count("CPU-only node"); got != 1 {
			t.Errorf("%d lines say that the node is CPU-only", got)
		}
	}
	a.stop()
	if again := startAgent(t, cfg); again.NodeID() != n.ID {
		t.Error("the node has a new identity after a restart")
	}
}
