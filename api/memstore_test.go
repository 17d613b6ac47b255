package api_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	nomad "github.com/hashicorp/nomad/api"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/rxvision/rxvision/api"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/jobspec"
)

// memStore is the real state without a log: tests of the wire decide what is in
// it, at which index, and who leads.
type memStore struct {
	tb     testing.TB
	mu     sync.Mutex
	state  *cluster.State
	index  uint64
	leader string
}

func (s *memStore) Apply(_ context.Context, cmd cluster.Command) (cluster.Result, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leader == "" {
		return cluster.Result{}, cluster.ErrNoLeader
	}
	s.index++
	stamp := cluster.StampOf(cmd)
	stamp.RequestID, stamp.Time = fmt.Sprintf("request-%d", s.index), time.Now().UnixNano()
	res, err := s.state.Apply(s.index, cluster.EncodeCommand(cmd))
	if err != nil {
		s.tb.Errorf("apply %T: %v", cmd, err)
		return res, err
	}
	if res.Err != nil {
		return res, res.Err
	}
	return res, nil
}

func (s *memStore) State() *cluster.State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

func (s *memStore) ReadIndex(ctx context.Context, _ bool) error {
	for s.name() == "" {
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return cluster.ErrNoLeader
		}
	}
	return nil
}

func (s *memStore) IsLeader() bool { return s.name() == "me" }

func (s *memStore) Leader() (string, string) {
	if s.name() == "" {
		return "", ""
	}
	return s.name(), "127.0.0.1:7648"
}

func (s *memStore) name() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leader
}

func (s *memStore) lead(leader string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leader = leader
}

func (s *memStore) NoLeader() error { return cluster.ErrNoLeader }

func (s *memStore) LastContact() time.Duration {
	if s.IsLeader() {
		return 0
	}
	return 1234 * time.Millisecond
}

func (s *memStore) Stats() map[string]string { return map[string]string{"state": "Leader"} }

// oneServer is a region of one server, which cannot be removed.
type oneServer struct{}

func (oneServer) Peers() ([]api.Peer, uint64, error) {
	return []api.Peer{{
		ID: "me", Name: "s1", Region: region, Datacenter: "dc1", Version: "0.0.1-test", Address: "127.0.0.1:7648", Status: "alive",
		Leader: true, Voter: true, Member: true,
	}}, 1, nil
}

func (oneServer) Remove(context.Context, string) error {
	return cluster.Errorf(cluster.CodeConflict, "it is the only server")
}

func (oneServer) Leave(context.Context) error {
	return cluster.Errorf(cluster.CodeConflict, "it is the only server")
}

func (oneServer) Transfer(context.Context, string) error {
	return cluster.Errorf(cluster.CodeConflict, "it is the only server")
}

func (oneServer) Health(context.Context) (*api.ServersHealth, error) {
	return &api.ServersHealth{Healthy: true, Leader: "me", Voters: []string{"me"}, Servers: []api.PeerHealth{{
		ID: "me", Name: "s1", Address: "127.0.0.1:7648", SerfStatus: "alive", Leader: true, Healthy: true, Voter: true,
	}}}, nil
}

func (oneServer) Disk() error { return nil }

// wire is an API over a memStore.
type wire struct {
	*testing.T
	store  *memStore
	nodes  *fakeNodes
	server *api.Server
	url    string
}

func newWire(t *testing.T, change ...func(*api.Config)) *wire {
	w := newServer(t, change...)
	srv := httptest.NewServer(w.server)
	t.Cleanup(func() {
		http.DefaultClient.CloseIdleConnections()
		srv.Close()
	})
	w.url = srv.URL
	return w
}

// newServer is newWire without a listener.
func newServer(t *testing.T, change ...func(*api.Config)) *wire {
	store := &memStore{tb: t, state: cluster.NewState(), leader: "me"}
	nodes := &fakeNodes{root: t.TempDir()}
	cfg := api.Config{
		Store: store, Nodes: nodes, Planner: planner{}, Models: newFakeModels(store),
		Servers: oneServer{},
		ID:      "me", Name: "s1", Region: region, Datacenter: "dc1", Version: "0.0.1-test", Drivers: jobspec.Drivers(),
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)), Registry: prometheus.NewRegistry(), LeaderWait: 100 * time.Millisecond,
	}
	for _, c := range change {
		c(&cfg)
	}
	t.Cleanup(func() {
		if err := store.State().Snapshot().Check(); err != nil {
			t.Error(err)
		}
	})
	return &wire{T: t, store: store, nodes: nodes, server: api.New(cfg)}
}

func (w *wire) apply(cmd cluster.Command) cluster.Result {
	w.Helper()
	res, err := w.store.Apply(context.Background(), cmd)
	if err != nil {
		w.Fatalf("%T: %v", cmd, err)
	}
	return res
}

// knows registers a server that knows the rules up to a version.
func (w *wire) knows(id string, rules uint64) {
	w.Helper()
	w.apply(&cluster.RegisterServer{Server: &cluster.Server{ID: id, RaftAddr: id + ":1", Rules: rules}})
}

// reply is an answer read whole.
type reply struct {
	status int
	header http.Header
	body   string
}

func (w *wire) do(method, path, body string, header ...string) reply {
	w.Helper()
	req, err := http.NewRequest(method, w.url+path, strings.NewReader(body))
	if err != nil {
		w.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	return w.send(req)
}

func (w *wire) send(req *http.Request) reply {
	w.Helper()
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		w.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		w.Fatal(err)
	}
	return reply{res.StatusCode, res.Header, string(b)}
}

