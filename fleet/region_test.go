//go:build !race

// Virtual time and the race detector do not go together yet (golang.org/issue/78156): make test runs these without it.

package fleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
	"github.com/rxvision/rxvision/fleet/swarm"
)

// region is several fleet servers over one replicated log, in memory: each server
// applies the log to a state of its own and may lag, be cut off or be killed, and
// the leader is whom the test names. Tests on it run in a bubble of virtual time,
// those over sockets in real time.
type region struct {
	*testing.T
	mu      sync.Mutex
	log     [][]byte
	leader  string
	members map[string]*member
	changed chan struct{} // closed and made anew at each change
	sockets bool          // connections are TCP, else in memory
}

// member is one server: its Store, its PeerNet, and what nodes dial.
type member struct {
	*region
	srv    *Server
	id     string
	state  *cluster.State
	at     int // entries applied
	lags   bool
	alive  bool
	cut    bool // from the other servers
	conns  map[net.Conn]bool
	frozen chan struct{} // not nil: its connections carry nothing until it is closed
	nodes  net.Listener
	peers  net.Listener
	stop   func()
	began  bool
}

func newRegion(t *testing.T, n int, change func(*Config)) *region {
	return startRegion(t, n, false, change)
}

func startRegion(t *testing.T, n int, sockets bool, change func(*Config)) *region {
	r := &region{T: t, members: map[string]*member{}, changed: make(chan struct{}), sockets: sockets}
	for i := range n {
		id := fmt.Sprint("s", i+1)
		r.members[id] = &member{region: r, id: id, state: cluster.NewState(), conns: map[net.Conn]bool{}}
	}
	for _, id := range r.ids() {
		r.start(id, change)
	}
	r.lead("s1")
	t.Cleanup(func() {
		for _, id := range r.ids() {
			r.kill(id)
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, m := range r.members {
			if err := m.state.Snapshot().Check(); err != nil {
				t.Errorf("%s: %v", m.id, err)
			}
		}
	})
	return r
}

func (r *region) ids() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var ids []string
	for id := range r.members {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

func (r *region) listen() net.Listener {
	if !r.sockets {
		return bufconn.Listen(1 << 20)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		r.Fatal(err)
	}
	return l
}

func dial(ctx context.Context, l net.Listener) (net.Conn, error) {
	if b, ok := l.(*bufconn.Listener); ok {
		return b.DialContext(ctx)
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", l.Addr().String())
}

// start runs a server.
func (r *region) start(id string, change func(*Config)) {
	m := r.members[id]
	m.nodes, m.peers = r.listen(), r.listen()
	cfg := Config{
		Name: id, Store: m, Peers: m, ReadIndex: m.ReadIndex, Blobs: bytesOf{"only-" + id: []byte(id)},
		Logger: slog.New(slog.DiscardHandler), Registerer: prometheus.NewRegistry(),
	}
	if change != nil {
		change(&cfg)
	}
	m.srv = NewServer(cfg)
	rpc := grpc.NewServer(grpc.WaitForHandlers(true), grpc.MaxRecvMsgSize(MaxMessage))
	pb.RegisterFleetServer(rpc, m.srv)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = rpc.Serve(m.guard(m.nodes)) })
	wg.Go(func() {
		if err := m.srv.Run(ctx); err != nil {
			r.Errorf("%s: %v", id, err)
		}
	})
	m.stop = func() { cancel(); rpc.Stop(); m.peers.Close(); wg.Wait() }
	r.change(func() { m.alive, m.began = true, true })
}

// kill ends a server and all its connections at once.
func (r *region) kill(id string) {
	m := r.members[id]
	was := false
	r.change(func() { was, m.alive = m.alive, false })
	if was {
		m.thaw()
		m.hangUp(func(net.Conn) bool { return true })
		m.stop()
	}
}

func (r *region) change(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
	for _, m := range r.members {
		for !m.lags && m.at < len(r.log) {
			m.at++
			if _, err := m.state.Apply(uint64(m.at), r.log[m.at-1]); err != nil {
				r.Errorf("%s: %v", m.id, err)
			}
		}
	}
	close(r.changed)
	r.changed = make(chan struct{})
}

func (r *region) lead(id string) { r.change(func() { r.leader = id }) }

func (m *member) hangUp(which func(net.Conn) bool) {
	m.mu.Lock()
	var ends []net.Conn
	for c := range m.conns {
		if which(c) {
			ends = append(ends, c)
		}
	}
	m.mu.Unlock()
	for _, c := range ends {
		c.Close()
	}
}

// cutOff takes a server away from the other servers; nodes still reach it.
func (r *region) cutOff(id string, cut bool) {
	m := r.members[id]
	r.change(func() { m.cut, m.lags = cut, cut })
	m.hangUp(func(c net.Conn) bool { return c.(*guarded).peer })
	for _, other := range r.members {
		other.hangUp(func(c net.Conn) bool { return c.(*guarded).peer && c.(*guarded).with == id })
	}
}

// freeze has a server's connections carry nothing.
func (m *member) freeze() { m.change(func() { m.frozen, m.lags = make(chan struct{}), true }) }

func (m *member) thaw() {
	m.change(func() {
		if m.frozen != nil {
			close(m.frozen)
			m.frozen, m.lags = nil, false
		}
	})
}

// Store.

func (m *member) IsLeader() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.leader == m.id && m.alive && !m.cut && m.frozen == nil
}

