package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/jobspec"
	"github.com/rxvision/rxvision/raftstore"
	"github.com/rxvision/rxvision/scheduler"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	gpuNode = "0a1b2c3d-0000-4000-8000-000000000001"
	cpuNode = "0f000000-0000-4000-8000-000000000002"
	region  = "global"
)

// world is one server as users have it: the real store, rules, scheduler and API.
// Only nodes are played, by good agents who start what they are told to.
type world struct {
	*testing.T
	store *raftstore.Store
	nodes *fakeNodes
	url   string
}

func newWorld(t *testing.T, change ...func(*api.Config)) *world {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	store, err := raftstore.Open(raftstore.Config{
		Dir: t.TempDir(), Bind: "127.0.0.1:0", Name: "s1", Version: "0.0.1-test", BootstrapExpect: 1, Logger: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	w := &world{T: t, store: store, nodes: &fakeNodes{root: t.TempDir()}}
	reg := prometheus.NewRegistry()
	sched, err := scheduler.New(scheduler.Config{Store: store, Logger: log, Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	w.background(sched.Run)
	w.background(w.agents)
	cfg := api.Config{
		Store: store, Nodes: w.nodes, Planner: planner{sched}, Archives: archives{store}, Models: newFakeModels(store), Servers: onDisk{store: store}, Collector: sched,
		ID: store.ID(), Name: "s1", Region: region, Datacenter: "dc1", Version: "0.0.1-test", Drivers: jobspec.Drivers(),
		Logger: log, Registry: reg,
	}
	for _, c := range change {
		c(&cfg)
	}
	srv := httptest.NewServer(api.New(cfg))
	t.Cleanup(srv.Close)
	w.url = srv.URL
	w.register(gpuNode, "gpu-host", 2)
	w.register(cpuNode, "cpu-host", 0)
	return w
}

// background runs until the test ends, and is waited for.
func (w *world) background(run func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx) }()
	w.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			w.Error(err)
		}
	})
}

func (w *world) apply(cmd cluster.Command) cluster.Result {
	w.Helper()
	res, err := w.store.Apply(context.Background(), cmd)
	if err != nil {
		w.Fatalf("%T: %v", cmd, err)
	}
	return res
}

func ptr[T any](v T) *T { return &v }

func (w *world) register(id, name string, gpus int) {
	n := &cluster.Node{
		ID: id, Name: name, Datacenter: "dc1", NodePool: "default", NodeClass: "test",
		Attributes: map[string]string{
			"unique.network.ip-address": "127.0.0.1", "os.name": "debian", "kernel.name": "linux", "nomad.version": "1.11.1",
			"unique.storage.volume": "/dev/vda",
		},
		Drivers: map[string]*cluster.DriverInfo{
			"raw_exec": {Detected: true, Healthy: true, HealthDescription: "Healthy", UpdateTime: cluster.TimeOf(time.Now())},
			"onnx":     {Detected: true, Healthy: true, HealthDescription: "Healthy", UpdateTime: cluster.TimeOf(time.Now())},
		},
		NodeResources: &cluster.NodeResources{
			Cpu: cluster.NodeCPU{CpuShares: 8000, TotalCpuCores: 4}, Memory: cluster.NodeMemory{MemoryMB: 16000}, Disk: cluster.NodeDisk{DiskMB: 100_000},
			Networks:       []*cluster.NetworkResource{{Mode: "host", Device: "lo", IP: "127.0.0.1", CIDR: "127.0.0.1/32"}},
			MinDynamicPort: 20000, MaxDynamicPort: 32000,
		},
	}
	if gpus > 0 {
		d := &cluster.NodeDeviceResource{Vendor: "nvidia", Type: "gpu", Name: "Test A10", Attributes: map[string]*cluster.Attribute{
			"memory": {Int: ptr(int64(23028)), Unit: "MiB"}, "driver_version": {String: ptr("999.1")}, "persistence": {Bool: ptr(true)},
		}}
		for i := range gpus {
			d.Instances = append(d.Instances, &cluster.NodeDevice{ID: gpuID(i), Healthy: true, Locality: &cluster.NodeDeviceLocality{PciBusID: "0000:01:00.0"}})
		}
		n.NodeResources.Devices = []*cluster.NodeDeviceResource{d}
	}
	w.apply(&cluster.RegisterNode{Node: n})
}

