package raftstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/raftstore/pb"
)

// nowhere is an address at which nobody listens.
const nowhere = "127.0.0.1:1"

// network connects the servers of a test and can cut them off from each other:
// bytes are held back, as a firewall does, and nobody is told.
type network struct {
	mu      sync.Mutex
	names   map[string]string // address → name
	cut     map[string]bool   // names that are cut off
	changed chan struct{}
}

func newNetwork() *network {
	return &network{names: map[string]string{}, cut: map[string]bool{}, changed: make(chan struct{})}
}

// isolate cuts servers off from all others, and connects everyone else.
func (n *network) isolate(names ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.cut)
	for _, name := range names {
		n.cut[name] = true
	}
	close(n.changed)
	n.changed = make(chan struct{})
}

// pass waits until the two ends are connected; false when done is closed first.
func (n *network) pass(from, addr string, done <-chan struct{}) bool {
	for {
		n.mu.Lock()
		blocked, changed := n.cut[from] != n.cut[n.names[addr]], n.changed
		n.mu.Unlock()
		if !blocked {
			return true
		}
		select {
		case <-changed:
		case <-done:
			return false
		}
	}
}

func (n *network) dialer(from string) dialer {
	return func(ctx context.Context, kind, addr string) (net.Conn, error) {
		if !n.pass(from, addr, ctx.Done()) {
			return nil, ctx.Err()
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, kind, addr)
		if err != nil {
			return nil, err
		}
		// Both directions go through pipes that stop while the ends are cut off.
		near, far := net.Pipe()
		done := make(chan struct{})
		var once sync.Once
		end := func() { once.Do(func() { close(done); near.Close(); far.Close(); conn.Close() }) }
		pump := func(dst, src net.Conn) {
			defer end()
			buf := make([]byte, 64<<10)
			for {
				k, err := src.Read(buf)
				if k > 0 {
					if !n.pass(from, addr, done) {
						return
					}
					if _, err := dst.Write(buf[:k]); err != nil {
						return
					}
				}
				if err != nil {
					return
				}
			}
		}
		go pump(conn, far)
		go pump(far, conn)
		return &link{Conn: near, remote: conn.RemoteAddr(), end: end}, nil
	}
}

// link is the dialler's end.
type link struct {
	net.Conn
	remote net.Addr
	end    func()
}

func (l *link) RemoteAddr() net.Addr { return l.remote }
func (l *link) Close() error         { l.end(); return nil }

// group is some servers under test.
type group struct {
	testing.TB
	net    *network
	change []func(*Config)
	all    []*Store
	dirs   map[*Store]string
}

func newGroup(tb testing.TB, change ...func(*Config)) *group {
	return &group{TB: tb, net: newNetwork(), change: change, dirs: map[*Store]string{}}
}

// start opens a server that looks for the others at the first one.
func (g *group) start(name, dir string, change ...func(*Config)) *Store {
	g.Helper()
	cfg := testConfig(g.TB, dir)
	cfg.Name, cfg.BootstrapExpect, cfg.Region, cfg.dialer = name, 0, "global", g.net.dialer(name)
	cfg.Logger = cfg.Logger.With("name", name)
	cfg.RetryJoin = []string{nowhere}
	for _, s := range g.all {
		cfg.RetryJoin = append(cfg.RetryJoin, s.Addr())
	}
	cfg.LeaderWait, cfg.MeetInterval, cfg.AutopilotInterval, cfg.FailedAfter = patience/2, 100*time.Millisecond, 100*time.Millisecond, 2*time.Second
	for _, f := range append(slices.Clone(g.change), change...) {
		f(&cfg)
	}
	s, err := Open(cfg)
	if err != nil {
		g.Fatal(err)
	}
	g.net.mu.Lock()
	g.net.names[s.Addr()] = name
	g.net.mu.Unlock()
	g.all = append(g.all, s)
	g.dirs[s] = dir
	g.Cleanup(func() {
		g.net.isolate()
		mustClose(g.TB, s)
	})
	return s
}