func (m *member) State() *cluster.State { return m.state }

var errLeaderless = cluster.ErrNoLeader

// await waits until ok holds, for as long as raft would wait for a leader.
func (m *member) await(ctx context.Context, ok func() bool) error {
	limit := time.After(5 * time.Second)
	for {
		m.mu.Lock()
		done, changed := ok(), m.changed
		m.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-limit:
			return errLeaderless
		}
	}
}

// led says whether this server reaches a leader. Hold mu.
func (m *member) led() bool {
	l := m.members[m.leader]
	return l != nil && l.alive && !l.cut && l.frozen == nil && (l == m || !m.cut && m.frozen == nil)
}

func (m *member) Apply(ctx context.Context, c cluster.Command) (cluster.Result, error) {
	if err := m.await(ctx, m.led); err != nil {
		return cluster.Result{}, err
	}
	var res cluster.Result
	var err error
	m.change(func() {
		l := m.members[m.leader]
		if l == nil || l.at != len(m.log) {
			err = errLeaderless
			return
		}
		*cluster.StampOf(c) = cluster.Stamp{RequestID: fmt.Sprint("r", len(m.log)), Time: time.Now().UnixNano()}
		entry := cluster.EncodeCommand(c)
		m.log = append(m.log, entry)
		l.at++
		res, err = l.state.Apply(uint64(l.at), entry)
		if err == nil && res.Err != nil {
			err = res.Err
		}
	})
	return res, err
}

func (m *member) ReadIndex(ctx context.Context, _ bool) error {
	if err := m.await(ctx, m.led); err != nil {
		return err
	}
	m.mu.Lock()
	goal := len(m.log)
	m.mu.Unlock()
	return m.await(ctx, func() bool { return m.at >= goal })
}

// PeerNet.

func (m *member) Self() string           { return m.id }
func (m *member) Servers() []string      { return m.ids() }
func (m *member) Listener() net.Listener { return m.peers }

func (m *member) Leader() (string, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.leader, m.led()
}

func (m *member) Contact() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.lags {
		return -1
	}
	return 0
}

func (m *member) Dial(ctx context.Context, id string) (net.Conn, error) {
	m.mu.Lock()
	to := m.members[id]
	refused := !to.alive || to.cut || m.cut || !m.alive
	m.mu.Unlock()
	if refused {
		return nil, errors.New("connection refused")
	}
	c, err := dial(ctx, to.peers)
	if err != nil {
		return nil, err
	}
	return m.watch(&guarded{Conn: c, owner: m, peer: true, with: id}), nil
}

// dialNode is how nodes reach servers.
func (r *region) dialNode(ctx context.Context, id string) (net.Conn, error) {
	r.mu.Lock()
	m := r.members[id]
	alive := m.alive
	r.mu.Unlock()
	if !alive {
		return nil, errors.New("connection refused")
	}
	return dial(ctx, m.nodes)
}

// guarded is a connection of a server, which stops while the server is frozen.
type guarded struct {
	net.Conn
	owner *member
	peer  bool
	with  string
}

func (m *member) watch(c *guarded) net.Conn {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.conns[c] = true
	return c
}

func (c *guarded) pass() {
	c.owner.mu.Lock()
	frozen := c.owner.frozen
	c.owner.mu.Unlock()
	if frozen != nil {
		<-frozen
	}
}

func (c *guarded) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.pass()
	return n, err
}

