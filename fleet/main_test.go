package fleet

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds each wait of a test: reaching it is a failure.
const patience = 20 * time.Second

const (
	nodeA = "0a000000-0000-4000-8000-000000000001"
	nodeB = "0b000000-0000-4000-8000-000000000002"
)

// memStore applies commands to a real state, one after another.
type memStore struct {
	apply   func(context.Context, cluster.Command) (cluster.Result, error) // when set, instead
	mu      sync.Mutex
	state   *cluster.State
	index   uint64
	fail    error
	gate    chan struct{} // when set, status waits for it to close
	entered chan struct{} // gets a token when status arrives at the gate
	updates []int         // allocations in each entry of status
}

func (m *memStore) IsLeader() bool { return true }

func (m *memStore) State() *cluster.State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state
}

func (m *memStore) Apply(ctx context.Context, c cluster.Command) (cluster.Result, error) {
	if m.apply != nil {
		return m.apply(ctx, c)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if u, ok := c.(*cluster.UpdateAllocs); ok {
		if gate := m.gate; gate != nil {
			m.mu.Unlock()
			m.entered <- struct{}{}
			<-gate
			m.mu.Lock()
		}
		m.updates = append(m.updates, len(u.Allocs))
	}
	if m.fail != nil {
		return cluster.Result{}, m.fail
	}
	m.index++
	*cluster.StampOf(c) = cluster.Stamp{RequestID: fmt.Sprint(m.index), Time: int64(m.index)}
	res, err := m.state.Apply(m.index, cluster.EncodeCommand(c))
	if err == nil && res.Err != nil {
		err = res.Err
	}
	return res, err
}

// restore puts another state in the place of the present one.
func (m *memStore) restore(state *cluster.State) {
	m.mu.Lock()
	old := m.state
	m.state = state
	m.mu.Unlock()
	old.Abandon()
}

// fleet is a running Server on a loopback socket, and its store.
type fleet struct {
	*testing.T
	*Server
	store *memStore
	conn  *grpc.ClientConn
}

func start(t *testing.T, cfg Config) *fleet {
	t.Helper()
	store := &memStore{state: cluster.NewState()}
	cfg.Name, cfg.Store, cfg.Logger, cfg.Registerer = "s1", store, slog.New(slog.DiscardHandler), prometheus.NewRegistry()
	if cfg.TTL == 0 {
		cfg.TTL = time.Hour // no test is slow enough to miss it
	}
	f := &fleet{T: t, Server: NewServer(cfg), store: store}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	rpc := grpc.NewServer(grpc.WaitForHandlers(true), grpc.MaxRecvMsgSize(MaxMessage))
	pb.RegisterFleetServer(rpc, f.Server)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := rpc.Serve(l); err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() {
		if err := f.Server.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	f.conn, err = grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.conn.Close()
		rpc.Stop()
		cancel()
		wg.Wait()
		if err := store.State().Snapshot().Check(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func (f *fleet) client() pb.FleetClient { return pb.NewFleetClient(f.conn) }

func (f *fleet) must(c cluster.Command) cluster.Result {
	f.Helper()
	r, err := f.store.Apply(f.Context(), c)
	if err != nil {
		f.Fatalf("%T: %v", c, err)
	}
	return r
}

// await waits until the state is as wanted.
func (f *fleet) await(what string, want func(*cluster.Snapshot, cluster.WatchSet) bool) {
	f.Helper()
	ctx, cancel := context.WithTimeout(f.Context(), patience)
	defer cancel()
	for {
		snap, ws := f.store.State().Snapshot(), cluster.WatchSet{}
		if want(snap, ws) {
			return
		}
		if ws.WatchCtx(ctx) != nil {
			f.Fatalf("waited in vain: %s", what)
		}
	}
}

func (f *fleet) awaitStatus(node, want string) {
	f.Helper()
	f.await("node status "+want, func(s *cluster.Snapshot, ws cluster.WatchSet) bool {
		n := s.Node(ws, node)
		return n != nil && n.Status == want
	})
}

// awaitDetached waits until the server has let go of a node. It has no event for that.
func (f *fleet) awaitDetached(node string) {
	f.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); f.Connected(node); <-tick.C {
		if time.Now().After(end) {
			f.Fatal("the node stays connected")
		}
	}
}

func record(id string) *cluster.Node {
	return &cluster.Node{
		ID: id, Name: "n-" + id, Datacenter: "dc1", NodePool: cluster.DefaultNodePool,
		Drivers: map[string]*cluster.DriverInfo{"onnx": {Detected: true, Healthy: true}},
		NodeResources: &cluster.NodeResources{
			Cpu: cluster.NodeCPU{CpuShares: 100000}, Memory: cluster.NodeMemory{MemoryMB: 100000}, Disk: cluster.NodeDisk{DiskMB: 100000},
			MinDynamicPort: 20000, MaxDynamicPort: 32000,
		},
	}
}

// node is the agent's end of a session.
type node struct {
	*fleet
	id     string
	stream pb.Fleet_AttachClient
	cancel context.CancelFunc
}

// dial opens a stream and says hello.
func (f *fleet) dial(id string, protocol uint32) *node {
	f.Helper()
	return f.hello(id, &pb.Hello{Protocol: protocol})
}

// hello is dial by a node that says more.
func (f *fleet) hello(id string, hello *pb.Hello) *node {
	f.Helper()
	ctx, cancel := context.WithTimeout(f.Context(), 3*patience)
	f.Cleanup(cancel)
	stream, err := f.client().Attach(ctx)
	if err != nil {
		f.Fatal(err)
	}
	n := &node{f, id, stream, cancel}
	hello.Node, hello.Session = cluster.Marshal(record(id)), rand.Text()
	n.say(&pb.NodeMessage{Message: &pb.NodeMessage_Hello{Hello: hello}})
	return n
}

// attach opens a session and takes the welcome and the first, full desired state.
func (f *fleet) attach(id string) (*node, *pb.Desired) {
	f.Helper()
	n := f.dial(id, 1)
	if w := n.next().GetWelcome(); w == nil || w.Server != "s1" || w.TtlMs != f.TTL().Milliseconds() || !w.Answers {
		f.Fatalf("first message is no right welcome: %v", w)
	}
	d := n.desired()
	if !d.Full {
		f.Fatal("the first desired state is not full")
	}
	return n, d
}

func (n *node) say(m *pb.NodeMessage) {
	n.Helper()
	if err := n.stream.Send(m); err != nil {
		n.Fatal(err)
	}
}

func (n *node) beat() error {
	return n.stream.Send(&pb.NodeMessage{Message: &pb.NodeMessage_Heartbeat{Heartbeat: &pb.Heartbeat{}}})
}

// heartbeat is answered.
func (n *node) heartbeat() {
	n.Helper()
	if err := n.beat(); err != nil {
		n.Fatal(err)
	}
	if m := n.next(); m.GetHeartbeat() == nil {
		n.Fatalf("got %v, want the answer to a heartbeat", m)
	}
}

func (n *node) next() *pb.ServerMessage {
	n.Helper()
	m, err := n.stream.Recv()
	if err != nil {
		n.Fatal(err)
	}
	return m
}

func (n *node) desired() *pb.Desired {
	n.Helper()
	m := n.next()
	if m.GetDesired() == nil {
		n.Fatalf("got %v, want a desired state", m)
	}
	return m.GetDesired()
}

// end reads until the session ends and gives the reason.
func (n *node) end() error {
	for {
		if _, err := n.stream.Recv(); err != nil {
			return err
		}
	}
}

func (n *node) report(seq uint64, clientStatus string, ids ...string) {
	n.Helper()
	u := &pb.AllocUpdates{Seq: seq}
	for _, id := range ids {
		u.Allocs = append(u.Allocs, cluster.Marshal(&cluster.Allocation{ID: id, ClientStatus: clientStatus}))
	}
	n.say(&pb.NodeMessage{Message: &pb.NodeMessage_Allocs{Allocs: u}})
}

// plan answers an evaluation.
func (f *fleet) plan(eval string, p *cluster.Plan) {
	f.Helper()
	e := *f.store.State().Snapshot().Eval(nil, eval)
	p.EvalID, p.EvalEpoch, p.Namespace, p.JobID = e.ID, e.ModifyIndex, e.Namespace, e.JobID
	e.Status = cluster.EvalStatusComplete
	p.Evals = []*cluster.Evaluation{&e}
	if r := f.must(&cluster.ApplyPlans{Plans: []*cluster.Plan{p}}); r.Plans[0].Stale || len(r.Plans[0].Refused) > 0 {
		f.Fatalf("plan: %+v", r.Plans[0])
	}
}

// place registers a job and puts one allocation of it on a node.
func (f *fleet) place(job, node string, serving *cluster.Serving) (alloc string) {
	f.Helper()
	j := &cluster.Job{
		Region: "global", Namespace: cluster.DefaultNamespace, ID: job, Name: job, Type: cluster.JobTypeService,
		Priority: cluster.DefaultPriority, Datacenters: []string{"*"}, NodePool: cluster.DefaultNodePool,
		TaskGroups: []*cluster.TaskGroup{{Name: "web", Count: 1, Tasks: []*cluster.Task{{
			Name: "x", Driver: "raw_exec", Resources: &cluster.Resources{CPU: 1, MemoryMB: 1},
		}}}},
	}
	alloc = "alloc-" + job
	f.must(&cluster.RegisterJob{Job: j, EvalID: "eval-" + job})
	f.plan("eval-"+job, &cluster.Plan{Place: []*cluster.Allocation{{
		ID: alloc, Namespace: j.Namespace, EvalID: "eval-" + job, Name: job + ".web[0]", NodeID: node, JobID: job, TaskGroup: "web",
		DesiredStatus: cluster.AllocDesiredRun, AllocatedResources: &cluster.AllocatedResources{
			Tasks: map[string]*cluster.AllocatedTaskResources{"x": {Cpu: cluster.AllocatedCPU{CpuShares: 1}, Memory: cluster.AllocatedMemory{MemoryMB: 1}}},
		},
	}}})
	if serving != nil {
		f.must(&cluster.UpdateAllocs{Allocs: []*cluster.Allocation{{ID: alloc, ClientStatus: cluster.AllocClientRunning, Serving: serving}}})
	}
	return alloc
}