func gpuID(i int) string { return "GPU-0000000" + string(rune('0'+i)) }

// agents starts what is pending and ends what is to stop.
func (w *world) agents(ctx context.Context) error {
	for {
		snap, ws := w.store.State().Snapshot(), make(cluster.WatchSet)
		ws.Add(snap.Abandoned())
		for _, a := range snap.Allocs(ws, "") {
			u := &cluster.Allocation{ID: a.ID, Epoch: a.Epoch, ClientDescription: "Tasks are running"}
			now := cluster.TimeOf(time.Now())
			state := &cluster.TaskState{State: cluster.TaskStateRunning, StartedAt: now}
			event := func(kind, text string) {
				state.Events = append(state.Events, &cluster.TaskEvent{Type: kind, Time: int64(now), DisplayMessage: text})
			}
			event("Received", "Task received by client")
			event("Started", "Task started by client")
			switch {
			case a.ClientTerminal(), a.ClientStatus == cluster.AllocClientRunning && !a.ServerTerminal() && judged(snap, a):
				continue
			case a.ServerTerminal():
				u.ClientStatus, u.ClientDescription = cluster.AllocClientComplete, "All tasks have completed"
				state.State, state.FinishedAt = cluster.TaskStateDead, now
				event("Killed", "Task successfully killed")
			default:
				u.ClientStatus = cluster.AllocClientRunning
				if !judged(snap, a) {
					u.DeploymentStatus = &cluster.AllocDeploymentStatus{Healthy: ptr(true)}
				}
			}
			u.TaskStates = map[string]*cluster.TaskState{}
			for name := range a.AllocatedResources.Tasks {
				u.TaskStates[name] = state
			}
			if _, err := w.store.Apply(ctx, &cluster.UpdateAllocs{NodeID: a.NodeID, Allocs: []*cluster.Allocation{u}}); err != nil {
				return err
			}
		}
		if err := ws.WatchCtx(ctx); err != nil {
			return nil
		}
	}
}

// judged says whether a deployment knows the allocation's health, if one asks, or leaves it to an operator.
func judged(snap *cluster.Snapshot, a *cluster.Allocation) bool {
	if j := snap.JobVersion(nil, a.JobKey(), a.JobVersion); j != nil {
		if u := j.Group(a.TaskGroup).Update; u != nil && u.HealthCheck == "manual" {
			return true
		}
	}
	return a.DeploymentID == "" || a.DeploymentStatus != nil && a.DeploymentStatus.Healthy != nil
}

// until waits for a condition of the state.
func (w *world) until(what string, holds func(*cluster.Snapshot) bool) *cluster.Snapshot {
	w.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for {
		snap, ws := w.store.State().Snapshot(), make(cluster.WatchSet)
		snap.Index(ws)
		if holds(snap) {
			return snap
		}
		if err := ws.WatchCtx(ctx); err != nil {
			w.Fatalf("never came true: %s", what)
		}
	}
}

// settled waits until a job has that many running allocations and nothing is pending.
func (w *world) settled(job string, running int) *cluster.Snapshot {
	w.Helper()
	key := cluster.JobKey{Namespace: "default", ID: job}
	return w.until("job "+job+" has settled", func(snap *cluster.Snapshot) bool {
		n := 0
		for _, a := range snap.AllocsByJob(nil, key) {
			switch {
			case a.ServerTerminal() != a.ClientTerminal() && a.ClientStatus != cluster.AllocClientComplete:
				return false
			case a.ClientStatus == cluster.AllocClientRunning:
				n++
			case a.ClientStatus == cluster.AllocClientPending:
				return false
			}
		}
		for _, e := range snap.EvalsByJob(nil, key) {
			if e.Status == cluster.EvalStatusPending {
				return false
			}
		}
		d := snap.LatestDeployment(nil, key)
		return n == running && (d == nil || !d.Active() || running == 0)
	})
}

