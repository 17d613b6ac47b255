package fleet

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/fleet/pb"
)

func TestHello(t *testing.T) {
	f := start(t, Config{})
	f.attach(nodeA)
	f.awaitStatus(nodeA, cluster.NodeStatusReady)
	if !f.Connected(nodeA) || f.Connected(nodeB) {
		t.Error("connected nodes are not known as such")
	}
	if err := f.dial(nodeB, 2).end(); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("protocol 2: %v", err)
	}
	bad := &node{fleet: f}
	bad.stream, _ = f.client().Attach(t.Context())
	bad.say(&pb.NodeMessage{Message: &pb.NodeMessage_Heartbeat{Heartbeat: &pb.Heartbeat{}}})
	if err := bad.end(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("heartbeat instead of hello: %v", err)
	}
	if err := f.dial("", 1).end(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a node without a name: %v", err)
	}
	if f.store.State().Snapshot().Node(nil, nodeB) != nil {
		t.Error("a refused node was registered")
	}
}

func TestHelloIsAwaitedForABoundedTime(t *testing.T) {
	f := start(t, Config{HelloTimeout: time.Millisecond})
	stream, err := f.client().Attach(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("a silent stream: %v", err)
	}
}

func TestNodeChangesItsRecordAndNoOther(t *testing.T) {
	f := start(t, Config{})
	n, _ := f.attach(nodeA)
	changed := record(nodeA)
	changed.Drivers["onnx"].Healthy = false
	n.say(&pb.NodeMessage{Message: &pb.NodeMessage_Node{Node: &pb.NodeChanged{Node: cluster.Marshal(changed)}}})
	f.await("an unhealthy driver", func(s *cluster.Snapshot, ws cluster.WatchSet) bool { return !s.Node(ws, nodeA).Drivers["onnx"].Healthy })
	n.say(&pb.NodeMessage{Message: &pb.NodeMessage_Node{Node: &pb.NodeChanged{Node: cluster.Marshal(record(nodeB))}}})
	if err := n.end(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("speaking for another node: %v", err)
	}
}

func TestSilentNodeIsDownUntilItComesBack(t *testing.T) {
	f := start(t, Config{TTL: 100 * time.Millisecond})
	n := f.dial(nodeA, 1)
	f.awaitStatus(nodeA, cluster.NodeStatusDown)
	if err := n.end(); status.Code(err) != codes.DeadlineExceeded && status.Code(err) != codes.Aborted {
		t.Errorf("the session of a silent node ended with %v", err)
	}
	f.dial(nodeA, 1)
	f.await("the node's return", func(s *cluster.Snapshot, ws cluster.WatchSet) bool { // it may be down again already
		return slices.ContainsFunc(s.Node(ws, nodeA).Events, func(e *cluster.NodeEvent) bool { return e.Message == "Node reregistered" })
	})
	// Gone without a word counts as silent too.
	gone := f.dial(nodeB, 1)
	f.await("the other node", func(s *cluster.Snapshot, ws cluster.WatchSet) bool { return s.Node(ws, nodeB) != nil })
	gone.cancel()
	f.awaitStatus(nodeB, cluster.NodeStatusDown)
}

func TestHeartbeatsKeepANode(t *testing.T) {
	const ttl = time.Second
	f := start(t, Config{TTL: ttl})
	n := f.dial(nodeA, 1)
	f.dial(nodeB, 1) // never heard of again
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := make(chan struct{})
	defer close(stop)
	wg.Go(func() {
		tick := time.NewTicker(ttl / 20)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if err := n.beat(); err != nil {
					return
				}
			case <-stop:
				return
			}
		}
	})
	f.awaitStatus(nodeB, cluster.NodeStatusDown) // which takes a TTL
	if n := f.store.State().Snapshot().Node(nil, nodeA); n.Status != cluster.NodeStatusReady {
		t.Errorf("a node that is heard is %s", n.Status)
	}
}