// grow starts as many servers as expect each other, and waits for their leader.
func (g *group) grow(expect int) *Store {
	g.Helper()
	for i := range expect {
		g.start(fmt.Sprintf("s%d", i+1), g.TempDir(), func(c *Config) { c.BootstrapExpect = expect })
	}
	g.settled(expect)
	return g.leader()
}

// again closes a server and opens its folder anew, where it was, unless somebody else
// took the port meanwhile.
func (g *group) again(s *Store, change ...func(*Config)) *Store {
	g.Helper()
	mustClose(g.TB, s)
	g.all = slices.DeleteFunc(g.all, func(o *Store) bool { return o == s })
	if l, err := net.Listen("tcp", s.Addr()); err == nil {
		l.Close()
		change = append([]func(*Config){func(c *Config) { c.Bind = s.Addr() }}, change...)
	}
	return g.start(s.cfg.Name, g.dirs[s], change...)
}

// crash takes a server from the others as a kill would: its port is closed and
// nothing is said.
func (g *group) crash(s *Store) {
	g.Helper()
	g.all = slices.DeleteFunc(g.all, func(o *Store) bool { return o == s })
	if err := s.port.close(); err != nil {
		g.Error(err)
	}
}

func (g *group) leader() *Store {
	g.Helper()
	var leader *Store
	eventually(g.TB, "there is one leader", func() bool {
		leader = nil
		for _, s := range g.all {
			if s.IsLeader() {
				if leader != nil {
					return false
				}
				leader = s
			}
		}
		return leader != nil
	})
	return leader
}

func (g *group) follower() *Store {
	g.Helper()
	leader := g.leader()
	for _, s := range g.all {
		if s != leader {
			return s
		}
	}
	g.Fatal("nobody follows")
	return nil
}

// settled waits until all agree on one leader, voters many voters, and everybody's record.
func (g *group) settled(voters int) {
	g.Helper()
	eventually(g.TB, fmt.Sprintf("all agree on a leader and %d voters", voters), func() bool {
		leader, _ := g.all[0].Leader()
		for _, s := range g.all {
			id, _ := s.Leader()
			n, alive := 0, 0
			for _, m := range s.Members() {
				if m.Voter {
					n++
				}
				if m.Status == MemberAlive && s.State().Snapshot().Server(nil, m.ID) != nil {
					alive++
				}
			}
			if id == "" || id != leader || n != voters || alive != len(g.all) || s.member.cluster() == "" {
				return false
			}
		}
		return true
	})
}

// agree waits until all have applied what the leader has, and compares their states.
func (g *group) agree() {
	g.Helper()
	for _, s := range g.all {
		eventually(g.TB, "a verified read", func() bool { return s.ReadIndex(g.Context(), true) == nil })
	}
	eventually(g.TB, "all states are the same", func() bool {
		want := dumpAll(g.TB, g.all[0].State())
		return !slices.ContainsFunc(g.all[1:], func(s *Store) bool { return !maps.Equal(dumpAll(g.TB, s.State()), want) })
	})
}

func hasJob(s *Store, id string) bool {
	return s.State().Snapshot().Job(nil, cluster.JobKey{Namespace: cluster.DefaultNamespace, ID: id}) != nil
}

func TestFormation(t *testing.T) {
	for _, expect := range []int{3, 5} {
		t.Run(fmt.Sprint(expect), func(t *testing.T) {
			t.Parallel()
			g := newGroup(t)
			g.grow(expect)
			ids := map[string]bool{}
			for _, s := range g.all {
				ids[s.member.cluster()] = true
				mustApply(t, s, register("by-"+s.cfg.Name))
				if !hasJob(s, "by-"+s.cfg.Name) {
					t.Errorf("%s does not see its own write", s.cfg.Name)
				}
				if meta := s.State().Snapshot().ClusterMeta(nil); meta == nil || meta.ClusterID != s.member.cluster() {
					t.Errorf("%s: cluster is %+v in the state and %s in the folder", s.cfg.Name, meta, s.member.cluster())
				}
			}
			if len(ids) != 1 {
				t.Errorf("%d clusters", len(ids))
			}
			g.agree()
		})
	}
}