// planner is the scheduler's, as the program wires it.
type planner struct{ sched *scheduler.Scheduler }

func (planner) WhatIf(_ context.Context, snap *cluster.Snapshot, j *cluster.Job) (*cluster.Explanation, error) {
	return new(scheduler.DryRuns).WhatIf(snap, j, cluster.TimeOf(time.Now()))
}

func (p planner) Explain(_ context.Context, snap *cluster.Snapshot, key cluster.JobKey) (_ *cluster.Explanation, err error) {
	x := new(scheduler.DryRuns).Explain(snap, key, cluster.TimeOf(time.Now()))
	if x != nil && p.sched != nil {
		x.Queue, err = p.sched.Position(key)
	}
	return x, err
}

func (planner) DryRun(_ context.Context, snap *cluster.Snapshot, j *cluster.Job) (*api.DryRun, error) {
	res, err := scheduler.DryRun(snap, j, cluster.TimeOf(time.Now()))
	if err != nil {
		return nil, err
	}
	dry := &api.DryRun{Annotations: res.Annotations, Failed: res.Failed}
	for _, e := range res.Plan.Evals {
		if e.ID != res.Plan.EvalID {
			dry.Evals = append(dry.Evals, e)
		}
	}
	return dry, nil
}

type archives struct{ store *raftstore.Store }

func (a archives) Save(ctx context.Context) (*api.Archive, error) {
	saved, err := a.store.SaveArchive(ctx)
	if err != nil {
		return nil, err
	}
	return &api.Archive{ReadCloser: saved, Length: saved.Length, Digest: saved.Digest}, nil
}

func (a archives) Restore(ctx context.Context, r io.Reader) error {
	_, err := a.store.RestoreArchive(ctx, r)
	return err
}

// onDisk is the region of a real store.
type onDisk struct {
	oneServer
	store *raftstore.Store
}

func (o onDisk) Peers() ([]api.Peer, uint64, error) {
	servers, index, err := o.store.Servers()
	var out []api.Peer
	for _, s := range servers {
		out = append(out, api.Peer{
			ID: s.ID, Name: s.Name, Region: region, Datacenter: "dc1", Version: "0.0.1-test", Address: s.Address, Status: "alive",
			Leader: s.Leader, Voter: s.Voter, Member: true,
		})
	}
	return out, index, err
}

// fakeNodes answers calls to nodes out of a folder, whatever the allocation.
type fakeNodes struct {
	root string
	mu   sync.Mutex
	log  []string // what restart and signal were asked
	err  error    // given by Restart
}

func (n *fakeNodes) Logs(_ context.Context, _ string, req api.LogsRequest) (api.Frames, error) {
	name := "alloc/logs/" + req.Task + "." + req.Type + ".0"
	return n.open(name, req.Origin, req.Offset, -1, req.Follow)
}

func (n *fakeNodes) File(_ context.Context, _ string, req api.FileRequest) (api.Frames, error) {
	type info struct {
		Name     string
		IsDir    bool
		Size     int64
		FileMode string
		ModTime  time.Time
	}
	of := func(s os.FileInfo) info { return info{s.Name(), s.IsDir(), s.Size(), s.Mode().String(), s.ModTime()} }
	path := filepath.Join(n.root, filepath.Clean("/"+req.Path))
	var out any
	switch req.Op {
	case "stat":
		s, err := os.Stat(path)
		if err != nil {
			return nil, cluster.Errorf(cluster.CodeNotFound, "%v", err)
		}
		out = of(s)
	case "ls":
		entries, err := os.ReadDir(path)
		if err != nil {
			return nil, cluster.Errorf(cluster.CodeNotFound, "%v", err)
		}
		var list []info
		for _, e := range entries {
			s, err := e.Info()
			if err != nil {
				return nil, err
			}
			list = append(list, of(s))
		}
		out = list
	default:
		return n.open(req.Path, req.Origin, req.Offset, req.Limit, req.Follow)
	}
	b, err := json.Marshal(out)
	return newFrames(b, "", 0, false), err
}