func TestNewerSessionReplacesTheOlder(t *testing.T) {
	f := start(t, Config{})
	old, _ := f.attach(nodeA)
	young, _ := f.attach(nodeA)
	if err := old.end(); status.Code(err) != codes.Aborted {
		t.Errorf("the older session ended with %v", err)
	}
	f.place("a", nodeA, nil)
	if d := young.desired(); len(d.Allocs) != 1 {
		t.Errorf("the newer session got %v", d)
	}
	if !f.Connected(nodeA) {
		t.Error("the end of the older session took the newer one along")
	}
	young.cancel()
	f.awaitDetached(nodeA)
}

func allocOf(t *testing.T, d *pb.Desired) *cluster.Allocation {
	t.Helper()
	if len(d.Allocs) != 1 {
		t.Fatalf("desired %d allocations, want 1", len(d.Allocs))
	}
	a := new(cluster.Allocation)
	if err := cluster.Unmarshal(d.Allocs[0], a); err != nil {
		t.Fatal(err)
	}
	return a
}

func TestDesiredState(t *testing.T) {
	f := start(t, Config{})
	first, d := f.attach(nodeA)
	other, _ := f.attach(nodeB)
	if len(d.Allocs) != 0 {
		t.Errorf("a new node is to run %d allocations", len(d.Allocs))
	}
	id := f.place("a", nodeA, nil)
	d = first.desired()
	if a := allocOf(t, d); a.ID != id || d.Full || len(d.Jobs) != 1 {
		t.Errorf("placement: %+v with %d jobs, full %v", a, len(d.Jobs), d.Full)
	}
	// What the node itself says is no news to it; a stop is, without the job again.
	first.report(1, cluster.AllocClientRunning, id)
	if ack := first.next().GetAck(); ack.GetSeq() != 1 {
		t.Errorf("ack %v", ack)
	}
	f.must(&cluster.DeregisterJob{Namespace: cluster.DefaultNamespace, JobID: "a", EvalID: "eval-stop"})
	f.plan("eval-stop", &cluster.Plan{Stop: []*cluster.AllocStop{{AllocID: id, DesiredStatus: cluster.AllocDesiredStop}}})
	d = first.desired()
	if a := allocOf(t, d); a.DesiredStatus != cluster.AllocDesiredStop || len(d.Jobs) != 0 {
		t.Errorf("stop: %+v with %d jobs", a, len(d.Jobs))
	}
	// A second session hears everything.
	again, d := f.attach(nodeA)
	if a := allocOf(t, d); a.ID != id || len(d.Jobs) != 1 {
		t.Errorf("second session: %+v with %d jobs", a, len(d.Jobs))
	}
	again.report(1, cluster.AllocClientComplete, id)
	again.next()
	f.must(&cluster.Reap{Allocs: []string{id}})
	if d = again.desired(); !slices.Equal(d.Gone, []string{id}) || len(d.Allocs) != 0 {
		t.Errorf("reaped: %v", d)
	}
	// The other node saw nothing of all this: its own allocation comes next.
	mine := f.place("b", nodeB, nil)
	if a := allocOf(t, other.desired()); a.ID != mine {
		t.Errorf("the other node got %s", a.ID)
	}
}

func TestRestoreSaysEverythingAgain(t *testing.T) {
	f := start(t, Config{})
	n, _ := f.attach(nodeA)
	id := f.place("a", nodeA, nil)
	n.desired()
	r := cluster.NewRestore()
	err := f.store.State().Snapshot().Records(func(table *cluster.Table, _ string, v any) error { return r.Add(table, cluster.Marshal(v)) })
	if err != nil {
		t.Fatal(err)
	}
	same, err := r.Done()
	if err != nil {
		t.Fatal(err)
	}
	f.store.restore(same)
	d := n.desired()
	if a := allocOf(t, d); a.ID != id || !d.Full || len(d.Jobs) != 1 {
		t.Errorf("after a restore: %+v, %d jobs, full %v", a, len(d.Jobs), d.Full)
	}
	// A state that does not know the node: it registers again and forgets all.
	f.store.restore(cluster.NewState())
	if err := n.end(); status.Code(err) != codes.Aborted {
		t.Errorf("the session of a node that the state forgot ended with %v", err)
	}
	if _, d := f.attach(nodeA); len(d.Allocs) != 0 {
		t.Errorf("after the loss of everything: %v", d)
	}
}