// TestFormationInAnyOrder starts servers that know each other in a line only, and
// more than are expected.
func TestFormationOfALine(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	for i := range 4 {
		g.start(fmt.Sprintf("s%d", i), t.TempDir(), func(c *Config) {
			c.BootstrapExpect = 3
			if i > 0 {
				c.RetryJoin = []string{g.all[i-1].Addr()}
			}
		})
	}
	g.settled(4)
	g.agree()
}

func TestTooFewDoNotBegin(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	a := g.start("a", t.TempDir(), func(c *Config) { c.BootstrapExpect = 3 })
	b := g.start("b", t.TempDir(), func(c *Config) { c.BootstrapExpect = 3 })
	other := g.start("c", t.TempDir(), func(c *Config) { c.BootstrapExpect = 5 })
	eventually(t, "all have met", func() bool {
		return a.circle.get(b.ID()).intro != nil && b.circle.get(a.ID()).intro != nil && a.circle.get(other.ID()).intro != nil
	})
	for _, s := range g.all {
		if s.begun() {
			t.Errorf("%s began a cluster", s.cfg.Name)
		}
	}
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := a.Apply(short, register("x")); err == nil {
		t.Error("a write without a cluster")
	}
}

// TestCalledOffFormation has servers promise themselves to an initiator that dies.
func TestCalledOffFormation(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	expect := func(c *Config) { c.BootstrapExpect = 3 }
	a, b := g.start("a", t.TempDir(), expect), g.start("b", t.TempDir(), expect)
	eventually(t, "they have met", func() bool { return a.circle.get(b.ID()).addr != "" && b.circle.get(a.ID()).addr != "" })
	f := clusterNote{ClusterID: newUUID(), Initiator: a.ID(), InitiatorAddr: a.Addr()}
	b.member.mu.Lock()
	err := b.member.write(f)
	b.member.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	b.poke()
	eventually(t, "the promise is taken back", func() bool { return b.member.promise() == nil })
	if _, err := os.Stat(b.member.path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the note is still there: %v", err)
	}
	g.start("c", t.TempDir(), expect)
	g.settled(3)
}

func TestPromises(t *testing.T) {
	dir := t.TempDir()
	m, err := openMembership(dir, false)
	if err != nil {
		t.Fatal(err)
	}
	one, two := formation("one"), formation("two")
	if err := errors.Join(m.bind(one), m.bind(one)); err != nil {
		t.Fatal(err)
	}
	if err := m.bind(two); err == nil {
		t.Error("bound to two formations")
	}
	if m, err = openMembership(dir, false); err != nil || m.promise() == nil || m.bind(two) == nil {
		t.Errorf("the promise is forgotten: %v", err)
	}
	if m.begin("two") || !m.begin("one") || m.cluster() != "one" {
		t.Error("the wrong cluster began")
	}
	if err := m.release("one"); err != nil || m.cluster() != "one" {
		t.Error("released although it began")
	}
	if m, err = openMembership(dir, true); err != nil || m.cluster() != "one" || m.promise() != nil {
		t.Errorf("a log does not make the promise good: %v", err)
	}
	if err := m.belong("two"); err == nil {
		t.Error("changed the cluster")
	}
	if _, err := openMembership(dir, false); err == nil || !strings.Contains(err.Error(), "its log is gone") {
		t.Errorf("a folder without its log: %v", err)
	}
	mustWrite(t, filepath.Join(dir, clusterFile), "{")
	if _, err := openMembership(dir, true); err == nil || !strings.Contains(err.Error(), "is damaged") {
		t.Errorf("a damaged note: %v", err)
	}
}