func (w *wire) get(path string) reply {
	w.Helper()
	return w.do(http.MethodGet, path, "")
}

// wants checks status and body.
func (w *wire) wants(what string, r reply, status int, body string) {
	w.Helper()
	if r.status != status || r.body != body {
		w.Errorf("%s: %d %q, want %d %q", what, r.status, r.body, status, body)
	}
}

// decoded reads the answer of a 200 into v.
func (w *wire) decoded(r reply, v any) {
	w.Helper()
	if r.status != http.StatusOK {
		w.Fatalf("status %d: %s", r.status, r.body)
	}
	if err := json.NewDecoder(strings.NewReader(r.body)).Decode(v); err != nil {
		w.Fatalf("%v in %s", err, r.body)
	}
}

// ids gives one field of each object of a list.
func (w *wire) ids(r reply, field string) string {
	w.Helper()
	var list []map[string]any
	w.decoded(r, &list)
	var out []string
	for _, o := range list {
		out = append(out, fmt.Sprint(o[field]))
	}
	return strings.Join(out, " ")
}

func (w *wire) client() *nomad.Client {
	w.Helper()
	c, err := nomad.NewClient(&nomad.Config{Address: w.url})
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(c.Close)
	return c
}

// sleeper is a good job.
func sleeper(id string) *nomad.Job {
	task := nomad.NewTask("t", "raw_exec").SetConfig("command", "/bin/sleep").SetConfig("args", []any{"1000"}).
		Require(&nomad.Resources{CPU: ptr(100), MemoryMB: ptr(64)})
	return nomad.NewServiceJob(id, id, region, 50).AddTaskGroup(nomad.NewTaskGroup("g", 1).AddTask(task))
}

// job registers a job directly in the state.
func (w *wire) job(id string, change ...func(*cluster.Job)) cluster.Result {
	w.Helper()
	j, _, err := jobspec.FromAPI(sleeper(id), jobspec.Options{Drivers: jobspec.Drivers(), Region: region})
	if err != nil {
		w.Fatal(err)
	}
	for _, c := range change {
		c(j)
	}
	return w.apply(&cluster.RegisterJob{Job: j, EvalID: evalID(int(w.store.index) + 1)})
}

func evalID(n int) string { return fmt.Sprintf("e0000000-0000-4000-8000-%012d", n) }

func allocID(n int) string { return fmt.Sprintf("a0000000-0000-4000-8000-%012d", n) }

func (w *wire) node(id string) cluster.Result {
	w.Helper()
	return w.apply(&cluster.RegisterNode{Node: &cluster.Node{
		ID: id, Name: "n-" + id[:4], Datacenter: "dc1", NodePool: "default", Attributes: map[string]string{"os.name": "debian"},
		Drivers:       map[string]*cluster.DriverInfo{"raw_exec": {Detected: true, Healthy: true}, "onnx": {Detected: true, Healthy: true}},
		NodeResources: &cluster.NodeResources{Cpu: cluster.NodeCPU{CpuShares: 4000}, Memory: cluster.NodeMemory{MemoryMB: 8000}, Disk: cluster.NodeDisk{DiskMB: 10_000}},
	}})
}

// alloc places an allocation of a job's group g on a node, with a deployment when
// deployment is not empty.
func (w *wire) alloc(id, job, node, deployment string) cluster.Result {
	w.Helper()
	snap := w.store.State().Snapshot()
	j := snap.Job(nil, cluster.JobKey{Namespace: "default", ID: job})
	e := snap.EvalsByJob(nil, j.Key())[0]
	done := cluster.Clone(e)
	done.Status = cluster.EvalStatusComplete
	p := &cluster.Plan{
		EvalID: e.ID, Namespace: "default", JobID: job, JobVersion: j.Version, Evals: []*cluster.Evaluation{done},
		Place: []*cluster.Allocation{{
			ID: id, Namespace: "default", EvalID: e.ID, Name: job + ".g[0]", NodeID: node, NodeName: "n", JobID: job, TaskGroup: "g",
			DesiredStatus: "run", DeploymentID: deployment,
			AllocatedResources: &cluster.AllocatedResources{
				Tasks:  map[string]*cluster.AllocatedTaskResources{"t": {Cpu: cluster.AllocatedCPU{CpuShares: 100}, Memory: cluster.AllocatedMemory{MemoryMB: 64}}},
				Shared: cluster.AllocatedSharedResources{DiskMB: 300},
			},
			Metrics: &cluster.AllocMetric{NodesEvaluated: 1, ScoreMetaData: []*cluster.NodeScore{{NodeID: node, Scores: map[string]int64{"binpack": 250}, Norm: 125}}},
		}},
	}
	if deployment != "" {
		p.Deployment = &cluster.Deployment{
			ID: deployment, Namespace: "default", JobID: job, JobVersion: j.Version, JobCreateIndex: j.CreateIndex,
			Status: cluster.DeploymentRunning, StatusDescription: cluster.DeploymentDescRunning,
			TaskGroups: map[string]*cluster.DeploymentState{"g": {DesiredTotal: 1, ProgressDeadline: time.Minute}},
		}
	}
	return w.apply(&cluster.ApplyPlans{Plans: []*cluster.Plan{p}})
}

func pretty(t *testing.T, v any) string {
	t.Helper()
	var b bytes.Buffer
	if err := json.NewEncoder(&b).Encode(v); err != nil {
		t.Fatal(err)
	}
	return b.String()
}