func (c *guarded) Write(b []byte) (int, error) { c.pass(); return c.Conn.Write(b) }

func (c *guarded) Close() error {
	c.owner.mu.Lock()
	delete(c.owner.conns, c)
	c.owner.mu.Unlock()
	return c.Conn.Close()
}

// guard wraps what a listener accepts.
func (m *member) guard(l net.Listener) net.Listener { return &guardedListener{l, m} }

type guardedListener struct {
	net.Listener
	owner *member
}

func (l *guardedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.owner.watch(&guarded{Conn: c, owner: l.owner}), nil
}

// attach runs a swarm of nodes and waits until all are attached and ready.
func (r *region) attach(n int) *swarm.Swarm {
	r.Helper()
	s, err := swarm.New(swarm.Config{
		Count: n, Servers: r.ids(), PerConn: max(n/8, 1), Start: 50 * time.Millisecond, Work: time.Second,
		DialOptions: []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(r.dialNode)},
	})
	if err != nil {
		r.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Run(ctx); err != nil {
			r.Error(err)
		}
	})
	r.Cleanup(func() { cancel(); wg.Wait() })
	r.until(time.Minute, "all nodes attached", func() bool { return s.Stats().Attached == n && r.count(cluster.NodeStatusReady) == n })
	return s
}

// any is a server that lives, the leader first.
func (r *region) any() *member {
	r.mu.Lock()
	defer r.mu.Unlock()
	if m := r.members[r.leader]; m != nil && m.alive {
		return m
	}
	for _, m := range r.members {
		if m.alive && !m.cut && !m.lags {
			return m
		}
	}
	return nil
}

// at gives the view of one server, with a connection of its own to it.
func (r *region) at(id string) *fleet {
	conn, err := grpc.NewClient("passthrough:///"+id, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(r.dialNode))
	if err != nil {
		r.Fatal(err)
	}
	r.Cleanup(func() { conn.Close() })
	return &fleet{T: r.T, Server: r.members[id].srv, conn: conn}
}

// join attaches a node by hand and takes the welcome and the first desired state.
func (f *fleet) join(id string) (*node, *pb.Desired) {
	f.Helper()
	n := f.dial(id, 1)
	if n.next().GetWelcome() == nil {
		f.Fatal("the first message is no welcome")
	}
	return n, n.desired()
}

// must applies a command through the leader.
func (r *region) must(c cluster.Command) cluster.Result {
	r.Helper()
	res, err := r.any().Apply(r.Context(), c)
	if err != nil {
		r.Fatalf("%T: %v", c, err)
	}
	return res
}

// place puts one allocation of a new job on a node.
func (r *region) place(job, nodeID string) (alloc string) {
	f := &fleet{T: r.T, store: &memStore{apply: r.any().Apply, state: r.any().state}}
	return f.place(job, nodeID, nil)
}

// count is how many nodes have a status.
func (r *region) count(status string) (n int) {
	for _, node := range r.any().state.Snapshot().Nodes(nil, "") {
		if node.Status == status {
			n++
		}
	}
	return n
}

// until lets virtual time pass until ok holds, and gives how much it was.
func (r *region) until(limit time.Duration, what string, ok func() bool) time.Duration {
	r.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > limit {
			r.Fatalf("not within %s: %s", limit, what)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(start)
}

// neverDown lets time pass in which every node must stay ready.
func (r *region) neverDown(d time.Duration, nodes int) {
	r.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if n := r.count(cluster.NodeStatusReady); n != nodes {
			r.Fatalf("%d of %d nodes are ready %s before the end of %s", n, nodes, time.Until(end), d)
		}
	}
	for _, n := range r.any().state.Snapshot().Nodes(nil, "") {
		for _, e := range n.Events {
			if e.Message != "Node registered" {
				r.Fatalf("node %s: %s", n.Name, e.Message)
			}
		}
	}
}

// entries counts the log's entries from an index on by the type of command.
func (r *region) entries(from int) map[string]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	kinds := map[string]int{}
	for _, e := range r.log[from:] {
		c, err := cluster.DecodeCommand(e)
		if err != nil {
			r.Fatal(err)
		}
		kinds[fmt.Sprintf("%T", c)]++
	}
	return kinds
}

func (r *region) length() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.log)
}

// bubble runs a test in virtual time.
func bubble(t *testing.T, f func(t *testing.T)) { synctest.Test(t, f) }