func TestTwoClustersRefuseEachOther(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	alone := func(c *Config) { c.BootstrapExpect, c.RetryJoin = 1, nil }
	a, b := g.start("a", t.TempDir(), alone), g.start("b", t.TempDir(), alone)
	eventually(t, "both lead", func() bool {
		return a.IsLeader() && b.IsLeader() && a.member.cluster() != "" && b.member.cluster() != ""
	})
	var refused *refusal
	if err := a.meet(b.Addr(), ""); err == nil {
		t.Error("they met")
	}
	for _, kind := range []byte{kindRaft, kindPeers, kindFleet} {
		_, err := a.port.dial(t.Context(), kind, b.Addr(), "")
		if !errors.As(err, &refused) || !strings.Contains(err.Error(), "belong") {
			t.Errorf("kind %c: %v", kind, err)
		}
	}
	_, err := a.port.dial(t.Context(), kindPeers, b.Addr(), "")
	if err == nil || !strings.Contains(err.Error(), "this server belongs to cluster "+b.member.cluster()+", not "+a.member.cluster()) {
		t.Errorf("refused with %v", err)
	}
}

func TestWrongRegionAndServer(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	a := g.start("a", t.TempDir(), func(c *Config) { c.BootstrapExpect, c.RetryJoin = 1, nil })
	b := g.start("b", t.TempDir(), func(c *Config) { c.BootstrapExpect, c.Region = 1, "west" })
	_, err := b.port.dial(t.Context(), kindPeers, a.Addr(), "")
	if err == nil || !strings.Contains(err.Error(), `this server belongs to region "global", not "west"`) {
		t.Errorf("refused with %v", err)
	}
	other := newUUID()
	_, err = a.port.dial(t.Context(), kindPeers, a.Addr(), other)
	if err == nil || !strings.Contains(err.Error(), "this is server "+a.ID()+", not "+other) {
		t.Errorf("refused with %v", err)
	}
	raw, err := net.Dial("tcp", a.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if _, err := io.WriteString(raw, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(raw); len(b) > 0 {
		t.Errorf("HTTP was answered with %q, %v", b, err)
	}
	_ = b
}

func TestJoinAndReplace(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	g.grow(3)
	mustApply(t, g.leader(), register("before"))
	// A late one is a non-voter first. With a long stabilisation time it stays that.
	conf := cluster.DefaultAutopilotConfig()
	conf.ServerStabilizationTime = time.Hour
	mustApply(t, g.leader(), &cluster.SetAutopilotConfig{Config: conf})
	late := g.start("late", t.TempDir())
	eventually(t, "the late one has the state", func() bool { return hasJob(late, "before") })
	g.settledWith(late)
	// Autopilot promotes at once while it has run for less than the stabilisation time.
	g.settled(4)

	// Dead for good: the others forget it, and a new one takes its place.
	dead := g.all[1]
	if dead == g.leader() {
		dead = g.all[2]
	}
	g.crash(dead)
	g.settled(3)
	eventually(t, "the dead one's record is gone", func() bool { return g.leader().State().Snapshot().Server(nil, dead.ID()) == nil })
	g.start("new", t.TempDir())
	g.settled(4)
	g.agree()
}

// settledWith waits until a server is in the configuration.
func (g *group) settledWith(s *Store) {
	g.Helper()
	eventually(g.TB, s.cfg.Name+" is a member", func() bool { return g.leader().inConfiguration(s.id) })
}

func TestLeaveRemoveTransfer(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	leader := g.grow(3)
	// Transfer, asked of a follower.
	to := g.follower()
	if err := g.follower().TransferLeadership(t.Context(), to.ID()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the other leads", to.IsLeader)
	err := leader.TransferLeadership(t.Context(), "nobody")
	if cluster.CodeOf(err) != cluster.CodeNotFound || !strings.Contains(err.Error(), `id "nobody" was not found in the Raft configuration`) {
		t.Errorf("transfer to nobody: %v", err)
	}
	if err := leader.RemoveServer(t.Context(), "nobody"); cluster.CodeOf(err) != cluster.CodeNotFound {
		t.Errorf("remove nobody: %v", err)
	}
	// The leader leaves.
	left := g.leader()
	if err := left.Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.crash(left)
	stayed := g.leader()
	status := map[string]string{}
	for _, m := range stayed.Members() {
		status[m.ID] = m.Status
	}
	if status[left.ID()] != MemberLeft || len(status) != 3 {
		t.Errorf("members %v", status)
	}
	g.settled(2)
	// A removed server that runs on stays out until it is started anew.
	out := g.follower()
	if err := out.RemoveServer(t.Context(), out.ID()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it asked to come back, and was refused", func() bool {
		out.circle.mu.Lock()
		defer out.circle.mu.Unlock()
		for text := range out.circle.heard {
			if strings.Contains(text, "restart it to let it join again") {
				return true
			}
		}
		return false
	})
	if stayed.inConfiguration(out.id) {
		t.Error("it came back")
	}
	if err := stayed.RemoveServer(t.Context(), stayed.ID()); cluster.CodeOf(err) != cluster.CodeConflict {
		t.Errorf("the last voter left: %v", err)
	}
	if err := stayed.Leave(t.Context()); cluster.CodeOf(err) != cluster.CodeConflict {
		t.Errorf("the last voter left: %v", err)
	}
	mustApply(t, stayed, register("alone"))
	out = g.again(out)
	g.settled(2)
	g.agree()
}

func TestLeaderDies(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	g.grow(3)
	stop, acked := make(chan struct{}), make(chan string, 1<<16)
	var writers sync.WaitGroup
	for i, s := range slices.Clone(g.all) {
		writers.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				id := fmt.Sprintf("w-%d-%d", i, n)
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				c := register(id)
				c.EnforceIndex = true // applied twice, it would be refused
				_, err := s.Apply(ctx, c)
				cancel()
				switch {
				case err == nil:
					acked <- id
				case cluster.CodeOf(err) == cluster.CodeConflict:
					t.Errorf("%s was applied twice: %v", id, err)
				}
			}
		})
	}
	for range 1 {
		eventually(t, "writes go on", func() bool { return len(acked) > 100 })
		dead := g.leader()
		g.crash(dead)
		start := time.Now()
		g.leader()
		t.Logf("a new leader after %s", time.Since(start))
		n := len(acked)
		eventually(t, "writes go on", func() bool { return len(acked) > n+100 })
		go dead.Close() // its writers end
	}
	close(stop)
	writers.Wait()
	close(acked)
	g.agree()
	for id := range acked {
		if !hasJob(g.all[0], id) {
			t.Errorf("%s was acknowledged and is lost", id)
		}
	}
}