// TestReturningNodeIsToldTheDifference: what a node names as known is not said again,
// unless it is of another timeline or of a future that was lost.
func TestReturningNodeIsToldTheDifference(t *testing.T) {
	f := start(t, Config{})
	f.must(&cluster.SetClusterMeta{ClusterID: "c"})
	n, first := f.attach(nodeA)
	known := []*pb.KnownAlloc{}
	place := func(job string) string {
		f.place(job, nodeA, nil)
		a := allocOf(t, n.desired())
		known = append(known, &pb.KnownAlloc{Id: a.ID, Index: a.AllocModifyIndex})
		return a.ID
	}
	same, changed, gone := place("a"), place("b"), place("c")
	n.cancel()
	f.awaitDetached(nodeA)
	f.must(&cluster.UpdateAllocs{Allocs: []*cluster.Allocation{
		{ID: same, ClientStatus: cluster.AllocClientRunning}, // no news to the node
		{ID: gone, ClientStatus: cluster.AllocClientComplete},
	}})
	for _, job := range []string{"b", "c"} {
		f.must(&cluster.DeregisterJob{Namespace: cluster.DefaultNamespace, JobID: job, EvalID: "stop-" + job})
	}
	f.plan("stop-b", &cluster.Plan{Stop: []*cluster.AllocStop{{AllocID: changed, DesiredStatus: cluster.AllocDesiredStop}}})
	f.must(&cluster.Reap{Allocs: []string{gone}})
	fresh := f.place("d", nodeA, nil)
	told := func(timeline string, known []*pb.KnownAlloc) *pb.Desired {
		t.Helper()
		n := f.hello(nodeA, &pb.Hello{Protocol: 1, Timeline: timeline, Known: known})
		if n.next().GetWelcome() == nil {
			t.Fatal("no welcome")
		}
		return n.desired()
	}
	ids := func(d *pb.Desired) (ids []string) {
		for _, b := range d.Allocs {
			a := new(cluster.Allocation)
			if err := cluster.Unmarshal(b, a); err != nil {
				t.Fatal(err)
			}
			ids = append(ids, a.ID)
		}
		return ids
	}
	if d := told(first.Timeline, known); d.Full || d.Timeline != first.Timeline || len(d.Jobs) != 2 ||
		!slices.Equal(ids(d), []string{changed, fresh}) || !slices.Equal(d.Gone, []string{gone}) {
		t.Errorf("a node that comes again is told full %v, %v, gone %v, with %d jobs", d.Full, ids(d), d.Gone, len(d.Jobs))
	}
	all := []string{same, changed, fresh}
	if d := told("another", known); !d.Full || !slices.Equal(ids(d), all) {
		t.Errorf("of another timeline it is told full %v, %v", d.Full, ids(d))
	}
	if d := told(first.Timeline, append(known, &pb.KnownAlloc{Id: "x", Index: 1 << 40})); !d.Full || !slices.Equal(ids(d), all) {
		t.Errorf("of a future that was lost it is told full %v, %v", d.Full, ids(d))
	}
	if d := told(first.Timeline, []*pb.KnownAlloc{known[0]}); d.Full || !slices.Equal(ids(d), all[1:]) {
		t.Errorf("with one known it is told full %v, %v", d.Full, ids(d))
	}
}

// TestMissedNodeStaysInItsSession: a node that was counted as down, but is heard on
// its stream, counts as there again; it is told only what has changed.
func TestMissedNodeStaysInItsSession(t *testing.T) {
	f := start(t, Config{})
	n, _ := f.attach(nodeA)
	f.place("a", nodeA, nil)
	n.desired()
	f.must(&cluster.UpdateNodeStatus{Updates: []cluster.NodeStatusUpdate{{NodeID: nodeA, Status: cluster.NodeStatusDown}}})
	for f.store.State().Snapshot().Node(nil, nodeA).Status != cluster.NodeStatusReady {
		n.heartbeat()
	}
	id := f.place("b", nodeA, nil)
	if d := n.desired(); d.Full || allocOf(t, d).ID != id {
		t.Errorf("it was told %v", d)
	}
}