func (n *fakeNodes) open(name, origin string, offset, limit int64, follow bool) (api.Frames, error) {
	b, err := os.ReadFile(filepath.Join(n.root, name))
	if err != nil {
		return nil, cluster.Errorf(cluster.CodeNotFound, "%v", err)
	}
	size := int64(len(b))
	if origin == "end" {
		offset = max(0, size-offset)
	}
	offset = min(offset, size)
	end := size
	if limit >= 0 {
		end = min(end, offset+limit)
	}
	return newFrames(b[offset:end], name, end, follow), nil
}

func (n *fakeNodes) write(t *testing.T, name, text string) {
	t.Helper()
	path := filepath.Join(n.root, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func (n *fakeNodes) NodeStats(_ context.Context, node string) (json.RawMessage, error) {
	devices := "null"
	if node == gpuNode {
		devices = `[{"Vendor":"nvidia","Type":"gpu","Name":"Test A10","InstanceStats":{"` + gpuID(0) + `":{
			"Summary":{"IntNumeratorVal":512,"IntDenominatorVal":23028,"Unit":"MiB","Desc":"Memory in use"},
			"Stats":{"Attributes":{"Temperature":{"IntNumeratorVal":41,"Unit":"C"}}},"Timestamp":"2026-01-02T03:04:05Z"}}}]`
	}
	return json.RawMessage(`{"Uptime":1553,"Timestamp":1795383909481476750,"CPUTicksConsumed":120.5,"CPU":[{"CPU":"cpu0","Idle":97.0,"System":1.0,"User":2.0}],
		"Memory":{"Total":16777216000,"Used":401997824,"Available":16000000000,"Free":15830024192},
		"DiskStats":[{"Device":"/dev/vda","Mountpoint":"/","Size":270553174016,"Used":34935615488,"Available":62857678848,"UsedPercent":35.7,"InodesUsedPercent":5.6}],
		"DeviceStats":` + devices + `}`), nil
}

const taskUsage = `{"CpuStats":{"Measured":["Percent"],"Percent":0.5,"TotalTicks":12.0},"MemoryStats":{"Measured":["RSS"],"RSS":19492864},"DeviceStats":[]}`

func (n *fakeNodes) Checks(context.Context, string, string) (json.RawMessage, error) {
	return json.RawMessage(`{}`), nil
}

func (n *fakeNodes) AllocStats(context.Context, string, string, string) (json.RawMessage, error) {
	return json.RawMessage(`{"ResourceUsage":` + taskUsage + `,"Tasks":{"t":{"ResourceUsage":` + taskUsage + `,"Timestamp":1,"Pids":null}},"Timestamp":1}`), nil
}

func (n *fakeNodes) note(what string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.log = append(n.log, what)
	return n.err
}

func (n *fakeNodes) asked() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return strings.Join(n.log, ", ")
}

func (n *fakeNodes) Restart(_ context.Context, _ string, req api.RestartRequest) error {
	return n.note("restart " + req.Task)
}

func (n *fakeNodes) Signal(_ context.Context, _ string, req api.SignalRequest) error {
	return n.note("signal " + req.Task + " " + req.Signal)
}

// frames gives its data at once; a followed one then waits until it is closed.
type frames struct {
	frame  *api.Frame
	follow bool
	once   sync.Once
	closed chan struct{}
}

func newFrames(data []byte, file string, offset int64, follow bool) *frames {
	return &frames{frame: &api.Frame{Data: data, File: file, Offset: offset}, follow: follow, closed: make(chan struct{})}
}

func (f *frames) Next() (api.Frame, error) {
	if f.frame != nil && len(f.frame.Data) > 0 {
		out := *f.frame
		f.frame = nil
		return out, nil
	}
	if f.follow {
		<-f.closed
		return api.Frame{}, context.Canceled
	}
	return api.Frame{}, io.EOF
}

func (f *frames) Close() { f.once.Do(func() { close(f.closed) }) }