// TestForwardOverBreakingConnections severs all connections between servers again
// and again while followers write.
func TestForwardOverBreakingConnections(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	g.grow(3)
	s := g.follower()
	stop := make(chan struct{})
	var breaker sync.WaitGroup
	breaker.Go(func() {
		for range 30 { // then the last writes may end on the busiest machine
			select {
			case <-stop:
				return
			case <-time.After(100 * time.Millisecond):
				s.port.sever(func(c *peerConn) bool {
					c.mu.Lock()
					defer c.mu.Unlock()
					return !c.raft
				})
			}
		}
	})
	var writers sync.WaitGroup
	for w := range 8 {
		writers.Go(func() {
			for n := range 25 {
				c := register(fmt.Sprintf("f-%d-%d", w, n))
				c.EnforceIndex = true
				if _, err := s.Apply(t.Context(), c); err != nil {
					t.Errorf("%s: %v", c.Job.ID, err)
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	breaker.Wait()
	g.agree()
}

func TestForwardedErrors(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	g.grow(3)
	s := g.follower()
	mustApply(t, s, register("a"))
	c := register("a")
	c.EnforceIndex = true
	_, err := s.Apply(t.Context(), c)
	_, want := g.leader().Apply(t.Context(), c)
	if cluster.CodeOf(err) != cluster.CodeConflict || err.Error() != want.Error() {
		t.Errorf("refused with %v; the leader says %v", err, want)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Apply(ctx, register("b")); !errors.Is(err, context.Canceled) {
		t.Errorf("with an ended context: %v", err)
	}
	// A newer version's command must not reach an older leader's log.
	if _, err := s.applyEntry(t.Context(), seal([]byte{250, 0x80})); cluster.CodeOf(err) != cluster.CodeUnsupported {
		t.Errorf("unknown kind: %v", err)
	}
	if _, err := s.applyEntry(t.Context(), []byte("damaged entry")); cluster.CodeOf(err) != cluster.CodeInvalid {
		t.Errorf("damaged: %v", err)
	}
	g.agree()
}

func TestPartition(t *testing.T) {
	t.Parallel()
	g := newGroup(t, func(c *Config) { c.LeaderWait = 3 * time.Second })
	old := g.grow(3)
	mustApply(t, old, register("before"))
	g.net.isolate(old.cfg.Name)
	if err := old.ReadIndex(t.Context(), true); cluster.CodeOf(err) != cluster.CodeNoLeader {
		t.Errorf("verified read in the minority: %v", err)
	}
	eventually(t, "the minority's leader steps down", func() bool { return !old.IsLeader() })
	if _, err := old.Apply(t.Context(), register("minority")); cluster.CodeOf(err) != cluster.CodeNoLeader && cluster.CodeOf(err) != cluster.CodeUnavailable {
		t.Errorf("write in the minority: %v", err)
	}
	if !errors.Is(old.NoLeader(), cluster.ErrNoLeader) {
		t.Errorf("no leader: %v", old.NoLeader())
	}
	var majority *Store
	for _, s := range g.all {
		if s != old {
			majority = s
		}
	}
	eventually(t, "the majority writes", func() bool { _, err := majority.Apply(t.Context(), register("majority")); return err == nil })
	g.net.isolate()
	eventually(t, "the old leader follows", func() bool { return hasJob(old, "majority") })
	if hasJob(old, "minority") {
		t.Error("a refused write appeared")
	}
	g.settled(3)
	g.agree()
}

// TestCleanedUpServerComesBack cuts a follower off until it is removed, and lets
// it come back.
func TestCleanedUpServerComesBack(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	g.grow(3)
	cut := g.follower()
	g.net.isolate(cut.cfg.Name)
	eventually(t, "the silent server is removed", func() bool {
		l := g.leaderOf(cut)
		return l != nil && !l.inConfiguration(cut.id)
	})
	if n := len(g.leaderOf(cut).configuration().Servers); n != 2 {
		t.Errorf("%d servers are left", n)
	}
	g.net.isolate()
	g.settled(3)
	g.agree()
}

// leaderOf is the leader among all but one.
func (g *group) leaderOf(except *Store) *Store {
	for _, s := range g.all {
		if s != except && s.IsLeader() {
			return s
		}
	}
	return nil
}

func TestCleanupKeepsTheQuorum(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	g.grow(3)
	// Two of three are gone: nothing may be removed, and one that comes back is enough.
	leader := g.leader()
	var gone []*Store
	for _, s := range slices.Clone(g.all) {
		if s != leader {
			gone = append(gone, s)
		}
	}
	g.net.isolate(leader.cfg.Name)
	eventually(t, "the others count as failed", func() bool {
		return leader.status(gone[0].ID()) == MemberFailed && leader.status(gone[1].ID()) == MemberFailed
	})
	if n := len(leader.configuration().Servers); n != 3 {
		t.Errorf("%d servers are left of 3", n)
	}
	g.net.isolate()
	g.settled(3)
}

func TestReadIndex(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	g.grow(3)
	for i := range 60 {
		w, r := g.all[i%3], g.all[(i/3)%3]
		id := fmt.Sprintf("r-%d", i)
		mustApply(t, w, register(id))
		if err := r.ReadIndex(t.Context(), i%2 == 0); err != nil {
			t.Fatal(err)
		}
		if !hasJob(r, id) {
			t.Errorf("%s misses %s, written through %s before", r.cfg.Name, id, w.cfg.Name)
		}
	}
}

func TestRestoreReachesAll(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	g.grow(3)
	mustApply(t, g.follower(), register("kept"))
	archive, err := g.follower().SaveArchive(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(archive)
	if err = errors.Join(err, archive.Close()); err != nil {
		t.Fatal(err)
	}
	mustApply(t, g.follower(), register("gone"))
	timelines := map[string]bool{g.leader().State().Snapshot().Timeline(nil): true}
	for i, s := range []*Store{g.leader(), g.follower()} {
		id := fmt.Sprintf("gone-%d", i)
		mustApply(t, s, register(id))
		if _, err := s.RestoreArchive(t.Context(), strings.NewReader(string(b))); err != nil {
			t.Fatal(err)
		}
		for _, other := range g.all {
			if err := other.ReadIndex(t.Context(), true); err != nil {
				t.Fatal(err)
			}
			if !hasJob(other, "kept") || hasJob(other, "gone") || hasJob(other, id) {
				t.Errorf("%s does not hold the restored state", other.cfg.Name)
			}
			timelines[other.State().Snapshot().Timeline(nil)] = true
		}
		if len(timelines) != i+2 || timelines[""] {
			t.Errorf("after %d restores there were the timelines %v", i+1, timelines)
		}
		mustApply(t, s, register("after"))
	}
	g.settled(3)
	g.agree()
	if _, err := g.follower().RestoreArchive(t.Context(), strings.NewReader("no archive")); cluster.CodeOf(err) != cluster.CodeInvalid {
		t.Errorf("a bad archive through a follower: %v", err)
	}
	// Into another cluster: its own servers and name stay.
	other := newGroup(t)
	other.grow(3)
	name := other.leader().member.cluster()
	if _, err := other.follower().RestoreArchive(t.Context(), strings.NewReader(string(b))); err != nil {
		t.Fatal(err)
	}
	other.settled(3)
	other.agree()
	snap := other.leader().State().Snapshot()
	if snap.ClusterMeta(nil).ClusterID != name || len(snap.Servers(nil)) != 3 || snap.Server(nil, other.all[0].ID()) == nil {
		t.Errorf("the archive's servers came along: %+v %+v", snap.ClusterMeta(nil), snap.Servers(nil))
	}
}

func TestLoneServerGrowsAndShrinks(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	a := g.start("a", t.TempDir(), func(c *Config) { c.BootstrapExpect, c.RetryJoin = 1, nil })
	mustApply(t, a, register("alone"))
	g.start("b", t.TempDir())
	g.start("c", t.TempDir())
	g.settled(3)
	g.crash(a)
	mustApply(t, g.leader(), register("without-a"))
	for len(g.all) > 1 {
		s := g.follower()
		eventually(t, "it may leave", func() bool {
			err := s.Leave(t.Context())
			if err != nil && s.circle.rarely(err.Error()) {
				t.Log(err)
			}
			return err == nil
		})
		g.crash(s)
	}
	last := g.all[0]
	eventually(t, "one voter is left", func() bool { return last.voterCount() == 1 && last.IsLeader() })
	mustApply(t, last, register("alone-again"))
	start := time.Now()
	last = g.again(last)
	eventually(t, "it leads again", last.IsLeader)
	t.Logf("led again after %s", time.Since(start))
}

func TestDialPeer(t *testing.T) {
	t.Parallel()
	g := newGroup(t)
	g.grow(3)
	from, to := g.all[0], g.all[1]
	conn, err := from.DialPeer(t.Context(), to.ID())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	in, err := to.PeerListener().Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if id := in.(*peerConn).PeerID(); id != from.ID() {
		t.Errorf("came from %s", id)
	}
	go io.WriteString(conn, "hello")
	b := make([]byte, 5)
	if _, err := io.ReadFull(in, b); err != nil || string(b) != "hello" {
		t.Errorf("got %q, %v", b, err)
	}
	if _, err := from.DialPeer(t.Context(), newUUID()); cluster.CodeOf(err) != cluster.CodeNotFound {
		t.Errorf("dialled nobody: %v", err)
	}
}

func formation(id string) *pb.Formation {
	return &pb.Formation{Id: id, Initiator: "server", Addr: nowhere}
}