// TestNodeIsKnownAsItSaidLast: a registration that comes late changes nothing, and a
// restored state that knows a node as it once was has it register again.
func TestNodeIsKnownAsItSaidLast(t *testing.T) {
	f := start(t, Config{})
	n, _ := f.attach(nodeA)
	say := func(revision uint64, class string) *cluster.Node {
		r := record(nodeA)
		r.Revision, r.NodeClass = revision, class
		return r
	}
	known := func() *cluster.Node { return f.store.State().Snapshot().Node(nil, nodeA) }
	change := func(r *cluster.Node) {
		n.say(&pb.NodeMessage{Message: &pb.NodeMessage_Node{Node: &pb.NodeChanged{Node: cluster.Marshal(r)}}})
		f.await("the change", func(s *cluster.Snapshot, ws cluster.WatchSet) bool { return s.Node(ws, nodeA).Revision == r.Revision })
	}
	first := cluster.Revision(9, 0)
	change(say(first, "old"))
	r := cluster.NewRestore()
	err := f.store.State().Snapshot().Records(func(table *cluster.Table, _ string, v any) error { return r.Add(table, cluster.Marshal(v)) })
	if err != nil {
		t.Fatal(err)
	}
	earlier, err := r.Done()
	if err != nil {
		t.Fatal(err)
	}
	change(say(first+1, "new"))
	f.must(&cluster.RegisterNode{Node: say(first, "old")}) // as another server forwards it
	if got := known(); got.NodeClass != "new" {
		t.Errorf("a late registration made the node %q", got.NodeClass)
	}
	n.heartbeat()
	f.store.restore(earlier)
	if err := n.end(); status.Code(err) != codes.Aborted {
		t.Errorf("the session of a node that the state knows as it was ended with %v", err)
	}
}

func TestPurgedNodeRegistersAnew(t *testing.T) {
	f := start(t, Config{})
	n, _ := f.attach(nodeA)
	f.must(&cluster.DeregisterNode{NodeID: nodeA})
	if err := n.end(); status.Code(err) != codes.Aborted {
		t.Errorf("the session of a purged node ended with %v", err)
	}
	f.attach(nodeA)
	f.awaitStatus(nodeA, cluster.NodeStatusReady)
}

func TestSplitKeepsTheWhole(t *testing.T) {
	whole := &pb.Desired{Index: 7, Full: true, Gone: []string{"g"}}
	ids := map[string]bool{}
	for i := range 10 {
		whole.Jobs = append(whole.Jobs, []byte(strings.Repeat("j", 30)))
		whole.Allocs = append(whole.Allocs, fmt.Appendf(nil, "%040d", i))
		ids[fmt.Sprint(i)] = true
	}
	if one := split(whole, 1<<20, maps.Keys(ids)); len(one) != 1 || !one[0].Full || one[0].All != nil || len(one[0].Allocs) != 10 {
		t.Errorf("a small state was sent in %d parts: %v", len(one), one)
	}
	parts := split(whole, 100, maps.Keys(ids))
	var jobs, allocs [][]byte
	for i, p := range parts {
		last, size := i == len(parts)-1, 0
		for _, b := range slices.Concat(p.Jobs, p.Allocs) {
			size += len(b)
		}
		if size > 100 || p.Index != 7 || p.Full != last || (p.Gone != nil) != last || (p.All != nil) != last {
			t.Errorf("part %d of %d: %d bytes, full %v", i, len(parts), size, p.Full)
		}
		jobs, allocs = append(jobs, p.Jobs...), append(allocs, p.Allocs...)
	}
	if len(jobs) != 10 || !slices.EqualFunc(allocs, whole.Allocs, slices.Equal) || len(parts[len(parts)-1].All) != 10 {
		t.Errorf("%d parts hold %d jobs and %d allocations", len(parts), len(jobs), len(allocs))
	}
	if parts := split(&pb.Desired{Allocs: [][]byte{make([]byte, 200)}}, 100, nil); len(parts) != 1 {
		t.Errorf("one large record came in %d parts", len(parts))
	}
}

