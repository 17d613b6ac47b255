package scheduler

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/rxvision/rxvision/cluster"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memStore is a Store of one server over the real state. Like the real one it
// refuses entries over 1 MiB.
type memStore struct {
	tb      testing.TB
	mu      sync.Mutex
	state   *cluster.State
	index   uint64
	plans   int // entries with plans
	largest int
	leaders []chan bool
	// before is called with each command before it is applied, without the lock;
	// an error is what Apply gives instead. after may change what Apply gives.
	before func(cluster.Command) error
	after  func(cluster.Command, *cluster.Result)
	check  bool
}

func newMemStore(tb testing.TB) *memStore {
	s := &memStore{tb: tb, state: cluster.NewState(), check: true}
	tb.Cleanup(func() {
		if err := s.State().Snapshot().Check(); err != nil {
			tb.Errorf("at the end: %v", err)
		}
	})
	return s
}

func (s *memStore) Apply(ctx context.Context, cmd cluster.Command) (cluster.Result, error) {
	if err := ctx.Err(); err != nil {
		return cluster.Result{}, err
	}
	if s.before != nil {
		if err := s.before(cmd); err != nil {
			return cluster.Result{}, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	stamp := cluster.StampOf(cmd)
	if stamp.RequestID == "" {
		stamp.RequestID = newID()
	}
	if stamp.Time == 0 {
		stamp.Time = time.Now().UnixNano()
	}
	entry := cluster.EncodeCommand(cmd)
	if len(entry) > 1<<20 {
		return cluster.Result{}, cluster.Errorf(cluster.CodeTooLarge, "the change takes %d bytes", len(entry))
	}
	if _, ok := cmd.(*cluster.ApplyPlans); ok {
		s.plans++
		s.largest = max(s.largest, len(entry))
	}
	s.index++
	res, err := s.state.Apply(s.index, entry)
	if err != nil {
		s.tb.Errorf("apply %T: %v", cmd, err)
		return res, err
	}
	if s.check {
		if err := s.state.Snapshot().Check(); err != nil {
			s.tb.Errorf("after %T at %d: %v", cmd, s.index, err)
		}
	}
	if s.after != nil {
		s.after(cmd, &res)
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

func (s *memStore) SnapshotMinIndex(context.Context, uint64) (*cluster.Snapshot, error) {
	return s.State().Snapshot(), nil // every command is applied when Apply returns
}

func (s *memStore) LeaderCh(ctx context.Context) <-chan bool {
	ch := make(chan bool, 8)
	ch <- true
	s.mu.Lock()
	s.leaders = append(s.leaders, ch)
	s.mu.Unlock()
	context.AfterFunc(ctx, func() { close(ch) })
	return ch
}

// lead tells the scheduler whether it leads.
func (s *memStore) lead(leader bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ch := range s.leaders {
		ch <- leader
	}
}

// must applies a command that cannot be refused.
func (s *memStore) must(cmd cluster.Command) cluster.Result {
	s.tb.Helper()
	res, err := s.Apply(context.Background(), cmd)
	if err != nil {
		s.tb.Fatalf("%T: %v", cmd, err)
	}
	return res
}

// world is a running scheduler in a bubble of virtual time.
type world struct {
	*memStore
	t *testing.T
}

// inWorld runs a test in a bubble with a scheduler that leads.
func inWorld(t *testing.T, test func(w *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{newMemStore(t), t}
		stop := startScheduler(t, w.memStore, Config{})
		defer stop()
		test(w)
	})
}

func testLogger(tb testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(tb.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
}

func startScheduler(tb testing.TB, store Store, cfg Config) (stop func()) {
	cfg.Store, cfg.Registerer = store, prometheus.NewRegistry()
	cfg.Logger = testLogger(tb)
	s, err := New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			tb.Errorf("Run: %v", err)
		}
	}
}

// settle lets the scheduler do all that it can do now.
func (w *world) settle() *cluster.Snapshot {
	synctest.Wait()
	return w.State().Snapshot()
}

// node adds a node with so many GPUs.
func (s *memStore) node(name string, gpus int) *cluster.Node {
	n := &cluster.Node{
		ID: name, Name: name, Datacenter: "dc1", NodePool: "default", Status: cluster.NodeStatusReady,
		Drivers:       map[string]*cluster.DriverInfo{"raw_exec": {Detected: true, Healthy: true}},
		NodeResources: &cluster.NodeResources{Cpu: cluster.NodeCPU{CpuShares: 10000}, Memory: cluster.NodeMemory{MemoryMB: 10000}, Disk: cluster.NodeDisk{DiskMB: 100000}},
	}
	if gpus > 0 {
		g := &cluster.NodeDeviceResource{Vendor: "nvidia", Type: "gpu", Name: "A100"}
		for i := range gpus {
			g.Instances = append(g.Instances, &cluster.NodeDevice{ID: fmt.Sprintf("%s-gpu%d", name, i), Healthy: true})
		}
		n.NodeResources.Devices = []*cluster.NodeDeviceResource{g}
	}
	s.must(&cluster.RegisterNode{Node: n})
	return n
}

// service is a job with one group and one task.
func service(id string, count int, change ...func(*cluster.Job)) *cluster.Job {
	j := &cluster.Job{
		Namespace: cluster.DefaultNamespace, ID: id, Name: id, Type: cluster.JobTypeService, Priority: 50,
		Datacenters: []string{"*"}, NodePool: "default",
		TaskGroups: []*cluster.TaskGroup{{
			Name: "g", Count: count,
			Update:           &cluster.UpdateStrategy{MaxParallel: 1, ProgressDeadline: 10 * time.Minute},
			Migrate:          &cluster.MigrateStrategy{MaxParallel: 1},
			ReschedulePolicy: &cluster.ReschedulePolicy{Unlimited: true, Delay: 30 * time.Second, DelayFunction: "exponential", MaxDelay: time.Hour},
			Tasks: []*cluster.Task{{
				Name: "t", Driver: "raw_exec", Config: []byte(`{"command":"v0"}`),
				Resources: &cluster.Resources{CPU: 1000, MemoryMB: 1000},
			}},
		}},
	}
	for _, c := range change {
		c(j)
	}
	return j
}

func batch(j *cluster.Job) {
	j.Type = cluster.JobTypeBatch
	j.TaskGroups[0].Update, j.TaskGroups[0].Migrate = nil, nil
	j.TaskGroups[0].ReschedulePolicy = &cluster.ReschedulePolicy{Attempts: 1, Interval: 24 * time.Hour, Delay: 5 * time.Second, DelayFunction: "constant"}
}

func gpus(n uint64) func(*cluster.Job) {
	return func(j *cluster.Job) {
		j.TaskGroups[0].Tasks[0].Resources.Devices = []*cluster.RequestedDevice{{Name: "nvidia/gpu", Count: n}}
	}
}

func command(name string) func(*cluster.Job) {
	return func(j *cluster.Job) { j.TaskGroups[0].Tasks[0].Config = []byte(`{"command":"` + name + `"}`) }
}

// run registers a job and gives its evaluation's ID.
func (s *memStore) run(j *cluster.Job) string {
	s.tb.Helper()
	return s.must(&cluster.RegisterJob{Job: j, EvalID: newID()}).EvalID
}

// say reports an allocation's status; health only where a deployment watches it.
func (s *memStore) say(a *cluster.Allocation, status string, healthy bool) {
	s.tb.Helper()
	u := &cluster.Allocation{ID: a.ID, Epoch: a.Epoch, ClientStatus: status}
	if a.DeploymentID != "" && !a.ServerTerminal() {
		u.DeploymentStatus = &cluster.AllocDeploymentStatus{Healthy: &healthy}
	}
	if status == cluster.AllocClientFailed || status == cluster.AllocClientComplete {
		u.TaskStates = map[string]*cluster.TaskState{"t": {State: cluster.TaskStateDead, FinishedAt: now()}}
	}
	s.must(&cluster.UpdateAllocs{NodeID: a.NodeID, Allocs: []*cluster.Allocation{u}})
}

// agents does what good nodes do until nothing is left to do: start what is
// pending, end what is to stop.
func (w *world) agents() *cluster.Snapshot {
	for {
		snap, idle := w.settle(), true
		for _, a := range snap.Allocs(nil, "") {
			switch {
			case a.ClientTerminal():
			case a.ServerTerminal():
				w.say(a, cluster.AllocClientComplete, true)
				idle = false
			case a.ClientStatus == cluster.AllocClientPending:
				w.say(a, cluster.AllocClientRunning, true)
				idle = false
			}
		}
		if idle {
			return snap
		}
	}
}

// evaluate asks for an evaluation of a job.
func (s *memStore) evaluate(job string) {
	s.tb.Helper()
	j := s.State().Snapshot().Job(nil, cluster.JobKey{Namespace: cluster.DefaultNamespace, ID: job})
	s.must(&cluster.UpdateEvals{Evals: []*cluster.Evaluation{{
		ID: newID(), Namespace: j.Namespace, JobID: j.ID, Type: j.Type, Priority: j.Priority,
		TriggeredBy: cluster.TriggerJobRegister, Status: cluster.EvalStatusPending,
	}}})
}

// live gives a job's allocations that are neither over nor asked to be.
func live(snap *cluster.Snapshot, job string) (out []*cluster.Allocation) {
	for _, a := range snap.AllocsByJob(nil, cluster.JobKey{Namespace: cluster.DefaultNamespace, ID: job}) {
		if !a.Terminal() {
			out = append(out, a)
		}
	}
	return out
}

func (w *world) wantLive(snap *cluster.Snapshot, job string, n int) []*cluster.Allocation {
	w.t.Helper()
	as := live(snap, job)
	if len(as) != n {
		w.t.Fatalf("job %s has %d live allocations, want %d", job, len(as), n)
	}
	return as
}

func (w *world) wantEval(snap *cluster.Snapshot, id, status string) *cluster.Evaluation {
	w.t.Helper()
	e := snap.Eval(nil, id)
	if e == nil || e.Status != status {
		w.t.Fatalf("evaluation %s is %+v, want it %s", id, e, status)
	}
	return e
}
