package fleet

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/fleet/swarm"
	"github.com/rxvision/rxvision/raftstore"
)

// realServer is a fleet server on a real store, its files and its ports.
type realServer struct {
	*Server
	store *raftstore.Store
	rpc   string
	stop  func()
}

// storeNet is the servers' network as the store has it.
type storeNet struct{ *raftstore.Store }

func (n storeNet) Self() string           { return n.ID() }
func (n storeNet) Listener() net.Listener { return n.PeerListener() }

func (n storeNet) Leader() (string, bool) {
	id, _ := n.Store.Leader()
	return id, id != ""
}

func (n storeNet) Contact() time.Duration { return n.LastContact() }

func (n storeNet) Servers() (ids []string) {
	for _, m := range n.Members() {
		ids = append(ids, m.ID)
	}
	return ids
}

func (n storeNet) Dial(ctx context.Context, id string) (net.Conn, error) { return n.DialPeer(ctx, id) }

// freePort gives an address that was free a moment ago.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func startReal(t *testing.T, i int, raft string, join []string) *realServer {
	t.Helper()
	store, err := raftstore.Open(raftstore.Config{
		Dir: filepath.Join(t.TempDir(), "raft"), Bind: raft, Name: fmt.Sprint("s", i), Region: "global", Datacenter: "dc1",
		BootstrapExpect: len(join), RetryJoin: join, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	s := &realServer{store: store, Server: NewServer(Config{
		Name: fmt.Sprint("s", i), Store: store, Peers: storeNet{store}, ReadIndex: store.ReadIndex,
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(), TTL: 20 * time.Second,
	})}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.rpc = l.Addr().String()
	rpc := grpc.NewServer(grpc.WaitForHandlers(true), grpc.MaxRecvMsgSize(MaxMessage))
	pb.RegisterFleetServer(rpc, s.Server)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = rpc.Serve(l) })
	wg.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	s.stop = sync.OnceFunc(func() {
		cancel()
		rpc.Stop()
		wg.Wait()
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(s.stop)
	return s
}

// TestRealServers is the fleet on three real stores over real sockets: nodes attach
// through any server, survive the leader's end without being missed, and are called
// through servers that do not hold them.
func TestRealServers(t *testing.T) {
	var addrs, rpcs []string
	for range 3 {
		addrs = append(addrs, freePort(t))
	}
	var servers []*realServer
	for i, a := range addrs {
		servers = append(servers, startReal(t, i, a, addrs))
		rpcs = append(rpcs, servers[i].rpc)
	}
	const nodes = 150
	sw, err := swarm.New(swarm.Config{
		Count: nodes, Servers: rpcs, DialOptions: []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := sw.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })

	until := func(what string, ok func() bool) {
		t.Helper()
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for end := time.Now().Add(3 * patience); !ok(); <-tick.C {
			if time.Now().After(end) {
				t.Fatalf("waited in vain: %s (%+v, %v)", what, sw.Stats(), sw.Problem())
			}
		}
	}
	ready := func(s *realServer) (n int) {
		for _, node := range s.store.State().Snapshot().Nodes(nil, "") {
			if node.Status == cluster.NodeStatusReady {
				n++
			}
		}
		return n
	}
	until("all nodes ready", func() bool { return sw.Stats().Attached == nodes && ready(servers[0]) == nodes })
	everywhere := func(s *realServer) bool {
		for _, id := range sw.NodeIDs() {
			if !s.Connected(id) {
				return false
			}
		}
		return true
	}
	refused := func(s *realServer) {
		t.Helper()
		until("the server knows where all nodes are", func() bool { return everywhere(s) })
		for _, id := range sw.NodeIDs()[:20] {
			a, err := s.Call(t.Context(), id, &pb.Call{Request: &pb.Call_NodeStats{NodeStats: &pb.NodeStatsRequest{}}})
			if err == nil {
				_, err = a.One()
			}
			if cluster.CodeOf(err) != cluster.CodeUnsupported { // the node's own answer
				t.Fatalf("node %s: %v", id, err)
			}
		}
	}
	for _, s := range servers {
		refused(s)
	}
	leader := -1
	until("a leader", func() bool {
		leader = slices.IndexFunc(servers, func(s *realServer) bool { return s.store.IsLeader() })
		return leader >= 0
	})
	servers[leader].stop()
	left := slices.Delete(servers, leader, leader+1)
	until("another leader, and all nodes attached", func() bool {
		return (left[0].store.IsLeader() || left[1].store.IsLeader()) && sw.Stats().Attached == nodes && everywhere(left[0])
	})
	for _, s := range left {
		refused(s)
		if n := ready(s); n != nodes {
			t.Errorf("%d nodes are ready", n)
		}
		for _, node := range s.store.State().Snapshot().Nodes(nil, "") {
			if len(node.Events) != 1 {
				t.Errorf("node %s was missed: %v", node.Name, node.Events[1].Message)
			}
		}
	}
}