func TestStatusIsAcknowledgedWhenCommitted(t *testing.T) {
	f := start(t, Config{})
	a, _ := f.attach(nodeA)
	b, _ := f.attach(nodeB)
	mine := f.place("a", nodeA, nil)
	a.desired()
	second := f.place("c", nodeA, nil)
	a.desired()
	theirs := f.place("b", nodeB, nil)
	b.desired()
	gate := make(chan struct{})
	f.store.mu.Lock()
	f.store.gate, f.store.entered = gate, make(chan struct{}, 10)
	f.store.mu.Unlock()
	a.report(5, cluster.AllocClientRunning, mine)
	<-f.store.entered // the first entry is on its way: what comes now shares the next
	a.report(6, cluster.AllocClientRunning, second, theirs)
	a.report(7, cluster.AllocClientFailed, theirs, "nobody's")
	a.report(8, cluster.AllocClientFailed, theirs)
	if ack := a.next().GetAck(); ack.GetSeq() != 8 { // nothing of it is to be stored
		t.Errorf("got %v before the commit, want only the acknowledgement of 8", ack)
	}
	if got := f.store.State().Snapshot().Alloc(nil, mine).ClientStatus; got != cluster.AllocClientPending {
		t.Errorf("allocation is %s before the commit", got)
	}
	b.report(1, cluster.AllocClientRunning, theirs)
	close(gate)
	for _, want := range []uint64{5, 6, 7} {
		if ack := a.next().GetAck(); ack.GetSeq() != want {
			t.Errorf("ack %v, want %d", ack, want)
		}
	}
	if ack := b.next().GetAck(); ack.GetSeq() != 1 {
		t.Errorf("ack of the other node: %v", ack)
	}
	snap := f.store.State().Snapshot()
	for _, id := range []string{mine, second, theirs} {
		if got := snap.Alloc(nil, id).ClientStatus; got != cluster.AllocClientRunning {
			t.Errorf("allocation %s is %s", id, got)
		}
	}
	// While nobody leads a report waits, and the session stays.
	f.store.mu.Lock()
	f.store.gate, f.store.fail = nil, cluster.ErrNoLeader
	f.store.mu.Unlock()
	a.report(9, cluster.AllocClientRunning, mine)
	a.heartbeat()
	f.store.mu.Lock()
	f.store.fail = nil
	f.store.mu.Unlock()
	if ack := a.next().GetAck(); ack.GetSeq() != 9 {
		t.Errorf("after the return of the leader: %v", ack)
	}
	// A commit that is refused ends the session without an acknowledgement.
	f.store.mu.Lock()
	f.store.fail = cluster.Errorf(cluster.CodeTooLarge, "too large")
	f.store.mu.Unlock()
	a.report(10, cluster.AllocClientComplete, mine)
	if m, err := a.stream.Recv(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a refused commit: %v, %v", m, err)
	}
}

func TestStatusIsBatched(t *testing.T) {
	f := start(t, Config{})
	n, _ := f.attach(nodeA)
	const reports = 12
	var ids []string
	for i := range reports + 1 {
		ids = append(ids, f.place(fmt.Sprint("j", i), nodeA, nil))
		n.desired()
	}
	gate := make(chan struct{})
	f.store.mu.Lock()
	f.store.gate, f.store.entered = gate, make(chan struct{}, reports+1)
	f.store.mu.Unlock()
	n.report(0, cluster.AllocClientRunning, ids[reports])
	<-f.store.entered
	for i := range reports {
		n.report(uint64(i+1), cluster.AllocClientRunning, ids[i])
	}
	n.report(99, cluster.AllocClientRunning) // acknowledged at once: the others are in the queue
	if ack := n.next().GetAck(); ack.GetSeq() != 99 {
		t.Fatalf("ack %v", ack)
	}
	close(gate)
	for i := range reports + 1 {
		if ack := n.next().GetAck(); ack.GetSeq() != uint64(i) {
			t.Errorf("ack %v, want %d", ack, i)
		}
	}
	f.store.mu.Lock()
	defer f.store.mu.Unlock()
	if want := []int{1, reports}; !slices.Equal(f.store.updates, want) {
		t.Errorf("entries of %v allocations, want %v", f.store.updates, want)
	}
}
